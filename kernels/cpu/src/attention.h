/* Attention over paged keys and values, without a copy of the context.
 *
 * A page of a head holds its keys and its values in the order in which the tiles read them, so that one query needs no
 * sums across lanes, and the tile is the same as for every other product. With P tokens a page, P a multiple of 16 that
 * divides a chunk (library.py: PAGE_SIZES), and Dp features:
 *
 *              keys                            values
 *   bf16       [P / 16, Dp / 2, 16, 2]         [P / 2, Dp, 2]
 *   otherwise  [P / 16, Dp, 16]                [P, Dp]
 *
 * A cache is [pages, K, P · Dp] elements. In bytes (kv_int8) a page's elements lie in the same order, as signed q, and
 * after them the P tokens' scales, float32: x = scale q, where scale is the largest |x| of the token's head over 127.
 * They are widened a chunk at a time, as they are; keys' scales then multiply the scores, values' the probabilities.
 *
 * The softmax is online (Milakov & Gimelshein 2018, arXiv 1805.02867) over
 * chunks of 128 keys; the heads of a group share their keys, so they are rows of one tile. A lone long context is split
 * between threads and its parts are merged (Flash-Decoding, Dao et al. 2023).
 */
#ifndef SLEB_ATTENTION_H
#define SLEB_ATTENTION_H

#include "amx.h"
#include "operand.h"
#include "panel.h"
#include "pool.h"
#include "simd.h"
#include "tile.h"
#include "workspace.h"

INLINE int32_t query_kind(int32_t kv_format) {
    return SLEB_HAS_BF16 && kv_format == SLEB_BF16 ? ROWS_BF16 : ROWS_F32;
}

INLINE size_t kv_bytes(int32_t kv_format) { return kv_format == SLEB_F32 ? 4 : 2; }

INLINE size_t page_offset(const sleb_model *m, int32_t page, int32_t head) {
    size_t padded = (size_t)round_up(m->head_dim, 16);
    size_t token = m->kv_int8 ? padded + 4 : padded * kv_bytes(m->kv_format);
    return ((size_t)page * m->num_kv_heads + head) * m->page_size * token;
}

/* Where the scales of a page in bytes lie. */
INLINE char *page_scales(const sleb_model *m, const char *page) {
    return (char *)page + (size_t)m->page_size * round_up(m->head_dim, 16);
}

/* --- rotary embedding, head norms, and the way of keys and values into the cache --- */

