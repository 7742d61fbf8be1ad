/* The interface of the CPU kernels: plain records and functions, read by every file here and, line by line, by
 * records.py: it takes the layout of each struct and the arguments of each function from this text. The text is
 * therefore plain: enums, structs of scalars and pointers, prototypes, and nothing else.
 *
 * Shapes: T tokens of a step, E hidden size, H query heads, K key-value heads, D head dimension, Dp = D padded to
 * 16, S sequences, B rows that sample. All pointers are to 64-byte aligned memory unless they say otherwise.
 */
#ifndef SLEB_CPU_H
#define SLEB_CPU_H

#include <stddef.h>
#include <stdint.h>

#define SLEB_EXPORT __attribute__((visibility("default")))

/* Weights are packed in panels of 32 outputs; the inputs K of a matrix are padded with zeros to a multiple of 32.
 * panel.h has the order of the elements. */
enum { SLEB_PANEL = 32, SLEB_GROUP = 32 };

/* Element formats, of weights and of keys and values. I8: unsigned q, w = scale[n] (q - 128). The last three by groups of
 * inputs, unsigned q of 4 or 8 bits: I4 and I8_GROUPS in groups of a multiple of 32, I8_HALVES of 16. */
enum { SLEB_F32, SLEB_F16, SLEB_BF16, SLEB_I8, SLEB_I4, SLEB_I8_GROUPS, SLEB_I8_HALVES };

/* What a group's q count from: w = scale q + minimum, scale (q - zero), or scale (q - 8) and (q - 128). */
enum { SLEB_MINIMUM, SLEB_ZERO, SLEB_MIDDLE };

enum { SLEB_NO_NORM, SLEB_NORM_RMS, SLEB_NORM_LAYER };
enum { SLEB_SILU, SLEB_RELU, SLEB_GELU, SLEB_GELU_TANH, SLEB_RELU2, SLEB_CLAMPED_SWIGLU, SLEB_IDENTITY };
enum { SLEB_NOT_SHARED, SLEB_SHARED, SLEB_SHARED_GATED };
enum { SLEB_MAX_EXPERTS = 1024 };
enum { SLEB_ATTENTION, SLEB_MLP, SLEB_PATCH };

/* A packed matrix [n, k]. When gated, rows [0, n/2) are gate and the rest up, and a panel holds 16 of each. */
typedef struct {
    const void *data;
    const float *scale; /* I8: [panels · 32] in the panels' order; otherwise NULL */
    const float *bias;  /* [panels · 32] in the panels' order, or NULL */
    int32_t format, n, k, gated;
    int32_t group, base; /* formats by groups only: inputs of a group, and what they count from */
} sleb_linear;

typedef struct {
    const float *weight, *bias; /* [features] or NULL */
    int32_t kind;               /* SLEB_NO_NORM: there is none */
} sleb_norm;

/* The experts of an MLP: `up` and `down` have a matrix of each, and one more where an expert is shared by all rows. The
 * router is float32, [count, E], and has one more output where that expert has a gate. */
typedef struct {
    sleb_linear router;
    const sleb_linear *up, *down;
    const float *correction; /* [count], added to the scores for the choice alone, or NULL */
    int32_t count, top_k, normalised, shared;
} sleb_experts;

/* What rows of the residual run. A sublayer: norm, a first product (qkv, or up), attention or activation, a second
 * product (out, or down), and perhaps a norm of the update before it is added. A patch: the same without anything
 * between its products; without a first one if it is of full rank; x = scale x + shift if there is a scale. */
typedef struct {
    sleb_norm norm, post_norm;
    sleb_linear first, second;
    /* attention only */
    sleb_norm query_norm, key_norm;  /* of a head [D]; where the model's qk_whole is set, of all [H·D] and [K·D] */
    const float *cos, *sin;          /* [max_model_len, rotary_half], or NULL: nothing is rotated */
    const float *sinks;              /* [H] or NULL: logits that join the denominators of a head's softmax */
    void *key_cache, *value_cache;   /* see attention.h for the layout of a page */
    const float *scale, *shift;      /* [E] or NULL; patches only */
    const sleb_experts *experts;     /* of an MLP, or NULL: then first and second are not */
    int32_t kind;
    int32_t rotary_half;
    int32_t window;     /* a token sees itself and the window - 1 before it; 0 for all */
    int32_t parallel;   /* attention only: the next unit is the block's MLP and reads what this one reads */
    int32_t activation; /* MLP only */
} sleb_unit;

typedef struct sleb_pool sleb_pool;
typedef struct sleb_workspace sleb_workspace;

typedef struct {
    int32_t hidden_size, num_heads, num_kv_heads, head_dim, vocab_size, num_units;
    int32_t page_size, kv_format, embed_format, embed_packed, max_tokens, position_offset;
    int32_t expert_slots, router_size; /* the most experts that a row gets, the most outputs of a router; 0: none */
    int32_t qk_whole, qk_after;       /* norms of queries and keys: over all heads; after the rotation */
    int32_t kv_int8, reserved;        /* keys and values are kept in bytes; kv_format is what they are widened to */
    float norm_eps, scale;            /* scale: of the scores */
    float embed_scale, residual_scale; /* of the token embeddings; of every update of the residual */
    float clip;                       /* queries, keys and values lie within [-clip, clip]; 0: anywhere */
    float softcap, logit_softcap;     /* of scores and of logits: x becomes c tanh(x / c); 0: it stays */
    const void *embed;                /* row-major [V, E] in embed_format, or the packed head */
    const void *position_embed;       /* float32 [positions, E], or NULL */
    const sleb_unit *units;
    sleb_norm final_norm;
    sleb_linear head;
    sleb_pool *pool;
    sleb_workspace *workspace;
} sleb_model;

