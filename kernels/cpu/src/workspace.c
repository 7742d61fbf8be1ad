/* How much memory a step needs, and where each buffer lies in it. */
#include "workspace.h"

#include <stdlib.h>

#include "pool.h"

size_t sleb_sample_bytes(int32_t vocab_size) {
    size_t padded = sleb_sample_padded(vocab_size);
    /* 20 bytes a value, a float64 sum and the maxima of 16 lanes for each 256, and the buckets. */
    size_t bytes = padded * 20 + padded / SLEB_SUM_VALUES * (8 + 64) + SLEB_BUCKETS * 8;
    return (bytes + 4095) / 4096 * 4096; /* no two threads share a line, nor a prefetched one */
}

typedef struct {
    char *at;
    size_t used;
} arena;

static void *carve(arena *a, size_t bytes) {
    void *memory = a->at ? a->at + a->used : NULL;
    a->used += (bytes + 63) / 64 * 64;
    return memory;
}

/* As many bytes as a row of `features` can take; see row_bytes in forward.h. */
static size_t padded_row(size_t features) { return (features + 31) / 32 * 32 * 4 + 64; }

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

/* Lays out all buffers; with a NULL arena it only counts. */
static void lay_out(sleb_workspace *ws, arena *a, const sleb_model *m, size_t widest, size_t activated, size_t samples,
                    size_t sequences) {
    size_t rows = (size_t)m->max_tokens + SLEB_ATTENTION_ROWS, heads = (size_t)m->num_heads;
    size_t padded = (size_t)(m->head_dim + 15) / 16 * 16, dim = (size_t)m->head_dim, kv = (size_t)m->num_kv_heads;
    size_t group = heads / kv, threads = (size_t)m->pool->num_threads, hidden = (size_t)m->hidden_size;
    size_t keys = SLEB_ATTENTION_KEYS, piece_rows = SLEB_ATTENTION_ROWS;
    size_t wide = padded_row(widest), groups = (widest + 31) / 32, token_rows = max_size(rows, samples);
    ws->residual = carve(a, rows * hidden * 4);
    ws->first = carve(a, rows * max_size((heads + 2 * kv) * dim, hidden) * 4);
    ws->query = carve(a, (rows * heads + piece_rows) * padded * 4);
    ws->attended = carve(a, rows * padded_row(heads * dim));
    size_t slots = rows * (size_t)m->expert_slots, experts = (size_t)m->router_size + 2;
    ws->activated = carve(a, max_size(rows, slots) * padded_row(activated));
    token_rows = max_size(token_rows, slots);
    ws->operand = carve(a, (token_rows + piece_rows) * wide);
    ws->group_scale = carve(a, token_rows * groups * 4);
    ws->group_offset = carve(a, token_rows * groups * 4);
    ws->group_init = carve(a, token_rows * groups * 4);
    ws->slots.logits = carve(a, rows * (size_t)m->router_size * 4);
    ws->slots.chosen = carve(a, slots * 4), ws->slots.slots = carve(a, slots * 4);
    ws->slots.shares = carve(a, slots * 4), ws->slots.slot_shares = carve(a, slots * 4);
    ws->slots.rows = carve(a, slots * 4);
    ws->slots.starts = carve(a, experts * 4), ws->slots.tasks = carve(a, experts * 4);
    ws->head_rows = carve(a, samples * hidden * 4);
    ws->max_partials = (int32_t)(8 * threads);
    /* A sequence's rows in pieces of 12 or more, the last one shorter, and what splits add. */
    size_t pieces = rows * group / 12 + sequences * (group / 12 + 2) + 8 * threads + 1;
    ws->pieces = carve(a, pieces * sizeof(sleb_piece));
    ws->piece_ends = carve(a, (sequences + 1) * sizeof(int32_t));
    ws->partials = carve(a, (size_t)ws->max_partials * kv * piece_rows * (padded + 2) * 4);
    ws->locals = carve(a, threads * sizeof(sleb_local));
    for (size_t t = 0; t < threads; t++) {
        sleb_local local;
        local.few = carve(a, (SLEB_FEW_ROWS + piece_rows) * wide);
        local.few_scale = carve(a, SLEB_FEW_ROWS * groups * 4);
        local.few_offset = carve(a, SLEB_FEW_ROWS * groups * 4);
        local.few_init = carve(a, SLEB_FEW_ROWS * groups * 4);
        local.row = carve(a, (max_size(widest, padded + (heads + 2 * kv) * dim) + 64) * 4);
        local.tile = carve(a, 32 * SLEB_PANEL * 4);
        local.panel = carve(a, max_size((widest + 31) / 32 * 32 * SLEB_PANEL * 2, 16 * 128));
        local.best = carve(a, samples * 4);
        local.best_index = carve(a, samples * 4);
        local.scores = carve(a, piece_rows * keys * 4);
        local.probs = carve(a, piece_rows * keys * 4);
        local.mixed = carve(a, piece_rows * padded * 4);
        local.wide = carve(a, m->kv_int8 ? 2 * keys * padded * 4 : 0);
        local.kv_scale = carve(a, 2 * keys * 4);
        local.stats = carve(a, 2 * piece_rows * 4);
        carve(a, 4096); /* what one thread writes shares no line, nor a prefetched one, with another's */
        if (a->at) ws->locals[t] = local;
    }
}

sleb_workspace *sleb_workspace_create(const sleb_model *m, int32_t widest, int32_t activated, int32_t samples,
                                      int32_t sequences, size_t *bytes) {
    sleb_workspace *ws = calloc(1, sizeof *ws);
    if (ws == NULL) return NULL;
    arena counting = {NULL, 0};
    lay_out(ws, &counting, m, (size_t)widest, (size_t)activated, (size_t)samples, (size_t)sequences);
    arena real = {sleb_map(counting.used, 1), 0};
    if (real.at == NULL) {
        free(ws);
        return NULL;
    }
    lay_out(ws, &real, m, (size_t)widest, (size_t)activated, (size_t)samples, (size_t)sequences);
    *bytes = counting.used;
    return ws;
}

void sleb_workspace_destroy(sleb_workspace *ws, size_t bytes) {
    sleb_unmap(ws->residual, bytes); /* the first buffer is where the memory begins */
    free(ws);
}

const float *sleb_workspace_residual(const sleb_workspace *ws) { return ws->residual; }
