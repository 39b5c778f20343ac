// Group normalization and SiLU. CMake compiles this file once for every instruction set and names the result by
// LOOPFAST_NORM_KERNELS. So the file uses nothing of the standard library that the linker could merge with another
// file's copy.
//
// A row is worked on in blocks of contiguous elements. In channels-last order a block is a whole number of pixels, and
// the values of each channel are repeated to a table as long as a block; in contiguous order a block lies within one
// channel. In both, every element of a block is added to a lane of its own, and the lanes are folded by channel: the
// order of a sum follows from the row's shape, not from the instruction set.
#include "norm_kernels.h"

#include "numeric.h"

namespace {

using namespace loopfast;

// Lanes are emptied into float64 after this many blocks: long sums of float32 lose digits.
constexpr int64_t kBlocksBetweenFolds = 64;
constexpr int64_t kLane = 16;           // elements of the widest vector
constexpr int64_t kSmallestBlock = 128;  // enough vectors that no addition waits for the one before

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// A value of each channel, for the elements of a block: one by one, or the same for all.
struct Each {
  const float *values;
  float operator[](int64_t i) const { return values[i]; }
};
struct Same {
  float value;
  float operator[](int64_t) const { return value; }
};

class ChannelsLast {
 public:
  explicit ChannelsLast(const Norm &norm) : channels_(norm.channels), pixels_(norm.pixels), repeats_(1) {
    while (repeats_ < pixels_ && (block() < kSmallestBlock || block() % kLane != 0)) repeats_ *= 2;
  }

  int64_t block() const { return channels_ * repeats_; }

  // Fills a table whose first [C] values are set.
  void repeat(float *table) const {
    for (int64_t i = channels_; i < block(); ++i) table[i] = table[i - channels_];
  }

  static Each of(const float *table, int64_t) { return {table}; }

  // Calls body(at, count, channel) for every block, then empties its lanes into totals [C].
  template <int kSums, class Body>
  void for_blocks(float *const *lanes, double *const *totals, Body &&body) const {
    for (int sum = 0; sum < kSums; ++sum) {
      for (int64_t i = 0; i < block(); ++i) lanes[sum][i] = 0.0f;
      for (int64_t i = 0; i < channels_; ++i) totals[sum][i] = 0.0;
    }
    const int64_t elements = channels_ * pixels_;
    int64_t blocks = 0;
    for (int64_t at = 0; at < elements; at += block()) {
      body(at, elements - at < block() ? elements - at : block(), 0);
      if (++blocks % kBlocksBetweenFolds == 0 || at + block() >= elements) {
        for (int sum = 0; sum < kSums; ++sum) empty(lanes[sum], totals[sum]);
      }
    }
  }

 private:
  void empty(float *lanes, double *totals) const {
    for (int64_t repeat = 1; repeat < repeats_; ++repeat) {
      const float *more = lanes + repeat * channels_;
#pragma GCC ivdep
      for (int64_t i = 0; i < channels_; ++i) lanes[i] += more[i];
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < channels_; ++i) totals[i] += static_cast<double>(lanes[i]);
    for (int64_t i = 0; i < block(); ++i) lanes[i] = 0.0f;
  }

  int64_t channels_, pixels_, repeats_;
};

class Contiguous {
 public:
  explicit Contiguous(const Norm &norm) : channels_(norm.channels), pixels_(norm.pixels), block_(kLane) {
    while (block_ < pixels_ && block_ < kSmallestBlock) block_ *= 2;
  }

  int64_t block() const { return block_ < channels_ ? channels_ : block_; }

  void repeat(float *) const {}

  static Same of(const float *table, int64_t channel) { return {table[channel]}; }

  template <int kSums, class Body>
  void for_blocks(float *const *lanes, double *const *totals, Body &&body) const {
    for (int sum = 0; sum < kSums; ++sum) {
      for (int64_t at = 0; at < block_; at += kLane) clear(lanes[sum] + at);
    }
    for (int64_t channel = 0; channel < channels_; ++channel) {
      for (int sum = 0; sum < kSums; ++sum) totals[sum][channel] = 0.0;
      int64_t blocks = 0;
      for (int64_t at = 0; at < pixels_; at += block_) {
        body(channel * pixels_ + at, pixels_ - at < block_ ? pixels_ - at : block_, channel);
        if (++blocks % kBlocksBetweenFolds == 0 || at + block_ >= pixels_) {
          for (int sum = 0; sum < kSums; ++sum) totals[sum][channel] += empty(lanes[sum]);
        }
      }
    }
  }

 private:
  double empty(float *lanes) const {
    for (int64_t half = block_ / 2; half >= kLane; half /= 2) {
      for (int64_t at = 0; at < half; at += kLane) fold<kLane>(lanes + at, half);
    }
    fold<8>(lanes, 8), fold<4>(lanes, 4), fold<2>(lanes, 2), fold<1>(lanes, 1);
    const double total = static_cast<double>(lanes[0]);
    for (int64_t at = 0; at < block_; at += kLane) clear(lanes + at);
    return total;
  }

