/* Entries of the cache: norms, rotation and writing of new ones, where those of a sequence lie, which ones a row sees. */
#pragma once
#include "common.h"

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

/* Rotate dimensions i and i + half of a head by the angle with cosine[i], sine[i]. */
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

/* Offset of entry `entry` of one head (`head_index`: over all layers) of a sequence with evicted entries. */
INLINE int64_t page_at(const Model *m, const EvictedPages *evicted, int64_t head_index, int64_t entry) {
    int64_t page = evicted->table[head_index * evicted->stride + entry / m->block_size];
    return (page * m->block_size + entry % m->block_size) * m->head_dim;
}

INLINE int64_t entries_before(const EvictedPages *evicted, int64_t head_index) {    /* this row's own one */
    return evicted->count[head_index] + evicted->before;
}

INLINE const EvictedPages *pages_of(const Step *s, int64_t row) {
    return s->evicted && s->evicted[row].table ? s->evicted + row : NULL;
}

/* Norm and rotation of a row's queries of KV head g and of its key; key and value are written to the cache. */
static void write_kv(const Model *m, const Layer *l, int64_t layer, const Step *s, int64_t row, int64_t g, float *q_H,
                     float *k_G, const float *v_G, float q_scale, float k_scale, const float *cos_sin) {
    int64_t E = m->head_dim, R = m->heads / m->kv_heads, half = cos_sin ? m->rope[l->rope].rotated / 2 : 0;
    for (int64_t r = 0; r <= R; r++) {
        float *x = r < R ? q_H + (g * R + r) * E : k_G + g * E;
        const float *weight = r < R ? l->q_norm : l->k_norm;
        if (weight && m->qk_norm_full)
            scale_by(x, x, weight + (r < R ? (g * R + r) * E : g * E), r < R ? q_scale : k_scale, E);
        else if (weight) scale_by(x, x, weight, rms_scale(x, E, m->eps), E);
        if (cos_sin) rotate(x, cos_sin, cos_sin + half, half);
    }
    const EvictedPages *evicted = pages_of(s, row);
    int64_t head_index = layer * m->kv_heads + g;
    int64_t at = evicted ? page_at(m, evicted, head_index, entries_before(evicted, head_index))
                         : cache_at(m, layer, g, s, row, s->entry[row]);
    if (evicted) s->position_of[at / E] = (int32_t)s->position[row];
    if (evicted && s->weight_of) s->weight_of[at / E] = 1.0f;
    if (m->cache_kind == INT8) {
        store_int8(m->k_cache, m->k_scale, at, k_G + g * E, E), store_int8(m->v_cache, m->v_scale, at, v_G + g * E, E);
        return;
    }
    for (int64_t e = 0; e < E; e += 16) {
        __mmask16 mask = tail16(E - e);
        store_from_float(m->k_cache, at + e, m->cache_kind, mask, _mm512_maskz_loadu_ps(mask, k_G + g * E + e));
        store_from_float(m->v_cache, at + e, m->cache_kind, mask, _mm512_maskz_loadu_ps(mask, v_G + g * E + e));
    }
}

/* Cache offsets of keys `from` .. `to` - 1 of a sequence whose entries are in the order of positions. */
static void block_offsets(const Model *m, int64_t layer, int64_t g, const Step *s, int64_t row, int64_t from,
                          int64_t to, int64_t *at) {
    int64_t P = m->block_size, in = from % P;
    const int64_t *block = s->table + s->slot[row] * s->table_stride + from / P;
    for (; from < to; from++) {
        *at++ = (((layer * m->kv_heads + g) * m->n_blocks + *block) * P + in) * m->head_dim;
        if (++in == P) in = 0, block++;
    }
}

/* The same for a draft row, from `from` to the row itself: after the root, its ancestors. Returns the number. */
static int64_t tree_offsets(const Model *m, int64_t layer, int64_t g, const Step *s, int64_t row, int64_t from,
                           int64_t *at) {
    int64_t root = s->root[row], n = 0;
    for (int64_t key = from; key <= s->position[row]; key++) {
        int64_t entry = key <= root ? key : s->ancestors[row * s->ancestor_stride + key - root - 1];
        at[n++] = cache_at(m, layer, g, s, row, entry);
    }
    return n;
}

/* Offsets of the first n entries of a head of a sequence with evicted entries. */
static void page_offsets(const Model *m, const EvictedPages *evicted, int64_t head_index, int64_t n, int64_t *at) {
    for (int64_t i = 0; i < n; i++) at[i] = page_at(m, evicted, head_index, i);
}

/* The entries that a row sees, first .. last - 1, its own one the last. */
static void visible_entries(const Model *m, const Layer *l, int64_t layer, int64_t g, const Step *s, int64_t row,
                            int64_t *first, int64_t *last) {
    const EvictedPages *evicted = pages_of(s, row);
    int64_t head_index = layer * m->kv_heads + g, position = s->position[row];
    *last = evicted ? entries_before(evicted, head_index) + 1 : position + 1;
    *first = 0;
    if (!l->window) return;
    if (!evicted) *first = max_i64(0, *last - l->window);
    else while (s->position_of[page_at(m, evicted, head_index, *first) / m->head_dim] <= position - l->window) ++*first;
}
