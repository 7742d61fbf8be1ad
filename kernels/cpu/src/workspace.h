/* Memory that a model's steps use again and again: made once, zeroed, so that padding stays finite. */
#ifndef SLEB_WORKSPACE_H
#define SLEB_WORKSPACE_H

#include "sleb_cpu.h"

/* Scratch of one thread that samples (sample.h): vectors may write past the last of V values, and sums are of 256. */
enum { SLEB_SUM_VALUES = 256, SLEB_BUCKETS = 1024 };
static inline size_t sleb_sample_padded(int32_t vocab_size) {
    return ((size_t)vocab_size + 16 + SLEB_SUM_VALUES - 1) / SLEB_SUM_VALUES * SLEB_SUM_VALUES;
}

enum { SLEB_FEW_ROWS = 4, SLEB_ATTENTION_ROWS = 32, SLEB_ATTENTION_KEYS = 128 };

/* What one thread needs for itself. */
typedef struct {
    char *few;            /* a product's operand of a few rows, which each thread prepares on its own */
    float *few_scale, *few_offset;
    int32_t *few_init;
    float *row;           /* one row in float32; in attention a head, padded, and all heads */
    float *tile;          /* [32, 32] sums */
    char *panel;          /* a panel of weights widened to bf16 */
    float *best;          /* [B] highest logit so far */
    int32_t *best_index;  /* [B] */
    float *scores;        /* [rows, keys] */
    char *probs;          /* [rows, keys] softmax, not yet divided by its sum */
    float *mixed;         /* [rows, Dp] */
    char *wide;           /* [2, keys, Dp]: keys and values that are kept in bytes, widened */
    float *kv_scale;      /* [2, keys] */
    float *stats;         /* [2, rows] maximum and sum */
} sleb_local;

/* A piece of attention work: one key-value head's part is a task. */
typedef struct {
    int32_t sequence, first_row, num_rows, first_key, num_keys, num_splits, partial; /* partial: -1 when whole */
} sleb_piece;

/* Of an MLP with experts, see experts.h; T rows with k experts each. */
typedef struct {
    float *logits;                      /* [T, router outputs] */
    int32_t *chosen, *slots;            /* [T, k]: experts, and where each lies among the slots */
    float *shares;                      /* [T, k] */
    int32_t *rows;                      /* [T · k]: of a slot */
    float *slot_shares;                 /* [T · k] */
    int32_t *starts, *tasks;            /* [N + 1]: of experts, where slots and tasks begin */
} sleb_slots;

struct sleb_workspace {
    int32_t max_partials;
    float *residual;              /* [T, E], float32 for every format: small beside weights, rounded in operands only */
    float *first;                 /* [T, qkv features], or [T, E]: an update before its norm */
    char *query;                  /* [T, H, Dp] */
    char *attended, *activated;   /* [T, .], as the next product reads them, or float32 */
    char *operand;                /* [T, .] */
    float *group_scale, *group_offset;
    int32_t *group_init;
    float *head_rows;             /* [B, E] */
    sleb_piece *pieces;
    int32_t *piece_ends;          /* [S + 1]: pieces of the first sequences */
    float *partials;              /* [partials, K, rows, Dp + 2] */
    sleb_local *locals;
    sleb_slots slots;
};

#endif
