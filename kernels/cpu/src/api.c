/* What Python calls: tables of kernels, packing of weights, memory. */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pool.h"
#include "workspace.h"

SLEB_EXPORT const char sleb_source_marker[] = "SLEB_SOURCE_KEY=" SLEB_SOURCE_KEY;
SLEB_EXPORT const char *sleb_source_key(void) { return SLEB_SOURCE_KEY; }

#if defined(__x86_64__)
extern const sleb_isa sleb_isa_avx512, sleb_isa_avx512bf16, sleb_isa_amx, sleb_isa_amx_emulated;

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* The kernels of a level, or NULL: for an unknown name, or where the system does not grant the tile registers. */
SLEB_EXPORT const sleb_isa *sleb_select(const char *level) {
    if (!strcmp(level, "avx512")) return &sleb_isa_avx512;
    if (!strcmp(level, "avx512bf16")) return &sleb_isa_avx512bf16;
    if (!strcmp(level, "amx-emulated")) return &sleb_isa_amx_emulated;
    if (!strcmp(level, "amx"))
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? &sleb_isa_amx : NULL;
    return NULL;
}
#else
SLEB_EXPORT const sleb_isa *sleb_select(const char *level) {
    (void)level;
    return NULL;
}
#endif

enum { HUGE_PAGE = 2 << 20 };

