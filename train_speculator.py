#!/usr/bin/env python
"""Train a recurrent drafter for a causal language model, then measure it.

Examples:
  python train_speculator.py --quick
  python train_speculator.py --llm_name_or_path MODEL --dataset_name my_chats.jsonl --bf16
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_drafting import cli

if TYPE_CHECKING:
    from recurrent_drafting import Drafter, Verifier
    from recurrent_drafting.token_rows import TokenDataset
    from recurrent_drafting.trainer import DrafterTrainer, TrainingArguments

# New tokens per prompt of the short decode that ends every training run.
SERVE_CHECK_TOKENS = 32


def build_parser() -> cli.ArgumentParser:
    """Describe the command line: the drafter's flags, and every field of TrainingArguments."""
    from transformers import HfArgumentParser

    from recurrent_drafting.trainer import TrainingArguments

    class Parser(cli.ArgumentParser, HfArgumentParser):
        """Our errors and help over the fields of a dataclass."""

    parser = Parser(TrainingArguments, prog="train_speculator.py", description=__doc__, conflict_handler="resolve")
    run = parser.add_argument_group("run")
    run.add_argument("--quick", action="store_true", help="small real run on the packaged base, then a measurement")
    run.add_argument("--llm_name_or_path", default="gpt2", help="base model: hub id, local path or packaged name")
    run.add_argument("--drafter_name_or_path", help="drafter to start from or to evaluate")
    run.add_argument("--phase", choices=("train", "eval"), default="train", help="eval measures a named drafter")
    run.add_argument("--revision", help="hub revision of the base")
    run.add_argument("--trust_remote_code", action="store_true", help="let the base run its own Python code")
    run.add_argument("--overwrite_output_dir", action="store_true", help="write into a directory that is not empty")
    run.add_argument("--warmup_ratio", type=float, help="share of the steps that warm up")
    run.add_argument("--serve_check_prompts", type=int, default=4, help="prompts decoded after training; 0 = none")
    run.add_argument("--dry_run", action="store_true", help="print what the run would be and take; train nothing")
    run.add_argument("--yes", action="store_true", help="regenerate a large data set, whatever it takes")
    run.add_argument("--debug", action="store_true", help="print tracebacks")
    _add_drafter(parser)
    _add_data(parser)
    _add_targets(parser)
    return parser


def _add_drafter(parser: cli.ArgumentParser) -> None:
    from recurrent_drafting.starting_drafter import DrafterSettings

    group = parser.add_argument_group("drafter")
    group.add_argument(
        "--exit_dim_multiplier",
        type=float,
        default=DrafterSettings.exit_dim_multiplier,
        help="exit_dim as a multiple of H",
    )
    group.add_argument(
        "--draft_vocab_size",
        default=DrafterSettings.draft_vocab_size,
        help="tokens that may be drafted; 0 = all, or auto",
    )
    group.add_argument(
        "--rnn",
        action=argparse.BooleanOptionalAction,
        default=DrafterSettings.rnn,
        help="the state is recurrent; without, it is a sum of embeddings",
    )
    for name, text in (("width", "continuations kept at each depth"), ("length", "depths that decoding drafts")):
        default = getattr(DrafterSettings, f"beam_{name}")
        group.add_argument(f"--beam_{name}", type=int, default=default, help=f"{text}; saved as the drafter's default")
    group.add_argument(
        "--lookup_length",
        type=int,
        default=DrafterSettings.lookup_length,
        help="tokens that decoding copies from the text's own past where it repeats; saved as the drafter's default",
    )
    group.add_argument(
        "--recycled_nodes",
        type=int,
        default=DrafterSettings.recycled_nodes,
        help="verified nodes whose predictions decoding uses again; saved as the drafter's default",
    )


