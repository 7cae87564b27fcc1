/* y = x W^T for up to some dozen rows x, W read once per block of rows, in memory order.
 *
 * One accumulator per (output, row) runs over all inputs, whatever the number of rows: results are batch-invariant. One
 * row reads W row by row; more rows take blocks of four outputs by four rows, which fit the registers. Prefetching far
 * ahead matters more than anything else here.
 */
#pragma once
#include "amx.h"
#include "tiles.h"

#define PREFETCH_NEAR 2048         /* bytes ahead into L2, one row; further is slower: see docs/log/kernels.md */
#define PREFETCH_NEAR_CODES 8192   /* the same for codes */
/* The working set must fit in L1: for few rows, blocks of two times four outputs with this many bytes of each; for more
 * rows, which come from L2 in any case, four outputs. */
#define BLOCK_QUADS 2
#define FEW_ROWS 32
#define BLOCK_BYTES_FEW 2048
#define BLOCK_BYTES_MANY 3072

#define EACH_M UNROLL for (int m = 0; m < M; m++)
#define EACH_N UNROLL for (int n = 0; n < N; n++)
#define ARGS const char *w, int64_t ldw, const Activations *a, int64_t at, const float *scale, const float *zero, \
             const char *next, int64_t from, int64_t to, __m512 *out
/* AHEAD: bytes, or number of rows from `next` on to prefetch. More at once than a core has misses in flight would stall
 * the products, so prefetches are spread over all row blocks. */
#define PREFETCH(m, at) do { if (AHEAD > 4) _mm_prefetch(w + (at) + AHEAD, _MM_HINT_T1); \
                          else if ((m) < AHEAD) _mm_prefetch(next + (m) * ldw + (at), _MM_HINT_T1); } while (0)

/* Kernels: add inputs from .. to - 1 to M outputs times N rows from `at` on, one vector each that is summed later.
 * (Those of codes take all inputs, and initialise the vectors.) */
#ifdef __AVX512F__
INLINE void float_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const float *x = (const float *)a->data + at * a->stride;
    (void)scale, (void)zero, (void)next;
#define SIXTEEN(LOAD, BYTES) do { \
        __m512 wv[4]; \
        EACH_M { wv[m] = LOAD; PREFETCH(m, BYTES * k); } \
        EACH_N { __m512 xv = _mm512_load_ps(x + n * a->stride + k); \
                 EACH_M out[n * M + m] = _mm512_fmadd_ps(wv[m], xv, out[n * M + m]); } \
    } while (0)
    int64_t k = from;
    for (; k + 16 <= to; k += 16) SIXTEEN(_mm512_loadu_ps((const float *)(w + m * ldw) + k), 4);
    if (k < to) SIXTEEN(_mm512_maskz_loadu_ps(tail16(to - k), (const float *)(w + m * ldw) + k), 4);
}

/* bfloat16 weights with float32 rows, for processors without bfloat16 products. */
INLINE void widening_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const float *x = (const float *)a->data + at * a->stride;
    (void)scale, (void)zero, (void)next;
    int64_t k = from;
    for (; k + 16 <= to; k += 16) SIXTEEN(widen(_mm256_loadu_si256((const __m256i *)(w + m * ldw + 2 * k))), 2);
    if (k < to) SIXTEEN(load_as_float(w + m * ldw, k, BFLOAT16, tail16(to - k)), 2);
}
#else
/* A vector is two of sixteen registers here, so four outputs by four rows go two by two. The sums are the same. */
#define SQUARE(LOAD, BYTES) do { \
        __m512 w0, w1, v; \
        { const int m = o; w0 = LOAD; if (r == 0) PREFETCH(m, BYTES * k); } \
        if (two_outs) { const int m = o + 1; w1 = LOAD; if (r == 0) PREFETCH(m, BYTES * k); } \
        v = _mm512_load_ps(x + r * a->stride + k); \
        s00 = _mm512_fmadd_ps(w0, v, s00); \
        if (two_outs) s01 = _mm512_fmadd_ps(w1, v, s01); \
        if (two_rows) { \
            v = _mm512_load_ps(x + (r + 1) * a->stride + k); \
            s10 = _mm512_fmadd_ps(w0, v, s10); \
            if (two_outs) s11 = _mm512_fmadd_ps(w1, v, s11); \
        } \
    } while (0)
#define BY_SQUARES(WHOLE, REST, BYTES) \
    const float *x = (const float *)a->data + at * a->stride; \
    (void)scale, (void)zero, (void)next; \
    UNROLL for (int o = 0; o < M; o += 2) UNROLL for (int r = 0; r < N; r += 2) { \
        const int two_outs = o + 1 < M, two_rows = r + 1 < N, at00 = r * M + o, at10 = at00 + (two_rows ? M : 0); \
        __m512 s00 = out[at00], s01 = out[at00 + two_outs], s10 = out[at10], s11 = out[at10 + two_outs]; \
        int64_t k = from; \
        for (; k + 16 <= to; k += 16) SQUARE(WHOLE, BYTES); \
        if (k < to) SQUARE(REST, BYTES); \
        out[at00] = s00; \
        if (two_outs) out[at00 + 1] = s01; \
        if (two_rows) out[at10] = s10; \
        if (two_rows && two_outs) out[at10 + 1] = s11; \
    }
