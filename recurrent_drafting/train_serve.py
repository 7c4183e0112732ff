"""Train equals serve: what the trainer simulates must be what decoding does, step for step.

Prompts are decoded with the real decoder, and the very text that comes out is walked by
``trainer.simulate``. Both use one beam search and one tree builder, so each step must accept the
same number of tokens; a position, context or tree that is off by one on either side shows.

The comparison runs in float32 (or float64). In bfloat16 and float16 it would say little: decoding
takes each context from a forward of a tree over the cache, the walk takes all of them from one
forward over the text, and the two round differently by more than lies between neighbouring beams.
In float32 rounding can still move a step at a near-tie of two beams, so a prompt that differs is run
again in float64, and only what differs there as well is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from recurrent_drafting.config import BeamConfig
from recurrent_drafting.decoding import SpeculativeDecoder
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import DataError, NumericsError, ResourceError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from recurrent_drafting.tracking import Table
from recurrent_drafting.trainer import DrafterTrainer, simulate
from recurrent_drafting.verifier import Verifier

_BATCH = 8


@dataclass
class TrainServeReport:
    """Result of ``compare``.

    Args:
        dtype: of the comparison.
        prompts: how many were decoded.
        simulated: counters of the walk over the served text.
        served: counters of the decode.
        near_ties: prompts whose steps differ by rounding: not in float64.
    """

    dtype: str
    prompts: int = 0
    simulated: DecodingStats = field(default_factory=DecodingStats)
    served: DecodingStats = field(default_factory=DecodingStats)
    near_ties: int = 0

    def summary(self) -> str:
        """Return one line: both histograms, or the one that they share."""
        served, simulated = self.served, self.simulated
        text = f"{self.prompts} prompts, {served.tokens} tokens, {self.dtype}: simulated tau {simulated.tau:.3f}, "
        text += f"served tau {served.tau:.3f}, steps by accepted length {served.accepted}"
        text += "" if simulated.accepted == served.accepted else f" (simulated {simulated.accepted})"
        return f"{text}, {self.near_ties} rounding near-ties" if self.near_ties else text

    def figures(self) -> dict[str, Any]:
        """Return the figures by name, beside those of ``DrafterTrainer.evaluate``."""
        return {
            "served_prompts": self.prompts,
            "served_tau": self.served.tau,
            "served_acceptance_by_depth": self.served.acceptance_by_depth,
            "served_text_simulated_tau": self.simulated.tau,
        }


def prompts_of(rows: Sequence[EncodedRow], limit: int | None = None) -> list[list[int]]:
    """Return the prompts (all up to the first reply token) of the first ``limit`` rows that have one."""
    starts = ((row, row.loss_mask.index(True) if True in row.loss_mask else 0) for row in rows)
    return [list(row.input_ids[:start]) for row, start in starts if start][:limit]


def compare(
    verifier: Verifier, drafter: Drafter, prompts: Sequence[list[int]], beam: BeamConfig, max_new_tokens: int
) -> TrainServeReport:
    """Decode prompts greedily with a tree of fixed size, walk the text, and compare every step.

    Args:
        verifier: the base; a copy in float32 takes its place if it computes in less.
        drafter: any drafter that fits it.
        prompts: token ids per prompt.
        beam: shape of beams and tree.
        max_new_tokens: per prompt.

    Raises:
        DataError: no prompt.
        ResourceError: no memory for the copy.
        NumericsError: a step differs, and not by rounding.
    """
    if not prompts:
        raise DataError("train equals serve: expected an evaluation row with a prompt before its reply, got none")
    if verifier.dtype not in (torch.float32, torch.float64):
        verifier = verifier.converted(torch.float32)
    decoder = SpeculativeDecoder(verifier, drafter, beam, allow_base_mismatch=True)
    report = TrainServeReport(str(verifier.dtype).removeprefix("torch."))
    differing: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        batch = list(prompts[start : start + _BATCH])
        simulated, served = _steps(decoder, batch, max_new_tokens, report)
        differing += [batch[i] for i in range(len(batch)) if simulated[i] != served[i]]
    if differing and verifier.dtype == torch.float64:
        raise _difference(report, len(differing))
    if differing:
        # Raises unless all of them agree there.
        compare(verifier.converted(torch.float64), drafter, differing, beam, max_new_tokens)
        report.near_ties = len(differing)
    return report


def compare_rows(
    trainer: DrafterTrainer, rows: TokenDataset, limit: int | None, max_new_tokens: int, *, say: Callable[[str], None]
) -> TrainServeReport | None:
    """Compare on the prompts of evaluation rows, with the drafter and the beams of a trainer.

    Args:
        trainer: of the run.
        rows: its evaluation rows.
        limit: prompts, None for all.
        max_new_tokens: per prompt.
        say: told in a line why it cannot be done.

    Returns:
        The report; None where no row has a prompt, or memory lacks.

    Raises:
        NumericsError: see ``compare``.
    """
    reason = "no evaluation row has a prompt before its reply"
    if prompts := prompts_of(rows.rows, limit):
        try:
            return compare(trainer.verifier, trainer.drafter, prompts, trainer.beam(), max_new_tokens)
        except ResourceError as error:
            reason = str(error)
    say(f"train equals serve: not compared: {reason}")
    return None


def evaluation_table(metrics: dict[str, float], report: TrainServeReport) -> Table:
    """Return the closing figures per depth: loss, accuracies, and shares of served steps that accept so much.

    Args:
        metrics: of ``DrafterTrainer.evaluate``.
        report: of ``compare``.
    """
    names = sorted(
        {name.split("_")[1] for name in metrics if name.startswith("eval_top")}, key=lambda name: int(name[3:])
    )
    shares = report.served.acceptance_by_depth
    rows = [
        (
            depth,
            metrics[f"eval_loss_depth_{depth}"],
            *(metrics[f"eval_{name}_depth_{depth}"] for name in names),
            shares[depth - 1] if depth <= len(shares) else 0.0,
        )
        for depth in range(1, len(metrics))
        if f"eval_loss_depth_{depth}" in metrics
    ]
    return Table("evaluation", ("depth", "loss", *names, "served acceptance"), rows)


def _steps(
    decoder: SpeculativeDecoder, prompts: list[list[int]], max_new_tokens: int, report: TrainServeReport
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the accepted length of every step per prompt: of the walk, and of the decode."""
    verifier = decoder.verifier
    output = decoder.generate(prompts, max_new_tokens=max_new_tokens)
    rows = [
        EncodedRow(prompt + reply, [False] * len(prompt) + [True] * len(reply))
        for prompt, reply in zip(prompts, output.sequences, strict=True)
    ]
    inputs = {name: tensor.to(verifier.device) for name, tensor in Collator()(rows).items()}
    with torch.no_grad():
        hidden = verifier.hidden_states(inputs["input_ids"], inputs["attention_mask"])
        simulated = simulate(decoder.drafter, verifier, inputs, hidden, decoder.beam, report.simulated)
    report.served.merge(output.stats)
    report.prompts += len(prompts)
    return simulated, [[step.drafted for step in steps] for steps in output.steps]


def _difference(report: TrainServeReport, prompts: int) -> NumericsError:
    return NumericsError(
        f"training and serving disagree on {prompts} of {report.prompts} prompts in {report.dtype}: expected equal "
        f"steps by accepted length, got simulated {report.simulated.accepted} (tau {report.simulated.tau:.3f}) and "
        f"served {report.served.accepted} (tau {report.served.tau:.3f}); this is a bug, please report it with the base"
    )
