/* Matrix products with packed weights: operands, tiles, what happens to the sums. */

/* Rows ready to be multiplied: float32, bf16, or signed bytes with scales by groups of 32. */
enum { ROWS_F32, ROWS_BF16, ROWS_BYTES };

typedef struct {
    int32_t kind;
    const char *data;
    size_t stride; /* bytes from row to row */
    const float *scale, *offset;
    const int32_t *init;
    size_t groups; /* entries from row to row */
} operand;

/* From how many rows on widening a panel to bf16 and multiplying by tiles of AMX beats the dot products of bytes. */
enum { WIDEN_FROM = 16, AMX_FROM = 5 };

INLINE int32_t operand_kind(int32_t format, int32_t rows) {
    if (format == SLEB_I8 || format == SLEB_I4) return SLEB_HAS_AMX && rows >= WIDEN_FROM ? ROWS_BF16 : ROWS_BYTES;
    return SLEB_HAS_BF16 && format == SLEB_BF16 ? ROWS_BF16 : ROWS_F32;
}

/* Whether a product's operand is what a kernel before it can write itself. */
INLINE size_t element_bytes(int32_t kind) { return kind == ROWS_F32 ? 4 : kind == ROWS_BF16 ? 2 : 1; }

INLINE void store_row(char *out, int32_t kind, int32_t at, __m512 x, __mmask16 mask) {
    if (kind == ROWS_BF16)
        _mm256_mask_storeu_epi16(out + 2 * (size_t)at, mask, to_bf16(x));
    else
        _mm512_mask_storeu_ps(out + 4 * (size_t)at, mask, x);
}

/* Symmetric by groups of 32: a = scale q, q in [-127, 127]. `init` and `offset` carry the group's sum to where a
 * product corrects for B's zero point or minimum. */
static void quantise_row(const float *x, int32_t features, int8_t *q, float *scale, float *offset, int32_t *init) {
    for (int32_t at = 0, group = 0; at < features; at += SLEB_GROUP, group++) {
        int32_t left = features - at;
        __m512 x0 = _mm512_maskz_loadu_ps(tail_mask(left), x + at);
        __m512 x1 = _mm512_maskz_loadu_ps(left > 16 ? tail_mask(left - 16) : 0, x + at + 16);
        float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
        if (_mm512_cmp_ps_mask(x0, x1, _CMP_UNORD_Q)) top = NAN; /* a byte cannot say it, so the scale does */
        __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
        __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse));
        __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse));
        _mm_storeu_si128((__m128i *)(q + at), _mm512_cvtsepi32_epi8(q0));
        _mm_storeu_si128((__m128i *)(q + at + 16), _mm512_cvtsepi32_epi8(q1));
        int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1));
        scale[group] = top / 127.0f;
        offset[group] = top / 127.0f * (float)sum;
        init[group] = -128 * sum;
    }
}

static void norm_row(const float *x, int32_t features, int32_t norm_kind, const sleb_norm *norm, float eps, float *out) {
    __m512 sum = _mm512_setzero_ps();
    float mean = 0.0f;
    if (norm_kind == SLEB_NORM_LAYER) {
        for (int32_t at = 0; at < features; at += 16)
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tail_mask(features - at), x + at));
        mean = _mm512_reduce_add_ps(sum) / (float)features;
        sum = _mm512_setzero_ps();
    }
    const __m512 centre = _mm512_set1_ps(mean);
    for (int32_t at = 0; at < features; at += 16) {
        __mmask16 mask = tail_mask(features - at);
        __m512 v = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + at), centre);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)features + eps));
    for (int32_t at = 0; at < features; at += 16) {
        __mmask16 mask = tail_mask(features - at);
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + at), centre), factor);
        if (norm->weight) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm->weight + at));
        if (norm->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, norm->bias + at));
        _mm512_mask_storeu_ps(out + at, mask, v);
    }
}

/* One row x [features], normed if there is a norm, as row `row` of an operand. `scratch` holds a row in float32. */
static void prepare_row(const float *x, int32_t features, int32_t norm_kind, const sleb_norm *norm, float eps,
                        float *scratch, int32_t row, operand *into) {
    char *out = (char *)into->data + (size_t)row * into->stride;
    const float *ready = x;
    if (norm) {
        float *target = into->kind == ROWS_F32 ? (float *)out : scratch;
        norm_row(x, features, norm_kind, norm, eps, target);
        if (into->kind == ROWS_F32) {
            memset(target + features, 0, (size_t)(round_up(features, SLEB_GROUP) - features) * 4);
            return;
        }
        ready = scratch;
    }
    if (into->kind == ROWS_BYTES) {
        size_t at = (size_t)row * into->groups;
        quantise_row(ready, features, (int8_t *)out, (float *)into->scale + at, (float *)into->offset + at,
                     (int32_t *)into->init + at);
        return;
    }
    for (int32_t at = 0; at < round_up(features, SLEB_GROUP); at += 16) {
        __mmask16 mask = at < features ? tail_mask(features - at) : 0;
        store_row(out, into->kind, at, _mm512_maskz_loadu_ps(mask, ready + at), 0xffff);
    }
}

/* What becomes of the sums of a row: written, added to the residual, activated into the next operand, or compared. */
enum { TO_STORE, TO_ADD, TO_ACTIVATE, TO_HEAD };

