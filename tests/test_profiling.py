from __future__ import annotations

import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import loopfast.profiling
from loopfast.profiling import Meter, model_call, nsys_command, phase, range_
from tests.forks import printed

ROOT = Path(__file__).parents[1]


class Clock:
    """Stands in for the module ``time``: goes on only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loopfast.profiling, "time", clock)
    return clock


def test_parts_exclude_each_other_and_model_calls_count_once(takes: Clock) -> None:
    meter = Meter([torch.device("cpu")])
    meter.start()
    takes(1)
    with meter.phase("rollout"):
        with model_call("denoiser", "rollout", 0):
            takes(20)
        takes(10)
    with meter.phase("replay"):
        with model_call("denoiser", "replay"):
            takes(3)
            with model_call("decoder", "replay"):
                takes(4)
        with phase("optimizer"):
            takes(2)
        with range_("pairs", "replay"):
            takes(5)
    times = meter.stop()
    assert times.total == pytest.approx(45)
    assert times.phases == pytest.approx({"rollout": 30, "replay": 12, "optimizer": 2})
    assert times.inside == pytest.approx({"": 0, "rollout": 20, "replay": 7, "optimizer": 0})
    assert times.calls == {"denoiser": 2, "decoder": 1}
    # two calls at once are one stretch of work
    assert times.called == pytest.approx({"denoiser": 27, "decoder": 4})
    assert times.model == pytest.approx(27)
    assert times.outside_share == pytest.approx(1 - 27 / 45)
    assert times.ranges == {}


def test_a_call_in_another_thread_counts_where_it_overlaps(takes: Clock) -> None:
    meter = Meter(detailed=True)
    meter.start()
    begun, end = threading.Event(), threading.Event()

    def score() -> None:
        with model_call("reward", "reward"):
            begun.set()
            end.wait()

    worker = threading.Thread(target=score)
    with meter.phase("rollout"):
        with model_call("denoiser", "rollout"):
            takes(4)
            worker.start()
            begun.wait()
            takes(1)
        takes(3)
    with meter.phase("reward"):
        takes(2)
        end.set()
        worker.join()
        takes(7)
    times = meter.stop()
    assert times.called == pytest.approx({"denoiser": 5, "reward": 6})
    assert times.inside == pytest.approx({"": 0, "rollout": 8, "reward": 2})
    assert times.ranges == pytest.approx({"reward": 7})


def test_a_detailed_meter_says_what_the_rest_was_spent_on(takes: Clock) -> None:
    meter = Meter(detailed=True)
    meter.start()
    takes(1)
    with meter.phase("replay"):
        with range_("pairs", "replay", 3):
            takes(20)
            with range_("copy", "replay"):
                takes(10)
            with model_call("denoiser", "replay"):
                takes(40)
            takes(2)
        takes(5)
        with range_("pairs", "replay", 4):
            takes(3)
    times = meter.stop()
    assert times.ranges == pytest.approx({"pairs": 25, "copy": 10, "replay": 5})
    assert sum(times.ranges.values()) == pytest.approx(times.total - times.model - 1)


def test_an_error_closes_what_was_open(takes: Clock) -> None:
    meter = Meter()
    meter.start()
    with suppress(KeyError), meter.phase("rollout"), model_call("denoiser", "rollout"):
        takes(1)
        raise KeyError
    with model_call("denoiser", "rollout"):  # in no part: nobody keeps accounts of it
        takes(2)
    with meter.phase("replay"):
        takes(3)
    times = meter.stop()
    assert times.phases == pytest.approx({"rollout": 1, "replay": 3})
    assert times.called == pytest.approx({"denoiser": 1})
    assert not meter.running


def test_a_phase_without_accounts_is_only_a_range() -> None:
    meter = Meter()
    with meter.phase("evaluation"), model_call("denoiser", "rollout"), phase("optimizer"):
        pass
    meter.start()
    assert meter.stop().calls == {}


def test_a_stretch_goes_on_until_it_is_stopped_and_the_next_begins_anew(takes: Clock) -> None:
    meter = Meter()
    meter.start()
    with meter.phase("rollout"):
        takes(1)
    meter.start()
    with meter.phase("rollout"):
        takes(2)
    assert meter.stop().phases == pytest.approx({"rollout": 3})
    takes(9)
    meter.start()
    again = meter.stop()
    assert again.phases == again.calls == {}
    assert (again.total, again.model, again.outside_share) == (0, 0, 0)


def test_without_accounts_and_profilers_ranges_are_one_object_that_does_nothing() -> None:
    with range_("step", "rollout", 1) as step, model_call("denoiser", "rollout", 2) as call:
        assert step is call is None
    assert range_("step", "rollout", 1) is model_call("denoiser", "rollout", 2)
    with phase("optimizer"):
        pass


def test_torchs_profiler_sees_ranges_and_what_ran_in_them() -> None:
    with torch.profiler.profile() as profiler, range_("loss", "replay", 7), model_call("denoiser", "replay"):
        torch.ones(3) + 1
    [add] = [event for event in profiler.events() if event.name == "aten::add"]
    assert add.cpu_parent.name == "loopfast/replay/denoiser"
    assert add.cpu_parent.cpu_parent.name == "loopfast/replay/loss"


def test_the_accounts_are_of_the_device(monkeypatch: pytest.MonkeyPatch, takes: Clock) -> None:
    """On a GPU moments are events: here of a GPU that lags behind, its clock being half as fast as the host's."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.device = torch.device("cuda:1")

        def record(self, stream: object) -> None:
            assert stream == "stream of cuda:1"
            self.at = takes.now / 2

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    gpu = torch.device("cuda:1")
    meter = Meter([gpu, gpu])
    meter.start()
    with meter.phase("rollout"):
        with model_call("denoiser", "rollout", 0, gpu):
            takes(20)
        capturing[0] = True
        with model_call("denoiser", "rollout", 1, gpu):
            takes(4)
        capturing[0] = False
        assert waited == [gpu]
    times = meter.stop()
    assert waited == [gpu, gpu]
    assert times.calls == {"denoiser": 1}
    assert times.model == pytest.approx(10)
    assert times.phases["rollout"] == pytest.approx(12)


