"""Rows 17-19: numbers that are none, and memory that runs out."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import generate_speculator
import train_speculator
from recurrent_drafting import Verifier, assets
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.tree_budget import LatencyCurve
from recurrent_drafting.verifier import VerifierOutput
from tests.faults.common import Capture, Models, generate, generate_argv, refused, train_argv
from tests.text_models import make_tokenizer, save_drafter

pytestmark = pytest.mark.slow

HUGE = 3e38
EXBIBYTE = 1 << 60


def fragile_base(base: str, before: str) -> str:
    """Make a base that writes these characters, then "q", after which a logit overflows.

    No layer adds anything, so a hidden state is the last token's embedding. The last dimension belongs to "q" alone.
    """
    shutil.copytree(base, "fragile")
    tensors = load_file("fragile/model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    embedding, head = tensors["model.embed_tokens.weight"], torch.zeros_like(tensors["lm_head.weight"])
    ids = [make_tokenizer().convert_tokens_to_ids(character) for character in f":{before}q"]
    embedding[:, -1] = 0
    embedding[ids[-1]] = 0
    embedding[ids[-1], -1] = 1
    for token, following in itertools.pairwise(ids):
        head[following] += 10 * embedding[token]
    head[5, -1] = HUGE
    tensors["lm_head.weight"] = head
    save_file(tensors, "fragile/model.safetensors", {"format": "pt"})
    return "fragile"


@pytest.mark.parametrize("before", ["", "a", "abc", "abcdef"])
@pytest.mark.parametrize("more", [[], ["--autoregressive"], ["--temperature", "0.01"], ["--beam_width", "30"]])
def test_a_verifier_that_is_not_finite_names_step_and_row(
    models: Models, before: str, more: list[str], capsys: Capture
) -> None:
    argv = generate_argv(models, "--prompt", "hello", "--base_model", fragile_base(models.base, before), *more)
    named = f"verifier logits are not finite at new token {len(before) + 1} of row 0"
    refused(generate_speculator.main, argv, 6, capsys, named, "--dtype fp32")


def test_the_row_of_a_batch_is_named(models: Models, capsys: Capture) -> None:
    base = fragile_base(models.base, "ab")
    rows = [{"question_id": number, "category": "c", "turns": [f"x{number}"]} for number in (4, 9)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = generate_argv(models, "--base_model", base, "--eval_file", "q.jsonl", "--batch_size", "2")
    refused(generate_speculator.main, argv, 6, capsys, "at new token 3 of row 0 (request ")


def broken_drafter(models: Models, name: str, rows: slice) -> Models:
    """Make finite weights whose products are not."""
    folder = Path(shutil.copytree(models.drafter, "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name][rows] = HUGE
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Models(models.base, "./broken")


@pytest.mark.parametrize("name", ["head.weight", "input_proj.weight", "rnn_w.weight", "blocks.0.linear.weight"])
@pytest.mark.parametrize(
    "more",
    [[], ["--temperature", "0.9"], ["--temperature", "0.9", "--top_k", "3"], ["--max_tree_nodes", "auto"]],
    ids=["greedy", "noise", "few", "auto"],
)
def test_a_drafter_that_is_not_finite_proposes_nothing(
    models: Models,
    name: str,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: Capture,
) -> None:
    # With "auto" drafting must pay, on a busy machine too.
    monkeypatch.setattr(LatencyCurve, "measure", lambda *_, **__: LatencyCurve((1, 64), (1.0, 1.0)))
    monkeypatch.setenv(assets.CACHE_VARIABLE, "cache")
    argv = ["--prompt", "hello", "--base_model", models.base, "--max_generation_length", "24", *more]
    assert generate(models, *argv, "--autoregressive") == 0
    expected = capsys.readouterr().out
    assert generate(broken_drafter(models, name, slice(None)), *argv) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert sum("logits are not finite in a step" in message for message in caplog.messages) == 1
    assert "tau 1.00" in err


@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_drafter_that_is_sometimes_not_finite(
    models: Models, questions: Path, batch: str, caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    """One logit of many overflows, for some contexts only."""
    argv = ["--eval_file", str(questions), "--batch_size", batch, "--verify_lossless", "--temperature", "0.9"]
    assert generate(broken_drafter(models, "head.weight", slice(40, 41)), *argv) == 0
    assert "identical outputs 3/3" in capsys.readouterr().out


# Memory


def exhausted(*_: Any, **__: Any) -> Any:
    """Let torch's own allocator refuse."""
    return torch.empty(EXBIBYTE, dtype=torch.uint8)


