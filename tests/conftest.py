"""What every test needs of its process."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.text_models import Models

# A shell starts background jobs with SIGINT ignored, and children inherit that: programs that tests interrupt would
# not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Spare what was imported from later collections: the Trainer asks for a full one in each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def apart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests from the user's cache, with the packaged base in it, and from the package index; some are for it."""
    from recurrent_drafting.assets import CACHE_VARIABLE

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("real_model") is None:
            patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "cache"))
            patch.setenv("PIP_NO_INDEX", "1")
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base on disk. All tests read it, so none may change it."""
    from tests.text_models import save_base

    return str(save_base(tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="session")
def models(base: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """That base with a drafter for it."""
    from tests.text_models import Models, save_drafter

    return Models(base, str(save_drafter(tmp_path_factory.mktemp("drafter") / "drafter", base)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let waits between tries take no time."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
