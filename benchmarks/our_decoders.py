"""Our two decoders over one base, as ``peers.py`` and its compiled worker time them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from recurrent_drafting import AutoregressiveDecoder, SamplingConfig, SpeculativeDecoder, Verifier, evaluation
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable, batch_sizes

Batch = Sequence[Sequence[int]]


class Answer(NamedTuple):
    """What a method makes of some prompts: texts, seconds, and the counters of a decoder of ours."""

    texts: list[list[int]]
    seconds: float
    stats: DecodingStats | None = None


class OurDecoders:
    """The baseline and the speculative decoder.

    Args:
        verifier: the base of both.
        drafter: a drafter for it.
        batch_size: prompts decoded at a time.
        max_tree_nodes: None is chosen by cost.
        changes: fields of the drafter's ``BeamConfig``.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter,
        *,
        batch_size: int = 1,
        max_tree_nodes: int | None = None,
        **changes: int,
    ) -> None:
        beam = replace(drafter.config.beam, max_nodes=max_tree_nodes, **changes)
        settings = evaluation.RunSettings(verifier.name_or_path, None, batch_size=batch_size, beam=beam)
        self.baseline = AutoregressiveDecoder(verifier)
        self.speculative = evaluation.speculative_decoder(verifier, drafter, settings)
        self._batch_size = batch_size

    @property
    def beam(self) -> dict[str, Any]:
        """Return the fields of the beam's shape."""
        return asdict(self.speculative.beam)

    def answer(self, speculative: bool, prompts: Batch, new_tokens: int, temperature: float) -> Answer:
        """Answer prompts with one of the two."""
        decoder: AutoregressiveDecoder | SpeculativeDecoder = self.speculative if speculative else self.baseline
        sampling = SamplingConfig(temperature=temperature, seed=1)
        start = time.perf_counter()
        output = decoder.generate(prompts, max_new_tokens=new_tokens, sampling=sampling, batch_size=self._batch_size)
        return Answer(output.sequences, time.perf_counter() - start, output.stats)

    def time_curve(self) -> LatencyCurve | None:
        """Time the costs of trees anew, at the full batch; None where trees have a fixed size."""
        decoder = self.speculative
        if not isinstance(decoder.latency, LatencyTable):
            return None
        rows = batch_sizes(self._batch_size)[-1]
        return LatencyCurve.measure(decoder.verifier, decoder.drafter, decoder.beam, batch_size=rows)
