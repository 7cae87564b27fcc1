/* Formats of activations as inputs of a product: float32; bfloat16; and for quantised weights, 16-bit fixed point split
 * into two planes of signed bytes, x ~ step * (256 high + low), so that byte products (AVX512-VNNI) are exact. With
 * step = max|x| / 32512 the error of x is at most step / 2, and the error of the whole vector is below that of
 * rounding it to bfloat16. Without such products (AVX2) the same fixed point
 * stays in words of 16 bits, but for nibbles. With int8 activations (W8A8, W4A8) they are one plane of signed bytes with a step for each
 * ACT_GROUP inputs, for the products of tiles.h.
 */
#pragma once
#include "common.h"

#define MIN_ROWS_DECODED 8 /* from here on, decoding codes to bfloat16 is faster than multiplying with them */
#define MIN_ROWS_INT8 5  /* from here on, int8 products are faster (where the model allows them) */

#define ACT_GROUP 64        /* inputs per step of int8 activations */

typedef enum { AS_FLOAT32, AS_BFLOAT16, AS_BYTE_PLANES, AS_NIBBLE_PLANES, AS_INT8, AS_INT8_SPLIT,
               AS_WORDS,
               AS_QUARTER_PLANES, AS_QUARTER_WORDS,
               AS_HALF_TILES, AS_INT8_TILES, AS_INT8_SPLIT_TILES } Format;    /* those of amx.h */

INLINE int is_tiled(Format format) { return format >= AS_HALF_TILES; }

typedef struct {
    Format format;
    int64_t rows, in, stride, group, groups;  /* stride: of a row, in elements of its type */
    void *data;
    float *step, *total;                      /* (rows), and sums of codes (rows, groups padded to 16); in eight bits */
                                              /* both (rows, in / EIGHTS padded), sums times steps, then their sum */
} Activations;

INLINE int64_t padded_groups(int64_t groups) { return round_up(groups, 16) + 16; }

/* Of weights of two or three bits four codes lie in a byte, so inputs are parted by their number modulo 4. */
static Format format_for(const Matrix *m, int64_t rows, int64_t half, int64_t int8_activations, int64_t tile_rows) {
#ifdef AMX
    if (m->kind == FLOAT32) return AS_FLOAT32;
    if (int8_activations && rows >= MIN_ROWS_INT8 && (m->kind == INT8 || m->kind == INT4) && m->in % ACT_GROUP == 0
        && (m->groups == 1 || m->group % ACT_GROUP == 0))
        return m->kind == INT8 ? AS_INT8_TILES : AS_INT8_SPLIT_TILES;
    if (tile_rows && rows >= tile_rows && m->in % 32 == 0 && (half || m->kind == BFLOAT16)) return AS_HALF_TILES;
#endif
#ifdef __AVX512BF16__
    if (m->kind == FLOAT32) return AS_FLOAT32;
    if (m->kind == BFLOAT16) return AS_BFLOAT16;
#ifdef __AVX512VNNI__
    if (int8_activations && rows >= MIN_ROWS_INT8 && m->kind < TWO_BITS && m->in % ACT_GROUP == 0
        && (m->groups == 1 || m->group % ACT_GROUP == 0))
        return m->kind == INT8 ? AS_INT8 : AS_INT8_SPLIT;
    if (half && rows >= MIN_ROWS_DECODED) return AS_BFLOAT16;
    if (half && m->kind >= TWO_BITS) return AS_QUARTER_PLANES;
    if (half) return m->kind == INT8 ? AS_BYTE_PLANES : AS_NIBBLE_PLANES;
#endif
#endif
#ifndef __AVX512F__
    if (half && rows < MIN_ROWS_DECODED && m->kind == INT8) return AS_WORDS;
    if (half && rows < MIN_ROWS_DECODED && m->kind == INT4) return AS_NIBBLE_PLANES;
    if (half && rows < MIN_ROWS_DECODED && m->kind >= TWO_BITS) return AS_QUARTER_WORDS;
#endif
    (void)m, (void)rows, (void)half, (void)int8_activations, (void)tile_rows;
    return AS_FLOAT32;
}

/* The row's largest absolute value over 32512, so that both planes stay within a signed byte. */
static float fixed_step(const float *x, int64_t n) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        /* max keeps its second operand if one is NaN: the NaN must survive into the step */
        __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(n - k), x + k));
        top = _mm512_mask_mov_ps(_mm512_max_ps(top, v), _mm512_cmp_ps_mask(top, top, _CMP_UNORD_Q), top);
    }
    float lanes[16], largest = 0;
    _mm512_storeu_ps(lanes, top);
    for (int i = 0; i < 16; i++) largest = lanes[i] > largest || lanes[i] != lanes[i] ? lanes[i] : largest;
    return largest / 32512.0f;
}

