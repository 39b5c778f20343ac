"""The examples of kernels/README.md, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.forks import printed

README = Path(__file__).parents[2] / "kernels" / "README.md"


def example(section: str) -> str:
    text = README.read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert program
    return program


def test_the_examples_run_and_the_training_step_learns():
    programs = [example("An example of each"), "print('# training')", example("A training step")]
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert all(any(block in program for program in programs) for block in blocks)
    alone = (
        f"for program in {programs!r}: exec(program, {{}})\nimport sys\nassert 'loopfast' not in sys.modules"
    )
    trained = printed(alone).partition("# training\n")[2]
    rewards = [float(line.split()[-1]) for line in trained.splitlines()]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
