/* y = x W^T for few to some dozen rows x, W read once per block of rows, in the order it lies in memory.
 *
 * One accumulator per (output, row) runs over all inputs, whatever the number of rows: a row's result does not depend
 * on its company. One row reads W row by row; more rows take blocks of four outputs by four rows, which is
 * what the registers hold. Prefetching far ahead matters more than anything else here.
 *
 * Activations come in four shapes (`Act`): float32; bfloat16; and for codes, fixed point of sixteen bits split into
 * two planes of signed bytes, x ~ step * (256 high + low), so that the byte products of AVX512-VNNI are exact. With
 * step = max|x| / 32512 the error of x is at most step / 2, and the error of the whole vector is below that of
 * rounding it to bfloat16.
 */
#pragma once
#include "common.h"

#define NEAR 16384        /* bytes ahead, into the first cache, one row */
#define FAR 32768         /* bytes ahead, into the second, more rows */
#define ROWS_FROM_CODES 8 /* int4: from here on decoding a block to bfloat16 is cheaper */

typedef enum { AS_FLOAT, AS_HALF, AS_BYTES, AS_NIBBLES } Shape;

typedef struct {
    Shape shape;
    int64_t rows, in, stride, group, groups;  /* stride: of a row, in elements of its type */
    void *data;
    float *step, *total;                      /* (rows), and sums of codes (rows, groups padded to 16) */
} Act;

INLINE int64_t padded_groups(int64_t groups) { return round_up(groups, 16) + 16; }

static Shape shape_for(const Matrix *m, int64_t rows, int64_t half) {
#ifdef __AVX512BF16__
    if (m->kind == BFLOAT16) return AS_HALF;
#ifdef __AVX512VNNI__
    if (half && m->kind == INT8) return AS_BYTES;
    if (half && m->kind == INT4) return rows < ROWS_FROM_CODES ? AS_NIBBLES : AS_HALF;
#endif
#endif
    (void)m, (void)rows, (void)half;
    return AS_FLOAT;
}

/* The row's largest absolute value over 32512, so that both planes stay within a signed byte. */
static float fixed_step(const float *x, int64_t n) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        /* max keeps its second operand if one is NaN: the NaN must survive into the step */
        __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(n - k), x + k));
        top = _mm512_mask_mov_ps(_mm512_max_ps(top, v), _mm512_cmp_ps_mask(top, top, _CMP_UNORD_Q), top);
    }
    float lanes[16], largest = 0;
    _mm512_storeu_ps(lanes, top);
    for (int i = 0; i < 16; i++) largest = lanes[i] > largest || lanes[i] != lanes[i] ? lanes[i] : largest;
    return largest / 32512.0f;
}

INLINE __m512i fixed16(const float *x, int64_t k, int64_t n, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(tail16(n - k), x + k), inverse));
}