INLINE void float_kernel(const int M, const int N, const int AHEAD, ARGS) {
    BY_SQUARES(_mm512_loadu_ps((const float *)(w + m * ldw) + k),
               _mm512_maskz_loadu_ps(tail16(to - k), (const float *)(w + m * ldw) + k), 4)
}

/* bfloat16 weights with few rows; for more they are decoded first. */
INLINE void widening_kernel(const int M, const int N, const int AHEAD, ARGS) {
    BY_SQUARES(widen(_mm256_loadu_si256((const __m256i *)(w + m * ldw + 2 * k))),
               load_as_float(w + m * ldw, k, BFLOAT16, tail16(to - k)), 2)
}
#endif

#ifdef __AVX512BF16__
INLINE void half_kernel(const int M, const int N, const int AHEAD, ARGS) {
    const uint16_t *x = (const uint16_t *)a->data + at * a->stride;
    (void)scale, (void)zero, (void)next;
    int64_t even_end = to / 32 * 32;
    for (int64_t k = from; k < even_end; k += 32) {
        __m512bh wv[4];
        EACH_M { wv[m] = (__m512bh)_mm512_loadu_si512(w + m * ldw + 2 * k); PREFETCH(m, 2 * k); }
        EACH_N { __m512bh xv = (__m512bh)_mm512_load_si512(x + n * a->stride + k);
                 EACH_M out[n * M + m] = _mm512_dpbf16_ps(out[n * M + m], wv[m], xv); }
    }
    if (even_end < to) EACH_M {
        __m512bh wv = (__m512bh)_mm512_maskz_loadu_epi16(tail32(to - even_end), w + m * ldw + 2 * even_end);
        EACH_N out[n * M + m] = _mm512_dpbf16_ps(out[n * M + m], wv,
                                                 (__m512bh)_mm512_load_si512(x + n * a->stride + even_end));
    }
}
#endif

/* Contribution of zero points (and of the 128 that makes a signed code unsigned): zero[m, g] times the code sums. */
INLINE void start_from_zeros(const int M, const int N, const Activations *a, int64_t at, const float *zero,
                             __m512 *out) {
    int64_t G = padded_groups(a->groups);
    EACH_M EACH_N out[n * M + m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a->groups; g += 16)
        EACH_M { __m512 z = _mm512_load_ps(zero + m * G + g);
                 EACH_N { __m512 total = _mm512_load_ps(a->total + (at + n) * G + g);
                          out[n * M + m] = _mm512_fmadd_ps(z, total, out[n * M + m]); } }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
INLINE __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

INLINE void byte_kernel(const int M, const int N, const int AHEAD, ARGS) {
    (void)from, (void)to, (void)next;
    int64_t plane = (a->stride - 64) / 2, G = padded_groups(a->groups);
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    start_from_zeros(M, N, a, at, zero, out);
#define BYTES(LOAD) do { \
        __m512i wv[4]; \
        EACH_M { wv[m] = _mm512_xor_si512(LOAD, _mm512_set1_epi8((char)0x80)); PREFETCH(m, k); } \
        EACH_N { __m512i h = _mm512_loadu_si512(x + n * a->stride + k); \
                 __m512i l = _mm512_loadu_si512(x + n * a->stride + plane + k); \
                 EACH_M { high[n * M + m] = _mm512_dpbusd_epi32(high[n * M + m], wv[m], h); \
                          low[n * M + m] = _mm512_dpbusd_epi32(low[n * M + m], wv[m], l); } } \
    } while (0)
#define EACH_START EACH_M EACH_N high[n * M + m] = low[n * M + m] = _mm512_setzero_si512()
    if (a->group == 32 && a->groups > 1) {    /* two groups per vector: four codes are summed in a lane, so each half */
        const __m512i of_lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);  /* has one scale */
        for (int64_t g = 0, k = 0; k < a->in; g += 2, k += 64) {
            __m512i high[8], low[8];
            EACH_START;
            if (k + 64 <= a->in) BYTES(_mm512_loadu_si512(w + m * ldw + k));
            else BYTES(_mm512_maskz_loadu_epi8(tail64(a->in - k), w + m * ldw + k));
            EACH_M {
                __m512 s = _mm512_permutexvar_ps(of_lane, _mm512_loadu_ps(scale + m * G + g));
                EACH_N { __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[n * M + m], 8), low[n * M + m]);
                         out[n * M + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), s, out[n * M + m]); }
            }
        }
        return;
    }
    for (int64_t g = 0; g < a->groups; g++) {
        __m512i high[8], low[8];
        EACH_START;
        int64_t end = min_i64(a->in, (g + 1) * a->group);
        int64_t k = g * a->group;
        for (; k + 64 <= end; k += 64) BYTES(_mm512_loadu_si512(w + m * ldw + k));
        if (k < end) BYTES(_mm512_maskz_loadu_epi8(tail64(end - k), w + m * ldw + k));    /* x is 0 past its end */
        EACH_M EACH_N out[n * M + m] = _mm512_fmadd_ps(joined(high[n * M + m], low[n * M + m]),
                                                       _mm512_set1_ps(scale[m * G + g]), out[n * M + m]);
    }
}

