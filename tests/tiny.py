"""Tiny random models and drafters for identity and shape tests, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from recurrent_drafting import Drafter, RecurrentDraftingConfig, SpeculativeDecoder, Verifier
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.decoding import _Batch
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.metrics import DecodingStats

VOCAB = 61


def llama_config() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )


def gpt2_config() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"llama": llama_config, "gpt2": gpt2_config}


def make_verifier(
    family: str, *, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float64
) -> Verifier:
    config = CONFIGS[family]()
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return Verifier(AutoModelForCausalLM.from_config(config, dtype=dtype), name_or_path=f"tiny-{family}")


def make_drafter(verifier: Verifier, *, seed: int = 0, **overrides: object) -> Drafter:
    torch.manual_seed(seed)
    settings: dict[str, object] = {"num_draft_layers": 1, "draft_vocab_size": None, **overrides}
    config = RecurrentDraftingConfig(hidden_size=verifier.hidden_size, vocab_size=verifier.vocab_size, **settings)
    drafter = Drafter(config)
    if config.draft_vocab_size:
        drafter.draft_token_ids.copy_(torch.randperm(verifier.vocab_size)[: config.draft_vocab_size].sort().values)
    return drafter.to(verifier.dtype)


class NoisyOracleDecoder(SpeculativeDecoder):
    """Propose the true next token with a given probability, at any sibling rank.

    Random drafters on random models accept almost nothing; this one makes acceptance partial and
    the kept cache rows non-contiguous, while all else is the decoder under test.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter,
        beam: BeamConfig,
        probability: float,
        seed: int,
    ) -> None:
        super().__init__(verifier, drafter, beam)
        self.truth: list[list[int]] = []
        self.steps = self.partly_accepted = self.moved = 0
        self._probability = probability
        self._random = random.Random(seed)

    def _propose(self, batch: _Batch) -> DraftTree:
        rows = [self._beams(self._future(batch, row)) for row in range(len(batch.replies))]
        tokens, parents, scores = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return DraftTree.from_beams(batch.root, Beams(tokens, parents, scores), self._max_tree_nodes)

    def _prefill(self, batch: _Batch, rows: Sequence[int], stats: DecodingStats) -> None:
        first = not any(batch.cache.lengths)
        super()._prefill(batch, rows, stats)
        keep = batch.cache.keep

        def count_and_keep(paths: Sequence[Sequence[int]]) -> None:
            for path in paths:
                self.steps += 1
                self.partly_accepted += 1 < len(path) <= self.beam.length
                self.moved += list(path) != list(range(len(path)))
            keep(paths)

        if first:  # the prompts themselves do not count
            batch.cache.keep = count_and_keep  # type: ignore[method-assign]

    def _future(self, batch: _Batch, row: int) -> list[int]:
        """Return the true tokens after the root of a live row."""
        reply = batch.replies[row]
        return self.truth[reply.row][len(reply.tokens) :]

    def _beams(self, future: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width, length = self.beam.width, self.beam.length
        tokens = torch.zeros(length, width, dtype=torch.long)
        parents = torch.zeros(length, width, dtype=torch.long)
        scores = torch.zeros(length, width)
        on_path: int | None = 0
        total = torch.zeros(width)
        for depth in range(length):
            parents[depth] = torch.tensor([self._random.randrange(width) if depth else 0 for _ in range(width)])
            drawn = self._random.sample(range(VOCAB), width)
            truth = future[depth] if depth < len(future) else None
            place = None
            if on_path is not None and truth is not None and self._random.random() < self._probability:
                place = self._random.randrange(width)
                if truth in drawn:
                    drawn[drawn.index(truth)] = drawn[place]
                drawn[place] = truth
                parents[depth, place] = on_path
            tokens[depth] = torch.tensor(drawn)
            step = torch.tensor([-self._random.random() for _ in range(width)])
            if place is not None:
                step[place] *= 0.3  # a good drafter believes in the true token
            total = total[parents[depth]] + step if depth else step
            scores[depth] = total
            on_path = place
        return tokens, parents, scores
