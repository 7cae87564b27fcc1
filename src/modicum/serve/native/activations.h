/* Activations as a product wants them: float32; bfloat16; and for codes, fixed point of sixteen bits split into two
 * planes of signed bytes, x ~ step * (256 high + low), so that the byte products of AVX512-VNNI are exact. With
 * step = max|x| / 32512 the error of x is at most step / 2, and the error of the whole vector is below that of
 * rounding it to bfloat16. Where the model asks for eight bits of activations, they are one plane of signed bytes with
 * a step for each EIGHTS inputs, for the products of tiles.h.
 */
#pragma once
#include "common.h"

#define ROWS_FROM_CODES 8 /* from here on decoding codes to bfloat16 costs less than multiplying with them */
#define ROWS_IN_EIGHTS 5  /* from here on products in eight bits are quicker, where they are wanted at all */

#define EIGHTS 64        /* inputs that share a step, where activations have eight bits */

typedef enum { AS_FLOAT, AS_HALF, AS_BYTES, AS_NIBBLES, AS_EIGHTS, AS_NIBBLE_EIGHTS } Shape;

typedef struct {
    Shape shape;
    int64_t rows, in, stride, group, groups;  /* stride: of a row, in elements of its type */
    void *data;
    float *step, *total;                      /* (rows), and sums of codes (rows, groups padded to 16); in eight bits */
                                              /* both (rows, in / EIGHTS padded), sums times steps, then their sum */
} Act;

INLINE int64_t padded_groups(int64_t groups) { return round_up(groups, 16) + 16; }

static Shape shape_for(const Matrix *m, int64_t rows, int64_t half, int64_t eight) {
#ifdef __AVX512BF16__
    if (m->kind == FLOAT32) return AS_FLOAT;
    if (m->kind == BFLOAT16) return AS_HALF;
#ifdef __AVX512VNNI__
    if (eight && rows >= ROWS_IN_EIGHTS && m->in % EIGHTS == 0 && (m->groups == 1 || m->group % EIGHTS == 0))
        return m->kind == INT8 ? AS_EIGHTS : AS_NIBBLE_EIGHTS;
    if (half && rows >= ROWS_FROM_CODES) return AS_HALF;
    if (half) return m->kind == INT8 ? AS_BYTES : AS_NIBBLES;
#endif
#endif
    (void)m, (void)rows, (void)half, (void)eight;
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

/* To the nearest integer; NaN becomes 0 (the step is NaN then, and so is what is multiplied with it). */
INLINE __m512i code16(__m512 x) { return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }

INLINE __m512i fixed16(const float *x, int64_t k, int64_t n, __m512 inverse) {
    return code16(_mm512_mul_ps(_mm512_maskz_loadu_ps(tail16(n - k), x + k), inverse));
}

/* Eight bits: x ~ step * code within each EIGHTS inputs. A NaN makes the step one, and so the sums. */
static void prepare_eights(Act *a, const float *x, int64_t ldx, int64_t from, int64_t to) {
    int64_t G = padded_groups(a->in / EIGHTS);
    a->stride = a->in + 64;
    /* even inputs of eight, then odd ones: they share bytes of the weight */
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int64_t n = from; n < to; n++) {
        int8_t *out = (int8_t *)a->data + n * a->stride;
        float whole = 0;
        for (int64_t g = 0; g < a->in / EIGHTS; g++) {
            __m512 v[4], top = _mm512_setzero_ps();
            __mmask16 odd = 0;
            UNROLL for (int i = 0; i < 4; i++) {
                v[i] = _mm512_loadu_ps(x + n * ldx + g * EIGHTS + 16 * i);
                top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
                odd |= _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
            }
            float largest = odd ? NAN : _mm512_reduce_max_ps(top), step = largest / 127.0f;
            __m512 inverse = _mm512_set1_ps(step > 0 ? 127.0f / largest : 0.0f);
            __m512i sum = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < 4; i++) {
                __m512i code = code16(_mm512_mul_ps(v[i], inverse));
                __m128i bytes = _mm512_cvtepi32_epi8(code);
                sum = _mm512_add_epi32(sum, code);
                if (a->shape == AS_NIBBLE_EIGHTS) bytes = _mm_shuffle_epi8(bytes, split);
                _mm_store_si128((__m128i *)(out + g * EIGHTS + 16 * i), bytes);
            }
            a->step[n * G + g] = step;
            whole += a->total[n * G + g] = step * (float)_mm512_reduce_add_epi32(sum);
        }
        a->total[n * G + a->in / EIGHTS] = whole;
    }
}

/* Bring rows from .. to - 1 of `rows` rows of x (stride ldx) into the shape that `m` multiplies with. */
static void prepare(Act *a, Shape shape, const Matrix *m, const float *x, int64_t ldx, int64_t rows, int64_t from,
                    int64_t to) {
    int64_t in = m->in;
    a->shape = shape, a->rows = rows, a->in = in, a->group = m->group, a->groups = m->groups;
    if (shape == AS_FLOAT || shape == AS_HALF) {
        /* One line more than a multiple of 4 KiB, lest the rows fall on the same sets of the first cache. */
        a->stride = round_up(in, 64) + (shape == AS_FLOAT ? 16 : 32);
        for (int64_t n = from; n < to; n++)
            for (int64_t k = 0; k < round_up(in, 32); k += 16) {
                __m512 v = _mm512_maskz_loadu_ps(k < in ? tail16(in - k) : 0, x + n * ldx + k);
                if (shape == AS_FLOAT) _mm512_store_ps((float *)a->data + n * a->stride + k, v);
                else _mm256_store_si256((__m256i *)((uint16_t *)a->data + n * a->stride + k), narrow(v));
            }
        return;
    }
    if (shape == AS_EIGHTS || shape == AS_NIBBLE_EIGHTS) { prepare_eights(a, x, ldx, from, to); return; }
    int64_t plane = round_up(in, 128), G = padded_groups(m->groups);
    a->stride = 2 * plane + 64;
    for (int64_t n = from; n < to; n++) {
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
