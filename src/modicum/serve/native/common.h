/* Types shared with Python (see __init__.py), vector helpers, the barrier.
 *
 * Letters: T rows (tokens) of a tile, D width, H query heads, G KV heads, R = H / G, E head_dim, S keys,
 * K inputs of a matrix, P block size. All activations between products are float32.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGN 64
#ifndef __AVX512F__
#include "avx2.h"
#endif

/* Of weights and caches; of scales, FLOAT16 too; of weights, two and three bits: see `row_bytes`. */
enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, FLOAT16 = 4, TWO_BITS = 5, THREE_BITS = 6 };

typedef struct {          /* one linear layer: (out, in), row-major, as the module stores it */
    int64_t kind, out, in, group, groups, scale_kind, center;
    const void *weight, *scale, *zero;        /* w = scale * (code - center) + zero, unsigned codes; zero may be NULL */
    const float *bias;
} Matrix;

typedef struct {
    const float *angles;                      /* rotated / 2 of them */
    int64_t rotated;                          /* dimensions of a head that are rotated */
    float scale, unused;
} Rope;

typedef struct {
    Matrix q, k, v, o, gate, up, down;        /* weight == NULL: absent */
    const float *attention_norm, *mlp_norm, *attention_out_norm, *mlp_out_norm, *q_norm, *k_norm;
    int64_t rope, window;                     /* index of the rope, -1: none; keys attended to, 0: all */
    float scale, unused;
} Layer;

typedef struct {
    int64_t layers, width, heads, kv_heads, head_dim, mlp_width;
    int64_t rotated;                          /* maximum over ropes */
    int64_t activation, qk_norm_full, half, int8_activations, tile_rows, ropes;    /* tile_rows: see amx.h; 0: never */
    int64_t cache_kind, block_size, n_blocks, threads;
    float eps, softcap;
    const Layer *layer;
    const Rope *rope;
    const float *final_norm;
    Matrix head;
    void *k_cache, *v_cache;                  /* (layers, G, n_blocks, P, E) */
    uint16_t *k_scale, *v_scale;              /* of a cache in int8: one bfloat16 for each entry */
} Model;

typedef struct {          /* of a sequence with evicted entries: pages and entries of each head of each layer */
    const int64_t *table, *count;             /* (layers, G, stride), (layers, G); NULL: nothing is evicted */
    int64_t stride, before;                   /* before: rows of the sequence in this step that precede this one */
} EvictedPages;

typedef struct {          /* of a row whose attention weights a KV policy wants; reduced over rows and query heads */
    float *weight;                            /* (layers, G, stride), entries in the order of the cache; NULL: not wanted */
    int64_t stride;                           /* a multiple of 16 */
} Marks;

typedef struct {
    int64_t rows, n_logits, table_stride, ancestor_stride;
    float *x;                                 /* (rows, D): embeddings in, hidden states before the norm out */
    const int64_t *position, *entry, *slot;   /* per row; entry: index in the sequence's cache that it is written to */
    const int64_t *root, *ancestors;          /* of draft rows, see attention.h; NULL: none; root -1: not a draft */
    const int64_t *table;                     /* of blocks, by slot */
    const EvictedPages *evicted;              /* per row, NULL if no sequence has any */
    int32_t *position_of;                     /* position in its sequence of each entry of each page */
    float *weight_of;                         /* number of merged tokens of each entry; NULL: one each */
    const Marks *marks;                       /* per row, NULL if no row is marked */
    const int64_t *observed_row;              /* per row: where in `observed` its q, k and v go, -1: nowhere; or NULL */
    float *observed;                          /* (layers, n_observed, (H + 2 G) E), after norms and rotation */
    int64_t n_observed, mark_largest;         /* mark_largest: the largest weight of each entry, not their sum */
    const int64_t *logit_row;                 /* rows whose logits are computed */
    float *logits;                            /* (n_logits, V) */
} Step;

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE __mmask16 tail16(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }
INLINE __mmask32 tail32(int64_t left) { return left >= 32 ? 0xffffffffu : (__mmask32)((1u << left) - 1); }
INLINE __mmask64 tail64(int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

INLINE __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

/* Sixteen floats of a float32 or bfloat16 array. */
INLINE __m512 load_as_float(const void *base, int64_t at, int64_t kind, __mmask16 mask) {
    if (kind == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)base + at);
    return widen(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)base + at));
}

INLINE __m256i narrow(__m512 x) {             /* to bfloat16, to nearest even; NaN stays NaN */
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(up, nan, 0x7fc0));
#endif
}

INLINE void store_from_float(void *base, int64_t at, int64_t kind, __mmask16 mask, __m512 x) {
    if (kind == FLOAT32) _mm512_mask_storeu_ps((float *)base + at, mask, x);
    else _mm256_mask_storeu_epi16((uint16_t *)base + at, mask, narrow(x));
}

/* Sixteen numbers of a cache from e on; its entry lies at `at`. */
INLINE __m512 load_entry(const void *base, const uint16_t *scale, int64_t at, int64_t e, int64_t E, int64_t kind,
                         __mmask16 mask) {
    if (kind != INT8) return load_as_float(base, at + e, kind, mask);
    union { uint32_t bits; float value; } one = {(uint32_t)scale[at / E] << 16};
    __m128i codes = _mm_maskz_loadu_epi8(mask, (const int8_t *)base + at + e);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_set1_ps(one.value));
}