/* Bring `rows` rows of x (stride ldx) into the shape that `m` multiplies with. */
static void prepare(Act *a, Shape shape, const Matrix *m, const float *x, int64_t ldx, int64_t rows) {
    int64_t in = m->in;
    a->shape = shape, a->rows = rows, a->in = in, a->group = m->group, a->groups = m->groups;
    if (shape == AS_FLOAT || shape == AS_HALF) {
        /* One line more than a multiple of 4 KiB, lest the rows fall on the same sets of the first cache. */
        a->stride = round_up(in, 64) + (shape == AS_FLOAT ? 16 : 32);
        for (int64_t n = 0; n < rows; n++)
            for (int64_t k = 0; k < round_up(in, 32); k += 16) {
                __m512 v = _mm512_maskz_loadu_ps(k < in ? tail16(in - k) : 0, x + n * ldx + k);
                if (shape == AS_FLOAT) _mm512_store_ps((float *)a->data + n * a->stride + k, v);
                else _mm256_store_si256((__m256i *)((uint16_t *)a->data + n * a->stride + k), narrow(v));
            }
        return;
    }
    int64_t plane = round_up(in, 128), G = padded_groups(m->groups);
    a->stride = 2 * plane + 64;
    for (int64_t n = 0; n < rows; n++) {
        const float *row = x + n * ldx;
        int8_t *out = (int8_t *)a->data + n * a->stride;
        float step = fixed_step(row, in);
        __m512 inverse = _mm512_set1_ps(step > 0 ? 1.0f / step : 0.0f);
        a->step[n] = step;
        memset(a->total + n * G, 0, G * sizeof(float));
        const int half_plane = shape == AS_NIBBLES;
        for (int64_t k = 0; k < plane; k += 16) {
            __m512i code = k < in ? fixed16(row, k, in, inverse) : _mm512_setzero_si512();
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
            __m512i low = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 8));
            if (k < in) a->total[n * G + k / m->group] += (float)_mm512_reduce_add_epi32(code);
            __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
            if (!half_plane) {
                _mm_store_si128((__m128i *)(out + k), h);
                _mm_store_si128((__m128i *)(out + plane + k), l);
                continue;
            }
            /* even inputs, then odd ones: they share a byte of the weight */
            const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            h = _mm_shuffle_epi8(h, split), l = _mm_shuffle_epi8(l, split);
            _mm_storel_epi64((__m128i *)(out + k / 2), h);
            _mm_storel_epi64((__m128i *)(out + plane / 2 + k / 2), _mm_srli_si128(h, 8));
            _mm_storel_epi64((__m128i *)(out + plane + k / 2), l);
            _mm_storel_epi64((__m128i *)(out + plane + plane / 2 + k / 2), _mm_srli_si128(l, 8));
        }
    }
}

#define EACH_M UNROLL for (int m = 0; m < M; m++)
#define EACH_N UNROLL for (int n = 0; n < N; n++)
#define ARGS const char *w, int64_t ldw, const Act *a, int64_t at, const float *scale, const float *zero, __m512 *out
#define FETCH(p) do { if (AHEAD == NEAR) _mm_prefetch((p) + AHEAD, _MM_HINT_T0); \
                      else if (AHEAD) _mm_prefetch((p) + AHEAD, _MM_HINT_T1); } while (0)

/* Kernels: sums over all inputs of M outputs times N rows from `at` on, one vector each, still to be summed. */
INLINE void float_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const float *x = (const float *)a->data + at * a->stride;
    (void)scale, (void)zero;
    EACH_M EACH_N out[m * N + n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < a->in; k += 16) {
        __mmask16 mask = tail16(a->in - k);
        __m512 wv[4];
        EACH_M { wv[m] = _mm512_maskz_loadu_ps(mask, (const float *)(w + m * ldw) + k); FETCH(w + m * ldw + 4 * k); }
        EACH_N { __m512 xv = _mm512_load_ps(x + n * a->stride + k);
                 EACH_M out[m * N + n] = _mm512_fmadd_ps(wv[m], xv, out[m * N + n]); }
    }
}

/* bfloat16 weights with float32 rows, for processors without bfloat16 products. */
INLINE void widening_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const float *x = (const float *)a->data + at * a->stride;
    (void)scale, (void)zero;
    EACH_M EACH_N out[m * N + n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < a->in; k += 16) {
        __mmask16 mask = tail16(a->in - k);
        __m512 wv[4];
        EACH_M { wv[m] = load_as_float(w + m * ldw, k, BFLOAT16, mask); FETCH(w + m * ldw + 2 * k); }
        EACH_N { __m512 xv = _mm512_load_ps(x + n * a->stride + k);
                 EACH_M out[m * N + n] = _mm512_fmadd_ps(wv[m], xv, out[m * N + n]); }
    }
}

