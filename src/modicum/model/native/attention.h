/* Causal attention forward and backward: query i sees keys first[i] ... i, of its document or window.
 *
 * B rows, T tokens, H query heads, G key/value heads, E head_dim. A block of BQ queries is kept transposed, queries side
 * by side in vectors: scores (keys, BQ), so that the softmax needs no sums across a vector, and each of the seven products
 * is one kernel over words: pairs of bfloat16 numbers where the processor multiplies those, single floats elsewhere.
 * The backward pass makes the softmax again from its log-sum-exp (Dao et al. 2022, arXiv:2205.14135, section 3.1).
 */
#pragma once
#include "rows.h"

#define BQ 64              /* queries of a block */
#define NV (BQ / W)
#define KEYS 384           /* keys at a time in the backward pass: what is kept of them fits an L2 cache */
#define MR 6
#if W == 16
#define NR 4
#else
#define NR 2
#endif

typedef struct {
    int64_t kind, B, H, G, T, E, threads;
    float scale, unused;
    const void *q, *k, *v, *out;
    Strides sq, sk, sv, so;
    const int32_t *first;                     /* (B, T), or (T) with first_b 0 */
    int64_t first_b;
    float *lse;                               /* (B, H, T) */
    const void *grad;                         /* backward: of out */
    Strides sg;
    void *dq, *dk, *dv;
    Strides sdq, sdk, sdv;
} Attention;

typedef struct { float *at; } Scratch;

INLINE void *take(Scratch *s, int64_t words) {
    void *mine = s->at;
    s->at += (words + 15) / 16 * 16;
    return mine;
}

/* C (mr, nr W) = or += A (mr, kw words) B (kw words, nr W). */
INLINE void tile(int mr, int nr, int pairs, int add, const uint32_t *A, int64_t lda, const uint32_t *B, int64_t ldb,
                 float *C, int64_t ldc, int64_t kw) {
    vf acc[MR][NR];
    UNROLL for (int m = 0; m < mr; m++)
        UNROLL for (int n = 0; n < nr; n++) {
            if (add) acc[m][n] = *(vf_u *)(C + m * ldc + n * W);
            else acc[m][n] = (vf){0};
        }
    for (int64_t k = 0; k < kw; k++) {
        vu b[NR];
        UNROLL for (int n = 0; n < nr; n++) b[n] = *(const vu_u *)(B + k * ldb + n * W);
        UNROLL for (int m = 0; m < mr; m++) {
            vu a = A[m * lda + k] - (vu){0};
            UNROLL for (int n = 0; n < nr; n++) {
#if PAIRS
                if (pairs) {
                    acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n], (__m512bh)a, (__m512bh)b[n]);
                    continue;
                }
#endif
                acc[m][n] += (vf)a * (vf)b[n];
            }
        }
    }
    UNROLL for (int m = 0; m < mr; m++)
        UNROLL for (int n = 0; n < nr; n++) *(vf_u *)(C + m * ldc + n * W) = acc[m][n];
    (void)pairs;
}

INLINE void columns(int nr, int pairs, int add, const uint32_t *A, int64_t lda, const uint32_t *B, int64_t ldb, float *C,
                    int64_t ldc, int64_t M, int64_t kw) {
    int64_t m = 0;
    for (; m + MR <= M; m += MR) tile(MR, nr, pairs, add, A + m * lda, lda, B, ldb, C + m * ldc, ldc, kw);
    for (; m < M; m++) tile(1, nr, pairs, add, A + m * lda, lda, B, ldb, C + m * ldc, ldc, kw);
}

/* C (M, N) = or += A (M, kw words) B (kw words, N); N a multiple of W. */
static __attribute__((noinline)) void product(int pairs, int add, const void *a, int64_t lda, const void *b, int64_t ldb,
                                              float *C, int64_t ldc, int64_t M, int64_t N, int64_t kw) {
    const uint32_t *A = a, *B = b;
#define COLUMNS(nr) (pairs ? (add ? columns(nr, 1, 1, A, lda, B + n, ldb, C + n, ldc, M, kw)                               \
                                  : columns(nr, 1, 0, A, lda, B + n, ldb, C + n, ldc, M, kw))                              \
                           : (add ? columns(nr, 0, 1, A, lda, B + n, ldb, C + n, ldc, M, kw)                               \
                                  : columns(nr, 0, 0, A, lda, B + n, ldb, C + n, ldc, M, kw)))
    int64_t n = 0;
    for (; n + NR * W <= N; n += NR * W) COLUMNS(NR);
    for (; n < N; n += W) COLUMNS(1);
