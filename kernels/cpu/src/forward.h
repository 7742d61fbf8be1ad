/* One step: every unit over the rows that run it, then the head over the rows that sample. All threads walk the
 * same plan; what follows a barrier may read what any thread wrote before it. The whole step is one call, because a
 * block is seven phases of a few to a few hundred microseconds, too short for a dispatch each. */
#ifndef SLEB_FORWARD_H
#define SLEB_FORWARD_H

#include "amx.h"
#include "attention.h"
#include "epilogue.h"
#include "experts.h"
#include "gemm.h"
#include "operand.h"
#include "panel.h"
#include "pool.h"
#include "simd.h"
#include "workspace.h"

typedef struct {
    const sleb_model *model;
    const sleb_step *step;
} pass;

/* Bytes from row to row. Not a multiple of 1 KiB, or the rows of a tile would compete for the same cache sets. */
INLINE size_t row_bytes(int32_t features, int32_t kind) {
    size_t bytes = (size_t)round_up(features, SLEB_GROUP) * element_bytes(kind);
    return bytes % 1024 ? bytes : bytes + 64;
}

/* Zeroes what lies between the features of each row and its padded end: weights are 0 there, but 0 · NaN is not. */
static void clear_padding(char *data, int32_t features, int32_t kind, int32_t rows) {
    size_t used = (size_t)features * element_bytes(kind);
    size_t whole = (size_t)round_up(features, SLEB_GROUP) * element_bytes(kind);
    for (int32_t row = 0; used < whole && row < rows; row++)
        memset(data + row * row_bytes(features, kind) + used, 0, whole - used);
}

INLINE operand whole_operand(sleb_workspace *ws, int32_t kind, int32_t features) {
    return (operand){kind, ws->operand, row_bytes(features, kind), ws->group_scale, ws->group_offset, ws->group_init,
                     (size_t)ceil_div(features, SLEB_GROUP)};
}

/* x [rows, features], normed if there is a norm, as operand of `w`. A few rows each thread prepares for itself, which
 * is faster than to wait for one another. */
static operand prepare(const sleb_model *m, const sleb_linear *w, const sleb_norm *norm, const float *x, size_t stride,
                       int32_t rows, sleb_local *local) {
    int32_t kind = operand_kind(w->format, rows);
    operand into = whole_operand(m->workspace, kind, w->k);
    if (rows <= SLEB_FEW_ROWS) {
        into.data = local->few;
        into.scale = local->few_scale, into.offset = local->few_offset, into.init = local->few_init;
        for (int32_t row = 0; row < rows; row++)
            prepare_row(x + (size_t)row * stride, w->k, norm, m->norm_eps, local->row, row, &into);
        return into;
    }
    int32_t begin, end;
    while (sleb_take(m->pool, rows, &begin, &end))
        for (int32_t row = begin; row < end; row++)
            prepare_row(x + (size_t)row * stride, w->k, norm, m->norm_eps, local->row, row, &into);
    sleb_barrier(m->pool);
    return into;
}

/* Rows that the kernel before has written to `data`: the operand itself, or float32 still to be quantised. */
static operand written(const sleb_model *m, const sleb_linear *w, char *data, int32_t kind, int32_t rows,
                       sleb_local *local) {
    size_t stride = row_bytes(w->k, kind);
    if (operand_kind(w->format, rows) == kind) return (operand){kind, data, stride, NULL, NULL, NULL, 0};
    return prepare(m, w, NULL, (const float *)data, stride / 4, rows, local);
}

/* What the kernel before a product writes: the operand itself, or float32 where it must be quantised first. */
INLINE int32_t written_kind(const sleb_linear *w, int32_t rows) {
    return operand_kind(w->format, rows) == ROWS_BF16 ? ROWS_BF16 : ROWS_F32;
}

