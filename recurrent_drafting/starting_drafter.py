"""The drafter that a training run starts from: the one that was named, or a new one made from the verifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recurrent_drafting import cli
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig
from recurrent_drafting.data import check_tokenizer, tokenizer_fingerprint
from recurrent_drafting.decoding import check_fit
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import UsageError
from recurrent_drafting.token_rows import TokenDataset
from recurrent_drafting.trainer import choose_draft_vocabulary, initialise_from_verifier
from recurrent_drafting.verifier import Verifier

# A named drafter has these; the others, of beams, copies and recycling, are defaults of decoding that may change.
_SHAPE = {"exit_dim_multiplier", "draft_vocab_size", "rnn", "drafter_num_layers"}
DECODING = ("beam_width", "beam_length", "lookup_length", "recycled_nodes")


@dataclass(frozen=True)
class DrafterSettings:
    """What the drafter is; each field has the name of its flag.

    Args:
        phase: "train" or "eval"; an evaluation measures a named drafter.
        seed: key of a new drafter's random weights.
        drafter_num_layers: residual blocks of a new drafter.
        drafter_predict_n_tokens: depths that are trained.
        drafter_name_or_path: the drafter to go on with, None for a new one.
        exit_dim_multiplier: exit_dim of a new drafter, as a multiple of the hidden size.
        draft_vocab_size: tokens that a new drafter may propose, "0" for all, or "auto".
        rnn: a new drafter's hidden state is recurrent.
        beam_width: kept as the drafter's default; None leaves a named drafter its own, so do the next three.
        beam_length: the same.
        lookup_length: the same.
        recycled_nodes: the same.

    Raises:
        UsageError: a value is out of range, or an evaluation names no drafter.
    """

    phase: str
    seed: int
    drafter_num_layers: int
    drafter_predict_n_tokens: int
    drafter_name_or_path: str | None = None
    exit_dim_multiplier: float = 1.0
    draft_vocab_size: str = "auto"
    rnn: bool = RecurrentDraftingConfig.rnn
    beam_width: int | None = RecurrentDraftingConfig.beam_width
    beam_length: int | None = RecurrentDraftingConfig.beam_length
    lookup_length: int | None = RecurrentDraftingConfig.lookup_length
    recycled_nodes: int | None = RecurrentDraftingConfig.recycled_nodes

    def __post_init__(self) -> None:
        cli.require_least(self, {"drafter_num_layers": 0})
        if not 0 < self.exit_dim_multiplier < math.inf:
            raise UsageError(f"--exit_dim_multiplier must be > 0 and finite, got {self.exit_dim_multiplier}")
        if self.draft_vocab_size != "auto" and not self.draft_vocab_size.isdecimal():
            raise UsageError(f"--draft_vocab_size must be auto or a number >= 0, got {self.draft_vocab_size!r}")
        decoding = self.decoding_defaults()
        BeamConfig(**{name.removeprefix("beam_"): value for name, value in decoding.items()})
        if self.phase == "eval" and not self.drafter_name_or_path:
            raise UsageError("--phase eval measures a drafter: name it with --drafter_name_or_path")

    def refuse_shape(self, given: Collection[str]) -> None:
        """Refuse what shapes a new drafter where one is named.

        Args:
            given: fields that the user chose.

        Raises:
            UsageError: the drafter that was named has a shape already.
        """
        shaping = sorted(_SHAPE.intersection(given))
        if shaping and self.drafter_name_or_path:
            raise UsageError(
                f"--{shaping[0]} shapes a new drafter, and {self.drafter_name_or_path} has its shape: "
                "drop one of the two"
            )

    def decoding_defaults(self) -> dict[str, Any]:
        """Return what is to be kept of beams, copies and recycling, by name."""
        return {name: value for name in DECODING if (value := getattr(self, name)) is not None}


def prepare(
    settings: DrafterSettings, verifier: Verifier, tokenizer: Any, rows: TokenDataset, say: Callable[[str], None]
) -> Drafter:
    """Load the drafter that was named, or make a new one that starts from the verifier.

    Args:
        settings: what it is.
        verifier: the base.
        tokenizer: the base's.
        rows: training rows, whose replies decide what a new drafter may propose.
        say: told in a line how much of them it covers.

    Raises:
        ModelError: the named drafter does not load, or is of another base.
        UsageError: the draft vocabulary is larger than the base's.
    """
    if settings.drafter_name_or_path:
        return _named(settings, settings.drafter_name_or_path, verifier, tokenizer)
    token_ids, coverage = choose_draft_vocabulary(rows, settings.draft_vocab_size, verifier.vocab_size)
    say(f"draft vocabulary: {len(token_ids)} of {verifier.vocab_size} tokens, {coverage:.1%} of the reply tokens")
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        exit_dim=round(verifier.hidden_size * settings.exit_dim_multiplier),
        num_draft_layers=settings.drafter_num_layers,
        rnn=settings.rnn,
        draft_vocab_size=len(token_ids),
        num_draft_tokens=settings.drafter_predict_n_tokens,
        verifier_name_or_path=verifier.name_or_path,
        verifier_fingerprint=verifier.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **settings.decoding_defaults(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        drafter = Drafter(config)
    initialise_from_verifier(drafter, verifier, token_ids)
    return drafter


def _named(settings: DrafterSettings, name: str, verifier: Verifier, tokenizer: Any) -> Drafter:
    # Released weights may be in bfloat16, too coarse for the optimizer's steps.
    drafter = load_drafter(name)
    nn.Module.to(drafter, dtype=torch.float32)
    check_fit(verifier, drafter)
    check_tokenizer(tokenizer, drafter.config.tokenizer_fingerprint, verifier.name_or_path)
    for field, value in settings.decoding_defaults().items():
        setattr(drafter.config, field, value)
    if settings.phase == "train":
        drafter.config.num_draft_tokens = settings.drafter_predict_n_tokens
    return drafter
