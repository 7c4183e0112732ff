"""Reading conversations, the chat template and its loss mask, packing, and the faults of each."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recurrent_drafting import assets, data
from recurrent_drafting.data import Collator, EncodedRow, TokenDataset, Turn
from recurrent_drafting.errors import DataError, NetworkError, UsageError

TOKENIZER_CLASS: Any = PreTrainedTokenizerFast
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", *HEADERS)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")  # words to Zephyr's tokenizer
WORDS = ("hello", "world", "how", "are", "you", "fine", "system", "user", "assistant", "model", "be", "kind")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ 'kind' }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGUE = (
    Turn("user", "hello"),
    Turn("assistant", "hello world"),
    Turn("user", "how are you"),
    Turn("assistant", "fine"),
)


def make_tokenizer(template: str | None, eos: str = "</s>") -> Any:
    """Build a tokenizer whose tokens are words, single blanks, line breaks and special tokens."""
    pieces = (*SPECIAL, "<unk>", "\n", " ", "[INST]", "[/INST]", "USER:", "ASSISTANT:", "SYSTEM:", *ROLES, *WORDS)
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |[^\s]+"), "isolated")
    backend.decoder = decoders.Fuse()
    return TOKENIZER_CLASS(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(SPECIAL[3:]),
        chat_template=template,
    )


def supervised(tokenizer: Any, row: EncodedRow) -> list[str]:
    """Return the runs of supervised tokens as text, unsupervised tokens being the separators."""
    runs, current = [], []
    for token, kept in zip(row.input_ids, row.loss_mask, strict=True):
        if kept:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return [*runs, tokenizer.decode(current)] if current else runs


@pytest.mark.parametrize(
    ("template", "eos", "text", "replies"),
    [
        (
            CHATML,
            "<|im_end|>",
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello world<|im_end|>\n"
            "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n",
            ["hello world<|im_end|>", "fine<|im_end|>"],
        ),
        (
            INST,
            "</s>",
            "<s>[INST] hello [/INST] hello world</s>[INST] how are you [/INST] fine</s>",
            [" hello world</s>", " fine</s>"],
        ),
        (
            TURNS,  # the end of a turn is not the EOS token
            "</s>",
            "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\nhello world<end_of_turn>\n"
            "<start_of_turn>user\nhow are you<end_of_turn>\n<start_of_turn>model\nfine<end_of_turn>\n",
            ["hello world<end_of_turn>", "fine<end_of_turn>"],
        ),
        (
            None,
            "</s>",
            "USER: hello\nASSISTANT: hello world</s>USER: how are you\nASSISTANT: fine</s>",
            [" hello world</s>", " fine</s>"],
        ),
    ],
    ids=["chatml", "inst", "turns", "fallback"],
)
def test_loss_mask_is_exact_to_the_token(template: str | None, eos: str, text: str, replies: list[str]) -> None:
    tokenizer = make_tokenizer(template, eos)
    row = data.encode(DIALOGUE, tokenizer, 512)
    assert tokenizer.unk_token_id not in row.input_ids
    assert tokenizer.decode(row.input_ids) == text
    assert supervised(tokenizer, row) == replies
    # What is not supervised before a reply is what the verifier is asked with.
    first = row.loss_mask.index(True)
    assert row.input_ids[:first] == data.render(tokenizer, [{"role": "user", "content": "hello"}], ask=True)


# The templates of Llama 3, Zephyr and ChatML as published, tokenised so that every piece is a token.
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') }}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# "+" marks the tokens that are supervised; blanks separate tokens, "_" is a blank and "/" a line break.
CHATML_MARKS = """<|im_start|> system / be _ kind <|im_end|> / <|im_start|> user / hello <|im_end|> / <|im_start|>
    assistant / +hello +_ +world +<|im_end|> / <|im_start|> user / how _ are _ you <|im_end|> / <|im_start|>
    assistant / +fine +<|im_end|> /"""
LLAMA3_MARKS = """<s> <|start_header_id|> system <|end_header_id|> / / be _ kind <|eot_id|> <|start_header_id|> user
    <|end_header_id|> / / hello <|eot_id|> <|start_header_id|> assistant <|end_header_id|> / / +hello +_ +world
    +<|eot_id|> <|start_header_id|> user <|end_header_id|> / / how _ are _ you <|eot_id|> <|start_header_id|>
    assistant <|end_header_id|> / / +fine +<|eot_id|>"""
ZEPHYR_MARKS = """<|system|> / be _ kind </s> / <|user|> / hello </s> / <|assistant|> / +hello +_ +world +</s> /
    <|user|> / how _ are _ you </s> / <|assistant|> / +fine +</s> /"""


@pytest.mark.parametrize(
    ("template", "eos", "marks"),
    [(CHATML, "<|im_end|>", CHATML_MARKS), (LLAMA3, "<|eot_id|>", LLAMA3_MARKS), (ZEPHYR, "</s>", ZEPHYR_MARKS)],
    ids=["chatml", "llama 3", "zephyr"],
)
@pytest.mark.parametrize("length", [512, 20])
def test_loss_mask_token_by_token_over_two_turns(template: str, eos: str, marks: str, length: int) -> None:
    tokenizer = make_tokenizer(template, eos)
    row = data.encode((Turn("system", "be kind"), *DIALOGUE), tokenizer, length)
    tokens = [tokenizer.decode([token]) for token in row.input_ids]
    found = [("+" if kept else "") + token for token, kept in zip(tokens, row.loss_mask, strict=True)]
    expected = [mark.replace("_", " ") if mark.strip("+") == "_" else mark for mark in marks.split()]
    expected = [mark.replace("/", "\n") if mark.strip("+") == "/" else mark for mark in expected]
    assert found == expected[:length]
    assert row.cut == (len(expected) > length)


def test_encode_every_token_text_only_and_system() -> None:
    tokenizer = make_tokenizer(CHATML, "<|im_end|>")
    assert all(data.encode(DIALOGUE, tokenizer, 512, assistant_only=False).loss_mask)
    assert data.encode((Turn("assistant", "hello world"),), tokenizer, 512).loss_mask == [True] * 3
    row = data.encode((Turn("system", "be kind"), *DIALOGUE[:2]), tokenizer, 512)
    assert supervised(tokenizer, row) == ["hello world<|im_end|>"]


def test_truncation_is_counted_once_and_rows_without_reply_are_dropped() -> None:
    tokenizer = make_tokenizer(CHATML, "<|im_end|>")
    rows = [data.encode(DIALOGUE, tokenizer, length) for length in (512, 12, 5)]
    assert [row.cut for row in rows] == [False, True, True]
    assert [len(row.input_ids) for row in rows] == [len(rows[0].input_ids), 12, 5]
    kept, cut = data.truncate(rows, 10)
    assert (len(kept), cut) == (2, 3)
    assert all(len(row.input_ids) == len(row.loss_mask) == 10 for row in kept)


def test_a_template_that_rewrites_history_or_refuses_roles_is_an_error() -> None:
    with pytest.raises(DataError, match="rewrites earlier turns"):
        data.encode(DIALOGUE, make_tokenizer(REWRITING, "<|im_end|>"), 512)
    conversations = [(Turn("system", "be kind"), *DIALOGUE), DIALOGUE]
    tokenizer = make_tokenizer(INST)
    with pytest.raises(DataError, match="no system turns"):
        data.encode_all(conversations, tokenizer, 512)
    rows, report = data.encode_all(conversations, tokenizer, 512, skip_bad_rows=True)
    assert (len(rows), report.read, report.skipped) == (1, 1, {"chat template": 1})


def test_collator_pads_right_with_masks_and_never_by_id() -> None:
    rows = [EncodedRow([0, 0, 7], [False, True, True]), EncodedRow([0], [True])]
    batch = Collator()(rows)
    assert batch["input_ids"].tolist() == [[0, 0, 7], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert [batch[name].dtype for name in ("input_ids", "attention_mask", "loss_mask")] == [
        torch.int64,
        torch.bool,
        torch.bool,
    ]


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
    conversations, report = data.read_conversations(path)
    assert conversations == [(Turn("user", "hello"), Turn("assistant", "fine"))] * 2
    assert (report.read, report.skipped) == (2, {})


def test_alpaca_input_questions_and_plain_text(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert data.parse_conversation(row, "x") == (Turn("user", "add\n\n1 2"), Turn("assistant", "3"))
    assert data.parse_conversation({"turns": ["a", "b"]}, "x") == (Turn("user", "a"), Turn("user", "b"))
    assert data.parse_conversation({"text": "a b"}, "x") == (Turn("assistant", "a b"),)
    path = tmp_path / "book.txt"
    path.write_text("\n\nfirst line\nsecond line\n\n \nanother\n")
    conversations, _ = data.read_conversations(path)
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
        monkeypatch.setattr(data, "MAX_LINE_BYTES", 300)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(DataError, match=found) as caught:
        data.read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")
    assert caught.value.exit_code == 3
    conversations, report = data.read_conversations(path, skip_bad_rows=True)
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
        data.read_conversations(path, skip_bad_rows=True)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.json", "gone.txt", "gone.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        data.read_conversations(tmp_path / name)


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"malformed JSON': 2"):
        data.read_conversations(path, skip_bad_rows=True)


def test_named_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["a", "b"]}) + "\n")
    monkeypatch.setattr(assets, "fetch", lambda _: questions)
    assert data.load_dataset_by_name("mtbench")[0] == [(Turn("user", "a"), Turn("user", "b"))]
    local = tmp_path / "rows.jsonl"
    local.write_bytes(GOOD + b"\n" + GOOD)
    assert len(data.load_dataset_by_name(str(local), max_rows=1)[0]) == 1
    with pytest.raises(UsageError, match="did you mean alpaca"):
        data.load_dataset_by_name("alpacca")
    with pytest.raises(DataError, match="cannot be read"):
        data.load_dataset_by_name(str(tmp_path / "gone.jsonl"))


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
    assert set(data.HUB_SOURCES) == set(HUB_CONTENT)
    save_as_on_the_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    conversations, report = data.load_dataset_by_name(name)
    assert conversations == HUB_CONTENT[name]
    assert (report.read, report.skipped) == (len(conversations), {})
    assert list((tmp_path / "cache").rglob("*.arrow"))
    # A part is streamed: nothing is prepared on disk.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "streamed")
    part, _ = data.load_dataset_by_name(name, max_rows=2)
    assert part == HUB_CONTENT[name][: 1 if name == "wikitext" else 2]
    assert not list((tmp_path / "streamed").rglob("*.arrow"))


def test_splits_of_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    save_as_on_the_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("test_sft", 1), ("train_sft[:2]", 2), ("train_sft+test_sft", 4)):
        assert len(data.load_dataset_by_name("ultrachat", split=split)[0]) == count
    assert len(data.load_dataset_by_name("ultrachat", split="train_sft[:2]", max_rows=1)[0]) == 1
    with pytest.raises(NetworkError, match="split none") as caught:
        data.load_dataset_by_name("ultrachat", split="none")
    assert "check the network and the split" in str(caught.value)


def test_a_hub_that_falls_silent_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise ConnectionError("reset")

    fake_hub(monkeypatch, load)
    with pytest.raises(NetworkError, match="after 1 rows: reset"):
        data.load_dataset_by_name("wikitext", max_rows=3)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nlong story"), FileNotFoundError("404"), ValueError("split")]
)
def test_an_unreachable_hub_names_the_alternative(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    fake_hub(monkeypatch, load)
    with pytest.raises(NetworkError, match="--dataset_name self") as caught:
        data.load_dataset_by_name("sharegpt")
    assert caught.value.exit_code == 7
    assert "long story" not in str(caught.value)


def test_hub_sources_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install datasets"):
        data.load_dataset_by_name("ultrachat")


@pytest.mark.parametrize(("top", "dtype"), [(2**16 - 1, torch.uint16), (2**16, torch.int32)])
def test_packing_round_trip(tmp_path: Path, top: int, dtype: torch.dtype) -> None:
    rows = [
        EncodedRow([1, top, 3], [False, True, True], greedy=True),
        EncodedRow([5, 6, 7, 8], [False, False, False, True], greedy=False),
    ]
    path = tmp_path / "new" / "rows.safetensors"
    data.save_packed(rows, path, {"base": "tiny"})
    packed, metadata = data.load_packed(path)
    assert packed.rows == rows
    assert (metadata, packed.reply_tokens, len(packed)) == ({"base": "tiny"}, 3, 2)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("tokens").dtype == dtype
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_packing_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        data.save_packed([], tmp_path / "x", {})
    path = tmp_path / "x.safetensors"
    data.save_packed([EncodedRow([1, 2], [False, True], greedy=True)], path, {})
    path.write_bytes(path.read_bytes()[:-3])
    for damaged in (path, tmp_path / "gone.safetensors"):
        with pytest.raises(DataError, match="expected a packed data set"):
            data.load_packed(damaged)


def test_split_holds_out_rows_without_overlap() -> None:
    rows = [EncodedRow([index], [True]) for index in range(100)]
    training, evaluation = data.split(rows, 3)
    assert isinstance(training, TokenDataset)
    assert len(evaluation) == 3
    assert sorted(row.input_ids[0] for row in [*training.rows, *evaluation.rows]) == list(range(100))
    assert len(data.split(rows, None)[1]) == 5
    with pytest.raises(DataError, match="at least 2 rows"):
        data.split(rows[:1], None)


def test_shared_ngrams_ignore_case_and_punctuation() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    references = data.word_ngrams(f"before, {text.upper()}! after")
    assert data.shares_ngram(f"Well... {text.replace(' ', ', ')}.", references)
    assert not data.shares_ngram(text.replace("seven", "7"), references)
    assert not data.shares_ngram("one two", references)


@pytest.mark.real_model
def test_no_packaged_prompt_shares_a_13_gram_with_mt_bench() -> None:
    questions = data.read_json_rows(assets.fetch("mt-bench"))
    references = {ngram for _, row in questions for turn in row["turns"] for ngram in data.word_ngrams(turn)}
    tokenizer = data.load_tokenizer("smollm2-135m-instruct")
    folder = Path(data.__file__).parent / "data"
    parts = [data.load_packed(path) for path in sorted(folder.glob("smollm2-135m-instruct-self*.safetensors"))]
    assert {metadata["fingerprint"] for _, metadata in parts} == {assets.ASSETS["smollm2-135m-instruct"].sha256}
    rows = [row for packed, _ in parts for row in packed.rows]
    assert len(rows) > 10_000
    texts = [tokenizer.decode(row.input_ids[: row.loss_mask.index(True)]) for row in rows]
    assert len(references) > 1000
    assert [text for text in texts if data.shares_ngram(text, references)] == []
    header = data.render(tokenizer, [{"role": "user", "content": "Hello"}], ask=True)[:20]
    assert all(row.input_ids[:20] == header for row in rows)