static void rotate_head(float *x, const float *cos, const float *sin, int32_t half) {
    for (int32_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

static void clip_head(float *x, int32_t dim, float clip) {
    for (int32_t d = 0; d < dim; d++) x[d] = x[d] > clip ? clip : x[d] < -clip ? -clip : x[d]; /* a NaN stays one */
}

/* One token's heads [H + 2K, D] into `out`, the queries under one norm and the keys under another. */
static const float *norm_all_heads(const sleb_model *m, const sleb_unit *u, const float *heads, float *out) {
    int32_t queries = m->num_heads * m->head_dim, keys = m->num_kv_heads * m->head_dim;
    norm_row(heads, queries, &u->query_norm, m->norm_eps, out);
    norm_row(heads + queries, keys, &u->key_norm, m->norm_eps, out + queries);
    memcpy(out + queries + keys, heads + queries + keys, (size_t)keys * 4);
    return out;
}

INLINE void write_half(void *to, int32_t format, float x) {
    if (format == SLEB_F32) {
        memcpy(to, &x, 4);
        return;
    }
    __m512 lane = _mm512_set1_ps(x);
    uint16_t bits = format == SLEB_F16
                        ? (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm512_castps512_ps128(lane), 0), 0)
                        : (uint16_t)_mm256_extract_epi16(to_bf16(lane), 0);
    memcpy(to, &bits, 2);
}

static void store_key(const sleb_model *m, char *page, int32_t offset, const float *x, int32_t padded) {
    char *column = page + (size_t)(offset / 16) * 16 * padded * kv_bytes(m->kv_format);
    int32_t lane = offset % 16;
    if (m->kv_format == SLEB_BF16) {
        for (int32_t at = 0; at < padded; at += 16) {
            _Alignas(32) uint32_t pairs[8];
            _mm256_store_si256((__m256i *)pairs, to_bf16(load_f32(x + at)));
            for (int32_t i = 0; i < 8; i++)
                memcpy(column + ((size_t)(at / 2 + i) * 16 + lane) * 4, &pairs[i], 4);
        }
    } else {
        size_t size = kv_bytes(m->kv_format);
        for (int32_t d = 0; d < padded; d++) write_half(column + ((size_t)d * 16 + lane) * size, m->kv_format, x[d]);
    }
}

static void store_value(const sleb_model *m, char *page, int32_t offset, const float *x, int32_t padded) {
    for (int32_t at = 0; at < padded; at += 16) {
        __m512 v = load_f32(x + at);
        if (m->kv_format == SLEB_BF16) { /* only this token's halves of the pairs are written */
            char *line = page + ((size_t)(offset / 2) * padded + at) * 4;
            __m512i lanes = _mm512_cvtepu16_epi32(to_bf16(v));
            if (offset % 2) lanes = _mm512_slli_epi32(lanes, 16);
            _mm512_mask_storeu_epi16(line, offset % 2 ? 0xaaaaaaaau : 0x55555555u, lanes);
        } else if (m->kv_format == SLEB_F16) {
            _mm256_storeu_si256((__m256i *)(page + ((size_t)offset * padded + at) * 2), _mm512_cvtps_ph(v, 0));
        } else {
            _mm512_storeu_ps(page + ((size_t)offset * padded + at) * 4, v);
        }
    }
}

/* One token's key or value [Dp] in bytes, each where store_key and store_value put its element. */
static void store_bytes(const sleb_model *m, char *page, int32_t offset, const float *x, int32_t padded,
                        int32_t is_key) {
    int32_t pairs = m->kv_format == SLEB_BF16;
    __m512 top = _mm512_setzero_ps();
    for (int32_t at = 0; at < padded; at += 16) top = _mm512_max_ps(_mm512_abs_ps(load_f32(x + at)), top);
    float most = _mm512_reduce_max_ps(top);
    for (int32_t at = 0; at < padded; at++) most = x[at] != x[at] ? x[at] : most; /* a NaN stays one, as the scale */
    float scale = most / 127.0f;
    __m512 inverse = _mm512_set1_ps(most > 0.0f && most < INFINITY ? 127.0f / most : 0.0f);
    memcpy(page_scales(m, page) + (size_t)offset * 4, &scale, 4);
    for (int32_t at = 0; at < padded; at += 16) {
        _Alignas(16) int8_t q[16];
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_f32(x + at), inverse));
        _mm_store_si128((__m128i *)q, _mm512_cvtsepi32_epi8(rounded));
        for (int32_t i = 0; i < 16; i++) {
            size_t d = (size_t)(at + i), place;
            if (is_key)
                place = (size_t)(offset / 16) * 16 * padded +
                        (pairs ? (d / 2 * 16 + offset % 16) * 2 + d % 2 : d * 16 + offset % 16);
            else
                place = pairs ? ((size_t)(offset / 2) * padded + d) * 2 + offset % 2 : (size_t)offset * padded + d;
            page[place] = q[i];
        }
    }
}

/* `count` bytes to kv_format, exactly. */
static void widen_bytes(int32_t format, const char *from, size_t count, char *to) {
    for (size_t at = 0; at < count; at += 16) {
        __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + at))));
        if (format == SLEB_F32)
            _mm512_storeu_ps(to + at * 4, x);
        else
            _mm256_storeu_si256((__m256i *)(to + at * 2), format == SLEB_F16 ? _mm512_cvtps_ph(x, 0) : to_bf16(x));
    }
}

