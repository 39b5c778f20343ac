// Group normalization and SiLU of one row, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace loopfast {

// The arguments that all rows of a call share.
struct Norm {
  int64_t channels, pixels, groups;
  bool channels_last;
  float eps;
  const float *weight, *bias;  // [C]
};

// One row; the pointers are to its first element. `shift` [C] is optional.
struct NormRow {
  loopfast_input x, shift;
};

// The gradients of one row: the one by y, and the targets of the others. Those that are not wanted are NULL.
struct NormGradients {
  loopfast_input grad_y;
  loopfast_output grad_x, grad_shift;
  float *grad_bias, *grad_weight;  // [C], this row's part of the sum over rows
};

// `statistics` is [G, 3]: the mean, its rounding error, and the inverse standard deviation. `workspace` is aligned to
// 64 bytes and has room for workspace_bytes.
struct NormKernels {
  int64_t (*workspace_bytes)(const Norm &norm, bool stash);
  void (*forward)(const Norm &norm, const NormRow &row, loopfast_output y, float *statistics, void *workspace);
  void (*backward)(const Norm &norm, const NormRow &row, const float *statistics, const NormGradients &gradients,
                   void *workspace);
};

extern const NormKernels norm_kernels_portable, norm_kernels_avx2, norm_kernels_avx512;

// Returns whether the backward kernel needs memory for a row of float32 (`stash`).
inline bool needs_stash(loopfast_output grad_x, loopfast_output grad_shift) {
  return (grad_x.data != nullptr && grad_x.dtype != LOOPFAST_FLOAT32) ||
         (grad_x.data == nullptr && grad_shift.data != nullptr);
}

}  // namespace loopfast