INLINE void nibble_kernel(const int M, const int N, const int AHEAD, ARGS) {
    (void)from, (void)to, (void)next;
    int64_t plane = (a->stride - 64) / 2, G = padded_groups(a->groups);
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    const __m512i low_bits = _mm512_set1_epi8(15);
    /* The group, of those in 128 inputs, of each lane of eight inputs. */
    const __m512i lane = _mm512_mullo_epi32(_mm512_set1_epi32(8), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                    11, 12, 13, 14, 15));
    const __m512i of_lane = a->group >= 128 ? _mm512_setzero_si512()
                                            : _mm512_srlv_epi32(lane, _mm512_set1_epi32(a->group == 64 ? 6 : 5));
    start_from_zeros(M, N, a, at, zero, out);
    /* Every `interval` vectors the scales advance by `move` groups (a division would cost more than the products). */
    const int64_t interval = a->group < 256 ? 1 : a->group >> 7, move = a->group == 32 ? 4 : a->group == 64 ? 2 : 1;
    int64_t g = 0, elapsed = 0, k = 0;
    __m512 total[8];              /* not in memory that a store might change */
    UNROLL for (int i = 0; i < M * N; i++) total[i] = out[i];
#define NIBBLES(LOAD) do { \
        __m512i even[4], odd[4]; \
        __m512 s[4]; \
        EACH_M { __m512i b = LOAD; PREFETCH(m, k / 2); \
                 even[m] = _mm512_and_si512(b, low_bits); \
                 odd[m] = _mm512_and_si512(_mm512_srli_epi16(b, 4), low_bits); \
                 s[m] = _mm512_permutexvar_ps(of_lane, _mm512_loadu_ps(scale + m * G + g)); } \
        EACH_N { const int8_t *p = x + n * a->stride + k / 2; \
                 __m512i he = _mm512_loadu_si512(p), ho = _mm512_loadu_si512(p + plane / 2); \
                 __m512i le = _mm512_loadu_si512(p + plane), lo = _mm512_loadu_si512(p + plane + plane / 2); \
                 EACH_M { __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[m], he); \
                          __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[m], le); \
                          h = _mm512_dpbusd_epi32(h, odd[m], ho), l = _mm512_dpbusd_epi32(l, odd[m], lo); \
                          __m512i both = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l); \
                          total[n * M + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), s[m], total[n * M + m]); } } \
        if (++elapsed == interval) elapsed = 0, g += move; \
    } while (0)
    for (; k + 128 <= a->in; k += 128) NIBBLES(_mm512_loadu_si512(w + m * ldw + k / 2));
    if (k < a->in) NIBBLES(_mm512_maskz_loadu_epi8(tail64((a->in - k) / 2), w + m * ldw + k / 2));
    UNROLL for (int i = 0; i < M * N; i++) out[i] = total[i];
}

/* Codes of two bits, or of three (HIGH): 256 inputs at a time as four vectors of bytes, by input modulo 4. Sixteen
 * inputs are summed in a lane, so that each lane has one scale. */
