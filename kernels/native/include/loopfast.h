/* loopfast: reinforcement learning on diffusion models, the ops as plain C for any language with a foreign function
 * interface. It needs no torch.
 *
 * N rows of E elements each, contiguous; T steps. A row at step t moves from x to
 *
 *     x' ~ N(a x + b m, sigma^2),   m = u + g (c - u)      (a, b, sigma) = table[t]
 *
 * with c the model's output, u its output without the condition and g the guidance scale. Latents are float32, float16
 * or bfloat16, and each argument may have another one of them; arithmetic is float32. A row's result depends on nothing
 * but the row: not on its neighbors, the number of threads or the instruction set.
 *
 * Functions that can fail return 0 on success. If they fail, nothing was written and loopfast_error() says why.
 */
#ifndef LOOPFAST_H
#define LOOPFAST_H

#include <stdint.h>

#if defined(__GNUC__)
#define LOOPFAST_API __attribute__((visibility("default")))
#else
#define LOOPFAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The library's version, such as "0.1.0". The string is static: do not free it. */
LOOPFAST_API const char *loopfast_version(void);

/* The instruction sets of this processor that kernels may use, in the form "avx2 fma avx512f"; "" if none is known. The
 * string is static: do not free it. */
LOOPFAST_API const char *loopfast_cpu_features(void);

/* The instruction set the kernels run in: "avx512", "avx2" or "portable". The environment variable LOOPFAST_ISA asks
 * for a lesser one than the processor's best; the results are the same. The string is static: do not free it. */
LOOPFAST_API const char *loopfast_isa(void);

/* The error of this thread's last failed call; it begins with the argument's name. Valid until the thread's next
 * call. */
LOOPFAST_API const char *loopfast_error(void);

/* Threads. Work is cut into at most `threads` pieces (an argument of every op; 0: as many as the processor runs at
 * once) and small work into fewer. The pieces run on threads that the library starts for the call, or on the host's
 * own if it lends them: `run` calls task(b, e, state) on ranges that cover [begin, end), none smaller than `grain`
 * but the last, returns when all are done, and returns 0. NULL takes the loan back. Not to be called while an op
 * runs. */
typedef void (*loopfast_task)(int64_t begin, int64_t end, void *state);
typedef int32_t (*loopfast_parallel_for)(int64_t begin, int64_t end, int64_t grain, loopfast_task task, void *state);
LOOPFAST_API void loopfast_set_parallel_for(loopfast_parallel_for run);

typedef enum { LOOPFAST_FLOAT32 = 0, LOOPFAST_FLOAT16 = 1, LOOPFAST_BFLOAT16 = 2 } loopfast_dtype;
typedef enum { LOOPFAST_MEAN = 0, LOOPFAST_SUM = 1 } loopfast_reduction;

/* Latents [N, E]. `data` is NULL where an optional one is not given. */
typedef struct {
  const void *data;
  int32_t dtype; /* loopfast_dtype */
} loopfast_input;

typedef struct {
  void *data;
  int32_t dtype; /* loopfast_dtype */
} loopfast_output;

/* The arguments of every op on transitions. */
typedef struct {
  int64_t rows;                 /* N, at least 1 */
  int64_t elements;             /* E, at least 1 */
  int64_t steps;                /* T, at least 1 */
  const float *table;           /* [T, 3]: a, b, sigma. Where sigma is 0 the step is deterministic: its
                                   log-probability is 0 and it has no gradient */
  const int64_t *step;          /* the row of the table each sample is at */
  int64_t step_stride;          /* 1: step is [N]; 0: it is [1], for all rows */
  loopfast_input model_output;  /* c */
  loopfast_input uncond_output; /* u; optional */
  loopfast_input sample;        /* x */
  float guidance_scale;         /* g; other than 1 it needs uncond_output */
  int32_t reduction;            /* loopfast_reduction: of a row's log-probability over its elements */
  int32_t threads;
} loopfast_transition;

/* x' = round(a x + b m + sigma z) with z of loopfast_philox_normal, and the log-probability of the rounded value.
 *   seed         [N]
 *   prev_sample  [N, E], receives x'
 *   model_input  [copies, N, E], each copy receives x' too; optional
 *   logprob      [N] */
LOOPFAST_API int loopfast_denoise_step(const loopfast_transition *transition, const int64_t *seed,
                                       loopfast_output prev_sample, loopfast_output model_input, int64_t copies,
                                       float *logprob);

/* log p(x' | x), logprob [N]. Bit for bit what loopfast_denoise_step gave for the same x'. */
LOOPFAST_API int loopfast_transition_logprob(const loopfast_transition *transition, loopfast_input prev_sample,
                                             float *logprob);