#ifdef __AVX512BF16__
INLINE void half_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const uint16_t *x = (const uint16_t *)a->data + at * a->stride;
    (void)scale, (void)zero;
    EACH_M EACH_N out[m * N + n] = _mm512_setzero_ps();
    int64_t whole = a->in / 32 * 32;
    for (int64_t k = 0; k < whole; k += 32) {
        __m512bh wv[4];
        EACH_M { wv[m] = (__m512bh)_mm512_loadu_si512(w + m * ldw + 2 * k); FETCH(w + m * ldw + 2 * k); }
        EACH_N { __m512bh xv = (__m512bh)_mm512_load_si512(x + n * a->stride + k);
                 EACH_M out[m * N + n] = _mm512_dpbf16_ps(out[m * N + n], wv[m], xv); }
    }
    if (whole < a->in) EACH_M {
        __m512bh wv = (__m512bh)_mm512_maskz_loadu_epi16(tail32(a->in - whole), w + m * ldw + 2 * whole);
        EACH_N out[m * N + n] = _mm512_dpbf16_ps(out[m * N + n], wv,
                                                 (__m512bh)_mm512_load_si512(x + n * a->stride + whole));
    }
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
/* What zero points (and the 128 that makes a signed code unsigned) add: zero[m, g] times the sums of x's codes. */
INLINE void start_from_zeros(const int M, const int N, const Act *a, int64_t at, const float *zero, __m512 *out) {
    int64_t G = padded_groups(a->groups);
    EACH_M EACH_N out[m * N + n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a->groups; g += 16)
        EACH_M { __m512 z = _mm512_load_ps(zero + m * G + g);
                 EACH_N out[m * N + n] = _mm512_fmadd_ps(z, _mm512_load_ps(a->total + (at + n) * G + g), out[m * N + n]); }
}

INLINE __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

INLINE void byte_kernel(const int M, const int N, const int AHEAD, ARGS) {
    int64_t plane = (a->stride - 64) / 2, G = padded_groups(a->groups);
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    start_from_zeros(M, N, a, at, zero, out);
    for (int64_t g = 0; g < a->groups; g++) {
        __m512i high[8], low[8];
        EACH_M EACH_N high[m * N + n] = low[m * N + n] = _mm512_setzero_si512();
        int64_t end = least(a->in, (g + 1) * a->group);
        for (int64_t k = g * a->group; k < end; k += 64) {
            __m512i wv[4];
            __mmask64 mask = tail64(end - k);
            EACH_M { wv[m] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w + m * ldw + k),
                                              _mm512_set1_epi8((char)0x80)); FETCH(w + m * ldw + k); }
            EACH_N { __m512i h = _mm512_maskz_loadu_epi8(mask, x + n * a->stride + k);
                     __m512i l = _mm512_maskz_loadu_epi8(mask, x + n * a->stride + plane + k);
                     EACH_M { high[m * N + n] = _mm512_dpbusd_epi32(high[m * N + n], wv[m], h);
                              low[m * N + n] = _mm512_dpbusd_epi32(low[m * N + n], wv[m], l); } }
        }
        EACH_M EACH_N out[m * N + n] = _mm512_fmadd_ps(joined(high[m * N + n], low[m * N + n]),
                                                       _mm512_set1_ps(scale[m * G + g]), out[m * N + n]);
    }
}

INLINE void nibble_kernel(const int M, const int N, const int AHEAD, ARGS) {
    int64_t plane = (a->stride - 64) / 2, G = padded_groups(a->groups);
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    const __m512i low_bits = _mm512_set1_epi8(15);
    /* Which of the groups in 128 inputs each lane of eight inputs belongs to. */
    const __m512i lane = _mm512_mullo_epi32(_mm512_set1_epi32(8), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                    11, 12, 13, 14, 15));
    const __m512i of_lane = a->group >= 128 ? _mm512_setzero_si512()
                                            : _mm512_srlv_epi32(lane, _mm512_set1_epi32(a->group == 64 ? 6 : 5));
    start_from_zeros(M, N, a, at, zero, out);
    for (int64_t k = 0; k < a->in; k += 128) {
        __m512i even[4], odd[4];
        __m512 s[4];
        __mmask64 mask = tail64((a->in - k) / 2);
        EACH_M { __m512i b = _mm512_maskz_loadu_epi8(mask, w + m * ldw + k / 2); FETCH(w + m * ldw + k / 2);
                 even[m] = _mm512_and_si512(b, low_bits);
                 odd[m] = _mm512_and_si512(_mm512_srli_epi16(b, 4), low_bits);
                 s[m] = _mm512_permutexvar_ps(of_lane, _mm512_loadu_ps(scale + m * G + k / a->group)); }
        EACH_N { const int8_t *p = x + n * a->stride + k / 2;
                 __m512i he = _mm512_loadu_si512(p), ho = _mm512_loadu_si512(p + plane / 2);
                 __m512i le = _mm512_loadu_si512(p + plane), lo = _mm512_loadu_si512(p + plane + plane / 2);
                 EACH_M { __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[m], he);
                          __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[m], le);
                          h = _mm512_dpbusd_epi32(h, odd[m], ho), l = _mm512_dpbusd_epi32(l, odd[m], lo);
                          __m512i both = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l);
                          out[m * N + n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), s[m], out[m * N + n]); } }
    }
}
#endif