INLINE void quarter_kernel(const int M, const int N, const int AHEAD, const int HIGH, ARGS) {
    (void)from, (void)to, (void)next;
    const int64_t plane = (a->stride - 64) / 2, G = padded_groups(a->groups), low_bytes = a->groups * a->group / 4;
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    const __m512i two_bits = _mm512_set1_epi8(3), three_bits = _mm512_set1_epi8(7), above = _mm512_set1_epi8(60);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int shift = a->group >= 256 ? 4 : a->group == 128 ? 3 : 2;      /* lanes of a group, as a power of two */
    const __m512i of_lane = _mm512_srlv_epi32(lane, _mm512_set1_epi32(shift));
    start_from_zeros(M, N, a, at, zero, out);
    const int64_t interval = a->group < 512 ? 1 : a->group >> 8, move = a->group == 64 ? 4 : a->group == 128 ? 2 : 1;
    int64_t g = 0, elapsed = 0, k = 0;
    __m512 total[8];
    UNROLL for (int i = 0; i < M * N; i++) total[i] = out[i];
#define QUARTERS(LOW, HIGH_BITS) do { \
        __m512i code[4][4]; \
        __m512 s[4]; \
        EACH_M { \
            const char *row = w + m * ldw; \
            __m512i low = LOW, high = _mm512_setzero_si512(); \
            PREFETCH(m, k / 4); \
            if (HIGH) {           /* a nibble of the high bits to each byte, shifted to where a third bit belongs */ \
                __m512i some = _mm512_cvtepu8_epi16(HIGH_BITS); \
                PREFETCH(m, low_bytes + k / 8); \
                high = _mm512_and_si512(_mm512_or_si512(_mm512_slli_epi16(some, 2), _mm512_slli_epi16(some, 6)), above); \
            } \
            UNROLL for (int j = 0; j < 4; j++) { \
                code[m][j] = _mm512_srli_epi16(low, 2 * j); \
                if (!HIGH) code[m][j] = _mm512_and_si512(code[m][j], two_bits); \
                /* two bits of the one and the third of the other: a choice by mask, then what lies above is cleared */ \
                else code[m][j] = _mm512_and_si512(_mm512_ternarylogic_epi32(two_bits, code[m][j], \
                                                                             _mm512_srli_epi16(high, j), 0xca), three_bits); \
            } \
            s[m] = _mm512_permutexvar_ps(of_lane, _mm512_loadu_ps(scale + m * G + g)); \
        } \
        EACH_N { \
            const int8_t *p = x + n * a->stride + k / 4; \
            __m512i h[4], l[4]; \
            EACH_M h[m] = l[m] = _mm512_setzero_si512(); \
            UNROLL for (int j = 0; j < 4; j++) { \
                __m512i xh = _mm512_loadu_si512(p + j * plane / 4), xl = _mm512_loadu_si512(p + plane + j * plane / 4); \
                EACH_M h[m] = _mm512_dpbusd_epi32(h[m], code[m][j], xh), l[m] = _mm512_dpbusd_epi32(l[m], code[m][j], xl); \
            } \
            EACH_M total[n * M + m] = _mm512_fmadd_ps( \
                _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h[m], 8), l[m])), s[m], total[n * M + m]); \
        } \
        if (++elapsed == interval) elapsed = 0, g += move; \
    } while (0)
    for (; k + 256 <= 4 * low_bytes; k += 256)
        QUARTERS(_mm512_loadu_si512(row + k / 4), _mm256_loadu_si256((const __m256i *)(row + low_bytes + k / 8)));
    if (k < a->in) {
        const __mmask64 low_mask = tail64(low_bytes - k / 4);
        const __mmask32 high_mask = tail32((2 * low_bytes - k / 2) / 4);
        QUARTERS(_mm512_maskz_loadu_epi8(low_mask, row + k / 4),
                 _mm256_maskz_loadu_epi8(high_mask, row + low_bytes + k / 8));
    }
    UNROLL for (int i = 0; i < M * N; i++) out[i] = total[i];
}
INLINE void two_bit_kernel(const int M, const int N, const int AHEAD, ARGS) {
    quarter_kernel(M, N, AHEAD, 0, w, ldw, a, at, scale, zero, next, from, to, out);
}
INLINE void three_bit_kernel(const int M, const int N, const int AHEAD, ARGS) {
    quarter_kernel(M, N, AHEAD, 1, w, ldw, a, at, scale, zero, next, from, to, out);
}
#endif

#ifndef __AVX512F__
#define WORD_INPUTS 2048           /* at most so many products fit the integers that they are summed in */

/* Signed codes: `zero` is the value of -128, so 128 steps are added. */
INLINE void add_centers(const int M, const int N, const Activations *a, int64_t at, const float *scale, __m512 *out) {
    const int64_t G = padded_groups(a->groups);
    const __m512 center = _mm512_set1_ps(128.0f);
    for (int64_t g = 0; g < a->groups; g += 16) EACH_M {
        __m512 step = _mm512_mul_ps(_mm512_load_ps(scale + m * G + g), center);
        EACH_N out[n * M + m] = _mm512_fmadd_ps(step, _mm512_load_ps(a->total + (at + n) * G + g), out[n * M + m]);
    }
}

/* Codes widened to words times words of fixed point: 16 products and their sums by pairs in one instruction. */
INLINE void byte_words(const int M, const int N, const int AHEAD, ARGS) {
    (void)from, (void)to, (void)next;
    const int64_t G = padded_groups(a->groups), ldx = a->stride / 2;
    const int16_t *x = (const int16_t *)((const int8_t *)a->data + at * a->stride);
    start_from_zeros(M, N, a, at, zero, out);
    add_centers(M, N, a, at, scale, out);
    for (int64_t g = 0; g < a->groups; g++) {
        const int64_t last = min_i64(a->in, (g + 1) * a->group);
        for (int64_t start = g * a->group; start < last; start += WORD_INPUTS) {
            const int64_t end = min_i64(last, start + WORD_INPUTS);
            __m256i sum[8];
            EACH_M EACH_N sum[n * M + m] = _mm256_setzero_si256();
            int64_t k = start;
#define WORDS(REST) do { \
        __m256i one[4], two[4]; \
        EACH_M { \
            const char *p = w + m * ldw + k; \
            char some[32];                    /* nothing past the row is read; x is 0 past its end */ \
            if (REST) memset(some, 0, 32), memcpy(some, p, (size_t)(end - k)), p = some; \
            one[m] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); \
            two[m] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p + 1)); \
            PREFETCH(m, k); \
        } \
        EACH_N { \
            const __m256i *at_k = (const __m256i *)(x + n * ldx + k); \
            __m256i x1 = _mm256_loadu_si256(at_k), x2 = _mm256_loadu_si256(at_k + 1); \
            EACH_M sum[n * M + m] = _mm256_add_epi32(sum[n * M + m], _mm256_add_epi32( \
                _mm256_madd_epi16(one[m], x1), _mm256_madd_epi16(two[m], x2))); \
        } \
    } while (0)
            _Pragma("GCC unroll 2") for (; k + 32 <= end; k += 32) WORDS(0);
            if (k < end) WORDS(1);
            EACH_M EACH_N out[n * M + m].a = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[n * M + m]),
                                                             _mm256_set1_ps(scale[m * G + g]), out[n * M + m].a);
        }
    }
}

