/* One engine step through all layers of a decoder, in one call: threads stay together from the first layer
 * to the logits and meet at barriers. Rows are computed in tiles of TILE, so working memory does not grow with
 * the number of rows; a tile's rows see each other's keys through the cache.
 */
#include "common.h"
#include "products.h"
#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define TILE 128
#define CHUNK 32                              /* outputs of a product before what follows it, at TILE rows */
#define TOGETHER 16                           /* from so many rows on, threads share the work of preparing them */

typedef struct {
    Act act;
    Decoded decoded;
    float *norm, *one, *two;
    Seen seen;
} Thread;

typedef struct {
    Model m;
    int64_t queries;                          /* most of a task */
    float *qkv, *mixed, *hidden, *branch, *turn;
    Thread *thread;
    Act act;                                  /* of all threads, where they share the rows */
    Barrier barrier;
} State;

/* `lacking` becomes 1 where there is none. */
static void *room(int64_t bytes, int *lacking) {
    void *found = aligned_alloc(ALIGN, round_up(bytes + 256, 4096));
    if (!found) *lacking = 1;
    return found;
}

static int64_t widest(const Model *m) {
    return most(most(m->width, m->mlp_width), m->heads * m->head_dim);
}

static int64_t most_groups(const Model *m) {
    int64_t n = m->head.groups;
    for (int64_t i = 0; i < m->layers; i++) {
        const Matrix *all = &m->layer[i].q;
        for (int j = 0; j < 7; j++) n = most(n, all[j].groups);
    }
    return padded_groups(n);
}

static void open_act(Act *a, int64_t wide, int64_t G, int *lacking) {
    int64_t steps = padded_groups(wide / EIGHTS);
    a->data = room(4 * TILE * (round_up(wide, 128) + 64), lacking);
    a->step = room(4 * TILE * steps, lacking), a->total = room(4 * TILE * most(G, steps), lacking);
}

static void close_act(Act *a) { free(a->data), free(a->step), free(a->total); }

void modicum_close(State *s) {
    for (int64_t t = 0; s->thread && t < s->m.threads; t++) {
        Thread *own = &s->thread[t];
        close_act(&own->act), free(own->decoded.scale), free(own->decoded.zero), free(own->decoded.weight);
        free(own->decoded.carry);
        free(own->norm), free(own->one), free(own->two);
        free(own->seen.score), free(own->seen.keys), free(own->seen.values), free(own->seen.query);
        free(own->seen.at);
    }
    close_act(&s->act), free(s->thread), free(s->qkv), free(s->mixed), free(s->hidden), free(s->branch), free(s->turn);
    free(s);
}

