/* Sixteen lanes on a processor with AVX2 and FMA: the intrinsics of AVX-512 that the kernels use, as pairs of 256 bits.
 *
 * The kernels are written once, in AVX-512. Where that is not there, each vector of them is two of AVX2, operation by
 * operation, with the same lanes in the same order, so that both give the same sums up to the rounding of exp. Masks are
 * bits here too; those of loads and stores are the first n lanes (`tail16`), so that the rest of memory is not touched.
 */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct { __m256 a, b; } Float16;      /* lanes 0 .. 7, 8 .. 15 */
typedef struct { __m256i a, b; } Int16;
typedef struct { __m256d a, b; } Double8;
#define __m512 Float16
#define __m512i Int16
#define __m512d Double8

#define FLOAT1(NAME, OF) INLINE Float16 x2_##NAME(Float16 x) { return (Float16){OF(x.a), OF(x.b)}; }
#define FLOAT2(NAME) \
    INLINE Float16 x2_##NAME(Float16 x, Float16 y) { return (Float16){_mm256_##NAME(x.a, y.a), _mm256_##NAME(x.b, y.b)}; }
#define FLOAT3(NAME) \
    INLINE Float16 x2_##NAME(Float16 x, Float16 y, Float16 z) { \
        return (Float16){_mm256_##NAME(x.a, y.a, z.a), _mm256_##NAME(x.b, y.b, z.b)}; }
#define INT2(NAME, OF) INLINE Int16 x2_##NAME(Int16 x, Int16 y) { return (Int16){OF(x.a, y.a), OF(x.b, y.b)}; }
#define SHIFT(NAME) \
    INLINE Int16 x2_##NAME(Int16 x, int n) { return (Int16){_mm256_##NAME(x.a, n), _mm256_##NAME(x.b, n)}; }

FLOAT2(add_ps) FLOAT2(sub_ps) FLOAT2(mul_ps) FLOAT2(div_ps) FLOAT2(max_ps) FLOAT2(min_ps)
FLOAT2(unpacklo_ps) FLOAT2(unpackhi_ps) FLOAT3(fmadd_ps) FLOAT3(fnmadd_ps)
INT2(add_epi32, _mm256_add_epi32) INT2(sub_epi32, _mm256_sub_epi32) INT2(and_si512, _mm256_and_si256)
INT2(srlv_epi32, _mm256_srlv_epi32) INT2(max_epi32, _mm256_max_epi32) INT2(min_epi32, _mm256_min_epi32)
SHIFT(slli_epi32) SHIFT(srli_epi32) SHIFT(srai_epi32)

INLINE __m256 absolute8(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE __m256 round8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FLOAT1(abs_ps, absolute8) FLOAT1(round_ps, round8)

INLINE Float16 x2_set1_ps(float x) { return (Float16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Int16 x2_set1_epi32(int32_t x) { return (Int16){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Float16 x2_setzero_ps(void) { return (Float16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Int16 x2_setzero_si512(void) { return (Int16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Int16 x2_castps_si512(Float16 x) { return (Int16){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE Float16 x2_castsi512_ps(Int16 x) { return (Float16){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE Double8 x2_castps_pd(Float16 x) { return (Double8){_mm256_castps_pd(x.a), _mm256_castps_pd(x.b)}; }
INLINE Float16 x2_castpd_ps(Double8 x) { return (Float16){_mm256_castpd_ps(x.a), _mm256_castpd_ps(x.b)}; }
INLINE Double8 x2_unpacklo_pd(Double8 x, Double8 y) {
    return (Double8){_mm256_unpacklo_pd(x.a, y.a), _mm256_unpacklo_pd(x.b, y.b)};
}
INLINE Double8 x2_unpackhi_pd(Double8 x, Double8 y) {
    return (Double8){_mm256_unpackhi_pd(x.a, y.a), _mm256_unpackhi_pd(x.b, y.b)};
}
#define x2_setr_epi32(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7) \
    ((Int16){_mm256_setr_epi32(a0, a1, a2, a3, a4, a5, a6, a7), _mm256_setr_epi32(b0, b1, b2, b3, b4, b5, b6, b7)})

/* Quarters of 128 bits: 0x88 takes the even ones of x, then of y, 0xdd the odd ones. */
#define x2_shuffle_f32x4(x, y, which) \
    ((Float16){_mm256_permute2f128_ps((x).a, (x).b, (which) == 0x88 ? 0x20 : 0x31), \
               _mm256_permute2f128_ps((y).a, (y).b, (which) == 0x88 ? 0x20 : 0x31)})
#define x2_extractf32x4_ps(x, i) _mm256_extractf128_ps((i) < 2 ? (x).a : (x).b, (i) & 1)
INLINE __m128 x2_castps512_ps128(Float16 x) { return _mm256_castps256_ps128(x.a); }

/* masks ------------------------------------------------------------------------------------------------------------ */

INLINE __m256i lanes8(unsigned mask) {        /* all bits of the lanes whose bit is set */
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
}
#define x2_cmp_ps_mask(x, y, how) \
    ((__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps((x).a, (y).a, how)) \
                 | _mm256_movemask_ps(_mm256_cmp_ps((x).b, (y).b, how)) << 8))
INLINE __mmask16 x2_cmpge_epi32_mask(Int16 x, Int16 y) {
    int less = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)))
             | _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))) << 8;
    return (__mmask16)~less;
}
INLINE Float16 x2_mask_mov_ps(Float16 other, __mmask16 mask, Float16 x) {
    return (Float16){_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(lanes8(mask))),
                     _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(lanes8(mask >> 8)))};
}
INLINE Int16 x2_mask_set1_epi32(Int16 other, __mmask16 mask, int32_t x) {
    return x2_castps_si512(x2_mask_mov_ps(x2_castsi512_ps(other), mask, x2_castsi512_ps(x2_set1_epi32(x))));
}

/* memory ----------------------------------------------------------------------------------------------------------- */

INLINE Float16 x2_loadu_ps(const void *p) {
    return (Float16){_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)p + 8)};
}
INLINE void x2_storeu_ps(void *p, Float16 x) {
    _mm256_storeu_ps((float *)p, x.a), _mm256_storeu_ps((float *)p + 8, x.b);
}
#define x2_load_ps x2_loadu_ps                /* as quick, where the address is aligned */
#define x2_store_ps x2_storeu_ps
INLINE Float16 x2_maskz_loadu_ps(__mmask16 mask, const void *p) {
    if (mask == 0xffff) return x2_loadu_ps(p);
    return (Float16){_mm256_maskload_ps((const float *)p, lanes8(mask)),
                     _mm256_maskload_ps((const float *)p + 8, lanes8(mask >> 8))};
}
INLINE void x2_mask_storeu_ps(void *p, __mmask16 mask, Float16 x) {
    if (mask == 0xffff) { x2_storeu_ps(p, x); return; }
    _mm256_maskstore_ps((float *)p, lanes8(mask), x.a);
    _mm256_maskstore_ps((float *)p + 8, lanes8(mask >> 8), x.b);
}
/* The first n of 16 (or 32) numbers: all are read at once where that does not touch another page of memory. */
static const int16_t first_words[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
static const int8_t first_bytes[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
INLINE int within_page(const void *p, unsigned bytes) { return ((uintptr_t)p & 4095) <= 4096 - bytes; }
INLINE __m256i y_maskz_loadu_epi16(__mmask16 mask, const void *p) {
    if (mask == 0xffff) return _mm256_loadu_si256((const __m256i *)p);
    const int n = __builtin_popcount(mask);
    if (n && within_page(p, 32))
        return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)p),
                                _mm256_loadu_si256((const __m256i *)(first_words + 16 - n)));
    uint16_t some[16] = {0};
    memcpy(some, p, 2 * (size_t)n);
    return _mm256_loadu_si256((const __m256i *)some);
}
INLINE void y_mask_storeu_epi16(void *p, __mmask16 mask, __m256i x) {
    uint16_t some[16];
    if (mask == 0xffff) { _mm256_storeu_si256((__m256i *)p, x); return; }
    _mm256_storeu_si256((__m256i *)some, x);
    memcpy(p, some, 2 * (size_t)__builtin_popcount(mask));
}
INLINE __m128i x_maskz_loadu_epi8(__mmask16 mask, const void *p) {
    if (mask == 0xffff) return _mm_loadu_si128((const __m128i *)p);
    const int n = __builtin_popcount(mask);
    if (n && within_page(p, 16))
        return _mm_and_si128(_mm_loadu_si128((const __m128i *)p),
                             _mm_loadu_si128((const __m128i *)(first_bytes + 16 - n)));
    uint8_t some[16] = {0};
    memcpy(some, p, (size_t)n);
    return _mm_loadu_si128((const __m128i *)some);
}

/* other types ------------------------------------------------------------------------------------------------------ */

INLINE Float16 x2_cvtepi32_ps(Int16 x) { return (Float16){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Int16 x2_cvtps_epi32(Float16 x) { return (Int16){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Int16 x2_maskz_cvtps_epi32(__mmask16 mask, Float16 x) {
    return x2_cvtps_epi32(x2_mask_mov_ps(x2_setzero_ps(), mask, x));
}
INLINE Int16 x2_cvtepu16_epi32(__m256i x) {
    return (Int16){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                   _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
INLINE Int16 x2_cvtepi8_epi32(__m128i x) {
    return (Int16){_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
INLINE Int16 x2_cvtepu8_epi32(__m128i x) {
    return (Int16){_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
INLINE Float16 x2_cvtph_ps(__m256i x) {
    return (Float16){_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
INLINE __m256i x2_cvtepi32_epi16(Int16 x) {   /* of 0 .. 65535 */
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
INLINE __m256i signed_words(Int16 x) {        /* of -32768 .. 32767 */
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
}
INLINE __m128i x2_cvtepi32_epi8(Int16 x) {    /* of -128 .. 127 */
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
INLINE void x2_mask_cvtepi32_storeu_epi8(void *p, __mmask16 mask, Int16 x) {
    uint8_t some[16];
    _mm_storeu_si128((__m128i *)some, x2_cvtepi32_epi8(x));
    memcpy(p, some, (size_t)__builtin_popcount(mask));
}

/* over the lanes --------------------------------------------------------------------------------------------------- */

INLINE float x2_reduce_add_ps(Float16 x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float x2_reduce_max_ps(Float16 x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE int32_t x2_reduce_add_epi32(Int16 x) {
    int32_t lane[8], total = 0;
    _mm256_storeu_si256((__m256i *)lane, _mm256_add_epi32(x.a, x.b));
    for (int i = 0; i < 8; i++) total += lane[i];
    return total;
}
/* x 2^n for whole n from -126 to 127. */
INLINE Float16 x2_scalef_ps(Float16 x, Float16 n) {
    return x2_mul_ps(x, x2_castsi512_ps(x2_slli_epi32(x2_add_epi32(x2_cvtps_epi32(n), x2_set1_epi32(127)), 23)));
}
#define x2_roundscale_ps(x, how) x2_round_ps(x)

/* The names under which the kernels call them. */
#undef _mm512_setr_epi32
#undef _mm512_setr_ps
#define _mm512_abs_ps x2_abs_ps
#define _mm512_add_epi32 x2_add_epi32
#define _mm512_add_ps x2_add_ps
#define _mm512_and_si512 x2_and_si512
#define _mm512_castpd_ps x2_castpd_ps
#define _mm512_castps512_ps128 x2_castps512_ps128
#define _mm512_castps_pd x2_castps_pd
#define _mm512_castps_si512 x2_castps_si512
#define _mm512_castsi512_ps x2_castsi512_ps
#define _mm512_cmp_ps_mask x2_cmp_ps_mask
#define _mm512_cmpge_epi32_mask x2_cmpge_epi32_mask
#define _mm512_cvtepi32_epi16 x2_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 x2_cvtepi32_epi8
#define _mm512_cvtepi32_ps x2_cvtepi32_ps
#define _mm512_cvtepi8_epi32 x2_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 x2_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 x2_cvtepu8_epi32
#define _mm512_cvtph_ps x2_cvtph_ps
#define _mm512_cvtps_epi32 x2_cvtps_epi32
#define _mm512_div_ps x2_div_ps
#define _mm512_extractf32x4_ps x2_extractf32x4_ps
#define _mm512_fmadd_ps x2_fmadd_ps
#define _mm512_fnmadd_ps x2_fnmadd_ps
#define _mm512_load_ps x2_load_ps
#define _mm512_loadu_ps x2_loadu_ps
#define _mm512_mask_cvtepi32_storeu_epi8 x2_mask_cvtepi32_storeu_epi8
#define _mm512_mask_mov_ps x2_mask_mov_ps
#define _mm512_mask_set1_epi32 x2_mask_set1_epi32
#define _mm512_mask_storeu_ps x2_mask_storeu_ps
#define _mm512_maskz_cvtps_epi32 x2_maskz_cvtps_epi32
#define _mm512_maskz_loadu_ps x2_maskz_loadu_ps
#define _mm512_max_epi32 x2_max_epi32
#define _mm512_max_ps x2_max_ps
#define _mm512_min_epi32 x2_min_epi32
#define _mm512_min_ps x2_min_ps
#define _mm512_mul_ps x2_mul_ps
#define _mm512_reduce_add_epi32 x2_reduce_add_epi32
#define _mm512_reduce_add_ps x2_reduce_add_ps
#define _mm512_reduce_max_ps x2_reduce_max_ps
#define _mm512_roundscale_ps x2_roundscale_ps
#define _mm512_scalef_ps x2_scalef_ps
#define _mm512_set1_epi32 x2_set1_epi32
#define _mm512_set1_ps x2_set1_ps
#define _mm512_setr_epi32 x2_setr_epi32
#define _mm512_setzero_ps x2_setzero_ps
#define _mm512_setzero_si512 x2_setzero_si512
#define _mm512_shuffle_f32x4 x2_shuffle_f32x4
#define _mm512_slli_epi32 x2_slli_epi32
#define _mm512_srai_epi32 x2_srai_epi32
#define _mm512_srli_epi32 x2_srli_epi32
#define _mm512_srlv_epi32 x2_srlv_epi32
#define _mm512_store_ps x2_store_ps
#define _mm512_storeu_ps x2_storeu_ps
#define _mm512_sub_epi32 x2_sub_epi32
#define _mm512_sub_ps x2_sub_ps
#define _mm512_unpackhi_pd x2_unpackhi_pd
#define _mm512_unpackhi_ps x2_unpackhi_ps
#define _mm512_unpacklo_pd x2_unpacklo_pd
#define _mm512_unpacklo_ps x2_unpacklo_ps
#define _mm256_maskz_loadu_epi16 y_maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 y_mask_storeu_epi16
#define _mm_maskz_loadu_epi8 x_maskz_loadu_epi8