/* Nibbles times the two planes of bytes, 64 inputs at a time: products of bytes, whose sums by pairs fit words; the high
 * plane's are multiplied with 256 as their words are summed. A half of a vector holds 32 inputs of one group. */
INLINE void nibble_planes(const int M, const int N, const int AHEAD, ARGS) {
    (void)from, (void)to, (void)next;
    const int64_t G = padded_groups(a->groups), plane = (a->stride - 64) / 2, used = a->in / 2;
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), many = _mm256_set1_epi16(256);
    const int halves = a->group == 32, interval = (int)max_i64(1, a->group / 64);
    __m256 total[8];
    start_from_zeros(M, N, a, at, zero, out);
    EACH_M EACH_N total[n * M + m] = _mm256_setzero_ps();
    int64_t k = 0, g = 0, elapsed = 0;
#define NIBBLES_64(REST) do { \
        __m256i even[4], odd[4]; \
        __m256 s[4]; \
        EACH_M { \
            const char *p = w + m * ldw + k; \
            char some[32];                    /* nothing past the row is read; x is 0 past its end */ \
            if (REST) memset(some, 0, 32), memcpy(some, p, (size_t)(used - k)), p = some; \
            __m256i b = _mm256_loadu_si256((const __m256i *)p); \
            PREFETCH(m, k); \
            even[m] = _mm256_and_si256(b, nibble), odd[m] = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble); \
            s[m] = _mm256_set1_ps(scale[m * G + g]); \
            if (halves) s[m] = _mm256_blend_ps(s[m], _mm256_set1_ps(scale[m * G + g + 1]), 0xf0); \
        } \
        EACH_N { \
            const int8_t *p = x + n * a->stride + k; \
            const __m256i he = _mm256_loadu_si256((const __m256i *)p); \
            const __m256i ho = _mm256_loadu_si256((const __m256i *)(p + plane / 2)); \
            const __m256i le = _mm256_loadu_si256((const __m256i *)(p + plane)); \
            const __m256i lo = _mm256_loadu_si256((const __m256i *)(p + plane + plane / 2)); \
            EACH_M { \
                __m256i h = _mm256_add_epi16(_mm256_maddubs_epi16(even[m], he), _mm256_maddubs_epi16(odd[m], ho)); \
                __m256i l = _mm256_add_epi16(_mm256_maddubs_epi16(even[m], le), _mm256_maddubs_epi16(odd[m], lo)); \
                __m256i both = _mm256_add_epi32(_mm256_madd_epi16(h, many), _mm256_madd_epi16(l, one)); \
                total[n * M + m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), s[m], total[n * M + m]); \
            } \
        } \
        if (halves) g += 2; \
        else if (++elapsed == interval) elapsed = 0, g++; \
    } while (0)
    for (; k + 32 <= used; k += 32) NIBBLES_64(0);
    if (k < used) NIBBLES_64(1);
    EACH_M EACH_N out[n * M + m].a = _mm256_add_ps(out[n * M + m].a, total[n * M + m]);
}

