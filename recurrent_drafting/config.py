"""Validated settings: the drafter's shape, the beam, and the sampling pipeline.

Each default is written here once; argparse and the docs read it from these classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from recurrent_drafting.errors import UsageError


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {got!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Tell whether a value is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_token_sequences(value: object) -> bool:
    """Tell whether a value is a sequence of non-empty sequences of token ids."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, (list, tuple)) and word for word in value):
        return False
    return all(_is_int(token) and token >= 0 for word in value for token in word)


@dataclass(frozen=True)
class BeamConfig:
    """Shape of the beam search and of the draft tree.

    >>> BeamConfig(max_nodes=0)
    Traceback (most recent call last):
        ...
    recurrent_drafting.errors.UsageError: max_nodes must be an integer >= 1 or None, got 0

    Args:
        width: beams kept at each depth (W).
        length: tokens drafted after the root per beam (L).
        max_nodes: nodes of the draft tree that are verified, the root included (N);
            ``None`` verifies every beam kept at every depth, W * L + 1 nodes.
        coupling: temperature s of the drafter's own error in coupled drafting, in units of its logits before
            the request's temperature; 0 turns coupling off, and trees chosen by cost allow for somewhat more. It has
            no effect on greedy decoding.
        lookup_length: tokens copied from the text's own past where its last ones stood before (prompt lookup);
            they compete with the drafter's for the tree's nodes. 0, as in the paper, copies nothing.
        recycled_nodes: verified nodes that are remembered, so that what the verifier said there is mixed into the
            drafter's distribution where their token comes again (token recycling). 0, as in the paper, none.

    Raises:
        UsageError: a value is out of range.
    """

    width: int = 10
    length: int = 4
    max_nodes: int | None = None
    coupling: float = 1.0
    lookup_length: int = 0
    recycled_nodes: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, f"beam {name}", "an integer >= 1", value)
        if self.max_nodes is not None:
            valid = _is_int(self.max_nodes) and self.max_nodes >= 1
            _require(valid, "max_nodes", "an integer >= 1 or None", self.max_nodes)
        valid = _is_number(self.coupling) and self.coupling >= 0
        _require(valid, "coupling", "a finite number >= 0", self.coupling)
        valid = _is_int(self.lookup_length) and self.lookup_length >= 0
        _require(valid, "lookup_length", "an integer >= 0", self.lookup_length)
        valid = _is_int(self.recycled_nodes) and self.recycled_nodes >= 0
        _require(valid, "recycled_nodes", "an integer >= 0", self.recycled_nodes)


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of the one sampling pipeline that the baseline and the speculative decoder share.

    >>> SamplingConfig().greedy, SamplingConfig(temperature=0.7).greedy
    (True, False)
    >>> SamplingConfig(top_p=0)
    Traceback (most recent call last):
        ...
    recurrent_drafting.errors.UsageError: top_p must be in (0, 1], got 0

    Args:
        temperature: 0 is greedy; otherwise the divisor of the logits.
        top_k: tokens kept by rank; 0 keeps all.
        top_p: probability mass kept, in (0, 1].
        min_p: smallest probability kept, as a share of the most likely token's, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in
            the prompt or the reply; 1 is off.
        presence_penalty: subtracted once from the logit of each token of the reply.
        frequency_penalty: subtracted per occurrence in the reply.
        min_new_tokens: end-of-sequence tokens are barred before this many new tokens.
        bad_words_ids: token sequences that are never completed.
        seed: key of the position-keyed noise.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            _is_number(self.temperature) and self.temperature >= 0,
            "temperature",
            "a finite number >= 0",
            self.temperature,
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "an integer >= 0", self.top_k)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a finite number > 0",
            self.repetition_penalty,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value), name, "a finite number", value)
        valid = _is_int(self.min_new_tokens) and self.min_new_tokens >= 0
        _require(valid, "min_new_tokens", "an integer >= 0", self.min_new_tokens)
        _require(_is_int(self.seed), "seed", "an integer", self.seed)
        _require(
            _are_token_sequences(self.bad_words_ids),
            "bad_words_ids",
            "a tuple of non-empty token sequences",
            self.bad_words_ids,
        )
        object.__setattr__(self, "bad_words_ids", tuple(tuple(word) for word in self.bad_words_ids))

    @property
    def greedy(self) -> bool:
        """Tell whether picks are free of noise."""
        return self.temperature == 0


