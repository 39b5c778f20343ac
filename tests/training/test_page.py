"""LOOP's one page: iterations, updates, and what ends an iteration."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopfast.algorithms import ALGORITHMS
from loopfast.errors import ConfigError, Interrupted, LoopfastError, NonFiniteError
from loopfast.run.tracking import read_metrics
from loopfast.training.batch import Batch
from loopfast.training.loss import PolicyLoss, compare
from loopfast.training.run import Stopped
from loopfast.training.saving import restored, save
from loopfast.training.train import (
    PADDING,
    SCREENING_SHARE,
    Resized,
    export,
    finish_iteration,
    finished,
    iterate,
    learn,
    train,
    update_with_fallback,
)
from loopfast.training.update import UpdateStatistics
from loopfast.training.update_pass import UpdatePass
from tests.outcomes import MEASURED
from tests.training.toys import Heard, MakeToy, Toy, bad_reward, memory_for, same, toy_config, toy_model


def calls(toy: Toy) -> list[tuple[int, str]]:
    """The rows of the model calls so far, and what they were for."""
    return [(len(output), "trains" if output.requires_grad else "asks") for output in toy.policy.outputs]


def counted(metrics: dict[str, Any] | None) -> dict[str, Any]:
    """An iteration's metrics but for times and what depends on them."""
    assert metrics is not None
    return {name: value for name, value in metrics.items() if name not in MEASURED}


def test_an_iteration_samples_scores_and_learns(make_toy: MakeToy) -> None:
    toy = make_toy()
    before = toy.weights
    iterate(toy.run, toy.state)
    assert (toy.state.iteration, toy.state.images, toy.state.rollout) == (1, 6, None)
    assert toy.heard.phases == ["rollout", "reward", "replay", "replay", "replay"]
    # 6 images in 3 steps, and 3 updates of 6 of their pairs
    assert calls(toy) == [(6, "asks")] * 3 + [(6, "trains")] * 3
    metrics = toy.state.pending
    assert metrics is not None
    assert (metrics["iteration"], metrics["images"], metrics["model_calls"]) == (1, 6, 6)
    assert metrics["ratio_max_deviation"] == 0.0 < metrics["kl"]
    assert all(not torch.equal(weight, before[name]) for name, weight in toy.weights.items())
    assert not toy.run.meter.running


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns(name: str, make_toy: MakeToy) -> None:
    toy = make_toy(f"algorithm.name={name}")
    before = toy.weights
    iterate(toy.run, toy.state)
    metrics = counted(toy.state.pending)
    assert metrics["grad_norm"] > 0
    assert (metrics["ratio_outside_clip"] > 0) == (ALGORITHMS[name].clip_range is not None)
    for weight, other in zip(toy.weights.values(), before.values(), strict=True):
        assert weight.isfinite().all()
        assert not torch.equal(weight, other)


def test_images_are_used_for_several_epochs(make_toy: MakeToy) -> None:
    options = ("train.inner_epochs=2", "train.updates_per_iteration=2", "train.lr_schedule=linear")
    toy = make_toy("train.iterations=1", "train.screening=off", *options)
    iterate(toy.run, toy.state)
    # four updates of 9 pairs; the last one has a quarter of the rate left
    assert calls(toy) == [(6, "asks")] * 3 + [(6, "trains")] * 4 * 2
    assert counted(toy.state.pending)["learning_rate"] == pytest.approx(0.1 / 4)
    assert toy.state.images == 6


