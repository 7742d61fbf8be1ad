/* Products of a few rows with 32 columns: all that matrix products and attention are made of.
 *
 * A tile has R rows of A, each `lda` bytes from the last, and two halves of 16 columns of B. B is a list of blocks of
 * `steps` lines; a line of a half is 64 bytes and holds 16 columns of one k (float32), of two (bf16) or of four
 * (bytes). The next line is `stride` bytes on, the second half `second` bytes from the first. The sums go to `out`,
 * [R, 32] float32 with rows `ldo` floats apart. Rows are independent of each other.
 */
#ifndef SLEB_TILE_H
#define SLEB_TILE_H

#include <stddef.h>

#include "panel.h"
#include "simd.h"

typedef struct {
    const char *a;
    size_t lda;
    const char *const *blocks;
    int32_t num_blocks, steps;
    ptrdiff_t second;
    size_t stride;
    float *out;
    size_t ldo;
    /* A in bytes only: for each row and group of 32 k, rows `ldg` entries apart. See quantise_row. */
    const float *group_scale, *group_offset;
    const int32_t *group_init;
    size_t ldg;
    int32_t group, base; /* B by groups only, see sleb_linear */
} tile;

/* What the 32 registers hold. On Zen 4 the bf16 tile of 12 rows runs at 99 % of what the processor issues, from the
 * second cache; 14 rows are no faster. */
enum { MAX_ROWS = 12, MAX_ROWS_BYTES = 6 };

#define FOR_ROWS UNROLL for (int r = 0; r < R; r++)

INLINE void tile_store(const tile *t, const int R, __m512 acc[][2]) {
    FOR_ROWS {
        _mm512_storeu_ps(t->out + r * t->ldo, acc[r][0]);
        _mm512_storeu_ps(t->out + r * t->ldo + 16, acc[r][1]);
    }
}

#define TILE_BEGIN                                  \
    __m512 acc[MAX_ROWS][2];                        \
    FOR_ROWS acc[r][0] = acc[r][1] = _mm512_setzero_ps(); \
    const size_t lda = t->lda, stride = t->stride;  \
    const char *a0 = t->a, *a3 = a0 + 3 * lda, *a6 = a3 + 3 * lda, *a9 = a6 + 3 * lda; \
    const ptrdiff_t second = t->second;             \
    for (int32_t block = 0; block < t->num_blocks; block++) { \
        const char *b = t->blocks[block];           \
        for (int32_t step = 0; step < t->steps; step++, b += stride)

/* Row r of A: three rows to a pointer, or the compiler runs out of registers for addresses. */
#define A_ROW(r)                      \
    ((r) < 3   ? a0 + (r) * lda       \
     : (r) < 6 ? a3 + ((r) - 3) * lda \
     : (r) < 9 ? a6 + ((r) - 6) * lda \
               : a9 + ((r) - 9) * lda)
#define A_NEXT(bytes) a0 += (bytes), a3 += (bytes), a6 += (bytes), a9 += (bytes)

#define TILE_END \
    }            \
    tile_store(t, R, acc);

#if SLEB_HAS_BF16
/* A bf16 in pairs, B bf16. */
INLINE void tile_bf16(const tile *t, const int R) {
    TILE_BEGIN {
        __m512i b0 = load_i(b), b1 = load_i(b + second);
        FOR_ROWS {
            __m512bh x = (__m512bh)_mm512_set1_epi32(read_i32(A_ROW(r)));
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, (__m512bh)b0);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, (__m512bh)b1);
        }
        A_NEXT(4);
    }
    TILE_END
}
#else
/* A float32, B bf16 in pairs: two numbers of a lane are one shift and one mask away from float32. */
INLINE void tile_bf16(const tile *t, const int R) {
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    TILE_BEGIN {
        __m512i b0 = load_i(b), b1 = load_i(b + second);
        __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(b0, 16));
        __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(b1, 16));
        __m512 odd0 = _mm512_castsi512_ps(_mm512_and_si512(b0, high));
        __m512 odd1 = _mm512_castsi512_ps(_mm512_and_si512(b1, high));
        FOR_ROWS {
            __m512 x = _mm512_set1_ps(read_f32(A_ROW(r))), y = _mm512_set1_ps(read_f32(A_ROW(r) + 4));
            acc[r][0] = _mm512_fmadd_ps(x, even0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(x, even1, acc[r][1]);
            acc[r][0] = _mm512_fmadd_ps(y, odd0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(y, odd1, acc[r][1]);
        }
        A_NEXT(8);
    }
    TILE_END
}
#endif

