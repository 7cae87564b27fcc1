/* Codes of a matrix as numbers, some outputs at a time. */
#pragma once
#include "activations.h"

#define PREFETCH_SCALES 2048       /* bytes ahead, of scales and zero points */
#define PREFETCH_FAR 16384         /* bytes ahead where codes are decoded (half of it for nibbles) */

/* Scales and zero points of output o as floats. */
static void read_scales(const Matrix *m, int64_t o, float *scale, float *zero) {
    const int64_t ahead = o * m->groups * (m->scale_kind == FLOAT32 ? 4 : 2) + PREFETCH_SCALES;
    _mm_prefetch((const char *)m->scale + ahead, _MM_HINT_T0);
    if (m->zero) _mm_prefetch((const char *)m->zero + ahead, _MM_HINT_T0);
    for (int64_t g = 0; g < m->groups; g += 16) {    /* scales past the last group multiply codes that are 0 */
        __m512 s, z;
        scales_at(m, o, g, &s, &z);
        _mm512_store_ps(scale + g, s);
        _mm512_store_ps(zero + g, z);
    }
}

/* The same for M <= 16 outputs with one scale each: the first of G numbers of an output; the others stay finite. */
static void read_scales_of_rows(const Matrix *m, int64_t o, int64_t M, int64_t G, float *scale, float *zero) {
    float steps[16], starts[16];
    const __mmask16 mask = tail16(M);
    __m512 s = load_scales(m, m->scale, o, mask), base = m->zero ? load_scales(m, m->zero, o, mask) : _mm512_setzero_ps();
    _mm512_storeu_ps(steps, s);
    _mm512_storeu_ps(starts, _mm512_fnmadd_ps(s, _mm512_set1_ps((float)m->center), base));
    for (int64_t i = 0; i < M; i++) scale[i * G] = steps[i], zero[i * G] = starts[i];
}

/* With one scale per row, bfloat16 products use the codes themselves, and the sums are scaled. */
INLINE int scale_after_sum(const Matrix *m) {
#ifdef __AVX512BF16__
    return m->kind == INT8 && m->groups == 1 && !m->zero;
#else
    (void)m;
    return 0;
#endif
}
static void scale_sums(const Matrix *m, int64_t rows, int64_t first, int64_t last, float *y, int64_t ldy) {
    if (!scale_after_sum(m)) return;
    for (int64_t n = 0; n < rows; n++) for (int64_t o = first; o < last; o += 16) {
        __mmask16 mask = tail16(last - o);
        float *at = y + n * ldy + o - first;
        _mm512_mask_storeu_ps(at, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, at),
                                                      load_scales(m, m->scale, o, mask)));
    }
}

#ifdef __AVX512BF16__
/* Codes of a row as bfloat16, exactly and without their scale, which is applied to the sums. */
static void widen_bytes(const uint8_t *row, int64_t in, uint16_t *to) {
    for (int64_t k = 0; k < in; k += 32) {
        __m256i codes = _mm256_maskz_loadu_epi8(tail32(in - k), row + k);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
        _mm512_mask_storeu_epi16(to + k, tail32(in - k), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        _mm_prefetch((const char *)row + PREFETCH_FAR + k, _MM_HINT_T1);
    }
}

/* A group of nibbles has sixteen possible values: a table look-up. */
static void look_up_nibbles(const Matrix *m, const uint8_t *row, const float *scale, const float *zero, uint16_t *to) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t g = 0; g < m->groups; g++) {
        __m512i values = _mm512_castsi256_si512(narrow(_mm512_fmadd_ps(codes, _mm512_set1_ps(scale[g]),
                                                                       _mm512_set1_ps(zero[g]))));
        for (int64_t k = g * m->group, end = min_i64(m->in, k + m->group); k < end; k += 32) {
            int64_t bytes = min_i64(16, (end - k) / 2);
            __m128i some = _mm_maskz_loadu_epi8(tail16(bytes), row + k / 2);
            __m512i pair = _mm512_cvtepu8_epi32(some);    /* low nibble to the low word, high nibble to the high one */
            pair = _mm512_and_si512(_mm512_or_si512(pair, _mm512_slli_epi32(pair, 12)), _mm512_set1_epi32(0x000f000f));
            _mm512_mask_storeu_epi16(to + k, tail32(end - k), _mm512_permutexvar_epi16(pair, values));
        }
        _mm_prefetch((const char *)row + PREFETCH_FAR / 2 + g * m->group / 2, _MM_HINT_T1);
    }
}
#endif

/* Row o of a matrix of codes as floats or bfloat16 (`as`), `scale` and `zero` as `read_scales` gave them. */
static void decode(const Matrix *m, int64_t o, const float *scale, const float *zero, int64_t as, void *to) {
    const uint8_t *row = (const uint8_t *)m->weight + o * row_bytes(m);
    if (m->kind == BFLOAT16) {
        for (int64_t k = 0; k < m->in; k += 16) {
            __mmask16 mask = tail16(m->in - k);
            store_from_float(to, k, as, mask, load_as_float(row, k, BFLOAT16, mask));
        }
        return;
    }
#ifdef __AVX512BF16__
    if (as == BFLOAT16 && scale_after_sum(m)) { widen_bytes(row, m->in, to); return; }
    if (as == BFLOAT16 && m->kind == INT4) { look_up_nibbles(m, row, scale, zero, to); return; }
#endif
    for (int64_t g = 0; g < m->groups; g++) {
        __m512 step = _mm512_set1_ps(scale[g]), start = _mm512_set1_ps(zero[g]);
        __m512 signed_start = _mm512_fmadd_ps(step, _mm512_set1_ps(128.0f), start);
        for (int64_t k = g * m->group, end = min_i64(m->in, k + m->group); k < end; k += 16) {
            __mmask16 mask = tail16(end - k);
            __m512 w;
            if (m->kind == INT8) {
                __m512i code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, row + k));
                w = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), step, signed_start);
            } else if (m->kind >= TWO_BITS) {
                const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                uint32_t low;
                uint16_t high;
                memcpy(&low, row + k / 4, 4);
                __m512i code = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32((int)low),
                                                                  _mm512_add_epi32(lane, lane)), _mm512_set1_epi32(3));
                if (m->kind == THREE_BITS) {
                    memcpy(&high, row + m->groups * m->group / 4 + k / 8, 2);
                    __m512i bit = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(high), lane),
                                                   _mm512_set1_epi32(1));
                    code = _mm512_add_epi32(code, _mm512_slli_epi32(bit, 2));
                }
                w = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), step, start);
            } else {
                __m128i pair = _mm_loadl_epi64((const __m128i *)(row + k / 2)), low = _mm_set1_epi8(15);
                __m128i odd = _mm_and_si128(_mm_srli_epi16(pair, 4), low);
                __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(pair, low), odd));
                w = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), step, start);
            }
            store_from_float(to, k, as, mask, w);
        }
    }
}

/* What a thread decodes to. */
typedef struct {
    float *scale, *zero;   /* of TILE_OUTPUTS outputs */
    char *weight;          /* LANES decoded outputs, or TILE_OUTPUTS transposed ones */
    __m512 *carry;         /* partial sums of BLOCK_QUADS times four outputs and all rows, between blocks of inputs */
} DecodeScratch;
