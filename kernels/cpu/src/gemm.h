/* Matrix products with packed weights: rows by panels, shared between the threads. */
#ifndef SLEB_GEMM_H
#define SLEB_GEMM_H

#include "amx.h"
#include "epilogue.h"
#include "operand.h"
#include "panel.h"
#include "pool.h"
#include "simd.h"
#include "tile.h"
#include "workspace.h"

/* Rows [first, last) times one panel. */
static void multiply_panel(const sleb_linear *w, const operand *x, const epilogue *e, int32_t panel, int32_t first,
                           int32_t last, sleb_local *local) {
    const char *data = (const char *)w->data + (size_t)panel * panel_bytes(w);
#if SLEB_HAS_AMX
    if (x->kind == ROWS_BF16 && last - first >= AMX_FROM) {
        multiply_panel_amx(w, data, x, e, panel, first, last, local);
        return;
    }
#endif
    int32_t kp = round_up(w->k, SLEB_GROUP), rows = last - first;
    int32_t most = x->kind == ROWS_BYTES ? MAX_ROWS_BYTES : MAX_ROWS, num_tiles = ceil_div(rows, most);
    const char *blocks[1] = {data};
    tile t = {.blocks = blocks, .num_blocks = 1, .out = local->tile, .ldo = SLEB_PANEL, .lda = x->stride,
              .second = 64, .stride = 128, .steps = kp, .ldg = x->groups,
              .group = w->group, .base = w->base};
    if (w->format == SLEB_F16) t.second = 32, t.stride = 64;
    if (w->format == SLEB_BF16) t.steps = kp / 2;
    if (x->kind == ROWS_BYTES) t.steps = kp / (w->format == SLEB_I8_HALVES ? SLEB_GROUP / 2 : SLEB_GROUP);
    int32_t own = w->base == SLEB_MINIMUM && w->group == SLEB_GROUP;
    const tile_function *tiles = TILES[w->format == SLEB_I4 && !own ? I4_GROUPS : w->format];
    for (int32_t number = 0; number < num_tiles; number++) {
        int32_t row = first + rows * number / num_tiles, end = first + rows * (number + 1) / num_tiles;
        t.a = x->data + (size_t)row * x->stride;
        if (x->kind == ROWS_BYTES) {
            size_t at = (size_t)row * x->groups;
            t.group_scale = x->scale + at, t.group_offset = x->offset + at, t.group_init = x->init + at;
        }
        tiles[end - row - 1](&t);
        for (int32_t r = row; r < end; r++) {
            const float *sums = local->tile + (size_t)(r - row) * SLEB_PANEL;
            finish_row(e, w, r, panel, load_f32(sums), load_f32(sums + 16));
        }
    }
}

/* Rows whose operand stays in the second cache while panel after panel passes over them. More where there are tiles: a
 * panel that must be widened for them is widened once a block, and the processors that have them have larger caches. */
enum { BLOCK_ROWS = SLEB_HAS_AMX ? 256 : 96 };

/* All rows times all panels, shared between the threads; a barrier must follow. */
static void multiply(sleb_pool *pool, const sleb_linear *w, const operand *x, const epilogue *e, int32_t rows,
                     sleb_local *local) {
    int32_t blocks = ceil_div(rows, BLOCK_ROWS), begin, end;
    while (sleb_take(pool, num_panels(w) * blocks, &begin, &end))
        for (int32_t task = begin; task < end; task++) {
            int32_t block = task % blocks;
            multiply_panel(w, x, e, task / blocks, rows * block / blocks, rows * (block + 1) / blocks, local);
        }
}

#endif
