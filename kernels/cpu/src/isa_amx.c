/* AVX-512 with bf16, and tiles: Sapphire Rapids and later. */
#define SLEB_HAS_BF16 1
#define SLEB_HAS_AMX 1
#define SLEB_AMX_EMULATED 0
#define SLEB_TABLE sleb_isa_amx
#define SLEB_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,avx512bf16,amx-tile,amx-bf16"
#include "isa.h"