@dataclass(frozen=True)
class SweepGrid:
    """Settings that a sweep tries, each with each.

    Args:
        widths: beam widths W.
        lengths: beam lengths L.
        nodes: tree nodes N; None follows the measured latency curve.
        temperatures: of the sampling.

    Raises:
        UsageError: a value is out of range.
    """

    widths: tuple[int, ...] = (1, 4, 10)
    lengths: tuple[int, ...] = (2, 4)
    nodes: tuple[int | None, ...] = (None, 16)
    temperatures: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self.beams()
        for temperature in self.temperatures:
            SamplingConfig(temperature=temperature)

    def beams(self) -> list[BeamConfig]:
        """Return every shape once."""
        return list(
            dict.fromkeys(BeamConfig(w, n, nodes) for nodes in self.nodes for w in self.widths for n in self.lengths)
        )


class RecurrentDraftingConfig(PretrainedConfig):
    """Shape of a drafter and the verifier it was trained for.

    Args:
        hidden_size: width H of the verifier's hidden state and embeddings.
        vocab_size: the verifier's vocabulary V.
        exit_dim: width D of the residual blocks and the head; default ``hidden_size``. With
            ``2 * hidden_size`` there is no input projection (paper, section 3).
        num_draft_layers: residual blocks before the head.
        rnn: update the state by the recurrence; ``False`` adds the embedding instead.
        emb_norm: normalise token embeddings (parameter-free layer norm) before the recurrence.
        draft_vocab_size: the V_d most useful tokens that may be drafted; ``None`` is all V.
        num_draft_tokens: depths K the drafter was trained for.
        beam_width: default beam width W.
        beam_length: default beam length L.
        lookup_length: default number of tokens that prompt lookup copies.
        recycled_nodes: default number of verified nodes that are remembered.
        verifier_name_or_path: the base model it was trained for, for messages and defaults.
        verifier_fingerprint: identity of the base model's weights, ``None`` if unknown.
        tokenizer_fingerprint: identity of the vocabulary, ``None`` if unknown.

    Raises:
        UsageError: a size is out of range.
    """

    model_type = "recurrent_drafting_drafter"

    hidden_size: int = 768
    vocab_size: int = 50257
    exit_dim: int | None = None
    num_draft_layers: int = 2
    rnn: bool = True
    emb_norm: bool = False
    draft_vocab_size: int | None = None
    num_draft_tokens: int = 4
    beam_width: int = BeamConfig.width
    beam_length: int = BeamConfig.length
    lookup_length: int = BeamConfig.lookup_length
    recycled_nodes: int = BeamConfig.recycled_nodes
    verifier_name_or_path: str | None = None
    verifier_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.exit_dim is None:
            self.exit_dim = self.hidden_size
        for name in ("hidden_size", "vocab_size", "exit_dim", "num_draft_tokens"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, name, "an integer >= 1", value)
        valid = _is_int(self.num_draft_layers) and self.num_draft_layers >= 0
        _require(valid, "num_draft_layers", "an integer >= 0", self.num_draft_layers)
        for name in ("rnn", "emb_norm"):
            _require(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        if self.draft_vocab_size is not None:
            valid = _is_int(self.draft_vocab_size) and 1 <= self.draft_vocab_size <= self.vocab_size
            expected = f"in 1..vocab_size ({self.vocab_size}) or None"
            _require(valid, "draft_vocab_size", expected, self.draft_vocab_size)
        self.beam  # noqa: B018 - checks its values
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def beam(self) -> BeamConfig:
        """Return how the drafter is meant to draft, its whole tree verified."""
        return BeamConfig(
            width=self.beam_width,
            length=self.beam_length,
            lookup_length=self.lookup_length,
            recycled_nodes=self.recycled_nodes,
        )


AutoConfig.register(RecurrentDraftingConfig.model_type, RecurrentDraftingConfig, exist_ok=True)