/* One forward pass. Sequences by ascending depth: each unit runs neighbours, a sublayer the first ones. */
typedef struct {
    int32_t num_tokens, num_sequences, num_samples, reserved;
    const int32_t *token_ids, *positions;       /* [T] */
    const int32_t *query_starts;                /* [S + 1] */
    const int32_t *context_lens;                /* [S], new tokens included */
    const int32_t *page_starts;                 /* [S], where a sequence's pages begin in `pages` */
    const int32_t *pages;
    const int32_t *unit_starts, *unit_ends;     /* [units]: the first sequence that runs it, and that past the last */
    const int32_t *samples;                     /* [B], tokens whose logits are wanted */
    float *logits;                              /* [B, V] or NULL */
    int32_t *argmax;                            /* [B] or NULL */
} sleb_step;

/* One token a row; see kernels/reference/ops.py. Pointers of any alignment, but for scratch. */
typedef struct {
    const float *logits;                                /* [B, V] */
    const double *temperature, *top_p, *min_p, *points; /* [B] */
    const int32_t *top_k;                               /* [B], 0 for all */
    int64_t *chosen;                                    /* [B] */
    char *scratch;                                      /* of sleb_sample_bytes for each thread of the pool */
    sleb_pool *pool;
    int32_t num_rows, vocab_size;
} sleb_sample;

/* The entry points compiled for one instruction set. They return 0; forward.h and sample.h say what each computes. */
typedef struct {
    int32_t (*forward)(const sleb_model *, const sleb_step *);
    int32_t (*head)(const sleb_model *, const float *rows, int32_t num_rows, float *logits, int32_t *argmax);
    int32_t (*linear)(const sleb_model *, const sleb_norm *, const sleb_linear *, const float *x, int32_t rows,
                      int32_t target, int32_t activation, float *out);
    int32_t (*attention)(const sleb_model *, const sleb_unit *, const sleb_step *, const float *qkv, float *out);
    int32_t (*sample)(const sleb_sample *);
} sleb_isa;

/* --- api.c --- */

/* The kernels of a level, or NULL: for an unknown name, or where the system does not grant the tile registers. */
SLEB_EXPORT const sleb_isa *sleb_select(const char *level);

/* The key of the sources that this library was compiled from; see build.py. */
SLEB_EXPORT const char *sleb_source_key(void);

/* --- pool.c --- */

/* A pool of num_threads, the caller included; as many as the system gives, NULL if there is no memory. cpus: for each
 * thread the processor that it is pinned to, the caller's first, or NULL. spin_ns: for how long an idle thread looks
 * for work before it sleeps. */
SLEB_EXPORT sleb_pool *sleb_pool_create(int32_t num_threads, const int32_t *cpus, int64_t spin_ns);
SLEB_EXPORT int32_t sleb_pool_num_threads(const sleb_pool *pool);
SLEB_EXPORT void sleb_pool_destroy(sleb_pool *pool);

/* --- memory.c --- */

/* Zeroed memory, handed out as it is touched; in huge pages if asked and possible. NULL if there is none. */
SLEB_EXPORT void *sleb_map(size_t bytes, int32_t huge);
SLEB_EXPORT void sleb_unmap(void *memory, size_t bytes);

/* Gives freed memory back to the system, which the allocator would keep: tens of megabytes a block that was packed. */
SLEB_EXPORT void sleb_trim(void);

/* Reads all bytes (a multiple of 1 MiB) once, by all threads: how fast this machine reads memory is the floor of a
 * step that is bound by it. */
SLEB_EXPORT uint64_t sleb_read(sleb_pool *pool, const void *data, size_t bytes);

/* --- pack.c --- */

/* Bytes of a packed matrix; format, n, k and gated say which. */
SLEB_EXPORT size_t sleb_packed_bytes(const sleb_linear *w);
/* Outputs of a packed matrix, padding included: the length of its packed vectors. */
SLEB_EXPORT int32_t sleb_num_packed_outputs(const sleb_linear *w);
/* A vector [n] in the panels' order. */
SLEB_EXPORT void sleb_pack_vector(const sleb_linear *w, const float *values, float *out);
/* Packs row-major values [n, k] of w's format into `out` of sleb_packed_bytes. I8: signed bytes. By groups: k padded
 * to a multiple of 32, of I4 two values a byte; scale, and minimum or zero point unless NULL, float16 [n, groups]. */
SLEB_EXPORT void sleb_pack(sleb_pool *pool, const sleb_linear *w, const void *values, const uint16_t *scale,
                           const uint16_t *minimum, void *out);

/* --- workspace.c --- */

/* Bytes of scratch that one thread needs to sample from rows of vocab_size logits; what lies there between calls is
 * free to change. */
SLEB_EXPORT size_t sleb_sample_bytes(int32_t vocab_size);

/* Memory for steps of up to m->max_tokens tokens, `samples` sampling rows and `sequences`. widest: most inputs of any
 * matrix; activated: most inputs of a second product of an MLP or a patch. NULL when the system gives none. */
SLEB_EXPORT sleb_workspace *sleb_workspace_create(const sleb_model *m, int32_t widest, int32_t activated,
                                                  int32_t samples, int32_t sequences, size_t *bytes);
SLEB_EXPORT void sleb_workspace_destroy(sleb_workspace *ws, size_t bytes);
/* The residual stream [T, E] after the last step. */
SLEB_EXPORT const float *sleb_workspace_residual(const sleb_workspace *ws);

#endif
