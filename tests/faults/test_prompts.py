"""Rows 6-11, 33 and 34: prompts, prompt files, ends of replies, the chat, and readers that leave."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate_speculator
import huggingface_deployment
import train_speculator
from recurrent_drafting import AutoregressiveDecoder, data
from tests.faults.common import Capture, Models, Pipe, generate, generate_argv, process, refused, train_argv
from tests.text_models import EOS, load_verifier, make_tokenizer

pytestmark = pytest.mark.slow

GOOD = {"question_id": 1, "category": "c", "turns": ["hello"], "prompt": "hello", "response": "the answer"}
WINDOW = 512
# What the chat template adds to one message of a prompt, in tokens.
AROUND = len("@user:") + len("@@assistant:")


def reply_of(models: Models, capsys: Capture, *argv: str) -> str:
    capsys.readouterr()
    assert generate(models, *argv) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize(
    ("way", "content"),
    [("--prompt", ""), ("--prompt", " \n\t"), ("--prompt_file", ""), ("--prompt_file", "\n\n"), ("stdin", " \n")],
)
def test_an_empty_prompt(
    models: Models, way: str, content: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    Path("p.txt").write_text(content)
    monkeypatch.setattr("sys.stdin", Pipe(content.encode()))
    argv = {"--prompt": ["--prompt", content], "--prompt_file": ["--prompt_file", "p.txt"], "stdin": []}[way]
    refused(generate_speculator.main, argv, 3, capsys, "is empty: expected a prompt of at least one character")


@pytest.mark.parametrize("how", [["--prompt", "hello"], ["--eval_file"]], ids=["prompt", "file"])
def test_a_prompt_of_no_tokens_and_no_bos(models: Models, questions: Path, how: list[str], capsys: Capture) -> None:
    shutil.copytree(models.base, "silent")
    Path("silent/chat_template.jinja").write_text("{% if false %}{% endif %}")
    argv = generate_argv(models, "--base_model", "silent", *how, *([str(questions)] if len(how) == 1 else []))
    refused(generate_speculator.main, argv, 3, capsys, "no tokens", "BOS")


# The faults of one line: content, and what the answer says of it.
LINES: dict[str, tuple[bytes, str]] = {
    "utf-8": (b'{"turns": ["\xff"]}', "expected UTF-8 text, got byte 0xff at byte 13"),
    "cut": (b'{"question_id": 1, "turns": ["a"', "malformed JSON"),
    "no JSON": (b"hello", "malformed JSON"),
    "number": (b'{"question_id": ' + b"9" * 5000 + b"}", "malformed JSON"),
    "nested": (b"[" * 200_000, "malformed JSON"),
    "no fields": (b'{"alpha": 1, "beta": 2}', "['alpha', 'beta']"),
    "a list": (b"[1, 2]", "list"),
    "a number": (b"7", "int"),
    "surrogate": (b'{"question_id": 1, "turns": ["\\ud800"], "category": "c"}', "Unicode"),
}


@pytest.mark.parametrize("fault", LINES)
@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_malformed_line_is_named(models: Models, fault: str, command: str, capsys: Capture) -> None:
    content, named = LINES[fault]
    Path("rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + content + b"\n")
    main, argv = {
        "generate": (generate_speculator.main, ["--eval_file", "rows.jsonl"]),
        "train": (train_speculator.main, train_argv(models.base, "rows.jsonl")),
    }[command]
    refused(main, argv, 3, capsys, "rows.jsonl:2", named)


@pytest.mark.parametrize("fault", LINES)
def test_a_malformed_line_can_be_skipped_and_is_counted(models: Models, fault: str, capsys: Capture) -> None:
    Path("rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + LINES[fault][0] + b"\n")
    assert generate(models, "--eval_file", "rows.jsonl", "--skip_bad_rows", "--max_generation_length", "0") == 0
    assert "1 bad rows skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role: expected 'from' to be one of human"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no user turn"),
        ({"messages": [{"content": "x"}]}, "expected a message with 'role' and 'content', found the keys ['content']"),
        ({"messages": ["x"]}, "expected a message with 'role' and 'content', found str"),
        ({"prompt": "x", "response": 7}, "expected 'response' to be a text, found int"),
        ({"prompt": "x"}, "found the keys ['prompt']"),
        ({"text": None}, "expected 'text' to be a text, found NoneType"),
    ],
)
def test_a_row_without_its_fields(models: Models, row: Any, named: str, capsys: Capture) -> None:
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    refused(train_speculator.main, train_argv(models.base, "rows.jsonl"), 3, capsys, "rows.jsonl:1", named)


@pytest.mark.parametrize("command", ["generate", "train"])
@pytest.mark.parametrize("content", [b"", b"\n\n  \n"], ids=["nothing", "blank"])
def test_an_empty_file(models: Models, command: str, content: bytes, capsys: Capture) -> None:
    Path("rows.jsonl").write_bytes(content)
    if command == "generate":
        refused(generate_speculator.main, ["--eval_file", "rows.jsonl"], 3, capsys, "rows.jsonl holds no question")
    else:
        refused(train_speculator.main, train_argv(models.base, "rows.jsonl"), 3, capsys, "rows.jsonl", "an empty file")


@pytest.mark.parametrize("content", [b"[", b"[1", b'["\xff"]', b"[" + b"9" * 5000 + b"]", b"[" * 100_000])
def test_a_list_that_does_not_parse(models: Models, content: bytes, capsys: Capture) -> None:
    Path("rows.json").write_bytes(content)
    refused(train_speculator.main, train_argv(models.base, "rows.json"), 3, capsys, "rows.json")


@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_line_of_100_mb(models: Models, command: str, capsys: Capture) -> None:
    with Path("rows.jsonl").open("wb") as file:
        file.write(json.dumps(GOOD).encode() + b'\n{"text": "')
        for _ in range(100):
            file.write(b"a" * 2**20)
    main, argv = {
        "generate": (generate_speculator.main, ["--eval_file", "rows.jsonl"]),
        "train": (train_speculator.main, train_argv(models.base, "rows.jsonl")),
    }[command]
    refused(main, argv, 3, capsys, "rows.jsonl:2: line too long: expected at most 67108864 bytes, got 104857610")
    Path("rows.jsonl").unlink()


def test_a_prompt_file_of_100_mb(capsys: Capture) -> None:
    with Path("p.txt").open("wb") as file:
        file.truncate(100 * 2**20)
    refused(generate_speculator.main, ["--prompt_file", "p.txt"], 3, capsys, "p.txt holds more than 67108864 bytes")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--prompt_file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt_file", "."], "cannot be read"),
        (["--eval_file", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--eval_file", "."], "cannot be read"),
        (["--prompt", "a\udcff"], "--prompt: expected UTF-8, got a byte that is none at character 2"),
    ],
)
def test_a_prompt_that_cannot_be_read(argv: list[str], named: str, capsys: Capture) -> None:
    refused(generate_speculator.main, argv, 3, capsys, named)


@pytest.mark.parametrize("content", [b"ok\n\xff", b"\xff\xfe", b"ok\n\n\xc3"])
@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_prompt_that_is_not_utf_8(content: bytes, way: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    Path("p.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", Pipe(content))
    line = content.count(b"\n") + 1
    where = f"p.txt:{line}" if way == "file" else f"standard input:{line}"
    argv = ["--prompt_file", "p.txt"] if way == "file" else []
    refused(generate_speculator.main, argv, 3, capsys, f"{where}: expected UTF-8")


@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1, 2000])
@pytest.mark.parametrize(
    "more", [[], ["--autoregressive"], ["--temperature", "1"]], ids=["greedy", "baseline", "noise"]
)
def test_a_prompt_as_long_as_the_window(models: Models, length: int, more: list[str], capsys: Capture) -> None:
    argv = generate_argv(models, "--prompt", "x" * (length - AROUND), "--base_model", models.base, *more)
    refused(generate_speculator.main, argv, 3, capsys, f"has {length} tokens", "context window", str(WINDOW))


@pytest.mark.parametrize("room", [1, 2, 5, 7])
@pytest.mark.parametrize("nodes", ["1", "6", "40"])
def test_generation_stops_at_the_window(models: Models, room: int, nodes: str, capsys: Capture) -> None:
    assert generate(models, "--prompt", "x" * (WINDOW - room - AROUND), "--max_tree_nodes", nodes) == 0
    err = capsys.readouterr().err
    assert f"[{room} tokens," in err and "finished by length" in err


# Special tokens


@pytest.mark.parametrize("prompt", ["a</s>b", "<s>", "</s></s>", "<s>assistant:x</s>"])
@pytest.mark.parametrize("padding", [None, EOS], ids=["no pad", "pad is EOS"])
def test_special_tokens_in_a_prompt(models: Models, prompt: str, padding: str | None, capsys: Capture) -> None:
    base = with_settings(models.base, eos=1, padding=padding)
    expected = reply_of(models, capsys, "--prompt", prompt, "--base_model", base, "--autoregressive")
    assert reply_of(models, capsys, "--prompt", prompt, "--base_model", base) == expected != ""


@pytest.mark.parametrize("at", [0, 2, 5])
def test_every_end_of_sequence_is_honoured(models: Models, at: int, capsys: Capture) -> None:
    text = reply_of(models, capsys, "--prompt", "hello")
    first = text.index(text[at])
    base = with_settings(models.base, eos=[1, make_tokenizer().convert_tokens_to_ids(text[at])], padding=EOS)
    for more in ([], ["--autoregressive"]):
        shown = reply_of(models, capsys, "--prompt", "hello", "--base_model", base, *more)
        assert shown == text[: first + 1]


def with_settings(base: str, *, eos: Any, padding: str | None) -> str:
    """Copy a base and give it other special tokens."""
    shutil.copytree(base, "special")
    for name in ("generation_config.json", "config.json"):
        path = Path("special") / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": eos}))
    path = Path("special/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": padding}))
    return "special"


# Ends of replies


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_stop_string_cuts_exactly(models: Models, start: int, size: int, capsys: Capture) -> None:
    text = reply_of(models, capsys, "--prompt", "hello")
    stop = text[start : start + size]
    for more in (["--beam_length", "2"], ["--beam_length", "6", "--max_tree_nodes", "30"], ["--autoregressive"]):
        shown = reply_of(models, capsys, "--prompt", "hello", "--base_model", models.base, "--stop", stop, *more)
        assert shown == text[: text.index(stop)]


def cyclic_base(models: Models, cycle: Sequence[int]) -> str:
    """Make a base that writes these tokens over and over: a layer adds nothing, the head knows what follows."""
    shutil.copytree(models.base, "cyclic")
    tensors = load_file("cyclic/model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    embedding, head = tensors["model.embed_tokens.weight"], torch.zeros_like(tensors["lm_head.weight"])
    colon = make_tokenizer().convert_tokens_to_ids(":")
    for token, following in [(colon, cycle[0]), *zip(cycle, [*cycle[1:], cycle[0]], strict=True)]:
        head[following] += 10 * embedding[token]
    tensors["lm_head.weight"] = head
    save_file(tensors, "cyclic/model.safetensors", {"format": "pt"})
    return "cyclic"


@pytest.mark.parametrize("character", ["é", "€", "\N{GRINNING FACE}"])
@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_a_character_of_several_tokens_comes_whole_or_not_at_all(
    models: Models, character: str, count: int, capsys: Capture
) -> None:
    cycle = make_tokenizer()(character, add_special_tokens=False)["input_ids"]
    assert len(cycle) == len(character.encode()) > 1
    argv = ["--prompt", "hello", "--base_model", cyclic_base(models, cycle), "--max_generation_length", str(count)]
    for more in ([], ["--autoregressive"]):
        assert reply_of(models, capsys, *argv, *more) == character * (count // len(cycle))


# Chat


def talk(models: Models, monkeypatch: pytest.MonkeyPatch, content: bytes, *argv: str) -> int:
    monkeypatch.setattr("sys.stdin", Pipe(content))
    return generate(models, "--interactive", *argv)


@pytest.mark.parametrize("content", [b"", b"\n", b"hello", b"hello\n/stats", b'"""\nnever closed', b"/exit\nhello"])
def test_a_chat_ends_with_its_input(
    models: Models, content: bytes, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert talk(models, monkeypatch, content) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out.count("[8 tokens") == (content.strip() != b"" and not content.startswith(b"/exit"))


@pytest.mark.parametrize("paste", [b"x" * 1_000_000, b"\xf0\x9f\x98\x80" * 50_000, b"word " * 100_000])
def test_a_very_long_paste_is_told_and_changes_nothing(
    models: Models, paste: bytes, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert talk(models, monkeypatch, b"hello\n/save before\n" + paste + b"\n/save after\n") == 0
    out = capsys.readouterr().out
    assert "the conversation is unchanged" in out and f"context window is {WINDOW}" in out
    assert Path("before").read_text() == Path("after").read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_cost_their_message_alone(
    models: Models, encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    content = "hé\n/save before\n".encode() + b"\xff\n/save a\xff\n/save after\nmore\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors=errors))
    assert generate(models, "--interactive") == 0
    out = capsys.readouterr().out
    assert out.count("error: ") == out.count("error: the message holds bytes that are no text: expected UTF-8") == 2
    assert Path("before").read_text() == Path("after").read_text()
    assert json.loads(Path("after").read_text())["messages"][0]["content"] == "hé"
    assert out.count("[8 tokens") == 2


def test_a_home_that_nobody_has(models: Models, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert talk(models, monkeypatch, b"/save ~no-such-user/x\nhello\n") == 0
    out = capsys.readouterr().out
    assert "error: ~no-such-user/x begins with a home that is not on this machine" in out and "[8 tokens" in out
    for main, argv in (
        (generate_speculator.main, ["--prompt", "a", "--speculator_path", "~no-such-user/x"]),
        (huggingface_deployment.main, ["--model_path", "~no-such-user/x", "--repo_name", "a/b"]),
    ):
        refused(main, argv, 2, capsys, "~no-such-user/x begins with a home")


class InterruptedScreen(io.StringIO):
    """A terminal whose user presses Ctrl-C when a number of characters of the first reply are shown."""

    def __init__(self, shown: int) -> None:
        super().__init__()
        self.left: int | None = shown

    def write(self, text: str) -> int:
        if self.left is not None and len(text) == 1 and text.isprintable():
            self.left -= 1
            if self.left == 0:
                self.left = None
                super().write(text)
                signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize("shown", [1, 3, 5])
@pytest.mark.parametrize("more", [[], ["--autoregressive"]], ids=["speculative", "baseline"])
def test_ctrl_c_during_a_reply(models: Models, shown: int, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = InterruptedScreen(shown)
    monkeypatch.setattr("sys.stdout", screen)
    talk_on = b"hello\n/save first\nmore\n/save second\n"
    assert talk(models, monkeypatch, talk_on, "--base_model", models.base, *more) == 0
    assert "(stopped)" in screen.getvalue()
    first = json.loads(Path("first").read_text())["messages"]
    second = json.loads(Path("second").read_text())["messages"]
    assert [message["role"] for message in second] == ["user", "assistant"] * 2 and second[:2] == first
    assert 0 < len(first[1]["content"]) < 8 and first[1]["content"] in screen.getvalue()
    # The next reply is the base's to exactly this history.
    prompt = data.render(make_tokenizer(), second[:3], ask=True)
    tokens = AutoregressiveDecoder(load_verifier(Path(models.base))).generate([prompt], max_new_tokens=8).sequences[0]
    assert make_tokenizer().decode(tokens) == second[3]["content"]


# Readers that leave


def test_a_reader_that_leaves_ends_the_scripts_quietly(models: Models) -> None:
    commands = [
        ("generate_speculator.py", generate_argv(models, "--prompt", "hello")),
        ("train_speculator.py", ["--help"]),
    ]
    running = [process(script, argv) for script, argv in commands]
    for started in running:
        assert started.stdout is not None
        started.stdout.close()
    for started in running:
        assert started.stderr is not None
        err = started.stderr.read()
        assert (started.wait(timeout=280), "Traceback" in err, "BrokenPipe" in err) == (0, False, False), err
        started.stderr.close()