#undef COLUMNS
}

/* Two rows as words: pairs of bfloat16 numbers, one below the other. */
INLINE vu paired(vf low, vf high) {
#if PAIRS
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vu)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
#endif
}

/* Rows from .. to - 1 of a head as rows of words (E / 2 pairs, or E floats); zeros from row T on. */
INLINE void copy_rows(int kind, int pairs, const void *x, int64_t base, int64_t stride, int64_t from, int64_t to, int64_t T,
                      int64_t E, uint32_t *out) {
    int64_t words = pairs ? E / 2 : E;
    for (int64_t t = from; t < to; t++, out += words) {
        if (t >= T) memset(out, 0, (size_t)words * 4);
        else if (pairs || kind == FLOAT32) memcpy(out, (const char *)x + (base + t * stride) * width_of(kind), (size_t)words * 4);
        else
            for (int64_t e = 0; e < E; e += W) store(out, e, FLOAT32, load(x, base + t * stride + e, kind));
    }
}

#if W == 16
/* Sixteen rows of sixteen words transposed, by exchanging blocks of 8, 4, 2 and 1. */
INLINE void transpose_block(const uint32_t *x, int64_t ldx, uint32_t *out, int64_t ldo) {
    __m512i row[16];
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    UNROLL for (int i = 0; i < 16; i++) row[i] = _mm512_loadu_si512(x + i * ldx);
    UNROLL for (int bit = 3; bit >= 0; bit--) {
        const int s = 1 << bit;
        const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
        const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - s));
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(s)), upper, lane,
                                                   _mm512_set1_epi32(16));
        UNROLL for (int i = 0; i < 16; i++)
            if (!(i & s)) {
                __m512i one = row[i], two = row[i + s];
                row[i] = _mm512_permutex2var_epi32(one, low, two);
                row[i + s] = _mm512_permutex2var_epi32(one, high, two);
            }
    }
    UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * ldo, row[i]);
}
#endif

/* Rows of words (n, words) transposed to (words, ld). */
static void transpose_words(const uint32_t *x, int64_t n, int64_t words, uint32_t *out, int64_t ld) {
    int64_t rows = 0, wide = 0;
#if W == 16
    rows = n / 16 * 16, wide = words / 16 * 16;
    for (int64_t w = 0; w < wide; w += 16)
        for (int64_t t = 0; t < rows; t += 16) transpose_block(x + t * words + w, words, out + w * ld + t, ld);
#endif
    for (int64_t w = 0; w < words; w++)
        for (int64_t t = w < wide ? rows : 0; t < n; t++) out[w * ld + t] = x[t * words + w];
}

/* From rows of words: the other pairing, (n / 2, E) words of numbers below each other; floats stay as they are. */
INLINE void pair_rows(int pairs, const uint32_t *x, int64_t n, int64_t E, uint32_t *out) {
    if (!pairs) { memcpy(out, x, (size_t)(n * E) * 4); return; }
    const uint16_t *h = (const uint16_t *)x;
    for (int64_t t = 0; t < n; t += 2)
        for (int64_t e = 0; e < E; e += W) {
            vu low = __builtin_convertvector(*(const vh_u *)(h + t * E + e), vu);
            vu high = __builtin_convertvector(*(const vh_u *)(h + (t + 1) * E + e), vu);
            *(vu_u *)(out + t / 2 * E + e) = low | high << 16;
        }
}

/* Numbers of (n, E) rows of words as (E, n) rows of words: words along n, n even. */
INLINE void transpose_numbers(int pairs, const uint32_t *x, int64_t n, int64_t E, uint32_t *out, uint32_t *scratch) {
    if (pairs) pair_rows(1, x, n, E, scratch);
    transpose_words(pairs ? scratch : x, pairs ? n / 2 : n, E, out, pairs ? n / 2 : n);
}