  // Loops of a length that the compiler knows.
  template <int64_t kCount>
  static void fold(float *lanes, int64_t distance) {
#pragma GCC ivdep
    for (int64_t i = 0; i < kCount; ++i) lanes[i] += lanes[i + distance];
  }
  static void clear(float *lanes) {
    for (int64_t i = 0; i < kLane; ++i) lanes[i] = 0.0f;
  }

  int64_t channels_, pixels_, block_;
};

enum Table { kShift, kMean, kScale, kOffset, kSlope, kConstant, kTables };

struct Workspace {
  double *totals[2];         // [C]
  float *tables[kTables];    // by Table
  float *lanes[2];           // a block each, like everything below
  float *x, *grad, *result;  // the values that are not float32
  float *stash;              // a row, if one is needed

  Workspace(void *memory, int64_t channels, int64_t block) {
    double *doubles = static_cast<double *>(memory);
    for (double *&total : totals) {
      total = doubles;
      doubles += round_up(channels, kLane);
    }
    float *floats = reinterpret_cast<float *>(doubles);
    const int64_t size = round_up(block, kLane);
    const auto take = [&](float *&part) {
      part = floats;
      floats += size;
    };
    for (float *&table : tables) take(table);
    for (float *&lane : lanes) take(lane);
    take(x), take(grad), take(result);
    stash = floats;
  }

  static int64_t bytes(int64_t channels, int64_t block, int64_t stash) {
    const int64_t doubles = 2 * round_up(channels, kLane), floats = (kTables + 5) * round_up(block, kLane) + stash;
    return doubles * static_cast<int64_t>(sizeof(double)) + floats * static_cast<int64_t>(sizeof(float));
  }
};

const float *load(loopfast_input from, int64_t at, int64_t count, float *buffer) {
  if (from.dtype == LOOPFAST_FLOAT32) return static_cast<const float *>(from.data) + at;
  const uint16_t *values = static_cast<const uint16_t *>(from.data) + at;
  if (from.dtype == LOOPFAST_FLOAT16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_float16(values[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(values[i]);
  }
  return buffer;
}

// Where to write values for `to`: into `to` itself, or into a buffer that `store` rounds.
float *place(loopfast_output to, int64_t at, float *buffer) {
  return to.dtype == LOOPFAST_FLOAT32 ? static_cast<float *>(to.data) + at : buffer;
}

void store(loopfast_output to, int64_t at, int64_t count, const float *values) {
  if (to.dtype == LOOPFAST_FLOAT32) return;
  uint16_t *target = static_cast<uint16_t *>(to.data) + at;
  if (to.dtype == LOOPFAST_FLOAT16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) target[i] = to_float16(values[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(values[i]);
  }
}

template <bool kShifted, class Of>
inline float shifted(float x, Of shift, int64_t i) {
  if constexpr (kShifted) return x + shift[i];
  return x;
}

// The loops over a block, each in a form that the compiler can vectorize.

template <bool kShifted, class Of>
void add(const float *x, Of shift, int64_t count, float *sums) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sums[i] += shifted<kShifted>(x[i], shift, i);
}

template <bool kShifted, class Of>
void add_deviations(const float *x, Of shift, Of mean, int64_t count, float *sums, float *squares) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float deviation = shifted<kShifted>(x[i], shift, i) - mean[i];
    sums[i] += deviation;
    squares[i] = multiply_add(deviation, deviation, squares[i]);
  }
}

template <bool kShifted, class Of>
void activate(const float *x, Of shift, Of mean, Of scale, Of offset, int64_t count, float *y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float z = multiply_add(shifted<kShifted>(x[i], shift, i) - mean[i], scale[i], offset[i]);
    const float e = exp_for_sigmoid(z);
    y[i] = z * (e * reciprocal(1.0f + e));
  }
}

// Writes the gradient by z, and adds up its sums: that of the gradient, and that of the gradient times x less its mean.
template <bool kShifted, class Of>
void differentiate(const float *x, const float *grad, Of shift, Of mean, Of scale, Of offset, int64_t count,
                   float *grad_z, float *sums, float *products) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float deviation = shifted<kShifted>(x[i], shift, i) - mean[i];
    const float z = multiply_add(deviation, scale[i], offset[i]);
    const float e = exp_for_sigmoid(z);
    const float rest = reciprocal(1.0f + e);  // 1 - sigmoid(z)
    const float slope = grad[i] * (e * rest) * multiply_add(z, rest, 1.0f);
    grad_z[i] = slope;
    sums[i] += slope;
    products[i] = multiply_add(slope, deviation, products[i]);
  }
}

