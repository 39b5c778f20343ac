"""The benchmarks measure what they say, and compare functions that compute the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, keep
from benchmarks.cases import OPS, SHAPES, Case, Inputs, grid, make_inputs
from benchmarks.competitors import MissingCompetitorError, eager, runner
from benchmarks.counting import kernel_launches, peak_extra_bytes
from benchmarks.keep import device_slug, load
from benchmarks.plain_process import seconds_elsewhere
from benchmarks.sharding import __main__ as sharding
from benchmarks.timing import MIN_ROUNDS, Playback, durations, host_seconds, rotating
from loopfast.config import parse_config
from loopfast.policies import load_policy
from loopfast_kernels import backend, info, philox_normal
from tests.forks import printed

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

native = pytest.mark.skipif(info()["cpu"] != "native", reason="the native library is not there")


def small_inputs(op: str) -> Inputs:
    inputs = make_inputs(
        (4, 8, 8), 8, torch.float32, CPU, requires_grad=OPS[op].backward, guided=OPS[op].guided
    )
    # Ratios around 1, some of them clipped.
    return replace(inputs, old_logprob=inputs.old_logprob + torch.linspace(-0.4, 0.4, 8))


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < 3e-5


@pytest.mark.parametrize("competitor", ["eager", "trl"])
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("denoise", "philox"))])
def test_competitors_compute_the_same(op: str, competitor: str) -> None:
    try:
        theirs = runner(op, competitor)
    except MissingCompetitorError as error:
        pytest.skip(str(error))
    inputs = small_inputs(op)
    results = runner(op, "ours")(inputs)
    assert len(results) == (1 + 1 + OPS[op].guided if OPS[op].backward else 1)
    assert_same(results, theirs(inputs))


@pytest.mark.parametrize("op", ["denoise_step", "denoise_step_guided"])
def test_samplers_compute_the_same_from_the_same_noise(op: str) -> None:
    inputs = small_inputs(op)
    noise = philox_normal(inputs.seed, inputs.step, inputs.sample.shape)
    expected = eager.denoise_step(*OPS[op].arguments(inputs), noise=noise)
    assert_same(runner(op, "ours")(inputs), expected)


def test_trl_samples_from_the_same_distribution() -> None:
    try:
        theirs = runner("denoise_step", "trl")
    except MissingCompetitorError as error:
        pytest.skip(str(error))
    inputs = small_inputs("denoise_step")
    torch.manual_seed(0)
    expected = runner("denoise_step", "eager")(inputs)
    torch.manual_seed(0)
    assert_same(theirs(inputs), expected)


def test_inputs_are_those_of_a_first_pass() -> None:
    """Nobody's rows are clipped, so that everybody does all the work."""
    inputs = make_inputs((4, 8, 8), 8, torch.bfloat16, CPU, requires_grad=False)
    (logprob,) = runner("transition_logprob", "ours")(inputs)
    torch.testing.assert_close(logprob, inputs.old_logprob, rtol=1e-5, atol=1e-5)


def test_the_grid_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPFAST_BENCH_DEVICE", "cuda")
    cases = grid("loop_loss", cpu=())
    assert {case.shape for case in cases} == {"SD", "SDXL", "SD3"}
    assert {case.rows for case in cases} == {1, 4, 16, 64, 256}
    assert len({str(case) for case in cases}) == len(cases) == 3 * 5 * 2 * 4


def allocate(*sizes: int) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def test_peak_memory_of_known_allocations() -> None:
    assert peak_extra_bytes(lambda: None, CPU) == 0
    assert peak_extra_bytes(lambda: allocate(1000, 2000), CPU) == 3000

    def temporary() -> list[torch.Tensor]:
        allocate(5000)
        return allocate(1000, 2000)

    assert peak_extra_bytes(temporary, CPU) == 5000
    held = allocate(7000)
    assert peak_extra_bytes(lambda: (held.clear(), allocate(1000)), CPU) == 1000


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_takes_its_gradients_and_little_more(dtype: torch.dtype) -> None:
    rows = 16
    inputs = make_inputs(SHAPES["SD"], rows, dtype, CPU, requires_grad=True)
    run = runner("loop_loss", "ours")
    with backend("native"):
        _, *gradients = run(inputs)
        extra = peak_extra_bytes(lambda: run(inputs), CPU)
    returned = sum(gradient.nbytes for gradient in gradients)
    assert returned <= extra <= returned + 64 * rows


