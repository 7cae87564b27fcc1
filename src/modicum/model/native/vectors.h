/* Vectors of W floats, as wide as the processor's registers, in the compiler's own vector types: the same sources serve
 * AVX-512, AVX2 and others. Numbers are float32 or bfloat16 in memory and float32 in registers.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__)
#define PAIRS 1            /* products of pairs of bfloat16 numbers, summed in float32 */
#else
#define PAIRS 0
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_u __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu_u __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_u __attribute__((vector_size(2 * W), aligned(2), may_alias));

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t width_of(int kind) { return kind == FLOAT32 ? 4 : 2; }      /* bytes of a number */

INLINE vf splat(float x) { return x - (vf){0}; }
/* Masks of lanes, and what the compiler does not find by itself in the general form. max and min give the second where one
 * is NaN. */
#if W == 16
typedef __mmask16 mask;
INLINE mask less(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE mask is_number(vf a) { return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q); }
INLINE mask between(vi low, vi x, vi high) {
    return _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask((__m512i)low, (__m512i)x), (__m512i)x, (__m512i)high);
}
INLINE vf where(mask m, vf yes, vf no) { return (vf)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes); }
INLINE vf max_vf(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min_vf(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
typedef vi mask;
INLINE mask less(vf a, vf b) { return a < b; }
INLINE mask is_number(vf a) { return a == a; }
INLINE mask between(vi low, vi x, vi high) { return (low <= x) & (x <= high); }
INLINE vf where(mask m, vf yes, vf no) { return (vf)((m & (vi)yes) | (~m & (vi)no)); }
#if W == 8
INLINE vf max_vf(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min_vf(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf max_vf(vf a, vf b) { return where(a > b, a, b); }
INLINE vf min_vf(vf a, vf b) { return where(a < b, a, b); }
#endif
#endif
INLINE vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

/* The upper halves are the bfloat16 numbers, rounded to nearest even. A NaN stays one: its payload may not carry over. */
INLINE vu rounded(vf x) {
    vu bits = (vu)x;
    vu up = bits + 0x7fff + ((bits >> 16) & 1);
    return (vu)where(is_number(x), (vf)up, (vf)(bits | 0x400000));
}

INLINE vh narrow(vf x) {
#if PAIRS
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return __builtin_convertvector(rounded(x) >> 16, vh);
#endif
}

INLINE vf load(const void *base, int64_t at, int kind) {
    if (kind == FLOAT32) return *(const vf_u *)((const float *)base + at);
    return widen(*(const vh_u *)((const uint16_t *)base + at));
}

INLINE void store(void *base, int64_t at, int kind, vf x) {
    if (kind == FLOAT32) *(vf_u *)((float *)base + at) = x;
    else *(vh_u *)((uint16_t *)base + at) = narrow(x);
}

INLINE float load1(const void *base, int64_t at, int kind) {
    if (kind == FLOAT32) return ((const float *)base)[at];
    union { uint32_t bits; float value; } one = {(uint32_t)((const uint16_t *)base)[at] << 16};
    return one.value;
}

INLINE void store1(void *base, int64_t at, int kind, float x) {
    union { float value; uint32_t bits; } one = {.value = x};
    if (kind == FLOAT32) ((float *)base)[at] = x;
    else if (x != x) ((uint16_t *)base)[at] = 0x7fc0;
    else ((uint16_t *)base)[at] = (uint16_t)((one.bits + 0x7fff + ((one.bits >> 16) & 1)) >> 16);
}

INLINE float sum_of(vf x) {
    float total = 0;
    UNROLL for (int i = 0; i < W; i++) total += x[i];
    return total;
}

INLINE float max_of(vf x) {
    float top = x[0];
    UNROLL for (int i = 1; i < W; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* exp, to about 2 ulp; below -87 it stays at exp(-87), above 88 at exp(88). NaN stays NaN. */
INLINE vf exp_vf(vf x) {
    x = min_vf(splat(88.0f), max_vf(splat(-87.0f), x));
    vf shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
#if W == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vf scaled = (vf)((vi)p + ((vi)shifted << 23));
    return where(is_number(x), scaled, x);
#endif
}