/* residual += what rows `x` give by a sublayer's second product, normed first where the model norms its updates. */
static void add_update(const sleb_model *m, const sleb_unit *u, const operand *x, int32_t rows, sleb_local *local) {
    sleb_workspace *ws = m->workspace;
    int32_t features = m->hidden_size, begin, end;
    epilogue e = {.target = TO_ADD, .factor = m->residual_scale, .out = (char *)ws->residual,
                  .stride = (size_t)features * 4};
    if (u->post_norm.kind) e.target = TO_STORE, e.out = (char *)ws->first;
    multiply(m->pool, &u->second, x, &e, rows, local);
    sleb_barrier(m->pool);
    if (!u->post_norm.kind) return;
    while (sleb_take(m->pool, rows, &begin, &end))
        for (size_t at = (size_t)begin * features; begin < end; begin++, at += features)
            add_normed_row(ws->residual + at, ws->first + at, features, &u->post_norm, m->norm_eps, m->residual_scale);
    sleb_barrier(m->pool);
}

INLINE operand prepare_residual(const sleb_model *m, const sleb_unit *u, int32_t rows, sleb_local *local) {
    return prepare(m, &u->first, &u->norm, m->workspace->residual, m->hidden_size, rows, local);
}

static void project_heads(const sleb_model *m, const sleb_unit *u, const operand *x, int32_t rows, sleb_local *local) {
    epilogue store = {.target = TO_STORE, .out = (char *)m->workspace->first, .stride = (size_t)u->first.n * 4};
    multiply(m->pool, &u->first, x, &store, rows, local);
    sleb_barrier(m->pool);
}

static void attend_and_add(const pass *p, const sleb_unit *u, int32_t sequences, int32_t rows, sleb_local *local,
                           int32_t index) {
    const sleb_model *m = p->model;
    sleb_workspace *ws = m->workspace;
    int32_t kind = written_kind(&u->second, rows);
    if (index == 0) clear_padding(ws->attended, u->second.k, kind, rows);
    attention at = {m, u, p->step, ws->first, ws->query, ws->attended, row_bytes(u->second.k, kind), kind, rows,
                    sequences};
    attend(&at, local);
    operand x = written(m, &u->second, ws->attended, kind, rows, local);
    add_update(m, u, &x, rows, local);
}

static void activate(const sleb_model *m, const sleb_unit *u, const operand *x, int32_t rows, sleb_local *local,
                     int32_t index) {
    sleb_workspace *ws = m->workspace;
    int32_t kind = written_kind(&u->second, rows);
    if (index == 0) clear_padding(ws->activated, u->second.k, kind, rows);
    epilogue act = {.target = TO_ACTIVATE, .activation = u->activation, .kind = kind, .out = ws->activated,
                    .stride = row_bytes(u->second.k, kind)};
    multiply(m->pool, &u->first, x, &act, rows, local);
    sleb_barrier(m->pool);
}

static void add_activated(const sleb_model *m, const sleb_unit *u, int32_t rows, sleb_local *local) {
    operand x = written(m, &u->second, m->workspace->activated, written_kind(&u->second, rows), rows, local);
    add_update(m, u, &x, rows, local);
}

static void run_attention(const pass *p, const sleb_unit *u, int32_t sequences, int32_t rows, sleb_local *local,
                          int32_t index) {
    operand x = prepare_residual(p->model, u, rows, local);
    project_heads(p->model, u, &x, rows, local);
    attend_and_add(p, u, sequences, rows, local, index);
}

static void run_mlp(const pass *p, const sleb_unit *u, int32_t rows, sleb_local *local, int32_t index) {
    operand x = prepare_residual(p->model, u, rows, local);
    activate(p->model, u, &x, rows, local, index);
    add_activated(p->model, u, rows, local);
}

/* Row `row` of the residual, normed, as the operand of each of its slots. */
static void fill_slots(const sleb_model *m, const sleb_unit *u, int32_t row, operand *into, sleb_local *local) {
    const int32_t per = slots_of_row(u->experts), *slots = m->workspace->slots.slots + (size_t)row * per;
    prepare_row(m->workspace->residual + (size_t)row * m->hidden_size, m->hidden_size, &u->norm, m->norm_eps, local->row,
                slots[0], into);
    for (int32_t j = 1; j < per; j++) {
        size_t from = (size_t)slots[0] * into->groups, to = (size_t)slots[j] * into->groups;
        memcpy((char *)into->data + (size_t)slots[j] * into->stride,
               into->data + (size_t)slots[0] * into->stride, into->stride);
        if (into->kind != ROWS_BYTES) continue;
        memcpy((float *)into->scale + to, into->scale + from, into->groups * 4);
        memcpy((float *)into->offset + to, into->offset + from, into->groups * 4);
        memcpy((int32_t *)into->init + to, into->init + from, into->groups * 4);
    }
}

