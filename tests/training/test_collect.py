from __future__ import annotations

import signal
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import World
from loopfast.errors import RewardError
from loopfast.rewards import RewardMemoryError
from loopfast.training.batch import draw_batch
from loopfast.training.collect import collect
from loopfast.training.run import Stopped
from loopfast.training.state import Rollout
from tests.training.toys import MakeToy, Toy, bad_reward, memory_for

WORKERS = ["none", "inline", "thread"]


def rollout(toy: Toy) -> Rollout:
    toy.sampled()
    assert toy.state.rollout is not None
    return toy.state.rollout


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_rollout_depends_neither_on_the_size_of_calls_nor_on_who_scores(
    rows: int, worker: str, make_toy: MakeToy
) -> None:
    expected = rollout(plain := make_toy())
    found = rollout(toy := make_toy(f"rollout.microbatch={rows}", f"rollout.reward_worker={worker}"))
    assert toy.policy.batches == [rows] * 3 * -(-6 // rows)
    assert torch.equal(found.trajectories.latents, expected.trajectories.latents)
    assert torch.equal(found.trajectories.logprob, expected.trajectories.logprob)
    assert torch.equal(found.rewards, expected.rewards)
    assert toy.state.metrics == plain.state.metrics


def test_images_are_counted_and_their_rewards_summed_up(make_toy: MakeToy) -> None:
    toy = make_toy()
    found = rollout(toy)
    pixels = toy.policy.decode(found.trajectories.final)[:, 0, 0, 0].view(3, 2)
    assert torch.equal(found.rewards, pixels)
    assert len(pixels.unique()) == 6
    assert toy.state.images == 6
    assert toy.state.metrics["reward_mean"] == pytest.approx(pixels.mean().item())
    rollout(toy)
    assert toy.state.images == 12


def test_the_time_of_scoring_is_not_that_of_sampling(make_toy: MakeToy) -> None:
    toy = make_toy("rollout.microbatch=3")
    rollout(toy)
    times = toy.run.meter.stop()
    assert toy.heard.phases == ["rollout", "reward", "reward"]
    assert sorted(times.phases) == ["reward", "rollout"]
    assert times.calls == {"denoiser": 6, "decoder": 2, "reward": 2}


def test_outside_of_the_window_steps_draw_no_noise(make_toy: MakeToy) -> None:
    toy = make_toy("rollout.stochastic_steps=window:1", "train.updates_per_iteration=1")
    windows = set()
    for toy.state.iteration in range(8):
        latents = rollout(toy).trajectories.latents
        text = draw_batch(toy.run, toy.state.iteration).conditioning["text"].repeat_interleave(2)
        schedule, [window] = toy.run.steps.for_iteration(0, toy.state.iteration)
        windows.add(window)
        for step, (a, b, _) in enumerate(schedule.table.tolist()):
            output, _ = toy.policy.predict(latents[step], schedule.timesteps[step].expand(6), {"text": text})
            noise = latents[step + 1] - a * latents[step] - b * output.detach()
            assert (noise.abs().max() > 0.1) == (step == window)
    assert len(windows) > 1


def test_prompts_without_a_score_are_left_out_and_their_images_counted(make_toy: MakeToy) -> None:
    drop = ("rollout.prompts_per_iteration=4", "rollout.on_bad_reward=drop_group")
    whole, toy = rollout(make_toy(drop[0])), make_toy(*drop, bad_reward("star"))
    found = rollout(toy)
    star = [prompt.text for prompt in draw_batch(toy.run, 0).prompts].index("a blue star")
    kept = [index for index in range(4) if index != star]
    assert found.kept.nonzero()[:, 0].tolist() == kept
    assert torch.equal(found.rewards[kept], whole.rewards[kept])
    assert toy.state.images == 8
    assert toy.state.metrics["dropped_groups"] == 1
    assert toy.state.metrics["reward_mean"] == pytest.approx(whole.rewards[kept].mean().item())
    [warning] = toy.heard.warnings
    assert warning.startswith("iteration 1: 1 of 4 prompt(s) are left out, 'a blue star': reward 'pixel'")


def stand(toy: Toy) -> dict[str, Any]:
    """Where a run stands, with nothing that may change later."""
    state = deepcopy(replace(toy.state, statistics=None, times=None))  # type: ignore[arg-type]
    return vars(state) | {"history": deepcopy(toy.state.statistics.state_dict())}


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("nan", RewardError, "iteration 1: reward 'pixel' is not finite for "),
        ("raises", RewardError, "iteration 1: reward 'pixel' raised ZeroDivisionError: no luck"),
        ("memory", RewardMemoryError, "iteration 1: reward 'pixel' ran out of memory"),
    ],
)
def test_a_reward_that_fails_leaves_the_state_as_it_was(
    how: str, kind: type[Exception], said: str, worker: str, make_toy: MakeToy
) -> None:
    toy = make_toy("rollout.microbatch=2", f"rollout.reward_worker={worker}", bad_reward("a ", how))
    toy.state.pending = None
    before = stand(toy)
    with pytest.raises(kind) as caught:
        toy.sampled()
    message, folder = str(caught.value), toy.run.folder.path / "failures" / "iteration-000001"
    assert message.startswith(said)
    assert message.endswith(f"; images and prompts are in {folder}") == (how != "memory")
    # those of the call that failed
    assert len(list(folder.glob("*.png"))) == (0 if how == "memory" else 6 if worker == "none" else 2)
    assert stand(toy) == before
    # a smaller call would not help the reward
    assert toy.run.microbatches.rollout == 2


def test_a_reward_that_fails_is_told_although_its_images_cannot_be_kept(make_toy: MakeToy) -> None:
    toy = make_toy(bad_reward("a ", "raises"))
    (toy.run.folder.path / "failures").write_text("in the way")
    with pytest.raises(RewardError, match=r"no luck.*; the images could not be kept: cannot write in "):
        toy.sampled()


@pytest.mark.parametrize("worker", WORKERS)
def test_a_signal_stops_between_two_calls_and_leaves_the_state_as_it_was(
    worker: str, make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy("rollout.microbatch=2", f"rollout.reward_worker={worker}")
    toy.state.pending = None
    before, batch, predict = stand(toy), draw_batch(toy.run, 0), toy.policy.predict

    def signalled(*args: Any) -> Any:
        if len(toy.policy.batches) == 4:  # in the second call of three steps
            signal.raise_signal(signal.SIGTERM)
        return predict(*args)

    monkeypatch.setattr(toy.policy, "predict", signalled)
    with pytest.raises(Stopped):
        collect(toy.run, toy.state, batch)
    assert toy.policy.batches == [2] * 6
    assert stand(toy) == before


def test_calls_that_do_not_fit_are_halved(make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, toy = rollout(make_toy()), make_toy()
    memory_for(toy, 2, monkeypatch, training=False)
    found = rollout(toy)
    assert (toy.run.microbatches.rollout, toy.run.sampler.microbatch, toy.state.images) == (1, 1, 6)
    assert len(toy.heard.warnings) == 2
    assert torch.equal(found.trajectories.latents, expected.trajectories.latents)
    assert torch.equal(found.rewards, expected.rewards)


@pytest.mark.parametrize(("count", "rows", "calls"), [(7, 2, 2), (6, 2, 1), (7, 3, 1), (2, 5, 1)])
def test_all_processes_make_as_many_calls(count: int, rows: int, calls: int) -> None:
    found = {World(LaunchEnvironment(rank=rank, size=3)).calls(count, rows) for rank in range(3)}
    assert found == {calls}
