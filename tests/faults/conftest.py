"""Fixtures of the fault tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer

from recurrent_drafting import local_drafters
from recurrent_drafting.data import tokenizer_fingerprint
from tests.faults.common import TOKEN, Models, Pipe, save_chats
from tests.hub_server import HubServer, standing_in
from tests.text_models import save_base, save_drafter


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("faults")
    base = save_base(folder / "base")
    known = tokenizer_fingerprint(AutoTokenizer.from_pretrained(base))
    return Models(str(base), str(save_drafter(folder / "drafter", base, tokenizer_fingerprint=known)))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, without released drafters, without a network, with nothing on standard input."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(local_drafters, "RELEASED", tmp_path / "released")
    monkeypatch.setattr("sys.stdin", Pipe(b""))
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return save_chats(tmp_path / "chats.jsonl")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"question_id": 80 + i, "category": "c", "turns": [f"first {i}", f"second {i}"]} for i in range(3)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with standing_in(TOKEN, tmp_path / "cache", monkeypatch) as server:
        yield server
