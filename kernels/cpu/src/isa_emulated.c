/* As isa_amx.c, its tile instructions emulated: how layout and tails are tested where there are none. Slow. */
#define SLEB_HAS_BF16 1
#define SLEB_HAS_AMX 1
#define SLEB_AMX_EMULATED 1
#define SLEB_TABLE sleb_isa_amx_emulated
#define SLEB_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,avx512bf16"
#include "isa.h"