RESIDENT = """
import os, sys
from pathlib import Path

import torch

from benchmarks.cases import SHAPES, make_inputs
from benchmarks.competitors import runner
from loopfast_kernels import buffers

def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name + ":")[2].split()[0])

inputs = make_inputs(SHAPES["SD"], 64, torch.float32, torch.device("cpu"), requires_grad=True)
for competitor in ("ours", "eager"):
    if (child := os.fork()) == 0:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
run = runner("loop_loss", competitor)
for _ in range(3):
    run(inputs)
buffers.clear()
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
gradients = run(inputs)[1:]
print(kilobytes("VmHWM") - before, sum(gradient.nbytes for gradient in gradients) // 1024)
"""


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_memory_beyond_torch_as_the_system_sees_it() -> None:
    # Every block of 64 KiB or more is then the system's own, and counts from its first touch until it is freed.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    process = subprocess.run(
        [sys.executable, "-c", RESIDENT],
        env=os.environ | settings | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    for line, fits in zip(process.stdout.splitlines(), (True, False), strict=True):
        peak, gradients = map(int, line.split())
        assert peak >= gradients - 256
        assert (peak <= gradients + 512) is fits


def test_a_case_is_timed_in_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPFAST_BENCH_DEVICE", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=2000000000")
    case = Case("loop_loss_unguided", "SD", 1, torch.float32, "ours", plain=True)
    seconds = seconds_elsewhere(case, budget=0)
    assert len(seconds) == MIN_ROUNDS
    assert all(second > 0 for second in seconds)


def test_durations_are_played_back() -> None:
    clock = Playback()
    clock.load([0.5, 0.25])
    readings = [clock() for _ in range(4)]
    assert [end - start for start, end in (readings[:2], readings[2:])] == [0.5, 0.25]


def test_durations_take_the_inputs_in_turn() -> None:
    seen: list[int] = []
    seconds = durations(seen.append, [1, 2, 3], CPU, budget=0)
    assert len(seconds) == MIN_ROUNDS
    assert all(second >= 0 for second in seconds)
    assert set(seen[-3:]) == {1, 2, 3}


def test_inputs_of_a_gpu_rotate_beyond_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=50)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda")
    # 4 of 40 bytes are more than 3 * 50
    assert rotating(lambda seed: seed, lambda seed: 40, gpu) == [0, 1, 2, 3]
    assert rotating(lambda seed: seed, lambda seed: 1000, gpu) == [0]
    assert rotating(lambda seed: seed, lambda seed: 40, CPU) == [0]
    properties.L2_cache_size = 10**9
    assert len(rotating(lambda seed: seed, lambda seed: 40, gpu)) == 2048


def test_the_host_is_timed_while_the_gpu_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    seconds = host_seconds(happened.append, ["a", "b"])
    assert 0 <= seconds < 1
    assert happened == ["wait", "a", "wait", "b"] * 50 + ["wait"]


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "kernels").glob("test_*.py")))
def test_every_benchmark_of_a_kernel_is_timed_alike(file: Path) -> None:
    # with inputs that rotate, and with the host's time
    assert re.search(r"\b(measure|time_call)\(", file.read_text())
    assert "durations" not in file.read_text()


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_clock() -> None:
    where = torch.device("cuda")
    source = torch.ones(2**26, device=where)
    target = torch.empty_like(source)
    seconds = durations(target.copy_, [source], where, budget=0.1)
    rate = 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]
    assert 5e10 < rate < 2e13
    assert kernel_launches(lambda: source.add(1).mul(2)) == 2
    assert peak_extra_bytes(lambda: source.add(1), where) == source.nbytes
    assert host_seconds(target.copy_, [source]) > 0


def entry(median: float, share: float = 0.5) -> dict:
    return {
        "median_us": median,
        "iqr_us": 1.0,
        "rounds": 10,
        "bytes": 6291456,
        "gb_per_s": 12.3,
        "copy_share": share,
        "launches": None,
        "peak_bytes": 2097152,
    }