/* Returns NULL when memory is short, and has then taken none. The arrays that `model` points to must outlive the state. */
State *modicum_open(const Model *model) {
    int lacking = 0;
    State *s = room(sizeof(State), &lacking);
    if (!s) return NULL;
    memset(s, 0, sizeof(State));
    s->m = *model;
    Model *m = &s->m;
    int64_t R = m->heads / m->kv_heads, E = m->head_dim;
    s->queries = most(1, QUERIES / R) * R;
    int64_t heads = (m->heads + 2 * m->kv_heads) * m->head_dim, wide = widest(m), G = most_groups(m);
    s->qkv = room(4 * TILE * heads, &lacking), s->mixed = room(4 * TILE * m->heads * m->head_dim, &lacking);
    s->hidden = room(4 * TILE * m->mlp_width, &lacking), s->branch = room(4 * TILE * m->width, &lacking);
    s->turn = room(4 * TILE * m->rotated * m->ropes, &lacking);
    open_act(&s->act, wide, G, &lacking);
    if (!(s->thread = calloc(m->threads, sizeof(Thread)))) lacking = 1;
    for (int64_t t = 0; !lacking && t < m->threads; t++) {
        Thread *own = &s->thread[t];
        open_act(&own->act, wide, G, &lacking);
        own->decoded.scale = room(4 * WIDE * G, &lacking), own->decoded.zero = room(4 * WIDE * G, &lacking);
        own->decoded.weight = room(4 * LINE * round_up(wide, 128), &lacking);
        own->decoded.carry = room(TILE / 4 * QUADS * LINE * sizeof(__m512), &lacking);
        own->seen.keys = room(4 * KEYS * round_up(E, 32), &lacking);
        own->seen.values = room(4 * KEYS * round_up(E, 64), &lacking);
        own->seen.query = room(2 * s->queries * round_up(E, 32), &lacking);
        own->norm = room(4 * TILE * m->width, &lacking);
        own->one = room(4 * TILE * CHUNK, &lacking), own->two = room(4 * TILE * CHUNK, &lacking);
    }
    if (!lacking) return s;
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

/* Outputs at a time for fewer rows: as many as the room holds, since a stream that is left has to start anew. */
INLINE int64_t chunk_for(int64_t rows) { return TILE * CHUNK / rows / LINE * LINE; }

/* What a product of a phase multiplies with: rows of x, normed if `norm` is given, in the shape of the matrix. What was
 * made for the matrix before serves again if that wants the same. */
static const Act *ready(State *s, Thread *own, const Matrix *m, const Matrix *before, const float *x, int64_t ldx,
                        const float *norm, int64_t rows, int id, int threads) {
    const int together = threads > 1 && rows >= TOGETHER;
    Act *act = together ? &s->act : &own->act;
    Shape shape = shape_for(m, rows, s->m.half, s->m.eight);
    if (before && before->in == m->in && before->group == m->group && act->shape == shape) return act;
    if (before && together) meet(&s->barrier, threads);    /* somebody may still be multiplying */
    int64_t from = together ? rows * id / threads : 0, to = together ? rows * (id + 1) / threads : rows;
    if (norm) {
        int64_t D = s->m.width;
        for (int64_t n = from; n < to; n++)
            scale_by(own->norm + n * D, x + n * ldx, norm, rms_scale(x + n * ldx, D, s->m.eps), D);
        x = own->norm, ldx = D;
    }
    prepare(act, shape, m, x, ldx, rows, from, to);
    if (together) meet(&s->barrier, threads);
    return act;
}

/* x += norm(branch) for this thread's rows; without a norm `fold` has added the branch already. */
static void add_branch(State *s, float *x, const float *weight, int64_t rows, int id, int threads) {
    int64_t D = s->m.width;
    if (!weight) return;
    for (int64_t n = id; n < rows; n += threads) {
        float *b = s->branch + n * D;
        scale_by(b, b, weight, rms_scale(b, D, s->m.eps), D);
        for (int64_t d = 0; d < D; d++) x[n * D + d] += b[d];
    }
    meet(&s->barrier, threads);
}

/* Outputs of a branch's last matrix: added to x, or kept apart for a norm. */
static void fold(State *s, Thread *own, const Matrix *m, const float *from, int64_t ldx, float *x, int apart,
                 int64_t rows, int id, int threads) {
    int64_t D = s->m.width, chunk = chunk_for(rows), first, last;
    share(m->out, id, threads, &first, &last);
    const Act *act = ready(s, own, m, NULL, from, ldx, NULL, rows, id, threads);
    for (int64_t o = first; o < last; o += chunk) {
        int64_t n_out = least(chunk, last - o);
        product(m, act, o, o + n_out, own->one, chunk, &own->decoded);
        for (int64_t n = 0; n < rows; n++)
            for (int64_t i = 0; i < n_out; i++) {
                if (apart) s->branch[n * D + o + i] = own->one[n * chunk + i];
                else x[n * D + o + i] += own->one[n * chunk + i];
            }
    }
}

/* Angles of all rotations for the rows of a tile: cosines, then sines. */
static void turns(State *s, const Step *step, int64_t rows, int id, int threads) {
    for (int64_t job = id; job < s->m.ropes * rows; job += threads) {
        const Rope *rope = &s->m.rope[job / rows];
        int64_t half = rope->rotated / 2;
        float *turn = s->turn + (job / rows * TILE + job % rows) * s->m.rotated;
        for (int64_t r = 0; r < half; r++) {
            float angle = (float)step->position[job % rows] * rope->angles[r];
            turn[r] = cosf(angle) * rope->scale, turn[half + r] = sinf(angle) * rope->scale;
        }
    }
}

static void attention(State *s, Thread *own, const Step *step, float *x, int64_t i, int64_t rows, int id, int threads) {
    const Model *m = &s->m;
    const Layer *l = &m->layer[i];
    int64_t D = m->width, E = m->head_dim, HE = m->heads * E, GE = m->kv_heads * E, QKV = HE + 2 * GE;
    const Matrix *parts[3] = {&l->q, &l->k, &l->v};
    for (int64_t p = 0, at = 0; p < 3; at += parts[p]->out, p++) {
        int64_t first, last;
        share(parts[p]->out, id, threads, &first, &last);
        const Act *act = ready(s, own, parts[p], p ? parts[p - 1] : NULL, x, D, l->attention_norm, rows, id, threads);
        product(parts[p], act, first, last, s->qkv + at + first, QKV, &own->decoded);
    }
    announce(&l->o, id, threads);
    meet(&s->barrier, threads);
    for (int64_t n = id; n < rows; n += threads) {
        float *q = s->qkv + n * QKV, q_scale = 0, k_scale = 0;
        if (l->q_norm && m->qk_norm_full)
            q_scale = rms_scale(q, HE, m->eps), k_scale = rms_scale(q + HE, GE, m->eps);
        const float *turn = l->rope < 0 ? NULL : s->turn + (l->rope * TILE + n) * m->rotated;
        for (int64_t g = 0; g < m->kv_heads; g++)
            place(m, l, i, step, n, g, q, q + HE, q + HE + GE, q_scale, k_scale, turn);
    }
    meet(&s->barrier, threads);
    for (int64_t n = 0, job = 0; n < rows;) {
        int64_t many = 1;
        while (many < s->queries / (m->heads / m->kv_heads) && n + many < rows
               && step->slot[n + many] == step->slot[n] && step->place[n + many] == step->place[n] + many) many++;
        for (int64_t g = 0; g < m->kv_heads; g++, job++)
            if (job % threads == id)
                attend(m, l, i, step, n, many, g, s->qkv + n * QKV, QKV, s->mixed + n * HE, HE, &own->seen);
        n += many;
    }
    meet(&s->barrier, threads);
    fold(s, own, &l->o, s->mixed, HE, x, l->attention_out_norm != NULL, rows, id, threads);
    announce(l->gate.weight ? &l->gate : &l->up, id, threads);
    meet(&s->barrier, threads);
    add_branch(s, x, l->attention_out_norm, rows, id, threads);
}

static void mlp(State *s, Thread *own, float *x, int64_t i, int64_t rows, int id, int threads) {
    const Model *m = &s->m;
    const Layer *l = &m->layer[i];
    int64_t F = m->mlp_width, chunk = chunk_for(rows), from, to;
    const int gated = l->gate.weight != NULL;    /* Python sees to gate and up being held alike */
    const Matrix *first = gated ? &l->gate : &l->up;
    const Act *act = ready(s, own, first, NULL, x, m->width, l->mlp_norm, rows, id, threads);
    share(F, id, threads, &from, &to);
    for (int64_t o = from; o < to; o += chunk) {
        int64_t n_out = least(chunk, to - o);
        product(first, act, o, o + n_out, own->one, chunk, &own->decoded);
        if (gated) product(&l->up, act, o, o + n_out, own->two, chunk, &own->decoded);
        for (int64_t n = 0; n < rows; n++)
            for (int64_t k = 0; k < n_out; k += 16) {
                __mmask16 mask = tail16(n_out - k);
                __m512 v = activate(_mm512_maskz_loadu_ps(mask, own->one + n * chunk + k), m->activation);
                if (gated) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, own->two + n * chunk + k));
                _mm512_mask_storeu_ps(s->hidden + n * F + o + k, mask, v);
            }
    }
    announce(&l->down, id, threads);
    meet(&s->barrier, threads);
    fold(s, own, &l->down, s->hidden, F, x, l->mlp_out_norm != NULL, rows, id, threads);
    announce(i + 1 < m->layers ? &m->layer[i + 1].q : &m->head, id, threads);
    meet(&s->barrier, threads);
    add_branch(s, x, l->mlp_out_norm, rows, id, threads);
}