/* One block: M outputs times N rows into y (row stride ldy). */
#define BLOCK(NAME, KERNEL, M, N, AHEAD) \
    static void NAME(ARGS0) { \
        __m512 v[16]; \
        KERNEL(M, N, AHEAD, w, ldw, a, at, scale, zero, v); \
        if (M * N == 1) { y[0] = _mm512_reduce_add_ps(v[0]); return; } \
        UNROLL for (int i = M * N; i < 16; i++) v[i] = _mm512_setzero_ps(); \
        float total[16]; \
        _mm512_storeu_ps(total, sums(v)); \
        for (int m = 0; m < M; m++) for (int n = 0; n < N; n++) y[n * ldy + m] = total[m * N + n]; \
    }
#define ARGS0 const char *w, int64_t ldw, const Act *a, int64_t at, const float *scale, const float *zero, float *y, \
              int64_t ldy
typedef void (*Block)(ARGS0);
/* [number of outputs: 1, 4][prefetching?][rows - 1] */
#define FAMILY(KERNEL) \
    BLOCK(KERNEL##_11, KERNEL, 1, 1, NEAR) BLOCK(KERNEL##_12, KERNEL, 1, 2, NEAR) BLOCK(KERNEL##_13, KERNEL, 1, 3, NEAR) \
    BLOCK(KERNEL##_14, KERNEL, 1, 4, FAR) BLOCK(KERNEL##_41, KERNEL, 4, 1, 0) BLOCK(KERNEL##_42, KERNEL, 4, 2, 0) \
    BLOCK(KERNEL##_43, KERNEL, 4, 3, 0) BLOCK(KERNEL##_44, KERNEL, 4, 4, 0) BLOCK(KERNEL##_44f, KERNEL, 4, 4, FAR) \
    static const Block KERNEL##_blocks[3][4] = {{KERNEL##_11, KERNEL##_12, KERNEL##_13, KERNEL##_14}, \
        {KERNEL##_41, KERNEL##_42, KERNEL##_43, KERNEL##_44}, {KERNEL##_41, KERNEL##_42, KERNEL##_43, KERNEL##_44f}};
/* Two rows at a time where each needs two accumulators per output. */
#define PAIR_FAMILY(KERNEL) \
    BLOCK(KERNEL##_11, KERNEL, 1, 1, NEAR) BLOCK(KERNEL##_12, KERNEL, 1, 2, NEAR) BLOCK(KERNEL##_41, KERNEL, 4, 1, 0) \
    BLOCK(KERNEL##_42, KERNEL, 4, 2, 0) BLOCK(KERNEL##_42f, KERNEL, 4, 2, FAR) \
    static const Block KERNEL##_blocks[3][4] = {{KERNEL##_11, KERNEL##_12, 0, 0}, \
        {KERNEL##_41, KERNEL##_42, 0, 0}, {KERNEL##_41, KERNEL##_42f, 0, 0}};

FAMILY(float_kernel)
FAMILY(widening_kernel)
#ifdef __AVX512BF16__
FAMILY(half_kernel)
#ifdef __AVX512VNNI__
PAIR_FAMILY(byte_kernel)
PAIR_FAMILY(nibble_kernel)
#endif
#endif

/* Scales and zero points of output o as floats; zero may be NULL. Places past the groups are 0. */
static void read_scales(const Matrix *m, int64_t o, float *scale, float *zero) {
    int64_t G = padded_groups(m->groups);
    for (int64_t g = 0; g < G; g += 16) {
        __mmask16 mask = g < m->groups ? tail16(m->groups - g) : 0;
        __m512 s = load_as_float(m->scale, o * m->groups + g, m->scale_kind, mask), z;
        if (m->kind == INT8) z = _mm512_mul_ps(s, _mm512_set1_ps(-128.0f));
        else z = _mm512_fnmadd_ps(s, _mm512_set1_ps(8.0f), load_as_float(m->zero, o * m->groups + g, m->scale_kind, mask));
        _mm512_store_ps(scale + g, s);
        _mm512_store_ps(zero + g, z);
    }
}

/* Row o of a matrix of codes as floats or bfloat16 (`as`), `scale` and `zero` as `read_scales` gave them. */
static void decode(const Matrix *m, int64_t o, const float *scale, const float *zero, int64_t as, void *to) {
    for (int64_t k = 0; k < m->in; k += 16) {
        __mmask16 mask = tail16(m->in - k);
        __m512 code, w;
        if (m->kind == INT8) {
            code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                _mm_maskz_loadu_epi8(mask, (const int8_t *)m->weight + o * m->in + k)));
            w = _mm512_mul_ps(code, _mm512_set1_ps(scale[k / m->group]));
        } else {
            __m128i pair = _mm_maskz_loadu_epi8(mask & 0xff,
                                                (const uint8_t *)m->weight + (o * m->groups * m->group + k) / 2);
            __m128i even = _mm_and_si128(pair, _mm_set1_epi8(15));
            __m128i odd = _mm_and_si128(_mm_srli_epi16(pair, 4), _mm_set1_epi8(15));
            code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
            w = _mm512_fmadd_ps(code, _mm512_set1_ps(scale[k / m->group]), _mm512_set1_ps(zero[k / m->group]));
        }
        store_from_float(to, k, as, mask, w);
    }
}

typedef struct {
    float *scale, *zero;   /* four outputs' */
    char *weight;          /* four decoded outputs */
} Decoded;

/* y[n * ldy + o - first] for outputs first .. last - 1 and all rows of `a`. */
static void product(const Matrix *m, Act *a, int64_t first, int64_t last, float *y, int64_t ldy, const Decoded *room) {
    const int coded = m->kind == INT8 || m->kind == INT4, direct = a->shape == AS_BYTES || a->shape == AS_NIBBLES;
    const Block (*blocks)[4] = float_kernel_blocks;
    int64_t bytes = m->in * 4, G = padded_groups(m->groups), width = 4;
    if (!coded && m->kind == BFLOAT16) blocks = widening_kernel_blocks, bytes = m->in * 2;
#ifdef __AVX512BF16__
    if (a->shape == AS_HALF) blocks = half_kernel_blocks, bytes = m->in * 2;
#ifdef __AVX512VNNI__
    if (a->shape == AS_BYTES) blocks = byte_kernel_blocks, bytes = m->in, width = 2;
    if (a->shape == AS_NIBBLES) blocks = nibble_kernel_blocks, bytes = m->groups * m->group / 2, width = 2;
#endif
#endif
    int64_t together = a->rows < width + (width == 2) ? 1 : 4;
    for (int64_t o = first; o < last;) {
        int64_t M = last - o >= together ? together : 1;
        const char *w = (const char *)m->weight + o * bytes;
        if (coded) for (int64_t i = 0; i < M; i++) {
            read_scales(m, o + i, room->scale + i * G, room->zero + i * G);
            if (!direct) decode(m, o + i, room->scale + i * G, room->zero + i * G,
                                a->shape == AS_HALF ? BFLOAT16 : FLOAT32, room->weight + i * bytes);
        }
        if (coded && !direct) w = room->weight;
        for (int64_t n = 0; n < a->rows; n += width) {
            int64_t N = least(width, a->rows - n);
            int way = M == 1 ? 0 : n == 0 && (!coded || direct) ? 2 : 1;
            blocks[way][N - 1](w, bytes, a, n, room->scale, room->zero, y + n * ldy + o - first, ldy);
        }
        o += M;
    }
    if (direct) for (int64_t n = 0; n < a->rows; n++)
        for (int64_t o = 0; o < last - first; o++) y[n * ldy + o] *= a->step[n];
    if (m->bias) for (int64_t n = 0; n < a->rows; n++)
        for (int64_t o = 0; o < last - first; o++) y[n * ldy + o] += m->bias[first + o];
}
