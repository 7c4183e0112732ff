"""Apple's layout: the round trip, an independent reading of the format, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recurrent_drafting import BeamConfig, Drafter, RecurrentDraftingConfig, beam_search, formats
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import ModelError

SIZES: dict[str, Any] = {"hidden_size": 8, "vocab_size": 90, "exit_dim": 12, "num_draft_layers": 2}
SHAPES: list[dict[str, Any]] = [{}, {"rnn": False}, {"exit_dim": 16}, {"num_draft_layers": 0, "draft_vocab_size": 90}]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOP, WIDTH, LENGTH = 50, 6, 4


def make(seed: int = 0, **overrides: Any) -> Drafter:
    torch.manual_seed(seed)
    drafter = Drafter(RecurrentDraftingConfig(**{**SIZES, **overrides}))
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            # Biases start at zero, which would hide a swapped one.
            if name.endswith("bias"):
                parameter.normal_()
        drafter.head.weight.mul_(4)
    return drafter


def run(*argv: str) -> int:
    return formats.main([*argv[:1], "--format", "apple", *argv[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", SHAPES)
def test_out_and_in_again_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    drafter = make(**overrides, verifier_name_or_path="base", beam_width=7).to(dtype)
    drafter.save_pretrained(tmp_path / "ours")
    assert run("export", str(tmp_path / "ours"), str(tmp_path / "apple")) == 0
    assert run("import", str(tmp_path / "apple"), str(tmp_path / "back")) == 0
    before, after = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    loaded = load_drafter(str(tmp_path / "back"))
    for name in RecurrentDraftingConfig.__annotations__:
        assert getattr(loaded.config, name, None) == getattr(drafter.config, name, None), name
    assert run("export", str(tmp_path / "back"), str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "apple" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == json.loads(
        (tmp_path / "apple" / CONFIG).read_text()
    )


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    formats.export_apple(make(), tmp_path / "apple")
    record = json.loads((tmp_path / "apple" / CONFIG).read_text())
    expected = {**SIZES, "model_type": "recurrent_drafting_drafter", "num_lookback_tokens": -1, "rnn": True}
    assert {key: record[key] for key in expected} == expected
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "apple" / WEIGHTS).items()}
    assert shapes == {
        "input_proj.weight": (12, 16),
        "input_proj.bias": (12,),
        "lm_head.0.linear.weight": (12, 12),
        "lm_head.0.linear.bias": (12,),
        "lm_head.1.linear.weight": (12, 12),
        "lm_head.1.linear.bias": (12,),
        "lm_head.2.weight": (90, 12),
        "rnn_u.weight": (8, 8),
        "rnn_u.bias": (8,),
        "rnn_w.weight": (8, 8),
    }


class ApplesReading:
    """The format as its own users read it: plain tensors, and none of this package."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / CONFIG).read_text())
        self.weights = load_file(directory / WEIGHTS)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        if not self.config["rnn"]:
            return embedding + state
        return nn.functional.silu(self.linear("rnn_w", embedding) + self.linear("rnn_u", state))

    def log_probs(self, hidden: Tensor, state: Tensor) -> Tensor:
        x = torch.cat([hidden, state])
        if self.config["exit_dim"] != 2 * self.config["hidden_size"]:
            x = self.linear("input_proj", x)
        for layer in range(self.config["num_draft_layers"]):
            x = x + nn.functional.silu(self.linear(f"lm_head.{layer}.linear", x))
        logits = self.linear(f"lm_head.{self.config['num_draft_layers']}", x)
        return logits.masked_fill(logits < logits.topk(TOP).values[-1], -50000.0).log_softmax(0)

    def beams(self, hidden: Tensor, root: int, table: Tensor, length: int) -> list[tuple[list[int], float]]:
        """Return the best beams of ``length`` tokens, which here count the root."""
        kept = [([root], 0.0, self.next_state(torch.zeros_like(hidden), table[root]))]
        while len(kept[0][0]) < length:
            longer = []
            for tokens, score, state in kept:
                scores = score + self.log_probs(hidden, state)
                longer += [([*tokens, token], float(scores[token]), state) for token in range(len(table))]
            best = sorted(longer, key=lambda beam: -beam[1])[:WIDTH]
            kept = [(tokens, score, self.next_state(state, table[tokens[-1]])) for tokens, score, state in best]
        return [(tokens, score) for tokens, score, _ in kept]