/* Zeroes the values after `offset`: a probability of 0 times what another sequence left there must be 0, not NaN. */
static void clear_values_after(const sleb_model *m, char *page, int32_t offset, int32_t padded) {
    size_t row = (size_t)padded * kv_bytes(m->kv_format);
    if (m->kv_format == SLEB_BF16 && offset % 2 == 0) {
        for (int32_t at = 0; at < padded; at += 16)
            _mm512_mask_storeu_epi16(page + ((size_t)(offset / 2) * padded + at) * 4, 0xaaaaaaaau,
                                     _mm512_setzero_si512());
        offset++;
    }
    memset(page + (size_t)(offset + 1) * row, 0, (size_t)(m->page_size - offset - 1) * row);
}

typedef struct {
    const sleb_model *model;
    const sleb_unit *unit;
    const sleb_step *step;
    const float *qkv;
    char *query;     /* [K, T · group, Dp] */
    char *attended;
    size_t attended_stride;
    int32_t attended_kind, num_tokens, num_sequences;
} attention;

/* One token's heads: norm, rotation, scale; queries into their buffer, keys and values into their page. */
static void place_token(const attention *at, int32_t token, int32_t sequence, sleb_local *local) {
    const sleb_model *m = at->model;
    const sleb_unit *u = at->unit;
    const sleb_step *s = at->step;
    int32_t dim = m->head_dim, padded = round_up(dim, 16), group = m->num_heads / m->num_kv_heads;
    int32_t position = s->positions[token], kind = query_kind(m->kv_format);
    int32_t page = s->pages[s->page_starts[sequence] + position / m->page_size], offset = position % m->page_size;
    const float *cos = u->cos + (size_t)position * u->rotary_half, *sin = u->sin + (size_t)position * u->rotary_half;
    const float *heads = at->qkv + (size_t)token * (m->num_heads + 2 * m->num_kv_heads) * dim;
    float *x = local->row;
    memset(x + dim, 0, (size_t)(padded - dim) * 4);
    if (m->qk_whole && u->query_norm.kind) heads = norm_all_heads(m, u, heads, x + padded);
    /* So that the softmax needs powers of two only; a soft cap comes first. */
    const __m512 factor = _mm512_set1_ps(m->softcap > 0.0f ? m->scale / m->softcap : m->scale * LOG2_E);
    for (int32_t head = 0; head < m->num_heads + m->num_kv_heads; head++, heads += dim) {
        int32_t is_key = head >= m->num_heads;
        const sleb_norm *norm = is_key ? &u->key_norm : &u->query_norm;
        int32_t is_normed = norm->kind && !m->qk_whole;
        if (is_normed && !m->qk_after)
            norm_row(heads, dim, norm, m->norm_eps, x);
        else
            memcpy(x, heads, (size_t)dim * 4);
        if (m->clip > 0.0f) clip_head(x, dim, m->clip);
        if (u->cos) rotate_head(x, cos, sin, u->rotary_half);
        if (is_normed && m->qk_after) norm_row(x, dim, norm, m->norm_eps, x);
        if (is_key) {
            char *to = (char *)u->key_cache + page_offset(m, page, head - m->num_heads);
            if (m->kv_int8)
                store_bytes(m, to, offset, x, padded, 1);
            else
                store_key(m, to, offset, x, padded);
            continue;
        }
        size_t row = ((size_t)(head / group) * at->step->num_tokens + token) * group + head % group;
        char *out = at->query + row * padded * element_bytes(kind);
        for (int32_t d = 0; d < padded; d += 16)
            store_row(out, kind, d, _mm512_mul_ps(load_f32(x + d), factor), 0xffff);
    }
    int32_t is_last = token + 1 == s->query_starts[sequence + 1];
    int32_t dirty = is_last && (offset == 0 || s->query_starts[sequence] != token);
    for (int32_t head = 0; head < m->num_kv_heads; head++, heads += dim) {
        memcpy(x, heads, (size_t)dim * 4);
        if (m->clip > 0.0f) clip_head(x, dim, m->clip);
        char *to = (char *)u->value_cache + page_offset(m, page, head);
        if (m->kv_int8) {
            store_bytes(m, to, offset, x, padded, 0);
            continue;
        }
        store_value(m, to, offset, x, padded);
        if (dirty) clear_values_after(m, to, offset, padded);
    }
}

