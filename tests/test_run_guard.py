"""One run per output directory, and what signals do to the process of a run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recurrent_drafting.errors import UsageError
from recurrent_drafting.run_guard import LOCK, StopOnSignal, only_run

ROOT = Path(__file__).resolve().parent.parent

HOLDING = """
import sys
from pathlib import Path
from recurrent_drafting.run_guard import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

# The second signal comes while the first step never ends.
LISTENING = """
import time
from recurrent_drafting.run_guard import StopOnSignal
stop = StopOnSignal()
with stop.listening():
    print("listening", flush=True)
    while True:
        time.sleep(0.01)
        if stop.received:
            print(stop.received.name, flush=True)
            time.sleep(100)
"""


def start(code: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_lock_of_a_process_that_is_killed_is_free(tmp_path: Path) -> None:
    holder = start(HOLDING, str(tmp_path))
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UsageError, match=rf"another run \(process {holder.pid} on .*\): lock .*{LOCK}"),
        only_run(tmp_path),
    ):
        pytest.fail("the lock was given twice")
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).exists()
    with only_run(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_run(tmp_path):
            raise ZeroDivisionError


def test_a_lock_file_that_its_run_took_along_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run ends between the opening of its file and the lock: whoever comes next makes another file."""
    lock, waiting = fcntl.flock, [True]

    def ended_meanwhile(descriptor: int, how: int) -> None:
        if waiting.pop() if waiting else False:
            (tmp_path / LOCK).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", ended_meanwhile)
    with only_run(tmp_path), pytest.raises(UsageError, match="in use"), only_run(tmp_path):
        pytest.fail("the lock was given twice")


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with only_run(tmp_path):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / LOCK} cannot be locked (No locks available): a second run in it would not be noticed"
    ]


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once() -> None:
    pairs = [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
    for (first, second), process in [(pair, start(LISTENING)) for pair in pairs]:
        assert process.stdout and process.stdout.readline() == "listening\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n" and process.poll() is None
        process.send_signal(second)
        process.communicate(timeout=50)
        assert process.returncode == 128 + second


def test_only_the_main_thread_takes_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen() -> None:
        with StopOnSignal().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
