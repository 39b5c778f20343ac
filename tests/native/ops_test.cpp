// The C interface against its formulas in float64, in buffers of the exact size: made to run under the sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "loopfast.h"

namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      ++failures;                                                 \
    }                                                             \
  } while (false)

std::mt19937 generator(0);

// Latents in some dtype and the float64 values they stand for.
struct Latents {
  int32_t dtype;
  std::vector<unsigned char> bytes;
  std::vector<double> values;

  Latents(size_t count, int32_t dtype) : dtype(dtype), bytes(count * (dtype == LOOPFAST_FLOAT32 ? 4 : 2)), values(count) {}

  static Latents random(size_t count, int32_t dtype) {
    Latents latents(count, dtype);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count; ++i) {
      const float value = normal(generator);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == LOOPFAST_FLOAT32) {
        std::memcpy(&latents.bytes[4 * i], &value, 4);
      } else {
        // A float16 pattern of moderate size, or the upper half of a float.
        const uint16_t half = dtype == LOOPFAST_BFLOAT16 ? static_cast<uint16_t>(bits >> 16)
                                                         : static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x3000 | (bits & 0xfff));
        std::memcpy(&latents.bytes[2 * i], &half, 2);
      }
    }
    latents.read();
    return latents;
  }

  void read() {
    for (size_t i = 0; i < values.size(); ++i) {
      uint16_t half = 0;
      if (dtype != LOOPFAST_FLOAT32) std::memcpy(&half, &bytes[2 * i], 2);
      if (dtype == LOOPFAST_FLOAT32) {
        float value;
        std::memcpy(&value, &bytes[4 * i], 4);
        values[i] = value;
      } else if (dtype == LOOPFAST_BFLOAT16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        values[i] = value;
      } else {
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                                 : exponent == 0 ? std::ldexp(fraction, -24)
                                                 : std::ldexp(1024 + fraction, exponent - 25);
        values[i] = half & 0x8000 ? -magnitude : magnitude;
      }
    }
  }

  loopfast_input in() const { return {bytes.data(), dtype}; }
  loopfast_output out() { return {bytes.data(), dtype}; }
};

double rounding(int32_t dtype) {
  return dtype == LOOPFAST_FLOAT32 ? 0x1p-24 : dtype == LOOPFAST_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

// ||a - b|| / ||b||.
double distance(const std::vector<double> &a, const std::vector<double> &b) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(difference / (size > 0 ? size : 1.0));
}

struct Case {
  int64_t rows, elements;
  int32_t dtype, reduction;
  bool guided, with_reference;
};

