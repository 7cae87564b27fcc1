/* Products by tiles (Intel AMX): sixteen outputs by sixteen rows, 64 bytes of inputs at a time.
 *
 * Weights are the one factor, as they lie, row by row, or decoded, some outputs at a time; the rows are the other, laid out
 * once for all outputs (activations.h). Sums of bytes are exact, so products with int8 activations equal those of tiles.h
 * bit for bit. Pairs of bfloat16 are summed in another order than by vectors: a row's last bits would depend on how many
 * rows a step has, so these products are an option (`tile_rows`).
 *
 * AMX is 1 for the instructions, 2 where they are written out in C: slow, for tests on any processor.
 */
#pragma once
#include "decode.h"

#ifdef AMX
#if AMX == 1
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Compilers may move stores to memory past a load of a tile: they do not see that it reads memory. */
#define AMX_FENCE __asm__ volatile("" ::: "memory")
INLINE void amx_begin(void) {
    static const TileConfig config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
    AMX_FENCE;
}
INLINE void amx_end(void) { _tile_release(); }
#define AMX_ZERO(c) _tile_zero(c)
#define AMX_LOAD(c, from, ld) _tile_loadd(c, from, ld)
#define AMX_STORE(c, to, ld) _tile_stored(c, to, ld)
#define AMX_PAIRS(c, a, b) _tile_dpbf16ps(c, a, b)
#define AMX_BYTES(c, a, b) _tile_dpbusd(c, a, b)      /* unsigned by signed */
#else
static _Thread_local char amx_tile[8][1024] __attribute__((aligned(64)));
INLINE void amx_begin(void) { memset(amx_tile, 0, sizeof(amx_tile)); }
INLINE void amx_end(void) { memset(amx_tile, 0xff, sizeof(amx_tile)); }      /* to be used no more */
static void amx_move(char *to, int64_t ldt, const char *from, int64_t ldf) {
    for (int i = 0; i < 16; i++) memcpy(to + i * ldt, from + i * ldf, 64);
}
/* Even and odd products are summed apart, then added, as the instruction does it. */
static void amx_pairs(float *c, const uint16_t *a, const uint16_t *b) {
    for (int m = 0; m < 16; m++) for (int n = 0; n < 16; n++) {
        float sum[2] = {0, 0};
        for (int k = 0; k < 16; k++) for (int i = 0; i < 2; i++) {
            union { uint32_t bits; float value; } x = {(uint32_t)a[32 * m + 2 * k + i] << 16},
                                                  y = {(uint32_t)b[32 * k + 2 * n + i] << 16};
            sum[i] += x.value * y.value;
        }
        c[16 * m + n] += sum[0] + sum[1];
    }
}
static void amx_bytes(int32_t *c, const uint8_t *a, const int8_t *b) {
    for (int m = 0; m < 16; m++) for (int n = 0; n < 16; n++)
        for (int k = 0; k < 64; k++) c[16 * m + n] += (int32_t)a[64 * m + k] * b[64 * (k / 4) + 4 * n + k % 4];
}
#define AMX_ZERO(c) memset(amx_tile[c], 0, 1024)
#define AMX_LOAD(c, from, ld) amx_move(amx_tile[c], 64, (const char *)(from), ld)
#define AMX_STORE(c, to, ld) amx_move((char *)(to), ld, amx_tile[c], 64)
#define AMX_PAIRS(c, a, b) amx_pairs((float *)amx_tile[c], (const uint16_t *)amx_tile[a], (const uint16_t *)amx_tile[b])
#define AMX_BYTES(c, a, b) amx_bytes((int32_t *)amx_tile[c], (const uint8_t *)amx_tile[a], (const int8_t *)amx_tile[b])
#endif

/* Sixteen outputs (vectors) of sixteen rows (lanes), those that are there, to y, which begins at the first of both. */
INLINE void store_transposed(const __m512 *sums, int64_t rows, int64_t outs, float *y, int64_t ldy) {
    __m512 of_row[16];
    if (outs <= 0) return;
    transpose16(sums, of_row);
    for (int64_t n = 0; n < min_i64(16, rows); n++) _mm512_mask_storeu_ps(y + n * ldy, tail16(outs), of_row[n]);
}

