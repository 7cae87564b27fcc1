/* One engine step through all layers of a decoder, in one call: one parallel region from the first layer to the logits,
 * with barriers inside. Rows are computed in tiles of ROW_TILE, so working memory does not grow with the number of
 * rows; a tile's rows read each other's keys from the cache.
 */
#include "common.h"
#include "products.h"
#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define ROW_TILE 128
#define OUT_CHUNK 32                              /* outputs of a product before the next operation, at ROW_TILE rows */
#define MIN_SHARED_ROWS 16 /* from here on, threads divide the conversion of rows among them */

typedef struct {
    Activations act;
    DecodeScratch decode;
    float *norm, *out_a, *out_b;
    AttnScratch attn;
} Thread;

typedef struct {
    Model m;
    int64_t queries;                          /* maximum of a task */
    float *qkv, *mixed, *hidden, *branch, *cos_sin, *mark;
    int64_t mark_size;                        /* floats of `mark`, which is made when a step first needs it */
    Thread *thread;
    Activations act;                                  /* of all threads, where they divide the rows */
    Barrier barrier;
} State;

/* Sets `failed` to 1 when memory is short. */
static void *alloc_aligned(int64_t bytes, int *failed) {
    void *memory = aligned_alloc(ALIGN, round_up(bytes + 256, 4096));
    if (!memory) *failed = 1;
    return memory;
}

static int64_t widest_input(const Model *m) {
    return max_i64(max_i64(m->width, m->mlp_width), m->heads * m->head_dim);
}

static int64_t most_groups(const Model *m) {
    int64_t n = m->head.groups;
    for (int64_t i = 0; i < m->layers; i++) {
        const Matrix *all = &m->layer[i].q;
        for (int j = 0; j < 7; j++) n = max_i64(n, all[j].groups);
    }
    return padded_groups(n);
}

static void alloc_activations(Activations *a, int64_t max_in, int64_t G, int *failed) {
    int64_t steps = padded_groups(max_in / ACT_GROUP);
    a->data = alloc_aligned(4 * ROW_TILE * (round_up(max_in, 128) + 64), failed);
    a->step = alloc_aligned(4 * ROW_TILE * steps, failed);
    a->total = alloc_aligned(4 * ROW_TILE * max_i64(G, steps), failed);
}

static void free_activations(Activations *a) { free(a->data), free(a->step), free(a->total); }

void modicum_close(State *s) {
    for (int64_t t = 0; s->thread && t < s->m.threads; t++) {
        Thread *thread = &s->thread[t];
        free_activations(&thread->act), free(thread->decode.scale), free(thread->decode.zero);
        free(thread->decode.weight), free(thread->decode.carry);
        free(thread->norm), free(thread->out_a), free(thread->out_b);
        free(thread->attn.score), free(thread->attn.keys), free(thread->attn.values), free(thread->attn.query);
        free(thread->attn.at);
    }
    free_activations(&s->act), free(s->thread), free(s->qkv), free(s->mixed), free(s->hidden);
    free(s->branch), free(s->cos_sin), free(s->mark), free(s);
}

/* Returns NULL, with nothing allocated, when memory is short. The arrays of `model` must outlive the state. */
State *modicum_open(const Model *model) {
    int failed = 0;
    State *s = alloc_aligned(sizeof(State), &failed);
    if (!s) return NULL;
    memset(s, 0, sizeof(State));
    s->m = *model;
    Model *m = &s->m;
    int64_t R = m->heads / m->kv_heads, E = m->head_dim;
    s->queries = max_i64(1, MAX_QUERIES / R) * R;
    int64_t heads = (m->heads + 2 * m->kv_heads) * m->head_dim, max_in = widest_input(m), G = most_groups(m);
    s->qkv = alloc_aligned(4 * ROW_TILE * heads, &failed);
    s->mixed = alloc_aligned(4 * ROW_TILE * m->heads * m->head_dim, &failed);
    s->hidden = alloc_aligned(4 * ROW_TILE * m->mlp_width, &failed);
    s->branch = alloc_aligned(4 * ROW_TILE * m->width, &failed);
    s->cos_sin = alloc_aligned(4 * ROW_TILE * m->rotated * m->ropes, &failed);
    alloc_activations(&s->act, max_in, G, &failed);
    if (!(s->thread = calloc(m->threads, sizeof(Thread)))) failed = 1;
    for (int64_t t = 0; !failed && t < m->threads; t++) {
        Thread *thread = &s->thread[t];
        alloc_activations(&thread->act, max_in, G, &failed);
        thread->decode.scale = alloc_aligned(4 * TILE_OUTPUTS * G, &failed);
        thread->decode.zero = alloc_aligned(4 * TILE_OUTPUTS * G, &failed);
        if (!failed) {                        /* see `read_scales_of_rows` */
            memset(thread->decode.scale, 0, 4 * TILE_OUTPUTS * G);
            memset(thread->decode.zero, 0, 4 * TILE_OUTPUTS * G);
        }
        thread->decode.weight = alloc_aligned(4 * LANES * round_up(max_in, 128), &failed);
        thread->decode.carry = alloc_aligned(ROW_TILE / 4 * BLOCK_QUADS * LANES * sizeof(__m512), &failed);
        thread->attn.keys = alloc_aligned(4 * KEY_BLOCK * round_up(E, 32), &failed);
        thread->attn.values = alloc_aligned(4 * KEY_BLOCK * round_up(E, 64), &failed);
        thread->attn.query = alloc_aligned(2 * s->queries * round_up(E, 32), &failed);
        thread->norm = alloc_aligned(4 * ROW_TILE * m->width, &failed);
        thread->out_a = alloc_aligned(4 * ROW_TILE * OUT_CHUNK, &failed);
        thread->out_b = alloc_aligned(4 * ROW_TILE * OUT_CHUNK, &failed);
    }
    if (!failed) return s;
    modicum_close(s);
    return NULL;
}