/* A float32, B float32, or float16 in lines of 32 bytes. */
INLINE void tile_float(const tile *t, const int R, const int is_half) {
    TILE_BEGIN {
        __m512 b0 = is_half ? load_f16(b) : load_f32(b), b1 = is_half ? load_f16(b + second) : load_f32(b + second);
        FOR_ROWS {
            __m512 x = _mm512_set1_ps(read_f32(A_ROW(r)));
            acc[r][0] = _mm512_fmadd_ps(x, b0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(x, b1, acc[r][1]);
        }
        A_NEXT(4);
    }
    TILE_END
}

INLINE void tile_f32(const tile *t, const int R) { tile_float(t, R, 0); }
INLINE void tile_f16(const tile *t, const int R) { tile_float(t, R, 1); }

/* A signed bytes with a scale for each group of 32, B unsigned bytes around 128; `steps` counts groups.
 * The integers start at -128 · Σa, so that they end as Σ a (q - 128). */
INLINE void tile_i8(const tile *t, const int R) {
    __m512 acc[MAX_ROWS][2];
    FOR_ROWS acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    const size_t lda = t->lda;
    const char *a0 = t->a, *a3 = a0 + 3 * lda, *a6 = a3, *a9 = a3, *b = t->blocks[0];
    for (int32_t group = 0; group < t->steps; group++) {
        __m512i sum[MAX_ROWS][2];
        FOR_ROWS sum[r][0] = sum[r][1] = _mm512_set1_epi32(t->group_init[r * t->ldg + group]);
        UNROLL for (int quad = 0; quad < 8; quad++, b += 128) {
            __m512i b0 = load_i(b), b1 = load_i(b + 64);
            FOR_ROWS {
                __m512i x = _mm512_set1_epi32(read_i32(A_ROW(r)));
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], b0, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], b1, x);
            }
            A_NEXT(4);
        }
        FOR_ROWS {
            __m512 scale = _mm512_set1_ps(t->group_scale[r * t->ldg + group]);
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), scale, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), scale, acc[r][1]);
        }
    }
    tile_store(t, R, acc);
}

/* B by groups, as panel.h has them, of nibbles or bytes; a step is 4 · quads inputs, 32 or 16.
 *
 *   minimum        Σ a (s q + m) = s Σ a q + m Σ a
 *   zero, middle   Σ a s (q - z) = s (Σ a q - z Σ a)
 *
 * `group_offset` has Σ a of 32 inputs; that of 16 is a product with ones. */
INLINE void tile_groups(const tile *t, const int R, const int bits, const int quads, const int32_t group_size,
                        const int32_t base) {
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    const int32_t steps = group_size / (4 * quads);
    const ptrdiff_t step_bytes = bits == 4 ? I4_STEP_BYTES : quads * 128, lines = steps * step_bytes;
    __m512 acc[MAX_ROWS][2];
    FOR_ROWS acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    const size_t lda = t->lda;
    const char *a0 = t->a, *a3 = a0 + 3 * lda, *a6 = a3, *a9 = a3, *b = t->blocks[0], *scales = b + lines;
    for (int32_t step = 0, left = steps; step < t->steps; step++) {
        __m512i sum[MAX_ROWS][2], whole[MAX_ROWS];
        FOR_ROWS sum[r][0] = sum[r][1] = whole[r] = _mm512_setzero_si512();
        UNROLL for (int quad = 0; quad < quads; quad += bits == 4 ? 2 : 1, b += 128) {
            __m512i b0 = load_i(b), b1 = load_i(b + 64), high0, high1;
            if (bits == 4) {
                high0 = _mm512_and_si512(_mm512_srli_epi16(b0, 4), nibble);
                high1 = _mm512_and_si512(_mm512_srli_epi16(b1, 4), nibble);
                b0 = _mm512_and_si512(b0, nibble), b1 = _mm512_and_si512(b1, nibble);
            }
            FOR_ROWS {
                __m512i x = _mm512_set1_epi32(read_i32(A_ROW(r)));
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], b0, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], b1, x);
                if (quads == 4) whole[r] = _mm512_dpbusd_epi32(whole[r], ones, x);
                if (bits == 4) {
                    __m512i y = _mm512_set1_epi32(read_i32(A_ROW(r) + 4));
                    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], high0, y);
                    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], high1, y);
                }
            }
            A_NEXT(bits == 4 ? 8 : 4);
        }
        __m512 s0 = load_f16(scales), s1 = load_f16(scales + 32), m0 = _mm512_set1_ps(bits == 4 ? 8.0f : 128.0f), m1 = m0;
        if (base != SLEB_MIDDLE) m0 = load_f16(scales + 64), m1 = load_f16(scales + 96);
        int32_t group = step * quads / 8;
        FOR_ROWS {
            __m512 scale = _mm512_set1_ps(t->group_scale[r * t->ldg + group]);
            __m512 offset = quads == 4 ? _mm512_mul_ps(_mm512_cvtepi32_ps(whole[r]), scale)
                                       : _mm512_set1_ps(t->group_offset[r * t->ldg + group]);
            __m512 d0 = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), scale);
            __m512 d1 = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), scale);
            if (base == SLEB_MINIMUM) {
                acc[r][0] = _mm512_fmadd_ps(m0, offset, _mm512_fmadd_ps(s0, d0, acc[r][0]));
                acc[r][1] = _mm512_fmadd_ps(m1, offset, _mm512_fmadd_ps(s1, d1, acc[r][1]));
            } else {
                acc[r][0] = _mm512_fmadd_ps(s0, _mm512_fnmadd_ps(m0, offset, d0), acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(s1, _mm512_fnmadd_ps(m1, offset, d1), acc[r][1]);
            }
        }
        if (--left == 0) {
            b = scales + (base == SLEB_MIDDLE ? 64 : 128);
            scales = b + lines, left = steps;
        }
    }
    tile_store(t, R, acc);
}