/* As clear_padding, for slots whose experts may differ in width. */
static void clear_slots(const sleb_experts *x, const sleb_slots *s, char *data, size_t stride, int32_t kind) {
    for (int32_t e = 0; e < x->count + (x->shared != 0); e++) {
        size_t used = (size_t)x->down[e].k * element_bytes(kind);
        size_t whole = (size_t)round_up(x->down[e].k, SLEB_GROUP) * element_bytes(kind);
        for (int32_t slot = s->starts[e]; used < whole && slot < s->starts[e + 1]; slot++)
            memset(data + (size_t)slot * stride + used, 0, whole - used);
    }
}

/* The choice of a few rows, and their operands, one thread makes for all: that is faster than to share it. Operands are
 * of the kind for one row, since how many an expert gets is not known before. */
static void run_experts(const sleb_model *m, const sleb_unit *u, int32_t rows, sleb_local *local, int32_t index) {
    const sleb_experts *x = u->experts;
    sleb_workspace *ws = m->workspace;
    sleb_slots *s = &ws->slots;
    int32_t per = slots_of_row(x), few = rows <= SLEB_FEW_ROWS, begin, end;
    int32_t features = max_i(x->down[0].k, x->down[x->count + (x->shared != 0) - 1].k);
    operand in = prepare(m, &x->router, &u->norm, ws->residual, m->hidden_size, rows, local);
    epilogue store = {.target = TO_STORE, .out = (char *)s->logits, .stride = (size_t)x->router.n * 4};
    multiply(m->pool, &x->router, &in, &store, rows, local);
    sleb_barrier(m->pool);
    if (!few) {
        while (sleb_take(m->pool, rows, &begin, &end))
            for (int32_t row = begin; row < end; row++)
                choose_experts(x, s->logits + (size_t)row * x->router.n, s->chosen + (size_t)row * per,
                               s->shares + (size_t)row * per);
        sleb_barrier(m->pool);
    }
    in = whole_operand(ws, operand_kind(x->up[0].format, 1), m->hidden_size);
    if (index == 0) {
        for (int32_t row = 0; few && row < rows; row++)
            choose_experts(x, s->logits + (size_t)row * x->router.n, s->chosen + (size_t)row * per,
                           s->shares + (size_t)row * per);
        lay_out_slots(x, s, rows);
        for (int32_t row = 0; few && row < rows; row++) fill_slots(m, u, row, &in, local);
    }
    sleb_barrier(m->pool);
    if (!few) {
        while (sleb_take(m->pool, rows, &begin, &end))
            for (int32_t row = begin; row < end; row++) fill_slots(m, u, row, &in, local);
        sleb_barrier(m->pool);
    }
    int32_t kind = written_kind(&x->down[0], 1);
    size_t stride = row_bytes(features, kind);
    if (index == 0) clear_slots(x, s, ws->activated, stride, kind);
    epilogue act = {.target = TO_ACTIVATE, .activation = u->activation, .kind = kind, .out = ws->activated,
                    .stride = stride};
    multiply_up(m->pool, x, s, &in, &act, local);
    sleb_barrier(m->pool);
    in = (operand){kind, ws->activated, stride, NULL, NULL, NULL, 0};
    if (operand_kind(x->down[0].format, 1) != kind) {
        in = whole_operand(ws, operand_kind(x->down[0].format, 1), features);
        while (sleb_take(m->pool, rows * per, &begin, &end))
            for (int32_t slot = begin; slot < end; slot++)
                prepare_row((const float *)(ws->activated + (size_t)slot * stride), features, NULL, m->norm_eps,
                            local->row, slot, &in);
        sleb_barrier(m->pool);
    }
    epilogue add = {.target = TO_ADD, .factor = m->residual_scale, .rows = s->rows, .shares = s->slot_shares,
                    .out = (char *)ws->residual, .stride = (size_t)m->hidden_size * 4};
    multiply_down(m->pool, x, s, &in, &add, local);
    sleb_barrier(m->pool);
}

