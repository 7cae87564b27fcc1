/* Attention over blocks of the cache.
 *
 * A task is one KV head of some consecutive rows of one sequence: its queries are the query heads of that KV head,
 * times the rows. Keys and values are staged 64 keys at a time, keys with the key index as lanes, values with their
 * dimensions as lanes, so that scores and outputs are sums of outer products and nothing is summed across lanes.
 * Scores of all keys are stored (float32, per-thread scratch), so the softmax does not read the keys again.
 *
 * A row attends to `position + 1` keys. Those of a draft token are not contiguous: up to the tree's root they are, and
 * `ancestors` gives the cache entries of the others. They are staged in the order of positions, in the same groups of
 * 64 as without a tree, so a token's result is bit-identical whether it was drafted or not.
 *
 * Where a KV policy goes by attention weights, the softmax also leaves each row's weights, reduced over the query heads of
 * a KV head; `reduce_marks` then reduces them over rows, one after the other, so that neither the number of threads nor
 * the company of a sequence changes a bit of them.
 */
#pragma once
#include "entries.h"

#define MAX_QUERIES 16                            /* of a task, unless one row has more */
#define KEY_BLOCK 64                               /* staged at a time */

typedef struct {                              /* per-thread scratch memory */
    float *score, *keys, *values;             /* (queries, stride), staged (units, 64), staged (units, E) */
    float *mark;                              /* (rows of a tile, G, stride), of all threads */
    uint16_t *query;                          /* in bfloat16, (queries, units * 2) */
    int64_t *at, stride;                      /* offset of each key in the cache */
} AttnScratch;

/* acc[n][w] += sum over units u of x[n][u] y[u][w]: floats, or pairs of bfloat16. */
INLINE void outer(const int N, const int W, const int HALF, const void *const *x, const float *y, int64_t ldy,
                  int64_t units, __m512 acc[4][4]) {
    (void)HALF;
    __m512 sum[4][4];                         /* a local copy: x or y might alias acc, as far as the compiler knows */
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int w = 0; w < W; w++) sum[n][w] = acc[n][w];
    for (int64_t u = 0; u < units; u++) {
        __m512 yv[4];
        UNROLL for (int w = 0; w < W; w++) yv[w] = _mm512_load_ps(y + u * ldy + 16 * w);
        UNROLL for (int n = 0; n < N; n++) {
            __m512 xv = _mm512_set1_ps(((const float *)x[n])[u]);
            UNROLL for (int w = 0; w < W; w++) {
#ifdef __AVX512BF16__
                if (HALF) sum[n][w] = _mm512_dpbf16_ps(sum[n][w], (__m512bh)yv[w], (__m512bh)xv);
                else
#endif
                sum[n][w] = _mm512_fmadd_ps(xv, yv[w], sum[n][w]);
            }
        }
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int w = 0; w < W; w++) acc[n][w] = sum[n][w];
}

static void outer_any(int N, int W, int half, const void *const *x, const float *y, int64_t ldy, int64_t units,
                      __m512 acc[4][4]) {
#define WAYS(N) \
    case 8 * N + 0: outer(N, 2, 0, x, y, ldy, units, acc); break; \
    case 8 * N + 1: outer(N, 2, 1, x, y, ldy, units, acc); break; \
    case 8 * N + 2: outer(N, 4, 0, x, y, ldy, units, acc); break; \
    case 8 * N + 3: outer(N, 4, 1, x, y, ldy, units, acc); break;
    switch (8 * N + (W == 4 ? 2 : 0) + (half ? 1 : 0)) { WAYS(1) WAYS(2) WAYS(3) WAYS(4) }
#undef WAYS
}

/* Up to 64 keys at `at`, transposed: unit u (a dimension, or two of them in bfloat16) of all keys contiguous. */
static void stage_keys(const Model *m, int half, const int64_t *at, int64_t n, float *to) {
    int64_t E = m->head_dim, lane_width = half ? 32 : 16;
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t e = 0; e < E; e += lane_width) {
            __m512 rows[16], transposed[16];
            UNROLL for (int i = 0; i < 16; i++) {
                int64_t from = at[min_i64(j + i, n - 1)];
#ifdef __AVX512BF16__
                if (half) rows[i] = _mm512_castsi512_ps(
                    _mm512_maskz_loadu_epi16(tail32(E - e), (const uint16_t *)m->k_cache + from + e));
                else
#endif
                rows[i] = load_entry(m->k_cache, m->k_scale, from, e, E, m->cache_kind, tail16(E - e));
            }
            transpose16(rows, transposed);
            UNROLL for (int i = 0; i < 16; i++)
                _mm512_store_ps(to + (e / (half ? 2 : 1) + i) * KEY_BLOCK + j, transposed[i]);
        }
}

