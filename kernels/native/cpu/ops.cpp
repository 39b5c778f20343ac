// The ops: checks of their arguments, the loops over rows, and the results that follow from a row's sums.
#include <algorithm>
#include <cmath>
#include <limits>
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

constexpr float kHalfLogTwoPi = 0.918938533204672742f;
constexpr float kLogRatioLimit = 20.0f;

// Gradients of more bytes than this have left the cache by the time they are read.
constexpr int64_t kStreamed = 4 << 20;

// The sums of a row, added up in float64, block by block.
struct Sums {
  double residual = 0.0, shift = 0.0;

  void add(const Squares &block) {
    residual += block.residual;
    shift += block.shift;
  }
};

int64_t blocks_of(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

int64_t step_of(const loopfast_transition &t, int64_t row) { return t.step[row * t.step_stride]; }

Row row_at(const loopfast_transition &t, int64_t row, loopfast_input prev_sample, loopfast_input reference_output) {
  const float *coefficients = t.table + 3 * step_of(t, row);
  const float sigma = coefficients[2];
  const bool stochastic = sigma > 0.0f;
  const int64_t first = row * t.elements;
  return {advance(t.model_output, first),
          advance(t.uncond_output, first),
          advance(t.sample, first),
          advance(prev_sample, first),
          advance(reference_output, first),
          coefficients[0],
          coefficients[1],
          sigma,
          stochastic ? 1.0f / sigma : 0.0f,
          stochastic ? coefficients[1] / sigma : 0.0f,
          t.guidance_scale};
}

// The log-density of standardized residuals, from the sum of their squares.
float logprob_of(const loopfast_transition &t, float sigma, double squares) {
  if (!(sigma > 0.0f)) return 0.0f;
  const float elements = static_cast<float>(t.elements);
  const bool mean = t.reduction == LOOPFAST_MEAN;
  const float total = static_cast<float>(mean ? squares / elements : squares);
  return total * -0.5f - (std::log(sigma) + kHalfLogTwoPi) * (mean ? 1.0f : elements);
}

bool streamed(const loopfast_transition &t, loopfast_output output, loopfast_output uncond) {
  int64_t size = 0;
  for (const loopfast_output &gradient : {output, uncond}) {
    if (gradient.data != nullptr) size += t.rows * t.elements * size_of(gradient.dtype);
  }
  return size > kStreamed;
}

// Checks of arguments: 0, or the status to return.

int check_size(int64_t rows, int64_t elements) {
  if (rows < 1) return invalid("rows must be at least 1, got %lld", static_cast<long long>(rows));
  if (elements < 1) return invalid("elements must be at least 1, got %lld", static_cast<long long>(elements));
  return 0;
}

int check_index(const char *name, const int64_t *index, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= size) {
      return invalid("%s must lie in [0, %lld), got %lld", name, static_cast<long long>(size),
                     static_cast<long long>(index[i]));
    }
  }
  return 0;
}

int check_transition(const loopfast_transition *t) {
  if (t == nullptr) return invalid("transition is missing");
  if (int status = check_size(t->rows, t->elements)) return status;
  if (t->steps < 1) return invalid("steps must be at least 1, got %lld", static_cast<long long>(t->steps));
  if (t->table == nullptr) return invalid("table is missing");
  if (t->step == nullptr) return invalid("step is missing");
  if (int status = check_latents("model_output", t->model_output.data, t->model_output.dtype, false)) return status;
  if (int status = check_latents("uncond_output", t->uncond_output.data, t->uncond_output.dtype, true)) return status;
  if (int status = check_latents("sample", t->sample.data, t->sample.dtype, false)) return status;
  if (t->guidance_scale != 1.0f && t->uncond_output.data == nullptr) {
    return invalid("guidance_scale=%g needs uncond_output", static_cast<double>(t->guidance_scale));
  }
  if (t->reduction != LOOPFAST_MEAN && t->reduction != LOOPFAST_SUM) {
    return invalid("reduction must be LOOPFAST_MEAN or LOOPFAST_SUM, got %d", t->reduction);
  }
  if (t->step_stride != 0 && t->step_stride != 1) {
    return invalid("step_stride must be 0 or 1, got %lld", static_cast<long long>(t->step_stride));
  }
  if (int status = check_index("step", t->step, t->step_stride == 0 ? 1 : t->rows, t->steps)) return status;
  for (int64_t step = 0; step < t->steps; ++step) {
    const float sigma = t->table[3 * step + 2];
    if (!(sigma >= 0.0f)) {
      return invalid("table has sigma %g at step %lld: it must not be negative", static_cast<double>(sigma),
                     static_cast<long long>(step));
    }
  }
  return 0;
}

