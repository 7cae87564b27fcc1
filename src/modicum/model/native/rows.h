/* Norm, gated activation, rotation, cross-entropy: passes over rows. D and F are multiples of W. */
#pragma once
#include "vectors.h"

#define CHUNK 256          /* rows whose weight gradients one thread sums: sums do not depend on the number of threads */

INLINE float scale_of(const void *x, int64_t at, int64_t D, float eps, int kind) {
    vf square = {0};
    for (int64_t d = 0; d < D; d += W) {
        vf v = load(x, at + d, kind);
        square += v * v;
    }
    return 1.0f / sqrtf(sum_of(square) / (float)D + eps);
}

/* out = x / rms(x) * w; with `add`, of x + add, which is rounded and stored in `sum`. */
INLINE void norm_forward(int kind, const void *x, const void *add, const float *w, void *sum, void *out, int64_t N,
                         int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const void *row = x;
        if (add) {
            for (int64_t d = 0; d < D; d += W)
                store(sum, n * D + d, kind, load(x, n * D + d, kind) + load(add, n * D + d, kind));
            row = sum;
        }
        vf scale = splat(scale_of(row, n * D, D, eps, kind));
        for (int64_t d = 0; d < D; d += W) store(out, n * D + d, kind, load(row, n * D + d, kind) * scale * load(w, d, FLOAT32));
    }
}

/* dx (+ add, the gradient that goes around the norm) and, by chunk of rows, the weight's gradient in dw (chunks, D). */
INLINE void norm_backward(int kind, const void *x, const float *w, const void *g, const void *add, void *dx, float *dw,
                          int64_t N, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < (N + CHUNK - 1) / CHUNK; chunk++) {
        float *sums = dw ? dw + chunk * D : NULL;
        if (sums) memset(sums, 0, (size_t)D * sizeof(float));
        for (int64_t n = chunk * CHUNK; n < min_i64(N, (chunk + 1) * CHUNK); n++) {
            float scale1 = scale_of(x, n * D, D, eps, kind);
            vf scale = splat(scale1), dot = {0};
            for (int64_t d = 0; d < D; d += W) {
                vf unit = load(x, n * D + d, kind) * scale, one = load(g, n * D + d, kind);
                if (sums) *(vf_u *)(sums + d) += unit * one;
                dot += unit * one * load(w, d, FLOAT32);
            }
            if (!dx) continue;
            vf mean = splat(sum_of(dot) / (float)D);
            for (int64_t d = 0; d < D; d += W) {
                vf unit = load(x, n * D + d, kind) * scale;
                vf one = (load(g, n * D + d, kind) * load(w, d, FLOAT32) - unit * mean) * scale;
                store(dx, n * D + d, kind, add ? one + load(add, n * D + d, kind) : one);
            }
        }
    }
}

INLINE vf sigmoid(vf x) {
    vf below = 1.0f + exp_vf(-x);
#if W == 16
    vf guess = (vf)_mm512_rcp14_ps((__m512)below);        /* 14 bits, and a step of Newton's */
    return guess * (2.0f - below * guess);
#else
    return 1.0f / below;
#endif
}

/* out = silu(gate) * up; gate and up are rows of stride `ld`. */
INLINE void swiglu_forward(int kind, const void *gate, const void *up, int64_t ld, void *out, int64_t N, int64_t F,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t f = 0; f < F; f += W) {
            vf x = load(gate, n * ld + f, kind);
            store(out, n * F + f, kind, x * sigmoid(x) * load(up, n * ld + f, kind));
        }
}

/* Gradients of gate and up (stride ldd) from that of the product; the product itself into `out`, if wanted. */
INLINE void swiglu_backward(int kind, const void *gate, const void *up, int64_t ld, const void *g, void *dgate, void *dup,
                            int64_t ldd, void *out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t f = 0; f < F; f += W) {
            vf x = load(gate, n * ld + f, kind), y = load(up, n * ld + f, kind), one = load(g, n * F + f, kind);
            vf s = sigmoid(x), act = x * s;
            store(dup, n * ldd + f, kind, one * act);
            store(dgate, n * ldd + f, kind, one * y * s * (1.0f + x * (1.0f - s)));
            if (out) store(out, n * F + f, kind, act * y);
        }
}

