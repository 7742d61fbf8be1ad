/* Compiles all kernels for the instruction set that the including file names, whatever the compiler's default is. */
#ifndef SLEB_ISA_H
#define SLEB_ISA_H

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(SLEB_TARGET))), apply_to = function)
#else
#define SLEB_PRAGMA_(text) _Pragma(#text)
#define SLEB_PRAGMA(text) SLEB_PRAGMA_(text)
#pragma GCC push_options
SLEB_PRAGMA(GCC target(SLEB_TARGET))
#endif

#include "forward.h"
#include "sample.h"
#include "sleb_cpu.h"

const sleb_isa SLEB_TABLE = {forward, head, linear, attention_op, sample};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#endif
