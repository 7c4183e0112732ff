"""The full identity grid: families, attentions, beams, settings, seeds, batches, padding and drafters.

``python -m tests.identity_grid --output benchmarks/results/identity-grid.json``; a small part runs in test_families.
With ``--dtype float32`` the models decode from packed weights, as they do in use.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from recurrent_drafting import Verifier, cli, result_files
from recurrent_drafting.errors import NumericsError
from tests.families import FAMILIES, variants
from tests.test_identity import Case, random_case, run_case
from tests.tiny import NoisyOracleDecoder

# Probability with which the drafter proposes the true token; None is a random drafter with a real beam search.
DRAFTERS: dict[str, tuple[float, float] | None] = {
    "random": None,
    "noisy oracle": (0.3, 0.9),
    "perfect": (1.0, 1.0),
    "adversarial": (0.0, 0.0),
}


def with_drafter(case: Case, drafter: str, rng: random.Random) -> Case:
    """Give a case its drafter."""
    span = DRAFTERS[drafter]
    return replace(case, oracle=False) if span is None else replace(case, oracle=True, probability=rng.uniform(*span))


def run(cases: int, dtype: str) -> dict[str, object]:
    """Run the grid; return what was found. In float32 the models decode from their packed twins."""
    counts: Counter[str] = Counter()
    different: list[str] = []
    grid = variants()
    for name, attention, windowed in tqdm(grid, desc="identity grid", unit="variant"):
        verifier = Verifier(FAMILIES[name].model(attention, windowed=windowed).to(getattr(torch, dtype)))
        rng = random.Random(f"{name} {attention} {windowed}")
        for index in range(cases):
            drafter = list(DRAFTERS)[index % len(DRAFTERS)]
            case = with_drafter(random_case(rng), drafter, rng)
            expected, got, decoder = run_case(verifier, case, index)
            counts["cases"] += 1
            counts["rows"] += len(case.prompts)
            if (got.sequences, got.finish_reasons) != (expected.sequences, expected.finish_reasons):
                different.append(f"{name} {attention} {'window' if windowed else ''} case {index} ({drafter}): {case}")
            if isinstance(decoder, NoisyOracleDecoder) and drafter == "noisy oracle":
                counts["oracle_steps"] += decoder.steps
                counts["oracle_partly_accepted"] += decoder.partly_accepted
                counts["oracle_non_contiguous"] += decoder.moved
    return {
        "command": f"python -m tests.identity_grid --cases {cases} --dtype {dtype}",
        "machine": result_files.machine(),
        "families": sorted({FAMILIES[name].model_type for name, _, _ in grid}),
        "variants": len(grid),
        **counts,
        "partly_accepted": counts["oracle_partly_accepted"] / counts["oracle_steps"],
        "non_contiguous": counts["oracle_non_contiguous"] / counts["oracle_steps"],
        "different": different,
    }


def main() -> int:
    """Parse the command line and run it."""
    parser = cli.ArgumentParser(prog="python -m tests.identity_grid", description=__doc__)
    parser.add_argument("--cases", type=int, default=40, help="cases per variant")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--output", type=Path)
    args: argparse.Namespace = parser.parse_args()
    record = run(args.cases, args.dtype)
    if args.output:
        result_files.write_json(record, args.output)
    print(
        f"{record['rows']} rows in {record['cases']} cases, {record['variants']} variants of "
        f"{len(record['families'])} model types: {len(record['different'])} cases differ; noisy oracle: "
        f"{record['partly_accepted']:.0%} of steps partly accepted, {record['non_contiguous']:.0%} keep "
        "non-contiguous rows"
    )
    if record["different"]:
        raise NumericsError(f"first difference: {record['different'][0]}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
