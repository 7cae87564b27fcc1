/* Kernels of a training step on the CPU, as called from Python (__init__.py). kind: FLOAT32 or BFLOAT16. */
#include <omp.h>

#include "attention.h"
#include "products.h"

#define EITHER(name, ...) (kind == FLOAT32 ? name(FLOAT32, __VA_ARGS__) : name(BFLOAT16, __VA_ARGS__))

int64_t modicum_vector(void) { return W; }
int64_t modicum_pairs(void) { return PAIRS; }
int64_t modicum_chunk(void) { return CHUNK; }
int64_t modicum_attention_size(void) { return sizeof(Attention); }

void modicum_norm(int64_t kind, const void *x, const void *add, const float *w, void *sum, void *out, int64_t N, int64_t D,
                  float eps, int64_t threads) {
    EITHER(norm_forward, x, add, w, sum, out, N, D, eps, (int)threads);
}

void modicum_norm_backward(int64_t kind, const void *x, const float *w, const void *g, const void *add, void *dx, float *dw,
                           int64_t N, int64_t D, float eps, int64_t threads) {
    EITHER(norm_backward, x, w, g, add, dx, dw, N, D, eps, (int)threads);
}

void modicum_swiglu(int64_t kind, const void *gate, const void *up, int64_t ld, void *out, int64_t N, int64_t F,
                    int64_t threads) {
    EITHER(swiglu_forward, gate, up, ld, out, N, F, (int)threads);
}

void modicum_swiglu_backward(int64_t kind, const void *gate, const void *up, int64_t ld, const void *g, void *dgate,
                             void *dup, int64_t ldd, void *out, int64_t N, int64_t F, int64_t threads) {
    EITHER(swiglu_backward, gate, up, ld, g, dgate, dup, ldd, out, N, F, (int)threads);
}

void modicum_rotate(int64_t kind, const void *x, const Strides *sx, void *out, const Strides *so, const void *cosine,
                    const void *sine, int64_t stride_b, int64_t B, int64_t H, int64_t T, int64_t E, int64_t R, float sign,
                    int64_t threads) {
    EITHER(rotate_rows, x, *sx, out, *so, cosine, sine, stride_b, B, H, T, E, R, sign, (int)threads);
}

/* 0, or 1 where there is no memory for it; so below. */
int64_t modicum_cross_entropy(int64_t kind, const void *logits, const int64_t *target, float *loss, void *delta, int64_t N,
                              int64_t V, int64_t threads) {
    return EITHER(cross_entropy_rows, logits, target, loss, delta, N, V, (int)threads);
}

/* total += x, in float32 */
void modicum_accumulate(float *total, const uint16_t *x, int64_t n, int64_t threads) {
    int64_t whole = n / W;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t i = 0; i < whole; i++) *(vf_u *)(total + i * W) += load(x, i * W, BFLOAT16);
    for (int64_t i = whole * W; i < n; i++) total[i] += load1(x, i, BFLOAT16);
}

int64_t modicum_attention(const Attention *a, int64_t backward) {
    int failed = 0;
    const int kind = (int)a->kind;
    int64_t tasks = a->B * (backward ? a->G : a->H);
#pragma omp parallel num_threads((int)a->threads)
    {
        Scratch s = {aligned_alloc(64, (size_t)(scratch_words(a->T, a->E) * 4 + 63) / 64 * 64)};
        float *mine = s.at;
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            if (!mine) continue;
            int64_t heads = backward ? a->G : a->H, b = i / heads, h = i % heads;
            if (kind == FLOAT32) backward ? attend_backward_one(a, FLOAT32, 0, b, h, s) : attend_forward_one(a, FLOAT32, 0, b, h, s);
            else backward ? attend_backward_one(a, BFLOAT16, PAIRS, b, h, s) : attend_forward_one(a, BFLOAT16, PAIRS, b, h, s);
        }
        free(mine);
    }
    return failed;
}

/* See products.h; not where there are no products of pairs. */
int64_t modicum_product(int64_t kind, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, uint16_t *c, int64_t R,
                        int64_t N, int64_t K, int64_t threads) {
#if PAIRS
    return multiply((int)kind, a, lda, b, ldb, c, N, R, N, K, (int)threads);
#else
    (void)kind, (void)a, (void)lda, (void)b, (void)ldb, (void)c, (void)R, (void)N, (void)K, (void)threads;
    return 1;
#endif
}