MACHINE = {"device": "A (R) chip, 2 cores", "copy_gb_per_s": 20.0, "torch": "2.13.0", "backend": "native"}
RUN = {
    "machine": MACHINE | {"date": "2026-01-01"},
    "results": {
        "loop_loss": {
            "SD-16-float32": {
                "ours": entry(200) | {"host_us": 150.0},
                "eager": entry(4000, 0.1),
                "compile": entry(700),
                "trl": entry(9e6),
            },
            "SD-4-float32": {"ours": entry(90), "eager": entry(1800)},
        },
        "leave_one_out": {"rewards-64-float32": {"ours": entry(9)}},
    },
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict, list[str]]:
    """A second run to be changed and saved by the test, and the paths of both."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    paths[0].write_text(json.dumps(RUN), "utf-8")
    return deepcopy(RUN), [str(path) for path in paths]


def test_the_speedup_table(pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(pair[1][:1]) == 0
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert lines[0] == [
        *("op", "latent", "rows", "dtype", "ours"),
        *("eager", "compile", "TRL", "GB/s", "of copy", "host"),
    ]
    assert lines[2:] == [
        ["leave_one_out", "rewards", "64", "float32", "9 µs", "", "", "", "12.3", "50%", ""],
        ["loop_loss", "SD", "4", "float32", "90 µs", "20.0×", "", "", "12.3", "50%", ""],
        [
            *("loop_loss", "SD", "16", "float32", "200 µs", "20.0×", "3.5×", "45000.0×"),
            *("12.3", "50%", "150 µs"),
        ],
    ]


def test_what_moved(pair, capsys: pytest.CaptureFixture[str]) -> None:
    run, paths = pair
    settings = run["results"]["loop_loss"]
    settings["SD-16-float32"]["ours"]["median_us"] = 230  # slower
    settings["SD-16-float32"]["eager"]["median_us"] = 8000  # slower, but not ours
    settings["SD-4-float32"]["ours"]["median_us"] = 45  # faster
    settings["SD-4-float32"]["eager"]["median_us"] = 1801  # noise
    del settings["SD-16-float32"]["trl"]
    run["results"]["philox_normal"] = {"SD-16-float32": {"ours": entry(100)}}
    run["machine"]["torch"] = "2.14.0"
    Path(paths[1]).write_text(json.dumps(run), "utf-8")

    assert compare.main(paths) == 0
    output = capsys.readouterr().out
    assert "torch: 2.13.0 → 2.14.0" in output
    assert "3 of 6 medians moved by more than 1.05×" in output
    ratios = [line.split("|")[4].strip() for line in output.splitlines() if line.startswith("| loop_loss")]
    assert ratios == ["2.00×", "1.15×", "0.50×"]
    assert "only in A: loop_loss SD-16-float32 trl" in output
    assert "only in B: philox_normal SD-16-float32 ours" in output

    assert compare.main([*paths, "--fail-above", "1.2"]) == 0
    assert compare.main([*paths, "--fail-above", "1.10"]) == 1
    assert capsys.readouterr().err == "regression beyond 1.1×: loop_loss SD-16-float32 ours\n"
    assert compare.main([*paths, "--threshold", "1.5"]) == 0
    assert "2 of 6 medians" in capsys.readouterr().out


def test_names_of_files() -> None:
    assert device_slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores") == "intel-xeon-2-cores"
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"other\.json holds no benchmark results"):
        load(path)


BENCHMARK = """\
import os, sys, pytest
# a worker of pytest-xdist would refuse to take times
for name in [name for name in os.environ if name.startswith("PYTEST_")]:
    del os.environ[name]
os.chdir(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_from_a_benchmark_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the README, on the smallest case."""
    raw = tmp_path / "raw.json"
    case = "benchmarks/kernels/test_leave_one_out.py::test_leave_one_out[rewards-64-float32-ours]"
    options = (
        "--benchmark-only",
        f"--benchmark-json={raw}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    )
    shown = printed(BENCHMARK, str(ROOT), case, *options, LOOPFAST_BENCH_DEVICE="cpu")
    assert "benchmark 'leave_one_out rewards-64-float32': 1 tests" in shown
    monkeypatch.setattr(sys, "argv", ["keep", str(raw), str(tmp_path)])
    keep.main()
    path = Path(capsys.readouterr().out.strip())
    kept = load(path)
    assert path.stem == device_slug(kept["machine"]["device"])
    measured = kept["results"]["leave_one_out"]["rewards-64-float32"]["ours"]
    assert measured["bytes"] == 2 * 64 * 4
    assert measured["peak_bytes"] == 64 * 4
    rate = measured["bytes"] / measured["median_us"] / 1e3
    assert measured["gb_per_s"] == pytest.approx(rate, rel=1e-2)
    assert measured["copy_share"] == pytest.approx(rate / kept["machine"]["copy_gb_per_s"], rel=1e-2)
    assert path.stat().st_size < raw.stat().st_size
    tables = []
    for results in (path, raw):
        assert compare.main([str(results)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != ""


def test_the_roofline_plot(tmp_path: Path) -> None:
    from profiles.roofline import draw

    figure = draw(RUN)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles == ["loop_loss"]
    figure.savefig(tmp_path / "roofline.png")


def test_the_model_to_shard_is_one_that_can_be_trained(tmp_path: Path) -> None:
    parameters = sharding.write_model(tmp_path / "model", 32)
    config = parse_config(sharding.RUN, [f"model.pretrained={tmp_path / 'model'}", "model.dtype=float32"])
    policy = load_policy(config.model, cast=True)
    assert sum(parameter.numel() for parameter in policy.denoiser.parameters()) == parameters
    sample = torch.randn(1, *policy.latent_shape, dtype=policy.dtype)
    output, _ = policy.predict(sample, torch.tensor([5]), policy.encode(["a red circle"]))
    assert output.shape == sample.shape
    for overrides in sharding.ENGINES.values():
        parse_config(sharding.RUN, [f"model.pretrained={tmp_path / 'model'}", *overrides])