int check_group(int64_t groups, int64_t samples) {
  if (groups < 1) return invalid("groups must be at least 1, got %lld", static_cast<long long>(groups));
  if (samples < 2) {
    return invalid("rewards has K = %lld sample per group: leave-one-out needs at least 2",
                   static_cast<long long>(samples));
  }
  return 0;
}

// r_i less the mean of the others. The result does not depend on a common offset: without it nothing is lost to
// rounding, and equal rewards give exactly 0.
float leave_one_out(const float *group, int64_t samples, int64_t sample) {
  double total = 0.0;
  for (int64_t i = 0; i < samples; ++i) total += group[i] - group[0];
  const double count = static_cast<double>(samples);
  const float mean = static_cast<float>(total / count);
  return ((group[sample] - group[0]) - mean) * static_cast<float>(count / (count - 1.0));
}

float advantage_of(const loopfast_loss_arguments &arguments, int64_t row) {
  if (arguments.advantage != nullptr) return arguments.advantage[row];
  const int64_t index = arguments.trajectory[row], samples = arguments.samples;
  const float *group = arguments.rewards + index / samples * samples;
  const float scaled = leave_one_out(group, samples, index % samples) * arguments.advantage_scale;
  const float limit = arguments.advantage_clip;
  return scaled < -limit ? -limit : scaled > limit ? limit : scaled;
}

struct Surrogate {
  float value;
  bool clipped;
};

// max(-A r, -A clip(r)).
Surrogate surrogate_of(float advantage, float ratio, float clip_range) {
  const float unclipped = -advantage * ratio;
  if (std::isinf(clip_range)) return {unclipped, false};
  const float clipped = -advantage * std::clamp(ratio, 1.0f - clip_range, 1.0f + clip_range);
  return clipped > unclipped ? Surrogate{clipped, true} : Surrogate{unclipped, false};
}

// The largest power of two not above a magnitude; 1 for 0 and for a magnitude that is not finite.
float power_of_two(float magnitude) {
  if (!(magnitude > 0.0f) || std::isinf(magnitude)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(std::ilogb(magnitude), -126, 126));
}

// Memory that this thread keeps, as fresh memory costs page faults. NULL if no memory is left.
float *scratch(int64_t count) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(new (std::nothrow) float[static_cast<size_t>(count)]);
    size = memory == nullptr ? 0 : count;
  }
  return memory.get();
}

class Loss {
 public:
  Loss(const loopfast_transition &transition, const loopfast_loss_arguments &arguments,
       const loopfast_loss_results &results)
      : t_(transition),
        arguments_(arguments),
        results_(results),
        wants_gradients_(results.grad_output.data != nullptr || results.grad_uncond.data != nullptr),
        streamed_(streamed(transition, results.grad_output, results.grad_uncond)) {}

  void run() {
    const int64_t blocks = blocks_of(t_.elements);
    const int64_t count = pieces(t_.threads, t_.rows * t_.elements);
    if (t_.rows % count == 0 || t_.rows >= 4 * count) {
      rows_whole(count, blocks);
    } else {
      rows_in_blocks(count, blocks);
    }
    double total = 0.0;
    for (int64_t row = 0; row < t_.rows; ++row) {
      const float kl = arguments_.kl_weight * results_.kl[row];
      total += surrogate_of(results_.advantage[row], results_.ratio[row], arguments_.clip_range).value + kl;
    }
    *results_.loss = static_cast<float>(total / static_cast<double>(t_.rows));
  }

 private:
  // Whole rows: the gradient is made right after the sums, from the residual that the sums have left.
  void rows_whole(int64_t count, int64_t blocks) {
    const bool kept = wants_gradients_ && arguments_.reference_output.data == nullptr;
    const int64_t room = (t_.elements + kLanes - 1) / kLanes * kLanes;
    parallel(count, t_.rows, [&](int64_t begin, int64_t end) {
      float *residual = kept ? scratch(room) : nullptr;
      for (int64_t row = begin; row < end; ++row) {
        const Row at = make_row(row);
        Sums sums;
        for (int64_t block = 0; block < blocks; ++block) sums.add(squares(at, block, residual));
        const GradientTargets to = finish(row, at, sums);
        if (wants_gradients_) kernels().gradients(at, to, 0, t_.elements, residual);
      }
    });
  }