void run(const Case &c) {
  const size_t count = static_cast<size_t>(c.rows * c.elements), rows = static_cast<size_t>(c.rows);
  const char *name = c.dtype == LOOPFAST_FLOAT32 ? "float32" : c.dtype == LOOPFAST_FLOAT16 ? "float16" : "bfloat16";
  const int64_t steps = 3;
  const std::vector<float> table = {1.1f, -0.4f, 0.7f, 0.9f, 0.3f, 0.0f, 1.0f, -0.2f, 1.5f};
  std::vector<int64_t> step(rows), seed(rows), trajectory(rows);
  for (size_t row = 0; row < rows; ++row) {
    step[row] = static_cast<int64_t>(row) % steps;
    seed[row] = static_cast<int64_t>(generator()) << 32 | generator();
    trajectory[row] = static_cast<int64_t>(generator() % 6);
  }
  Latents output = Latents::random(count, c.dtype), uncond = Latents::random(count, c.dtype);
  Latents sample = Latents::random(count, c.dtype), reference = Latents::random(count, c.dtype);
  const float g = c.guided ? 3.0f : 1.0f;

  loopfast_transition t = {};
  t.rows = c.rows;
  t.elements = c.elements;
  t.steps = steps;
  t.table = table.data();
  t.step = step.data();
  t.step_stride = 1;
  t.model_output = output.in();
  if (c.guided) t.uncond_output = uncond.in();
  t.sample = sample.in();
  t.guidance_scale = g;
  t.reduction = c.reduction;
  t.threads = 1;

  // Sampling, on one thread and on several.
  Latents prev(count, c.dtype), again(count, c.dtype), inputs(2 * count, LOOPFAST_FLOAT32);
  std::vector<float> old_logprob(rows), other(rows), noise(count);
  CHECK(loopfast_denoise_step(&t, seed.data(), prev.out(), inputs.out(), 2, old_logprob.data()) == 0, "%s",
        loopfast_error());
  t.threads = 3;
  CHECK(loopfast_denoise_step(&t, seed.data(), again.out(), {}, 0, other.data()) == 0, "%s", loopfast_error());
  CHECK(prev.bytes == again.bytes && old_logprob == other, "%s by threads", name);
  CHECK(loopfast_transition_logprob(&t, prev.in(), other.data()) == 0, "%s", loopfast_error());
  CHECK(old_logprob == other, "%s scored again", name);
  CHECK(loopfast_philox_normal(c.rows, c.elements, seed.data(), step.data(), noise.data(), 2) == 0, "%s",
        loopfast_error());
  prev.read();
  inputs.read();

  const double elements = static_cast<double>(c.elements);
  const double share = c.reduction == LOOPFAST_MEAN ? 1.0 / elements : 1.0;
  std::vector<double> expected(count), m(count), z(count), logprob(rows), kl(rows);
  for (size_t row = 0; row < rows; ++row) {
    const float *coefficients = &table[static_cast<size_t>(3 * step[row])];
    const double a = coefficients[0], b = coefficients[1], sigma = coefficients[2];
    double squares = 0.0, shifts = 0.0;
    for (size_t i = row * c.elements; i < (row + 1) * c.elements; ++i) {
      m[i] = c.guided ? uncond.values[i] + g * (output.values[i] - uncond.values[i]) : output.values[i];
      const double mean = a * sample.values[i] + b * m[i];
      expected[i] = mean + sigma * noise[i];
      CHECK(inputs.values[i] == prev.values[i] && inputs.values[count + i] == prev.values[i], "%s copies", name);
      z[i] = sigma > 0 ? (prev.values[i] - mean) / sigma : 0.0;
      squares += z[i] * z[i];
      if (sigma > 0) shifts += std::pow(b / sigma * (m[i] - reference.values[i]), 2);
    }
    logprob[row] = sigma > 0 ? -0.5 * squares * share - (std::log(sigma) + 0.5 * std::log(2 * M_PI)) * elements * share : 0.0;
    kl[row] = c.with_reference ? 0.5 * shifts * share : 0.0;
  }
  CHECK(distance(prev.values, expected) < rounding(c.dtype) + 1e-6, "%s sample", name);
  CHECK(distance({old_logprob.begin(), old_logprob.end()}, logprob) < 1e-5, "%s log-prob", name);

  // The loss.
  const std::vector<float> rewards = {1.0f, 2.0f, 6.0f, 0.0f, 0.5f, 3.0f};
  const double advantages[] = {-3.0, -1.5, 4.5, -1.75, -1.0, 2.75};
  std::vector<float> shifted(rows);
  for (size_t row = 0; row < rows; ++row) shifted[row] = old_logprob[row] + (row % 2 ? 0.4f : -0.05f);
  loopfast_loss_arguments arguments = {};
  arguments.prev_sample = prev.in();
  arguments.old_logprob = shifted.data();
  arguments.rewards = rewards.data();
  arguments.groups = 2;
  arguments.samples = 3;
  arguments.trajectory = trajectory.data();
  arguments.advantage_scale = 0.5f;
  arguments.advantage_clip = 2.0f;
  arguments.clip_range = 0.2f;
  if (c.with_reference) arguments.reference_output = reference.in();
  arguments.kl_weight = c.with_reference ? 0.1f : 0.0f;

  Latents grad_output(count, c.dtype), grad_uncond(count, c.dtype);
  float loss = 0.0f;
  std::vector<float> new_logprob(rows), ratio(rows), advantage(rows), divergence(rows), scale(rows);
  std::vector<uint8_t> clipped(rows);
  loopfast_loss_results results = {&loss,           new_logprob.data(), ratio.data(), advantage.data(),
                                   clipped.data(),  divergence.data(),  grad_output.out(),
                                   c.guided ? grad_uncond.out() : loopfast_output{},
                                   c.dtype == LOOPFAST_FLOAT16 ? scale.data() : nullptr};
  t.threads = 1;
  CHECK(loopfast_loss(&t, &arguments, &results) == 0, "%s", loopfast_error());
  const std::vector<unsigned char> first = grad_output.bytes;
  const float first_loss = loss;
  t.threads = 5;
  CHECK(loopfast_loss(&t, &arguments, &results) == 0, "%s", loopfast_error());
  CHECK(first == grad_output.bytes && first_loss == loss, "%s loss by threads", name);
  // A loss scale, as float16 needs one.
  const float loss_scale = 0.5f * static_cast<float>(c.rows / share);
  CHECK(loopfast_scale_gradients(c.rows, c.elements, grad_output.out(), c.guided ? grad_uncond.out() : loopfast_output{},
                                 results.grad_scale, loss_scale, 2) == 0,
        "%s", loopfast_error());
  grad_output.read();
  grad_uncond.read();

  double expected_loss = 0.0;
  std::vector<double> by_output(count), by_uncond(count);
  for (size_t row = 0; row < rows; ++row) {
    const double b = table[static_cast<size_t>(3 * step[row] + 1)], sigma = table[static_cast<size_t>(3 * step[row] + 2)];
    const double slope = sigma > 0 ? b / sigma : 0.0;
    const double A = std::fmax(-2.0, std::fmin(2.0, 0.5 * advantages[trajectory[row]]));
    const double r = std::exp(static_cast<double>(new_logprob[row]) - shifted[row]);
    const double plain = -A * r, limited = -A * std::fmax(0.8, std::fmin(1.2, r));
    expected_loss += (std::fmax(plain, limited) + arguments.kl_weight * kl[row]) / static_cast<double>(rows);
    CHECK(clipped[row] == (limited > plain), "%s clipped", name);
    const double weight = loss_scale * share / static_cast<double>(rows);
    for (size_t i = row * c.elements; i < (row + 1) * c.elements; ++i) {
      const double shift = c.with_reference ? slope * (m[i] - reference.values[i]) : 0.0;
      const double by_m = weight * slope * ((limited > plain ? 0.0 : plain) * z[i] + arguments.kl_weight * shift);
      by_output[i] = by_m * (c.guided ? g : 1.0);
      by_uncond[i] = by_m * (1.0 - g);
    }
  }
  const double tolerance = 2.0 * rounding(c.dtype) + 1e-5 * std::fmax(1.0, elements * share);
  CHECK(std::fabs(loss - expected_loss) < 1e-4 * (1 + std::fabs(expected_loss)), "%s loss %g, %g", name, loss, expected_loss);
  CHECK(distance(grad_output.values, by_output) < tolerance, "%s gradient: %g", name, distance(grad_output.values, by_output));
  if (c.guided) CHECK(distance(grad_uncond.values, by_uncond) < tolerance, "%s second gradient", name);
  if (c.with_reference) CHECK(distance({divergence.begin(), divergence.end()}, kl) < 1e-5, "%s KL", name);

  // The log-probability's own gradient.
  std::vector<float> grad(rows);
  for (size_t row = 0; row < rows; ++row) grad[row] = static_cast<float>((1.0 - 0.3 * static_cast<double>(row)) / share);
  CHECK(loopfast_transition_logprob_backward(&t, prev.in(), grad.data(), grad_output.out(),
                                             c.guided ? grad_uncond.out() : loopfast_output{}) == 0,
        "%s", loopfast_error());
  grad_output.read();
  for (size_t i = 0; i < count; ++i) {
    const size_t row = i / static_cast<size_t>(c.elements);
    const double b = table[static_cast<size_t>(3 * step[row] + 1)], sigma = table[static_cast<size_t>(3 * step[row] + 2)];
    by_output[i] = sigma > 0 ? grad[row] * share * b / sigma * z[i] * (c.guided ? g : 1.0) : 0.0;
  }
  CHECK(distance(grad_output.values, by_output) < 2.0 * rounding(c.dtype) + 1e-5, "%s gradient of log-prob", name);
}

