/* Matrix products of bfloat16 pairs: C = A B, sums in float32, rounded once.
 *
 * Both factors are read as pairs of neighbours along the summed index k, a pair in 32 bits. B is packed once, (columns /
 * 16, pairs, 16); then each thread takes blocks of ROWS rows of C, and a kernel keeps 8 rows times 48 columns in registers
 * while it walks over k: three vectors of B, and a pair of A broadcast to each of the rows. A block of A and 48 columns of
 * B fit L2. Each number of C is summed by one thread in one order, so that results do not depend on their number.
 */
#pragma once
#include "vectors.h"

#if PAIRS
#define ROWS 64            /* of C, by one thread at a time */
#define PAIRS_AT_ONCE 1024         /* pairs summed in registers; more go through float32 memory */
#define AHEAD 16           /* rows that packing prefetches */
#define KERNEL_ROWS 8
#define KERNEL_VECTORS 3

/* The pairs of two rows, column by column: lane i is (low[i], high[i]), for columns 0 .. 15 and 16 .. 31. */
INLINE void interleave(__m512i low, __m512i high, __m512i *first, __m512i *second) {
    const __m512i even = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), odd = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    __m512i a = _mm512_unpacklo_epi16(low, high), b = _mm512_unpackhi_epi16(low, high);
    *first = _mm512_permutex2var_epi64(a, even, b), *second = _mm512_permutex2var_epi64(a, odd, b);
}

/* Columns c .. c + 15 (or 31) of rows from .. to - 1, whose pairs are of neighbouring rows: (1 or 2, `pairs`, 16). */
static void pack_rows(const uint16_t *x, int64_t ld, int64_t c, int64_t columns, int64_t from, int64_t to, uint32_t *out,
                      int64_t pairs) {
    const __mmask32 mask = columns - c >= 32 ? 0xffffffffu : 0xffffu;
    for (int64_t k = from, p = 0; k < to; k += 2, p++) {
        __m512i low = _mm512_maskz_loadu_epi16(mask, x + k * ld + c), first, second;
        for (int64_t i = 0; i < 2; i++) _mm_prefetch((const char *)(x + (k + AHEAD + i) * ld + c), _MM_HINT_T0);
        __m512i high = k + 1 < to ? _mm512_maskz_loadu_epi16(mask, x + (k + 1) * ld + c) : _mm512_setzero_si512();
        interleave(low, high, &first, &second);
        _mm512_storeu_si512(out + p * 16, first);
        if (columns - c >= 32) _mm512_storeu_si512(out + (pairs + p) * 16, second);
    }
}