/* Two or three bits: 64 inputs at a time, by input modulo 4. */
INLINE void quarter_words(const int M, const int N, const int AHEAD, const int HIGH, ARGS) {
    (void)from, (void)to, (void)next;
    const int64_t G = padded_groups(a->groups), ldx = a->stride / 2, low_bytes = a->groups * a->group / 4;
    const int16_t *x = (const int16_t *)((const int8_t *)a->data + at * a->stride);
    const __m256i two_bits = _mm256_set1_epi16(3), third_bit = _mm256_set1_epi16(4);
    start_from_zeros(M, N, a, at, zero, out);
    for (int64_t g = 0; g < a->groups; g++) {
        const int64_t last = min_i64(a->in, (g + 1) * a->group);
        for (int64_t start = g * a->group; start < last; start += WORD_INPUTS) {
            const int64_t end = min_i64(last, start + WORD_INPUTS);
            __m256i sum[8];
            EACH_M EACH_N sum[n * M + m] = _mm256_setzero_si256();
            for (int64_t k = start; k < end; k += 64) {
                __m256i code[4][4];
                EACH_M {
                    const char *row = w + m * ldw;
                    __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(row + k / 4)));
                    __m256i high = _mm256_setzero_si256();
                    PREFETCH(m, k / 4);
                    if (HIGH) {
                        __m128i some = _mm_loadl_epi64((const __m128i *)(row + low_bytes + k / 8));
                        __m128i odd = _mm_and_si128(_mm_srli_epi16(some, 4), _mm_set1_epi8(15));
                        some = _mm_unpacklo_epi8(_mm_and_si128(some, _mm_set1_epi8(15)), odd);
                        high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(some), 2);
                        PREFETCH(m, low_bytes + k / 8);
                    }
                    UNROLL for (int j = 0; j < 4; j++) {
                        code[m][j] = _mm256_and_si256(_mm256_srli_epi16(low, 2 * j), two_bits);
                        if (HIGH) code[m][j] = _mm256_or_si256(code[m][j],
                                                               _mm256_and_si256(_mm256_srli_epi16(high, j), third_bit));
                    }
                }
                EACH_N UNROLL for (int j = 0; j < 4; j++) {
                    __m256i xv = _mm256_loadu_si256((const __m256i *)(x + n * ldx + k + 16 * j));
                    EACH_M sum[n * M + m] = _mm256_add_epi32(sum[n * M + m], _mm256_madd_epi16(code[m][j], xv));
                }
            }
            EACH_M EACH_N out[n * M + m].a = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[n * M + m]),
                                                             _mm256_set1_ps(scale[m * G + g]), out[n * M + m].a);
        }
    }
}
INLINE void two_bit_words(const int M, const int N, const int AHEAD, ARGS) {
    quarter_words(M, N, AHEAD, 0, w, ldw, a, at, scale, zero, next, from, to, out);
}
INLINE void three_bit_words(const int M, const int N, const int AHEAD, ARGS) {
    quarter_words(M, N, AHEAD, 1, w, ldw, a, at, scale, zero, next, from, to, out);
}
#endif

/* Blocks of results, into y[row * ldy + output]. Few rows: up to LANES / N outputs, one after the other in memory
 * order, so that their sums are taken together. More rows: four outputs times N rows from `at` on.
 */
#define LANES 16
#define MAX_ROW_BLOCKS 64
typedef struct {           /* constant over the blocks */
    const Activations *a;
    int64_t ldw, ldy, from, to, outs;
    const float *scale, *zero;
} BlockJob;
#define BLOCK_ARGS const BlockJob *j, const char *w, int64_t at, const char *next, __m512 *carry, float *y
typedef void (*Block)(BLOCK_ARGS);

#define STREAM(KERNEL, N, AHEAD) \
    static void KERNEL##_stream##N(BLOCK_ARGS) { \
        __m512 v[LANES]; \
        float total[LANES]; \
        int64_t G = padded_groups(j->a->groups), outs = j->outs, ldw = j->ldw; \
        (void)carry; \
        for (int64_t i = 0; i < LANES; i++) v[i] = _mm512_setzero_ps(); \
        for (int64_t m = 0; m < outs; m++) \
            KERNEL(1, N, AHEAD, w + m * ldw, ldw, j->a, at, j->scale + m * G, j->zero + m * G, next, j->from, j->to, \
                   v + m * N); \
        _mm512_storeu_ps(total, sums(v)); \
        for (int64_t m = 0; m < outs; m++) for (int n = 0; n < N; n++) y[n * j->ldy + m] = total[m * N + n]; \
    }
#define BLOCK(KERNEL, NAME, M, N, AHEAD, PART) \
    static void KERNEL##_##NAME(BLOCK_ARGS) { \
        __m512 v[LANES]; \
        int64_t ldy = j->ldy, from = PART ? j->from : 0, to = PART ? j->to : j->a->in; \
        (void)carry; \
        UNROLL for (int i = 0; i < LANES; i++) v[i] = PART && from > 0 && i < M * N ? carry[i] : _mm512_setzero_ps(); \
        KERNEL(M, N, AHEAD, w, j->ldw, j->a, at, j->scale, j->zero, next, from, to, v); \
        if (PART && to < j->a->in) { \
            UNROLL for (int i = 0; i < M * N; i++) carry[i] = v[i]; \
            return; \
        } \
        __m512 total = sums(v); \
        _mm_storeu_ps(y, _mm512_castps512_ps128(total)); \
        if (N > 1) _mm_storeu_ps(y + ldy, _mm512_extractf32x4_ps(total, 1)); \
        if (N > 2) _mm_storeu_ps(y + 2 * ldy, _mm512_extractf32x4_ps(total, 2)); \
        if (N > 3) _mm_storeu_ps(y + 3 * ldy, _mm512_extractf32x4_ps(total, 3)); \
    }