def _add_data(parser: cli.ArgumentParser) -> None:
    from recurrent_drafting.training_data import DataSettings

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default=DataSettings.dataset_name,
        help="sharegpt, alpaca, ultrachat, mtbench, wikitext, self (written by the base), or a local "
        ".json/.jsonl/.parquet/.txt file",
    )
    group.add_argument("--dataset_split", help="split of a hub data set (default: its usual one)")
    group.add_argument(
        "--model_max_length", type=int, default=DataSettings.model_max_length, help="tokens; longer rows are cut"
    )
    group.add_argument("--max_train_samples", type=int, help="rows that are taken, the first ones (default: all)")
    group.add_argument(
        "--max_eval_samples", type=int, default=DataSettings.max_eval_samples, help="rows of these that are held out"
    )
    group.add_argument(
        "--greedy_share", type=float, help="with --dataset_name self: share of greedy replies (default: as they come)"
    )
    group.add_argument(
        "--train_on_assistant_only",
        action=argparse.BooleanOptionalAction,
        default=DataSettings.train_on_assistant_only,
        help="supervise replies alone, not prompts",
    )
    group.add_argument("--hidden_state_cache", metavar="DIR", help="store the base's states once, reuse them")
    group.add_argument("--rebuild_cache", action="store_true", help="compute damaged shards of that cache anew")
    group.add_argument("--skip_bad_rows", action="store_true", help="leave malformed rows out and count them")


def _add_targets(parser: cli.ArgumentParser) -> None:
    """Describe what is predicted and by what it is judged."""
    from recurrent_drafting.trainer import TrainingArguments
    from recurrent_drafting.training_data import TARGETS, DataSettings

    group = parser.add_argument_group("targets and objective")
    targets = group.add_mutually_exclusive_group()
    targets.add_argument(
        "--targets",
        choices=TARGETS,
        default=DataSettings.targets,
        help="the data's own replies, replies that the base writes anew, or its continuations of every position",
    )
    targets.add_argument(
        "--use_distilled_dataset",
        action="store_const",
        dest="targets",
        const="distilled",
        default=argparse.SUPPRESS,
        help="the same as --targets distilled",
    )
    group.add_argument(
        "--distill_num_future_tokens",
        type=int,
        default=DataSettings.distill_num_future_tokens,
        help="length of these continuations",
    )
    group.add_argument(
        "--distill_temperature", type=float, default=DataSettings.distill_temperature, help="0 is greedy"
    )
    group.add_argument("--distill_max_examples", type=int, help="training rows that are distilled; others are left out")
    objective = group.add_mutually_exclusive_group()
    objective.add_argument(
        "--objective",
        default=TrainingArguments.objective,
        help="ce, kl or expected_length; distilled targets are tokens alone, so their default is ce",
    )
    objective.add_argument(
        "--use_knowledge_distillation",
        action="store_const",
        dest="objective",
        const="kl",
        default=argparse.SUPPRESS,
        help="the same as --objective kl; see --kd_temperature and --kd_alpha",
    )


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, TrainingArguments]:
    """Parse the command line; --quick changes defaults, never what was given."""
    from recurrent_drafting import output_directory
    from recurrent_drafting.trainer import TrainingArguments
    from recurrent_drafting.training_data import DataSettings

    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in argv:
        from recurrent_drafting import quick_run

        parser.set_defaults(**quick_run.SETTINGS, bf16=_bf16_pays(argv))
    args = parser.parse_args(argv)
    if args.targets == "distilled":
        parser.set_defaults(objective="ce")
        args = parser.parse_args(argv)
    if args.resume_from_checkpoint in {"", "False", "false"}:
        args.resume_from_checkpoint = None
    check_arguments(args, given_names(argv))
    args.output_dir = args.output_dir or str(output_directory.usual(args.llm_name_or_path, unused=args.quick))
    if args.warmup_ratio is not None:
        args.warmup_steps = args.warmup_ratio
    training = cli.settings_of(TrainingArguments, args)
    cli.settings_of(DataSettings, args).refuse_kl(training)
    return args, training


def given_names(argv: Sequence[str]) -> set[str]:
    """Return the settings that the command line itself names, by their place in the namespace."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def check_arguments(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse values that cannot work, before anything is loaded; a named drafter keeps what was not given.

    Raises:
        UsageError: with the range or the choices.
    """
    from recurrent_drafting.starting_drafter import DECODING, DrafterSettings
    from recurrent_drafting.training_data import DataSettings

    cli.settings_of(DataSettings, args).require_depths(args.drafter_predict_n_tokens)
    cli.require_least(args, {"serve_check_prompts": 0})
    cli.settings_of(DrafterSettings, args).refuse_shape(given)
    if args.drafter_name_or_path:
        vars(args).update(dict.fromkeys(set(DECODING) - given))


def _bf16_pays(argv: Sequence[str]) -> bool:
    import torch

    from recurrent_drafting.verifier import resolve_device, resolve_dtype

    return not {"--bf16", "--fp16"} & set(argv) and resolve_dtype("auto", resolve_device("auto")) == torch.bfloat16