/* to[i][j] = from[j][i] for sixteen vectors of 32 bits. */
INLINE void transpose16(const __m512i *from, __m512i *to) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]), b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), odd2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        to[i] = _mm512_shuffle_i32x4(even, even2, 0x88), to[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        to[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd), to[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

/* Rows r .. r + 15 of a matrix, whose pairs are of neighbouring columns, as columns of B: (pairs, 16). */
static void pack_columns(const uint16_t *x, int64_t ld, int64_t r, int64_t K, uint32_t *out) {
    for (int64_t k = 0; k < K; k += 32) {
        const __mmask32 mask = K - k >= 32 ? 0xffffffffu : (1u << (K - k)) - 1;
        __m512i from[16], to[16];
        UNROLL for (int i = 0; i < 16; i++) from[i] = _mm512_maskz_loadu_epi16(mask, x + (r + i) * ld + k);
        transpose16(from, to);
        const int64_t n = min_i64(16, (K - k) / 2);
        for (int64_t i = 0; i < n; i++) _mm512_storeu_si512(out + (k / 2 + i) * 16, to[i]);
    }
}

/* M rows times 16 V columns over n pairs. A's pair (m, k) is a[m * row + k * step]; B's vectors lie `apart` words from each
 * other. `sums` (of `ld` floats a row) holds what earlier blocks have summed, or takes what is to go on. */
INLINE void product_kernel(const int M, const int V, const uint32_t *a, int64_t row, const int64_t step, const uint32_t *b,
                           int64_t apart, int64_t n, float *sums, int64_t ld, int first, int last, uint16_t *out,
                           int64_t ldo) {
    __m512 c[KERNEL_ROWS][KERNEL_VECTORS];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++)
        c[m][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m * ld + 16 * v);
    for (int64_t k = 0; k < n; k++) {
        __m512bh wide[KERNEL_VECTORS];
        UNROLL for (int v = 0; v < V; v++) wide[v] = (__m512bh)_mm512_loadu_si512(b + v * apart + 16 * k);
        UNROLL for (int m = 0; m < M; m++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)a[m * row + k * step]);
            UNROLL for (int v = 0; v < V; v++) c[m][v] = _mm512_dpbf16_ps(c[m][v], one, wide[v]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) {
        if (last) *(vh_u *)(out + m * ldo + 16 * v) = narrow((vf)c[m][v]);
        else _mm512_storeu_ps(sums + m * ld + 16 * v, c[m][v]);
    }
}

#define KERNEL_ARGS const uint32_t *a, int64_t row, const uint32_t *b, int64_t apart, int64_t n, float *sums, int64_t ld, \
                    int first, int last, uint16_t *out, int64_t ldo
#define KERNEL(M, V) \
    static void rows_##M##_##V(KERNEL_ARGS) { product_kernel(M, V, a, row, 1, b, apart, n, sums, ld, first, last, out, ldo); } \
    static void packed_##M##_##V(KERNEL_ARGS) { product_kernel(M, V, a, row, 16, b, apart, n, sums, ld, first, last, out, ldo); }
KERNEL(8, 1) KERNEL(8, 2) KERNEL(8, 3) KERNEL(1, 1) KERNEL(1, 2) KERNEL(1, 3)
static void (*const product_kernels[2][2][KERNEL_VECTORS])(KERNEL_ARGS) = {
    {{rows_1_1, rows_1_2, rows_1_3}, {rows_8_1, rows_8_2, rows_8_3}},
    {{packed_1_1, packed_1_2, packed_1_3}, {packed_8_1, packed_8_2, packed_8_3}}};

/* C (R, N), rows `ldc` apart. `kind`: 0 A (R, K), B (N, K)^T; 1 A (R, K), B (K, N); 2 A (K, R)^T, B (K, N). N is a multiple
 * of 16, so is R of kind 2, K of kinds 0 and 1 of 2. 1 where there is no memory. */
static int multiply(int kind, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, uint16_t *c, int64_t ldc,
                    int64_t R, int64_t N, int64_t K, int threads) {
    const int64_t pairs = (K + 1) / 2, tasks = (R + ROWS - 1) / ROWS;
    uint32_t *B = aligned_alloc(64, (size_t)(N * pairs * 4));
    int failed = !B;
    if (failed) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *sums = pairs > PAIRS_AT_ONCE ? aligned_alloc(64, (size_t)(ROWS * N * 4)) : NULL;
        uint32_t *A = kind == 2 ? aligned_alloc(64, (size_t)(ROWS * PAIRS_AT_ONCE * 4)) : NULL;
        if ((pairs > PAIRS_AT_ONCE && !sums) || (kind == 2 && !A)) {
#pragma omp atomic write
            failed = 1;
        }
        if (kind == 0) {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < N / 16; j++) pack_columns(b, ldb, 16 * j, K, B + j * pairs * 16);
        } else {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < N; j += 32) pack_rows(b, ldb, j, N, 0, K, B + j * pairs, pairs);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tasks; t++) {
            const int64_t first = t * ROWS, rows = min_i64(ROWS, R - first);
            if ((pairs > PAIRS_AT_ONCE && !sums) || (kind == 2 && !A)) continue;
            for (int64_t p = 0; p < pairs; p += PAIRS_AT_ONCE) {
                const int64_t n = min_i64(PAIRS_AT_ONCE, pairs - p);
                if (kind == 2)
                    for (int64_t r = 0; r < rows; r += 32)
                        pack_rows(a, lda, first + r, first + rows, 2 * p, min_i64(K, 2 * (p + n)), A + r * n, n);
                for (int64_t j = 0; j < N; j += 16 * KERNEL_VECTORS) {
                    const int64_t v = min_i64(KERNEL_VECTORS, (N - j) / 16);
                    for (int64_t r = 0, m; r < rows; r += m) {
                        m = rows - r >= KERNEL_ROWS ? KERNEL_ROWS : 1;
                        const uint32_t *from = kind == 2 ? A + r / 16 * 16 * n + r % 16
                                                         : (const uint32_t *)(a + (first + r) * lda) + p;
                        product_kernels[kind == 2][m > 1][v - 1](
                            from, kind == 2 ? 1 : lda / 2, B + (j * pairs + 16 * p), 16 * pairs, n, sums + r * N + j, N,
                            p == 0, p + n == pairs, c + (first + r) * ldc + j, ldc);
                    }
                }
            }
        }
        free(sums), free(A);
    }
    free(B);
    return failed;
}
#endif
