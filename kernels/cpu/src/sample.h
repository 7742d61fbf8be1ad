/* One token a row by inverting the cumulative distribution, without sorting; the reference is kernels/reference/ops.py.
 *
 * Filters only ever keep what is greatest, so each is a bound on the logit. The bounds of min-p and, from the maxima of
 * small groups, of top-k leave a list of a few tokens; top-p first drops what is too small to matter together. What the
 * list keeps is then found by a histogram (`cut`). Weights are 2^((x - highest) log2(e) / temperature) in float64. */
#ifndef SLEB_SAMPLE_H
#define SLEB_SAMPLE_H

#include <float.h>

#include "glibc.h"
#include "panel.h"
#include "pool.h"
#include "simd.h"
#include "workspace.h"

SLEB_OLDEST(log, 2.2.5)
SLEB_OLDEST(log2, 2.2.5)

enum { SUM_VALUES = SLEB_SUM_VALUES, GROUP_VALUES = SLEB_SUM_VALUES, MAX_BUCKETS = SLEB_BUCKETS, ALL_TIES = INT32_MAX };

/* Values in the vocabulary's order; ids NULL: value i is token i. */
typedef struct {
    const float *values;
    const int32_t *ids;
    int32_t count;
} tokens;

typedef struct {
    double highest, factor; /* weight = 2^((value - highest) factor) */
} scaling;

/* One thread's part of the scratch memory, as sleb_sample_bytes counts it. */
typedef struct {
    double *weights, *sums, *buckets;
    float *values, *work, *groups;
    int32_t *ids;
} sample_scratch;

static sample_scratch scratch_of(const sleb_sample *call, int32_t index) {
    size_t padded = sleb_sample_padded(call->vocab_size);
    sample_scratch s;
    s.weights = (double *)(call->scratch + (size_t)index * sleb_sample_bytes(call->vocab_size));
    s.sums = s.weights + padded;
    s.buckets = s.sums + padded / SUM_VALUES;
    s.values = (float *)(s.buckets + MAX_BUCKETS);
    s.work = s.values + padded;
    s.groups = s.work + padded;
    s.ids = (int32_t *)(s.groups + padded / GROUP_VALUES * 16);
    return s;
}

/* 2^x for x <= 0; the Taylor series on [-1/2, 1/2] to degree 8, relative error below 3e-10. -inf gives 0. */
INLINE __m512d exp2_pd(__m512d x) {
    x = _mm512_max_pd(x, _mm512_set1_pd(-2000.0));
    __m512d whole = _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512d part = _mm512_sub_pd(x, whole);
    __m512d y = _mm512_set1_pd(1.3215486790144307e-6);
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(1.5252733804059841e-5));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(1.5403530393381608e-4));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(1.3333558146428443e-3));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(9.6181291076284772e-3));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(5.5504108664821580e-2));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(2.4022650695910072e-1));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(6.9314718055994531e-1));
    y = _mm512_fmadd_pd(y, part, _mm512_set1_pd(1.0));
    return _mm512_scalef_pd(y, whole);
}

INLINE __m512d weights_of(__m256 values, scaling s) {
    __m512d below = _mm512_sub_pd(_mm512_cvtps_pd(values), _mm512_set1_pd(s.highest));
    return exp2_pd(_mm512_mul_pd(below, _mm512_set1_pd(s.factor)));
}

INLINE __m256 load_8(const float *from, int32_t count) {
    if (count >= 8) return _mm256_loadu_ps(from);
    return _mm256_mask_loadu_ps(_mm256_set1_ps(-INFINITY), (__mmask8)tail_mask(count), from);
}

INLINE __m512 load_16(const float *from, int32_t count, float filler) {
    if (count >= 16) return _mm512_loadu_ps(from);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(filler), tail_mask(count), from);
}

/* The highest value, NaN if any is one; groups: NULL, or where the maxima of lanes go, 16 for each GROUP_VALUES. */
static float find_highest(const float *x, int32_t count, float *groups) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    __mmask16 unordered = 0;
    for (int32_t start = 0; start < count; start += GROUP_VALUES) {
        int32_t end = min_i(start + GROUP_VALUES, count), i = start;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (; i + 64 <= end; i += 64) {
            __m512 a = load_f32(x + i), b = load_f32(x + i + 16), c = load_f32(x + i + 32), d = load_f32(x + i + 48);
            unordered |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
            most = _mm512_max_ps(most, _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
        }
        for (; i < end; i += 16) {
            __m512 a = load_16(x + i, end - i, -INFINITY);
            unordered |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
            most = _mm512_max_ps(most, a);
        }
        highest = _mm512_max_ps(highest, most);
        if (groups) _mm512_storeu_ps(groups + start / GROUP_VALUES * 16, most);
    }
    return unordered ? NAN : _mm512_reduce_max_ps(highest);
}

