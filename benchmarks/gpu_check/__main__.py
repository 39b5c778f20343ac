"""The command: ``python -m benchmarks.gpu_check``, from the repository's root.

Runs the stages, the most important ones first. Each stage is a process with its own time limit. Every figure is added
to results.jsonl as soon as it is known. Nothing is downloaded from a network.

The exit status is 0 if no stage failed, 1 if one failed, 2 for wrong arguments, and 130 after an interruption.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from .record import Record, latest, read_lines
from .runner import FAILURES, Result, Task, run_all
from .stages import NAMES, ROOT, STAGES, Setting, Stage, patience, task_command
from .table import as_text

LIMIT_SECONDS = 480.0
RESULTS, LOG, TABLE = "results.jsonl", "log.txt", "table.txt"

# In a separate process: importing torch takes seconds, and a process that uses a device holds memory on it.
_PROBE = """
import json, torch
from benchmarks.keep import device_slug
from benchmarks.machine import device_name
found = torch.cuda.is_available()
names = {"cpu": device_name(torch.device("cpu"))} | ({"cuda": torch.cuda.get_device_name()} if found else {})
facts = {name: {"name": text, "slug": device_slug(text)} for name, text in names.items()}
print(json.dumps({"torch": torch.__version__, "devices": facts}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    began = time.monotonic()
    options = _parse(arguments)
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:<10} {stage.seconds:>4g} s  {stage.about}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    environment = _environment()
    if left_out := _without_broken_xformers(environment):
        print(left_out, flush=True)
    probed = _probe(environment)
    devices = probed.get("devices", {})
    device = options.device or ("cuda" if "cuda" in devices or not options.small else "cpu")
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    setting = Setting(device, options.small, devices.get(device, {}).get("name"))
    if setting.small or setting.found is None:
        default = ROOT / "build" / "gpu-check"  # such figures are not results
    else:
        default = ROOT / "profiles" / "results" / devices[device]["slug"]
    folder = (options.out or default).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out: cannot make {folder}: {error.strerror}", file=sys.stderr)
        return 2
    now = datetime.now(timezone.utc)
    run = f"{now:%Y%m%dT%H%M%S}-{os.getpid()}"
    lines = folder / RESULTS

    def record(stage: str) -> Record:
        return Record(lines, run, stage)

    stages = [stage for stage in STAGES if stage.name in (options.stages or NAMES)]
    record("check").write(
        "start",
        date=f"{now:%Y-%m-%d %H:%M} UTC",
        device=setting.found or "no CUDA device",
        torch=probed.get("torch", probed.get("error")),
        python=sys.version.split()[0],
        small=setting.small,
        limit=options.limit,
        stages=[stage.name for stage in stages],
    )
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n##### {run}: {setting.found or probed.get('error') or 'no CUDA device'}\n")
    print(f"{setting.found or 'no CUDA device'}; {lines}", flush=True)
    tasks = [_task(stage, setting, environment) for stage in stages]
    try:
        results = run_all(tasks, options.limit, record, folder / LOG, ROOT, _say, began)
    except KeyboardInterrupt:  # between two stages, or a second one
        results = [Result("check", "interrupted")]
    about = {stage.name: stage.about for stage in STAGES}
    mine = {stage: found for stage, found in latest(read_lines(lines)).items() if found[0]["run"] == run}
    table = as_text(mine, about)
    (folder / TABLE).write_text(table, "utf-8")
    print(f"\n{table}")
    _report(folder, environment)
    if any(result.outcome == "interrupted" for result in results):
        return 130
    return int(any(result.outcome in FAILURES for result in results))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"all if none is named: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="for all stages together (480)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the device to check (cuda)")
    parser.add_argument(
        "--small", action="store_true", help="tiny models: tries the check itself, on any device"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: $OUT, or profiles/results/<device>; build/gpu-check without a GPU or with --small",
    )
    parser.add_argument("--list", action="store_true", help="print the stages and do nothing")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stages if name not in NAMES]:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not options.limit > 0:
        parser.error(f"--limit: found {options.limit:g}, allowed: seconds greater than 0")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu takes --small: the full sizes are for a GPU")
    if options.out is None and os.environ.get("OUT"):
        options.out = Path(os.environ["OUT"])
    return options


def _environment() -> dict[str, str]:
    """Returns the variables of every stage: the code of this checkout comes first, and no library searches for a
    network.
    """
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _without_broken_xformers(environment: dict[str, str]) -> str | None:
    """Removes an xformers that cannot be imported from the path, because diffusers imports every xformers that it
    finds.

    Returns:
        A message about it, or None if there is no xformers or it can be imported.
    """
    found = importlib.util.find_spec("xformers")
    if found is None or found.origin is None:
        return None
    command = [sys.executable, "-c", "import xformers.ops"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or ["no reason is given"])[-1]
    home = Path(found.origin).parents[1]
    path = [entry for entry in environment["PYTHONPATH"].split(os.pathsep) if Path(entry).absolute() != home]
    others = {
        entry.name for entry in home.iterdir() if not entry.name.startswith(("xformers", "__pycache__"))
    }
    if others or os.pathsep.join(path) == environment["PYTHONPATH"]:
        return f"xformers in {home} cannot be imported, and diffusers imports it: remove it ({said})"
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return f"xformers in {home} cannot be imported and is left out ({said})"


def _probe(environment: dict[str, str]) -> dict[str, Any]:
    """Returns torch's description of the devices, or ``error`` if torch gives none."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return {"error": "torch does not say within 120 s which devices there are"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": said[-1][:300] if said else f"torch cannot be asked: exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _task(stage: Stage, setting: Setting, environment: dict[str, str]) -> Task:
    lacks = stage.lacks(setting)
    own = {**environment, "LOOPFAST_BENCH_DEVICE": setting.device}
    return Task(
        stage.name,
        stage.seconds * patience("cpu" if setting.found is None else setting.device),
        task_command(stage, setting),
        lacks,
        own,
    )


def _say(result: Result) -> None:
    reason = f"  {result.reason}" if result.reason else ""
    print(f"{result.name:<10} {result.outcome:<14} {result.seconds:6.1f} s{reason}", flush=True)


def _report(folder: Path, environment: dict[str, str]) -> None:
    """Writes the page and the plots; if this fails, the check's results remain valid."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
        )
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        said = ["it takes more than 120 s"]
    print(f"report: {said[-1] if said else 'nothing was written'}")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
