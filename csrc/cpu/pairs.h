// Matrices of bfloat16 whose rows are stored in pairs, and the instructions that multiply them.
#pragma once
#ifdef FLASHPO_EMULATE
#include "emulated.h"
#else
#include <immintrin.h>
#endif

#include "isa.h"

namespace flashpo::FLASHPO_ISA {

// b with its rows in pairs. The strides, in numbers, lead to the next pair, the next 16 columns and the next 32 rows.
struct Pairs {
  const bf16* p;
  int64_t pair, group, step;
};

}  // namespace flashpo::FLASHPO_ISA
