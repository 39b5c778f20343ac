"""The examples of kernels/README.md, as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "README.md"


def run(section: str) -> str:
    text = README.read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert program
    only_the_ops = "\nimport sys\nassert 'loopfast' not in sys.modules\n"
    shown = subprocess.run(
        [sys.executable, "-c", program + only_the_ops], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_example_of_each_op_runs():
    run("An example of each")


def test_the_training_step_learns():
    rewards = [float(line.split()[-1]) for line in run("A training step").splitlines()]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