typedef struct {
    int32_t target, activation, kind; /* kind: of the rows that TO_ACTIVATE writes */
    char *out;
    size_t stride; /* bytes; TO_HEAD: of logits */
    float *best;   /* TO_HEAD, or NULL */
    int32_t *best_index;
} epilogue;

INLINE void finish_head(const epilogue *e, const sleb_linear *w, int32_t row, int32_t panel, __m512 x0, __m512 x1) {
    int32_t column = panel * SLEB_PANEL, left = w->n - column;
    __mmask16 m0 = tail_mask(left), m1 = left > 16 ? tail_mask(left - 16) : 0;
    if (e->out) {
        float *out = (float *)(e->out + (size_t)row * e->stride) + column;
        _mm512_mask_storeu_ps(out, m0, x0);
        _mm512_mask_storeu_ps(out + 16, m1, x1);
    }
    if (!e->best) return;
    const __m512 least = _mm512_set1_ps(-INFINITY);
    x0 = _mm512_mask_mov_ps(least, m0, x0), x1 = _mm512_mask_mov_ps(least, m1, x1);
    float top = _mm512_reduce_max_ps(_mm512_max_ps(x0, x1));
    /* Of equal ones the first, in whatever order the panels come. */
    if (top > e->best[row] || (top == e->best[row] && column < e->best_index[row])) {
        uint32_t equal = _mm512_cmp_ps_mask(x0, _mm512_set1_ps(top), _CMP_EQ_OQ) |
                         (uint32_t)_mm512_cmp_ps_mask(x1, _mm512_set1_ps(top), _CMP_EQ_OQ) << 16;
        equal &= m0 | (uint32_t)m1 << 16; /* where all are NaN the padding is the highest */
        if (!equal) return;
        e->best[row] = top;
        e->best_index[row] = column + __builtin_ctz(equal);
    }
}

INLINE void finish_row(const epilogue *e, const sleb_linear *w, int32_t row, int32_t panel, __m512 x0, __m512 x1) {
    size_t packed = (size_t)panel * SLEB_PANEL;
    if (w->scale) {
        x0 = _mm512_mul_ps(x0, load_f32(w->scale + packed));
        x1 = _mm512_mul_ps(x1, load_f32(w->scale + packed + 16));
    }
    if (w->bias) {
        x0 = _mm512_add_ps(x0, load_f32(w->bias + packed));
        x1 = _mm512_add_ps(x1, load_f32(w->bias + packed + 16));
    }
    char *out = e->out + (size_t)row * e->stride;
    if (e->target == TO_HEAD) {
        finish_head(e, w, row, panel, x0, x1);
    } else if (w->gated) {
        int32_t column = panel * 16;
        store_row(out, e->kind, column, _mm512_mul_ps(activate_ps(x0, e->activation), x1),
                  tail_mask(w->n / 2 - column));
    } else {
        int32_t column = panel * SLEB_PANEL, left = w->n - column;
        __mmask16 m0 = tail_mask(left), m1 = left > 16 ? tail_mask(left - 16) : 0;
        if (e->target == TO_ACTIVATE) {
            store_row(out, e->kind, column, activate_ps(x0, e->activation), m0);
            store_row(out, e->kind, column + 16, activate_ps(x1, e->activation), m1);
            return;
        }
        float *sums = (float *)out + column;
        if (e->target == TO_ADD) {
            x0 = _mm512_add_ps(x0, _mm512_maskz_loadu_ps(m0, sums));
            x1 = _mm512_add_ps(x1, _mm512_maskz_loadu_ps(m1, sums + 16));
        }
        _mm512_mask_storeu_ps(sums, m0, x0);
        _mm512_mask_storeu_ps(sums + 16, m1, x1);
    }
}

INLINE int32_t num_panels(const sleb_linear *w) {
    return w->gated ? ceil_div(w->n / 2, 16) : ceil_div(w->n, SLEB_PANEL);
}

INLINE size_t panel_bytes(const sleb_linear *w) {
    size_t kp = (size_t)round_up(w->k, SLEB_GROUP);
    switch (w->format) {
    case SLEB_F32: return kp * SLEB_PANEL * 4;
    case SLEB_I8: return kp * SLEB_PANEL;
    case SLEB_I4: return kp / SLEB_GROUP * I4_GROUP_BYTES;
    default: return kp * SLEB_PANEL * 2;
    }
}

#include "amx.h"

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
              .second = 64, .stride = 128, .steps = kp, .ldg = x->groups};
    if (w->format == SLEB_F16) t.second = 32, t.stride = 64;
    if (w->format == SLEB_BF16) t.steps = kp / 2;
    if (x->kind == ROWS_BYTES) t.steps = kp / SLEB_GROUP;
    for (int32_t number = 0; number < num_tiles; number++) {
        int32_t row = first + rows * number / num_tiles, end = first + rows * (number + 1) / num_tiles;
        t.a = x->data + (size_t)row * x->stride;
        if (x->kind == ROWS_BYTES) {
            size_t at = (size_t)row * x->groups;
            t.group_scale = x->scale + at, t.group_offset = x->offset + at, t.group_init = x->init + at;
        }
        TILES[w->format][end - row - 1](&t);
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
