/* Rotation, writing the cache, attention over blocks read in place.
 *
 * A task is one KV head of up to four neighbouring rows of one sequence: the query heads that share the KV head, times
 * the rows, are its queries. Scores of all keys are kept (float32, a thread's own room), so the softmax needs no second
 * look at the keys.
 */
#pragma once
#include "common.h"

#define QUERY_ROWS 4

static float rms_scale(const float *x, int64_t n, float eps) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        __m512 v = _mm512_maskz_loadu_ps(tail16(n - k), x + k);
        total = _mm512_fmadd_ps(v, v, total);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(total) / (float)n + eps);
}

static void scale_by(float *to, const float *x, const float *weight, float scale, int64_t n) {
    for (int64_t k = 0; k < n; k += 16) {
        __mmask16 mask = tail16(n - k);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(to + k, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + k)));
    }
}

/* Dimensions i and i + half of a head turn by the angle cosine[i], sine[i]. */
static void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

INLINE int64_t cache_at(const Model *m, int64_t layer, int64_t g, const Step *s, int64_t row, int64_t key) {
    int64_t block = s->table[s->slot[row] * s->table_stride + key / m->block_size];
    return (((layer * m->kv_heads + g) * m->n_blocks + block) * m->block_size + key % m->block_size) * m->head_dim;
}

/* Norm and rotation of a row's queries of KV head g and of its key; key and value go to the cache. */
static void place(const Model *m, const Layer *l, int64_t layer, const Step *s, int64_t row, int64_t g, float *q_H,
                  float *k_G, const float *v_G, float q_scale, float k_scale, const float *turn) {
    int64_t E = m->head_dim, R = m->heads / m->kv_heads;
    for (int64_t r = 0; r <= R; r++) {
        float *x = r < R ? q_H + (g * R + r) * E : k_G + g * E;
        const float *weight = r < R ? l->q_norm : l->k_norm;
        if (weight && m->qk_norm_full)
            scale_by(x, x, weight + (r < R ? (g * R + r) * E : g * E), r < R ? q_scale : k_scale, E);
        else if (weight) scale_by(x, x, weight, rms_scale(x, E, m->eps), E);
        if (turn) rotate(x, turn, turn + m->rotated / 2, m->rotated / 2);
    }
    int64_t at = cache_at(m, layer, g, s, row, s->position[row]);
    for (int64_t e = 0; e < E; e += 16) {
        __mmask16 mask = tail16(E - e);
        store_from_float(m->k_cache, at + e, m->cache_kind, mask, _mm512_maskz_loadu_ps(mask, k_G + g * E + e));
        store_from_float(m->v_cache, at + e, m->cache_kind, mask, _mm512_maskz_loadu_ps(mask, v_G + g * E + e));
    }
}

/* Scores of four queries with four keys (places in the cache): 16 numbers, query by query. */
INLINE __m512 scores16(const void *const *q, const void *keys, const int64_t *at, int64_t kind, int64_t E) {
    __m512 acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t e = 0; e < E; e += 16) {
        __mmask16 mask = tail16(E - e);
        __m512 kv[4];
        UNROLL for (int j = 0; j < 4; j++) kv[j] = load_as_float(keys, at[j] + e, kind, mask);
        UNROLL for (int i = 0; i < 4; i++) {
            __m512 qv = _mm512_maskz_loadu_ps(mask, (const float *)q[i] + e);
            UNROLL for (int j = 0; j < 4; j++) acc[4 * i + j] = _mm512_fmadd_ps(qv, kv[j], acc[4 * i + j]);
        }
    }
    return sums(acc);
}

#ifdef __AVX512BF16__
/* The same for queries and keys in bfloat16. */
INLINE __m512 half_scores16(const void *const *q, const void *keys, const int64_t *at, int64_t E) {
    __m512 acc[16];
    UNROLL for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t e = 0; e < E; e += 32) {
        __mmask32 mask = tail32(E - e);
        __m512bh kv[4];
        UNROLL for (int j = 0; j < 4; j++)
            kv[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, (const uint16_t *)keys + at[j] + e);
        UNROLL for (int i = 0; i < 4; i++) {
            __m512bh qv = (__m512bh)_mm512_maskz_loadu_epi16(mask, (const uint16_t *)q[i] + e);
            UNROLL for (int j = 0; j < 4; j++) acc[4 * i + j] = _mm512_dpbf16_ps(acc[4 * i + j], qv, kv[j]);
        }
    }
    return sums(acc);
}
#endif