def dry_run(args: argparse.Namespace, training: TrainingArguments) -> int:
    """Print the resolved run and what it would take; train nothing, write nothing."""
    from dataclasses import fields

    from recurrent_drafting import estimate, starting_drafter
    from recurrent_drafting.token_rows import TokenDataset
    from recurrent_drafting.training_data import DataSettings, TrainingData

    usual = {item.name: item.default for item in fields(training)}
    given = {name: value for name, value in vars(args).items() if name not in usual or value != usual[name]}
    print(json.dumps({name: value for name, value in given.items() if value is not None}, indent=2, default=str))
    verifier, tokenizer = load_base(args, training)
    settings = cli.settings_of(DataSettings, args)
    expected = TrainingData(settings, verifier, tokenizer, print).expect()
    rows = TokenDataset(expected.rows)
    # What the sample's replies would make of the draft vocabulary says nothing.
    new = cli.settings_of(starting_drafter.DrafterSettings, args)
    drafter = starting_drafter.prepare(new, verifier, tokenizer, rows, say=lambda _: None)
    with aside(training, "dry-run-"):
        trainer = make_trainer(training, verifier, drafter, (rows, rows))
        stored = bool(args.hidden_state_cache or args.quick)
        found = estimate.run(trainer, expected, stored_states=stored, distilled=settings.distil_config())
    print(
        f"data: {expected.count} rows of {expected.tokens_per_row:.0f} tokens, {expected.replies_written} to be written"
    )
    print(found.describe())
    print("dry run: nothing was trained or written")
    return 0


@contextmanager
def aside(training: TrainingArguments, prefix: str) -> Iterator[None]:
    """Let a trainer that leaves nothing behind have a directory, which goes with the block, and no tracker."""
    with tempfile.TemporaryDirectory(prefix=prefix) as scratch:
        training.output_dir, training.report_to = scratch, []
        yield


def load_base(args: argparse.Namespace, training: TrainingArguments) -> tuple[Verifier, Any]:
    """Load the base in the dtype of the run, and its tokenizer."""
    from recurrent_drafting import Verifier
    from recurrent_drafting.data import load_tokenizer

    dtype = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    name, trust = args.llm_name_or_path, args.trust_remote_code
    print(f"base: {name} ({dtype})")
    device = "cpu" if training.use_cpu else "auto"
    verifier = Verifier.from_pretrained(name, dtype, device, revision=args.revision, trust_remote_code=trust)
    return verifier, load_tokenizer(name, args.revision, trust_remote_code=trust)


def make_trainer(
    training: TrainingArguments, verifier: Verifier, drafter: Drafter, rows: tuple[TokenDataset, TokenDataset]
) -> DrafterTrainer:
    """Put drafter, verifier and data together."""
    from recurrent_drafting.token_rows import Collator
    from recurrent_drafting.trainer import DrafterTrainer

    return DrafterTrainer(
        drafter, verifier, training, train_dataset=rows[0], eval_dataset=rows[1], data_collator=Collator()
    )


def find_checkpoint(
    args: argparse.Namespace, training: TrainingArguments, drafter: Drafter, rows: TokenDataset
) -> str | None:
    """Return the checkpoint to go on from, None for a new run; one of another run is refused."""
    from recurrent_drafting import resume

    if not args.resume_from_checkpoint:
        return None
    record = training.run_record(drafter.config, resume.data_fingerprint(rows.rows))
    return str(resume.find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir), record))


