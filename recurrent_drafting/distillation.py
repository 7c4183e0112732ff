"""Let the verifier write training data: prompts, and its own replies to them.

An instruct model that is given only its chat template's user header writes user turns. It then
answers them, so a training set of its own text needs no other data. Work goes in chunks; a chunk
is one file that appears when it is complete, and a rerun goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from recurrent_drafting import assets, cli, data, sources
from recurrent_drafting.engines import make_engine
from recurrent_drafting.self_data import SelfData, SelfDataConfig, load_rows, pack, read_settings

logger = logging.getLogger(__name__)


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = cli.ArgumentParser(prog="python -m recurrent_drafting.distillation", description=__doc__)
    parser.add_argument("--llm_name_or_path", default=assets.DEFAULT_BASE, help="instruct model that writes")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory of chunk files; a rerun goes on")
    parser.add_argument("--num_rows", type=int, default=2048, help="prompts to write; 0 only packs what is there")
    parser.add_argument("--max_new_tokens", type=int, default=SelfDataConfig.max_new_tokens, help="longest reply")
    parser.add_argument(
        "--greedy_share", type=float, default=SelfDataConfig.greedy_share, help="share of greedy replies"
    )
    parser.add_argument(
        "--prompt_temperature", type=float, default=SelfDataConfig.prompt_temperature, help="of written prompts"
    )
    parser.add_argument(
        "--prompt_min_p",
        type=float,
        default=SelfDataConfig.prompt_min_p,
        help="least relative probability of their tokens",
    )
    parser.add_argument("--seed", type=int, default=SelfDataConfig.seed, help="key of everything random")
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="what generates")
    parser.add_argument("--dtype", default="auto", help="auto (bf16 with vllm), fp32, bf16 or fp16")
    parser.add_argument("--pack", type=Path, help="also write the rows to this safetensors file")
    parser.add_argument("--pack_reply_tokens", type=int, help="stop packing after this many reply tokens")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Write and pack what the command line asks for."""
    name = args.llm_name_or_path
    tokenizer = data.load_tokenizer(name)
    turns = [turn for _, row in sources.read_json_rows(assets.fetch("mt-bench")) for turn in row["turns"]]
    if args.num_rows:
        names = {item.name for item in fields(SelfDataConfig)} - {"chunk_rows"}
        config = SelfDataConfig(**{name: getattr(args, name) for name in names})
        SelfData(make_engine(args.engine, name, args.dtype), tokenizer, config, name, turns).write(args.output_dir)
    if args.pack:
        rows, report = load_rows(args.output_dir, tokenizer, args.pack_reply_tokens, turns)
        settings = {
            **read_settings(args.output_dir),
            "fingerprint": assets.asset_fingerprint(Path(assets.source_of(name))),
        }
        pack(rows, report, args.pack, settings)
        logger.info("%s: %s, %d reply tokens", args.pack, report, sum(sum(row.loss_mask) for row in rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    # An orderly exit ends the engine's processes too; the unfinished chunk is lost, the others stay.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return cli.run(lambda: execute(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
