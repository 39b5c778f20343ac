// Group normalization and SiLU: checks, the loop over rows, and the sums over them.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "loopfast.h"
#include "numeric.h"
#include "parallel.h"

namespace loopfast {
namespace {

int check_norm(const loopfast_norm *n) {
  if (n == nullptr) return invalid("norm is missing");
  const struct {
    const char *name;
    int64_t value;
  } sizes[] = {{"rows", n->rows}, {"channels", n->channels}, {"pixels", n->pixels}, {"groups", n->groups}};
  for (const auto &size : sizes) {
    if (size.value < 1) return invalid("%s must be at least 1, got %lld", size.name, static_cast<long long>(size.value));
  }
  if (n->channels % n->groups != 0) {
    return invalid("groups must divide the %lld channels, got %lld", static_cast<long long>(n->channels),
                   static_cast<long long>(n->groups));
  }
  if (!(n->eps > 0.0f)) return invalid("eps must be positive, got %g", static_cast<double>(n->eps));
  if (int status = check_latents("x", n->x.data, n->x.dtype, false)) return status;
  if (int status = check_latents("weight", n->weight.data, n->weight.dtype, false)) return status;
  if (int status = check_latents("bias", n->bias.data, n->bias.dtype, false)) return status;
  return check_latents("shift", n->shift.data, n->shift.dtype, true);
}

float value_at(loopfast_input from, int64_t index) {
  if (from.dtype == LOOPFAST_FLOAT32) return static_cast<const float *>(from.data)[index];
  const uint16_t half = static_cast<const uint16_t *>(from.data)[index];
  return from.dtype == LOOPFAST_FLOAT16 ? from_float16(half) : from_bfloat16(half);
}

void set_value(loopfast_output to, int64_t index, float value) {
  if (to.dtype == LOOPFAST_FLOAT32) {
    static_cast<float *>(to.data)[index] = value;
  } else {
    static_cast<uint16_t *>(to.data)[index] =
        to.dtype == LOOPFAST_FLOAT16 ? to_float16(value) : to_bfloat16(value);
  }
}

// Memory that is not initialized: the kernels write to it first.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  char *data() const { return static_cast<char *>(memory_); }

 private:
  void *memory_;
};

// The rows of a call, each a unit of work.
class Rows {
 public:
  explicit Rows(const loopfast_norm &n)
      : n_(n), affine_(static_cast<size_t>(2 * n.channels)) {
    for (int64_t channel = 0; channel < n.channels; ++channel) {
      affine_[static_cast<size_t>(channel)] = value_at(n.weight, channel);
      affine_[static_cast<size_t>(n.channels + channel)] = value_at(n.bias, channel);
    }
    norm_ = {n.channels, n.pixels, n.groups, n.channels_last != 0, n.eps, affine_.data(), affine_.data() + n.channels};
  }

  const Norm &norm() const { return norm_; }

  NormRow at(int64_t row) const {
    return {advance(n_.x, row * n_.channels * n_.pixels), advance(n_.shift, row * n_.channels)};
  }

  // Calls body(row, workspace) for every row.
  template <class Body>
  void for_each(bool stash, Body &&body) const {
    const int64_t count = std::min(pieces(n_.threads, n_.rows * n_.channels * n_.pixels), n_.rows);
    const int64_t bytes = (norm_kernels().workspace_bytes(norm_, stash) + 63) / 64 * 64;
    const Buffer buffer(count * bytes);
    parallel(count, n_.rows, [&](int64_t begin, int64_t end) {
      // The piece that begins at this row; each piece has a workspace of its own.
      const int64_t piece = (begin * count + n_.rows - 1) / n_.rows;
      for (int64_t row = begin; row < end; ++row) body(row, buffer.data() + piece * bytes);
    });
  }

 private:
  const loopfast_norm &n_;
  std::vector<float> affine_;
  Norm norm_;
};

// Sums [N, C] over the rows, in their order.
void sum_rows(const float *values, int64_t rows, int64_t channels, loopfast_output to) {
  if (to.data == nullptr) return;
  std::vector<double> totals(static_cast<size_t>(channels));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      totals[static_cast<size_t>(channel)] += static_cast<double>(values[row * channels + channel]);
    }
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    set_value(to, channel, static_cast<float>(totals[static_cast<size_t>(channel)]));
  }
}

}  // namespace
}  // namespace loopfast

using namespace loopfast;

int loopfast_group_norm_silu(const loopfast_norm *norm, loopfast_output y, float *statistics) {
  if (int status = check_norm(norm)) return status;
  if (int status = check_latents("y", y.data, y.dtype, false)) return status;
  if (statistics == nullptr) return invalid("statistics is missing");
  return guarded([&] {
    const Rows rows(*norm);
    rows.for_each(false, [&](int64_t row, void *workspace) {
      norm_kernels().forward(rows.norm(), rows.at(row), advance(y, row * norm->channels * norm->pixels),
                             statistics + row * norm->groups * 3, workspace);
    });
  });
}

int loopfast_group_norm_silu_backward(const loopfast_norm *norm, const float *statistics, loopfast_input grad_y,
                                      loopfast_output grad_x, loopfast_output grad_weight, loopfast_output grad_bias,
                                      loopfast_output grad_shift) {
  if (int status = check_norm(norm)) return status;
  if (statistics == nullptr) return invalid("statistics is missing");
  if (int status = check_latents("grad_y", grad_y.data, grad_y.dtype, false)) return status;
  if (int status = check_latents("grad_x", grad_x.data, grad_x.dtype, true)) return status;
  if (int status = check_latents("grad_weight", grad_weight.data, grad_weight.dtype, true)) return status;
  if (int status = check_latents("grad_bias", grad_bias.data, grad_bias.dtype, true)) return status;
  if (int status = check_latents("grad_shift", grad_shift.data, grad_shift.dtype, true)) return status;
  if (grad_shift.data != nullptr && norm->shift.data == nullptr) return invalid("grad_shift needs shift");
  return guarded([&] {
    const int64_t channels = norm->channels, elements = channels * norm->pixels;
    const Rows rows(*norm);
    std::vector<float> of_bias(static_cast<size_t>(norm->rows * channels)), of_weight(of_bias.size());
    rows.for_each(needs_stash(grad_x, grad_shift), [&](int64_t row, void *workspace) {
      const NormGradients gradients{advance(grad_y, row * elements), advance(grad_x, row * elements),
                                    advance(grad_shift, row * channels), of_bias.data() + row * channels,
                                    of_weight.data() + row * channels};
      norm_kernels().backward(rows.norm(), rows.at(row), statistics + row * norm->groups * 3, gradients, workspace);
    });
    sum_rows(of_bias.data(), norm->rows, channels, grad_bias);
    sum_rows(of_weight.data(), norm->rows, channels, grad_weight);
  });
}
