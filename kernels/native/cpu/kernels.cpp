// The loops. CMake compiles this file once for every instruction set and names the result by LOOPFAST_KERNELS. So the
// file uses nothing of the standard library that the linker could merge with another file's copy.
#include "kernels.h"

#include "numeric.h"
#include "philox_block.h"
#include "stream.h"

namespace {

using namespace loopfast;

// Rows are worked on as float32, in tiles that stay in the first-level cache. A tile is padded with zeros to whole
// lanes; they add 0 to every sum.
constexpr int kTile = 1024;

struct Tile {
  alignas(64) float values[kTile];
};

inline int filled(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline int tile_size(int64_t at, int64_t end) { return static_cast<int>(end - at < kTile ? end - at : kTile); }

const float *load(loopfast_input from, int64_t at, int count, Tile &tile) {
  const int whole = filled(count);
  if (from.dtype == LOOPFAST_FLOAT32) {
    const float *values = static_cast<const float *>(from.data) + at;
    if (count == whole) return values;
    std::memcpy(tile.values, values, sizeof(float) * static_cast<size_t>(count));
  } else {
    const uint16_t *values = static_cast<const uint16_t *>(from.data) + at;
    if (from.dtype == LOOPFAST_FLOAT16) {
      for (int i = 0; i < count; ++i) tile.values[i] = from_float16(values[i]);
    } else {
      for (int i = 0; i < count; ++i) tile.values[i] = from_bfloat16(values[i]);
    }
  }
  for (int i = count; i < whole; ++i) tile.values[i] = 0.0f;
  return tile.values;
}

// Values of a tile, rounded to the target's dtype.
void store(loopfast_output to, int64_t at, int count, const float *values, bool streamed = false) {
  alignas(64) uint16_t halves[kTile];
  const void *rounded = values;
  if (to.dtype == LOOPFAST_FLOAT16) {
    for (int i = 0; i < count; ++i) halves[i] = to_float16(values[i]);
    rounded = halves;
  } else if (to.dtype == LOOPFAST_BFLOAT16) {
    for (int i = 0; i < count; ++i) halves[i] = to_bfloat16(values[i]);
    rounded = halves;
  }
  void *target = advance(to, at).data;
  const int64_t bytes = count * size_of(to.dtype);
  if (streamed) {
    stream(target, rounded, bytes);
  } else {
    std::memcpy(target, rounded, static_cast<size_t>(bytes));
  }
}

// Where to write values for `to`: into `to` itself, or into a tile if they must be rounded or streamed.
float *place(loopfast_output to, int64_t at, bool streamed, Tile &tile) {
  return to.dtype == LOOPFAST_FLOAT32 && !streamed ? static_cast<float *>(to.data) + at : tile.values;
}

void round_to(int32_t dtype, float *values, int count) {
  if (dtype == LOOPFAST_FLOAT16) {
    for (int i = 0; i < count; ++i) values[i] = from_float16(to_float16(values[i]));
  } else if (dtype == LOOPFAST_BFLOAT16) {
    for (int i = 0; i < count; ++i) values[i] = from_bfloat16(to_bfloat16(values[i]));
  }
}

// A tile of a row's latents. `u` is NULL without guidance; `buffers` hold the latents that are not float32.
struct Inputs {
  const float *c, *u, *x;
};

struct Buffers {
  Tile c, u, x, prev, reference;
};

Inputs load_inputs(const Row &row, int64_t at, int count, Buffers &buffers) {
  return {load(row.model_output, at, count, buffers.c),
          row.uncond_output.data == nullptr ? nullptr : load(row.uncond_output, at, count, buffers.u),
          load(row.sample, at, count, buffers.x)};
}

// Calls body(i, m) for every element of a tile, with m = u + g (c - u), in one loop that the compiler can vectorize.
template <class Body>
void for_elements(const Row &row, const Inputs &inputs, int whole, Body &&body) {
  const float *c = inputs.c, *u = inputs.u;
  const float g = row.guidance_scale;
  if (u == nullptr) {
#pragma GCC ivdep
    for (int i = 0; i < whole; ++i) body(i, c[i]);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < whole; ++i) body(i, u[i] + g * (c[i] - u[i]));
  }
}

void add_squares(float *lanes, const float *values, int whole) {
  for (int i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  }
}

float fold(float *lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Writes z and, with a reference, s = (b / sigma) (m - m_ref).
void residual_and_shift(const Row &row, int64_t at, int count, Buffers &buffers, float *z, float *s) {
  const Inputs inputs = load_inputs(row, at, count, buffers);
  const float *x = inputs.x, *prev = load(row.prev_sample, at, count, buffers.prev);
  const float a = row.a, b = row.b, inverse_sigma = row.inverse_sigma, slope = row.slope;
  const int whole = filled(count);
  if (row.reference_output.data == nullptr) {
    for_elements(row, inputs, whole, [=](int i, float m) { z[i] = (prev[i] - (a * x[i] + b * m)) * inverse_sigma; });
  } else {
    const float *reference = load(row.reference_output, at, count, buffers.reference);
    for_elements(row, inputs, whole, [=](int i, float m) {
      z[i] = (prev[i] - (a * x[i] + b * m)) * inverse_sigma;
      s[i] = slope * (m - reference[i]);
    });
  }
}

Squares squares(const Row &row, int64_t begin, int64_t end, float *residual) {
  alignas(64) float residual_lanes[kLanes] = {}, shift_lanes[kLanes] = {};
  Buffers buffers;
  Tile tile, shift;
  const bool with_reference = row.reference_output.data != nullptr;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = tile_size(at, end);
    float *z = residual == nullptr ? tile.values : residual + at;
    residual_and_shift(row, at, count, buffers, z, shift.values);
    add_squares(residual_lanes, z, filled(count));
    if (with_reference) add_squares(shift_lanes, shift.values, filled(count));
  }
  return {fold(residual_lanes), fold(shift_lanes)};
}

void gradients(const Row &row, const GradientTargets &to, int64_t begin, int64_t end, const float *residual) {
  Buffers buffers;
  Tile tile, shift, grad;
  const bool with_reference = row.reference_output.data != nullptr;
  const bool guided = row.uncond_output.data != nullptr;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = tile_size(at, end);
    if (residual == nullptr) residual_and_shift(row, at, count, buffers, tile.values, shift.values);
    const float *z = residual == nullptr ? tile.values : residual + at;
    float weight = to.residual_weight;
    if (with_reference) {
      for (int i = 0; i < count; ++i) tile.values[i] = weight * z[i] + to.shift_weight * shift.values[i];
      z = tile.values;
      weight = 1.0f;
    }
    const auto write = [&](loopfast_output target, float factor) {
      if (target.data == nullptr) return;
      float *values = place(target, at, to.streamed, grad);
      for (int i = 0; i < count; ++i) values[i] = weight * z[i] * factor;
      if (values == grad.values) store(target, at, count, values, to.streamed);
    };
    write(to.output, guided ? row.guidance_scale : 1.0f);
    write(to.uncond, 1.0f - row.guidance_scale);
  }
  if (to.streamed) finish_stream();
}

