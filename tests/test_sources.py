"""Reading conversations: every form in every file, bad rows, and the named sets of the hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recurrent_drafting import assets, sources
from recurrent_drafting.errors import DataError, NetworkError, UsageError
from recurrent_drafting.sources import Turn

PAIR = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
SHARE = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"id": "x", "conversations": SHARE},
        {"conversations": [{"from": "gpt", "value": "kind"}, *SHARE]},
        {"prompt": " hello\n", "response": "fine"},
        {"instruction": "hello", "input": "", "output": "fine"},
    ],
    ids=["messages", "sharegpt", "leading reply", "pair", "alpaca"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", "lines.json"])
def test_every_form_in_every_file_type(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist([row, row]), path)
    elif suffix == ".json":
        path.write_text(json.dumps([row, row], indent=1))
    else:
        path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    conversations, report = sources.read_conversations(path)
    assert conversations == [(Turn("user", "hello"), Turn("assistant", "fine"))] * 2
    assert (report.read, report.skipped) == (2, {})


def test_alpaca_input_questions_and_plain_text(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert sources.parse_conversation(row, "x") == (Turn("user", "add\n\n1 2"), Turn("assistant", "3"))
    assert sources.parse_conversation({"turns": ["a", "b"]}, "x") == (Turn("user", "a"), Turn("user", "b"))
    assert sources.parse_conversation({"text": "a b"}, "x") == (Turn("assistant", "a b"),)
    path = tmp_path / "book.txt"
    path.write_text("\n\nfirst line\nsecond line\n\n \nanother\n")
    conversations, _ = sources.read_conversations(path)
    assert [turn.content for (turn,) in conversations] == ["first line\nsecond line", "another"]


GOOD = json.dumps({"messages": PAIR}).encode()


@pytest.mark.parametrize(
    ("line", "reason", "found"),
    [
        (b'{"messages": [', "malformed JSON", "column"),
        (b'{"messages": "\xff"}', "invalid UTF-8", "0xff"),
        (b'{"question": "x", "answer": "y"}', "missing field", r"\['answer', 'question'\]"),
        (b"[1, 2]", "missing field", "list"),
        (b'{"messages": [{"role": "user"}]}', "missing field", r"\['role'\]"),
        (b'{"messages": ["hello"]}', "missing field", "str"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "unknown role", "'robot'"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role", r"\['user'\]"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn", "assistant"),
        (b'{"messages": []}', "no user turn", r"\[\]"),
        (b'{"prompt": "x", "response": null}', "field is no text", "NoneType"),
        (b'{"prompt": "x", "response": "\\ud800"}', "field is no text", "surrogate"),
        (b"[" * 100_000, "malformed JSON", "nested too deeply"),
        (b'{"text": "' + b"x" * 400 + b'"}', "line too long", "expected at most 300 bytes, got 413"),
    ],
)
def test_bad_rows_are_named_or_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str, found: str
) -> None:
    if reason == "line too long":
        monkeypatch.setattr(sources, "MAX_LINE_BYTES", 300)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(DataError, match=found) as caught:
        sources.read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")
    assert caught.value.exit_code == 3
    conversations, report = sources.read_conversations(path, skip_bad_rows=True)
    assert (len(conversations), report.read, report.skipped) == (2, 2, {reason: 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "an empty file"),
        ("empty.json", b"", "an empty file"),
        ("blank.txt", b"\n \n", "an empty file"),
        ("list.json", b"[]", "an empty file"),
        ("torn.json", b'[{"text": "a"},\n{"text"', r"torn.json:2: malformed JSON"),
        ("latin.json", b'[{"text":\n "\xe9"}]', r"latin.json:2: expected UTF-8 text, got byte 0xe9"),
        ("damaged.parquet", b"PAR1 and nothing else", "cannot be read as parquet"),
        ("rows.csv", b"a,b", "expected a .json, .jsonl, .parquet or .txt file, got .csv"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        sources.read_conversations(path, skip_bad_rows=True)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.json", "gone.txt", "gone.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        sources.read_conversations(tmp_path / name)


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"malformed JSON': 2"):
        sources.read_conversations(path, skip_bad_rows=True)


def test_named_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["a", "b"]}) + "\n")
    monkeypatch.setattr(assets, "fetch", lambda _: questions)
    assert sources.load_dataset_by_name("mtbench")[0] == [(Turn("user", "a"), Turn("user", "b"))]
    local = tmp_path / "rows.jsonl"
    local.write_bytes(GOOD + b"\n" + GOOD)
    assert len(sources.load_dataset_by_name(str(local), max_rows=1)[0]) == 1
    with pytest.raises(UsageError, match="did you mean alpaca"):
        sources.load_dataset_by_name("alpacca")
    with pytest.raises(DataError, match="cannot be read"):
        sources.load_dataset_by_name(str(tmp_path / "gone.jsonl"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, __spec__=SimpleNamespace()))


def save_as_on_the_hub(folder: Path) -> None:
    """Write the repositories of every named set, with the hub's own file names, columns and README headers."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def save(rows: list[dict[str, Any]], repository: str, file: str, header: str = "") -> None:
        path = folder / repository / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            parquet.write_table(arrow.Table.from_pylist(rows), path)
        if header:
            (folder / repository / "README.md").write_text(f"---\nconfigs:\n{header}---\n")

    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}]
    rows: list[dict[str, Any]] = [{"id": f"{index}_0", "conversations": talk} for index in range(3)]
    save(rows, "anon8231489123/ShareGPT_Vicuna_unfiltered", "ShareGPT_V3_unfiltered_cleaned_split.json")
    rows = [{"instruction": "add", "input": "1 2", "output": "3", "text": "Below is ..."} for _ in range(3)]
    save(rows, "tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    rows = [{"prompt": "hello", "prompt_id": "f0e3", "messages": PAIR} for _ in range(3)]
    header = """- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: data/test_sft-*
"""
    ultrachat = "HuggingFaceH4/ultrachat_200k"
    save(rows, ultrachat, "data/train_sft-00000-of-00003-a3ecf92756993583.parquet", header)
    save(rows[:1], ultrachat, "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet")
    lines = ["", " = Robert <unk> = \n", "", " Robert is an actor . \n"]
    header = """- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train-*
"""
    rows = [{"text": line} for line in lines]
    save(rows, "Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", header)


TALK = (Turn("user", "hello"), Turn("assistant", "fine"))
HUB_CONTENT = {
    "sharegpt": [TALK] * 3,
    "alpaca": [(Turn("user", "add\n\n1 2"), Turn("assistant", "3"))] * 3,
    "ultrachat": [TALK] * 3,
    "wikitext": [(Turn("assistant", "= Robert <unk> ="),), (Turn("assistant", "Robert is an actor ."),)],
}


@pytest.mark.parametrize("name", HUB_CONTENT)
def test_every_hub_set_as_it_lies_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The library takes a local directory of a repository's name for the repository."""
    datasets = pytest.importorskip("datasets")
    assert set(sources.HUB_SOURCES) == set(HUB_CONTENT)
    save_as_on_the_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    conversations, report = sources.load_dataset_by_name(name)
    assert conversations == HUB_CONTENT[name]
    assert (report.read, report.skipped) == (len(conversations), {})
    assert list((tmp_path / "cache").rglob("*.arrow"))
    # A part is streamed: nothing is prepared on disk.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "streamed")
    part, _ = sources.load_dataset_by_name(name, max_rows=2)
    assert part == HUB_CONTENT[name][: 1 if name == "wikitext" else 2]
    assert not list((tmp_path / "streamed").rglob("*.arrow"))


def test_splits_of_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    save_as_on_the_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("test_sft", 1), ("train_sft[:2]", 2), ("train_sft+test_sft", 4)):
        assert len(sources.load_dataset_by_name("ultrachat", split=split)[0]) == count
    assert len(sources.load_dataset_by_name("ultrachat", split="train_sft[:2]", max_rows=1)[0]) == 1
    with pytest.raises(NetworkError, match="split none") as caught:
        sources.load_dataset_by_name("ultrachat", split="none")
    assert "check the network and the split" in str(caught.value)


def test_a_hub_that_falls_silent_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise ConnectionError("reset")

    fake_hub(monkeypatch, load)
    with pytest.raises(NetworkError, match="after 1 rows: reset"):
        sources.load_dataset_by_name("wikitext", max_rows=3)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nlong story"), FileNotFoundError("404"), ValueError("split")]
)
def test_an_unreachable_hub_names_the_alternative(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    fake_hub(monkeypatch, load)
    with pytest.raises(NetworkError, match="--dataset_name self") as caught:
        sources.load_dataset_by_name("sharegpt")
    assert caught.value.exit_code == 7
    assert "long story" not in str(caught.value)


def test_hub_sources_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install datasets"):
        sources.load_dataset_by_name("ultrachat")