/* --- the work, in pieces --- */

enum { MIN_SPLIT_KEYS = 256, AHEAD_KEYS = 64 };

INLINE int32_t rows_a_piece(void) { return SLEB_HAS_AMX ? SLEB_ATTENTION_ROWS : MAX_ROWS; }

/* Divides every sequence's queries into pieces of rows, and lone contexts into spans of keys as well. */
static void plan_pieces(const sleb_model *m, const sleb_step *s, sleb_workspace *ws) {
    int32_t group = m->num_heads / m->num_kv_heads, most = rows_a_piece(), count = 0, partials = 0;
    int32_t wanted = ceil_div(4 * m->pool->num_threads, s->num_sequences * m->num_kv_heads);
    for (int32_t q = 0; q < s->num_sequences; q++) {
        int32_t tokens = s->query_starts[q + 1] - s->query_starts[q], rows = tokens * group;
        int32_t context = s->context_lens[q];
        int32_t splits = tokens == 1 ? max_i(1, min_i(wanted, context / MIN_SPLIT_KEYS)) : 1;
        if (partials + splits * ceil_div(rows, most) > ws->max_partials) splits = 1;
        int32_t span = round_up(ceil_div(context, splits), SLEB_ATTENTION_KEYS);
        splits = ceil_div(context, span);
        for (int32_t row = 0; row < rows; row += most)
            for (int32_t split = 0; split < splits; split++) {
                sleb_piece *piece = &ws->pieces[count++];
                piece->sequence = q;
                piece->first_row = s->query_starts[q] * group + row;
                piece->num_rows = min_i(most, rows - row);
                piece->first_key = split * span;
                piece->num_keys = min_i(span, context - split * span);
                piece->num_splits = splits;
                piece->partial = splits > 1 ? partials++ : -1;
            }
        ws->piece_ends[q + 1] = count;
    }
    ws->piece_ends[0] = 0;
}

/* Scores [rows, 32] of two columns of 16 keys, into `out` with rows SLEB_ATTENTION_KEYS apart. */
static void score_keys(const sleb_model *m, const char *query, int32_t rows, const char *keys0, const char *keys1,
                       float *out) {
    int32_t padded = round_up(m->head_dim, 16), kind = query_kind(m->kv_format);
    size_t stride = m->kv_format == SLEB_F16 ? 32 : 64, lda = (size_t)padded * element_bytes(kind);
#if SLEB_HAS_AMX
    if (kind == ROWS_BF16 && rows >= AMX_FROM && padded % 32 == 0) {
        tiles_zero(rows);
        for (int32_t k = 0; k < padded / 32; k++)
            tiles_add(query + 64 * k, lda, keys0 + 1024 * k, keys1 + 1024 * k, 64, rows);
        tiles_store(rows, out, SLEB_ATTENTION_KEYS);
        return;
    }
#endif
    const char *blocks[1] = {keys0};
    tile t = {.lda = lda, .blocks = blocks, .num_blocks = 1, .second = keys1 - keys0, .stride = stride,
              .steps = m->kv_format == SLEB_BF16 ? padded / 2 : padded, .ldo = SLEB_ATTENTION_KEYS};
    for (int32_t row = 0; row < rows; row += MAX_ROWS) {
        t.a = query + row * lda;
        t.out = out + (size_t)row * SLEB_ATTENTION_KEYS;
        TILES[m->kv_format][min_i(MAX_ROWS, rows - row) - 1](&t);
    }
}

static void scale_scores(float *scores, int32_t keys, const float *scale) {
    for (int32_t at = 0; at < keys; at += 16)
        _mm512_storeu_ps(scores + at, _mm512_mul_ps(load_f32(scores + at), load_f32(scale + at)));
}

