/* y = x W^T with codes of W and int8 activations: 32 outputs at a time are transposed, four inputs of an output
 * contiguous and outputs as lanes, and multiplied with up to six rows, four inputs of a row broadcast to the lanes.
 * Byte products and their sums over ACT_GROUP inputs are exact; then they are scaled and added as float32, group after
 * group, so results are batch-invariant and independent of the number of threads.
 */
#pragma once
#include "decode.h"

#define TILE_OUTPUTS 32           /* outputs of a tile */
#define TILE_ROWS 6            /* rows of it: 12 sums of integers, 12 of floats */

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

/* Outputs o .. o + TILE_OUTPUTS - 1 (the last one is repeated past `last`), four inputs of each in a lane, as unsigned
 * bytes: (inputs / 4, TILE_OUTPUTS). Nibbles: four even inputs of eight, then four odd ones. */
static void transpose_codes(const Matrix *m, int64_t o, int64_t last, int8_t *to) {
    const int64_t bytes = row_bytes(m), used = m->kind == INT8 ? m->in : m->in / 2;
    const char *w = m->weight;
    for (int64_t lane = 0; lane < TILE_OUTPUTS; lane += 16)
        for (int64_t k = 0; k < used; k += 64) {
            __mmask64 mask = tail64(used - k);
            __m512 rows[16], transposed[16];
            UNROLL for (int i = 0; i < 16; i++) {
                const char *from = w + min_i64(o + lane + i, last - 1) * bytes + k;
                rows[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, from));
            }
            transpose16(rows, transposed);
            if (m->kind == INT8) {
                int8_t *at = to + k / 4 * 4 * TILE_OUTPUTS + 4 * lane;
                UNROLL for (int i = 0; i < 16; i++)
                    _mm512_store_si512(at + i * 4 * TILE_OUTPUTS, _mm512_xor_si512(_mm512_castps_si512(transposed[i]),
                                                                           _mm512_set1_epi8((char)0x80)));
                continue;
            }
            const __m512i low = _mm512_set1_epi8(15);
            int8_t *at = to + k / 4 * 8 * TILE_OUTPUTS + 4 * lane;
            UNROLL for (int i = 0; i < 16; i++) {
                __m512i pair = _mm512_castps_si512(transposed[i]);
                _mm512_store_si512(at + 2 * i * 4 * TILE_OUTPUTS, _mm512_and_si512(pair, low));
                _mm512_store_si512(at + (2 * i + 1) * 4 * TILE_OUTPUTS,
                                   _mm512_and_si512(_mm512_srli_epi16(pair, 4), low));
            }
        }
}

/* Scales of those outputs and the values of code 0: (groups, TILE_OUTPUTS) each. */
static void transpose_scales(const Matrix *m, int64_t o, int64_t last, float *scale, float *zero) {
    for (int64_t lane = 0; lane < TILE_OUTPUTS; lane += 16)
        for (int64_t g = 0; g < m->groups; g += 16) {
            __m512 s[16], z[16], transposed[16];
            for (int i = 0; i < 16; i++) scales_at(m, min_i64(o + lane + i, last - 1), g, s + i, z + i);
            int64_t n = min_i64(16, m->groups - g);
            transpose16(s, transposed);
            for (int64_t i = 0; i < n; i++) _mm512_store_ps(scale + (g + i) * TILE_OUTPUTS + lane, transposed[i]);
            transpose16(z, transposed);
            for (int64_t i = 0; i < n; i++) _mm512_store_ps(zero + (g + i) * TILE_OUTPUTS + lane, transposed[i]);
        }
}

#define TILE_ARGS const Matrix *m, const int8_t *w, const Activations *a, int64_t at, const float *scale, \
                  const float *zero, const char *next, int64_t outs, float *y, int64_t ldy

/* N rows from `at` on times TILE_OUTPUTS outputs, of which `outs` are stored. The first rows prefetch the codes of the
 * next tile, from `next`. */