/* To the nearest integer; NaN becomes 0 (the step is NaN then, and so is what is multiplied with it). */
INLINE __m512i code16(__m512 x) { return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }

INLINE __m512i fixed16(const float *x, int64_t k, int64_t n, __m512 inverse) {
    return code16(_mm512_mul_ps(_mm512_maskz_loadu_ps(tail16(n - k), x + k), inverse));
}

/* int8: x ~ step * code within each ACT_GROUP inputs. A NaN makes the step NaN, and with it the sums. */
static void convert_rows_int8(Activations *a, const float *x, int64_t ldx, int64_t from, int64_t to) {
    const int64_t groups = a->in / ACT_GROUP, G = padded_groups(groups);
    const int tiled = is_tiled(a->format), split_codes = a->format == AS_INT8_SPLIT || a->format == AS_INT8_SPLIT_TILES;
    a->stride = a->in + 64;
    /* even inputs of eight, then odd ones: the two are packed in the same bytes of the weight */
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int64_t n = from; n < to; n++) {
        int8_t *out = (int8_t *)a->data + n * a->stride;
        /* Of tiles: (rows / 16, groups, 16 words of four codes, 16 rows), and of steps and totals (rows / 16, G, 16). */
        char *tile = (char *)a->data + n / 16 * groups * 1024 + n % 16 * 4;
        const int64_t at = tiled ? n / 16 * 16 * G + n % 16 : n * G, next = tiled ? 16 : 1;
        float row_total = 0;
        for (int64_t g = 0; g < groups; g++) {
            __m512 v[4], top = _mm512_setzero_ps();
            __mmask16 odd = 0;
            UNROLL for (int i = 0; i < 4; i++) {
                v[i] = _mm512_loadu_ps(x + n * ldx + g * ACT_GROUP + 16 * i);
                top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
                odd |= _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q);
            }
            float largest = odd ? NAN : _mm512_reduce_max_ps(top), step = largest / 127.0f;
            __m512 inverse = _mm512_set1_ps(step > 0 ? 127.0f / largest : 0.0f);
            __m512i sum = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < 4; i++) {
                __m512i code = code16(_mm512_mul_ps(v[i], inverse));
                __m128i bytes = _mm512_cvtepi32_epi8(code);
                sum = _mm512_add_epi32(sum, code);
                if (split_codes) bytes = _mm_shuffle_epi8(bytes, split);
                if (!tiled) {
                    _mm_store_si128((__m128i *)(out + g * ACT_GROUP + 16 * i), bytes);
                    continue;
                }
                int32_t word[4];
                _mm_storeu_si128((__m128i *)word, bytes);
                for (int j = 0; j < 4; j++) memcpy(tile + g * 1024 + (4 * i + j) * 64, word + j, 4);
            }
            a->step[at + g * next] = step;
            row_total += a->total[at + g * next] = step * (float)_mm512_reduce_add_epi32(sum);
        }
        a->total[at + groups * next] = row_total;
    }
}

/* bfloat16 for tiles: (rows / 16, inputs / 32, 16 pairs, 16 rows); `from` is a multiple of 16, rows past the last are 0. */
static void convert_rows_to_tiles(Activations *a, const float *x, int64_t ldx, int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n += 16) {
        char *tile = (char *)a->data + n / 16 * (a->in / 32) * 1024;
        for (int64_t k = 0; k < a->in; k += 32, tile += 1024) {
            uint16_t pairs[16][32] __attribute__((aligned(64))) = {{0}};
            __m512 rows[16], transposed[16];
            for (int64_t i = 0; i < min_i64(16, to - n); i++) UNROLL for (int j = 0; j < 2; j++) {
                __m512 v = _mm512_maskz_loadu_ps(0xffff, x + (n + i) * ldx + k + 16 * j);
                _mm256_storeu_si256((__m256i *)(pairs[i] + 16 * j), narrow(v));
            }
            UNROLL for (int i = 0; i < 16; i++) rows[i] = _mm512_load_ps((const float *)pairs[i]);
            transpose16(rows, transposed);
            UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_ps((float *)(tile + 64 * i), transposed[i]);
        }
    }
}