/* Sums of SUM_VALUES weights each, and their total; each weight too unless `weights` is NULL. */
static double weigh(tokens from, scaling s, double *sums, double *weights) {
    double total = 0.0;
    for (int32_t start = 0; start < from.count; start += SUM_VALUES) {
        int32_t end = min_i(start + SUM_VALUES, from.count);
        __m512d sum = _mm512_setzero_pd();
        for (int32_t i = start; i < end; i += 8) {
            __m512d w = weights_of(load_8(from.values + i, end - i), s);
            sum = _mm512_add_pd(sum, w);
            if (weights) _mm512_storeu_pd(weights + i, w);
        }
        total += sums[start / SUM_VALUES] = _mm512_reduce_add_pd(sum);
    }
    return total;
}

/* The first token at which the cumulative weight exceeds point · total; rounding cannot lead past the last possible. */
static int32_t pick(tokens from, scaling s, double point, double *sums) {
    double target = point * weigh(from, s, sums, NULL), reached = 0.0, before = 0.0;
    int32_t start = 0, chosen = 0;
    for (int32_t i = 0; i < from.count && reached <= target; i += SUM_VALUES) {
        if (sums[i / SUM_VALUES] == 0.0) continue;
        start = i, before = reached;
        reached += sums[i / SUM_VALUES];
    }
    _Alignas(64) double weights[SUM_VALUES];
    int32_t count = min_i(SUM_VALUES, from.count - start);
    for (int32_t i = 0; i < count; i += 8)
        _mm512_store_pd(weights + i, weights_of(load_8(from.values + start + i, count - i), s));
    for (int32_t i = 0; i < count && before <= target; i++) {
        if (weights[i] == 0.0) continue;
        chosen = start + i;
        before += weights[i];
    }
    return from.ids ? from.ids[chosen] : chosen;
}

/* Copies the values above `least`, and the first `ties` that equal it, to the thread's list, which may be `from`. */
static tokens keep(tokens from, float least, int32_t ties, const sample_scratch *s) {
    __m512 bound = _mm512_set1_ps(least);
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t kept = 0;
    for (int32_t i = 0; i < from.count; i += 16) {
        __m512 x = load_16(from.values + i, from.count - i, -INFINITY);
        __mmask16 chosen = _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ);
        if (!chosen) continue;
        if (ties != ALL_TIES) {
            uint32_t equal = _mm512_cmp_ps_mask(x, bound, _CMP_EQ_OQ);
            for (; equal && ties > 0; ties--) equal &= equal - 1; /* what remains are too many */
            chosen &= (__mmask16)~equal;
        }
        __m512i ids = from.ids ? _mm512_maskz_loadu_epi32(tail_mask(from.count - i), from.ids + i)
                               : _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
        /* Compressed in a register: a compressing store is slow on Zen 4. What is too much is overwritten. */
        _mm512_storeu_ps(s->values + kept, _mm512_maskz_compress_ps(chosen, x));
        _mm512_storeu_si512(s->ids + kept, _mm512_maskz_compress_epi32(chosen, ids));
        kept += __builtin_popcount(chosen);
    }
    return (tokens){s->values, s->ids, kept};
}

/* From the greatest value down, equal ones in their order, values are kept while the weight before them is less than
 * `limit`. Returns the least value kept, and in *ties how many of that value. weights: NULL for 1 each; used up.
 *
 * Each round sorts the values that are left into buckets by size and goes on inside the one where the limit lies. The
 * number of a bucket never rises with the value, and the highest and the lowest are never in one, so this ends. */
static float cut(const float *values, double *weights, int32_t count, double limit, const sample_scratch *s,
                 int32_t *ties) {
    double before = 0.0;
    for (;;) {
        __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
        for (int32_t i = 0; i < count; i += 16) {
            low = _mm512_min_ps(low, load_16(values + i, count - i, INFINITY));
            high = _mm512_max_ps(high, load_16(values + i, count - i, -INFINITY));
        }
        float least = _mm512_reduce_min_ps(low);
        double most = _mm512_reduce_max_ps(high);
        if (least == most) {
            *ties = 0;
            for (int32_t i = 0; i < count && before < limit; i++, ++*ties) before += weights ? weights[i] : 1.0;
            return least;
        }
        int32_t last = min_i(count, MAX_BUCKETS) - 1, bucket = 0, left = 0;
        double per_unit = (last + 1) / (most - least), *sums = s->buckets;
        memset(sums, 0, (size_t)(last + 1) * sizeof *sums);
        for (int32_t i = 0; i < count; i++)
            sums[min_i((int32_t)((most - values[i]) * per_unit), last)] += weights ? weights[i] : 1.0;
        for (; bucket < last && before + sums[bucket] < limit; bucket++) before += sums[bucket];
        for (int32_t i = 0; i < count; i++) { /* without a branch, which nothing could predict */
            int32_t inside = min_i((int32_t)((most - values[i]) * per_unit), last) == bucket;
            s->work[left] = values[i];
            if (weights) weights[left] = weights[i];
            left += inside;
        }
        values = s->work, count = left;
    }
}