/* The engine's own format: known sizes are faster, and so is a function without the others'. */
INLINE void tile_i4(const tile *t, const int R) { tile_groups(t, R, 4, 8, SLEB_GROUP, SLEB_MINIMUM); }
INLINE void tile_i4_groups(const tile *t, const int R) { tile_groups(t, R, 4, 8, t->group, t->base); }
INLINE void tile_i8_groups(const tile *t, const int R) { tile_groups(t, R, 8, 8, t->group, t->base); }
INLINE void tile_i8_halves(const tile *t, const int R) { tile_groups(t, R, 8, 4, t->group, t->base); }

typedef void (*tile_function)(const tile *);

#define DEFINE(KERNEL, R) \
    static void KERNEL##_##R(const tile *t) { KERNEL(t, R); }
#define DEFINE_6(KERNEL) \
    DEFINE(KERNEL, 1) DEFINE(KERNEL, 2) DEFINE(KERNEL, 3) DEFINE(KERNEL, 4) DEFINE(KERNEL, 5) DEFINE(KERNEL, 6)
#define DEFINE_12(KERNEL) \
    DEFINE_6(KERNEL)      \
    DEFINE(KERNEL, 7) DEFINE(KERNEL, 8) DEFINE(KERNEL, 9) DEFINE(KERNEL, 10) DEFINE(KERNEL, 11) DEFINE(KERNEL, 12)
#define LIST_6(KERNEL) KERNEL##_1, KERNEL##_2, KERNEL##_3, KERNEL##_4, KERNEL##_5, KERNEL##_6
#define LIST_12(KERNEL) \
    LIST_6(KERNEL), KERNEL##_7, KERNEL##_8, KERNEL##_9, KERNEL##_10, KERNEL##_11, KERNEL##_12

DEFINE_12(tile_bf16)
DEFINE_12(tile_f32)
DEFINE_12(tile_f16)
DEFINE_6(tile_i8)
DEFINE_6(tile_i4)
DEFINE_6(tile_i4_groups)
DEFINE_6(tile_i8_groups)
DEFINE_6(tile_i8_halves)

enum { I4_GROUPS = SLEB_I8_HALVES + 1 }; /* four bits in other groups than the engine's own */

/* By format, then by rows - 1. */
static const tile_function TILES[I4_GROUPS + 1][MAX_ROWS] = {
    [SLEB_F32] = {LIST_12(tile_f32)}, [SLEB_F16] = {LIST_12(tile_f16)}, [SLEB_BF16] = {LIST_12(tile_bf16)},
    [SLEB_I8] = {LIST_6(tile_i8)},    [SLEB_I4] = {LIST_6(tile_i4)},
    [SLEB_I8_GROUPS] = {LIST_6(tile_i8_groups)}, [SLEB_I8_HALVES] = {LIST_6(tile_i8_halves)},
    [I4_GROUPS] = {LIST_6(tile_i4_groups)},
};

#endif
