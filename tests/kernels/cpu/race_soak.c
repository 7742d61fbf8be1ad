/* Random steps of a random tiny model by the C interface: chunks and single tokens, three depths, contexts that are
 * split between threads, logits, highest logits and sampled tokens. Every schedule runs twice from the same beginning
 * and must give the same bits. For ThreadSanitizer; see test_cpu_races.py.
 *
 *     race_soak LEVEL FORMAT(0-4) THREADS STEPS [SEED]
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sleb_cpu.h"

/* No size is a multiple of a panel or a group, so that all tails run. */
enum {
    HIDDEN = 72, HEADS = 4, KV_HEADS = 2, DIM = 24, MIDDLE = 88, VOCAB = 301, BLOCKS = 3, PAGE = 16, HALF = 8,
    SEQUENCES = 7, MAX_TOKENS = 160, LONGEST = 1100, PAGES = (LONGEST + PAGE - 1) / PAGE, DEPTHS = 3, RANK = 21,
    PATCHES = 3, UNITS = 2 * BLOCKS + PATCHES
};

static uint64_t state;

static uint32_t next_random(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)(state * UINT64_C(2685821657736338717) >> 32);
}

static int32_t below(int32_t count) { return (int32_t)(next_random() % (uint32_t)count); }

static void *must(void *memory) {
    if (memory == NULL) fprintf(stderr, "no memory\n"), exit(2);
    return memory;
}

static float *random_floats(size_t count, float centre, float spread) {
    float *values = must(aligned_alloc(64, (count * 4 + 63) / 64 * 64));
    for (size_t i = 0; i < count; i++) values[i] = centre + spread * ((float)next_random() / 2147483648.0f - 1.0f);
    return values;
}

static sleb_linear random_linear(sleb_pool *pool, int32_t format, int32_t n, int32_t k, int32_t gated, int32_t biased) {
    sleb_linear w = {.format = format, .n = n, .k = k, .gated = gated, .group = SLEB_GROUP};
    size_t count = (size_t)n * (size_t)((k + 31) / 32 * 32), groups = (size_t)n * (size_t)((k + 31) / 32);
    float *values = random_floats(count, 0.0f, 0.25f);
    uint16_t *halves = (uint16_t *)values, *scale = must(malloc(groups * 2)), *minimum = must(malloc(groups * 2));
    if (format == SLEB_BF16)
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, &values[i], 4);
            halves[i] = (uint16_t)(bits >> 16);
        }
    else if (format == SLEB_F16) /* of either sign, from 1/16 to 1/8 */
        for (size_t i = 0; i < count; i++) halves[i] = (uint16_t)(0x2c00 | (next_random() & 0x83ff));
    else if (format >= SLEB_I8) /* never -128 */
        for (size_t i = 0; i < count; i++) ((int8_t *)values)[i] = (int8_t)(below(255) - 127);
    for (size_t i = 0; i < groups; i++) scale[i] = 0x2400, minimum[i] = 0xa780; /* 1/64 and -7.5/256 */
    void *data = must(sleb_map(sleb_packed_bytes(&w), 0));
    w.data = data;
    sleb_pack(pool, &w, values, scale, minimum, data);
    free(values), free(scale), free(minimum);
    for (int32_t vector = 0; vector < 2; vector++) {
        if (!(vector ? biased : format == SLEB_I8)) continue;
        float *plain = random_floats((size_t)n, vector ? 0.0f : 0.002f, vector ? 0.1f : 0.0005f);
        float *packed = random_floats((size_t)sleb_num_packed_outputs(&w), 0.0f, 0.0f);
        sleb_pack_vector(&w, plain, packed);
        free(plain);
        *(vector ? &w.bias : &w.scale) = packed;
    }
    return w;
}

/* Five experts, of which a row gets two, and one that every row gets by a gate, wider than they are. */
static sleb_experts *random_experts(sleb_pool *pool, int32_t format) {
    sleb_experts *x = must(calloc(1, sizeof *x));
    sleb_linear *up = must(calloc(6, sizeof *up)), *down = must(calloc(6, sizeof *down));
    for (int32_t e = 0; e < 6; e++) {
        int32_t inner = e == 5 ? MIDDLE : 40;
        up[e] = random_linear(pool, format, 2 * inner, HIDDEN, 1, e == 1);
        down[e] = random_linear(pool, format, HIDDEN, inner, 0, e == 2);
    }
    *x = (sleb_experts){random_linear(pool, SLEB_F32, 6, HIDDEN, 0, 1), up, down, random_floats(5, 0.0f, 0.1f), 5, 2, 1,
                        SLEB_SHARED_GATED};
    return x;
}