  // Too few rows to share out among the threads: all sums first, then all gradients.
  void rows_in_blocks(int64_t count, int64_t blocks) {
    std::vector<Squares> partial(static_cast<size_t>(t_.rows * blocks));
    parallel(count, t_.rows * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        partial[static_cast<size_t>(unit)] = squares(make_row(unit / blocks), unit % blocks, nullptr);
      }
    });
    std::vector<GradientTargets> targets(static_cast<size_t>(t_.rows));
    for (int64_t row = 0; row < t_.rows; ++row) {
      Sums sums;
      for (int64_t block = 0; block < blocks; ++block) sums.add(partial[static_cast<size_t>(row * blocks + block)]);
      targets[static_cast<size_t>(row)] = finish(row, make_row(row), sums);
    }
    if (!wants_gradients_) return;
    parallel(count, t_.rows * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / blocks, first = unit % blocks * kBlock;
        kernels().gradients(make_row(row), targets[static_cast<size_t>(row)], first,
                            std::min(first + kBlock, t_.elements), nullptr);
      }
    });
  }

  Row make_row(int64_t row) const { return row_at(t_, row, arguments_.prev_sample, arguments_.reference_output); }

  Squares squares(const Row &at, int64_t block, float *residual) const {
    return kernels().squares(at, block * kBlock, std::min((block + 1) * kBlock, t_.elements), residual);
  }

  // Writes a row's results and returns the factors of its gradient.
  GradientTargets finish(int64_t row, const Row &at, const Sums &sums) const {
    const bool mean = t_.reduction == LOOPFAST_MEAN;
    const float elements = static_cast<float>(t_.elements);
    const bool stochastic = at.sigma > 0.0f;
    const double shift = stochastic ? sums.shift : 0.0;
    const float logprob = logprob_of(t_, at.sigma, sums.residual);
    const float kl = 0.5f * static_cast<float>(mean ? shift / elements : shift);
    const float advantage = advantage_of(arguments_, row);
    const float log_ratio = logprob - arguments_.old_logprob[row];
    const float ratio = std::exp(std::clamp(log_ratio, -kLogRatioLimit, kLogRatioLimit));
    const bool clipped =
        std::fabs(log_ratio) > kLogRatioLimit || surrogate_of(advantage, ratio, arguments_.clip_range).clipped;
    results_.logprob[row] = logprob;
    results_.ratio[row] = ratio;
    results_.advantage[row] = advantage;
    results_.clipped[row] = clipped ? 1 : 0;
    results_.kl[row] = kl;

    // d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) z.
    const float row_weight = 1.0f / (static_cast<float>(t_.rows) * (mean ? elements : 1.0f));
    float residual_weight = clipped ? 0.0f : -advantage * ratio * row_weight * at.slope;
    float shift_weight = arguments_.kl_weight * row_weight * at.slope;
    if (results_.grad_scale != nullptr) {
      const float size = static_cast<float>(std::sqrt(shift / elements));
      const float scale = power_of_two(std::fabs(residual_weight) + std::fabs(shift_weight) * size);
      results_.grad_scale[row] = scale;
      residual_weight /= scale;
      shift_weight /= scale;
    }
    return {advance(results_.grad_output, row * t_.elements), advance(results_.grad_uncond, row * t_.elements),
            residual_weight, shift_weight, streamed_};
  }

  const loopfast_transition &t_;
  const loopfast_loss_arguments &arguments_;
  const loopfast_loss_results &results_;
  const bool wants_gradients_;
  const bool streamed_;
};