/* Weights of keys first .. last - 1 in place of their scores (0 elsewhere in low .. high - 1); divided by their sum. */
static void softmax(float *score, int64_t low, int64_t high, int64_t first, int64_t last, float softcap) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t s = first; s < last; s += 16) {
        __mmask16 mask = tail16(last - s);
        __m512 v = _mm512_maskz_loadu_ps(mask, score + s - low);
        if (softcap > 0) {
            v = _mm512_mul_ps(tanh16(_mm512_div_ps(v, _mm512_set1_ps(softcap))), _mm512_set1_ps(softcap));
            _mm512_mask_storeu_ps(score + s - low, mask, v);
        }
        top = _mm512_mask_max_ps(top, mask, top, v);
    }
    __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t s = first; s < last; s += 16) {
        __mmask16 mask = tail16(last - s);
        __m512 v = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, score + s - low), largest));
        total = _mm512_mask_add_ps(total, mask, total, v);
        _mm512_mask_storeu_ps(score + s - low, mask, v);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t s = low; s < high; s += 16) {
        __mmask16 mask = tail16(high - s);
        const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i key = _mm512_add_epi32(_mm512_set1_epi32((int)s), steps);
        __mmask16 seen = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)first)) &
                         _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)last));
        __m512 v = _mm512_maskz_loadu_ps(mask & seen, score + s - low);
        _mm512_mask_storeu_ps(score + s - low, mask, _mm512_mul_ps(v, share));
    }
}

/* out of rows row .. row + n - 1 (one sequence, following positions), KV head g. q and out have row stride ld. */
static void attend(const Model *m, const Layer *l, int64_t layer, const Step *s, int64_t row, int64_t n, int64_t g,
                   const float *q, int64_t ldq, float *out, int64_t ldo, float *score, int64_t stride) {
    int64_t E = m->head_dim, R = m->heads / m->kv_heads, Q = n * R;
    int64_t high = s->position[row + n - 1] + 1;
    int64_t low = l->window ? most(0, s->position[row] + 1 - l->window) : 0;
    const void *q_of[Q + 3];                  /* the last one again for what is missing to a multiple of four */
    int half = 0;
#ifdef __AVX512BF16__
    half = m->half && m->cache_kind == BFLOAT16;
#endif
    uint16_t narrowed[half ? Q * E : 1];
    for (int64_t a = 0; a < Q + 3; a++) {
        int64_t b = least(a, Q - 1);
        q_of[a] = q + (b / R) * ldq + (g * R + b % R) * E;
        if (half && a < Q) for (int64_t e = 0; e < E; e += 16) {
            __mmask16 mask = tail16(E - e);
            __m512 v = _mm512_maskz_loadu_ps(mask, (const float *)q_of[a] + e);
            store_from_float(narrowed, a * E + e, BFLOAT16, mask, v);
        }
        if (half) q_of[a] = narrowed + b * E;
    }
    const __m512 scale = _mm512_set1_ps(l->scale);
    for (int64_t i = low, end; i < high; i = end) {
        int64_t base = cache_at(m, layer, g, s, row, i), from = i;
        end = least(high, (i / m->block_size + 1) * m->block_size);
        for (; i < end; i += 4) {
            int64_t at[4];
            for (int j = 0; j < 4; j++) at[j] = base + (least(i + j, end - 1) - from) * E;
            for (int64_t a = 0; a < Q; a += 4) {
                __m512 sixteen;
#ifdef __AVX512BF16__
                if (half) sixteen = half_scores16(q_of + a, m->k_cache, at, E);
                else
#endif
                sixteen = scores16(q_of + a, m->k_cache, at, m->cache_kind, E);
                float each[16];
                _mm512_storeu_ps(each, _mm512_mul_ps(sixteen, scale));
                for (int j = 0; j < 4 && a + j < Q; j++)    /* up to three places too many: the next keys' or spare */
                    _mm_storeu_ps(score + (a + j) * stride + i - low, _mm_loadu_ps(each + 4 * j));
            }
        }
    }
    for (int64_t a = 0; a < Q; a++) {
        int64_t last = s->position[row + a / R] + 1, first = l->window ? most(0, last - l->window) : 0;
        softmax(score + a * stride, low, high, first, last, m->softcap);
    }
    for (int64_t a = 0; a < Q; a += 4)
        for (int64_t e = 0; e < E; e += 64) {
            const int vectors = (int)least(4, (E - e + 15) / 16);
            __m512 acc[4][4];
            UNROLL for (int j = 0; j < 4; j++) UNROLL for (int v = 0; v < 4; v++) acc[j][v] = _mm512_setzero_ps();
            for (int64_t i = low; i < high;) {
                int64_t base = cache_at(m, layer, g, s, row, i) + e;
                int64_t end = least(high, (i / m->block_size + 1) * m->block_size);
                for (; i < end; i++, base += E) {
                    __m512 p[4];
                    UNROLL for (int j = 0; j < 4; j++)
                        p[j] = _mm512_set1_ps(score[least(a + j, Q - 1) * stride + i - low]);
                    UNROLL for (int v = 0; v < 4; v++) {
                        if (v >= vectors) break;
                        __m512 value = load_as_float(m->v_cache, base + 16 * v, m->cache_kind, tail16(E - e - 16 * v));
                        UNROLL for (int j = 0; j < 4; j++) acc[j][v] = _mm512_fmadd_ps(p[j], value, acc[j][v]);
                    }
                }
            }
            for (int j = 0; j < 4 && a + j < Q; j++)
                for (int v = 0; v < vectors; v++)
                    _mm512_mask_storeu_ps(out + ((a + j) / R) * ldo + (g * R + (a + j) % R) * E + e + 16 * v,
                                          tail16(E - e - 16 * v), acc[j][v]);
        }
}
