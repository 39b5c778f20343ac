"""TRL's trainer, patched and unpatched, with the same seeds.

TRL 0.23 needs older versions of its neighbors than loopfast's: it lives in an environment of its own, made with
``trl-constraints.txt``, that loopfast's wheel is installed in. LOOPFAST_TRL_PYTHON names its interpreter.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from loopfast.errors import LoopfastError
from loopfast.integrations import patch_trl

PROGRAM = Path(__file__).parent / "trl_epoch.py"
PYTHON = os.environ.get("LOOPFAST_TRL_PYTHON")
needs_trl = pytest.mark.skipif(
    PYTHON is None, reason="LOOPFAST_TRL_PYTHON names no interpreter that has TRL 0.23 and loopfast"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("trl")
    # The checkout must not stand in for the installed wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [str(PYTHON), str(PROGRAM), "result.pt"],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "result.pt")


@needs_trl
def test_the_fused_ops_run(runs):
    # Four sampling steps; two updates of four steps each.
    assert runs["unpatched"]["calls"] == {}
    assert {"transition_logprob": 4, "clipped_loss": 8}.items() <= runs["torch"]["calls"].items()
    assert {"denoise_step": 4, "clipped_loss": 8}.items() <= runs["philox"]["calls"].items()


@needs_trl
def test_a_loss_and_a_step_of_the_users_own_are_called(runs):
    for run in runs.values():
        assert run["overrides"] == ["loss", "scheduler_step"]


@needs_trl
def test_nothing_is_read_back_to_the_host(runs):
    for name, run in runs.items():
        expected = "Cannot copy out of meta tensor" if name.startswith("unpatched") else ""
        assert run["host_read"].split(";")[0] == expected


@needs_trl
def test_samples_are_the_same(runs):
    expected, found = (runs[name]["samples"] for name in ("unpatched", "torch"))
    # TRL goes by way of x_0, which rounding errors leave 1 / sqrt(alpha) larger: 4.2e-6 was measured.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_trl
def test_logprobs_are_the_same(runs):
    expected, found = (runs[name]["logprobs"] for name in ("unpatched", "torch"))
    torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=0, atol=1e-6)
    # In the last step TRL's 1 - alpha_t / alpha_{t-1} is a difference of float32 numbers that agree in three digits:
    # sigma is off by up to 3e-5 of itself, and so is its logarithm. The table is made in float64. 6.7e-6 was measured.
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=0, atol=3e-5)


@needs_trl
def test_losses_are_the_same(runs):
    expected, found = (runs[name]["minibatches"] for name in ("unpatched", "torch"))
    # The first update changes the policy, so that ratios are not 1 in the second.
    assert (expected[4:, 1] > 1e-6).all()
    # 5e-6 was measured, on a processor that rounds calls of 2 rows and of 4 rows differently.
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-5, atol=2e-5)
    # The square of a difference of log-probabilities.
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=5e-3, atol=1e-9)
    assert torch.equal(found[:, 2], expected[:, 2])
    assert 0 < expected[4:, 2].mean() < 1, "rows on both sides of the clip range"
    torch.testing.assert_close(runs["torch"]["unguided"], runs["unpatched"]["unguided"], rtol=1e-4, atol=0)


@needs_trl
def test_without_noise_there_is_no_loss(runs):
    for run in runs.values():
        assert run["deterministic"][0].isnan()


@needs_trl
def test_parameters_after_the_epoch_are_the_same(runs):
    expected, found = (runs[name]["updates"] for name in ("unpatched", "torch"))
    assert found.keys() == expected.keys()
    assert len(expected) == 208
    expected, found = (torch.cat([update.flatten() for update in run.values()]) for run in (expected, found))
    # 1.4e-5 was measured: the gradient by the model's output, rounded to float32, on its way through the network.
    assert (found - expected).norm() < 1e-4 * expected.norm()


@needs_trl
def test_an_unchanged_model_has_the_ratio_1_in_bfloat16(runs):
    # Before the first update. TRL scores samples before it rounds them, and then what it has stored.
    unpatched, patched = (runs[f"{name}, bfloat16"]["minibatches"][:4, 1] for name in ("unpatched", "torch"))
    assert (unpatched > 1e-8).all()
    assert (patched == 0).all()


@needs_trl
def test_philox_noise_trains_too(runs):
    run = runs["philox"]
    # TRL samples 4 rows in a call and trains on 2, which some processors round differently: 1.5e-14 was measured.
    assert (run["minibatches"][:4, 1] < 1e-12).all(), (
        "the policy that sampled must score what it sampled alike"
    )
    assert (run["minibatches"][:4, 2] == 0).all()
    assert run["minibatches"].isfinite().all()
    # The log-probability of a Gaussian's own samples: -1/2 - log sigma - 1/2 log 2 pi, give or take its spread.
    assert (run["logprobs"] - runs["unpatched"]["logprobs"]).abs().max() < 0.5
    size = {name: sum(update.square().sum() for update in runs[name]["updates"].values()) for name in runs}
    assert 0.5 < size["philox"] / size["unpatched"] < 2


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is there")
def test_without_trl_the_error_says_what_is_missing():
    with pytest.raises(LoopfastError, match=r"patch_trl\(\) needs TRL 0\.23, the last with DDPOTrainer"):
        patch_trl()
