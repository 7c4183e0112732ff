"""What every test needs of its process."""

from __future__ import annotations

import signal

import pytest

# A shell starts background jobs with SIGINT ignored, and children inherit that: programs that tests interrupt would
# not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let waits between tries take no time."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