void refused(const char *message, int status) {
  CHECK(status != 0, "accepted: %s", message);
  CHECK(std::strstr(loopfast_error(), message) != nullptr, "'%s' instead of '%s'", loopfast_error(), message);
}

void errors() {
  std::vector<float> latents(8, 0.5f), logprob(2), table = {1.0f, 1.0f, 0.5f};
  std::vector<int64_t> step = {0, 0}, seed = {0, 0};
  loopfast_transition good = {};
  good.rows = 2;
  good.elements = 4;
  good.steps = 1;
  good.table = table.data();
  good.step = step.data();
  good.step_stride = 1;
  good.model_output = good.sample = {latents.data(), LOOPFAST_FLOAT32};
  good.guidance_scale = 1.0f;
  const loopfast_input prev = {latents.data(), LOOPFAST_FLOAT32};
  CHECK(loopfast_transition_logprob(&good, prev, logprob.data()) == 0, "%s", loopfast_error());

  const auto with = [&](auto change) {
    loopfast_transition bad = good;
    change(bad);
    return loopfast_transition_logprob(&bad, prev, logprob.data());
  };
  refused("transition is missing", loopfast_transition_logprob(nullptr, prev, logprob.data()));
  refused("rows must be", with([](auto &t) { t.rows = 0; }));
  refused("elements must be", with([](auto &t) { t.elements = -1; }));
  refused("steps must be", with([](auto &t) { t.steps = 0; }));
  refused("table is missing", with([](auto &t) { t.table = nullptr; }));
  refused("step is missing", with([](auto &t) { t.step = nullptr; }));
  refused("step_stride must be", with([](auto &t) { t.step_stride = 2; }));
  refused("model_output is missing", with([](auto &t) { t.model_output.data = nullptr; }));
  refused("sample has the unknown dtype tag 7", with([](auto &t) { t.sample.dtype = 7; }));
  refused("guidance_scale=2 needs uncond_output", with([](auto &t) { t.guidance_scale = 2.0f; }));
  refused("reduction must be", with([](auto &t) { t.reduction = 2; }));
  refused("prev_sample is missing", loopfast_transition_logprob(&good, {}, logprob.data()));
  refused("logprob is missing", loopfast_transition_logprob(&good, prev, nullptr));
  step[1] = 1;
  refused("step must lie in [0, 1), got 1", with([](auto &) {}));
  step[1] = 0;
  table[2] = -0.5f;
  refused("table has sigma -0.5 at step 0", with([](auto &) {}));
  table[2] = NAN;
  refused("table has sigma nan at step 0", with([](auto &) {}));
  table[2] = 0.5f;

  refused("seed is missing", loopfast_denoise_step(&good, nullptr, {latents.data(), 0}, {}, 0, logprob.data()));
  refused("copies must be", loopfast_denoise_step(&good, seed.data(), {latents.data(), 0}, {latents.data(), 0}, 0, logprob.data()));
  refused("grad is missing", loopfast_transition_logprob_backward(&good, prev, nullptr, {latents.data(), 0}, {}));
  refused("grad_uncond needs", loopfast_transition_logprob_backward(&good, prev, logprob.data(), {latents.data(), 0}, {latents.data(), 0}));

  const std::vector<float> rewards(4, 1.0f);
  std::vector<int64_t> trajectory = {0, 3};
  float loss;
  std::vector<float> ratio(2), advantage(2), kl(2);
  std::vector<uint8_t> clipped(2);
  loopfast_loss_arguments arguments = {};
  arguments.prev_sample = prev;
  arguments.old_logprob = logprob.data();
  arguments.rewards = rewards.data();
  arguments.groups = 2;
  arguments.samples = 2;
  arguments.trajectory = trajectory.data();
  arguments.advantage_scale = 1.0f;
  arguments.advantage_clip = INFINITY;
  arguments.clip_range = INFINITY;
  loopfast_loss_results results = {&loss, logprob.data(), ratio.data(), advantage.data(), clipped.data(), kl.data(), {}, {}, nullptr};
  CHECK(loopfast_loss(&good, &arguments, &results) == 0, "%s", loopfast_error());
  const auto loss_with = [&](auto change) {
    loopfast_loss_arguments bad = arguments;
    loopfast_loss_results out = results;
    change(bad, out);
    return loopfast_loss(&good, &bad, &out);
  };
  refused("old_logprob is missing", loss_with([](auto &a, auto &) { a.old_logprob = nullptr; }));
  refused("rewards is missing", loss_with([](auto &a, auto &) { a.rewards = nullptr; }));
  refused("K = 1", loss_with([](auto &a, auto &) { a.samples = 1; }));
  refused("trajectory must lie in [0, 2), got 3", loss_with([](auto &a, auto &) { a.groups = 1; }));
  refused("advantage_clip must be positive", loss_with([](auto &a, auto &) { a.advantage_clip = 0.0f; }));
  refused("clip_range must lie", loss_with([](auto &a, auto &) { a.clip_range = 1.5f; }));
  refused("kl_weight must not be negative", loss_with([](auto &a, auto &) { a.kl_weight = -1.0f; }));
  refused("kl_weight=0.5 needs", loss_with([](auto &a, auto &) { a.kl_weight = 0.5f; }));
  refused("results has no room", loss_with([](auto &, auto &r) { r.kl = nullptr; }));
  refused("grad_uncond needs", loss_with([&](auto &, auto &r) { r.grad_uncond = {latents.data(), 0}; }));
  refused("grad_scale is missing", loss_with([&](auto &, auto &r) { r.grad_output = {latents.data(), LOOPFAST_FLOAT16}; }));
  refused("K = 1", loopfast_leave_one_out(rewards.data(), 4, 1, advantage.data()));
  refused("noise is missing", loopfast_philox_normal(2, 4, seed.data(), step.data(), nullptr, 1));
}