/* The scores [low, high) of a row under the soft cap, in powers of two. */
static void cap_scores(float *scores, int32_t low, int32_t high, float softcap) {
    for (int32_t at = low / 16 * 16; at < high; at += 16)
        _mm512_storeu_ps(scores + at, softcap_ps(load_f32(scores + at), 1.0f, softcap * LOG2_E));
}

/* Online softmax of one row's scores [keys], of which [low, high) are visible: probs before they are divided by `sum`.
 * Returns the factor for what was gathered before; `top` and `sum` go on. value_scale: [keys], or NULL. */
static float softmax_keys(const float *scores, int32_t keys, int32_t low, int32_t high, const float *value_scale,
                          char *probs, int32_t kind, float *top, float *sum) {
    const __m512 never = _mm512_set1_ps(-INFINITY);
    __m512 most = never;
    for (int32_t at = 0; at < keys; at += 16) {
        __mmask16 mask = tail_mask(max_i(high - at, 0)) & ~tail_mask(max_i(low - at, 0));
        most = _mm512_mask_max_ps(most, mask, most, load_f32(scores + at));
    }
    float highest = fmaxf(*top, _mm512_reduce_max_ps(most));
    if (highest == -INFINITY) { /* nothing visible yet */
        memset(probs, 0, (size_t)keys * element_bytes(kind));
        return 1.0f;
    }
    const __m512 shift = _mm512_set1_ps(highest);
    __m512 total = _mm512_setzero_ps();
    for (int32_t at = 0; at < keys; at += 16) {
        __mmask16 mask = tail_mask(max_i(high - at, 0)) & ~tail_mask(max_i(low - at, 0));
        __m512 prob = _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_sub_ps(load_f32(scores + at), shift)));
        total = _mm512_add_ps(total, prob);
        if (value_scale) prob = _mm512_maskz_mul_ps(mask, prob, load_f32(value_scale + at));
        store_row(probs, kind, at, prob, 0xffff);
    }
    float factor = *top == -INFINITY ? 0.0f : exp2f(*top - highest);
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    *top = highest;
    return factor;
}

/* mixed [rows, Dp] += probs [rows, keys] · values, `pages` the values' pages of this chunk. */
static void mix_values(const sleb_model *m, const char *const *pages, int32_t num_pages, int32_t rows,
                       sleb_local *local) {
    int32_t padded = round_up(m->head_dim, 16), kind = query_kind(m->kv_format);
    size_t lda = SLEB_ATTENTION_KEYS * element_bytes(kind), line = m->kv_format == SLEB_F16 ? 32 : 64;
    const char *blocks[SLEB_ATTENTION_KEYS / 16];
    for (int32_t d = 0; d < padded; d += 32) {
        for (int32_t i = 0; i < num_pages; i++) blocks[i] = pages[i] + (size_t)d / 16 * line;
        int32_t halves = padded - d > 16 ? 2 : 1;
#if SLEB_HAS_AMX
        if (kind == ROWS_BF16 && rows >= AMX_FROM && halves == 2) {
            tiles_mix(local->probs, lda, blocks, num_pages, m->page_size / 2, (size_t)padded * 4, rows, local->panel,
                      local->tile);
        } else
#endif
        {
            tile t = {.lda = lda, .blocks = blocks, .num_blocks = num_pages,
                      .second = halves == 2 ? (ptrdiff_t)line : 0, .stride = (size_t)padded / 16 * line,
                      .steps = m->kv_format == SLEB_BF16 ? m->page_size / 2 : m->page_size, .ldo = SLEB_PANEL};
            for (int32_t row = 0; row < rows; row += MAX_ROWS) {
                t.a = local->probs + row * lda;
                t.out = local->tile + row * SLEB_PANEL;
                TILES[m->kv_format][min_i(MAX_ROWS, rows - row) - 1](&t);
            }
        }
        for (int32_t row = 0; row < rows; row++)
            for (int32_t half = 0; half < halves; half++) {
                float *to = local->mixed + (size_t)row * padded + d + 16 * half;
                _mm512_storeu_ps(to, _mm512_add_ps(load_f32(to), load_f32(local->tile + row * SLEB_PANEL + 16 * half)));
            }
    }
}