/* x (E, BQ) floats to `rows` rows of E numbers with a stride; scratch of 2 E BQ words. */
INLINE void write_transposed(int kind, const float *x, int64_t E, int64_t rows, void *out, int64_t base, int64_t stride,
                             uint32_t *scratch) {
    const int64_t words = kind == FLOAT32 ? E : E / 2;
    const uint32_t *from = (const uint32_t *)x;
    if (kind == BFLOAT16) {
        for (int64_t e = 0; e < E; e += 2)
            for (int64_t i = 0; i < BQ; i += W)
                *(vu_u *)(scratch + e / 2 * BQ + i) =
                    paired(load(x, e * BQ + i, FLOAT32), load(x, (e + 1) * BQ + i, FLOAT32));
        from = scratch, scratch += words * BQ;
    }
    transpose_words(from, words, BQ, scratch, words);
    for (int64_t i = 0; i < rows; i++)
        memcpy((char *)out + (base + i * stride) * width_of(kind), scratch + i * words, (size_t)words * 4);
}

typedef struct {           /* which keys the queries of a block see */
    vi query[NV], first[NV];
    int64_t from, to, all_from, all_to;       /* the keys that some query sees; those that all see */
} Seen;

INLINE Seen seen_by(const int32_t *first, int64_t i0, int64_t T) {
    Seen s;
    int32_t lowest = INT32_MAX, highest = 0, query[BQ], from[BQ];
    for (int64_t i = 0; i < BQ; i++) {
        int32_t f = i0 + i < T ? first[i0 + i] : INT32_MAX;
        query[i] = (int32_t)(i0 + i), from[i] = f;
        if (i0 + i < T) lowest = f < lowest ? f : lowest;
        highest = f > highest ? f : highest;
    }
    memcpy(s.query, query, sizeof query), memcpy(s.first, from, sizeof from);
    s.from = lowest & ~1, s.to = (min_i64(i0 + BQ, T) + 1) & ~1;
    s.all_from = highest, s.all_to = i0 + 1;
    return s;
}

INLINE mask mask_of(const Seen *s, int64_t key, int n) {
    return between(s->first[n], (int32_t)key - (vi){0}, s->query[n]);
}

INLINE int64_t scratch_words(int64_t T, int64_t E) {
    int64_t S = T + 2;
    return 7 * S * E + 8 * E * BQ + (S > KEYS ? S : KEYS) * BQ * 2 + 3 * KEYS * BQ + 4096;
}