template <bool kShifted, class Of>
void normalize_gradient(const float *x, const float *grad_z, Of shift, Of mean, Of scale, Of slope, Of constant,
                        int64_t count, float *grad_x) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float deviation = shifted<kShifted>(x[i], shift, i) - mean[i];
    grad_x[i] = multiply_add(scale[i], grad_z[i], multiply_add(slope[i], deviation, constant[i]));
  }
}

template <class Layout, bool kShifted>
class Row {
 public:
  Row(const Norm &norm, const NormRow &row, void *workspace)
      : norm_(norm),
        row_(row),
        layout_(norm),
        work_(workspace, norm.channels, layout_.block()),
        per_group_(norm.channels / norm.groups),
        share_(1.0 / static_cast<double>(per_group_ * norm.pixels)) {
    if constexpr (kShifted) {
      const float *shift = load(row.shift, 0, norm.channels, work_.tables[kShift]);
      if (shift != work_.tables[kShift]) copy(shift, work_.tables[kShift]);
      layout_.repeat(work_.tables[kShift]);
    }
  }

  void forward(loopfast_output y, float *statistics) {
    for_blocks<1>([&](int64_t at, int64_t count, int64_t channel) {
      add<kShifted>(x(at, count), of(kShift, channel), count, work_.lanes[0]);
    });
    for (int64_t group = 0; group < norm_.groups; ++group) {
      statistics[3 * group] = static_cast<float>(sum(work_.totals[0], group) * share_);
    }
    fill_mean(statistics);
    // The deviations' own mean corrects that of the first pass: Chan, Golub and LeVeque's corrected two-pass algorithm.
    for_blocks<2>([&](int64_t at, int64_t count, int64_t channel) {
      add_deviations<kShifted>(x(at, count), of(kShift, channel), of(kMean, channel), count, work_.lanes[0],
                               work_.lanes[1]);
    });
    for (int64_t group = 0; group < norm_.groups; ++group) {
      const double rest = sum(work_.totals[0], group) * share_;
      const double variance = sum(work_.totals[1], group) * share_ - rest * rest;
      statistics[3 * group + 1] = static_cast<float>(rest);
      statistics[3 * group + 2] =
          static_cast<float>(1.0 / std::sqrt((variance > 0.0 ? variance : 0.0) + static_cast<double>(norm_.eps)));
    }
    fill_scale(statistics);
    for_blocks<0>([&](int64_t at, int64_t count, int64_t channel) {
      float *values = place(y, at, work_.result);
      activate<kShifted>(x(at, count), of(kShift, channel), of(kMean, channel), of(kScale, channel),
                         of(kOffset, channel), count, values);
      store(y, at, count, values);
    });
  }

  void backward(const float *statistics, const NormGradients &gradients) {
    fill_mean(statistics);
    fill_scale(statistics);
    const bool in_place = gradients.grad_x.data != nullptr && gradients.grad_x.dtype == LOOPFAST_FLOAT32;
    const bool inputs = gradients.grad_x.data != nullptr || gradients.grad_shift.data != nullptr;
    float *grad_z = in_place ? static_cast<float *>(gradients.grad_x.data) : work_.stash;
    for_blocks<2>([&](int64_t at, int64_t count, int64_t channel) {
      differentiate<kShifted>(x(at, count), load(gradients.grad_y, at, count, work_.grad), of(kShift, channel),
                              of(kMean, channel), of(kScale, channel), of(kOffset, channel), count,
                              inputs ? grad_z + at : work_.result, work_.lanes[0], work_.lanes[1]);
    });
    for (int64_t channel = 0; channel < norm_.channels; ++channel) {
      const float *of_group = statistics + 3 * (channel / per_group_);
      double &sum = work_.totals[0][channel], &product = work_.totals[1][channel];
      product = (product - static_cast<double>(of_group[1]) * sum) * static_cast<double>(of_group[2]);
      gradients.grad_bias[channel] = static_cast<float>(sum);
      gradients.grad_weight[channel] = static_cast<float>(product);
    }
    if (inputs) backward_inputs(statistics, gradients, grad_z);
  }