/* Asks for the memory of a page of keys and of one of values: pages lie apart, so that no hardware
 * prefetcher finds them. */
static void prefetch_page(const attention *at, const int32_t *pages, int32_t number, int32_t head) {
    const sleb_model *m = at->model;
    size_t from = page_offset(m, pages[number], head), bytes = page_offset(m, 0, 1);
    const char *keys = (const char *)at->unit->key_cache + from, *values = (const char *)at->unit->value_cache + from;
    for (size_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(keys + line, _MM_HINT_T0);
        _mm_prefetch(values + line, _MM_HINT_T0);
    }
}

/* Widens the page at `from` of both caches, whose keys are the chunk's from `key` on; where its values lie then. */
static const char *widen_page(const attention *at, size_t from, int32_t key, sleb_local *local) {
    const sleb_model *m = at->model;
    size_t padded = (size_t)round_up(m->head_dim, 16), count = (size_t)m->page_size * padded;
    size_t element = kv_bytes(m->kv_format);
    const char *pages[2] = {(const char *)at->unit->key_cache + from, (const char *)at->unit->value_cache + from};
    char *to = NULL;
    for (int32_t side = 0; side < 2; side++) {
        to = local->wide + ((size_t)side * SLEB_ATTENTION_KEYS + key) * padded * element;
        widen_bytes(m->kv_format, pages[side], count, to);
        float *scale = local->kv_scale + side * SLEB_ATTENTION_KEYS + key;
        memcpy(scale, page_scales(m, pages[side]), (size_t)m->page_size * 4);
    }
    return to;
}

