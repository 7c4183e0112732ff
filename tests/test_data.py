"""The chat template, its loss mask, and the faults of both."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recurrent_drafting import data, token_rows
from recurrent_drafting.errors import DataError
from recurrent_drafting.sources import Turn
from recurrent_drafting.token_rows import EncodedRow

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
    kept, cut = token_rows.truncate(rows, 10)
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