 private:
  void backward_inputs(const float *statistics, const NormGradients &gradients, float *grad_z) {
    float *slopes = work_.tables[kSlope], *constants = work_.tables[kConstant];
    for (int64_t group = 0; group < norm_.groups; ++group) {
      double sum = 0.0, product = 0.0;
      for (int64_t channel = group * per_group_; channel < (group + 1) * per_group_; ++channel) {
        sum += static_cast<double>(norm_.weight[channel]) * work_.totals[0][channel];
        product += static_cast<double>(norm_.weight[channel]) * work_.totals[1][channel];
      }
      const double rest = static_cast<double>(statistics[3 * group + 1]);
      const double inverse = static_cast<double>(statistics[3 * group + 2]);
      const double slope = -inverse * inverse * product * share_;
      const double constant = -inverse * sum * share_ - slope * rest;
      for (int64_t channel = group * per_group_; channel < (group + 1) * per_group_; ++channel) {
        slopes[channel] = static_cast<float>(slope);
        constants[channel] = static_cast<float>(constant);
      }
    }
    layout_.repeat(slopes);
    layout_.repeat(constants);
    const bool kept = gradients.grad_x.data != nullptr;
    const auto write = [&](int64_t at, int64_t count, int64_t channel) {
      float *values = kept ? place(gradients.grad_x, at, work_.result) : work_.result;
      normalize_gradient<kShifted>(x(at, count), grad_z + at, of(kShift, channel), of(kMean, channel),
                                   of(kScale, channel), of(kSlope, channel), of(kConstant, channel), count, values);
      if (kept) store(gradients.grad_x, at, count, values);
      return values;
    };
    if (gradients.grad_shift.data == nullptr) {
      for_blocks<0>(write);
      return;
    }
    for_blocks<1>([&](int64_t at, int64_t count, int64_t channel) {
      add<false>(write(at, count, channel), of(kShift, channel), count, work_.lanes[0]);
    });
    float *values = place(gradients.grad_shift, 0, work_.result);
    for (int64_t channel = 0; channel < norm_.channels; ++channel) {
      values[channel] = static_cast<float>(work_.totals[0][channel]);
    }
    store(gradients.grad_shift, 0, norm_.channels, values);
  }

  template <int kSums, class Body>
  void for_blocks(Body &&body) {
    layout_.template for_blocks<kSums>(work_.lanes, work_.totals, body);
  }

  const float *x(int64_t at, int64_t count) { return load(row_.x, at, count, work_.x); }

  auto of(Table table, int64_t channel) const { return Layout::of(work_.tables[table], channel); }

  void copy(const float *from, float *to) const {
    for (int64_t channel = 0; channel < norm_.channels; ++channel) to[channel] = from[channel];
  }

  double sum(const double *totals, int64_t group) const {
    double total = 0.0;
    for (int64_t i = 0; i < per_group_; ++i) total += totals[group * per_group_ + i];
    return total;
  }

  void fill_mean(const float *statistics) {
    float *means = work_.tables[kMean];
    for (int64_t group = 0; group < norm_.groups; ++group) {
      for (int64_t i = 0; i < per_group_; ++i) means[group * per_group_ + i] = statistics[3 * group];
    }
    layout_.repeat(means);
  }

  // z = scale (x - mean) + offset.
  void fill_scale(const float *statistics) {
    float *scales = work_.tables[kScale], *offsets = work_.tables[kOffset];
    for (int64_t group = 0; group < norm_.groups; ++group) {
      const float rest = statistics[3 * group + 1], inverse = statistics[3 * group + 2];
      for (int64_t channel = group * per_group_; channel < (group + 1) * per_group_; ++channel) {
        scales[channel] = inverse * norm_.weight[channel];
        offsets[channel] = norm_.bias[channel] - rest * scales[channel];
      }
    }
    layout_.repeat(scales);
    layout_.repeat(offsets);
  }

  const Norm &norm_;
  const NormRow &row_;
  const Layout layout_;
  Workspace work_;
  const int64_t per_group_;
  const double share_;
};

// Calls body with a row of the right kind.
template <class Body>
void dispatch(const Norm &norm, const NormRow &row, void *workspace, Body &&body) {
  const bool shifted = row.shift.data != nullptr;
  if (norm.channels_last) {
    if (shifted) return body(Row<ChannelsLast, true>(norm, row, workspace));
    return body(Row<ChannelsLast, false>(norm, row, workspace));
  }
  if (shifted) return body(Row<Contiguous, true>(norm, row, workspace));
  return body(Row<Contiguous, false>(norm, row, workspace));
}

int64_t workspace_bytes(const Norm &norm, bool stash) {
  const int64_t block = norm.channels_last ? ChannelsLast(norm).block() : Contiguous(norm).block();
  return Workspace::bytes(norm.channels, block, stash ? norm.channels * norm.pixels : 0);
}

void forward(const Norm &norm, const NormRow &row, loopfast_output y, float *statistics, void *workspace) {
  dispatch(norm, row, workspace, [&](auto &&kernel) { kernel.forward(y, statistics); });
}

void backward(const Norm &norm, const NormRow &row, const float *statistics, const NormGradients &gradients,
              void *workspace) {
  dispatch(norm, row, workspace, [&](auto &&kernel) { kernel.backward(statistics, gradients); });
}

}  // namespace

const loopfast::NormKernels loopfast::LOOPFAST_NORM_KERNELS = {workspace_bytes, forward, backward};