struct Image {
  int64_t rows, channels, pixels, groups;
  int32_t dtype;
  bool channels_last, shifted;
};

// Group normalization and SiLU, and its gradients, against the formulas.
void run_image(const Image &c) {
  const int64_t elements = c.channels * c.pixels, members = elements / c.groups;
  const size_t count = static_cast<size_t>(c.rows * elements), channels = static_cast<size_t>(c.channels);
  const size_t shifts = static_cast<size_t>(c.rows) * channels;
  const Latents x = Latents::random(count, c.dtype), grad = Latents::random(count, c.dtype);
  const Latents shift = Latents::random(shifts, c.dtype);
  const Latents weight = Latents::random(channels, LOOPFAST_FLOAT32), bias = Latents::random(channels, LOOPFAST_FLOAT32);
  Latents y(count, c.dtype), grad_x(count, c.dtype), grad_shift(shifts, c.dtype);
  Latents grad_weight(channels, LOOPFAST_FLOAT32), grad_bias(channels, LOOPFAST_FLOAT32);
  std::vector<float> statistics(static_cast<size_t>(c.rows * c.groups * 3));

  loopfast_norm norm = {c.rows, c.channels, c.pixels, c.groups, c.channels_last, 1e-3f, x.in(), weight.in(), bias.in(),
                        c.shifted ? shift.in() : loopfast_input{}, 3};
  CHECK(loopfast_group_norm_silu(&norm, y.out(), statistics.data()) == 0, "%s", loopfast_error());
  CHECK(loopfast_group_norm_silu_backward(&norm, statistics.data(), grad.in(), grad_x.out(), grad_weight.out(),
                                          grad_bias.out(), c.shifted ? grad_shift.out() : loopfast_output{}) == 0,
        "%s", loopfast_error());

  std::vector<double> by_y(count), by_x(count), by_weight(channels), by_bias(channels), by_shift(shifts);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t group = 0; group < c.groups; ++group) {
      const int64_t first = group * (c.channels / c.groups);
      // Calls body(channel, element, u) for every element of the group.
      const auto each = [&](auto body) {
        for (int64_t i = 0; i < members; ++i) {
          const int64_t channel = first + i / c.pixels, pixel = i % c.pixels;
          const int64_t within = c.channels_last ? pixel * c.channels + channel : channel * c.pixels + pixel;
          const size_t at = static_cast<size_t>(row * elements + within);
          const size_t of_row = static_cast<size_t>(row * c.channels + channel);
          body(static_cast<size_t>(channel), at, of_row, x.values[at] + (c.shifted ? shift.values[of_row] : 0.0));
        }
      };
      double mean = 0.0, variance = 0.0, sum = 0.0, product = 0.0;
      const double m = static_cast<double>(members);
      each([&](size_t, size_t, size_t, double u) { mean += u / m; });
      each([&](size_t, size_t, size_t, double u) { variance += (u - mean) * (u - mean) / m; });
      const double inverse = 1.0 / std::sqrt(variance + 1e-3);
      std::vector<double> by_z(count);
      each([&](size_t channel, size_t at, size_t, double u) {
        const double normal = (u - mean) * inverse, z = weight.values[channel] * normal + bias.values[channel];
        const double sigmoid = 1.0 / (1.0 + std::exp(-z));
        by_y[at] = z * sigmoid;
        by_z[at] = grad.values[at] * sigmoid * (1.0 + z * (1.0 - sigmoid));
        by_bias[channel] += by_z[at];
        by_weight[channel] += by_z[at] * normal;
        sum += weight.values[channel] * by_z[at] / m;
        product += weight.values[channel] * by_z[at] * normal / m;
      });
      each([&](size_t channel, size_t at, size_t of_row, double u) {
        by_x[at] = inverse * (weight.values[channel] * by_z[at] - sum - (u - mean) * inverse * product);
        by_shift[of_row] += by_x[at];
      });
    }
  }
  const auto check = [&](const char *what, Latents &mine, const std::vector<double> &exact) {
    mine.read();
    const double off = distance(mine.values, exact);
    CHECK(off < rounding(mine.dtype) + 1e-5, "%s, %lld rows, %lld channels, %lld pixels, dtype %d: off by %g", what,
          static_cast<long long>(c.rows), static_cast<long long>(c.channels), static_cast<long long>(c.pixels),
          c.dtype, off);
  };
  check("y", y, by_y);
  check("grad_x", grad_x, by_x);
  check("grad_weight", grad_weight, by_weight);
  check("grad_bias", grad_bias, by_bias);
  if (c.shifted) check("grad_shift", grad_shift, by_shift);
}