/* Attention and MLP of a block that read the same residual: both first products come before either adds to it. */
static void run_parallel(const pass *p, const sleb_unit *u, int32_t sequences, int32_t rows, sleb_local *local,
                         int32_t index) {
    const sleb_model *m = p->model;
    const sleb_unit *mlp = u + 1;
    operand x = prepare_residual(m, u, rows, local);
    project_heads(m, u, &x, rows, local);
    if (mlp->norm.weight != u->norm.weight || mlp->norm.bias != u->norm.bias || mlp->first.format != u->first.format)
        x = prepare_residual(m, mlp, rows, local);
    activate(m, mlp, &x, rows, local, index);
    attend_and_add(p, u, sequences, rows, local, index);
    add_activated(m, mlp, rows, local);
}

/* Over rows [first, first + rows) of the residual. */
static void run_patch(const pass *p, const sleb_unit *u, int32_t first, int32_t rows, sleb_local *local,
                      int32_t index) {
    const sleb_model *m = p->model;
    sleb_workspace *ws = m->workspace;
    float *residual = ws->residual + (size_t)first * m->hidden_size;
    if (u->scale) {
        int32_t begin, end;
        while (sleb_take(m->pool, rows, &begin, &end))
            for (int32_t row = begin; row < end; row++)
                scale_row(residual + (size_t)row * m->hidden_size, m->hidden_size, u->scale, u->shift);
        sleb_barrier(m->pool);
        return;
    }
    int32_t is_full = u->first.data == NULL;
    operand x = prepare(m, is_full ? &u->second : &u->first, &u->norm, residual, m->hidden_size, rows, local);
    if (!is_full) {
        int32_t kind = written_kind(&u->second, rows);
        if (index == 0) clear_padding(ws->activated, u->second.k, kind, rows);
        epilogue store = {.target = TO_ACTIVATE, .activation = SLEB_IDENTITY, .kind = kind, .out = ws->activated,
                          .stride = row_bytes(u->second.k, kind)};
        multiply(m->pool, &u->first, &x, &store, rows, local);
        sleb_barrier(m->pool);
        x = written(m, &u->second, ws->activated, kind, rows, local);
    } else if (rows <= SLEB_FEW_ROWS) {
        sleb_barrier(m->pool); /* each thread has read, on its own, what the product now adds to */
    }
    epilogue add = {.target = TO_ADD, .factor = 1.0f, .out = (char *)residual, .stride = (size_t)m->hidden_size * 4};
    multiply(m->pool, &u->second, &x, &add, rows, local);
    sleb_barrier(m->pool);
}

/* The row of token `id` in the packed head, in the order of features. */
static void unpack_row(const sleb_linear *w, int32_t id, float *out) {
    int32_t panel = id / SLEB_PANEL, half = id % SLEB_PANEL / 16, lane = id % 16;
    const char *data = (const char *)w->data + (size_t)panel * panel_bytes(w);
    float scale = w->scale ? w->scale[id] : 1.0f;
    for (size_t line = (size_t)half * 64; line < panel_bytes(w); line += 128) /* far apart, so ask for all at once */
        _mm_prefetch(data + line, _MM_HINT_T0);
    for (int32_t k = 0; k < w->k; k++) {
        if (w->format == SLEB_F32) {
            out[k] = read_f32(data + ((size_t)k * 32 + half * 16 + lane) * 4);
        } else if (w->format == SLEB_I8) {
            uint8_t q = *(const uint8_t *)(data + (size_t)(k / 4) * 128 + half * 64 + lane * 4 + k % 4);
            out[k] = scale * (float)(q - 128);
        } else if (w->format > SLEB_I8) {
            int32_t is_i4 = w->format == SLEB_I4, at = k % w->group;
            const char *group = data + (size_t)(k / w->group) * group_bytes(w);
            uint8_t q = *(const uint8_t *)(group + at / (is_i4 ? 8 : 4) * 128 + half * 64 + lane * 4 + at % 4);
            if (is_i4) q = k % 8 >= 4 ? q >> 4 : q & 15;
            const char *scales = group + line_bytes(w) + half * 32 + lane * 2;
            uint16_t s, least;
            memcpy(&s, scales, 2);
            float base = is_i4 ? 8.0f : 128.0f;
            if (w->base != SLEB_MIDDLE) memcpy(&least, scales + 64, 2), base = _cvtsh_ss(least);
            out[k] = w->base == SLEB_MINIMUM ? _cvtsh_ss(s) * (float)q + base : _cvtsh_ss(s) * ((float)q - base);
        } else {
            size_t at = w->format == SLEB_F16 ? (size_t)k * 32 + half * 16 + lane
                                              : ((size_t)(k / 2) * 32 + half * 16 + lane) * 2 + k % 2;
            uint16_t bits;
            memcpy(&bits, data + at * 2, 2);
            out[k] = w->format == SLEB_F16 ? _cvtsh_ss(bits) : bf16_to_f32(bits);
        }
    }
}