/* [streamed; four outputs and prefetching 0, 1, 2, 4 rows; the same over a part of the inputs][rows - 1] */
enum { STREAMED = 0, PREFETCHING = 1, SPLIT_INPUTS = 4 };
#define BLOCKS(KERNEL, PRE, PART) \
    BLOCK(KERNEL, PRE##1, 4, 1, 0, PART) BLOCK(KERNEL, PRE##2, 4, 2, 0, PART) BLOCK(KERNEL, PRE##3, 4, 3, 0, PART) \
    BLOCK(KERNEL, PRE##4, 4, 4, 0, PART) BLOCK(KERNEL, PRE##far1, 4, 4, 1, PART) \
    BLOCK(KERNEL, PRE##far2, 4, 4, 2, PART) BLOCK(KERNEL, PRE##far4, 4, 4, 4, PART)
#define TABLE(KERNEL, PRE) \
    {KERNEL##_##PRE##1, KERNEL##_##PRE##2, KERNEL##_##PRE##3, KERNEL##_##PRE##4}, {0, 0, 0, KERNEL##_##PRE##far1}, \
    {0, 0, 0, KERNEL##_##PRE##far2}, {0, 0, 0, KERNEL##_##PRE##far4}
#define FAMILY(KERNEL) \
    STREAM(KERNEL, 1, PREFETCH_NEAR) STREAM(KERNEL, 2, PREFETCH_NEAR) \
    STREAM(KERNEL, 3, PREFETCH_NEAR) STREAM(KERNEL, 4, PREFETCH_NEAR) \
    BLOCKS(KERNEL, all, 0) BLOCKS(KERNEL, k_block, 1) \
    static const Block KERNEL##_blocks[9][4] = { \
        {KERNEL##_stream1, KERNEL##_stream2, KERNEL##_stream3, KERNEL##_stream4}, \
        TABLE(KERNEL, all), TABLE(KERNEL, k_block)};
/* Two rows at a time where each needs two accumulators per output; never in parts. */
#define PAIR_FAMILY(KERNEL) \
    STREAM(KERNEL, 1, PREFETCH_NEAR_CODES) STREAM(KERNEL, 2, PREFETCH_NEAR_CODES) BLOCK(KERNEL, 1, 4, 1, 0, 0) \
    BLOCK(KERNEL, 2, 4, 2, 0, 0) BLOCK(KERNEL, far1, 4, 2, 1, 0) BLOCK(KERNEL, far2, 4, 2, 2, 0) \
    BLOCK(KERNEL, far4, 4, 2, 4, 0) \
    static const Block KERNEL##_blocks[9][4] = {{KERNEL##_stream1, KERNEL##_stream2, 0, 0}, \
        {KERNEL##_1, KERNEL##_2, 0, 0}, {0, KERNEL##_far1, 0, 0}, {0, KERNEL##_far2, 0, 0}, {0, KERNEL##_far4, 0, 0}};

FAMILY(float_kernel)
FAMILY(widening_kernel)
#ifdef __AVX512BF16__
FAMILY(half_kernel)
#ifdef __AVX512VNNI__
PAIR_FAMILY(byte_kernel)
PAIR_FAMILY(nibble_kernel)
PAIR_FAMILY(two_bit_kernel)
PAIR_FAMILY(three_bit_kernel)
#endif
#endif
#ifndef __AVX512F__
PAIR_FAMILY(byte_words)
PAIR_FAMILY(nibble_planes)
PAIR_FAMILY(two_bit_words)
PAIR_FAMILY(three_bit_words)
#endif

static void blocks(const Matrix *m, const Activations *a, int64_t first, int64_t last, float *y, int64_t ldy,
                   const DecodeScratch *scratch) {
    const int coded = is_coded(m);
    const int direct = a->format == AS_BYTE_PLANES || a->format == AS_NIBBLE_PLANES || a->format == AS_WORDS
                       || a->format == AS_QUARTER_PLANES || a->format == AS_QUARTER_WORDS;
    /* Without products of bfloat16, bfloat16 weights of many rows are widened once, not once for each four rows. */
    const int decoded = (coded && !direct)
                        || (m->kind == BFLOAT16 && a->format == AS_FLOAT32 && a->rows >= MIN_ROWS_DECODED);
    const Block (*kernels)[4] = !decoded && m->kind == BFLOAT16 ? widening_kernel_blocks : float_kernel_blocks;
    int64_t bytes = decoded ? (a->format == AS_BFLOAT16 ? 2 : 4) * m->in : row_bytes(m);
    int64_t G = padded_groups(m->groups), width = direct ? 2 : 4;
#ifdef __AVX512BF16__
    if (a->format == AS_BFLOAT16) kernels = half_kernel_blocks;
#ifdef __AVX512VNNI__
    if (a->format == AS_BYTE_PLANES) kernels = byte_kernel_blocks;
    if (a->format == AS_NIBBLE_PLANES) kernels = nibble_kernel_blocks;
    if (a->format == AS_QUARTER_PLANES) kernels = m->kind == TWO_BITS ? two_bit_kernel_blocks : three_bit_kernel_blocks;
#endif
#endif
#ifndef __AVX512F__
    if (a->format == AS_WORDS) kernels = byte_words_blocks;
    if (a->format == AS_NIBBLE_PLANES) kernels = nibble_planes_blocks;
    if (a->format == AS_QUARTER_WORDS) kernels = m->kind == TWO_BITS ? two_bit_words_blocks : three_bit_words_blocks;
#endif
    const int streaming = a->rows < (direct ? 3 : 4), few = a->rows <= FEW_ROWS;
    const int64_t quads = few && !coded && !decoded ? BLOCK_QUADS : 1;
    const int64_t block_inputs = (few ? BLOCK_BYTES_FEW : BLOCK_BYTES_MANY) / (a->format == AS_BFLOAT16 ? 2 : 4);
    /* Of four outputs ahead, how many the earlier row blocks have prefetched. */
    const int64_t row_blocks = (a->rows + width - 1) / width, full = max_i64(1, a->rows / width);
    int fetched[MAX_ROW_BLOCKS + 1];
    for (int64_t t = 0; t <= row_blocks; t++) fetched[t] = decoded ? 0 : (int)(4 * min_i64(t, full) / full);
    for (int64_t o = first, M; o < last; o += M) {
        const int streamed = streaming || last - o < 4;
        M = streamed ? min_i64(last - o, LANES / min_i64(width, a->rows)) : last - o < 4 * quads ? 4 : 4 * quads;
        const char *w = (const char *)m->weight + o * row_bytes(m);
        if (coded && m->groups == 1) read_scales_of_rows(m, o, M, G, scratch->scale, scratch->zero);
        if (coded || decoded) for (int64_t i = 0; i < M; i++) {
            if (coded && m->groups > 1) read_scales(m, o + i, scratch->scale + i * G, scratch->zero + i * G);
            if (decoded) decode(m, o + i, scratch->scale + i * G, scratch->zero + i * G,
                                a->format == AS_BFLOAT16 ? BFLOAT16 : FLOAT32, scratch->weight + i * bytes);
        }
        if (decoded) w = scratch->weight;
        const int64_t k_block = streamed || coded || decoded ? a->in : block_inputs;
        const int64_t outs = streamed ? M : 4;
        for (int64_t from = 0; from < a->in; from += k_block) {
            BlockJob job = {a, bytes, ldy, from, min_i64(a->in, from + k_block), outs, scratch->scale, scratch->zero};
            for (int64_t t = 0, n = 0; t < row_blocks; t++, n += width) {
                int n_prefetch = streamed ? 0 : fetched[t + 1] - fetched[t];
                int variant = streamed ? STREAMED : PREFETCHING + (n_prefetch < 4 ? n_prefetch : 3)
                                                    + (k_block < a->in ? SPLIT_INPUTS : 0);
                Block block = kernels[variant][min_i64(width, a->rows - n) - 1];
                for (int64_t i = 0; i < M; i += outs)
                    block(&job, w + i * bytes, n, w + (i + 8 + fetched[t]) * bytes,
                          scratch->carry + (BLOCK_QUADS * t + i / 4) * LANES, y + n * ldy + o + i - first);
            }
        }
    }
    if (a->format == AS_BFLOAT16) scale_sums(m, a->rows, first, last, y, ldy);
    if (direct) for (int64_t n = 0; n < a->rows; n++)
        for (int64_t o = 0; o < last - first; o++) y[n * ldy + o] *= a->step[n];
}

/* y[n * ldy + o - first] for outputs first .. last - 1 and all rows of `a`. */
static void product(const Matrix *m, const Activations *a, int64_t first, int64_t last, float *y, int64_t ldy,
                    const DecodeScratch *scratch) {
#ifdef AMX
    if (a->format == AS_HALF_TILES) half_tiles(m, a, first, last, y, ldy, scratch);
    else if (is_tiled(a->format)) byte_tiles(m, a, first, last, y, ldy, scratch);
    else
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    if (a->format == AS_INT8 || a->format == AS_INT8_SPLIT)
        tiles(m, a, first, last, y, ldy, scratch->scale, scratch->zero, (int8_t *)scratch->weight);
    else
#endif
    blocks(m, a, first, last, y, ldy, scratch);
    if (m->bias) for (int64_t n = 0; n < a->rows; n++)
        for (int64_t o = 0; o < last - first; o++) y[n * ldy + o] += m->bias[first + o];
}

/* This thread's outputs of a matrix: one contiguous range, since prefetching pays within a range. */
INLINE void thread_range(int64_t n, int id, int threads, int64_t *first, int64_t *last) {
    int64_t lines = (n + LANES - 1) / LANES;
    *first = min_i64(n, lines * id / threads * LANES), *last = min_i64(n, lines * (id + 1) / threads * LANES);
}

/* Prefetch the beginning of this thread's range while it waits for the others. */
static void prefetch_weights(const Matrix *m, int id, int threads) {
    int64_t first, last, bytes = row_bytes(m);
    thread_range(m->out, id, threads, &first, &last);
    const char *from = (const char *)m->weight + first * bytes;
    for (int64_t i = 0; i < min_i64(PREFETCH_FAR, (last - first) * bytes); i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
}