void image_errors() {
  std::vector<float> values(12, 0.5f), statistics(6);
  const loopfast_input in = {values.data(), LOOPFAST_FLOAT32};
  const loopfast_output out = {values.data(), LOOPFAST_FLOAT32};
  const loopfast_norm good = {1, 4, 3, 2, 0, 1e-5f, in, in, in, {}, 1};
  const auto with = [&](auto change) {
    loopfast_norm bad = good;
    change(bad);
    return loopfast_group_norm_silu(&bad, out, statistics.data());
  };
  refused("norm is missing", loopfast_group_norm_silu(nullptr, out, statistics.data()));
  refused("pixels must be at least 1, got 0", with([](auto &n) { n.pixels = 0; }));
  refused("groups must divide the 4 channels, got 3", with([](auto &n) { n.groups = 3; }));
  refused("eps must be positive", with([](auto &n) { n.eps = 0.0f; }));
  refused("weight is missing", with([](auto &n) { n.weight.data = nullptr; }));
  refused("x has the unknown dtype tag 5", with([](auto &n) { n.x.dtype = 5; }));
  refused("y is missing", loopfast_group_norm_silu(&good, {}, statistics.data()));
  refused("statistics is missing", loopfast_group_norm_silu(&good, out, nullptr));
  refused("grad_y is missing", loopfast_group_norm_silu_backward(&good, statistics.data(), {}, out, {}, {}, {}));
  refused("grad_shift needs", loopfast_group_norm_silu_backward(&good, statistics.data(), in, out, {}, {}, out));
}