static void embed_row(const sleb_model *m, int32_t id, int32_t position, float *out) {
    int32_t features = m->hidden_size;
    if (m->embed_packed) {
        unpack_row(&m->head, id, out);
    } else {
        size_t at = (size_t)id * features;
        const char *from = m->embed;
        for (int32_t d = 0; d < features; d += 16) {
            __mmask16 mask = tail_mask(features - d);
            __m512 x;
            if (m->embed_format == SLEB_F32)
                x = _mm512_maskz_loadu_ps(mask, from + (at + d) * 4);
            else if (m->embed_format == SLEB_F16)
                x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + (at + d) * 2));
            else
                x = _mm512_castsi512_ps(_mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + (at + d) * 2)), 16));
            _mm512_mask_storeu_ps(out + d, mask, x);
        }
    }
    if (m->embed_scale != 1.0f)
        for (int32_t d = 0; d < features; d++) out[d] *= m->embed_scale;
    if (m->position_embed) {
        const float *add = (const float *)m->position_embed + (size_t)(position + m->position_offset) * features;
        for (int32_t d = 0; d < features; d++) out[d] += add[d];
    }
}

/* rows [rows, E] through the final norm and the head: logits, the highest of each row (-1 where it is infinite or any
 * is NaN), or both. */
static void run_head(const sleb_model *m, const float *from, int32_t rows, float *logits, int32_t *argmax,
                     sleb_local *local, int32_t index) {
    operand x = prepare(m, &m->head, &m->final_norm, from, m->hidden_size, rows, local);
    epilogue e = {.target = TO_HEAD, .softcap = m->logit_softcap, .out = (char *)logits,
                  .stride = (size_t)m->vocab_size * 4};
    if (argmax) {
        e.best = local->best, e.best_index = local->best_index;
        for (int32_t row = 0; row < rows; row++) e.best[row] = -INFINITY, e.best_index[row] = INT32_MAX;
    }
    multiply(m->pool, &m->head, &x, &e, rows, local);
    sleb_barrier(m->pool);
    if (!argmax || index != 0) return;
    for (int32_t row = 0; row < rows; row++) {
        float best = -INFINITY;
        int32_t found = INT32_MAX;
        for (int32_t t = 0; t < m->pool->num_threads; t++) {
            const sleb_local *other = &m->workspace->locals[t];
            if (other->best_index[row] == INT32_MAX) continue;
            if (!(other->best[row] < best) && (other->best[row] != best || other->best_index[row] < found))
                best = other->best[row], found = other->best_index[row];
            if (isnan(best)) break;
        }
        argmax[row] = isfinite(best) ? found : -1;
    }
}

static void forward_thread(void *argument, int32_t index) {
    const pass *p = argument;
    const sleb_model *m = p->model;
    const sleb_step *s = p->step;
    sleb_workspace *ws = m->workspace;
    sleb_local *local = &ws->locals[index];
    int32_t begin, end;
    tiles_begin();
    while (sleb_take(m->pool, s->num_tokens, &begin, &end))
        for (int32_t token = begin; token < end; token++)
            embed_row(m, s->token_ids[token], s->positions[token], ws->residual + (size_t)token * m->hidden_size);
    if (index == 0) plan_pieces(m, s, ws);
    sleb_barrier(m->pool);
    for (int32_t number = 0; number < m->num_units; number++) {
        const sleb_unit *u = &m->units[number];
        int32_t sequences = s->unit_ends[number], first = s->query_starts[s->unit_starts[number]];
        int32_t rows = s->query_starts[sequences] - first;
        if (rows == 0) continue;
        if (u->kind == SLEB_ATTENTION && u->parallel)
            run_parallel(p, u, sequences, rows, local, index), number++;
        else if (u->kind == SLEB_ATTENTION)
            run_attention(p, u, sequences, rows, local, index);
        else if (u->kind == SLEB_MLP && u->experts)
            run_experts(m, u, rows, local, index);
        else if (u->kind == SLEB_MLP)
            run_mlp(p, u, rows, local, index);
        else
            run_patch(p, u, first, rows, local, index);
    }
    if (s->num_samples > 0) {
        while (sleb_take(m->pool, s->num_samples, &begin, &end))
            for (int32_t row = begin; row < end; row++)
                memcpy(ws->head_rows + (size_t)row * m->hidden_size,
                       ws->residual + (size_t)s->samples[row] * m->hidden_size, (size_t)m->hidden_size * 4);
        sleb_barrier(m->pool);
        run_head(m, ws->head_rows, s->num_samples, s->logits, s->argmax, local, index);
    }
    tiles_end();
}