int check_loss(const loopfast_transition &t, const loopfast_loss_arguments *arguments,
               const loopfast_loss_results *results) {
  if (arguments == nullptr) return invalid("arguments is missing");
  if (results == nullptr) return invalid("results is missing");
  const loopfast_loss_arguments &in = *arguments;
  const loopfast_loss_results &out = *results;
  if (int status = check_latents("prev_sample", in.prev_sample.data, in.prev_sample.dtype, false)) return status;
  if (int status = check_latents("reference_output", in.reference_output.data, in.reference_output.dtype, true)) {
    return status;
  }
  if (in.old_logprob == nullptr) return invalid("old_logprob is missing");
  if (in.advantage == nullptr) {
    if (in.rewards == nullptr) return invalid("rewards is missing, and so is advantage");
    if (int status = check_group(in.groups, in.samples)) return status;
    if (in.trajectory == nullptr) return invalid("trajectory is missing");
    if (int status = check_index("trajectory", in.trajectory, t.rows, in.groups * in.samples)) return status;
    if (!(in.advantage_clip > 0.0f)) {
      return invalid("advantage_clip must be positive, got %g", static_cast<double>(in.advantage_clip));
    }
  }
  if (!(in.clip_range > 0.0f) || (in.clip_range >= 1.0f && !std::isinf(in.clip_range))) {
    return invalid("clip_range must lie between 0 and 1, or be infinity, got %g", static_cast<double>(in.clip_range));
  }
  if (!(in.kl_weight >= 0.0f)) {
    return invalid("kl_weight must not be negative, got %g", static_cast<double>(in.kl_weight));
  }
  if (in.kl_weight > 0.0f && in.reference_output.data == nullptr) {
    return invalid("kl_weight=%g needs reference_output", static_cast<double>(in.kl_weight));
  }
  if (out.loss == nullptr || out.logprob == nullptr || out.ratio == nullptr || out.advantage == nullptr ||
      out.clipped == nullptr || out.kl == nullptr) {
    return invalid("results has no room for the loss or a row's results");
  }
  if (int status = check_latents("grad_output", out.grad_output.data, out.grad_output.dtype, true)) return status;
  if (int status = check_latents("grad_uncond", out.grad_uncond.data, out.grad_uncond.dtype, true)) return status;
  if (out.grad_uncond.data != nullptr && t.uncond_output.data == nullptr) {
    return invalid("grad_uncond needs uncond_output");
  }
  const bool half = (out.grad_output.data != nullptr && out.grad_output.dtype == LOOPFAST_FLOAT16) ||
                    (out.grad_uncond.data != nullptr && out.grad_uncond.dtype == LOOPFAST_FLOAT16);
  if (half && out.grad_scale == nullptr) return invalid("grad_scale is missing: a gradient is float16");
  return 0;
}

// The log-probability of every row, from the sum of squares of each of its blocks.
template <class SumOfBlock>
void logprob_by_blocks(const loopfast_transition &t, float *logprob, SumOfBlock &&sum_of_block) {
  const int64_t blocks = blocks_of(t.elements);
  std::vector<float> partial(static_cast<size_t>(t.rows * blocks));
  parallel(pieces(t.threads, t.rows * t.elements), t.rows * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * kBlock;
      partial[static_cast<size_t>(unit)] =
          sum_of_block(unit / blocks, first, std::min(first + kBlock, t.elements));
    }
  });
  for (int64_t row = 0; row < t.rows; ++row) {
    Sums sums;
    for (int64_t block = 0; block < blocks; ++block) sums.add({partial[static_cast<size_t>(row * blocks + block)], 0});
    logprob[row] = logprob_of(t, t.table[3 * step_of(t, row) + 2], sums.residual);
  }
}

// Calls body(row, first, end) for every block of every row.
template <class Body>
void for_blocks(int64_t rows, int64_t elements, int32_t threads, Body &&body) {
  const int64_t blocks = blocks_of(elements);
  parallel(pieces(threads, rows * elements), rows * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % blocks * kBlock;
      body(unit / blocks, first, std::min(first + kBlock, elements));
    }
  });
}

}  // namespace
}  // namespace loopfast

using namespace loopfast;

const char *loopfast_error(void) { return error_message(); }

int loopfast_denoise_step(const loopfast_transition *transition, const int64_t *seed, loopfast_output prev_sample,
                          loopfast_output model_input, int64_t copies, float *logprob) {
  if (int status = check_transition(transition)) return status;
  if (seed == nullptr) return invalid("seed is missing");
  if (int status = check_latents("prev_sample", prev_sample.data, prev_sample.dtype, false)) return status;
  if (int status = check_latents("model_input", model_input.data, model_input.dtype, true)) return status;
  if (model_input.data != nullptr && copies < 1) {
    return invalid("copies must be at least 1, got %lld", static_cast<long long>(copies));
  }
  if (logprob == nullptr) return invalid("logprob is missing");
  const loopfast_transition &t = *transition;
  return guarded([&] {
    logprob_by_blocks(t, logprob, [&](int64_t row, int64_t begin, int64_t end) {
      const SampleTargets to{advance(prev_sample, row * t.elements), advance(model_input, row * t.elements), copies,
                             t.rows * t.elements};
      const uint64_t key = static_cast<uint64_t>(seed[row]);
      return kernels().sample(row_at(t, row, {}, {}), key, step_of(t, row), to, begin, end);
    });
  });
}

