"""Starts the processes of a run on this host, and says what became of them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loopfast.errors import Interrupted, LoopfastError
from loopfast.system.streams import SAID


def launch(arguments: Sequence[str], *, processes: int, restarts: int) -> None:
    """Runs ``loopfast`` with arguments in several processes of this host, one for each GPU, by torchrun's launcher.

    When a process dies the others are ended, and all are started anew, from the run's last checkpoint, as often as
    ``restarts`` says.

    Args:
        arguments: of each process's command line, such as ``["train", "--config", "tiny"]``.
        processes: how many.
        restarts: how often they may be started anew.

    Raises:
        LoopfastError: a process has failed, and the restarts are used up; the message names its rank.
        Interrupted: a signal has stopped the processes, which have had half a minute to save the run.
    """
    signals = ["SIGTERM", "SIGINT", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signals.append("SIGHUP")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"loopfast-{os.getpid()}",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="spawn",
        signals_to_handle=",".join(signals),
    )
    # which process failed, and how, is said below
    for library in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # a share of the cores each, unless the user knows better
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with TemporaryDirectory(prefix="loopfast-launch-") as said:
        # an error that all processes end with is said by one
        os.environ[SAID] = said
        try:
            _run(config, arguments, restarts, said)
        finally:
            del os.environ[SAID]


def _run(config: LaunchConfig, arguments: Sequence[str], restarts: int, said: str) -> None:
    try:
        elastic_launch(config, sys.executable)("-m", "loopfast", *arguments)
    except SignalException as stop:
        raise Interrupted(
            f"{stop.sigval.name} has stopped the processes; --resume auto goes on from the last checkpoint",
            128 + stop.sigval,
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raised = LoopfastError(
            f"rank {rank} {how}"
            + (
                f", and {restarts} restart(s) are used up"
                if restarts
                else "; --max-restarts N starts it anew"
            )
            + "; --resume auto goes on from the last checkpoint"
        )
        raised.exit_code = code if code > 0 else 128 - code
        raised.silent = code > 0 and restarts == 0 and any(Path(said).iterdir())
        raise raised from None
