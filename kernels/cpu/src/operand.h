/* The rows that a product reads, prepared once: normed, and rounded to what its dot products take. */
#ifndef SLEB_OPERAND_H
#define SLEB_OPERAND_H

#include "panel.h"
#include "simd.h"

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
enum { WIDEN_FROM = 16 };

INLINE int32_t operand_kind(int32_t format, int32_t rows) {
    if (format >= SLEB_I8) return SLEB_HAS_AMX && rows >= WIDEN_FROM ? ROWS_BF16 : ROWS_BYTES;
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

/* For products with bytes and nibbles, because integer dot products take a quarter of the instructions of float32 ones.
 * Symmetric by groups of 32, as llama.cpp's Q8 blocks: a = scale q, q in [-127, 127]. `init` and `offset` carry the
 * group's sum to where a product corrects for B's zero point or minimum. */
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

/* `out` may be x. */
static void norm_row(const float *x, int32_t features, const sleb_norm *norm, float eps, float *out) {
    __m512 sum = _mm512_setzero_ps();
    float mean = 0.0f;
    if (norm->kind == SLEB_NORM_LAYER) {
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

/* x += scale · norm(update), which is used up. */
static void add_normed_row(float *x, float *update, int32_t features, const sleb_norm *norm, float eps, float scale) {
    norm_row(update, features, norm, eps, update);
    for (int32_t at = 0; at < features; at += 16) {
        __mmask16 mask = tail_mask(features - at);
        __m512 sum = _mm512_maskz_loadu_ps(mask, x + at), add = _mm512_maskz_loadu_ps(mask, update + at);
        _mm512_mask_storeu_ps(x + at, mask, _mm512_fmadd_ps(add, _mm512_set1_ps(scale), sum));
    }
}

/* x = scale x + shift. */
static void scale_row(float *x, int32_t features, const float *scale, const float *shift) {
    for (int32_t at = 0; at < features; at += 16) {
        __mmask16 mask = tail_mask(features - at);
        __m512 factor = _mm512_maskz_loadu_ps(mask, scale + at), add = _mm512_maskz_loadu_ps(mask, shift + at);
        _mm512_mask_storeu_ps(x + at, mask, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + at), factor, add));
    }
}

/* One row x [features], normed if there is a norm, as row `row` of an operand. `scratch` holds a row in float32. */
static void prepare_row(const float *x, int32_t features, const sleb_norm *norm, float eps, float *scratch, int32_t row,
                        operand *into) {
    char *out = (char *)into->data + (size_t)row * into->stride;
    const float *ready = x;
    if (norm && norm->kind) {
        float *target = into->kind == ROWS_F32 ? (float *)out : scratch;
        norm_row(x, features, norm, eps, target);
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

#endif