static int32_t forward(const sleb_model *m, const sleb_step *s) {
    pass p = {m, s};
    sleb_pool_run(m->pool, forward_thread, &p);
    return 0;
}

typedef struct {
    const sleb_model *model;
    const float *rows;
    int32_t num_rows;
    float *logits;
    int32_t *argmax;
} head_call;

static void head_thread(void *argument, int32_t index) {
    const head_call *c = argument;
    tiles_begin();
    run_head(c->model, c->rows, c->num_rows, c->logits, c->argmax, &c->model->workspace->locals[index], index);
    tiles_end();
}

static int32_t head(const sleb_model *m, const float *rows, int32_t num_rows, float *logits, int32_t *argmax) {
    head_call c = {m, rows, num_rows, logits, argmax};
    sleb_pool_run(m->pool, head_thread, &c);
    return 0;
}

/* --- single operators, as the tests and the benchmark of kernels call them --- */

typedef struct {
    const sleb_model *model;
    const sleb_unit *unit;
    const sleb_step *step;
    const float *x;
    const sleb_linear *linear;
    const sleb_norm *norm;
    int32_t rows, target, activation;
    float *out;
} operator_call;

static void linear_thread(void *argument, int32_t index) {
    const operator_call *c = argument;
    const sleb_model *m = c->model;
    sleb_local *local = &m->workspace->locals[index];
    tiles_begin();
    operand x = prepare(m, c->linear, c->norm, c->x, c->linear->k, c->rows, local);
    int32_t columns = c->linear->gated ? c->linear->n / 2 : c->linear->n;
    epilogue e = {.target = c->target, .activation = c->activation, .kind = ROWS_F32, .factor = m->residual_scale,
                  .out = (char *)c->out, .stride = (size_t)columns * 4};
    multiply(m->pool, c->linear, &x, &e, c->rows, local);
    sleb_barrier(m->pool);
    tiles_end();
}

/* x [rows, k], normed if `norm` is not NULL, times `w`; target: 0 store, 1 add to out (times the residual_scale), 2
 * store activated. */
static int32_t linear(const sleb_model *m, const sleb_norm *norm, const sleb_linear *w, const float *x, int32_t rows,
                      int32_t target, int32_t activation, float *out) {
    operator_call c = {.model = m, .x = x, .linear = w, .norm = norm, .rows = rows, .target = target,
                       .activation = activation, .out = out};
    sleb_pool_run(m->pool, linear_thread, &c);
    return 0;
}

static void attention_thread(void *argument, int32_t index) {
    const operator_call *c = argument;
    const sleb_model *m = c->model;
    tiles_begin();
    if (index == 0) plan_pieces(m, c->step, m->workspace);
    sleb_barrier(m->pool);
    size_t stride = (size_t)m->num_heads * m->head_dim * 4;
    attention at = {m, c->unit, c->step, c->x, m->workspace->query, (char *)c->out, stride, ROWS_F32,
                    c->step->num_tokens, c->step->num_sequences};
    attend(&at, &m->workspace->locals[index]);
    tiles_end();
}

/* qkv [T, (H + 2K) · D] to attended heads [T, H · D]; keys and values are stored. */
static int32_t attention_op(const sleb_model *m, const sleb_unit *u, const sleb_step *s, const float *qkv, float *out) {
    operator_call c = {.model = m, .unit = u, .step = s, .x = qkv, .out = out};
    sleb_pool_run(m->pool, attention_thread, &c);
    return 0;
}

#endif
