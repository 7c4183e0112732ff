#!/usr/bin/env python
"""What do distilled targets cost? All positions of a text at once, and one ``generate`` per position, taking turns.

The rows are spread evenly over the packaged self-written ones. ``generate`` runs at evenly spaced positions of each
row; its seconds for the whole row are their mean times the row's positions, which the record calls extrapolated
(--positions 0 runs it at every position). All tokens of the timed positions are compared. Greedy and sampled replies
are reported apart as well: where a continuation says the text's own next token, it needs no branch of its own.

Example:
  python benchmarks/distilled_targets.py --output benchmarks/results/distilled-targets.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import harness
import recurrent_drafting
from recurrent_drafting import AutoregressiveDecoder, Verifier, cli, continuations, lossless, token_rows
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.continuations import DistilConfig
from recurrent_drafting.token_rows import EncodedRow

PACKAGED = Path(recurrent_drafting.__file__).parent / "data" / f"{DEFAULT_BASE}-self.safetensors"
_SETTINGS = ("dtype", "rows", "positions", "rounds", *asdict(DistilConfig()))


@dataclass
class Measured:
    """One row: where ``generate`` ran, what both wrote, and how long they took.

    Args:
        row: the text.
        positions: supervised positions of the row.
        timed: indices of those at which ``generate`` ran.
        follows_text: positions whose first token is the text's own next one.
        distilled: continuations of the timed positions.
        generated: what ``generate`` wrote there.
        distil_seconds: of the whole row, per round.
        generate_seconds: per timed position.
    """

    row: EncodedRow
    positions: list[int]
    timed: list[int]
    follows_text: int = 0
    distilled: list[list[int]] = field(default_factory=list)
    generated: list[list[int]] = field(default_factory=list)
    distil_seconds: list[float] = field(default_factory=list)
    generate_seconds: list[float] = field(default_factory=list)

    @property
    def distil(self) -> float:
        """Return the median seconds of the row at once."""
        return statistics.median(self.distil_seconds)

    @property
    def generate(self) -> float:
        """Return the seconds of one ``generate`` per position, extrapolated from the timed ones."""
        return statistics.mean(self.generate_seconds) * len(self.positions)


def spaced(total: int, count: int) -> list[int]:
    """Return the middles of ``count`` equal parts of 0..total, all of it for 0."""
    count = min(count or total, total)
    return [int((part + 0.5) * total / count) for part in range(count)]


def unpadded(row: EncodedRow) -> list[list[int]]:
    """Return the continuations of a distilled row without what stands behind their ends."""
    assert row.continuations is not None
    return [[token for token in continuation if token >= 0] for continuation in row.continuations.tolist()]


def generate(decoder: AutoregressiveDecoder, prompt: list[int], config: DistilConfig) -> list[int]:
    """Return what the baseline writes for a prompt, with the noise of a row that is distilled alone."""
    output = decoder.generate(
        [prompt], max_new_tokens=config.num_future_tokens, sampling=config.sampling(), request_ids=[0]
    )
    return output.sequences[0]


def measure_row(verifier: Verifier, row: EncodedRow, config: DistilConfig, rounds: int, count: int) -> Measured:
    """Time both ways on a row: rounds of the whole row spread among the single positions."""
    decoder = AutoregressiveDecoder(verifier)
    positions = token_rows.supervised(torch.tensor(row.loss_mask)).nonzero().flatten().tolist()
    found = Measured(row, positions, spaced(len(positions), count))
    turns = {int(round_ * len(found.timed) / rounds) for round_ in range(rounds)}
    for turn, index in enumerate(found.timed):
        if turn in turns:
            start = time.perf_counter()
            [distilled] = continuations.distil([row], verifier, config)
            found.distil_seconds.append(time.perf_counter() - start)
            texts = unpadded(distilled)
        start = time.perf_counter()
        found.generated.append(generate(decoder, row.input_ids[: positions[index] + 2], config))
        found.generate_seconds.append(time.perf_counter() - start)
    found.distilled = [texts[index] for index in found.timed]
    found.follows_text = sum(
        text[:1] == row.input_ids[position + 2 : position + 3] for text, position in zip(texts, positions, strict=True)
    )
    return found


def compare(verifier: Verifier, rows: Sequence[Measured], config: DistilConfig) -> lossless.LosslessReport:
    """Compare the tokens of every timed position; differences are judged as in the lossless audit."""
    report = lossless.LosslessReport()
    settings = lossless.Settings(config.sampling(), config.num_future_tokens, verifier.eos_token_ids)
    exact: Verifier | None = None
    for found in rows:
        for index, written, distilled in zip(found.timed, found.generated, found.distilled, strict=True):
            if written == distilled:
                report.identical += 1
                continue
            if exact is None:
                exact = Verifier(copy.deepcopy(verifier.model).to(torch.float64), verifier.name_or_path)
            prompt = found.row.input_ids[: found.positions[index] + 2]
            [again] = continuations.distil([found.row], exact, config)
            same = unpadded(again)[index] == generate(AutoregressiveDecoder(exact), prompt, config)
            lossless.judge(report, verifier, lossless.Pair(prompt, 0, written, distilled), settings, same)
    return report


def summary(rows: Sequence[Measured]) -> dict[str, Any]:
    """Return the figures of some rows together."""
    positions = sum(len(found.positions) for found in rows)
    distil, slow = sum(found.distil for found in rows), sum(found.generate for found in rows)
    times = [found.generate / found.distil for found in rows]
    return {
        "rows": len(rows),
        "positions": positions,
        "positions_timed_with_generate": sum(len(found.timed) for found in rows),
        "positions_that_follow_the_text": sum(found.follows_text for found in rows),
        "distil_seconds": distil,
        "generate_seconds_extrapolated": slow,
        "distil_positions_per_second": positions / distil,
        "generate_positions_per_second": positions / slow,
        "times_faster": slow / distil,
        "times_faster_per_row": {"median": statistics.median(times), "min": min(times), "max": max(times)},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both ways over the rows and return the record."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    config = DistilConfig(args.num_future_tokens, args.temperature, args.seed)
    packed = token_rows.load_packed(args.data)[0].rows
    rows = [packed[index] for index in spaced(len(packed), args.rows)]
    continuations.distil(rows[:1], verifier, config)  # warms up
    generate(AutoregressiveDecoder(verifier), rows[0].input_ids, config)
    measured = [measure_row(verifier, row, config, args.rounds, args.positions) for row in tqdm(rows, desc="rows")]
    report = compare(verifier, measured, config)
    groups = {"greedy replies": True, "sampled replies": False}
    kinds = {name: [found for found in measured if found.row.greedy is kind] for name, kind in groups.items()}
    return {
        **harness.head(__file__, args, *_SETTINGS),
        "data": args.data.name,
        "dtype": args.dtype,
        "all rows": summary(measured),
        **{name: summary(found) for name, found in kinds.items() if found},
        "tokens": {
            "positions_compared": report.identical + report.near_ties + report.structural,
            "identical": report.identical,
            "rounding_near_ties": report.near_ties,
            "structural": report.structural,
            "epsilon": report.epsilon,
            "differences": report.details,
        },
        "per_row": [
            {
                "tokens": len(found.row.input_ids),
                "greedy": found.row.greedy,
                "positions": len(found.positions),
                "positions_that_follow_the_text": found.follows_text,
                "distil_seconds": found.distil_seconds,
                "generate_seconds": found.generate_seconds,
                "generated_after": [found.positions[index] + 2 for index in found.timed],
            }
            for found in measured
        ],
    }


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = harness.build_parser(__doc__, drafter=False, dtype="fp32", rows=24, **asdict(DistilConfig()))
    parser.add_argument("--data", type=Path, default=PACKAGED, help="packed self-written rows")
    parser.add_argument("--positions", type=int, default=16, help="per row, at which generate runs; 0 is all")
    parser.add_argument("--rounds", type=int, default=3, help="times that a whole row is distilled")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    args = build_parser().parse_args(argv)
    record = measure(args)
    for name in record:
        if name not in ("per_row", "machine"):
            print(f"{name}: {record[name]}")
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