def execute(args: argparse.Namespace, training: TrainingArguments, started: float) -> int:
    """Run what the command line asks for."""
    from recurrent_drafting import distributed, hidden_cache, starting_drafter, tracking
    from recurrent_drafting.training_data import DataSettings, TrainingData

    verifier, tokenizer = load_base(args, training)
    source = TrainingData(cli.settings_of(DataSettings, args), verifier, tokenizer, print)
    rows, held_out = distributed.from_first_rank(
        training, lambda: source.load(Path(args.output_dir), args.per_device_train_batch_size)
    )
    settings = cli.settings_of(starting_drafter.DrafterSettings, args)
    drafter = starting_drafter.prepare(settings, verifier, tokenizer, rows, say=print)
    print(f"drafter: {drafter.num_parameters() / 1e6:.2f} M parameters")
    if args.phase == "eval":
        with aside(training, "eval-"):
            return evaluate(make_trainer(training, verifier, drafter, (rows, held_out)), held_out)
    checkpoint = find_checkpoint(args, training, drafter, rows)
    with tempfile.TemporaryDirectory(prefix="hidden-states-", ignore_cleanup_errors=True) as scratch:
        if args.hidden_state_cache or args.quick:
            directory = Path(args.hidden_state_cache or scratch)
            rows = hidden_cache.store(rows, verifier, directory, training, rebuild=args.rebuild_cache, say=print)
        trainer = make_trainer(training, verifier, drafter, (rows, held_out))
        with tracking.closing(trainer.callback_handler.callbacks):
            trainer.train(resume_from_checkpoint=checkpoint)
            finish(args, trainer, held_out)
    if training.process_index == 0:
        conclude(args, trainer, tokenizer, started)
    return 0


def evaluate(trainer: DrafterTrainer, rows: TokenDataset) -> int:
    """Print loss, accuracies and simulated tau of the rows, and the tau of decoding their prompts."""
    from recurrent_drafting import train_serve

    metrics = trainer.evaluate()
    if trainer.args.process_index == 0:
        longest = max(sum(row.loss_mask) for row in rows.rows)
        report = train_serve.compare_rows(trainer, rows, None, longest, say=print)
        print(json.dumps({**metrics, **(report.figures() if report else {})}, indent=2))
    return 0


def finish(args: argparse.Namespace, trainer: DrafterTrainer, rows: TokenDataset) -> None:
    """Evaluate and save the trained drafter, and compare what it simulates with what it serves."""
    from recurrent_drafting import tracking, train_serve

    metrics = trainer.evaluate()
    trainer.save_model(args.output_dir)
    trainer.save_state()
    print(f"simulated tau on held-out rows: {metrics['eval_simulated_tau']:.3f}")
    print(f"drafter saved: {args.output_dir}")
    if trainer.args.process_index or not args.serve_check_prompts:
        return
    report = train_serve.compare_rows(trainer, rows, args.serve_check_prompts, SERVE_CHECK_TOKENS, say=print)
    if report is not None:
        print(f"train equals serve: {report.summary()}")
        table = train_serve.evaluation_table(metrics, report)
        tracking.log_table(trainer.callback_handler.callbacks, table, trainer.state.global_step)


def conclude(args: argparse.Namespace, trainer: DrafterTrainer, tokenizer: Any, started: float) -> None:
    """Write the report of the training; after --quick measure first, and say what to run next."""
    from recurrent_drafting import evaluation, lossless, quick_run, report, result_files

    folder, measured = Path(args.output_dir), {}
    results, page = folder / "quick_results.json", folder / "report.html"
    if args.quick:
        result = quick_run.measure(trainer.verifier, trainer.drafter, tokenizer, args.output_dir)
        result["quick_seconds"] = time.perf_counter() - started
        result_files.write_json(result, results)
        print(evaluation.format_summary(result["summary"]))
        measured[results.stem] = result
    report.write_training(trainer.state.log_history, trainer.state.global_step, measured, page)
    print(f"report: {page}")
    if args.quick:
        lossless.LosslessReport(**measured[results.stem]["lossless"]).require_lossless()
        print(
            f"results: {results}\n"
            "next:\n"
            f"  python generate_speculator.py --interactive --speculator_path {args.output_dir}\n"
            f"  python generate_speculator.py --eval_mt_bench --compare --speculator_path {args.output_dir}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    started = time.perf_counter()
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)

    def body() -> int:
        from recurrent_drafting import distributed, output_directory, resume

        args, training = parse_arguments(argv)
        distributed.check_world(training)
        with distributed.one_voice(training):
            if args.dry_run:
                return dry_run(args, training)
            if not training.should_save or args.phase == "eval":
                return execute(args, training, started)
            path, wanted = Path(args.output_dir), args.resume_from_checkpoint
            with output_directory.claim(path, goes_on=bool(args.overwrite_output_dir or wanted)):
                # Before anything is loaded: there must be a checkpoint to go on from.
                args.resume_from_checkpoint = resume.locate(wanted, path)
                return execute(args, training, started)

    return cli.run(body, debug)


if __name__ == "__main__":
    sys.exit(main())
