// LOOP without torch: samples one step for two groups of two, rewards it and takes the gradient of the loss.
//
//     c++ -std=c++17 loop_step.cpp -I ../include -L <where libloopfast.so is> -lloopfast -o loop_step
#include <cmath>
#include <cstdio>
#include <vector>

#include "loopfast.h"

int main() {
  const int64_t rows = 4, elements = 256;
  std::vector<float> output(rows * elements), sample(rows * elements);
  for (size_t i = 0; i < output.size(); ++i) {
    output[i] = std::sin(0.1f * static_cast<float>(i));
    sample[i] = std::cos(0.2f * static_cast<float>(i));
  }
  const std::vector<float> table = {1.02f, -0.2f, 0.1f};  // one step: a, b, sigma
  const std::vector<int64_t> step(rows, 0), seed = {1, 2, 3, 4}, trajectory = {0, 1, 2, 3};

  loopfast_transition transition = {};
  transition.rows = rows;
  transition.elements = elements;
  transition.steps = 1;
  transition.table = table.data();
  transition.step = step.data();
  transition.step_stride = 1;
  transition.model_output = {output.data(), LOOPFAST_FLOAT32};
  transition.sample = {sample.data(), LOOPFAST_FLOAT32};
  transition.guidance_scale = 1.0f;
  transition.reduction = LOOPFAST_MEAN;

  std::vector<float> prev_sample(rows * elements), old_logprob(rows);
  if (loopfast_denoise_step(&transition, seed.data(), {prev_sample.data(), LOOPFAST_FLOAT32}, {}, 0,
                            old_logprob.data()) != 0) {
    std::fprintf(stderr, "%s\n", loopfast_error());
    return 1;
  }

  // The reward: the sample's mean.
  std::vector<float> rewards(rows, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < elements; ++i) rewards[row] += prev_sample[row * elements + i] / elements;
  }

  loopfast_loss_arguments arguments = {};
  arguments.prev_sample = {prev_sample.data(), LOOPFAST_FLOAT32};
  arguments.old_logprob = old_logprob.data();
  arguments.rewards = rewards.data();
  arguments.groups = 2;
  arguments.samples = 2;
  arguments.trajectory = trajectory.data();
  arguments.advantage_scale = 1.0f;
  arguments.advantage_clip = INFINITY;
  arguments.clip_range = 1e-4f;

  float loss;
  std::vector<float> logprob(rows), ratio(rows), advantage(rows), kl(rows), grad(rows * elements);
  std::vector<uint8_t> clipped(rows);
  loopfast_loss_results results = {};
  results.loss = &loss;
  results.logprob = logprob.data();
  results.ratio = ratio.data();
  results.advantage = advantage.data();
  results.clipped = clipped.data();
  results.kl = kl.data();
  results.grad_output = {grad.data(), LOOPFAST_FLOAT32};
  if (loopfast_loss(&transition, &arguments, &results) != 0) {
    std::fprintf(stderr, "%s\n", loopfast_error());
    return 1;
  }

  double norm = 0.0;
  for (float value : grad) norm += static_cast<double>(value) * value;
  std::printf("loopfast %s on %s\n", loopfast_version(), loopfast_isa());
  for (int64_t row = 0; row < rows; ++row) {
    std::printf("row %d: log-prob %.9g, ratio %.9g, advantage %.9g\n", static_cast<int>(row), logprob[row], ratio[row],
                advantage[row]);
  }
  std::printf("loss %.9g, norm of its gradient %.9g\n", loss, std::sqrt(norm));
  return 0;
}