/* Up to 64 values at `at`: key after key, or pairs of keys in bfloat16; past the last one zeros. */
static void stage_values(const Model *m, int half, const int64_t *at, int64_t n, float *to, int64_t lde) {
    int64_t E = m->head_dim;
    if (!half) {
        for (int64_t j = 0; j < n; j++)
            for (int64_t e = 0; e < lde; e += 16)
                _mm512_store_ps(to + j * lde + e, load_entry(m->v_cache, m->v_scale, at[j], e, E, m->cache_kind,
                                                             e < E ? tail16(E - e) : 0));
        return;
    }
#ifdef __AVX512BF16__
    __m512i low, high;
    uint16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = (uint16_t)(i / 2 + 32 * (i % 2));
    low = _mm512_loadu_si512(index), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < n; j += 2)
        for (int64_t e = 0; e < lde; e += 32) {
            __mmask32 mask = e < E ? tail32(E - e) : 0;
            __m512i one = _mm512_maskz_loadu_epi16(mask, (const uint16_t *)m->v_cache + at[j] + e);
            __m512i two = _mm512_maskz_loadu_epi16(j + 1 < n ? mask : 0,
                                                   (const uint16_t *)m->v_cache + at[min_i64(j + 1, n - 1)] + e);
            _mm512_store_si512(to + j / 2 * lde + e, _mm512_permutex2var_epi16(one, low, two));
            _mm512_store_si512(to + j / 2 * lde + e + 16, _mm512_permutex2var_epi16(one, high, two));
        }
#endif
}

enum { SET, ADD, LARGEST };                      /* how weights enter a row of marks */

INLINE void reduce(float *to, __m512 v, int how) {
    if (how == ADD) v = _mm512_add_ps(_mm512_loadu_ps(to), v);
    if (how == LARGEST) v = _mm512_max_ps(_mm512_loadu_ps(to), v);
    _mm512_storeu_ps(to, v);
}

/* Weights of keys first .. last - 1 in place of their scores, 0 elsewhere in 0 .. high - 1; as bfloat16 if `half`,
 * then in the first half of the row. In float32 they also go to `mark`, unless it is NULL, by vectors that hold any. */
static void softmax(float *score, int64_t high, int64_t first, int64_t last, float softcap, int half, float *mark,
                    int how) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t s = first / 16 * 16; s < last; s += 16) {
        __m512i key = _mm512_add_epi32(_mm512_set1_epi32((int)s), steps);
        __mmask16 visible = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)first)) & tail16(last - s);
        __m512 v = _mm512_load_ps(score + s);
        if (softcap > 0)
            v = _mm512_mul_ps(tanh16(_mm512_div_ps(v, _mm512_set1_ps(softcap))), _mm512_set1_ps(softcap));
        v = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible, v);
        _mm512_store_ps(score + s, v);
        top = _mm512_max_ps(v, top);
    }
    __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t s = first / 16 * 16; s < last; s += 16) {
        __m512 v = exp16(_mm512_sub_ps(_mm512_load_ps(score + s), largest));
        total = _mm512_add_ps(total, v);
        _mm512_store_ps(score + s, v);
    }
    __m512 inverse_sum = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t s = 0; s < high; s += 16) {
        __m512 v = s + 16 <= first || s >= last ? _mm512_setzero_ps()
                                                : _mm512_mul_ps(_mm512_load_ps(score + s), inverse_sum);
        if (mark && s + 16 > first && s < last) reduce(mark + s, v, how);
        if (half) _mm256_store_si256((__m256i *)((uint16_t *)score + s), narrow(v));
        else _mm512_store_ps(score + s, v);
    }
}