def test_encoding_is_a_part_of_the_iterations_time(
    make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, running = make_toy(), list[bool]()
    encode = toy.policy.encode

    def noted(prompts: list[str]) -> dict[str, Tensor]:
        running.append(toy.run.meter.running)
        return encode(prompts)

    monkeypatch.setattr(toy.policy, "encode", noted)
    iterate(toy.run, toy.state)
    assert running == [True]


def test_a_gradient_that_overflows_is_said_and_counted(make_toy: MakeToy) -> None:
    large = ("reward.0.weight=1e4", "algorithm.advantage={normalize: none, clip: null}")
    toy = make_toy("model.dtype=float16", "train.on_policy_check=off", *large)
    toy.state.pending = None
    iterate(toy.run, toy.state)
    [warning] = toy.heard.warnings
    assert warning.startswith("iteration 1: the gradient overflowed float16")
    assert toy.state.pending is not None
    assert toy.state.pending["overflows"] > 0


# Of each way to train, one that goes through a checkpoint in its own way.
WAYS = [
    (),
    ("algorithm.name=ppo", "train.inner_epochs=2", "train.lr_schedule=cosine"),
    ("algorithm.kl_weight=0.1", "rollout.guidance_scale=2.0", "train.ema_decay=0.9"),
    (
        "train.screening=on",
        "algorithm.clip_range=0.01",
        "rollout.stochastic_steps=window:2",
        "train.step_fraction=0.5",
    ),
    (bad_reward("star"), "rollout.on_bad_reward=drop_group", "rollout.prompts_per_iteration=4"),
    ("rollout.dtype=bfloat16", "train.on_policy_check=off", "rollout.microbatch=4", "train.microbatch=5"),
]


@pytest.mark.parametrize(("updates", "overrides"), [*zip([1, 2] * 3, WAYS, strict=True)])
def test_an_iteration_that_is_stopped_between_updates_goes_on_as_if_it_were_not(
    updates: int, overrides: tuple[str, ...], make_toy: MakeToy
) -> None:
    unbroken = make_toy(*overrides)
    for _ in range(2):
        iterate(unbroken.run, unbroken.state)
    toy = make_toy(*overrides)
    iterate(toy.run, toy.state)
    toy.stopped(updates)
    saved = toy.run.folder.checkpoints.load(save(toy.run, toy.state))
    assert saved.path.name == f"iteration-000001-update-{updates}"
    other = make_toy(*overrides)
    other.state = restored(other.run, saved)
    iterate(other.run, other.state)
    assert same(other.weights, unbroken.weights)
    (tensors, engine), (expected, other_engine) = (each.run.engine.state() for each in (other, unbroken))
    assert engine == other_engine
    assert all(same(tensors[group], named) for group, named in expected.items())
    assert counted(other.state.pending) == counted(unbroken.state.pending)
    assert other.state.statistics.state_dict() == unbroken.state.statistics.state_dict()
    assert other.state.zero_gradient == unbroken.state.zero_gradient
    # it is sampled once
    assert "rollout" not in other.heard.phases


@pytest.mark.parametrize(
    ("training", "tried"),
    [
        # each size is tried by a training call, and the next is sampled in
        (True, [*[(6, "asks")] * 3, (6, "trains"), *[(3, "asks")] * 6, (3, "trains"), *[(1, "asks")] * 18]),
        (False, [(6, "asks"), (3, "asks"), *[(1, "asks")] * 18]),
    ],
)
def test_images_are_sampled_in_calls_of_the_size_they_are_trained_in(
    training: bool, tried: list[tuple[int, str]], make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy()
    memory_for(toy, 1, monkeypatch, training=training)
    iterate(toy.run, toy.state)
    assert calls(toy)[: len(tried)] == tried
    assert {*calls(toy)[len(tried) :]} == {(1, "trains")}
    assert toy.state.images == 6
    key = "train" if training else "rollout"
    assert [warning.split(" rows")[0] for warning in toy.heard.warnings] == [
        f"{key}.microbatch: 6",
        f"{key}.microbatch: 3",
    ]
    given = make_toy("rollout.microbatch=1", "train.microbatch=1")
    iterate(given.run, given.state)
    assert same(toy.weights, given.weights)
    assert counted(toy.state.pending) == counted(given.state.pending)


def test_a_later_update_that_does_not_fit_is_made_again_in_smaller_calls(
    make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy()
    memory_for(toy, 4, monkeypatch, after=1)
    iterate(toy.run, toy.state)
    assert calls(toy) == [(6, "asks")] * 3 + [(6, "trains")] * 2 + [(3, "trains")] * 4
    assert toy.state.images == 6
    assert [warning.split(" rows")[0] for warning in toy.heard.warnings] == ["train.microbatch: 6"]
    # its updates are the same up to the rounding of a sum
    whole = make_toy()
    iterate(whole.run, whole.state)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(toy.weights[name], weight, rtol=1e-4, atol=1e-4)
    found, expected = counted(toy.state.pending), counted(whole.state.pending)
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected.items()}


def test_screening_changes_nothing_but_the_work(make_toy: MakeToy) -> None:
    options = ("algorithm.clip_range=0.01", "train.inner_epochs=2")
    toy, whole = (make_toy(*options, f"train.screening={switch}") for switch in ("on", "off"))
    for each in (toy, whole):
        iterate(each.run, each.state)
    found, expected = counted(toy.state.pending), counted(whole.state.pending)
    assert (found.pop("screened_out"), expected.pop("screened_out")) == (found["zero_gradient"], 0.0)
    assert found["zero_gradient"] > 0.1
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected.items()}
    for name, weight in whole.weights.items():
        torch.testing.assert_close(toy.weights[name], weight, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(
    make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, before = make_toy(), dict[str, Tensor]()
    batch, predict = toy.sampled(), toy.policy.predict

    def spoilt(*args: Any) -> tuple[Tensor, None]:
        output, _ = predict(*args)
        if toy.state.updates:
            before.update(toy.weights)
            output = torch.cat([output[:1] * torch.nan, output[1:]])
        return output, None

    monkeypatch.setattr(toy.policy, "predict", spoilt)
    with pytest.raises(
        NonFiniteError, match="iteration 1: the loss is not finite; images and prompts are in"
    ):
        learn(toy.run, toy.state, batch)
    assert len(toy.state.updates) == 1
    assert same(toy.weights, before)


def test_a_stop_leaves_the_updates_that_are_made(make_toy: MakeToy) -> None:
    toy = make_toy("algorithm.name=ppo")
    toy.stopped(2)
    assert (toy.state.iteration, len(toy.state.updates)) == (0, 2)
    assert toy.state.rollout is not None
    assert len(calls(toy)) == 3 + 2
    # the history has the rewards of complete iterations, each once
    assert toy.state.statistics.state_dict() == {}


def test_an_iterations_rewards_join_the_history_once(make_toy: MakeToy) -> None:
    toy = make_toy("algorithm.name=ppo", "train.inner_epochs=2")
    batch = toy.sampled()
    assert toy.state.rollout is not None
    rewards = toy.state.rollout.rewards.tolist()
    learn(toy.run, toy.state, batch)
    assert toy.state.statistics.state_dict() == dict(zip(batch.texts, rewards, strict=True))


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_share_without_a_gradient_is_that_of_the_last_update_but_a_first(
    updates: int, make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # prompts whose images are all as good, three of four here, give their pairs no gradient in a first update, either
    flat = ("rollout.prompts_per_iteration=4", bad_reward("l", "flat"))
    toy = make_toy(*flat, f"train.updates_per_iteration={updates}", "algorithm.clip_range=0.01")
    shares = list[float]()
    original = update_with_fallback

    def noted(*args: Any) -> UpdateStatistics:
        done = original(*args)
        shares.append(done.zero_gradient)
        return done

    monkeypatch.setattr("loopfast.training.train.update_with_fallback", noted)
    iterate(toy.run, toy.state)
    assert len(shares) == updates
    assert min(shares) > 0
    assert len(set(shares)) == updates
    assert toy.state.zero_gradient == (shares[-1] if updates > 1 else 0.0)


def update_pass(toy: Toy, batch: Batch) -> UpdatePass:
    """Of what was sampled, with the advantages that an update is given."""
    algorithm, rollout = toy.run.config.algorithm, toy.state.rollout
    assert rollout is not None
    compared = compare(
        algorithm, rollout.rewards, rollout.kept, batch.texts, toy.state.statistics, toy.policy.device
    )
    return UpdatePass(
        toy.run.sampler,
        PolicyLoss(algorithm, compared),
        rollout.trajectories,
        batch.conditioning,
        batch.prompt_index,
    )


def updated(toy: Toy, *, first: bool) -> UpdateStatistics:
    """An update on all pairs of new images; its model calls alone are kept."""
    given, images = update_pass(toy, toy.sampled()), toy.run.config.images_per_iteration
    toy.policy.forget()
    toy.state.updates = [] if first else [{"loss": 0.0}]
    pairs = torch.arange(images).repeat(3), torch.arange(3).repeat_interleave(images)
    return update_with_fallback(toy.run, toy.state, given, pairs)


@pytest.mark.parametrize(
    ("screening", "share", "first", "screened"),
    [
        ("on", 0.0, False, True),
        ("on", 0.9, True, False),
        ("auto", SCREENING_SHARE + 0.01, False, True),
        ("auto", SCREENING_SHARE, False, False),
        ("auto", 0.9, True, False),
        ("off", 0.9, False, False),
    ],
)
def test_pairs_without_a_gradient_are_found_first_where_that_is_asked_for(
    screening: str, share: float, first: bool, screened: bool, make_toy: MakeToy
) -> None:
    toy = make_toy(f"train.screening={screening}")
    toy.state.zero_gradient = share
    done = updated(toy, first=first)
    assert calls(toy) == [(6, "asks")] * 3 * screened + [(6, "trains")] * 3
    # nothing is clipped yet: all pairs are trained on
    assert done.screened_out == done.zero_gradient == 0.0


def test_pairs_that_are_found_to_have_none_are_not_trained_on(make_toy: MakeToy) -> None:
    # the images of three prompts are all as good as those they are compared with
    toy = make_toy("train.screening=on", "rollout.prompts_per_iteration=4", bad_reward("l", "flat"))
    done = updated(toy, first=False)
    assert done.screened_out == done.zero_gradient == 0.75
    assert calls(toy) == [(8, "asks")] * 3 + [(8, "trains")]


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        (("rollout.microbatch=9", "train.microbatch=2"), 9),
        (("rollout.microbatch=2", "train.microbatch=6"), 6),
        # the rollout's size is known to fit where the copy is
        (("rollout.microbatch=9", "train.microbatch=2", "rollout.replica=resident"), 2),
    ],
)
def test_a_screening_call_takes_the_most_rows_that_are_known_to_fit(
    sizes: tuple[str, ...], rows: int, make_toy: MakeToy
) -> None:
    toy = make_toy("train.screening=on", *sizes)
    updated(toy, first=False)
    assert [found for found in calls(toy) if found[1] == "asks"] == [(rows, "asks")] * (18 // rows)


def test_a_screening_call_that_does_not_fit_is_halved(
    make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, given = make_toy("train.screening=on"), ("rollout.microbatch=9", "train.microbatch=2")
    # the first three calls sample
    memory_for(toy, 3, monkeypatch, after=3, training=False)
    updated(toy, first=False)
    assert calls(toy) == [(6, "asks")] + [(3, "asks")] * 6 + [(3, "trains")] * 6
    fixed = make_toy("train.screening=on", *given)
    memory_for(fixed, 3, monkeypatch, after=3, training=False)
    with pytest.raises(ConfigError, match=r"rollout\.microbatch: 9 row\(s\) per model call do not fit"):
        updated(fixed, first=False)


@pytest.mark.parametrize(
    ("override", "first", "rows"),
    [
        ("train.iterations=1", True, [17, 17]),
        ("train.iterations=1", False, [17, PADDING]),
        ("model.compile=blocks", False, [17, 17]),
    ],
)
def test_only_calls_that_need_not_be_the_rollouts_are_filled_up_less(
    override: str, first: bool, rows: list[int], make_toy: MakeToy
) -> None:
    toy = make_toy("rollout.microbatch=17", "train.microbatch=17", override)
    updated(toy, first=first)
    assert [found for found, _ in calls(toy)] == rows


@pytest.mark.parametrize(
    ("sizes", "first", "resized"),
    [
        ((), True, True),
        ((), False, False),
        (("rollout.microbatch=6",), True, False),
    ],
)
def test_images_are_given_up_where_the_ratio_would_not_be_one(
    sizes: tuple[str, ...],
    first: bool,
    resized: bool,
    make_toy: MakeToy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = make_toy(*sizes)
    memory_for(toy, 3, monkeypatch)
    before = toy.weights
    if resized:
        with pytest.raises(Resized):
            updated(toy, first=first)
        assert same(toy.weights, before)
    else:
        updated(toy, first=first)
        assert not same(toy.weights, before)
    assert toy.run.microbatches.train == 3


def test_a_policy_that_is_not_the_one_that_sampled_is_not_updated(make_toy: MakeToy) -> None:
    toy = make_toy()
    batch = toy.sampled()
    with torch.no_grad():
        toy.policy.weight += 0.1
    before = toy.weights
    with pytest.raises(LoopfastError, match="iteration 1: before the first update the ratio differs from 1"):
        learn(toy.run, toy.state, batch)
    assert same(toy.weights, before)
    assert toy.state.updates == []


@pytest.mark.parametrize(
    ("iteration", "due", "evaluated", "saved"),
    [
        (0, "evaluation.every=2", True, False),
        (0, "checkpoint.every=2", True, False),
        (1, "evaluation.every=2", False, False),
        (2, "evaluation.every=2", True, False),
        (3, "checkpoint.every=2", False, False),
        (4, "checkpoint.every=2", False, True),
        (5, "evaluation.every=0", True, True),
    ],
)
def test_an_iteration_is_evaluated_recorded_and_saved_where_it_is_due(
    iteration: int, due: str, evaluated: bool, saved: bool, make_toy: MakeToy
) -> None:
    toy = make_toy(
        "train.iterations=5", "evaluation.every=0", "evaluation.preview_images=1", "checkpoint.every=20", due
    )
    folder, given = toy.run.folder, {"iteration": iteration, "images": 6 * iteration}
    toy.state.iteration, toy.state.pending = iteration, {**given}
    finish_iteration(toy.run, toy.state)
    [line] = read_metrics(folder.path / "metrics.jsonl")
    assert given.items() <= line.items()
    assert line["seconds"] > 0 < line["peak_memory_bytes"]
    assert ("eval_reward" in line, "eval_pixel" in line, "seconds_eval" in line) == (evaluated,) * 3
    assert "eval_dropped_images" not in line
    assert [path.stem for path in (folder.path / "images").glob("*")] == [
        f"iteration-{iteration:06d}"
    ] * evaluated
    assert [path.name for path in folder.checkpoints.paths()] == [f"iteration-{iteration:06d}"] * saved
    # of the last, the best has the evaluation's reward
    assert (folder.checkpoints.best() is not None) == (evaluated and saved)
    assert toy.heard.phases == ["evaluation"] * evaluated + ["checkpoint"] * saved
    assert toy.heard.text.getvalue().startswith(f"iteration {iteration}/")
    assert toy.state.pending is None
    # the next line has the time, as this one is written
    assert list(toy.state.metrics) == ["seconds_checkpoint"] * saved
    assert finished(toy.run, toy.state) == (iteration == 5)


def test_images_without_a_score_are_counted_where_they_are_left_out(make_toy: MakeToy) -> None:
    toy = make_toy("rollout.on_bad_reward=drop_group", bad_reward("star"))
    finish_iteration(toy.run, toy.state)
    [line] = read_metrics(toy.run.folder.path / "metrics.jsonl")
    assert line["eval_dropped_images"] == 1


def test_an_evaluation_takes_as_many_rows_as_fit(make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy()
    memory_for(toy, 2, monkeypatch, training=False)
    finish_iteration(toy.run, toy.state)
    assert toy.policy.batches == [6, 3, *[1] * 6]
    assert toy.run.microbatches.rollout == 1


@pytest.mark.parametrize(("every", "pending", "lines"), [(1, True, 0), (0, False, 1)])
def test_a_stop_comes_before_an_evaluation_or_after_the_record(
    every: int, pending: bool, lines: int, make_toy: MakeToy
) -> None:
    toy = make_toy(f"evaluation.every={every}")
    iterate(toy.run, toy.state)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped):
        finish_iteration(toy.run, toy.state)
    assert (toy.state.pending is not None) == pending
    assert len(read_metrics(toy.run.folder.path / "metrics.jsonl")) == lines


@pytest.mark.parametrize(
    ("overrides", "name"),
    [((), "model"), (("model.tune=lora",), "lora"), (("train.ema_decay=0.9",), "model")],
)
def test_what_was_trained_is_exported_with_a_report(
    overrides: tuple[str, ...], name: str, make_toy: MakeToy
) -> None:
    toy = make_toy("train.iterations=1", *overrides)
    for _ in range(2):
        finish_iteration(toy.run, toy.state)
        iterate(toy.run, toy.state)
    export(toy.run, toy.state)
    exported = load_file(toy.run.folder.path / name / "toy.safetensors")
    with toy.run.engine.ema_weights():
        assert same(exported, toy.weights)
    assert same(exported, toy.weights) == ("train.ema_decay=0.9" not in overrides)
    assert "<html" in (toy.run.folder.path / "report.html").read_text("utf-8")
    *_, model, report = toy.heard.text.getvalue().splitlines()
    assert model.endswith(str(toy.run.folder.path / name))
    assert report.endswith(str(toy.run.folder.path / "report.html"))


def test_a_run_is_its_iterations_and_what_comes_before_and_after(tmp_path: Path) -> None:
    heard, config = Heard(), toy_config(tmp_path, "train.updates_per_iteration=1")
    with toy_model():
        folder = train(config, display=heard)
    assert folder == tmp_path / "toy"
    iteration = ["rollout", "reward", "replay"]
    assert heard.phases == ["evaluation", *iteration, *iteration, "evaluation", "checkpoint"]
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert (folder / "model" / "toy.safetensors").is_file()
    assert heard.text.getvalue().startswith("loopfast train\n")


def test_a_run_that_a_signal_stops_goes_on_from_there(tmp_path: Path) -> None:
    config, folders = toy_config(tmp_path), []
    for name, stops in (("unbroken", []), ("stopped", [("replay", 2), ("rollout", 1), ("evaluation", 1)])):
        named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        with toy_model():
            resume = None
            for stop in stops:
                heard = Heard()
                heard.stop_at = stop
                with pytest.raises(Interrupted, match="is saved, --resume auto goes on from there"):
                    train(named, resume=resume, display=heard)
                resume = "auto"
            folders.append(train(named, resume=resume, display=Heard()))
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in folders)
    assert [counted(line) for line in lines] == [counted(line) for line in expected]
    first, second = (load_file(folder / "model" / "toy.safetensors") for folder in folders)
    assert same(first, second)


def test_a_finished_run_writes_what_is_missing_and_may_be_given_more_iterations(tmp_path: Path) -> None:
    one, two = (toy_config(tmp_path, f"train.iterations={iterations}") for iterations in (1, 2))
    straight = toy_config(tmp_path, "run.name=straight")
    with toy_model():
        folder = train(one, display=Heard())
        before = (folder / "metrics.jsonl").read_bytes()
        (folder / "report.html").unlink()
        assert train(one, resume="auto", display=Heard()) == folder
        assert (folder / "report.html").is_file()
        assert (folder / "metrics.jsonl").read_bytes() == before
        folders = train(two, resume="auto", display=Heard()), train(straight, display=Heard())
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert same(*(load_file(path / "model" / "toy.safetensors") for path in folders))