/* An entry of E numbers, in int8 with one scale for all of them. */
INLINE void store_int8(void *base, uint16_t *scale, int64_t at, const float *x, int64_t E) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t e = 0; e < E; e += 16)
        top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(E - e), x + e)));
    uint16_t narrowed[16];
    _mm256_storeu_si256((__m256i *)narrowed, narrow(_mm512_set1_ps(_mm512_reduce_max_ps(top) / 127.0f)));
    scale[at / E] = narrowed[0];
    union { uint32_t bits; float value; } one = {(uint32_t)narrowed[0] << 16};
    __m512 step = _mm512_set1_ps(one.value > 0 ? one.value : 1.0f);
    const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
    for (int64_t e = 0; e < E; e += 16) {
        __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(tail16(E - e), x + e), step));
        code = _mm512_max_epi32(_mm512_min_epi32(code, most), least);
        _mm512_mask_cvtepi32_storeu_epi8((int8_t *)base + at + e, tail16(E - e), code);
    }
}

/* Two bits: four codes to a byte, the first in its lowest bits. Three bits: a plane of the low two bits of all codes of
 * the row, then one of the high bits, eight to a byte. */
INLINE int64_t row_bytes(const Matrix *m) {
    const int64_t padded = m->groups * m->group;
    const int64_t each[] = {4 * m->in, 2 * m->in, m->in, padded / 2, 0, padded / 4, padded / 8 * 3};
    return each[m->kind];
}

INLINE int is_coded(const Matrix *m) { return m->kind == INT8 || m->kind == INT4 || m->kind >= TWO_BITS; }

INLINE __m512 load_scales(const Matrix *m, const void *base, int64_t at, __mmask16 mask) {
    if (m->scale_kind != FLOAT16) return load_as_float(base, at, m->scale_kind, mask);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)base + at));
}

/* Scales of sixteen groups of an output's codes from g on, and the value of code 0 (codes taken as unsigned). */
INLINE void scales_at(const Matrix *m, int64_t o, int64_t g, __m512 *scale, __m512 *zero) {
    __mmask16 mask = tail16(m->groups - g);
    __m512 base = m->zero ? load_scales(m, m->zero, o * m->groups + g, mask) : _mm512_setzero_ps();
    *scale = load_scales(m, m->scale, o * m->groups + g, mask);
    *zero = _mm512_fnmadd_ps(*scale, _mm512_set1_ps((float)m->center), base);
}

/* The sums of sixteen vectors, as one vector. */
INLINE __m512 sums(const __m512 *v) {
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

/* to[i][j] = from[j][i] for sixteen vectors. */
INLINE void transpose16(const __m512 *from, __m512 *to) {
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_ps(from[2 * i], from[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(from[2 * i], from[2 * i + 1]);
    }
#define LOW(x, y) _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)))
#define HIGH(x, y) _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)))
    UNROLL for (int i = 0; i < 4; i++) {
        b[4 * i] = LOW(a[4 * i], a[4 * i + 2]), b[4 * i + 1] = HIGH(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = LOW(a[4 * i + 1], a[4 * i + 3]), b[4 * i + 3] = HIGH(a[4 * i + 1], a[4 * i + 3]);
    }
#undef LOW
#undef HIGH
    UNROLL for (int i = 0; i < 4; i++) {      /* b[4 q + i], lane l: element 4 l + i of the vectors 4 q .. 4 q + 3 */
        __m512 even = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        __m512 even2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        __m512 odd2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        to[i] = _mm512_shuffle_f32x4(even, even2, 0x88), to[4 + i] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        to[8 + i] = _mm512_shuffle_f32x4(even, even2, 0xdd), to[12 + i] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

/* exp within 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; below -87 it is 0. */
INLINE __m512 exp16(__m512 x) {
    const __m512 low = _mm512_set1_ps(-87.3f), high = _mm512_set1_ps(88.3f);
    __mmask16 zero = _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ);
    x = _mm512_min_ps(high, _mm512_max_ps(low, x));    /* in this order a NaN in x propagates */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), zero, _mm512_setzero_ps());
}

INLINE __m512 tanh16(__m512 x) {              /* 1 - 2 / (exp(2x) + 1) */
    __m512 e = exp16(_mm512_add_ps(x, x)), one = _mm512_set1_ps(1.0f);
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

/* A barrier that threads wait at many times per step: they spin, and yield after a while. */
typedef struct {
    int waiting __attribute__((aligned(64)));
    unsigned round __attribute__((aligned(64)));    /* wraps after some days of decoding: only equality matters */
} Barrier;

static void barrier_wait(Barrier *b, int threads) {
    if (threads == 1) return;
    unsigned round = __atomic_load_n(&b->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->waiting, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&b->round, __ATOMIC_ACQUIRE) == round; spins++) {
        if (spins < 4096) _mm_pause();
        else sched_yield();
    }
}