def limit_memory(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoding find no memory for larger trees; the trees that probe a base when it is loaded are spared."""
    verify, probe, probing = Verifier.verify, Verifier._probe_tree, [False]

    def limited(self: Verifier, tree: DraftTree, cache: Any) -> VerifierOutput:
        return exhausted() if tree.num_nodes > nodes and not probing[0] else verify(self, tree, cache)

    def spared(self: Verifier, *args: Any) -> torch.Tensor:
        probing[0] = True
        try:
            return probe(self, *args)
        finally:
            probing[0] = False

    monkeypatch.setattr(Verifier, "verify", limited)
    monkeypatch.setattr(Verifier, "_probe_tree", spared)


@pytest.mark.parametrize("nodes", [1, 2, 5, 11])
@pytest.mark.parametrize("more", [[], ["--temperature", "0.9"]], ids=["greedy", "noise"])
def test_trees_shrink_when_memory_runs_out(
    models: Models, nodes: int, more: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: Capture,
) -> None:  # fmt: skip
    argv = ["--prompt", "hello", "--base_model", models.base, "--max_generation_length", "24", *more]
    assert generate(models, *argv, "--autoregressive") == 0
    expected = capsys.readouterr().out
    limit_memory(nodes, monkeypatch)
    assert generate(models, *argv, "--max_tree_nodes", "16") == 0
    assert capsys.readouterr().out == expected
    shrunk = [message for message in caplog.messages if message.startswith("no memory to verify")]
    assert shrunk[0] == "no memory to verify 16 nodes: trees shrink to 8 from here on; the text is the same"
    assert len(shrunk) == {1: 4, 2: 3, 5: 2, 11: 1}[nodes]


@pytest.mark.parametrize("more", [[], ["--autoregressive"]], ids=["speculative", "baseline"])
def test_no_memory_for_a_single_node(
    models: Models, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    limit_memory(0, monkeypatch)
    argv = generate_argv(models, "--prompt", "hello", "--base_model", models.base, *more)
    line = refused(generate_speculator.main, argv, 5, capsys, f"{EXBIBYTE} bytes were wanted")
    assert "bytes were wanted, " in line and "are free" in line


@pytest.mark.parametrize("more", [[], ["--autoregressive"]], ids=["speculative", "baseline"])
def test_no_memory_for_the_cache(models: Models, more: list[str], capsys: Capture) -> None:
    """A window without end lets the reply be as long as asked for."""
    shutil.copytree(models.base, "endless")
    path = Path("endless/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 1 << 50}))
    argv = generate_argv(models, "--prompt", "a", "--base_model", "endless", "--max_generation_length", str(10**13))
    refused(generate_speculator.main, [*argv, *more], 5, capsys, "out of memory", "bytes were wanted", "are free")


@pytest.mark.parametrize("command", ["generate", "train"])
def test_no_memory_for_the_base(
    models: Models, chats: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhausted)
    main, argv = {
        "generate": (generate_speculator.main, generate_argv(models, "--prompt", "a")),
        "train": (train_speculator.main, train_argv(models.base, chats)),
    }[command]
    refused(main, argv, 5, capsys, f"base model {models.base}", f"{EXBIBYTE} bytes were wanted", "are free")


def test_a_sound_drafter_beside_all_this(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is warned of where nothing is wrong."""
    sound = Models(models.base, str(save_drafter(tmp_path / "sound", Path(models.base))))
    assert generate(sound, "--prompt", "hello", "--temperature", "0.9", "--top_k", "2") == 0
    assert caplog.messages == []