/* Scores of queries a .. b - 1 with the staged keys, stored at `from` .. `from + n - 1` of the row of scores. */
static void score_block(const Model *m, const AttnScratch *scratch, int half, const void *const *q_of, int64_t a,
                        int64_t b, int64_t from, float scale) {
    int64_t units = half ? round_up(m->head_dim, 2) / 2 : m->head_dim;
    for (; a < b; a += 4) {
        int N = (int)min_i64(4, b - a);
        __m512 acc[4][4];
        UNROLL for (int i = 0; i < 16; i++) acc[i / 4][i % 4] = _mm512_setzero_ps();
        outer_any(N, 4, half, q_of + a, scratch->keys, KEY_BLOCK, units, acc);
        for (int i = 0; i < N; i++)
            UNROLL for (int w = 0; w < 4; w++)
                _mm512_store_ps(scratch->score + (a + i) * scratch->stride + from + 16 * w,
                                _mm512_mul_ps(acc[i][w], _mm512_set1_ps(scale)));
    }
}

/* Accumulate n staged values into out of queries a .. b - 1; their weights begin at `from`. */
static void value_block(const Model *m, const AttnScratch *scratch, int half, float *const *out_of, int64_t a,
                        int64_t b, int64_t from, int64_t n, int64_t lde, int fresh) {
    int64_t E = m->head_dim, units = half ? (n + 1) / 2 : n;
    const int W = lde == 32 ? 2 : 4;
    for (; a < b; a += 4) {
        int N = (int)min_i64(4, b - a);
        const void *weights[4];
        for (int i = 0; i < N; i++) {
            const float *row = scratch->score + (a + i) * scratch->stride;
            weights[i] = half ? (const void *)((const uint16_t *)row + from) : (const void *)(row + from);
        }
        for (int64_t e = 0; e < lde; e += 16 * W) {
            __m512 acc[4][4];
            for (int i = 0; i < N; i++)
                for (int w = 0; w < W; w++) {
                    __mmask16 mask = e + 16 * w < E && !fresh ? tail16(E - e - 16 * w) : 0;
                    acc[i][w] = _mm512_maskz_loadu_ps(mask, out_of[a + i] + e + 16 * w);
                }
            outer_any(N, W, half, weights, scratch->values + e, lde, units, acc);
            for (int i = 0; i < N; i++)
                for (int w = 0; w < W && e + 16 * w < E; w++)
                    _mm512_mask_storeu_ps(out_of[a + i] + e + 16 * w, tail16(E - e - 16 * w), acc[i][w]);
        }
    }
}

/* Add log(n) to the scores, which begin at `from`, of an entry that represents n merged tokens. */
static void add_log_weights(const Model *m, const Step *s, const AttnScratch *scratch, int64_t Q, int64_t from,
                            int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float weight = s->weight_of[scratch->at[from + i] / m->head_dim];
        if (weight != 1.0f)
            for (int64_t a = 0; a < Q; a++) scratch->score[a * scratch->stride + from + i] += logf(weight);
    }
}

