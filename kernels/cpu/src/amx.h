/* Products by the tile unit: 32 rows times a panel. Where SLEB_AMX_EMULATED is set the instructions are functions in C
 * that do what the manual says (Intel 64 and IA-32 SDM, volume 2, TDPBF16PS), for machines without the unit. */
#ifndef SLEB_AMX_H
#define SLEB_AMX_H

#include "epilogue.h"
#include "operand.h"
#include "panel.h"
#include "simd.h"
#include "workspace.h"

#if SLEB_HAS_AMX

enum { TILE_ROWS = 16, AMX_FROM = 5 }; /* AMX_FROM: rows from which the tile unit beats dot products */

#if SLEB_AMX_EMULATED

static _Thread_local struct {
    _Alignas(64) uint8_t row[TILE_ROWS][64];
} emulated[8];

#define TILE_ZERO(t) memset(&emulated[t], 0, sizeof emulated[t])
#define TILE_LOAD(t, from, stride)              \
    for (int32_t row_ = 0; row_ < TILE_ROWS; row_++) \
    memcpy(emulated[t].row[row_], (const char *)(from) + row_ * (size_t)(stride), 64)
#define TILE_STORE(t, to, stride)               \
    for (int32_t row_ = 0; row_ < TILE_ROWS; row_++) \
    memcpy((char *)(to) + row_ * (size_t)(stride), emulated[t].row[row_], 64)
#define TILE_DPBF16(c, a, b) emulated_dpbf16(c, a, b)

static void emulated_dpbf16(int32_t c, int32_t a, int32_t b) {
    for (int32_t m = 0; m < TILE_ROWS; m++) {
        float *sums = (float *)emulated[c].row[m];
        const uint16_t *x = (const uint16_t *)emulated[a].row[m];
        for (int32_t k = 0; k < 16; k++) {
            const uint16_t *y = (const uint16_t *)emulated[b].row[k];
            for (int32_t n = 0; n < 16; n++) {
                sums[n] += bf16_to_f32(x[2 * k]) * bf16_to_f32(y[2 * n]);
                sums[n] += bf16_to_f32(x[2 * k + 1]) * bf16_to_f32(y[2 * n + 1]);
            }
        }
    }
}

INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}

#else

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_DPBF16(c, a, b) _tile_dpbf16ps(c, a, b)

/* Eight full tiles: 16 rows of 64 bytes. A thread holds them from the beginning of a step to its end. */
INLINE void tiles_begin(void) {
    _Alignas(64) uint8_t config[64] = {0};
    config[0] = 1; /* the palette */
    for (int32_t t = 0; t < 8; t++) {
        config[16 + 2 * t] = 64;
        config[48 + t] = TILE_ROWS;
    }
    /* GCC 12 declares that only 8 of these bytes are read, and may drop the stores of the rest. */
    __asm__ volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
}
INLINE void tiles_end(void) { _tile_release(); }

#endif

/* Sums [32, 32] in tiles 0 to 3, or [16, 32] in 0 and 1 where there are no more rows. A has as many readable rows. */
INLINE void tiles_zero(int32_t rows) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (rows > TILE_ROWS) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
}

/* Adds 32 k: A [rows, 32] times 16 lines of each half of B. */
INLINE void tiles_add(const char *a, size_t lda, const char *b0, const char *b1, size_t stride, int32_t rows) {
    TILE_LOAD(6, b0, stride);
    TILE_LOAD(7, b1, stride);
    TILE_LOAD(4, a, lda);
    TILE_DPBF16(0, 4, 6);
    TILE_DPBF16(1, 4, 7);
    if (rows > TILE_ROWS) {
        TILE_LOAD(5, a + TILE_ROWS * lda, lda);
        TILE_DPBF16(2, 5, 6);
        TILE_DPBF16(3, 5, 7);
    }
}

INLINE void tiles_store(int32_t rows, float *sums, size_t lds) {
    TILE_STORE(0, sums, lds * 4);
    TILE_STORE(1, sums + 16, lds * 4);
    if (rows > TILE_ROWS) {
        TILE_STORE(2, sums + TILE_ROWS * lds, lds * 4);
        TILE_STORE(3, sums + TILE_ROWS * lds + 16, lds * 4);
    }
}

