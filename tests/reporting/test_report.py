from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loopfast.errors import LoopfastError
from loopfast.reporting import image_grid, schedule_plot, write_report
from loopfast.reporting.charts import Series, line_chart, ticks
from loopfast.reporting.images import data_uri, tiles
from loopfast.schedules import transition_schedule

TILE = 8
PREVIEW = [0, 2, 4, 6]
CONFIG = """\
run: {name: "tiny <b>run</b>", seed: 3}
model: {pretrained: embedded, tune: lora, lora: {rank: 8}}
prompts: {source: "embedded:all"}
algorithm: {name: loop, samples_per_prompt: 4}
rollout: {prompts_per_iteration: 32, steps: 10}
train: {iterations: 60, learning_rate: 1.5e-4}
"""


def evaluation(
    iteration: int, gain: float, categories: tuple[str, ...] = ("color", "shape")
) -> dict[str, Any]:
    """Two prompts a category, two images a prompt; each second prompt gains twice as much."""
    items = []
    for index in range(4 * len(categories)):
        category = categories[index // 4]
        reward = index / 20 + gain * (1 + index // 2 % 2)
        items.append(
            {
                "prompt": f"{category} & prompt {index // 2}",
                "category": category,
                "seed": index,
                "reward": reward,
                "parts": {"soft": reward, "exact": float(reward > 0.5)},
            }
        )

    def summary(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        parts = {name: mean([item["parts"][name] for item in chosen]) for name in ("soft", "exact")}
        return {"reward": mean([item["reward"] for item in chosen]), "parts": parts, "count": len(chosen)}

    groups = {name: summary([item for item in items if item["category"] == name]) for name in categories}
    whole = summary(items)
    return {
        "iteration": iteration,
        "images": 128 * iteration,
        "reward": whole["reward"],
        "parts": whole["parts"],
        "by_category": groups,
        "items": items,
        "preview": {"tile": [TILE, TILE], "columns": 2, "items": PREVIEW},
    }


def sheet(iteration: int) -> Image.Image:
    """Tile t is of the one color (iteration, t, 0)."""
    pixels = np.zeros((2 * TILE, 2 * TILE, 3), np.uint8)
    pixels[..., 0] = iteration
    pixels[..., 1] = np.arange(2).repeat(TILE) + 2 * np.arange(2).repeat(TILE)[:, None]
    return Image.fromarray(pixels)


def write_evaluation(run: Path, data: dict[str, Any]) -> None:
    folder = run / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"iteration-{data['iteration']:06d}"
    (folder / f"{stem}.json").write_text(json.dumps(data))
    sheet(data["iteration"]).save(folder / f"{stem}.png")


def write_metrics(run: Path, last: int, evaluations: dict[int, dict[str, Any]]) -> None:
    rng = random.Random(0)
    lines = []
    for iteration in range(last + 1):
        line: dict[str, Any] = {
            "iteration": iteration,
            "images": 128 * iteration,
            "seconds": 3.0 * iteration + 2,
        }
        if iteration:
            line |= {
                "reward_mean": 0.3 + iteration / 200 + rng.gauss(0, 0.02),
                "reward_std": 0.3,
                "group_spread": 0.2,
                "ratio_max_deviation": 0.0,
                "clip_fraction": rng.random() / 10,
                "kl": 1e-5 * iteration,
                "grad_norm": None if iteration == 2 else 1.5,
                "loss": rng.gauss(0, 0.01),
                "seconds_rollout": 1.0,
                "seconds_reward": 0.25,
                "seconds_replay": 1.0,
                "seconds_optimizer": 0.5,
                "seconds_checkpoint": 0.125,
                "images_per_second": 40 + iteration / 60,
                "outside_model_share": 0.02 if iteration < 50 else 0.9,
                "peak_memory_bytes": 3 * 2**20,
                "peak_reserved_bytes": 5 * 2**20,
                "device_memory_bytes": 9 * 2**20,
            }
        if data := evaluations.get(iteration):
            parts = {f"eval_{name}": value for name, value in data["parts"].items()}
            line |= {"eval_reward": data["reward"], "seconds_eval": 2.0, **parts}
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: 60 iterations, evaluated four times."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    evaluations = {at: evaluation(at, at / 200) for at in (0, 20, 40, 60)}
    for data in evaluations.values():
        write_evaluation(folder, data)
    write_metrics(folder, 60, evaluations)
    return folder


class Page(HTMLParser):
    """What the tests look at: text, images and addresses, and that every element is closed."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def charts(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def test_the_report_of_a_finished_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    base, final = evaluation(0, 0)["reward"], evaluation(60, 0.3)["reward"]
    assert "finished" in page.text
    assert "tiny <b>run</b>" in page.text  # escaped: it is text, not an element
    assert f"Held-out reward {base:.3f} → {final:.3f} +{final - base:.3f}" in page.text
    assert "LoRA, rank 8" in page.text
    assert "K = 4" in page.text
    assert "7,680 images in 3 min 02 s" in page.text
    for memory in ("Peak memory 3 MiB", "Peak memory reserved 5 MiB", "Memory taken from the GPU 9 MiB"):
        assert memory in page.text
    for heading in ("by category", "Before and after", "On the way", "Diagnostics", "Where the time went"):
        assert heading in page.text
    assert "learning_rate: 1.5e-4" in page.text


def test_the_report_needs_nothing_from_outside(run: Path) -> None:
    page = Page(write_report(run))
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import|<script", page.source)
    assert "prefers-color-scheme: dark" in page.source


def test_every_color_of_the_charts_is_defined_for_both_themes(run: Path) -> None:
    source = Page(write_report(run)).source
    light, dark = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    assert used - {"--columns"} <= set(re.findall(r"(--[\w-]+):", light))
    assert re.findall(r"(--[\w-]+):", light) == re.findall(r"(--[\w-]+):", dark)


def test_the_category_table_pairs_the_same_prompts(run: Path) -> None:
    text = Page(write_report(run)).text
    before, after = evaluation(0, 0)["by_category"], evaluation(60, 0.3)["by_category"]
    # Of each category's two prompts one gains 0.3 and one 0.6: a mean of 0.45, with a standard error of 0.15.
    for name in ("color", "shape"):
        old, new = before[name]["reward"], after[name]["reward"]
        assert f"{name} 4 {old:.3f} {new:.3f} +0.450 ± 0.150" in text
    error = math.sqrt(4 * 0.15**2 / 3 / 4)
    assert f"all prompts 8 {evaluation(0, 0)['reward']:.3f}" in text
    assert f"+0.450 ± {error:.3f}" in text
    assert "exact" in text
    assert "soft" not in text.split("Diagnostics")[0]  # it is the total itself


def test_before_and_after_show_the_tiles_of_the_same_item(run: Path) -> None:
    page = Page(write_report(run))
    pairs = page.images[: 2 * len(PREVIEW)]
    for position, index in enumerate(PREVIEW):
        before, after = pairs[2 * position], pairs[2 * position + 1]
        prompt = evaluation(0, 0)["items"][index]["prompt"]
        assert (before["alt"], after["alt"]) == (f"before: {prompt}", f"after: {prompt}")
        for image, iteration in ((before, 0), (after, 60)):
            expected = Image.new("RGB", (TILE, TILE), (iteration, [0, 1, 2, 3][position], 0))
            assert image["src"] == data_uri(expected)
    film = page.images[2 * len(PREVIEW) :]
    assert len(film) == len(PREVIEW) * 4
    assert [image["alt"] for image in film[:2]] == [
        "color & prompt 0, iteration 0",
        "color & prompt 0, iteration 20",
    ]


def test_the_shares_of_the_phases_add_up(run: Path) -> None:
    text = Page(write_report(run)).text.split("Where the time went")[1]
    shares = [float(share) for share in re.findall(r"([\d.]+) %", text)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert "Sampling 1 min 00 s" in text
    assert "Optimizer 30 s" in text
    assert "Checkpoint 7.5 s" in text
    assert "Other" in text


def test_the_facts_tell_the_speed(run: Path) -> None:
    text = Page(write_report(run)).text
    assert "Images a second 40.5 (median, training on them included)" in text
    assert "Outside model calls 2.0% of an iteration (median)" in text


def test_runs_from_before_there_were_such_numbers_have_a_report(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    new = {"seconds_optimizer", "seconds_checkpoint", "images_per_second", "outside_model_share"}
    old = [{name: value for name, value in line.items() if name not in new} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    text = Page(write_report(run)).text
    assert "Images a second" not in text
    assert "Optimizer" not in text.split("Where the time went")[1].split("Configuration")[0]


def test_facts_of_the_summary_are_shown_once(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"facts": [["Device", "cpu"], ["Seed", "99"]]}))
    text = Page(write_report(run)).text
    assert "Device cpu" in text
    assert "Seed 3" in text
    assert "99" not in text.split("Reward")[0]


def test_a_run_in_progress(run: Path) -> None:
    for at in (20, 40, 60):
        (run / f"evaluation/iteration-{at:06d}.json").unlink()
    write_metrics(run, 7, {0: evaluation(0, 0)})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 8, "rew')
    page = Page(write_report(run))
    assert "iteration 7 of 60" in page.text
    assert "first to last iteration" in page.text
    assert "At iteration 0." in page.text
    assert "Before and after" not in page.text
    assert page.images == []


def test_a_run_without_evaluation(run: Path) -> None:
    for path in (run / "evaluation").iterdir():
        path.unlink()
    write_metrics(run, 30, {})
    text = Page(write_report(run)).text
    assert "Held-out" not in text
    assert "Training reward" in text
    assert "moving average" in text


def test_a_run_with_a_single_line(run: Path) -> None:
    for at in (20, 40, 60):
        (run / f"evaluation/iteration-{at:06d}.json").unlink()
    write_metrics(run, 0, {0: evaluation(0, 0)})
    page = Page(write_report(run))
    assert f"Held-out reward {evaluation(0, 0)['reward']:.3f}" in page.text
    assert "→" not in page.text
    assert page.charts()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run:\nalgorithm: {name: ppo}\nmodel: {tune: full}\n")
    text = Page(write_report(tmp_path)).text
    assert "Nothing has been measured yet." in text
    assert tmp_path.name in text
    assert "PPO" in text


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 3, "reward_mean": -25.5}\n')
    text = Page(write_report(tmp_path)).text
    assert "−25.5" in text
    assert "Configuration" not in text


def test_a_single_category_is_not_said_twice(run: Path) -> None:
    for at in (0, 60):
        write_evaluation(run, evaluation(at, at / 200, ("color",)))
    for at in (20, 40):
        (run / f"evaluation/iteration-{at:06d}.json").unlink()
    text = Page(write_report(run)).text
    assert "all prompts" not in text
    assert "On the way" not in text


def test_evaluations_of_other_prompts_are_not_paired(run: Path) -> None:
    data = evaluation(60, 0.3)
    for item in data["items"]:
        item["seed"] += 1000
    write_evaluation(run, data)
    text = Page(write_report(run)).text
    assert "Before and after" not in text
    assert "±" not in text


@pytest.mark.parametrize("half", [False, True])
def test_a_preview_without_its_sheet_is_left_out(run: Path, half: bool) -> None:
    path = run / "evaluation/iteration-000060.png"
    content = path.read_bytes()
    path.unlink()
    if half:
        path.write_bytes(content[: len(content) // 2])
    text = Page(write_report(run)).text
    assert "Before and after" not in text
    assert "On the way" in text


def test_a_reward_that_fell_is_shown_as_a_loss(run: Path) -> None:
    write_evaluation(run, evaluation(60, -0.2))
    write_metrics(run, 60, {0: evaluation(0, 0), 40: evaluation(40, 0.2), 60: evaluation(60, -0.2)})
    page = Page(write_report(run))
    assert '<span class="loss">−0.300</span>' in page.source
    assert f"highest {evaluation(40, 0.2)['reward']:.3f}" in page.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "just text"),
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("evaluation/iteration-000020.json", '{"iteration": 20'),
        ("evaluation/iteration-000020.json", '{"iteration": 20}'),
        ("metrics.jsonl", '{"iteration": 0}\nnonsense\n{"iteration": 2}\n'),
    ],
)
def test_a_damaged_file_is_named(run: Path, file: str, content: str) -> None:
    (run / file).write_text(content)
    with pytest.raises(LoopfastError, match=re.escape(f"{run / file} is damaged")):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoopfastError, match="is not the folder of a run"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_one_clear_line(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(LoopfastError, match=r"cannot write .*report\.html: Is a directory"):
        write_report(run)
    assert not (run / ".tmp-report.html").exists()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 12))
def test_ticks_are_few_even_and_enclose_the_range(low: float, span: float, count: int) -> None:
    high = low + span
    values = ticks(low, high, count)
    step = values[1] - values[0]
    assert 2 <= len(values) <= count + 3
    assert values[0] <= low + 1e-6 * step
    assert values[-1] >= high - 1e-6 * step
    assert np.allclose(np.diff(values), step, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.5])
def test_ticks_of_a_single_value_enclose_it(value: float) -> None:
    values = ticks(value, value, 3)
    assert values[0] <= value <= values[-1]
    assert values[0] < values[-1]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ["0", "0.5", "1.0"]),
        ([0.0, 3e-4], ["0", "1e−4", "2e−4", "3e−4"]),
        ([-0.02, 0.01], ["−0.02", "−0.01", "0", "0.01"]),
        ([0.0, 45_000.0], ["0", "20k", "40k", "60k"]),
        ([0.0, 0.7], ["0", "0.25", "0.50", "0.75"]),
        ([2e7, 6e7], ["2e7", "4e7", "6e7"]),
    ],
)
def test_the_labels_of_an_axis(values: list[float], labels: list[str]) -> None:
    svg = ElementTree.fromstring(
        line_chart([Series("s", [0, 1], values, "line")], title="t", x_label="x", width=300, height=190)
    )
    texts = [element.text for element in svg.iter("text") if element.get("text-anchor") == "end"]
    assert texts[:-1] == labels


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e6)), min_size=1, max_size=900))
def test_a_chart_is_well_formed_and_stays_within_its_frame(points: list[tuple[float, float]]) -> None:
    x, y, spread = list(range(len(points))), [y for y, _ in points], [s for _, s in points]
    series = [
        Series("a <b> & c", x, y, "train", spread),
        Series("marked", x[:1], y[:1], "heldout", marked=True),
    ]
    svg = ElementTree.fromstring(line_chart(series, title='"quoted"', x_label="x", width=400, height=200))
    drawn = [element.get("points", "") for element in svg.iter() if element.tag in ("polyline", "polygon")]
    corners = [tuple(map(float, corner.split(","))) for line in drawn for corner in line.split()]
    assert all(0 <= across <= 400 and 0 <= down <= 200 for across, down in corners)
    assert len(corners) <= 400 * 3 + 1


def test_a_long_run_is_drawn_with_few_points_that_keep_its_shape() -> None:
    x = list(range(10_000))
    series = Series("ramp", x, [float(y) for y in x], "train", [1.0] * len(x))
    svg = ElementTree.fromstring(line_chart([series], title="t", x_label="x", width=1000, height=340))
    line = next(svg.iter("polyline")).get("points", "").split()
    corners = np.array([[float(value) for value in corner.split(",")] for corner in line])
    assert 300 <= len(corners) <= 400
    assert np.ptp(np.diff(corners[:, 1]) / np.diff(corners[:, 0])) < 0.2
    assert len(list(svg.iter("circle"))) <= 120


def test_a_grid_shows_each_image_enlarged_where_it_belongs() -> None:
    images = torch.zeros(5, 3, 32, 32)
    images[3, 1] = 1.0
    grid = image_grid(images, ["a red circle and a blue square " * 9] * 5, [0.5] * 5, columns=2)
    pixels = np.asarray(grid)
    green = np.argwhere((pixels == (0, 255, 0)).all(-1))
    black = (pixels == 0).all(-1)
    assert len(green) == 160 * 160
    (top, left), (bottom, right) = green.min(0), green.max(0)
    assert (bottom - top, right - left) == (159, 159)
    assert left > grid.width / 2
    assert black.sum() == 4 * 160 * 160
    assert ((pixels != 255).any(-1) & ~black).any()


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 3, 300, 200), 0.5),
        torch.full((2, 3, 300, 200), 0.5, dtype=torch.bfloat16),
        torch.full((2, 3, 300, 200), 128, dtype=torch.uint8),
        np.full((2, 3, 300, 200), 0.5),
    ],
)
def test_a_grid_takes_any_kind_of_image(images: torch.Tensor) -> None:
    grid = image_grid(images, ["", "supercalifragilisticexpialidocious" * 3], None, columns=8)
    pixels = np.asarray(grid)
    assert (pixels == 128).all(-1).sum() == 2 * 300 * 200
    assert grid.width < 3 * 200 + 100


@pytest.mark.parametrize(
    ("shape", "captions", "scores", "columns", "fault"),
    [
        ((0, 3, 8, 8), 0, 0, 1, "N at least 1"),
        ((2, 1, 8, 8), 2, 2, 1, r"must be \[N, 3, H, W\]"),
        ((3, 8, 8), 3, 3, 1, r"must be \[N, 3, H, W\]"),
        ((2, 3, 8, 8), 1, 2, 1, "must be 2"),
        ((2, 3, 8, 8), 2, 3, 1, "must be 2"),
        ((2, 3, 8, 8), 2, 2, 0, "columns must be at least 1, got 0"),
    ],
)
def test_a_grid_refuses_what_does_not_match(
    shape: tuple[int, ...], captions: int, scores: int, columns: int, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        image_grid(torch.zeros(shape), ["a"] * captions, [0.0] * scores, columns)


def test_a_sheet_that_is_too_small_gives_the_tiles_it_has() -> None:
    cut = tiles(sheet(7), (TILE, TILE), columns=2, count=9)
    assert [tile.getpixel((0, 0)) for tile in cut] == [(7, 0, 0), (7, 1, 0), (7, 2, 0), (7, 3, 0)]


def test_large_images_are_embedded_as_small_jpeg() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1024, 512, 3), np.uint8))
    assert data_uri(noise).startswith("data:image/jpeg;base64,")
    assert len(data_uri(noise)) < 150_000
    assert data_uri(noise.resize((128, 128))).startswith("data:image/png;base64,")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_of_a_schedule(tmp_path: Path, suffix: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    schedule = transition_schedule(scheduler, 10)
    path = schedule_plot(schedule, (0, 1, 2), tmp_path / "plots" / f"schedule.{suffix}")
    assert path == tmp_path / "plots" / f"schedule.{suffix}"
    assert path.stat().st_size > 5_000
    if suffix == "svg":
        assert "10 steps, 3 trained" in path.read_text()
    else:
        with Image.open(path) as image:
            assert image.width > 1000


def test_a_schedule_without_noise_can_be_plotted(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = transition_schedule(diffusers.DDIMScheduler(clip_sample=False), 5, eta=0.0)
    assert schedule_plot(schedule, (), tmp_path / "deterministic.png").exists()