/* Its gradients by both outputs.
 *   grad         [N], of the log-probability
 *   grad_output  [N, E]
 *   grad_uncond  [N, E]; optional */
LOOPFAST_API int loopfast_transition_logprob_backward(const loopfast_transition *transition,
                                                      loopfast_input prev_sample, const float *grad,
                                                      loopfast_output grad_output, loopfast_output grad_uncond);

/* The arguments of the loss besides the transition. The advantage of row n is advantage[n], or, if `advantage` is NULL,
 * advantage_scale times rewards[i] less the mean of its group's others, i = trajectory[n], clamped to
 * +-advantage_clip. */
typedef struct {
  loopfast_input prev_sample;      /* x' */
  const float *old_logprob;        /* [N] */
  const float *advantage;          /* [N]; optional */
  const float *rewards;            /* [G, K], K at least 2 */
  int64_t groups;                  /* G */
  int64_t samples;                 /* K */
  const int64_t *trajectory;       /* [N], flat index into rewards */
  float advantage_scale;
  float advantage_clip;            /* infinity for none */
  float clip_range;                /* epsilon in (0, 1); infinity for no clipping */
  loopfast_input reference_output; /* the reference model's guided output; optional */
  float kl_weight;                 /* above 0 it needs reference_output */
} loopfast_loss_arguments;

typedef struct {
  float *loss;                 /* [1]: mean of max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon)) + kl_weight KL */
  float *logprob;              /* [N] */
  float *ratio;                /* [N]: r = exp(logprob - old_logprob), the exponent clamped to +-20 */
  float *advantage;            /* [N]: A */
  uint8_t *clipped;            /* [N]: 1 where the surrogate is flat and the row gets no gradient from it */
  float *kl;                   /* [N]: from the reference output, 0 without one */
  loopfast_output grad_output; /* [N, E]: the loss's gradient by c; optional */
  loopfast_output grad_uncond; /* [N, E]: by u; optional */
  float *grad_scale;           /* [N]; needed where a gradient is float16: row n then holds its gradient divided by
                                  grad_scale[n], a power of two that keeps the values near 1 */
} loopfast_loss_results;

LOOPFAST_API int loopfast_loss(const loopfast_transition *transition, const loopfast_loss_arguments *arguments,
                               const loopfast_loss_results *results);

/* Multiplies gradients [N, E] in place by `scale` and, where it is not NULL, by grad_scale[n]. Nothing is touched
 * where both are 1. Either gradient is optional. */
LOOPFAST_API int loopfast_scale_gradients(int64_t rows, int64_t elements, loopfast_output grad_output,
                                          loopfast_output grad_uncond, const float *grad_scale, float scale,
                                          int32_t threads);

/* rewards [G, K] to advantages [G, K]: each less the mean of its group's others. K at least 2. */
LOOPFAST_API int loopfast_leave_one_out(const float *rewards, int64_t groups, int64_t samples, float *advantage);

/* Group normalization and SiLU, y = silu(w (u - mean) / sqrt(variance + eps) + b) with u = x + shift: mean and variance
 * are those of a row's group of C / G channels. */
typedef struct {
  int64_t rows;          /* N, at least 1 */
  int64_t channels;      /* C, at least 1 */
  int64_t pixels;        /* H W, at least 1 */
  int64_t groups;        /* G, divides C */
  int32_t channels_last; /* 0: x, y and their gradients are [N, C, H W]; else they are [N, H W, C] */
  float eps;             /* positive */
  loopfast_input x;
  loopfast_input weight; /* w, [C] */
  loopfast_input bias;   /* b, [C] */
  loopfast_input shift;  /* [N, C]; optional */
  int32_t threads;
} loopfast_norm;

/* y like x, and statistics [N, G, 3]: the mean in two parts and 1 / sqrt(variance + eps). */
LOOPFAST_API int loopfast_group_norm_silu(const loopfast_norm *norm, loopfast_output y, float *statistics);

/* Its gradients, each of the size of the argument it is the gradient by, and each optional. grad_y has the layout of x.
 * Those by weight and bias are summed over the rows in their order. */
LOOPFAST_API int loopfast_group_norm_silu_backward(const loopfast_norm *norm, const float *statistics,
                                                   loopfast_input grad_y, loopfast_output grad_x,
                                                   loopfast_output grad_weight, loopfast_output grad_bias,
                                                   loopfast_output grad_shift);

/* Standard normal noise [N, E], a pure function of seed [N], step [N] and the element. */
LOOPFAST_API int loopfast_philox_normal(int64_t rows, int64_t elements, const int64_t *seed, const int64_t *step,
                                        float *noise, int32_t threads);

/* The generator behind it, Philox4x32-10 (Salmon et al., SC 2011). */
LOOPFAST_API void loopfast_philox_4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);

#ifdef __cplusplus
}
#endif

#endif
