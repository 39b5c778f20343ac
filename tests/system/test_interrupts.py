from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from loopfast.system import interrupts
from loopfast.system.interrupts import StopRequest

SIGNALS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]


pytestmark = pytest.mark.usefixtures("foreground")


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_is_noted(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_closed_terminal_may_say_so_more_than_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 129
        # what else comes ends the process, as always
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_a_closed_terminal_is_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_signal_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012 - the first must not raise
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), StopRequest(grace=2.0) as stop:  # noqa: PT012 - the first must not raise
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop.exit_code == 130
        now += 2.1
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from loopfast.system.interrupts import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n")


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_noted() -> None:
    before = signal.getsignal(signal.SIGINT)
    requested = []

    def run() -> None:
        with StopRequest() as stop:
            requested.append((stop.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert requested == [(False, True)]