int32_t lent(int64_t begin, int64_t end, int64_t, loopfast_task task, void *state) {
  for (int64_t i = end; i > begin; --i) task(i - 1, i, state);
  return 0;
}

}  // namespace

int main() {
  std::vector<Case> cases;
  for (int32_t dtype : {LOOPFAST_FLOAT32, LOOPFAST_FLOAT16, LOOPFAST_BFLOAT16}) {
    for (int64_t elements : {1, 3, 64, 1000, 4096, 4099, 40000}) {
      for (int64_t rows : {1, 2, 7}) {
        const bool odd = (elements + rows) % 2 != 0;
        cases.push_back({rows, elements, dtype, odd ? LOOPFAST_SUM : LOOPFAST_MEAN, rows != 2, odd});
      }
    }
  }
  std::vector<Image> images;
  for (int32_t dtype : {LOOPFAST_FLOAT32, LOOPFAST_FLOAT16, LOOPFAST_BFLOAT16}) {
    for (bool last : {false, true}) {
      for (bool shifted : {false, true}) {
        images.push_back({5, 40, 64, 8, dtype, last, shifted});
        images.push_back({3, 21, 35, 3, dtype, last, shifted});
        images.push_back({2, 8, 1, 2, dtype, last, shifted});
        images.push_back({1, 6, 9001, 2, dtype, last, shifted});
      }
    }
  }
  for (const Case &c : cases) run(c);
  for (const Image &c : images) run_image(c);
  // The same on threads of the host's, which take the pieces in another order.
  loopfast_set_parallel_for(lent);
  for (const Case &c : cases) run(c);
  for (const Image &c : images) run_image(c);
  loopfast_set_parallel_for(nullptr);
  errors();
  image_errors();
  std::printf("%s: %zu cases, %d failures\n", loopfast_isa(), cases.size() + images.size(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
