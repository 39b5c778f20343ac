"""Trains the embedded model on a reward of your own, and stops when the reward is high enough."""

import loopfast


def redness(images, prompts, metadata):
    """Returns how much more red than green and blue each image has: images float [N, 3, H, W] in [0, 1]."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    return red - (green + blue) / 2


def on_iteration(iteration):
    best = iteration.images()[iteration.rewards.argmax()]
    print(
        f"iteration {iteration.number}: the reddest image has a mean color of {best.mean(dim=(1, 2)).tolist()}"
    )
    if iteration.metrics["reward_mean"] > 0.3:
        iteration.stop()


run = loopfast.train(
    "tiny",
    reward=redness,
    prompts=["a red circle", "a blue square and a red cross", "two green triangles"],
    run={"name": "own-reward"},
    rollout={"prompts_per_iteration": 6},
    train={"iterations": 5, "learning_rate": 3e-4},
    evaluation={"prompts": ["a red square", "a blue triangle"], "every": 0},
    callbacks=[on_iteration],
)
before, *_, after = run.metrics
print(f"redness of held-out prompts: {before['eval_reward']:.3f} before, {after['eval_reward']:.3f} after")
print(f"report: {run.report}")
image = run.pipeline()("a blue triangle", num_inference_steps=10).images[0]
image.save("own-reward.png")