/* Zeroed memory that the system hands out as it is touched; in huge pages if asked and possible. NULL if none is left. */
SLEB_EXPORT void *sleb_map(size_t bytes, int32_t huge) {
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void *memory = NULL;
    if (!huge) {
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? NULL : memory;
    }
    char *wide = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (wide == MAP_FAILED) return NULL;
    char *start = (char *)(((uintptr_t)wide + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (start > wide) munmap(wide, (size_t)(start - wide));
    if (start < wide + HUGE_PAGE) munmap(start + bytes, (size_t)(wide + HUGE_PAGE - start));
    madvise(start, bytes, MADV_HUGEPAGE);
    return start;
}

SLEB_EXPORT void sleb_unmap(void *memory, size_t bytes) {
    munmap(memory, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

/* Gives freed memory back to the system, which the allocator would keep: tens of megabytes a block that was packed. */
SLEB_EXPORT void sleb_trim(void) {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

/* --- packing --- */

static int32_t padded_inputs(const sleb_linear *w) { return (w->k + SLEB_GROUP - 1) / SLEB_GROUP * SLEB_GROUP; }

static int32_t count_panels(const sleb_linear *w) {
    return w->gated ? (w->n / 2 + 15) / 16 : (w->n + SLEB_PANEL - 1) / SLEB_PANEL;
}

/* Bytes of a packed matrix; format, n, k and gated say which. */
SLEB_EXPORT size_t sleb_packed_bytes(const sleb_linear *w) {
    static const int32_t per_group[] = {4 * 1024, 2 * 1024, 2 * 1024, 1024, 640};
    return (size_t)count_panels(w) * (size_t)(padded_inputs(w) / SLEB_GROUP) * (size_t)per_group[w->format];
}

SLEB_EXPORT int32_t sleb_num_packed_outputs(const sleb_linear *w) { return count_panels(w) * SLEB_PANEL; }

/* The output that a place in a panel holds, or -1 for padding. */
static int32_t output_at(const sleb_linear *w, int32_t panel, int32_t place) {
    if (!w->gated) {
        int32_t row = panel * SLEB_PANEL + place;
        return row < w->n ? row : -1;
    }
    int32_t row = panel * 16 + place % 16, half = w->n / 2;
    return row < half ? row + place / 16 * half : -1;
}

/* A vector [n] in the panels' order. */
SLEB_EXPORT void sleb_pack_vector(const sleb_linear *w, const float *values, float *out) {
    for (int32_t panel = 0; panel < count_panels(w); panel++)
        for (int32_t place = 0; place < SLEB_PANEL; place++) {
            int32_t row = output_at(w, panel, place);
            out[panel * SLEB_PANEL + place] = row < 0 ? 0.0f : values[row];
        }
}

typedef struct {
    const sleb_linear *w;
    const char *values;
    const uint16_t *scale, *minimum;
    char *out;
    sleb_pool *pool;
} packing;

static void pack_row(const packing *p, int32_t row, int32_t place, char *out) {
    const sleb_linear *w = p->w;
    size_t k_in = (size_t)w->k, size = w->format == SLEB_F32 ? 4 : 2;
    const char *from = p->values + (size_t)row * k_in * size;
    if (w->format == SLEB_F32 || w->format == SLEB_F16) {
        for (size_t k = 0; k < k_in; k++) memcpy(out + (k * SLEB_PANEL + (size_t)place) * size, from + k * size, size);
    } else if (w->format == SLEB_BF16) {
        for (size_t k = 0; k < k_in; k++)
            memcpy(out + ((k / 2 * SLEB_PANEL + (size_t)place) * 2 + k % 2) * 2, from + k * 2, 2);
    } else if (w->format == SLEB_I8) { /* signed to unsigned around 128 */
        const int8_t *q = (const int8_t *)p->values + (size_t)row * k_in;
        for (size_t k = 0; k < k_in; k++)
            out[(k / 4 * SLEB_PANEL + (size_t)place) * 4 + k % 4] = (char)(uint8_t)(q[k] + 128);
    } else { /* nibbles in: even k low. Out: a quad of k in the low nibbles of a line, the next in the high ones */
        size_t groups = (size_t)padded_inputs(w) / SLEB_GROUP;
        const uint8_t *q = (const uint8_t *)p->values + (size_t)row * groups * (SLEB_GROUP / 2);
        for (size_t group = 0; group < groups; group++, out += 640) {
            for (size_t k = 0; k < SLEB_GROUP; k++) {
                uint8_t both = q[(group * SLEB_GROUP + k) / 2], nibble = k % 2 ? both >> 4 : both & 15;
                out[k / 8 * 128 + (size_t)place * 4 + k % 4] |= (char)(k % 8 >= 4 ? nibble << 4 : nibble);
            }
            memcpy(out + 512 + 2 * place, &p->scale[(size_t)row * groups + group], 2);
            memcpy(out + 576 + 2 * place, &p->minimum[(size_t)row * groups + group], 2);
        }
    }
}

static void pack_thread(void *argument, int32_t index) {
    (void)index;
    const packing *p = argument;
    int32_t panels = count_panels(p->w), begin, end;
    size_t bytes = sleb_packed_bytes(p->w) / (size_t)panels;
    while (sleb_take(p->pool, panels, &begin, &end))
        for (int32_t panel = begin; panel < end; panel++) {
            char *out = p->out + (size_t)panel * bytes;
            memset(out, p->w->format == SLEB_I8 ? 128 : 0, bytes);
            for (int32_t place = 0; place < SLEB_PANEL; place++) {
                int32_t row = output_at(p->w, panel, place);
                if (row >= 0) pack_row(p, row, place, out);
            }
        }
}

/* Packs row-major values [n, k] of w's format into `out` of sleb_packed_bytes. I8: signed bytes. I4: two values a byte,
 * k padded to groups of 32, scale and minimum float16 [n, groups]. */
SLEB_EXPORT void sleb_pack(sleb_pool *pool, const sleb_linear *w, const void *values, const uint16_t *scale,
                           const uint16_t *minimum, void *out) {
    packing p = {w, values, scale, minimum, out, pool};
    sleb_pool_run(pool, pack_thread, &p);
}

/* --- workspace --- */

/* Bytes of scratch that one thread needs to draw from rows of vocab_size logits; what lies there between calls is free
 * to change. */
SLEB_EXPORT size_t sleb_draw_bytes(int32_t vocab_size) { return sleb_draw_bytes_of(vocab_size); }

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
    ws->first = carve(a, rows * (heads + 2 * kv) * dim * 4);
    ws->query = carve(a, (rows * heads + piece_rows) * padded * 4);
    ws->attended = carve(a, rows * padded_row(heads * dim));
    ws->activated = carve(a, rows * padded_row(activated));
    ws->operand = carve(a, (token_rows + piece_rows) * wide);
    ws->group_scale = carve(a, token_rows * groups * 4);
    ws->group_offset = carve(a, token_rows * groups * 4);
    ws->group_init = carve(a, token_rows * groups * 4);
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
        local.row = carve(a, (max_size(widest, max_size(dim, padded)) + 64) * 4);
        local.tile = carve(a, 32 * SLEB_PANEL * 4);
        local.panel = carve(a, max_size((widest + 31) / 32 * 32 * SLEB_PANEL * 2, 16 * 128));
        local.best = carve(a, samples * 4);
        local.best_index = carve(a, samples * 4);
        local.scores = carve(a, piece_rows * keys * 4);
        local.shares = carve(a, piece_rows * keys * 4);
        local.mixed = carve(a, piece_rows * padded * 4);
        local.stats = carve(a, 2 * piece_rows * 4);
        carve(a, 4096); /* what one thread writes shares no line, nor a prefetched one, with another's */
        if (a->at) ws->locals[t] = local;
    }
}

/* Memory for steps of up to m->max_tokens tokens, `samples` sampling rows and `sequences`. widest: most inputs of any
 * matrix; activated: most inputs of a second product of an MLP. NULL when the system gives none. */
SLEB_EXPORT sleb_workspace *sleb_workspace_create(const sleb_model *m, int32_t widest, int32_t activated,
                                                  int32_t samples, int32_t sequences, size_t *bytes) {
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

SLEB_EXPORT void sleb_workspace_destroy(sleb_workspace *ws, size_t bytes) {
    sleb_unmap(ws->residual, bytes); /* the first buffer is where the memory begins */
    free(ws);
}

SLEB_EXPORT const float *sleb_workspace_residual(const sleb_workspace *ws) { return ws->residual; }

/* --- how fast this machine reads memory: the floor of a step that is bound by it --- */

typedef struct {
    sleb_pool *pool;
    const char *data;
    size_t bytes;
    _Atomic uint64_t sum; /* so that the compiler may not skip the reading */
} reading;

enum { READ_SHARE = 1 << 20 };

static void read_thread(void *argument, int32_t index) {
    (void)index;
    reading *r = argument;
    int32_t count = (int32_t)(r->bytes / READ_SHARE), begin, end;
    typedef uint64_t line __attribute__((vector_size(64)));
    line sums[4] = {{0}, {0}, {0}, {0}};
    while (sleb_take(r->pool, count, &begin, &end)) {
        const line *from = (const line *)(r->data + (size_t)begin * READ_SHARE);
        size_t lines = (size_t)(end - begin) * (READ_SHARE / sizeof(line));
        for (size_t i = 0; i < lines; i += 4)
            for (size_t j = 0; j < 4; j++) sums[j] ^= from[i + j];
    }
    line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t folded = 0;
    for (size_t i = 0; i < 8; i++) folded ^= all[i];
    atomic_fetch_add(&r->sum, folded);
}

/* Reads all bytes (a multiple of 1 MiB) once, by all threads. */
SLEB_EXPORT uint64_t sleb_read(sleb_pool *pool, const void *data, size_t bytes) {
    reading r = {pool, data, bytes, 0};
    sleb_pool_run(pool, read_thread, &r);
    return atomic_load(&r.sum);
}