static void fill_units(sleb_unit *units, sleb_pool *pool, int32_t format, int32_t kv_bytes) {
    size_t cache = (size_t)SEQUENCES * PAGES * KV_HEADS * PAGE * 32 * (size_t)kv_bytes;
    for (int32_t i = 0; i < 2 * BLOCKS; i++) {
        sleb_unit *u = &units[i];
        /* The first block is parallel, the second without norms before, the last with norms after. */
        u->norm = (sleb_norm){random_floats(HIDDEN, 1.0f, 0.2f), NULL, SLEB_NORM_RMS};
        if (i / 2 != 0) u->post_norm = u->norm;
        if (i / 2 == 1) u->norm.kind = SLEB_NO_NORM;
        u->parallel = i == 0;
        u->kind = i % 2 == 0 ? SLEB_ATTENTION : SLEB_MLP;
        if (u->kind == SLEB_ATTENTION) {
            u->first = random_linear(pool, format, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 0, i == 0);
            u->second = random_linear(pool, format, HIDDEN, HEADS * DIM, 0, i == 2);
            u->key_cache = must(sleb_map(cache, 0)), u->value_cache = must(sleb_map(cache, 0));
            u->window = i == 4 ? 300 : 0;
            if (i != 2) {
                u->cos = random_floats((size_t)LONGEST * HALF, 0.0f, 0.7f);
                u->sin = random_floats((size_t)LONGEST * HALF, 0.0f, 0.7f);
                u->rotary_half = HALF;
            }
            if (i == 2) u->sinks = random_floats(HEADS, 0.0f, 2.0f);
            if (i == 0) {
                u->query_norm = (sleb_norm){random_floats(HEADS * DIM, 1.0f, 0.2f), NULL, SLEB_NORM_RMS};
                u->key_norm = (sleb_norm){random_floats(KV_HEADS * DIM, 1.0f, 0.2f), NULL, SLEB_NORM_RMS};
            }
        } else {
            int32_t gated = i != 3;
            u->activation = i == 3 ? SLEB_GELU_TANH : SLEB_SILU;
            u->first = random_linear(pool, format, gated ? 2 * MIDDLE : MIDDLE, HIDDEN, gated, i == 1);
            u->second = random_linear(pool, format, HIDDEN, MIDDLE, 0, 0);
            if (i == 5) u->experts = random_experts(pool, format), u->post_norm.kind = SLEB_NO_NORM;
        }
    }
    for (int32_t i = 2 * BLOCKS; i < UNITS; i++) units[i].kind = SLEB_PATCH, units[i].norm.kind = SLEB_NORM_RMS;
    sleb_unit *low_rank = &units[2 * BLOCKS], *full = low_rank + 1, *scale = full + 1;
    low_rank->first = random_linear(pool, format, RANK, HIDDEN, 0, 0);
    low_rank->second = random_linear(pool, format, HIDDEN, RANK, 0, 1);
    full->second = random_linear(pool, format, HIDDEN, HIDDEN, 0, 1);
    scale->scale = random_floats(HIDDEN, 1.0f, 0.2f), scale->shift = random_floats(HIDDEN, 0.0f, 0.1f);
}

typedef struct {
    int32_t done[SEQUENCES];
    uint64_t sum; /* of all bits that came out */
} run_state;

static void add_bits(run_state *run, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) run->sum = (run->sum ^ ((const uint8_t *)data)[i]) * UINT64_C(1099511628211);
}

