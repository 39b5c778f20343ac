// The processor's vector instructions, where a file is compiled for them.
#pragma once

#if defined(__AVX2__)
// GCC 12 takes the intrinsics' own undefined operands for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