INLINE __m512 activate(__m512 x, int64_t kind) {    /* silu, gelu, gelu_tanh, relu */
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
    if (kind == 0) return _mm512_div_ps(x, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    if (kind == 3) return _mm512_max_ps(_mm512_setzero_ps(), x);
    if (kind == 2) {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
        __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.7978845608f), sum);
        return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, tanh16(inner)));
    }
    float lanes[16];
    _mm512_storeu_ps(lanes, x);
    for (int i = 0; i < 16; i++) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
    return _mm512_loadu_ps(lanes);
}

/* Outputs at a time for fewer rows: as many as fit the buffer, since an interrupted stream of prefetches restarts. */
INLINE int64_t chunk_for(int64_t rows) { return ROW_TILE * OUT_CHUNK / rows / LANES * LANES; }

/* The input of a product: rows of x, normed if `norm` is given, in the format of the matrix. The conversion for the
 * previous matrix (`before`) is reused if its format is the same. */
static const Activations *prepare_activations(State *s, Thread *thread, const Matrix *m, const Matrix *before,
                                              const float *x, int64_t ldx, const float *norm, int64_t rows, int id,
                                              int threads) {
    const int shared = threads > 1 && rows >= MIN_SHARED_ROWS;
    Activations *act = shared ? &s->act : &thread->act;
    Format format = format_for(m, rows, s->m.half, s->m.int8_activations, s->m.tile_rows);
    if (before && before->in == m->in && before->group == m->group && act->format == format) return act;
    if (before && shared) barrier_wait(&s->barrier, threads);    /* another thread may still be multiplying */
    int64_t from = shared ? rows * id / threads : 0, to = shared ? rows * (id + 1) / threads : rows;
    if (shared && is_tiled(format)) thread_range(rows, id, threads, &from, &to);    /* whole tiles */
    if (norm) {
        int64_t D = s->m.width;
        for (int64_t n = from; n < to; n++)
            scale_by(thread->norm + n * D, x + n * ldx, norm, rms_scale(x + n * ldx, D, s->m.eps), D);
        x = thread->norm, ldx = D;
    }
    convert_rows(act, format, m, x, ldx, rows, from, to);
    if (shared) barrier_wait(&s->barrier, threads);
    return act;
}

/* x += norm(branch) for this thread's rows; without a norm `output_projection` has added the branch already. */
static void add_branch(State *s, float *x, const float *weight, int64_t rows, int id, int threads) {
    int64_t D = s->m.width;
    if (!weight) return;
    for (int64_t n = id; n < rows; n += threads) {
        float *b = s->branch + n * D;
        scale_by(b, b, weight, rms_scale(b, D, s->m.eps), D);
        for (int64_t d = 0; d < D; d++) x[n * D + d] += b[d];
    }
    barrier_wait(&s->barrier, threads);
}

/* Outputs of a branch's last matrix: added to x, or stored separately for a norm. */
static void output_projection(State *s, Thread *thread, const Matrix *m, const float *from, int64_t ldx, float *x,
                              int separate, int64_t rows, int id, int threads) {
    int64_t D = s->m.width, chunk = chunk_for(rows), first, last;
    thread_range(m->out, id, threads, &first, &last);
    const Activations *act = prepare_activations(s, thread, m, NULL, from, ldx, NULL, rows, id, threads);
    for (int64_t o = first; o < last; o += chunk) {
        int64_t n_out = min_i64(chunk, last - o);
        product(m, act, o, o + n_out, thread->out_a, chunk, &thread->decode);
        for (int64_t n = 0; n < rows; n++)
            for (int64_t i = 0; i < n_out; i++) {
                if (separate) s->branch[n * D + o + i] = thread->out_a[n * chunk + i];
                else x[n * D + o + i] += thread->out_a[n * chunk + i];
            }
    }
}

