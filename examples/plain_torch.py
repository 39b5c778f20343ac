"""The ops in a training loop of plain torch, without trainer and diffusers: a toy denoiser learns to make bright
latents.
"""

import torch

from loopfast_kernels import denoise_step, loop_loss

PROMPTS, SAMPLES, STEPS, SHAPE = 8, 4, 5, (4, 8, 8)
ROWS = PROMPTS * SAMPLES
torch.manual_seed(0)

# x_{t-1} ~ N(a x_t + b m_t, σ² I): a row (a, b, σ) for each of the T steps. The table of a diffusers scheduler:
# loopfast.schedules.transition_schedule
table = torch.tensor([[1.0, -0.3, 0.5]] * STEPS)
denoiser = torch.nn.Conv2d(4, 4, 3, padding=1)
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
trajectory = torch.arange(ROWS)


def reward(latents):
    return latents.mean(dim=(1, 2, 3)).view(PROMPTS, SAMPLES)


for iteration in range(20):
    # 1. sample K trajectories for each prompt, and keep every latent with its log-probability
    latents, logprobs = [torch.randn(ROWS, *SHAPE)], []
    seeds = torch.randint(2**62, (ROWS,))
    with torch.no_grad():
        for t in range(STEPS):
            step = torch.full((ROWS,), t)
            prev_sample, logprob = denoise_step(denoiser(latents[-1]), latents[-1], table, step, seeds)
            latents.append(prev_sample)
            logprobs.append(logprob)
    # 2. score the results
    rewards = reward(latents[-1])
    if iteration % 5 == 0 or iteration == 19:
        print(f"iteration {iteration}: reward {rewards.mean():.3f}")
    # 3. and 4. the leave-one-out advantage, the ratio and the clip are in the op, and so is its gradient
    for t in torch.randperm(STEPS).tolist():
        loss = loop_loss(
            denoiser(latents[t]),
            latents[t],
            latents[t + 1],
            table,
            torch.full((ROWS,), t),
            logprobs[t],
            rewards,
            trajectory,
            clip_range=0.2,
            advantage_scale=float(1 / rewards.std()),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