/* Convert rows from .. to - 1 of `rows` rows of x (stride ldx) to the format that products with `m` take. */
static void convert_rows(Activations *a, Format format, const Matrix *m, const float *x, int64_t ldx, int64_t rows,
                         int64_t from, int64_t to) {
    int64_t in = m->in;
    a->format = format, a->rows = rows, a->in = in, a->group = m->group, a->groups = m->groups;
    if (format == AS_FLOAT32 || format == AS_BFLOAT16) {
        /* One cache line more than a multiple of 4 KiB, so that rows do not map to the same sets of L1. */
        a->stride = round_up(in, 64) + (format == AS_FLOAT32 ? 16 : 32);
        for (int64_t n = from; n < to; n++)
            for (int64_t k = 0; k < round_up(in, 32); k += 16) {
                __m512 v = _mm512_maskz_loadu_ps(k < in ? tail16(in - k) : 0, x + n * ldx + k);
                if (format == AS_FLOAT32) _mm512_store_ps((float *)a->data + n * a->stride + k, v);
                else _mm256_store_si256((__m256i *)((uint16_t *)a->data + n * a->stride + k), narrow(v));
            }
        return;
    }
    if (format == AS_HALF_TILES) { convert_rows_to_tiles(a, x, ldx, from, to); return; }
    if (format == AS_INT8 || format == AS_INT8_SPLIT || is_tiled(format)) { convert_rows_int8(a, x, ldx, from, to); return; }
    int64_t plane = round_up(in, format == AS_QUARTER_PLANES ? 256 : 128), G = padded_groups(m->groups);
    a->stride = 2 * plane + 64;
    for (int64_t n = from; n < to; n++) {
        const float *row = x + n * ldx;
        int8_t *out = (int8_t *)a->data + n * a->stride;
        float step = fixed_step(row, in);
        __m512 inverse = _mm512_set1_ps(step > 0 ? 1.0f / step : 0.0f);
        a->step[n] = step;
        memset(a->total + n * G, 0, G * sizeof(float));
        const int parted_plane = format == AS_NIBBLE_PLANES || format == AS_QUARTER_PLANES;
        for (int64_t k = 0; k < plane; k += 16) {
            __m512i code = k < in ? fixed16(row, k, in, inverse) : _mm512_setzero_si512();
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
            __m512i low = _mm512_sub_epi32(code, _mm512_slli_epi32(high, 8));
            if (k < in) a->total[n * G + k / m->group] += (float)_mm512_reduce_add_epi32(code);
#ifndef __AVX512F__
            if (format == AS_WORDS) {
                _mm256_storeu_si256((__m256i *)((int16_t *)out + k), signed_words(code));
                continue;
            }
            if (format == AS_QUARTER_WORDS) {
                int16_t words[16], *start = (int16_t *)out + k / 64 * 64;
                _mm256_storeu_si256((__m256i *)words, signed_words(code));
                for (int i = 0; i < 16; i++) start[16 * (i % 4) + (k % 64 + i) / 4] = words[i];
                continue;
            }
#endif
            __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(low);
            if (!parted_plane) {
                _mm_store_si128((__m128i *)(out + k), h);
                _mm_store_si128((__m128i *)(out + plane + k), l);
                continue;
            }
            if (format == AS_QUARTER_PLANES) {
                const __m128i parted = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                int8_t high_of[16], low_of[16];
                _mm_storeu_si128((__m128i *)high_of, _mm_shuffle_epi8(h, parted));
                _mm_storeu_si128((__m128i *)low_of, _mm_shuffle_epi8(l, parted));
                for (int j = 0; j < 4; j++) {
                    memcpy(out + j * plane / 4 + k / 4, high_of + 4 * j, 4);
                    memcpy(out + plane + j * plane / 4 + k / 4, low_of + 4 * j, 4);
                }
                continue;
            }
            /* even inputs, then odd ones: the two are packed in the same byte of the weight */
            const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            h = _mm_shuffle_epi8(h, split), l = _mm_shuffle_epi8(l, split);
            _mm_storel_epi64((__m128i *)(out + k / 2), h);
            _mm_storel_epi64((__m128i *)(out + plane / 2 + k / 2), _mm_srli_si128(h, 8));
            _mm_storel_epi64((__m128i *)(out + plane + k / 2), l);
            _mm_storel_epi64((__m128i *)(out + plane + plane / 2 + k / 2), _mm_srli_si128(l, 8));
        }
    }
}