/* Floats as integers in the same order. */
INLINE int32_t order_of(float x) {
    int32_t bits = read_i32(&x);
    return bits < 0 ? INT32_MIN - bits : bits;
}

INLINE float at_order(int32_t order) {
    int32_t bits = order < 0 ? INT32_MIN - order : order;
    return read_f32(&bits);
}

/* The least value whose logarithm of probability is at most -log(min_p) below the highest one's. */
static float bound_of_min_p(float highest, double temperature, double min_p) {
    double floor = log(min_p);
    int32_t high = order_of(highest), low = order_of(-FLT_MAX);
    while (low < high) {
        int32_t middle = (int32_t)(((int64_t)low + high) >> 1);
        if (((double)at_order(middle) - highest) / temperature < floor)
            low = middle + 1;
        else
            high = middle;
    }
    return at_order(low);
}

/* A bound on the k-th greatest: as many lanes have a value of at least this. */
static float bound_of_top_k(int32_t num_values, int32_t top_k, float bound, const sample_scratch *s) {
    int32_t ties;
    tokens maxima = keep((tokens){s->groups, NULL, ceil_div(num_values, GROUP_VALUES) * 16}, bound, ALL_TIES, s);
    return maxima.count > top_k ? cut(maxima.values, NULL, maxima.count, top_k, s, &ties) : bound;
}

static tokens keep_top_p(tokens from, scaling scale, double top_p, const sample_scratch *s) {
    double total = weigh(from, scale, s->sums, NULL);
    /* Weights below this come to less than 1 - top_p all together: none of them is reached. */
    double negligible = 0.9 * (1.0 - top_p) * total / from.count;
    double bound = fmax(scale.highest + log2(negligible) / scale.factor, -FLT_MAX);
    tokens list = keep(from, nextafterf((float)bound, -FLT_MAX), ALL_TIES, s);
    weigh(list, scale, s->sums, s->weights);
    int32_t ties;
    float least = cut(list.values, s->weights, list.count, top_p * total, s, &ties);
    return keep(list, least, ties, s);
}

static int32_t sample_row(const sleb_sample *call, int32_t row, const sample_scratch *s) {
    int32_t size = call->vocab_size, top_k = call->top_k[row], ties;
    double temperature = call->temperature[row], top_p = fmax(call->top_p[row], DBL_MIN), min_p = call->min_p[row];
    tokens list = {call->logits + (size_t)row * size, NULL, size};
    int32_t cuts = top_k > 0 && top_k < size;
    float highest = find_highest(list.values, size, cuts ? s->groups : NULL), bound = -FLT_MAX;
    if (!isfinite(highest)) return -1; /* no distribution */
    scaling scale = {highest, fmin(1.4426950408889634 / temperature, DBL_MAX)};
    if (min_p > 0.0) bound = bound_of_min_p(highest, temperature, min_p);
    if (cuts) bound = bound_of_top_k(size, top_k, bound, s);
    if (cuts || min_p > 0.0) list = keep(list, bound, ALL_TIES, s);
    if (cuts && list.count > top_k) {
        bound = cut(list.values, NULL, list.count, top_k, s, &ties);
        list = keep(list, bound, ties, s);
    }
    if (top_p < 1.0) list = keep_top_p(list, scale, top_p, s);
    return pick(list, scale, call->points[row], s->sums);
}

static void sample_thread(void *argument, int32_t index) {
    const sleb_sample *call = argument;
    sample_scratch s = scratch_of(call, index);
    int32_t begin, end;
    while (sleb_take(call->pool, call->num_rows, &begin, &end))
        for (int32_t row = begin; row < end; row++) call->chosen[row] = sample_row(call, row, &s);
}

static int32_t sample(const sleb_sample *call) {
    if (call->num_rows == 1) { /* nobody need be woken */
        sample_scratch s = scratch_of(call, 0);
        call->chosen[0] = sample_row(call, 0, &s);
    } else {
        sleb_sample copy = *call;
        sleb_pool_run(call->pool, sample_thread, &copy);
    }
    return 0;
}

#endif
