"""Replies that the base writes anew, from the training script: what is asked, how many, how long, and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import train_speculator
from recurrent_drafting import AutoregressiveDecoder, GenerationOutput, engines, estimate, regeneration
from recurrent_drafting.engines import Request, TransformersEngine
from tests.faults.common import Capture, refused, train_argv
from tests.text_models import TEMPLATE, load_verifier

# As many published templates do: system turns and two user turns in a row are refused.
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + TEMPLATE
LENGTH = 200


@pytest.fixture
def strict_base(base: str, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(base, tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return str(folder)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def short_replies(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let replies have 9 tokens, so that several turns fit; return the prompts that are answered."""
    asked: list[list[int]] = []
    generate = TransformersEngine.generate

    def answer(self: TransformersEngine, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        asked.extend(request.prompt for request in requests)
        return generate(self, requests, min(max_new_tokens, 9))

    monkeypatch.setattr(TransformersEngine, "generate", answer)
    return asked


def save(*conversations: Sequence[tuple[str, str]]) -> str:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "chats.jsonl"


def talk(*questions: str) -> list[tuple[str, str]]:
    return [turn for question in questions for turn in (("user", question), ("assistant", "as given"))]


def argv(base: str, rows: str, *more: str) -> list[str]:
    own = ["--targets", "regenerated", "--model_max_length", str(LENGTH), "--serve_check_prompts", "0"]
    return train_argv(base, rows, *own, *more)


def run(base: str, rows: str, *more: str) -> int:
    return train_speculator.main(argv(base, rows, *more))


def test_a_conversation_ends_at_its_first_turn_without_room(
    strict_base: str, short_replies: list[list[int]], capsys: Capture
) -> None:
    """The turn after it would follow a turn without a reply, which the template refuses."""
    rows = save(*[talk("first", "x" * LENGTH, "third")] * 3, *[talk("first", "second", "third")] * 2)
    assert run(strict_base, rows) == 0
    assert "data: 9 replies written, left out {'no room for a reply': 3}" in capsys.readouterr().out
    assert len(short_replies) == 9


SYSTEM = ("system", "be kind")


def test_a_conversation_that_the_template_refuses_is_named_before_a_reply_is_written(
    strict_base: str, short_replies: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Those without a system turn would be answered a turn earlier."""
    rows = save(*[talk("first", "second")] * 2, [SYSTEM, *talk("first")], *[talk("first")] * 4)
    named = ("system, user", "--skip_bad_rows")
    refused(train_speculator.main, argv(strict_base, rows, "--dry_run"), 3, capsys, *named)
    monkeypatch.setattr(estimate, "_SAMPLE", 2)  # which the estimate does not look at
    refused(train_speculator.main, argv(strict_base, rows), 3, capsys, *named)
    assert short_replies == []


def test_questions_in_a_row_are_asked_one_after_the_other(
    strict_base: str, short_replies: list[list[int]], capsys: Capture
) -> None:
    """As prompt files have them; each is behind the reply to the one before."""
    Path("questions.jsonl").write_text((json.dumps({"turns": ["first", "second"]}) + "\n") * 4)
    assert run(strict_base, "questions.jsonl") == 0
    assert "data: 8 replies written, left out none" in capsys.readouterr().out
    assert len(short_replies) == 8


def test_refused_conversations_are_skipped_on_request_and_counted(
    strict_base: str, short_replies: list[list[int]], capsys: Capture
) -> None:
    rows = save(*[talk("first", "second")] * 3, [SYSTEM, *talk("first")], *[[SYSTEM, *talk("a", "b")]] * 2)
    assert run(strict_base, rows, "--skip_bad_rows", "--dry_run") == 0
    assert "data: 6 rows of" in capsys.readouterr().out
    assert run(strict_base, rows, "--skip_bad_rows") == 0
    assert "data: 6 replies written, left out {'chat template': 3}" in capsys.readouterr().out
    assert len(short_replies) == 6


def test_a_dry_run_of_given_replies_skips_them_too(strict_base: str, capsys: Capture) -> None:
    rows = save(*[talk("first", "second")] * 6, *[[SYSTEM, *talk("first")]] * 2)
    given = ["--targets", "ground_truth", "--dry_run"]
    refused(train_speculator.main, argv(strict_base, rows, *given), 3, capsys, "system, user", "--skip_bad_rows")
    assert run(strict_base, rows, *given, "--skip_bad_rows") == 0
    assert "data: 6 rows of" in capsys.readouterr().out


def test_no_more_replies_are_written_than_are_kept(base: str, short_replies: list[list[int]], capsys: Capture) -> None:
    rows = save(*[talk("first", "second", "third", "fourth")] * 12)
    for limit, mode in (("10", []), ("12", ["--dry_run"])):
        assert run(base, rows, "--max_train_samples", limit, *mode) == 0
    out = capsys.readouterr().out
    assert "data: 10 replies written, left out none" in out and "9 training rows" in out
    assert "data: 12 rows of 200 tokens, 12 to be written" in out
    assert len(short_replies) == 10


def test_a_limit_above_the_first_turns_takes_the_next_ones(
    base: str, short_replies: list[list[int]], capsys: Capture
) -> None:
    rows = save(*[talk("first", "second", "third")] * 2, [SYSTEM, *talk("first")], talk("x" * LENGTH, "second"))
    # Never as many rows as conversations: those without room for a reply give none.
    assert run(base, rows, "--max_train_samples", "4", "--per_device_train_batch_size", "1") == 0
    assert "data: 4 replies written, left out {'no room for a reply': 1}" in capsys.readouterr().out
    assert len(short_replies) == 4


def test_no_reply_is_decoded_further_than_it_can_be_kept(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is what an unlimited reply begins with."""
    length = 90
    decoded: list[int] = []
    found: list[Any] = []
    generate, regenerate = AutoregressiveDecoder.generate, regeneration.regenerate

    def counted(self: AutoregressiveDecoder, prompts: list[list[int]], *args: Any, **kwargs: Any) -> GenerationOutput:
        limits = kwargs["max_new_tokens"]
        if not isinstance(limits, int):  # estimates decode too
            decoded.extend(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        return generate(self, prompts, *args, **kwargs)

    def kept(*args: Any, **kwargs: Any) -> Any:
        found.append(regenerate(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(AutoregressiveDecoder, "generate", counted)
    monkeypatch.setattr(regeneration, "regenerate", kept)
    rows = save(*[talk("x" * (9 * (index % 5) + 1)) for index in range(engines.REPLY_BATCH + 3)])
    assert run(base, rows, "--model_max_length", str(length)) == 0
    assert decoded == [length] * (engines.REPLY_BATCH + 3)
    verifier = load_verifier(Path(base))
    for row in found[0][0][::4]:
        start = row.loss_mask.index(True)
        whole = generate(AutoregressiveDecoder(verifier), [row.input_ids[:start]], max_new_tokens=length).sequences[0]
        assert row.input_ids[start:] == engines.cut_loop(whole[: length - start])