// Writes `count` normals from element `at`, a multiple of 4, and up to 3 more.
void normals(uint64_t seed, int64_t step, int64_t at, int count, float *noise) {
  constexpr int kCounters = kTile / 4;
  alignas(64) uint32_t words[4][kCounters];
  alignas(64) float z[4][kCounters];
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t first = static_cast<uint32_t>(at / 4), t = static_cast<uint32_t>(step);
  const int counters = (count + 3) / 4;
  for (int i = 0; i < counters; i += kPhiloxLanes) {
    uint32_t *const to[4] = {words[0] + i, words[1] + i, words[2] + i, words[3] + i};
    philox_block(first + static_cast<uint32_t>(i), t, k0, k1, to);
  }
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < counters; ++i) {
      const float uniform = from_word(words[pair][i]) * 0x1p-32f + 0x1p-33f;
      const float radius = std::sqrt(-2.0f * log_of_uniform(uniform));
      const float angle = from_word(words[pair + 1][i]) * 1.46291807926715968e-9f;  // 2 pi 2^-32
      float sine, cosine;
      sine_and_cosine(angle, sine, cosine);
      z[pair][i] = radius * cosine;
      z[pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < counters; ++i) {
    for (int word = 0; word < 4; ++word) noise[4 * i + word] = z[word][i];
  }
}

float sample(const Row &row, uint64_t seed, int64_t step, const SampleTargets &to, int64_t begin, int64_t end) {
  alignas(64) float lanes[kLanes] = {};
  Buffers buffers;
  Tile mean, prev, noise;
  const float a = row.a, b = row.b, sigma = row.sigma, inverse_sigma = row.inverse_sigma;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = tile_size(at, end);
    const int whole = filled(count);
    const Inputs inputs = load_inputs(row, at, count, buffers);
    const float *x = inputs.x;
    float *to_mean = mean.values;
    for_elements(row, inputs, whole, [=](int i, float m) { to_mean[i] = a * x[i] + b * m; });
    if (sigma > 0.0f) {
      normals(seed, step, at, count, noise.values);
      for (int i = 0; i < count; ++i) prev.values[i] = mean.values[i] + sigma * noise.values[i];
    } else {
      std::memcpy(prev.values, mean.values, sizeof(float) * static_cast<size_t>(count));
    }
    round_to(to.prev_sample.dtype, prev.values, count);
    store(to.prev_sample, at, count, prev.values);
    if (to.model_input.data != nullptr) {
      for (int64_t copy = 0; copy < to.copies; ++copy) store(to.model_input, at + copy * to.stride, count, prev.values);
    }
    for (int i = count; i < whole; ++i) prev.values[i] = mean.values[i];
    for (int i = 0; i < whole; ++i) prev.values[i] = (prev.values[i] - mean.values[i]) * inverse_sigma;
    add_squares(lanes, prev.values, whole);
  }
  return fold(lanes);
}

void normal(uint64_t seed, int64_t step, float *noise, int64_t begin, int64_t end) {
  Tile tile;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = tile_size(at, end);
    normals(seed, step, at, count, tile.values);
    std::memcpy(noise + at, tile.values, sizeof(float) * static_cast<size_t>(count));
  }
}

void scale(loopfast_output values, float factor, int64_t begin, int64_t end) {
  Tile tile;
  for (int64_t at = begin; at < end; at += kTile) {
    const int count = tile_size(at, end);
    const float *loaded = load({values.data, values.dtype}, at, count, tile);
    for (int i = 0; i < count; ++i) tile.values[i] = loaded[i] * factor;
    store(values, at, count, tile.values);
  }
}

}  // namespace

const loopfast::Kernels loopfast::LOOPFAST_KERNELS = {squares, sample, gradients, normal, scale};