/* Angles of all rotations for the rows of a tile: cosines, then sines. */
static void rope_angles(State *s, const Step *step, int64_t rows, int id, int threads) {
    for (int64_t job = id; job < s->m.ropes * rows; job += threads) {
        const Rope *rope = &s->m.rope[job / rows];
        int64_t half = rope->rotated / 2;
        float *cos_sin = s->cos_sin + (job / rows * ROW_TILE + job % rows) * s->m.rotated;
        for (int64_t r = 0; r < half; r++) {
            float angle = (float)step->position[job % rows] * rope->angles[r];
            cos_sin[r] = cosf(angle) * rope->scale, cos_sin[half + r] = sinf(angle) * rope->scale;
        }
    }
}

static void attention(State *s, Thread *thread, const Step *step, float *x, int64_t i, int64_t rows, int id,
                      int threads) {
    const Model *m = &s->m;
    const Layer *l = &m->layer[i];
    int64_t D = m->width, E = m->head_dim, HE = m->heads * E, GE = m->kv_heads * E, QKV = HE + 2 * GE;
    const Matrix *projections[3] = {&l->q, &l->k, &l->v};
    for (int64_t p = 0, at = 0; p < 3; at += projections[p]->out, p++) {
        int64_t first, last;
        thread_range(projections[p]->out, id, threads, &first, &last);
        const Activations *act = prepare_activations(s, thread, projections[p], p ? projections[p - 1] : NULL, x, D,
                                                     l->attention_norm, rows, id, threads);
        product(projections[p], act, first, last, s->qkv + at + first, QKV, &thread->decode);
    }
    prefetch_weights(&l->o, id, threads);
    barrier_wait(&s->barrier, threads);
    for (int64_t n = id; n < rows; n += threads) {
        float *q = s->qkv + n * QKV, q_scale = 0, k_scale = 0;
        if (l->q_norm && m->qk_norm_full)
            q_scale = rms_scale(q, HE, m->eps), k_scale = rms_scale(q + HE, GE, m->eps);
        const float *cos_sin = l->rope < 0 ? NULL : s->cos_sin + (l->rope * ROW_TILE + n) * m->rotated;
        for (int64_t g = 0; g < m->kv_heads; g++)
            write_kv(m, l, i, step, n, g, q, q + HE, q + HE + GE, q_scale, k_scale, cos_sin);
        if (step->observed_row && step->observed_row[n] >= 0)
            memcpy(step->observed + (i * step->n_observed + step->observed_row[n]) * QKV, q, 4 * QKV);
    }
    barrier_wait(&s->barrier, threads);
    for (int64_t n = 0, job = 0; n < rows;) {
        int64_t n_rows = 1;
        while (n_rows < s->queries / (m->heads / m->kv_heads) && n + n_rows < rows
               && step->slot[n + n_rows] == step->slot[n] && step->entry[n + n_rows] == step->entry[n] + n_rows)
            n_rows++;
        for (int64_t g = 0; g < m->kv_heads; g++, job++)
            if (job % threads == id)
                attend(m, l, i, step, n, n_rows, g, s->qkv + n * QKV, QKV, s->mixed + n * HE, HE, &thread->attn);
        n += n_rows;
    }
    barrier_wait(&s->barrier, threads);
    if (step->marks) reduce_marks(m, l, i, step, rows, &thread->attn, id, threads);
    output_projection(s, thread, &l->o, s->mixed, HE, x, l->attention_out_norm != NULL, rows, id, threads);
    prefetch_weights(l->gate.weight ? &l->gate : &l->up, id, threads);
    barrier_wait(&s->barrier, threads);
    add_branch(s, x, l->attention_out_norm, rows, id, threads);
}

static void mlp(State *s, Thread *thread, float *x, int64_t i, int64_t rows, int id, int threads) {
    const Model *m = &s->m;
    const Layer *l = &m->layer[i];
    int64_t F = m->mlp_width, chunk = chunk_for(rows), from, to;
    const int gated = l->gate.weight != NULL;    /* Python ensures that gate and up have the same storage */
    const Matrix *first = gated ? &l->gate : &l->up;
    const Activations *act = prepare_activations(s, thread, first, NULL, x, m->width, l->mlp_norm, rows, id, threads);
    thread_range(F, id, threads, &from, &to);
    for (int64_t o = from; o < to; o += chunk) {
        int64_t n_out = min_i64(chunk, to - o);
        product(first, act, o, o + n_out, thread->out_a, chunk, &thread->decode);
        if (gated) product(&l->up, act, o, o + n_out, thread->out_b, chunk, &thread->decode);
        for (int64_t n = 0; n < rows; n++)
            for (int64_t k = 0; k < n_out; k += 16) {
                __mmask16 mask = tail16(n_out - k);
                __m512 v = activate(_mm512_maskz_loadu_ps(mask, thread->out_a + n * chunk + k), m->activation);
                if (gated) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, thread->out_b + n * chunk + k));
                _mm512_mask_storeu_ps(s->hidden + n * F + o + k, mask, v);
            }
    }
    prefetch_weights(&l->down, id, threads);
    barrier_wait(&s->barrier, threads);
    output_projection(s, thread, &l->down, s->hidden, F, x, l->mlp_out_norm != NULL, rows, id, threads);
    prefetch_weights(i + 1 < m->layers ? &m->layer[i + 1].q : &m->head, id, threads);
    barrier_wait(&s->barrier, threads);
    add_branch(s, x, l->mlp_out_norm, rows, id, threads);
}

