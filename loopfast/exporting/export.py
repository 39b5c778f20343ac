"""The command ``loopfast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from loopfast.errors import CheckpointError, ConfigError
from loopfast.evaluation.models import newest_checkpoint, policy_of, run_config, trained_weights
from loopfast.exporting.card import write_card
from loopfast.run.checkpoints import Checkpoint, CheckpointStore
from loopfast.run.console import Display
from loopfast.system.files import writing


def export_run(
    run: Path,
    to: Path,
    *,
    form: Literal["lora", "full"] | None,
    merge: bool,
    best: bool,
    display: Display,
) -> Path:
    """Writes a run's trained model into a folder, with a model card.

    Args:
        to: the folder to write, which is empty or does not exist yet.
        form: an adapter for ``load_lora_weights`` (``lora``), or a whole pipeline (``full``). None stands for the form
            that was trained.
        merge: add the adapter to the weights, and write a whole pipeline.
        best: export the checkpoint with the best evaluation, not the newest.

    Raises:
        ConfigError: the folder is not a run's folder, the run has no such form, or ``to`` is not empty.
        CheckpointError: the run has no checkpoint that can be used.
    """
    config = run_config(run)
    tune = config.model.tune
    if tune == "full" and (form == "lora" or merge):
        raise ConfigError(
            f"{'--merge' if merge else '--format lora'}: {run} has trained all weights (model.tune: full); there is no "
            "adapter"
        )
    if form == "lora" and merge:
        raise ConfigError("--merge adds the adapter to the weights; it goes with --format full")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: {to} is there already and not empty")
    checkpoint = _best(run) if best else newest_checkpoint(run, display)
    policy = policy_of(config, checkpoint)
    weights = trained_weights(checkpoint)
    full = merge or form == "full" or tune == "full"
    display.message(f"exporting {checkpoint.path}")
    with writing(to):
        if full:
            policy.export_merged(to, weights)
        else:
            policy.export(to, weights)
        write_card(run, to, config, checkpoint, full=full)
    return to


def _best(run: Path) -> Checkpoint:
    store = CheckpointStore(run / "checkpoints", keep=1, keep_best=True)
    path = store.best()
    if path is None:
        raise CheckpointError(f"{run} has no checkpoint with an evaluation")
    return store.load(path)
