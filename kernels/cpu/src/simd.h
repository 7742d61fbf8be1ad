/* Vector helpers. This header and those made of it are compiled once a level: SLEB_HAS_BF16 is the level's. */
#ifndef SLEB_SIMD_H
#define SLEB_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "sleb_cpu.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE __m512 load_f32(const void *p) { return _mm512_loadu_ps(p); }
INLINE __m512i load_i(const void *p) { return _mm512_loadu_si512(p); }
INLINE __m512 load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE __m512 load_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}

INLINE int32_t read_i32(const void *p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

INLINE float read_f32(const void *p) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* Rounds to nearest even, in the low half of each lane; a NaN stays one. */
INLINE __m512i round_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

INLINE __m256i to_bf16(__m512 x) {
#if SLEB_HAS_BF16
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    return _mm512_cvtepi32_epi16(round_bf16(x));
#endif
}

INLINE float bf16_to_f32(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    return read_f32(&wide);
}

INLINE __mmask16 tail_mask(int32_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1u); }

/* 2^x: the Taylor series to degree 6 on [-1/2, 1/2], relative error below 2e-7. Far below the smallest number, and for
 * -inf, it is 0. */
INLINE __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

#define LOG2_E 1.44269504088896340736f

INLINE __m512 silu_ps(__m512 x) {
    __m512 falling = exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_div_ps(x, _mm512_add_ps(falling, _mm512_set1_ps(1.0f)));
}

/* tanh(x) = 1 - 2 / (exp(2x) + 1) */
INLINE __m512 tanh_ps(__m512 x) {
    __m512 grown = exp2_ps(_mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2_E)), _mm512_set1_ps(60.0f)));
    __m512 quotient = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(grown, _mm512_set1_ps(1.0f)));
    return _mm512_sub_ps(_mm512_set1_ps(1.0f), quotient);
}

/* scale · tanh(x · inverse): a soft cap where inverse is 1 / scale. A NaN stays one. */
INLINE __m512 softcap_ps(__m512 x, float inverse, float scale) {
    __m512 capped = _mm512_mul_ps(tanh_ps(_mm512_mul_ps(x, _mm512_set1_ps(inverse))), _mm512_set1_ps(scale));
    return _mm512_mask_mov_ps(capped, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

INLINE __m512 gelu_tanh_ps(__m512 x) {
    __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 inner = _mm512_fmadd_ps(cubed, _mm512_set1_ps(0.044715f), x);
    __m512 t = tanh_ps(_mm512_mul_ps(inner, _mm512_set1_ps(0.7978845608f)));
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), _mm512_add_ps(t, _mm512_set1_ps(1.0f)));
}

static __attribute__((noinline)) __m512 gelu_ps(__m512 x) { /* exact; rare, so lane by lane */
    _Alignas(64) float lanes[16];
    _mm512_store_ps(lanes, x);
    for (int32_t i = 0; i < 16; i++) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
    return _mm512_load_ps(lanes);
}

INLINE __m512 relu_ps(__m512 x) { return _mm512_max_ps(_mm512_setzero_ps(), x); } /* of a NaN the second */

INLINE __m512 activate_ps(__m512 x, int32_t activation) {
    switch (activation) {
    case SLEB_SILU: return silu_ps(x);
    case SLEB_RELU: return relu_ps(x);
    case SLEB_RELU2: return _mm512_mul_ps(relu_ps(x), relu_ps(x));
    case SLEB_GELU: return gelu_ps(x);
    case SLEB_IDENTITY: return x;
    default: return gelu_tanh_ps(x);
    }
}

/* activation(gate) · up; the clamped one as kernels/reference/ops.py has it. Of a NaN min and max give the second. */
INLINE __m512 gate_ps(__m512 gate, __m512 up, int32_t activation) {
    if (activation != SLEB_CLAMPED_SWIGLU) return _mm512_mul_ps(activate_ps(gate, activation), up);
    const __m512 limit = _mm512_set1_ps(7.0f), lowest = _mm512_set1_ps(-7.0f);
    gate = _mm512_min_ps(limit, gate);
    up = _mm512_max_ps(lowest, _mm512_min_ps(limit, up));
    __m512 falling = exp2_ps(_mm512_mul_ps(gate, _mm512_set1_ps(-1.702f * LOG2_E)));
    __m512 glu = _mm512_div_ps(gate, _mm512_add_ps(falling, _mm512_set1_ps(1.0f)));
    return _mm512_mul_ps(glu, _mm512_add_ps(up, _mm512_set1_ps(1.0f)));
}

INLINE int32_t min_i(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t max_i(int32_t a, int32_t b) { return a > b ? a : b; }

#endif