class CutDrafter(Drafter):
    """Ours, with their cut to the best 50 tokens."""

    def logits(self, context: Tensor, state: Tensor) -> Tensor:
        logits = super().logits(context, state)
        return logits.masked_fill(logits < logits.topk(TOP).values[..., -1:], -50000.0)


@pytest.mark.parametrize("overrides", SHAPES)
def test_an_independent_reading_of_the_export_finds_the_same_beams(tmp_path: Path, overrides: dict[str, Any]) -> None:
    drafter = make(**overrides).double()
    formats.export_apple(drafter, tmp_path / "apple")
    cut = CutDrafter(drafter.config).double()
    cut.load_state_dict(drafter.state_dict())
    reading = ApplesReading(tmp_path / "apple")
    table, contexts, roots = torch.randn(90, 8).double(), torch.randn(5, 8).double(), torch.tensor([0, 3, 89, 41, 7])
    with torch.no_grad():
        beam = BeamConfig(width=WIDTH, length=LENGTH)
        found = beam_search.draft(cut, contexts, roots, lambda ids: table[ids], beam)
    for row, root in enumerate(roots.tolist()):
        expected = reading.beams(contexts[row], root, table, LENGTH + 1)
        assert [path(found, row, index, root) for index in range(WIDTH)] == [tokens for tokens, _ in expected]
        torch.testing.assert_close(
            found.log_probs[row, -1], torch.tensor([score for _, score in expected]), atol=1e-4, rtol=1e-5
        )


def path(beams: Any, row: int, index: int, root: int) -> list[int]:
    """Follow a beam of the last depth back to the root."""
    tokens: list[int] = []
    for depth in reversed(range(LENGTH)):
        tokens.append(int(beams.tokens[row, depth, index]))
        index = int(beams.parents[row, depth, index])
    return [root, *reversed(tokens)]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"draft_vocab_size": 30}, "it drafts from 30 of 90 tokens, and Apple's head scores all of them"),
        ({"emb_norm": True}, "it normalises embeddings"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    tmp_path: Path, overrides: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(**overrides).save_pretrained(tmp_path / "ours")
    capsys.readouterr()
    assert run("export", str(tmp_path / "ours"), str(tmp_path / "apple")) == 4
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
    assert not (tmp_path / "apple").exists()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / CONFIG).unlink(), CONFIG),
        (lambda folder: (folder / CONFIG).write_text("[]"), "expected an object of settings, got list"),
        (lambda folder: (folder / CONFIG).write_text('{"model_type": "llama"}'), "got model_type 'llama'"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), WEIGHTS),
        (lambda folder: edit(folder, lambda tensors: tensors.pop("rnn_u.bias")), "missing ['rnn_u.bias']"),
        (lambda folder: edit(folder, lambda tensors: tensors.update(extra=torch.ones(1))), "unexpected ['extra']"),
        (
            lambda folder: edit(folder, lambda tensors: tensors.update({"rnn_u.bias": torch.ones(3)})),
            "expected rnn_u.bias of shape [8] by config.json, got [3]",
        ),
        (
            lambda folder: edit(folder, lambda tensors: tensors["rnn_u.bias"].fill_(float("nan"))),
            "rnn_u.bias holds NaN",
        ),
    ],
)
def test_a_damaged_import_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], object], named: str) -> None:
    formats.export_apple(make(), tmp_path / "apple")
    damage(tmp_path / "apple")
    with pytest.raises(ModelError) as caught:
        formats.import_apple(tmp_path / "apple")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "ours")
    assert run("export", str(tmp_path / "ours"), str(tmp_path / "ours")) == 2
    assert "is not empty: name a new directory" in capsys.readouterr().err
    load_drafter(str(tmp_path / "ours"))


@pytest.mark.filterwarnings("ignore:'recurrent_drafting.checkpoint' found in sys.modules")
def test_the_command_is_that_of_the_checkpoint_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "ours")
    monkeypatch.delitem(sys.modules, "recurrent_drafting.formats")
    arguments = ["export", "--format", "apple", str(tmp_path / "ours"), str(tmp_path / "apple")]
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *arguments])
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("recurrent_drafting.checkpoint", run_name="__main__", alter_sys=True)
    assert leave.value.code == 0
    assert (tmp_path / "apple" / WEIGHTS).is_file()