static void tile(State *s, const Step *whole, int64_t from, int64_t rows, int id, int threads) {
    const Model *m = &s->m;
    Thread *own = &s->thread[id];
    float *x = whole->x + from * m->width;
    Step step = *whole;
    step.position += from, step.place += from, step.slot += from;
    if (step.thin) step.thin += from;
    if (step.root) step.root += from, step.line += from * step.line_stride;
    meet(&s->barrier, threads);
    turns(s, &step, rows, id, threads);
    for (int64_t i = 0; i < m->layers; i++) {
        attention(s, own, &step, x, i, rows, id, threads);
        mlp(s, own, x, i, rows, id, threads);
    }
    int64_t first = 0, last, low, high, D = m->width, V = m->head.out;
    while (first < whole->ready && whole->ready_row[first] < from) first++;
    for (last = first; last < whole->ready && whole->ready_row[last] < from + rows; last++) {
        const float *row = whole->x + whole->ready_row[last] * D;
        float *to = own->norm + (last - first) * D;
        if (m->final_norm) scale_by(to, row, m->final_norm, rms_scale(row, D, m->eps), D);
        else memcpy(to, row, 4 * D);
    }
    if (last == first) return;
    share(V, id, threads, &low, &high);
    const Act *act = ready(s, own, &m->head, NULL, own->norm, D, NULL, last - first, id, threads);
    product(&m->head, act, low, high, whole->logits + first * V + low, V, &own->decoded);
}

/* Returns 0, or 1 when memory for the scores is short (nothing is computed then). */
int modicum_step(State *s, const Step *step) {
    int64_t longest = 0;
    for (int64_t n = 0; n < step->rows; n++) longest = most(longest, step->position[n] + 1);
    for (int64_t t = 0; t < s->m.threads; t++) {
        Seen *seen = &s->thread[t].seen;
        if (longest + KEYS <= seen->stride) continue;
        int64_t stride = most(round_up(longest + 2 * KEYS, KEYS), 2 * seen->stride);
        free(seen->score), free(seen->at);
        int lacking = 0;
        seen->score = room(4 * s->queries * stride, &lacking), seen->at = room(8 * stride, &lacking);
        seen->stride = lacking ? 0 : stride;
        if (lacking) return 1;
    }
    s->barrier.waiting = 0;
#pragma omp parallel num_threads((int)s->m.threads)
    {
        int id = 0, threads = 1;
#ifdef _OPENMP
        id = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        for (int64_t from = 0; from < step->rows; from += TILE)
            tile(s, step, from, least(TILE, step->rows - from), id, threads);
    }
    return 0;
}

int64_t modicum_layout(int64_t which) {    /* sizes Python checks its own idea of the structures against */
    const int64_t sizes[] = {sizeof(Matrix), sizeof(Rope), sizeof(Layer), sizeof(Model), sizeof(Step),
                             sizeof(Thin)};
    return which < 6 ? sizes[which] : 0;
}
