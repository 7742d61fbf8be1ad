/* The layout of a packed matrix, one for every kernel, so that no weight is stored twice.
 *
 * Panels of 32 outputs. A panel is a list of lines, each of 64 bytes for 16 outputs and as many inputs as one
 * instruction takes: 1 float32, 2 bf16, 4 bytes (float16: 1, in 32 bytes). The line of the other 16 outputs follows.
 * The tile registers of AMX read the same lines, and the embedding that is tied to a head is read from the head's.
 *
 *   float32, float16   [panels, K, 32]
 *   bf16               [panels, K / 2, 32, 2]
 *   I8                 [panels, K / 4, 32, 4], bytes around 128
 *   by groups          [panels, groups]: the lines of the group's inputs, then 32 scales and, unless the base is the
 *                      middle, 32 minima or zero points, float16
 *     I8_GROUPS, _HALVES lines as I8 has them
 *     I4                 a step of 32 inputs is 4 times 32 outputs of 4 bytes, of which the low nibbles are one quad of
 *                      inputs and the high ones the next
 */
#ifndef SLEB_PANEL_H
#define SLEB_PANEL_H

#include "sleb_cpu.h"

enum { I4_STEP_BYTES = 512 };

static inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static inline int32_t round_up(int32_t a, int32_t b) { return ceil_div(a, b) * b; }

static inline int32_t num_panels(const sleb_linear *w) {
    return w->gated ? ceil_div(w->n / 2, SLEB_PANEL / 2) : ceil_div(w->n, SLEB_PANEL);
}

/* Of a format by groups: bytes of a group's lines in a panel, and of all of it. */
static inline size_t line_bytes(const sleb_linear *w) {
    return (size_t)w->group * SLEB_PANEL / (w->format == SLEB_I4 ? 2 : 1);
}
static inline size_t group_bytes(const sleb_linear *w) {
    return line_bytes(w) + (w->base == SLEB_MIDDLE ? 64 : 128);
}

static inline size_t panel_bytes(const sleb_linear *w) {
    size_t inputs = (size_t)round_up(w->k, SLEB_GROUP);
    switch (w->format) {
    case SLEB_F32: return inputs * SLEB_PANEL * 4;
    case SLEB_I8: return inputs * SLEB_PANEL;
    case SLEB_I4:
    case SLEB_I8_GROUPS:
    case SLEB_I8_HALVES: return (size_t)ceil_div((int32_t)inputs, w->group) * group_bytes(w);
    default: return inputs * SLEB_PANEL * 2;
    }
}

#endif
