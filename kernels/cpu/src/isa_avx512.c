/* AVX-512 with VNNI, no bf16: Cascade Lake, Ice Lake. */
#define SLEB_HAS_BF16 0
#define SLEB_HAS_AMX 0
#define SLEB_AMX_EMULATED 0
#define SLEB_TABLE sleb_isa_avx512
#define SLEB_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2"
#include "isa.h"
