"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer

import train_speculator
from recurrent_drafting import local_drafters
from recurrent_drafting.data import tokenizer_fingerprint
from tests.faults.common import TOKEN, Pipe
from tests.hub_server import HubServer, standing_in
from tests.text_models import Models, save_chats, save_drafter, save_questions


@pytest.fixture(scope="session")
def models(base: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A drafter that knows the tokenizer of its base."""
    known = tokenizer_fingerprint(AutoTokenizer.from_pretrained(base))
    folder = tmp_path_factory.mktemp("faults") / "drafter"
    return Models(base, str(save_drafter(folder, base, tokenizer_fingerprint=known)))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, without released drafters, without a network, with nothing on standard input."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train_speculator, "SERVE_CHECK_TOKENS", 8)
    monkeypatch.setattr(local_drafters, "RELEASED", tmp_path / "released")
    monkeypatch.setattr("sys.stdin", Pipe(b""))
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return str(save_chats(tmp_path / "chats.jsonl"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return save_questions(tmp_path / "questions.jsonl")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with standing_in(TOKEN, tmp_path / "cache", monkeypatch) as server:
        yield server
