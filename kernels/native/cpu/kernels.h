// The loops over a part of one row, compiled once for every instruction set.
#pragma once

#include <cstdint>

#include "loopfast.h"

namespace loopfast {

// A row is summed block by block, and the blocks' sums are added in order. So the order of a sum depends on nothing but
// the row's length, however a row is cut into pieces of whole blocks.
constexpr int64_t kBlock = 4096;

// A row and the coefficients of its transition. The pointers are those of the row's first element.
struct Row {
  loopfast_input model_output, uncond_output, sample, prev_sample, reference_output;
  float a, b, sigma;
  float inverse_sigma;  // 0 where sigma is 0
  float slope;          // b / sigma; 0 where sigma is 0
  float guidance_scale;
};

// The sums over a block of z^2, with z = (x' - a x - b m) / sigma, and of ((b / sigma) (m - m_ref))^2.
struct Squares {
  float residual, shift;
};

// The targets of a sample: `prev_sample` and `copies` model inputs, `stride` elements apart.
struct SampleTargets {
  loopfast_output prev_sample, model_input;
  int64_t copies, stride;
};

// The gradient by m is residual_weight z + shift_weight (b / sigma) (m - m_ref); times g and 1 - g it is that by c and
// u. Large gradients are streamed to memory past the caches: a normal write would read each line first.
struct GradientTargets {
  loopfast_output output, uncond;
  float residual_weight, shift_weight;
  bool streamed;
};

// `squares` keeps z in whole multiples of this.
constexpr int kLanes = 64;

// All ranges [begin, end) begin at a multiple of kBlock. `sample` and `squares` take one block. `squares` keeps the
// row's z in `residual` for `gradients`. If `residual` is NULL, as with a reference, `gradients` computes z again.
struct Kernels {
  Squares (*squares)(const Row &row, int64_t begin, int64_t end, float *residual);
  float (*sample)(const Row &row, uint64_t seed, int64_t step, const SampleTargets &to, int64_t begin, int64_t end);
  void (*gradients)(const Row &row, const GradientTargets &to, int64_t begin, int64_t end, const float *residual);
  void (*normal)(uint64_t seed, int64_t step, float *noise, int64_t begin, int64_t end);
  void (*scale)(loopfast_output values, float factor, int64_t begin, int64_t end);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

inline int64_t size_of(int32_t dtype) { return dtype == LOOPFAST_FLOAT32 ? 4 : 2; }

// Latents from `index` elements further on. Latents that are not given stay NULL.
inline loopfast_input advance(loopfast_input latents, int64_t index) {
  if (latents.data == nullptr) return latents;
  return {static_cast<const char *>(latents.data) + index * size_of(latents.dtype), latents.dtype};
}

inline loopfast_output advance(loopfast_output latents, int64_t index) {
  if (latents.data == nullptr) return latents;
  return {static_cast<char *>(latents.data) + index * size_of(latents.dtype), latents.dtype};
}

}  // namespace loopfast
