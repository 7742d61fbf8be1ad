/* What becomes of the sums of a product. */
#ifndef SLEB_EPILOGUE_H
#define SLEB_EPILOGUE_H

#include "operand.h"
#include "simd.h"

/* A row's sums are written, added to the residual, activated into the next operand, or compared. */
enum { TO_STORE, TO_ADD, TO_ACTIVATE, TO_HEAD };

typedef struct {
    int32_t target, activation, kind; /* kind: of the rows that TO_ACTIVATE writes */
    char *out;
    size_t stride; /* bytes; TO_HEAD: of logits */
    float factor;  /* TO_ADD: of the sums */
    const int32_t *rows; /* where each row goes, or NULL: to its own place */
    const float *shares; /* of each row, with `rows`: a factor on its sums */
    float softcap; /* TO_HEAD: of the logits, 0 for none; the order of them stays */
    float *best;   /* TO_HEAD, or NULL */
    int32_t *best_index;
} epilogue;

INLINE void finish_head(const epilogue *e, const sleb_linear *w, int32_t row, int32_t panel, __m512 x0, __m512 x1) {
    int32_t column = panel * SLEB_PANEL, left = w->n - column;
    __mmask16 m0 = tail_mask(left), m1 = left > 16 ? tail_mask(left - 16) : 0;
    if (e->out) {
        float *out = (float *)(e->out + (size_t)row * e->stride) + column;
        _mm512_mask_storeu_ps(out, m0, e->softcap > 0.0f ? softcap_ps(x0, 1.0f / e->softcap, e->softcap) : x0);
        _mm512_mask_storeu_ps(out + 16, m1, e->softcap > 0.0f ? softcap_ps(x1, 1.0f / e->softcap, e->softcap) : x1);
    }
    if (!e->best) return;
    const __m512 least = _mm512_set1_ps(-INFINITY);
    x0 = _mm512_mask_mov_ps(least, m0, x0), x1 = _mm512_mask_mov_ps(least, m1, x1);
    if (_mm512_cmp_ps_mask(x0, x1, _CMP_UNORD_Q)) { /* nothing is above or equal to it, so it stays */
        e->best[row] = NAN, e->best_index[row] = column;
        return;
    }
    float top = _mm512_reduce_max_ps(_mm512_max_ps(x0, x1));
    /* Of equal ones the first, in whatever order the panels come. */
    if (top > e->best[row] || (top == e->best[row] && column < e->best_index[row])) {
        uint32_t equal = _mm512_cmp_ps_mask(x0, _mm512_set1_ps(top), _CMP_EQ_OQ) |
                         (uint32_t)_mm512_cmp_ps_mask(x1, _mm512_set1_ps(top), _CMP_EQ_OQ) << 16;
        equal &= m0 | (uint32_t)m1 << 16; /* where all are -inf the padding is as high */
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
    char *out = e->out + (size_t)(e->rows ? e->rows[row] : row) * e->stride;
    if (e->target == TO_HEAD) {
        finish_head(e, w, row, panel, x0, x1);
    } else if (w->gated) {
        int32_t column = panel * 16;
        store_row(out, e->kind, column, gate_ps(x0, x1, e->activation), tail_mask(w->n / 2 - column));
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
            const __m512 factor = _mm512_set1_ps(e->rows ? e->factor * e->shares[row] : e->factor);
            x0 = _mm512_fmadd_ps(x0, factor, _mm512_maskz_loadu_ps(m0, sums));
            x1 = _mm512_fmadd_ps(x1, factor, _mm512_maskz_loadu_ps(m1, sums + 16));
        }
        _mm512_mask_storeu_ps(sums, m0, x0);
        _mm512_mask_storeu_ps(sums + 16, m1, x1);
    }
}

#endif