INLINE void attend_forward_one(const Attention *a, int kind, int pairs, int64_t b, int64_t h, Scratch s) {
    const int64_t T = a->T, E = a->E, S = (T + 1) & ~1, words = pairs ? E / 2 : E, g = h / (a->H / a->G);
    uint32_t *rows = take(&s, S * words), *vt = take(&s, S * words), *qt = take(&s, words * BQ);
    float *scores = take(&s, S * BQ), *weights = take(&s, S * BQ), *outs = take(&s, E * BQ);
    uint32_t *spare = take(&s, 2 * E * BQ), *paired_rows = take(&s, S * E / 2);
    copy_rows(kind, pairs, a->v, b * a->sv.b + g * a->sv.h, a->sv.t, 0, S, T, E, rows);
    transpose_numbers(pairs, rows, S, E, vt, paired_rows);
    copy_rows(kind, pairs, a->k, b * a->sk.b + g * a->sk.h, a->sk.t, 0, S, T, E, rows);
    for (int64_t i0 = 0; i0 < T; i0 += BQ) {
        Seen seen = seen_by(a->first + b * a->first_b, i0, T);
        const int64_t n = seen.to - seen.from;
        copy_rows(kind, pairs, a->q, b * a->sq.b + h * a->sq.h, a->sq.t, i0, i0 + BQ, T, E, spare);
        transpose_words(spare, BQ, words, qt, BQ);
        product(pairs, 0, rows + seen.from * words, words, qt, BQ, scores, BQ, n, BQ, words);
        vf top[NV], total[NV];
        UNROLL for (int c = 0; c < NV; c++) top[c] = splat(-INFINITY), total[c] = (vf){0};
        for (int64_t j = 0; j < n; j++) {
            int64_t key = seen.from + j;
            int all = key >= seen.all_from && key < seen.all_to;
            UNROLL for (int c = 0; c < NV; c++) {
                vf x = *(vf_u *)(scores + j * BQ + c * W);
                if (!all) x = where(mask_of(&seen, key, c), x, splat(-INFINITY));
                top[c] = max_vf(x, top[c]);
            }
        }
        const vf scale = splat(a->scale);
        for (int64_t j = 0; j < n; j += 2) {
            int64_t key = seen.from + j;
            int all = key >= seen.all_from && key + 1 < seen.all_to;
            UNROLL for (int c = 0; c < NV; c++) {
                vf one = exp_vf((*(vf_u *)(scores + j * BQ + c * W) - top[c]) * scale);
                vf two = exp_vf((*(vf_u *)(scores + (j + 1) * BQ + c * W) - top[c]) * scale);
                if (!all) {
                    one = where(mask_of(&seen, key, c), one, (vf){0});
                    two = where(mask_of(&seen, key + 1, c), two, (vf){0});
                }
                total[c] += one + two;
                if (pairs) *(vu_u *)((uint32_t *)weights + j / 2 * BQ + c * W) = paired(one, two);
                else *(vf_u *)(weights + j * BQ + c * W) = one, *(vf_u *)(weights + (j + 1) * BQ + c * W) = two;
            }
        }
        const int64_t ldv = pairs ? S / 2 : S, at = pairs ? seen.from / 2 : seen.from;
        product(pairs, 0, vt + at, ldv, weights, BQ, outs, BQ, E, BQ, pairs ? n / 2 : n);
        UNROLL for (int c = 0; c < NV; c++) {
            vf inverse = 1.0f / total[c];
            for (int64_t e = 0; e < E; e++) *(vf_u *)(outs + e * BQ + c * W) *= inverse;
        }
        const int64_t left = min_i64(BQ, T - i0);
        write_transposed(kind, outs, E, left, (void *)a->out, b * a->so.b + h * a->so.h + i0 * a->so.t, a->so.t, spare);
        float tops[BQ], totals[BQ];
        memcpy(tops, top, sizeof tops), memcpy(totals, total, sizeof totals);
        for (int64_t i = 0; i < left; i++)
            a->lse[(b * a->H + h) * T + i0 + i] = tops[i] * a->scale + logf(totals[i]);
    }
}