/* Probabilities [rows, keys] times values, in pages of `lines` pairs of keys; pages shorter than a tile are joined. */
INLINE void tiles_mix(const char *probs, size_t lda, const char *const *pages, int32_t num_pages, int32_t lines,
                      size_t stride, int32_t rows, char *scratch, float *sums) {
    tiles_zero(rows);
    for (int32_t line = 0; line < num_pages * lines; line += TILE_ROWS) {
        const char *b = pages[line / lines] + line % lines * stride;
        size_t step = stride;
        if (lines < TILE_ROWS) {
            for (int32_t i = 0; i < TILE_ROWS; i++) {
                int32_t page = (line + i) / lines;
                const char *from = page < num_pages ? pages[page] + (line + i) % lines * stride : NULL;
                __m512i zero = _mm512_setzero_si512();
                _mm512_store_si512(scratch + 128 * i, from ? load_i(from) : zero);
                _mm512_store_si512(scratch + 128 * i + 64, from ? load_i(from + 64) : zero);
            }
            b = scratch, step = 128;
        }
        tiles_add(probs + 4 * (size_t)line, lda, b, b + 64, step, rows);
    }
    tiles_store(rows, sums, SLEB_PANEL);
}

/* A line of bf16 pairs from two k of 16 columns in float32. */
INLINE __m512i pair_bf16(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32(to_bf16(even)), high = _mm512_cvtepu16_epi32(to_bf16(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Byte i of each lane. */
INLINE __m512 byte_of(__m512i x, int32_t i) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi32(8 * i)), _mm512_set1_epi32(255)));
}

/* A panel of bytes or nibbles as bf16 lines, [kp / 2, 2, 16, 2]. The scale of a column of bytes comes later. */
static void widen_panel(const sleb_linear *w, const char *data, char *out) {
    int32_t kp = round_up(w->k, SLEB_GROUP);
    const __m512i nibble = _mm512_set1_epi8(15);
    if (w->format == SLEB_I8) {
        const __m512 zero = _mm512_set1_ps(128.0f);
        for (int32_t k = 0; k < kp; k += 4, data += 128, out += 256)
            for (int32_t half = 0; half < 2; half++) {
                __m512i q = load_i(data + 64 * half);
                __m512 x[4];
                for (int32_t i = 0; i < 4; i++) x[i] = _mm512_sub_ps(byte_of(q, i), zero);
                _mm512_storeu_si512(out + 64 * half, pair_bf16(x[0], x[1]));
                _mm512_storeu_si512(out + 128 + 64 * half, pair_bf16(x[2], x[3]));
            }
        return;
    }
    int32_t is_i4 = w->format == SLEB_I4;
    for (int32_t k = 0; k < kp; k += w->group, data += group_bytes(w)) {
        const char *scales = data + line_bytes(w), *line = data;
        for (int32_t at = 0; at < min_i(w->group, kp - k); at += 4, out += 256)
            for (int32_t half = 0; half < 2; half++) {
                __m512 s = load_f16(scales + 32 * half), m = _mm512_set1_ps(is_i4 ? 8.0f : 128.0f);
                if (w->base != SLEB_MIDDLE) m = load_f16(scales + 64 + 32 * half);
                if (w->base != SLEB_MINIMUM) m = _mm512_fnmadd_ps(s, m, _mm512_setzero_ps());
                __m512i q = load_i(line + (is_i4 ? at / 8 : at / 4) * 128 + 64 * half);
                if (is_i4) q = _mm512_and_si512(at % 8 ? _mm512_srli_epi16(q, 4) : q, nibble);
                __m512 x[4];
                for (int32_t i = 0; i < 4; i++) x[i] = _mm512_fmadd_ps(byte_of(q, i), s, m);
                _mm512_storeu_si512(out + 64 * half, pair_bf16(x[0], x[1]));
                _mm512_storeu_si512(out + 128 + 64 * half, pair_bf16(x[2], x[3]));
            }
    }
}

static void multiply_panel_amx(const sleb_linear *w, const char *data, const operand *x, const epilogue *e,
                               int32_t panel, int32_t first, int32_t last, sleb_local *local) {
    if (w->format != SLEB_BF16) {
        widen_panel(w, data, local->panel);
        data = local->panel;
    }
    int32_t kp = round_up(w->k, SLEB_GROUP);
    for (int32_t row = first; row < last; row += 2 * TILE_ROWS) {
        int32_t rows = min_i(2 * TILE_ROWS, last - row);
        const char *a = x->data + (size_t)row * x->stride, *b = data;
        tiles_zero(rows);
        for (int32_t k = 0; k < kp; k += 32, a += 64, b += 2048) tiles_add(a, x->stride, b, b + 64, 128, rows);
        tiles_store(rows, local->tile, SLEB_PANEL);
        for (int32_t r = 0; r < rows; r++) {
            const float *sums = local->tile + r * SLEB_PANEL;
            finish_row(e, w, row + r, panel, load_f32(sums), load_f32(sums + 16));
        }
    }
}

#else

INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}

#endif

#endif
