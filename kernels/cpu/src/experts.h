/* Mixtures of experts: which rows each expert gets, and its products over those.
 *
 * A slot is a row of the residual and one of its experts. Slots lie expert by expert, so that an expert's rows are
 * neighbours and its panels pass over them as those of any product do. */
#ifndef SLEB_EXPERTS_H
#define SLEB_EXPERTS_H

#include "gemm.h"
#include "pool.h"
#include "workspace.h"

INLINE int32_t slots_of_row(const sleb_experts *x) { return x->top_k + (x->shared != 0); }

/* The experts of one row by its logits, and their shares: see kernels/reference/experts.py. A row of NaN gets some. */
static void choose_experts(const sleb_experts *x, const float *logits, int32_t *chosen, float *shares) {
    float keys[SLEB_MAX_EXPERTS], top = logits[0], sum = 0.0f, given = 0.0f;
    for (int32_t e = 1; e < x->count; e++) top = logits[e] > top ? logits[e] : top;
    for (int32_t e = 0; e < x->count; e++) sum += keys[e] = expf(logits[e] - top);
    if (x->correction)
        for (int32_t e = 0; e < x->count; e++) keys[e] = keys[e] / sum + x->correction[e];
    uint8_t taken[SLEB_MAX_EXPERTS] = {0};
    for (int32_t j = 0; j < x->top_k; j++) {
        int32_t best = -1;
        for (int32_t e = 0; e < x->count; e++)
            if (!taken[e] && (best < 0 || keys[e] > keys[best])) best = e;
        taken[best] = 1;
        chosen[j] = best;
        given += shares[j] = expf(logits[best] - top) / sum;
    }
    if (x->normalised)
        for (int32_t j = 0; j < x->top_k; j++) shares[j] /= given;
    if (x->shared) {
        chosen[x->top_k] = x->count;
        shares[x->top_k] = x->shared == SLEB_SHARED_GATED ? 1.0f / (1.0f + expf(-logits[x->count])) : 1.0f;
    }
}

/* From the choices of `rows` to slots, and to how many tasks the first products of the experts are. */
static void lay_out_slots(const sleb_experts *x, sleb_slots *s, int32_t rows) {
    int32_t per = slots_of_row(x), count = x->count + (x->shared != 0);
    memset(s->starts, 0, (size_t)(count + 1) * sizeof(int32_t));
    for (int32_t i = 0; i < rows * per; i++) s->starts[s->chosen[i] + 1]++;
    for (int32_t e = 0; e < count; e++) s->starts[e + 1] += s->starts[e];
    memcpy(s->tasks, s->starts, (size_t)count * sizeof(int32_t)); /* where each expert's next slot is */
    for (int32_t i = 0; i < rows * per; i++) {
        int32_t slot = s->tasks[s->chosen[i]]++;
        s->slots[i] = slot, s->rows[slot] = i / per, s->slot_shares[slot] = s->shares[i];
    }
    s->tasks[0] = 0;
    for (int32_t e = 0; e < count; e++)
        s->tasks[e + 1] = s->tasks[e] + num_panels(&x->up[e]) * ceil_div(s->starts[e + 1] - s->starts[e], BLOCK_ROWS);
}

/* Rows [first, first + rows) times one panel, a block of them after another. */
static void multiply_rows(const sleb_linear *w, const operand *x, const epilogue *e, int32_t panel, int32_t first,
                          int32_t rows, sleb_local *local) {
    int32_t blocks = ceil_div(rows, BLOCK_ROWS);
    for (int32_t block = 0; block < blocks; block++)
        multiply_panel(w, x, e, panel, first + rows * block / blocks, first + rows * (block + 1) / blocks, local);
}

/* The slots of every expert times its `up`; a barrier must follow. */
static void multiply_up(sleb_pool *pool, const sleb_experts *x, const sleb_slots *s, const operand *in,
                        const epilogue *e, sleb_local *local) {
    int32_t count = x->count + (x->shared != 0), expert = 0, begin, end;
    while (sleb_take(pool, s->tasks[count], &begin, &end))
        for (int32_t task = begin; task < end; task++) {
            while (task >= s->tasks[expert + 1]) expert++;
            int32_t first = s->starts[expert], rows = s->starts[expert + 1] - first, blocks = ceil_div(rows, BLOCK_ROWS);
            int32_t own = task - s->tasks[expert], block = own % blocks;
            multiply_panel(&x->up[expert], in, e, own / blocks, first + rows * block / blocks,
                           first + rows * (block + 1) / blocks, local);
        }
}

/* The slots of every expert times its `down`, added to the rows that they are of: a panel is one thread's for all
 * experts, so that no two add to the same place, and in the same order each time. A barrier must follow. */
static void multiply_down(sleb_pool *pool, const sleb_experts *x, const sleb_slots *s, const operand *in,
                          const epilogue *e, sleb_local *local) {
    int32_t count = x->count + (x->shared != 0), begin, end;
    while (sleb_take(pool, num_panels(&x->down[0]), &begin, &end))
        for (int32_t expert = 0; expert < count; expert++)
            for (int32_t panel = begin; panel < end && s->starts[expert + 1] > s->starts[expert]; panel++)
                multiply_rows(&x->down[expert], in, e, panel, s->starts[expert],
                              s->starts[expert + 1] - s->starts[expert], local);
}

#endif