/* y[n * ldy + o - first], all rows; 32 outputs by 32 rows at a time in four tiles of sums. */
static void half_tiles(const Matrix *m, const Activations *a, int64_t first, int64_t last, float *y, int64_t ldy,
                       const DecodeScratch *scratch) {
    const int64_t steps = a->in / 32, blocks = (a->rows + 15) / 16, ld = 2 * a->in;
    float sums[4][256] __attribute__((aligned(64)));
    for (int64_t o = first; o < last; o += 32) {
        const char *w = (const char *)m->weight + o * ld;
        if (m->kind != BFLOAT16 || last - o < 32) {           /* the last output stands in for those past it */
            w = scratch->weight;
            for (int64_t i = 0; i < 32; i++) {
                const int64_t from = min_i64(o + i, last - 1);
                if (m->kind != BFLOAT16) read_scales(m, from, scratch->scale, scratch->zero);
                decode(m, from, scratch->scale, scratch->zero, BFLOAT16, scratch->weight + i * ld);
            }
        }
        amx_begin();
        for (int64_t b = 0; b < blocks; b += 2) {
            const char *x = (const char *)a->data + b * steps * 1024, *more = x + steps * 1024;
            const int two = b + 1 < blocks;
            AMX_ZERO(0); AMX_ZERO(1); AMX_ZERO(2); AMX_ZERO(3);
            for (int64_t k = 0; k < steps; k++) {
                AMX_LOAD(4, w + 64 * k, ld);
                AMX_LOAD(5, w + 16 * ld + 64 * k, ld);
                AMX_LOAD(6, x + 1024 * k, 64);
                AMX_PAIRS(0, 4, 6);
                AMX_PAIRS(1, 5, 6);
                if (!two) continue;
                AMX_LOAD(7, more + 1024 * k, 64);
                AMX_PAIRS(2, 4, 7);
                AMX_PAIRS(3, 5, 7);
            }
            AMX_STORE(0, sums[0], 64); AMX_STORE(1, sums[1], 64); AMX_STORE(2, sums[2], 64); AMX_STORE(3, sums[3], 64);
            for (int64_t i = 0; i < 2 + 2 * two; i++) {
                __m512 outputs[16];
                UNROLL for (int j = 0; j < 16; j++) outputs[j] = _mm512_load_ps(sums[i] + 16 * j);
                const int64_t row = 16 * (b + i / 2), out = i % 2 * 16;
                store_transposed(outputs, a->rows - row, last - o - out, y + row * ldy + o + out - first, ldy);
            }
        }
        amx_end();
    }
    scale_sums(m, a->rows, first, last, y, ldy);
}

/* Codes of an output as unsigned bytes; nibbles in the order of `AS_INT8_SPLIT`: four even inputs of eight, four odd ones. */
static void unsigned_codes(const Matrix *m, int64_t o, uint8_t *to) {
    const uint8_t *row = (const uint8_t *)m->weight + o * row_bytes(m);
    if (m->kind == INT8) {
        for (int64_t k = 0; k < m->in; k++) to[k] = row[k] ^ 0x80;
        return;
    }
    for (int64_t k = 0; k < m->in; k += 8) {
        uint32_t some;
        memcpy(&some, row + k / 2, 4);
        uint64_t codes = (some & 0x0f0f0f0fu) | (uint64_t)(some >> 4 & 0x0f0f0f0fu) << 32;
        memcpy(to + k, &codes, 8);
    }
}

/* The same for int8 activations: sums of ACT_GROUP inputs, exact, are scaled and added as in tiles.h. */
static void byte_tiles(const Matrix *m, const Activations *a, int64_t first, int64_t last, float *y, int64_t ldy,
                       const DecodeScratch *scratch) {
    const int by_row = m->groups == 1;
    const int64_t groups = a->in / ACT_GROUP, G = padded_groups(groups), of_weight = padded_groups(m->groups);
    const int64_t interval = by_row ? groups : m->group / ACT_GROUP, ld = a->in + 64;
    float sums[256] __attribute__((aligned(64)));
    for (int64_t o = first; o < last; o += 16) {
        for (int64_t i = 0; i < 16; i++) {
            const int64_t from = min_i64(o + i, last - 1);
            unsigned_codes(m, from, (uint8_t *)scratch->weight + i * ld);
            read_scales(m, from, scratch->scale + i * of_weight, scratch->zero + i * of_weight);
        }
        amx_begin();
        for (int64_t n = 0; n < a->rows; n += 16) {
            const char *x = (const char *)a->data + n / 16 * groups * 1024;
            const float *step = a->step + n * G, *total = a->total + n * G;
            __m512 out[16];
            UNROLL for (int i = 0; i < 16; i++) out[i] = _mm512_setzero_ps();
            for (int64_t g = 0, s = 0, elapsed = 0; g < groups; g++) {
                AMX_ZERO(0);
                AMX_LOAD(1, scratch->weight + 64 * g, ld);
                AMX_LOAD(2, x + 1024 * g, 64);
                AMX_BYTES(0, 1, 2);
                AMX_STORE(0, sums, 64);
                const __m512 by = _mm512_load_ps(step + 16 * g), all = _mm512_load_ps(total + 16 * g);
                UNROLL for (int i = 0; i < 16; i++) {
                    __m512 codes = _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_load_ps(sums + 16 * i)));
                    if (by_row) { out[i] = _mm512_fmadd_ps(codes, by, out[i]); continue; }
                    out[i] = _mm512_fmadd_ps(all, _mm512_set1_ps(scratch->zero[i * of_weight + s]), out[i]);
                    out[i] = _mm512_fmadd_ps(_mm512_mul_ps(codes, by),
                                             _mm512_set1_ps(scratch->scale[i * of_weight + s]), out[i]);
                }
                if (++elapsed == interval) elapsed = 0, s++;
            }
            if (by_row) UNROLL for (int i = 0; i < 16; i++) {
                __m512 start = _mm512_mul_ps(_mm512_load_ps(total + 16 * groups), _mm512_set1_ps(scratch->zero[i * of_weight]));
                out[i] = _mm512_fmadd_ps(out[i], _mm512_set1_ps(scratch->scale[i * of_weight]), start);
            }
            store_transposed(out, a->rows - n, last - o, y + n * ldy + o - first, ldy);
        }
        amx_end();
    }
}
#endif
