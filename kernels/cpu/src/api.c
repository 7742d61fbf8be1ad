/* What the library is: its key, and the kernels of each level. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sleb_cpu.h"

SLEB_EXPORT const char sleb_source_marker[] = "SLEB_SOURCE_KEY=" SLEB_SOURCE_KEY;
const char *sleb_source_key(void) { return SLEB_SOURCE_KEY; }

#if defined(__x86_64__)
extern const sleb_isa sleb_isa_avx512, sleb_isa_avx512bf16, sleb_isa_amx, sleb_isa_amx_emulated;

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

const sleb_isa *sleb_select(const char *level) {
    if (!strcmp(level, "avx512")) return &sleb_isa_avx512;
    if (!strcmp(level, "avx512bf16")) return &sleb_isa_avx512bf16;
    if (!strcmp(level, "amx-emulated")) return &sleb_isa_amx_emulated;
    if (!strcmp(level, "amx"))
        return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? &sleb_isa_amx : NULL;
    return NULL;
}
#else
const sleb_isa *sleb_select(const char *level) {
    (void)level;
    return NULL;
}
#endif