typedef struct { int64_t b, h, t; } Strides;             /* in numbers; a head's E numbers lie side by side */

/* Pairs (i, i + R/2) of each head turned by the angles of its position; sign -1 turns back. E and R are multiples of 2 W
 * where vectors are used, and of 2 otherwise. cos and sin: (B or 1, T, R/2), stride_b 0 for one for all. */
INLINE void rotate_rows(int kind, const void *x, Strides sx, void *out, Strides so, const void *cosine, const void *sine,
                        int64_t stride_b, int64_t B, int64_t H, int64_t T, int64_t E, int64_t R, float sign, int threads) {
    int64_t half = R / 2;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++) {
            int64_t angle = b * stride_b + t * half;
            for (int64_t h = 0; h < H; h++) {
                int64_t from = b * sx.b + h * sx.h + t * sx.t, to = b * so.b + h * so.h + t * so.t;
                for (int64_t i = 0; i < half; i += W) {
                    vf c = load(cosine, angle + i, kind), s = load(sine, angle + i, kind) * sign;
                    vf one = load(x, from + i, kind), two = load(x, from + half + i, kind);
                    store(out, to + i, kind, one * c - two * s);
                    store(out, to + half + i, kind, two * c + one * s);
                }
                for (int64_t i = R; i < E; i += W) store(out, to + i, kind, load(x, from + i, kind));
            }
        }
}

/* One row: -log softmax(logits)[target], and its gradient in the logits. `made`: V floats of scratch. */
INLINE float cross_entropy_row(int kind, const void *logits, int64_t row, int64_t target, void *delta, int64_t V,
                               float *made) {
    const int64_t whole = V / W * W, left = V - whole;
    float rest[W];
    for (int64_t i = 0; i < W; i++) rest[i] = i < left ? load1(logits, row + whole + i, kind) : -INFINITY;
    vf tail = *(vf_u *)rest, top = tail, total = {0};
    for (int64_t v = 0; v < whole; v += W) top = max_vf(top, load(logits, row + v, kind));
    float most = max_of(top);
    vf shift = splat(most);
    for (int64_t v = 0; v < whole; v += W) {
        vf one = exp_vf(load(logits, row + v, kind) - shift);
        *(vf_u *)(made + v) = one;
        total += one;
    }
    vf last = where(less(splat(-INFINITY), tail), exp_vf(tail - shift), (vf){0});
    float sum = sum_of(total + last);
    vf inverse = splat(1.0f / sum);
    for (int64_t v = 0; v < whole; v += W) store(delta, row + v, kind, *(vf_u *)(made + v) * inverse);
    *(vf_u *)rest = last * inverse;
    for (int64_t i = 0; i < left; i++) store1(delta, row + whole + i, kind, rest[i]);
    float p = target < whole ? made[target] / sum : rest[target - whole];
    float loss = most + logf(sum) - load1(logits, row + target, kind);
    store1(delta, row + target, kind, p - 1.0f);
    return loss;
}

/* Of every row; rows of target < 0 have neither loss nor gradient. 1 where there is no memory for it. */
INLINE int cross_entropy_rows(int kind, const void *logits, const int64_t *target, float *loss, void *delta, int64_t N,
                              int64_t V, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *made = aligned_alloc(64, (size_t)(V * 4 + 127) / 64 * 64);
        if (!made) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            if (made && target[n] >= 0) loss[n] = cross_entropy_row(kind, logits, n * V, target[n], delta, V, made);
            else {
                loss[n] = 0;
                memset((char *)delta + n * V * width_of(kind), 0, (size_t)(V * width_of(kind)));
            }
        }
        free(made);
    }
    return failed;
}
