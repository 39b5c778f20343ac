from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from loopfast.run import console
from loopfast.run.console import Display


class Screen:
    """Two streams to look at: stdout and stderr, as a pipe or as a terminal would get them."""

    def __init__(self, terminal: bool, width: int = 80) -> None:
        self.output, self.errors = io.StringIO(), io.StringIO()
        options: dict[str, Any] = {"force_terminal": terminal, "width": width, "highlight": False}
        options["_environ"] = {"TERM": "xterm-256color"}
        self.console = Console(file=self.output, **options)
        self.error_console = Console(file=self.errors, stderr=True, **options)

    def display(self, quiet: bool = False) -> Display:
        return Display(quiet, console=self.console, errors=self.error_console)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.getvalue())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def run(display: Display, clock: list[float], completed: int = 0) -> None:
    with display:
        display.header("loopfast 0.1.0", [("model", "embedded [red]"), ("algorithm", "LOOP, K = 4")])
        display.start(60, completed)
        display.phase("evaluation")
        display.advance({"iteration": completed, "eval_reward": 0.301})
        for iteration in (completed + 1, completed + 2):
            display.phase("rollout")
            clock[0] += 4.0
            display.advance(
                {"iteration": iteration, "reward_mean": 0.41234, "reward_std": 0.21, "eval_reward": None}
            )
        clock[0] += 4.0
        display.advance({"iteration": completed + 3, "reward_mean": 0.5, "eval_reward": 0.4537})
        display.message("a message " + "that is long " * 12)
        display.finish([("held-out", "0.301 → 0.454"), ("report", "runs/tiny/report.html")])


def test_a_pipe_gets_plain_lines_one_an_iteration(clock: list[float]) -> None:
    screen = Screen(terminal=False, width=40)
    run(screen.display(), clock)
    assert screen.output.getvalue().splitlines() == [
        "loopfast 0.1.0",
        "  model      embedded [red]",
        "  algorithm  LOOP, K = 4",
        "iteration  0/60  held-out 0.301",
        "iteration  1/60  reward 0.412 ± 0.210  3:56 left",
        "iteration  2/60  reward 0.412 ± 0.210  3:52 left",
        "iteration  3/60  reward 0.500  held-out 0.454  3:48 left",
        "a message " + "that is long " * 12,
        "  held-out  0.301 → 0.454",
        "  report    runs/tiny/report.html",
    ]
    assert screen.errors.getvalue() == ""


def test_the_time_left_counts_only_this_session(clock: list[float]) -> None:
    screen = Screen(terminal=False)
    run(screen.display(), clock, completed=50)
    assert "iteration 51/60  reward 0.412 ± 0.210  0:36 left" in screen.text
    assert "iteration 53/60  reward 0.500  held-out 0.454  0:28 left" in screen.text


def test_a_terminal_gets_a_bar_that_goes_away(clock: list[float]) -> None:
    screen = Screen(terminal=True)
    run(screen.display(), clock)
    assert "\x1b[?25l" in screen.output.getvalue()
    assert screen.output.getvalue().count("\x1b[?25h") == 1
    assert "embedded [red]" in screen.text
    assert "iteration  3/60  reward 0.500  held-out 0.454" in screen.text
    assert "iteration  1/60" not in screen.text
    assert "runs/tiny/report.html" in screen.text


def test_the_bar_shows_phase_rewards_and_time_left(clock: list[float]) -> None:
    screen = Screen(terminal=True)
    display = screen.display()
    with display:
        display.start(60)
        clock[0] += 7.0
        screen.console.print(display._progress())
        assert "starting" in screen.text
        assert "0:07 so far" in screen.text
        display.advance({"iteration": 0, "eval_reward": 0.25})
        clock[0] += 13.0
        display.advance({"iteration": 1, "reward_mean": 0.5, "reward_std": 0.125})
        display.phase("replay")
        clock[0] += 5.0
        screen.console.print(display._progress())
    assert re.search(r"1/60 .*19:35 left", screen.text)
    assert re.search(r"replay +reward 0.500 ± 0.125  held-out 0.250", screen.text)


def test_hours_are_shown_as_such() -> None:
    assert [console.clock(seconds) for seconds in (0.4, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_warnings_go_to_stderr_unbroken(terminal: bool) -> None:
    screen = Screen(terminal)
    text = "checkpoint iteration-000020 is damaged [state.json] " * 4
    screen.display().warning(text)
    assert screen.output.getvalue() == ""
    assert "warning: " in screen.errors.getvalue()
    assert text in screen.errors.getvalue()


def test_a_warning_while_the_bar_is_shown_goes_above_it() -> None:
    screen = Screen(terminal=True)
    with screen.display() as display:
        display.start(3)
        display.warning("the disk is nearly full")
    assert "warning: the disk is nearly full" in screen.text
    assert screen.errors.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_says_nothing_but_warnings(clock: list[float], terminal: bool) -> None:
    screen = Screen(terminal)
    display = screen.display(quiet=True)
    run(display, clock)
    display.warning("careful")
    assert screen.output.getvalue() == ""
    assert "careful" in screen.errors.getvalue()


def test_an_exception_gives_the_terminal_back() -> None:
    screen = Screen(terminal=True)
    display = screen.display()
    display.start(3)
    display.__exit__(RuntimeError, RuntimeError(), None)
    assert screen.output.getvalue().count("\x1b[?25h") == 1


def test_the_default_streams_are_those_of_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.message("said")
    display.warning("warned")
    captured = capsys.readouterr()
    assert captured.out == "said\n"
    assert captured.err == "warning: warned\n"