/* One piece of one key-value head: local->mixed [rows, Dp] unnormalised, local->stats its maxima and sums. */
static void attend_piece(const attention *at, const sleb_piece *piece, int32_t head, sleb_local *local) {
    const sleb_model *m = at->model;
    const sleb_step *s = at->step;
    int32_t padded = round_up(m->head_dim, 16), group = m->num_heads / m->num_kv_heads, rows = piece->num_rows;
    int32_t kind = query_kind(m->kv_format), page_size = m->page_size, q = piece->sequence;
    const int32_t *pages = s->pages + s->page_starts[q];
    size_t query_row = (size_t)head * s->num_tokens * group + piece->first_row;
    const char *query = at->query + query_row * padded * element_bytes(kind);
    float *top = local->stats, *sum = local->stats + SLEB_ATTENTION_ROWS;
    const float *sinks = piece->first_key == 0 ? at->unit->sinks : NULL;
    for (int32_t row = 0; row < rows; row++) { /* a sink is as a first key whose value is 0 */
        top[row] = sinks ? sinks[head * group + (piece->first_row + row) % group] * LOG2_E : -INFINITY;
        sum[row] = sinks ? 1.0f : 0.0f;
    }
    memset(local->mixed, 0, (size_t)rows * padded * 4);

    /* The row's own position is the last that it sees. */
    int32_t base = s->context_lens[q] - s->query_starts[q + 1];
    int32_t first_position = base + piece->first_row / group, window = at->unit->window;
    int32_t last_position = base + (piece->first_row + rows - 1) / group;
    int32_t end = min_i(piece->first_key + piece->num_keys, last_position + 1), begin = piece->first_key;
    if (window) begin = max_i(begin, first_position - window + 1);
    begin = begin / page_size * page_size;

    size_t column = (size_t)16 * padded * kv_bytes(m->kv_format);
    for (int32_t chunk = begin; chunk < end; chunk += SLEB_ATTENTION_KEYS) {
        int32_t keys = min_i(SLEB_ATTENTION_KEYS, end - chunk), columns = ceil_div(keys, 16);
        const char *key_columns[SLEB_ATTENTION_KEYS / 16 + 1], *value_pages[SLEB_ATTENTION_KEYS / 16];
        for (int32_t c = 0; c < columns; c++) {
            int32_t key = chunk + 16 * c;
            size_t from = page_offset(m, pages[key / page_size], head);
            key_columns[c] = (const char *)at->unit->key_cache + from + (size_t)(key % page_size / 16) * column;
            if (m->kv_int8)
                key_columns[c] = local->wide + (size_t)c * column;
            if (key % page_size == 0)
                value_pages[(key - chunk) / page_size] = m->kv_int8 ? widen_page(at, from, key - chunk, local)
                                                                    : (const char *)at->unit->value_cache + from;
        }
        key_columns[columns] = key_columns[columns - 1];
        for (int32_t c = 0; c < columns; c += 2) {
            /* A few rows wait for memory; for more the pages are in the cache since the piece before. */
            for (int32_t key = chunk + 16 * c; rows < MAX_ROWS && key < chunk + 16 * (c + 2); key += 16)
                if (key + AHEAD_KEYS < end && (key + AHEAD_KEYS) % page_size == 0)
                    prefetch_page(at, pages, (key + AHEAD_KEYS) / page_size, head);
            score_keys(m, query, rows, key_columns[c], key_columns[c + 1], local->scores + 16 * c);
        }
        int32_t num_pages = ceil_div(keys, page_size), padded_keys = num_pages * page_size;
        for (int32_t row = 0; row < rows; row++) {
            int32_t position = base + (piece->first_row + row) / group;
            int32_t high = min_i(position + 1, end) - chunk, low = window ? max_i(0, position - window + 1 - chunk) : 0;
            if (m->kv_int8)
                scale_scores(local->scores + (size_t)row * SLEB_ATTENTION_KEYS, padded_keys, local->kv_scale);
            if (m->softcap > 0.0f)
                cap_scores(local->scores + (size_t)row * SLEB_ATTENTION_KEYS, low, min_i(high, padded_keys), m->softcap);
            float factor = softmax_keys(local->scores + (size_t)row * SLEB_ATTENTION_KEYS, padded_keys, low, high,
                                        m->kv_int8 ? local->kv_scale + SLEB_ATTENTION_KEYS : NULL,
                                      local->probs + (size_t)row * SLEB_ATTENTION_KEYS * element_bytes(kind), kind,
                                      &top[row], &sum[row]);
            if (factor != 1.0f) {
                float *mixed = local->mixed + (size_t)row * padded;
                for (int32_t d = 0; d < padded; d++) mixed[d] *= factor;
            }
        }
        mix_values(m, value_pages, num_pages, rows, local);
    }
}

/* The first pages of the piece after. */
static void prefetch_piece(const attention *at, const sleb_piece *piece, int32_t head) {
    const int32_t *pages = at->step->pages + at->step->page_starts[piece->sequence];
    int32_t page_size = at->model->page_size, end = piece->first_key + min_i(piece->num_keys, AHEAD_KEYS);
    for (int32_t number = piece->first_key / page_size; number * page_size < end; number++)
        prefetch_page(at, pages, number, head);
}

INLINE size_t partial_floats(const sleb_model *m) {
    return (size_t)rows_a_piece() * (round_up(m->head_dim, 16) + 2);
}

/* The rows [rows, Dp] over their sums [rows], as rows of the next product's operand. */
static void write_attended(const attention *at, const sleb_piece *piece, int32_t head, const float *mixed,
                           const float *sum) {
    const sleb_model *m = at->model;
    int32_t dim = m->head_dim, padded = round_up(dim, 16), group = m->num_heads / m->num_kv_heads;
    for (int32_t row = 0; row < piece->num_rows; row++) {
        int32_t flat = piece->first_row + row, column = (head * group + flat % group) * dim;
        char *out = at->attended + (size_t)(flat / group) * at->attended_stride;
        __m512 factor = _mm512_set1_ps(1.0f / sum[row]);
        for (int32_t d = 0; d < dim; d += 16)
            store_row(out, at->attended_kind, column + d,
                      _mm512_mul_ps(load_f32(mixed + (size_t)row * padded + d), factor), tail_mask(dim - d));
    }
}

