/* For ThreadSanitizer: it does not see masked loads and stores, which are instructions and not accesses of memory in
 * its eyes, and most results of the kernels are written by them. Here they are loops over lanes. Forced into every C
 * file of the kernels by -include, so the kernels themselves know nothing of it. */
#define _GNU_SOURCE /* as files of the kernels have it: too late for them after the first header */
#include <immintrin.h>
#include <stdint.h>

#define RACE static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl")))

RACE void race_store_ps(void *to, __mmask16 mask, __m512 x) {
    float lanes[16];
    _mm512_storeu_ps(lanes, x);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((float *)to)[i] = lanes[i];
}

RACE __m512 race_load_ps(__m512 other, __mmask16 mask, const void *from) {
    float lanes[16];
    _mm512_storeu_ps(lanes, other);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) lanes[i] = ((const float *)from)[i];
    return _mm512_loadu_ps(lanes);
}

RACE void race_store_epi16(void *to, uint32_t mask, __m512i x, int count) {
    uint16_t lanes[32];
    _mm512_storeu_si512(lanes, x);
    for (int i = 0; i < count; i++)
        if (mask >> i & 1) ((uint16_t *)to)[i] = lanes[i];
}

#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_loadu_ps
#undef _mm512_mask_storeu_epi16
#undef _mm256_mask_storeu_epi16
#define _mm512_mask_storeu_ps(to, mask, x) race_store_ps(to, mask, x)
#define _mm512_maskz_loadu_ps(mask, from) race_load_ps(_mm512_setzero_ps(), mask, from)
#define _mm512_mask_loadu_ps(other, mask, from) race_load_ps(other, mask, from)
#define _mm512_mask_storeu_epi16(to, mask, x) race_store_epi16(to, mask, x, 32)
#define _mm256_mask_storeu_epi16(to, mask, x) race_store_epi16(to, mask, _mm512_castsi256_si512(x), 16)