INLINE void attend_backward_one(const Attention *a, int kind, int pairs, int64_t b, int64_t g, Scratch s) {
    const int64_t T = a->T, E = a->E, S = (T + 1) & ~1, words = pairs ? E / 2 : E, group = a->H / a->G;
    const int64_t qwords = pairs ? BQ / 2 : BQ, ldt = pairs ? S / 2 : S;
    uint32_t *k = take(&s, S * words), *v = take(&s, S * words), *kt = take(&s, S * words);
    uint32_t *qt = take(&s, words * BQ), *gt = take(&s, words * BQ), *q2 = take(&s, qwords * E), *g2 = take(&s, qwords * E);
    float *dk = take(&s, S * E), *dv = take(&s, S * E), *dq = take(&s, E * BQ);
    float *scores = take(&s, KEYS * BQ), *slopes = take(&s, KEYS * BQ);
    uint32_t *p = take(&s, KEYS * qwords), *ds = take(&s, KEYS * qwords), *ds2 = take(&s, KEYS * qwords);
    uint32_t *spare = take(&s, 2 * BQ * E), *paired_rows = take(&s, S * E / 2);
    copy_rows(kind, pairs, a->k, b * a->sk.b + g * a->sk.h, a->sk.t, 0, S, T, E, k);
    copy_rows(kind, pairs, a->v, b * a->sv.b + g * a->sv.h, a->sv.t, 0, S, T, E, v);
    transpose_numbers(pairs, k, S, E, kt, paired_rows);
    memset(dk, 0, (size_t)(S * E) * 4), memset(dv, 0, (size_t)(S * E) * 4);
    const vf scale = splat(a->scale);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t i0 = 0; i0 < T; i0 += BQ) {
            Seen seen = seen_by(a->first + b * a->first_b, i0, T);
            const int64_t left = min_i64(BQ, T - i0);
            copy_rows(kind, pairs, a->q, b * a->sq.b + h * a->sq.h, a->sq.t, i0, i0 + BQ, T, E, spare);
            transpose_words(spare, BQ, words, qt, BQ);
            pair_rows(pairs, spare, BQ, E, q2);
            copy_rows(kind, pairs, a->grad, b * a->sg.b + h * a->sg.h, a->sg.t, i0, i0 + BQ, T, E, spare);
            transpose_words(spare, BQ, words, gt, BQ);
            pair_rows(pairs, spare, BQ, E, g2);
            float lse1[BQ] = {0}, dot1[BQ] = {0};             /* dot: of the output and its gradient */
            for (int64_t i = 0; i < left; i++) {
                int64_t out = b * a->so.b + h * a->so.h + (i0 + i) * a->so.t;
                int64_t grad = b * a->sg.b + h * a->sg.h + (i0 + i) * a->sg.t;
                vf sum = {0};
                for (int64_t e = 0; e < E; e += W) sum += load(a->out, out + e, kind) * load(a->grad, grad + e, kind);
                dot1[i] = sum_of(sum), lse1[i] = a->lse[(b * a->H + h) * T + i0 + i];
            }
            for (int64_t from = seen.from; from < seen.to; from += KEYS) {
                const int64_t n = min_i64(KEYS, seen.to - from);
                product(pairs, 0, k + from * words, words, qt, BQ, scores, BQ, n, BQ, words);
                product(pairs, 0, v + from * words, words, gt, BQ, slopes, BQ, n, BQ, words);
                for (int64_t j = 0; j < n; j += 2) {
                    int64_t key = from + j;
                    int all = key >= seen.all_from && key + 1 < seen.all_to;
                    UNROLL for (int c = 0; c < NV; c++) {
                        vf lse = *(vf_u *)(lse1 + c * W), dot = *(vf_u *)(dot1 + c * W), pj[2], dj[2];
                        UNROLL for (int r = 0; r < 2; r++) {
                            vf x = exp_vf(*(vf_u *)(scores + (j + r) * BQ + c * W) * scale - lse);
                            if (!all) x = where(mask_of(&seen, key + r, c), x, (vf){0});
                            pj[r] = x, dj[r] = x * (*(vf_u *)(slopes + (j + r) * BQ + c * W) - dot) * scale;
                            store(p, (j + r) * BQ + c * W, pairs ? BFLOAT16 : FLOAT32, pj[r]);
                            store(ds, (j + r) * BQ + c * W, pairs ? BFLOAT16 : FLOAT32, dj[r]);
                        }
                        if (pairs) *(vu_u *)(ds2 + j / 2 * BQ + c * W) = paired(dj[0], dj[1]);
                    }
                }
                product(pairs, 1, p, qwords, g2, E, dv + from * E, E, n, E, qwords);
                product(pairs, 1, ds, qwords, q2, E, dk + from * E, E, n, E, qwords);
                product(pairs, from > seen.from, kt + (pairs ? from / 2 : from), ldt, pairs ? ds2 : ds, BQ, dq, BQ, E, BQ,
                        pairs ? n / 2 : n);
            }
            write_transposed(kind, dq, E, left, a->dq, b * a->sdq.b + h * a->sdq.h + i0 * a->sdq.t, a->sdq.t, spare);
        }
    for (int64_t t = 0; t < T; t++)
        for (int64_t e = 0; e < E; e += W) {
            store(a->dk, b * a->sdk.b + g * a->sdk.h + t * a->sdk.t + e, kind, load(dk, t * E + e, FLOAT32));
            store(a->dv, b * a->sdv.b + g * a->sdv.h + t * a->sdv.t + e, kind, load(dv, t * E + e, FLOAT32));
        }
}