int loopfast_transition_logprob(const loopfast_transition *transition, loopfast_input prev_sample, float *logprob) {
  if (int status = check_transition(transition)) return status;
  if (int status = check_latents("prev_sample", prev_sample.data, prev_sample.dtype, false)) return status;
  if (logprob == nullptr) return invalid("logprob is missing");
  return guarded([&] {
    logprob_by_blocks(*transition, logprob, [&](int64_t row, int64_t begin, int64_t end) {
      return kernels().squares(row_at(*transition, row, prev_sample, {}), begin, end, nullptr).residual;
    });
  });
}

int loopfast_transition_logprob_backward(const loopfast_transition *transition, loopfast_input prev_sample,
                                         const float *grad, loopfast_output grad_output, loopfast_output grad_uncond) {
  if (int status = check_transition(transition)) return status;
  if (int status = check_latents("prev_sample", prev_sample.data, prev_sample.dtype, false)) return status;
  if (grad == nullptr) return invalid("grad is missing");
  if (int status = check_latents("grad_output", grad_output.data, grad_output.dtype, false)) return status;
  if (int status = check_latents("grad_uncond", grad_uncond.data, grad_uncond.dtype, true)) return status;
  const loopfast_transition &t = *transition;
  if (grad_uncond.data != nullptr && t.uncond_output.data == nullptr) {
    return invalid("grad_uncond needs uncond_output");
  }
  const bool past_caches = streamed(t, grad_output, grad_uncond);
  for_blocks(t.rows, t.elements, t.threads, [&](int64_t row, int64_t begin, int64_t end) {
    const Row at = row_at(t, row, prev_sample, {});
    const float share = t.reduction == LOOPFAST_MEAN ? 1.0f / static_cast<float>(t.elements) : 1.0f;
    const GradientTargets to{advance(grad_output, row * t.elements), advance(grad_uncond, row * t.elements),
                             grad[row] * at.slope * share, 0.0f, past_caches};
    kernels().gradients(at, to, begin, end, nullptr);
  });
  return 0;
}

int loopfast_loss(const loopfast_transition *transition, const loopfast_loss_arguments *arguments,
                  const loopfast_loss_results *results) {
  if (int status = check_transition(transition)) return status;
  if (int status = check_loss(*transition, arguments, results)) return status;
  return guarded([&] { Loss(*transition, *arguments, *results).run(); });
}

int loopfast_scale_gradients(int64_t rows, int64_t elements, loopfast_output grad_output, loopfast_output grad_uncond,
                             const float *grad_scale, float scale, int32_t threads) {
  if (int status = check_size(rows, elements)) return status;
  if (int status = check_latents("grad_output", grad_output.data, grad_output.dtype, true)) return status;
  if (int status = check_latents("grad_uncond", grad_uncond.data, grad_uncond.dtype, true)) return status;
  if (grad_scale == nullptr && scale == 1.0f) return 0;
  for_blocks(rows, elements, threads, [&](int64_t row, int64_t begin, int64_t end) {
    const float factor = grad_scale == nullptr ? scale : scale * grad_scale[row];
    for (const loopfast_output &grad : {grad_output, grad_uncond}) {
      if (grad.data != nullptr && factor != 1.0f) kernels().scale(advance(grad, row * elements), factor, begin, end);
    }
  });
  return 0;
}

int loopfast_leave_one_out(const float *rewards, int64_t groups, int64_t samples, float *advantage) {
  if (rewards == nullptr) return invalid("rewards is missing");
  if (advantage == nullptr) return invalid("advantage is missing");
  if (int status = check_group(groups, samples)) return status;
  for (int64_t i = 0; i < groups * samples; ++i) {
    advantage[i] = leave_one_out(rewards + i / samples * samples, samples, i % samples);
  }
  return 0;
}

int loopfast_philox_normal(int64_t rows, int64_t elements, const int64_t *seed, const int64_t *step, float *noise,
                           int32_t threads) {
  if (int status = check_size(rows, elements)) return status;
  if (seed == nullptr) return invalid("seed is missing");
  if (step == nullptr) return invalid("step is missing");
  if (noise == nullptr) return invalid("noise is missing");
  for_blocks(rows, elements, threads, [&](int64_t row, int64_t begin, int64_t end) {
    kernels().normal(static_cast<uint64_t>(seed[row]), step[row], noise + row * elements, begin, end);
  });
  return 0;
}

void loopfast_philox_4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox(x, key[0], key[1]);
  std::copy(x, x + 4, words);
}