/* Sequence i has depth i % DEPTHS; the last BLOCKS - 1 blocks go one by one, and what lacks any has the patches. */
static void one_step(const sleb_isa *isa, const sleb_model *m, run_state *run, char *scratch) {
    static int32_t token_ids[MAX_TOKENS], positions[MAX_TOKENS], pages[SEQUENCES * PAGES];
    static float logits[SEQUENCES * VOCAB];
    int32_t starts[SEQUENCES + 1] = {0}, lens[SEQUENCES], page_starts[SEQUENCES], depths[SEQUENCES];
    int32_t firsts[UNITS] = {0}, counts[UNITS], samples[SEQUENCES], argmax[SEQUENCES], rows = 0, tokens = 0;
    int32_t lone = below(3) == 0, chosen = below(SEQUENCES); /* one sequence alone: its context is split */
    for (int32_t depth = 0; depth < DEPTHS; depth++)
        for (int32_t q = depth; q < SEQUENCES; q += DEPTHS) {
            int32_t most = below(3) ? 1 : below(5) ? 20 : MAX_TOKENS, count = 1 + below(most);
            if (lone ? q != chosen : below(4) == 0) continue;
            if (run->done[q] + count > LONGEST) run->done[q] = 0;
            if (run->done[q] == 0 && below(2)) count = MAX_TOKENS; /* a long context soon */
            if (count > MAX_TOKENS - tokens) count = MAX_TOKENS - tokens;
            if (count == 0) continue;
            for (int32_t i = 0; i < count; i++) {
                token_ids[tokens + i] = below(VOCAB);
                positions[tokens + i] = run->done[q] + i;
            }
            run->done[q] += count, tokens += count;
            lens[rows] = run->done[q], page_starts[rows] = rows * PAGES, depths[rows] = depth;
            for (int32_t p = 0; p < PAGES; p++) pages[rows * PAGES + p] = (p * 5 % PAGES) * SEQUENCES + q;
            samples[rows] = tokens - 1, starts[++rows] = tokens;
        }
    if (rows == 0) return;
    for (int32_t unit = 0; unit < UNITS; unit++) {
        counts[unit] = 0;
        for (int32_t row = 0; row < rows; row++) counts[unit] += unit / 2 < BLOCKS - depths[row];
        if (unit >= 2 * BLOCKS) firsts[unit] = counts[2 * BLOCKS - 1], counts[unit] = rows;
    }
    int32_t way = below(4);
    sleb_step step = {
        .num_tokens = tokens, .num_sequences = rows, .num_samples = way == 3 ? 0 : rows, .token_ids = token_ids,
        .positions = positions, .query_starts = starts, .context_lens = lens, .page_starts = page_starts,
        .pages = pages, .unit_starts = firsts, .unit_ends = counts, .samples = samples,
        .logits = way == 1 ? NULL : logits, .argmax = way == 0 ? NULL : argmax,
    };
    isa->forward(m, &step);
    if (step.num_samples && step.argmax) add_bits(run, argmax, (size_t)rows * 4);
    if (!step.num_samples || !step.logits) return;
    add_bits(run, logits, (size_t)rows * VOCAB * 4);
    for (int32_t i = 0; i < rows * VOCAB; i++)
        if (!isfinite(logits[i])) fprintf(stderr, "a logit is %f\n", (double)logits[i]), exit(3);
    double temperature[SEQUENCES], top_p[SEQUENCES], min_p[SEQUENCES], points[SEQUENCES];
    int32_t top_k[SEQUENCES];
    int64_t sampled[SEQUENCES];
    for (int32_t row = 0; row < rows; row++) {
        temperature[row] = 0.7, top_p[row] = below(2) ? 0.9 : 1.0, min_p[row] = below(2) ? 0.02 : 0.0;
        points[row] = below(1000) / 1000.0, top_k[row] = below(2) ? 40 : 0;
    }
    sleb_sample call = {
        .logits = logits, .temperature = temperature, .top_p = top_p, .min_p = min_p, .points = points, .top_k = top_k,
        .chosen = sampled, .scratch = scratch, .pool = m->pool, .num_rows = rows, .vocab_size = VOCAB,
    };
    isa->sample(&call);
    add_bits(run, sampled, (size_t)rows * 8);
}

int main(int argc, char **argv) {
    if (argc < 5) return fprintf(stderr, "race_soak LEVEL FORMAT THREADS STEPS [SEED]\n"), 2;
    const sleb_isa *isa = sleb_select(argv[1]);
    if (isa == NULL) return fprintf(stderr, "no level %s\n", argv[1]), 2;
    int32_t format = atoi(argv[2]), threads = atoi(argv[3]), steps = atoi(argv[4]);
    state = argc > 5 ? (uint64_t)atoll(argv[5]) : 88172645463325252u;
    /* 20 µs of spinning: threads both spin and sleep between steps. */
    sleb_pool *pool = must(sleb_pool_create(threads, NULL, 20000));
    sleb_unit units[UNITS] = {0};
    int32_t kv_format = format > SLEB_BF16 ? SLEB_BF16 : format;
    fill_units(units, pool, format, kv_format == SLEB_F32 ? 4 : 2);
    sleb_model m = {
        .hidden_size = HIDDEN, .num_heads = HEADS, .num_kv_heads = KV_HEADS, .head_dim = DIM,
        .vocab_size = VOCAB, .num_units = UNITS, .page_size = PAGE, .kv_format = kv_format, .embed_packed = 1,
        .max_tokens = MAX_TOKENS, .expert_slots = 3, .router_size = 6, .qk_whole = 1, .norm_eps = 1e-5f, .scale = 0.2f, .embed_scale = 1.5f,
        .residual_scale = 0.8f, .clip = 3.0f, .softcap = 5.0f, .logit_softcap = 20.0f,
        .units = units, .final_norm = {random_floats(HIDDEN, 1.0f, 0.2f), NULL, SLEB_NORM_RMS},
        .head = random_linear(pool, format == SLEB_I4 ? SLEB_I8 : format, VOCAB, HIDDEN, 0, 0), .pool = pool,
    };
    size_t bytes;
    m.workspace = must(sleb_workspace_create(&m, HEADS * DIM, MIDDLE, 64, SEQUENCES, &bytes));
    char *scratch = must(aligned_alloc(4096, sleb_sample_bytes(VOCAB) * (size_t)threads));
    uint64_t first = 0, begin = state;
    for (int32_t repeat = 0; repeat < 2; repeat++) {
        run_state run = {{0}, UINT64_C(14695981039346656037)};
        state = begin;
        for (int32_t i = 0; i < steps; i++) one_step(isa, &m, &run, scratch);
        if (repeat && run.sum != first) return fprintf(stderr, "the second run gave other bits\n"), 4;
        first = run.sum;
    }
    sleb_workspace_destroy(m.workspace, bytes);
    sleb_pool_destroy(pool);
    printf("soaked %d steps, %016llx\n", steps, (unsigned long long)first);
    return 0;
}