@pytest.mark.gpu
def test_events_agree_with_the_clock() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        matrix @ matrix
    meter = Meter([device])
    meter.start()
    began = time.perf_counter()
    with meter.phase("rollout"), model_call("denoiser", "rollout", 0, device):
        for _ in range(20):
            matrix @ matrix
    times = meter.stop()
    whole = time.perf_counter() - began
    assert times.model == pytest.approx(whole, rel=0.2)
    assert times.model <= times.phases["rollout"] <= times.total


def test_nsys_records_the_range_of_the_iterations() -> None:
    command = nsys_command("tiny", ["run.seed=1"], iterations=2, output=Path("here"))
    assert "--nvtx-capture=profile@loopfast" in command
    assert "--output=here/nsys" in command
    assert command[-6:] == ["--iterations=2", "--no-trace", "--config", "tiny", "--set", "run.seed=1"]


# A tool that NVTX loads, as Nsight does: it writes what it is told to the file NVTX_TOOL_LOG. From NVTX's ABI: the
# indices of its functions, and the layout of an event's attributes.
NVTX_TOOL = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct attributes {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  int64_t payload;
  int32_t message_type;
  const char *message;
};

struct callbacks {
  size_t size;
  int (*table)(int module, void ****functions, unsigned *count);
};

static FILE *log_file;

static void write_line(const char *what, const char *name, long long number, long long more) {
  fprintf(log_file, "%s %s %lld %lld\n", what, name, number, more);
  fflush(log_file);
}

static void *domain(const char *name) { write_line("domain", name, 0, 0); return (void *)1; }
static void *registered(void *domain, const char *name) { return (void *)name; }
static void category(void *domain, uint32_t id, const char *name) { write_line("category", name, id, 0); }
static int push(void *domain, const struct attributes *event) {
  write_line("push", event->message, event->payload, event->category);
  return 0;
}
static int pop(void *domain) { write_line("pop", "-", 0, 0); return 0; }

int InitializeInjectionNvtx2(const void *(*get_table)(uint32_t)) {
  const struct callbacks *callbacks = get_table(1);
  void ***functions;
  unsigned count;
  if (!callbacks || !callbacks->table(5, &functions, &count)) return 0;
  log_file = fopen(getenv("NVTX_TOOL_LOG"), "w");
  *functions[4] = (void *)push;
  *functions[5] = (void *)pop;
  *functions[8] = (void *)category;
  *functions[10] = (void *)registered;
  *functions[12] = (void *)domain;
  return 1;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_an_attached_tool_sees_one_domain_categories_and_payloads(tmp_path: Path) -> None:
    source, library, log = (tmp_path / name for name in ("tool.c", "tool.so", "log"))
    source.write_text(NVTX_TOOL)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    program = """
from loopfast.profiling import Meter, model_call, range_
meter = Meter()
meter.start()
with meter.phase("rollout"):
    for index in range(2):
        with range_("step", "rollout", index), model_call("denoiser", "rollout", index):
            pass
with range_("loss", "replay", 5):
    pass
assert meter.stop().calls == {"denoiser": 2}
"""
    printed(program, NVTX_INJECTION64_PATH=str(library), NVTX_TOOL_LOG=str(log))
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [name for what, name, *_ in lines if what == "domain"] == ["loopfast"]
    categories = {number: name for what, name, number, _ in lines if what == "category"}
    events = [
        (what, name, payload, categories[category]) if what == "push" else (what,)
        for what, name, payload, category in lines
        if what in ("push", "pop")
    ]
    step = [
        [("push", "step", index, "rollout"), ("push", "denoiser", index, "rollout"), ("pop",), ("pop",)]
        for index in "01"
    ]
    assert events == [
        ("push", "rollout", "0", "rollout"),
        *step[0],
        *step[1],
        ("pop",),
        ("push", "loss", "5", "replay"),
        ("pop",),
    ]
