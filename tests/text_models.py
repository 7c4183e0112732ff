"""A byte-level tokenizer with a chat template, and tiny models saved to disk, for script tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from recurrent_drafting import Drafter, RecurrentDraftingConfig, Verifier

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


class Models(NamedTuple):
    """Directories of a base and of a drafter for it."""

    base: str
    drafter: str


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the 256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BOS: 0, EOS: 1, **{char: index + 2 for index, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.chat_template = TEMPLATE
    return wrapped


def save_base(folder: Path, *, window: int = 512) -> Path:
    """Save a random base with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=window,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.4,
        ),
        dtype=torch.float32,
    )
    # Replies of printable characters: all other tokens are unlikely.
    other = [id_ for char, id_ in tokenizer.get_vocab().items() if not "!" <= char <= "~"]
    other += [0, 1]
    model.get_output_embeddings().weight.data[other] *= 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_drafter(folder: Path, base: Path | str, **overrides: object) -> Path:
    """Save a random drafter for a base."""
    torch.manual_seed(1)
    settings: dict[str, object] = {
        "hidden_size": 32,
        "vocab_size": 258,
        "num_draft_layers": 1,
        "verifier_name_or_path": str(base),
        **overrides,
    }
    Drafter(RecurrentDraftingConfig(**settings)).save_pretrained(folder)
    return folder


def load_verifier(base: Path | str, dtype: str = "fp32") -> Verifier:
    """Load a saved base."""
    return Verifier.from_pretrained(str(base), dtype, "cpu")


def save_chats(path: Path, count: int = 8, extra: str = "") -> Path:
    """Save conversations of one turn, and a text behind them."""
    rows = [{"prompt": f"question {index}", "response": f"the answer is {index * 7}"} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + extra)
    return path


def save_questions(path: Path, count: int = 3) -> Path:
    """Save a prompt file of two turns per question."""
    rows = [{"question_id": 80 + i, "category": "c", "turns": [f"first {i}", f"second {i}"]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