static void merge_splits(const attention *at, const sleb_piece *piece, int32_t head, sleb_local *local) {
    const sleb_model *m = at->model;
    int32_t padded = round_up(m->head_dim, 16), rows = piece->num_rows;
    size_t size = partial_floats(m);
    const float *parts = m->workspace->partials + ((size_t)piece->partial * m->num_kv_heads + head) * size;
    size_t next = size * m->num_kv_heads;
    float *sum = local->stats;
    for (int32_t row = 0; row < rows; row++) {
        float top = -INFINITY;
        for (int32_t i = 0; i < piece->num_splits; i++) top = fmaxf(top, parts[i * next + row]);
        float *mixed = local->mixed + (size_t)row * padded;
        memset(mixed, 0, (size_t)padded * 4);
        sum[row] = 0.0f;
        for (int32_t i = 0; i < piece->num_splits; i++) {
            const float *part = parts + i * next;
            float factor = exp2f(part[row] - top);
            if (part[rows + row] == 0.0f) continue; /* a span that a window hides */
            sum[row] += part[rows + row] * factor;
            const float *from = part + 2 * rows + (size_t)row * padded;
            for (int32_t d = 0; d < padded; d++) mixed[d] += from[d] * factor;
        }
    }
    write_attended(at, piece, head, local->mixed, sum);
}

/* Attention of the step's first sequences, shared between the threads. Ends with a barrier. */
static void attend(const attention *at, sleb_local *local) {
    const sleb_model *m = at->model;
    const sleb_step *s = at->step;
    sleb_workspace *ws = m->workspace;
    sleb_pool *pool = m->pool;
    int32_t begin, end, sequence = 0, num_pieces = ws->piece_ends[at->num_sequences];
    while (sleb_take(pool, at->num_tokens, &begin, &end)) {
        while (s->query_starts[sequence + 1] <= begin) sequence++;
        for (int32_t token = begin; token < end; token++) {
            while (s->query_starts[sequence + 1] <= token) sequence++;
            place_token(at, token, sequence, local);
        }
    }
    sleb_barrier(pool);
    int32_t is_split = 0;
    for (int32_t i = 0; i < num_pieces && !is_split; i++) is_split = ws->pieces[i].partial >= 0;
    while (sleb_take(pool, num_pieces * m->num_kv_heads, &begin, &end))
        for (int32_t task = begin; task < end; task++) {
            const sleb_piece *piece = &ws->pieces[task % num_pieces];
            int32_t head = task / num_pieces, rows = piece->num_rows;
            if (task + 1 < end && rows < MAX_ROWS)
                prefetch_piece(at, &ws->pieces[(task + 1) % num_pieces], (task + 1) / num_pieces);
            attend_piece(at, piece, head, local);
            if (piece->partial < 0) {
                write_attended(at, piece, head, local->mixed, local->stats + SLEB_ATTENTION_ROWS);
                continue;
            }
            float *part = ws->partials + ((size_t)piece->partial * m->num_kv_heads + head) * partial_floats(m);
            memcpy(part, local->stats, (size_t)rows * 4);
            memcpy(part + rows, local->stats + SLEB_ATTENTION_ROWS, (size_t)rows * 4);
            memcpy(part + 2 * rows, local->mixed, (size_t)rows * round_up(m->head_dim, 16) * 4);
        }
    sleb_barrier(pool);
    if (!is_split) return;
    while (sleb_take(pool, num_pieces * m->num_kv_heads, &begin, &end))
        for (int32_t task = begin; task < end; task++) {
            const sleb_piece *piece = &ws->pieces[task % num_pieces];
            if (piece->partial >= 0 && piece->first_key == 0) merge_splits(at, piece, task / num_pieces, local);
        }
    sleb_barrier(pool);
}

#endif
