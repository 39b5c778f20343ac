// The processor's vector instructions, in files that are compiled for them.
#pragma once

#if defined(__AVX2__)
// GCC 12 warns of the undefined operands within the intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
