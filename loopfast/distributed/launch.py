"""Starts the processes of a run on this host, and reports how they ended."""

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
from loopfast.system.streams import PRINTED_ERRORS


def launch(arguments: Sequence[str], *, processes: int, restarts: int) -> None:
    """Runs ``loopfast`` in several processes of this host, one for each GPU, by torchrun's launcher.

    When a process dies, the launcher ends the others and restarts all of them from the run's last checkpoint.

    Args:
        arguments: the command line of each process, such as ``["train", "--config", "tiny"]``.
        processes: the number of processes.
        restarts: the largest number of restarts.

    Raises:
        LoopfastError: a process has failed and no restart is left; the message names its rank.
        Interrupted: a signal has stopped the processes, after up to half a minute in which they saved the run.
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
    # The error below names the process and how it failed.
    for library in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # The processes share the cores, unless the user has chosen a number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with TemporaryDirectory(prefix="loopfast-launch-") as printed:
        # Only one process prints an error that all of them raise.
        os.environ[PRINTED_ERRORS] = printed
        try:
            _run(config, arguments, restarts, printed)
        finally:
            del os.environ[PRINTED_ERRORS]


def _run(config: LaunchConfig, arguments: Sequence[str], restarts: int, printed: str) -> None:
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
        raised.printed_elsewhere = code > 0 and restarts == 0 and any(Path(printed).iterdir())
        raise raised from None