INLINE void tile_kernel(const int N, const int BY_ROW, TILE_ARGS) {
    const int64_t groups = a->in / ACT_GROUP, G = padded_groups(groups), interval = BY_ROW ? 0 : m->group / ACT_GROUP;
    const int8_t *x = (const int8_t *)a->data + at * a->stride;
    const float *step = a->step + at * G, *total = a->total + at * G;
    __m512 out[TILE_ROWS][2];
    UNROLL for (int n = 0; n < N; n++) out[n][0] = out[n][1] = _mm512_setzero_ps();
    for (int64_t g = 0, elapsed = 0; g < groups; g++, x += ACT_GROUP, w += ACT_GROUP * TILE_OUTPUTS) {
        __m512i sum[TILE_ROWS][2];
        UNROLL for (int n = 0; n < N; n++) sum[n][0] = sum[n][1] = _mm512_setzero_si512();
        for (int64_t u = 0; u < ACT_GROUP / 4; u++) {
            if (at == 0) {
                _mm_prefetch(next, _MM_HINT_T1);
                if (m->kind == INT8) _mm_prefetch(next + 64, _MM_HINT_T1);
                next += m->kind == INT8 ? 128 : 64;
            }
            __m512i w0 = _mm512_load_si512(w + u * 4 * TILE_OUTPUTS);
            __m512i w1 = _mm512_load_si512(w + u * 4 * TILE_OUTPUTS + 64);
            UNROLL for (int n = 0; n < N; n++) {
                int32_t four;
                memcpy(&four, x + n * a->stride + 4 * u, 4);
                __m512i xv = _mm512_set1_epi32(four);
                sum[n][0] = _mm512_dpbusd_epi32(sum[n][0], w0, xv), sum[n][1] = _mm512_dpbusd_epi32(sum[n][1], w1, xv);
            }
        }
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int v = 0; v < 2; v++) {
            __m512 codes = _mm512_cvtepi32_ps(sum[n][v]), by = _mm512_set1_ps(step[n * G + g]);
            if (BY_ROW) { out[n][v] = _mm512_fmadd_ps(codes, by, out[n][v]); continue; }
            out[n][v] = _mm512_fmadd_ps(_mm512_set1_ps(total[n * G + g]), _mm512_load_ps(zero + 16 * v), out[n][v]);
            out[n][v] = _mm512_fmadd_ps(_mm512_mul_ps(codes, by), _mm512_load_ps(scale + 16 * v), out[n][v]);
        }
        if (!BY_ROW && ++elapsed == interval) elapsed = 0, scale += TILE_OUTPUTS, zero += TILE_OUTPUTS;
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int v = 0; v < 2; v++) {
        if (BY_ROW) out[n][v] = _mm512_fmadd_ps(out[n][v], _mm512_load_ps(scale + 16 * v), _mm512_mul_ps(
            _mm512_set1_ps(total[n * G + groups]), _mm512_load_ps(zero + 16 * v)));
        _mm512_mask_storeu_ps(y + n * ldy + 16 * v, outs > 16 * v ? tail16(outs - 16 * v) : 0, out[n][v]);
    }
}

#define TILES(N) \
    static void tile_by_row_##N(TILE_ARGS) { tile_kernel(N, 1, m, w, a, at, scale, zero, next, outs, y, ldy); } \
    static void tile_##N(TILE_ARGS) { tile_kernel(N, 0, m, w, a, at, scale, zero, next, outs, y, ldy); }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
static void (*const tile_of[2][TILE_ROWS])(TILE_ARGS) = {
    {tile_1, tile_2, tile_3, tile_4, tile_5, tile_6},
    {tile_by_row_1, tile_by_row_2, tile_by_row_3, tile_by_row_4, tile_by_row_5, tile_by_row_6}};

/* y[n * ldy + o - first] for outputs first .. last - 1; scale, zero: (groups, TILE_OUTPUTS), weight: (inputs, same). */
static void tiles(const Matrix *m, const Activations *a, int64_t first, int64_t last, float *y, int64_t ldy,
                  float *scale, float *zero, int8_t *weight) {
    const int64_t bytes = row_bytes(m);
    for (int64_t o = first; o < last; o += TILE_OUTPUTS) {
        const char *next = (const char *)m->weight + (o + TILE_OUTPUTS) * bytes;
        transpose_codes(m, o, last, weight);
        transpose_scales(m, o, last, scale, zero);
        for (int64_t n = 0; n < a->rows; n += TILE_ROWS)
            tile_of[m->groups == 1][min_i64(TILE_ROWS, a->rows - n) - 1](m, weight, a, n, scale, zero, next, last - o,
                                                                 y + n * ldy + o - first, ldy);
    }
}
#endif