/* out of rows row .. row + n - 1 (one sequence, consecutive entries), KV head g. q and out have row stride ld. */
static void attend(const Model *m, const Layer *l, int64_t layer, const Step *s, int64_t row, int64_t n, int64_t g,
                   const float *q, int64_t ldq, float *out, int64_t ldo, const AttnScratch *scratch) {
    int64_t E = m->head_dim, R = m->heads / m->kv_heads, Q = n * R, lde = E > 32 ? round_up(E, 64) : 32;
    int64_t padded = round_up(E, 32), lowest = s->position[row], high = 0;
    for (int64_t i = 0; i < n; i++) {
        lowest = min_i64(lowest, s->position[row + i]), high = max_i64(high, s->position[row + i] + 1);
    }
    /* Blocks of 64 begin at multiples of 64 for every row, so that sums are batch-invariant. */
    int64_t low = l->window ? max_i64(0, lowest + 1 - l->window) / KEY_BLOCK * KEY_BLOCK : 0;
    const int drafted = s->root && s->root[row] >= 0;
    if (drafted) high = (s->root[row] + 1) / 16 * 16;
    int half = 0;
#ifdef __AVX512BF16__
    half = m->half && m->cache_kind == BFLOAT16;
#endif
    const void *q_of[Q];
    float *out_of[Q];
    for (int64_t a = 0; a < Q; a++) {
        const float *from = q + (a / R) * ldq + (g * R + a % R) * E;
        q_of[a] = from, out_of[a] = out + (a / R) * ldo + (g * R + a % R) * E;
        if (!half) continue;
        q_of[a] = scratch->query + a * padded;
        for (int64_t e = 0; e < padded; e += 16)
            store_from_float(scratch->query, a * padded + e, BFLOAT16, 0xffff,
                             _mm512_maskz_loadu_ps(e < E ? tail16(E - e) : 0, from + e));
    }
    const EvictedPages *evicted = pages_of(s, row);
    if (evicted) {
        low = 0, high = entries_before(evicted, layer * m->kv_heads + g) + n;
        page_offsets(m, evicted, layer * m->kv_heads + g, high, scratch->at);
    } else block_offsets(m, layer, g, s, row, low, high, scratch->at);
    for (int64_t i = 0; i < high - low; i += KEY_BLOCK) {
        int64_t n_keys = min_i64(KEY_BLOCK, high - low - i);
        stage_keys(m, half, scratch->at + i, n_keys, scratch->keys);
        score_block(m, scratch, half, q_of, 0, Q, i, l->scale);
        if (evicted && s->weight_of) add_log_weights(m, s, scratch, Q, i, n_keys);
    }
    int64_t *tail = scratch->at + high - low;
    for (int64_t r = 0; r < n; r++) {
        int64_t first, last;
        visible_entries(m, l, layer, g, s, row + r, &first, &last);
        first -= low, last -= low;
        float *mark = s->marks && s->marks[row + r].weight
                          ? scratch->mark + ((row + r) * m->kv_heads + g) * scratch->stride + low : NULL;
        int64_t n_keys = drafted ? tree_offsets(m, layer, g, s, row + r, high, tail) : 0;
        for (int64_t i = 0; i < n_keys; i += KEY_BLOCK) {
            stage_keys(m, half, tail + i, min_i64(KEY_BLOCK, n_keys - i), scratch->keys);
            score_block(m, scratch, half, q_of, r * R, (r + 1) * R, high - low + i, l->scale);
        }
        for (int64_t a = r * R; a < (r + 1) * R; a++)
            softmax(scratch->score + a * scratch->stride, drafted ? last : high - low, first, last, m->softcap, half, mark,
                    a == r * R ? SET : s->mark_largest ? LARGEST : ADD);
    }
    for (int64_t i = 0; i < high - low; i += KEY_BLOCK) {
        int64_t n_keys = min_i64(KEY_BLOCK, high - low - i);
        stage_values(m, half, scratch->at + i, n_keys, scratch->values, lde);
        value_block(m, scratch, half, out_of, 0, Q, i, n_keys, lde, i == 0);
    }
    for (int64_t r = 0; r < n && drafted; r++) {
        int64_t n_keys = tree_offsets(m, layer, g, s, row + r, high, tail);
        for (int64_t i = 0; i < n_keys; i += KEY_BLOCK) {
            stage_values(m, half, tail + i, min_i64(KEY_BLOCK, n_keys - i), scratch->values, lde);
            value_block(m, scratch, half, out_of, r * R, (r + 1) * R, high - low + i, min_i64(KEY_BLOCK, n_keys - i),
                        lde, high == low && i == 0);
        }
    }
}

/* Weights that the rows of a tile have left in `mark`, row by row, into the accumulators of their sequences; this thread's
 * part of the entries. */
static void reduce_marks(const Model *m, const Layer *l, int64_t layer, const Step *s, int64_t rows,
                         const AttnScratch *scratch, int id, int threads) {
    for (int64_t row = 0; row < rows; row++) {
        const Marks *marks = s->marks + row;
        if (!marks->weight) continue;
        int64_t vectors = marks->stride / 16, low = vectors * id / threads * 16, high = vectors * (id + 1) / threads * 16;
        for (int64_t g = 0; g < m->kv_heads; g++) {
            int64_t first, last;
            visible_entries(m, l, layer, g, s, row, &first, &last);
            float *to = marks->weight + (layer * m->kv_heads + g) * marks->stride;
            const float *from = scratch->mark + (row * m->kv_heads + g) * scratch->stride;
            for (int64_t e = max_i64(low, first / 16 * 16); e < min_i64(high, last); e += 16)
                reduce(to + e, _mm512_loadu_ps(from + e), s->mark_largest ? LARGEST : ADD);
        }
    }
}
