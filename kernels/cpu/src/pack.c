/* Weights into panels; see panel.h. */
#include <string.h>

#include "panel.h"
#include "pool.h"

size_t sleb_packed_bytes(const sleb_linear *w) { return (size_t)num_panels(w) * panel_bytes(w); }

int32_t sleb_num_packed_outputs(const sleb_linear *w) { return num_panels(w) * SLEB_PANEL; }

/* The output that a place in a panel holds, or -1 for padding. */
static int32_t output_at(const sleb_linear *w, int32_t panel, int32_t place) {
    if (!w->gated) {
        int32_t row = panel * SLEB_PANEL + place;
        return row < w->n ? row : -1;
    }
    int32_t row = panel * 16 + place % 16, half = w->n / 2;
    return row < half ? row + place / 16 * half : -1;
}

void sleb_pack_vector(const sleb_linear *w, const float *values, float *out) {
    for (int32_t panel = 0; panel < num_panels(w); panel++)
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

/* Of I4 nibbles in: even k low. Out: a quad of k in the low nibbles of a line, the next in the high ones. */
static void pack_groups(const packing *p, int32_t row, int32_t place, char *out) {
    const sleb_linear *w = p->w;
    size_t inputs = (size_t)ceil_div(w->k, SLEB_GROUP) * SLEB_GROUP, size = (size_t)w->group;
    size_t groups = (inputs + size - 1) / size;
    const uint8_t *q = (const uint8_t *)p->values + (size_t)row * (w->format == SLEB_I4 ? inputs / 2 : inputs);
    for (size_t k = 0; k < inputs; k++) {
        char *group = out + k / size * group_bytes(w);
        size_t at = k % size;
        if (w->format == SLEB_I4) {
            uint8_t nibble = k % 2 ? q[k / 2] >> 4 : q[k / 2] & 15;
            group[at / 8 * 128 + (size_t)place * 4 + at % 4] |= (char)(at % 8 >= 4 ? nibble << 4 : nibble);
        } else {
            group[(at / 4 * SLEB_PANEL + (size_t)place) * 4 + at % 4] = (char)q[k];
        }
    }
    for (size_t group = 0; group < groups; group++) {
        char *scales = out + group * group_bytes(w) + line_bytes(w) + 2 * place;
        memcpy(scales, &p->scale[(size_t)row * groups + group], 2);
        if (p->minimum) memcpy(scales + 64, &p->minimum[(size_t)row * groups + group], 2);
    }
}

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
    } else {
        pack_groups(p, row, place, out);
    }
}

static void pack_thread(void *argument, int32_t index) {
    (void)index;
    const packing *p = argument;
    int32_t panels = num_panels(p->w), begin, end;
    size_t bytes = panel_bytes(p->w);
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

void sleb_pack(sleb_pool *pool, const sleb_linear *w, const void *values, const uint16_t *scale,
               const uint16_t *minimum, void *out) {
    packing p = {w, values, scale, minimum, out, pool};
    sleb_pool_run(pool, pack_thread, &p);
}