static void tile(State *s, const Step *full, int64_t from, int64_t rows, int id, int threads) {
    const Model *m = &s->m;
    Thread *thread = &s->thread[id];
    float *x = full->x + from * m->width;
    Step step = *full;
    step.position += from, step.entry += from, step.slot += from;
    if (step.evicted) step.evicted += from;
    if (step.marks) step.marks += from;
    if (step.observed_row) step.observed_row += from;
    if (step.root) step.root += from, step.ancestors += from * step.ancestor_stride;
    barrier_wait(&s->barrier, threads);
    rope_angles(s, &step, rows, id, threads);
    for (int64_t i = 0; i < m->layers; i++) {
        attention(s, thread, &step, x, i, rows, id, threads);
        mlp(s, thread, x, i, rows, id, threads);
    }
    int64_t first = 0, last, low, high, D = m->width, V = m->head.out;
    while (first < full->n_logits && full->logit_row[first] < from) first++;
    for (last = first; last < full->n_logits && full->logit_row[last] < from + rows; last++) {
        const float *row = full->x + full->logit_row[last] * D;
        float *to = thread->norm + (last - first) * D;
        if (m->final_norm) scale_by(to, row, m->final_norm, rms_scale(row, D, m->eps), D);
        else memcpy(to, row, 4 * D);
    }
    if (last == first) return;
    thread_range(V, id, threads, &low, &high);
    const Activations *act = prepare_activations(s, thread, &m->head, NULL, thread->norm, D, NULL, last - first, id,
                                                 threads);
    product(&m->head, act, low, high, full->logits + first * V + low, V, &thread->decode);
}

/* Returns 0, or 1 when memory for the scores is short (nothing is computed then). */
int modicum_step(State *s, const Step *step) {
    int64_t longest = 0;
    for (int64_t n = 0; n < step->rows; n++) longest = max_i64(longest, step->position[n] + 1);
    for (int64_t t = 0; t < s->m.threads; t++) {
        AttnScratch *attn = &s->thread[t].attn;
        if (longest + KEY_BLOCK <= attn->stride) continue;
        int64_t stride = max_i64(round_up(longest + 2 * KEY_BLOCK, KEY_BLOCK), 2 * attn->stride);
        free(attn->score), free(attn->at);
        int failed = 0;
        attn->score = alloc_aligned(4 * s->queries * stride, &failed), attn->at = alloc_aligned(8 * stride, &failed);
        attn->stride = failed ? 0 : stride;
        if (failed) return 1;
    }
    if (step->marks) {
        int64_t size = min_i64(step->rows, ROW_TILE) * s->m.kv_heads * s->thread[0].attn.stride;
        if (size > s->mark_size) {
            int failed = 0;
            free(s->mark), s->mark = alloc_aligned(4 * size, &failed), s->mark_size = failed ? 0 : size;
            if (failed) return 1;
        }
        for (int64_t t = 0; t < s->m.threads; t++) s->thread[t].attn.mark = s->mark;
    }
    s->barrier.waiting = 0;
#pragma omp parallel num_threads((int)s->m.threads)
    {
        int id = 0, threads = 1;
#ifdef _OPENMP
        id = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        for (int64_t from = 0; from < step->rows; from += ROW_TILE)
            tile(s, step, from, min_i64(ROW_TILE, step->rows - from), id, threads);
    }
    return 0;
}

int64_t modicum_tiles(void) {                 /* 0: none, 1: AMX, 2: written out, for tests */
#ifdef AMX
    return AMX;
#else
    return 0;
#endif
}

int64_t modicum_layout(int64_t which) {    /* sizes, against which Python checks its ctypes structures */
    const int64_t sizes[] = {sizeof(Matrix), sizeof(Rope), sizeof(Layer), sizeof(Model), sizeof(Step),
                             sizeof(EvictedPages), sizeof(Marks)};
    return which < 7 ? sizes[which] : 0;
}
