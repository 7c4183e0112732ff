#!/usr/bin/env python
"""Train a recurrent drafter for a causal language model, then measure it.

Examples:
  python train_speculator.py --quick
  python train_speculator.py --llm_name_or_path MODEL --dataset_name my_chats.jsonl --bf16
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_drafting import cli
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recurrent_drafting import Drafter, Verifier
    from recurrent_drafting.data import Conversation, EncodedRow, TokenDataset
    from recurrent_drafting.distillation import DistilConfig
    from recurrent_drafting.estimate import ExpectedData
    from recurrent_drafting.train_serve import TrainServeReport
    from recurrent_drafting.trainer import DrafterTrainer, TrainingArguments

# What --quick sets; any flag given on the command line wins.
QUICK = {
    "llm_name_or_path": DEFAULT_BASE,
    "dataset_name": "self",
    "max_train_samples": 640,
    "max_steps": 400,
    "drafter_predict_n_tokens": 3,
    "lookup_length": 16,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "max_eval_samples": 16,
    "learning_rate": 2e-3,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 40,
    "save_strategy": "no",
}
QUICK_PROMPTS, QUICK_TOKENS = 16, 64
# New tokens per prompt of the short decode that ends every training run.
SERVE_CHECK_TOKENS = 32


def build_parser() -> cli.ArgumentParser:
    """Describe the command line: the drafter's flags, and every field of TrainingArguments."""
    from transformers import HfArgumentParser

    from recurrent_drafting import RecurrentDraftingConfig
    from recurrent_drafting.trainer import TrainingArguments

    class Parser(cli.ArgumentParser, HfArgumentParser):
        """Our errors and help over the fields of a dataclass."""

    parser = Parser(TrainingArguments, prog="train_speculator.py", description=__doc__, conflict_handler="resolve")
    run = parser.add_argument_group("run")
    run.add_argument("--quick", action="store_true", help="small real run on the packaged base, then a measurement")
    run.add_argument("--llm_name_or_path", default="gpt2", help="base model: hub id, local path or packaged name")
    run.add_argument("--drafter_name_or_path", help="drafter to start from or to evaluate")
    run.add_argument("--phase", choices=("train", "eval"), default="train")
    run.add_argument("--revision", help="hub revision of the base")
    run.add_argument("--trust_remote_code", action="store_true", help="let the base run its own Python code")
    run.add_argument("--overwrite_output_dir", action="store_true", help="write into a directory that is not empty")
    run.add_argument("--warmup_ratio", type=float, help="share of the steps that warm up")
    run.add_argument("--serve_check_prompts", type=int, default=4, help="prompts decoded after training; 0 = none")
    run.add_argument("--dry_run", action="store_true", help="print what the run would be and take; train nothing")
    run.add_argument("--yes", action="store_true", help="regenerate a large data set, whatever it takes")
    run.add_argument("--debug", action="store_true", help="print tracebacks")
    model = parser.add_argument_group("drafter")
    model.add_argument("--exit_dim_multiplier", type=float, default=1.0, help="exit_dim as a multiple of H")
    model.add_argument("--draft_vocab_size", default="auto", help="tokens that may be drafted; 0 = all, or auto")
    model.add_argument("--rnn", action=argparse.BooleanOptionalAction, default=RecurrentDraftingConfig.rnn)
    model.add_argument("--beam_width", type=int, default=RecurrentDraftingConfig.beam_width)
    model.add_argument("--beam_length", type=int, default=RecurrentDraftingConfig.beam_length)
    model.add_argument(
        "--lookup_length",
        type=int,
        default=RecurrentDraftingConfig.lookup_length,
        help="tokens that decoding copies from the text's own past where it repeats; saved as the drafter's default",
    )
    source = parser.add_argument_group("data")
    source.add_argument(
        "--dataset_name",
        default="sharegpt",
        help="sharegpt, alpaca, ultrachat, mtbench, wikitext, self (written by the base), or a local "
        ".json/.jsonl/.parquet/.txt file",
    )
    source.add_argument("--dataset_split", help="split of a hub data set (default: its usual one)")
    source.add_argument("--model_max_length", type=int, default=512, help="tokens; longer rows are cut")
    source.add_argument("--max_train_samples", type=int)
    source.add_argument("--max_eval_samples", type=int, default=64)
    source.add_argument("--train_on_assistant_only", action=argparse.BooleanOptionalAction, default=True)
    source.add_argument("--hidden_state_cache", metavar="DIR", help="store the base's states once, reuse them")
    source.add_argument("--rebuild_cache", action="store_true", help="compute damaged shards of that cache anew")
    source.add_argument("--skip_bad_rows", action="store_true", help="leave malformed rows out and count them")
    add_targets(parser)
    return parser


def add_targets(parser: cli.ArgumentParser) -> None:
    """Describe what is predicted and by what it is judged."""
    from recurrent_drafting.distillation import DistilConfig
    from recurrent_drafting.trainer import TrainingArguments

    group = parser.add_argument_group("targets and objective")
    targets = group.add_mutually_exclusive_group()
    targets.add_argument("--targets", choices=("ground_truth", "regenerated", "distilled"), default="regenerated")
    targets.add_argument(
        "--use_distilled_dataset",
        action="store_const",
        dest="targets",
        const="distilled",
        default=argparse.SUPPRESS,
        help="the same as --targets distilled",
    )
    group.add_argument("--distill_num_future_tokens", type=int, default=DistilConfig.num_future_tokens)
    group.add_argument("--distill_temperature", type=float, default=DistilConfig.temperature, help="0 is greedy")
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
    from dataclasses import fields

    from recurrent_drafting.trainer import TrainingArguments

    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in argv:
        parser.set_defaults(**QUICK, bf16=_bf16_pays(argv))
    args = parser.parse_args(argv)
    if args.targets == "distilled":
        parser.set_defaults(objective="ce")
        args = parser.parse_args(argv)
    if args.resume_from_checkpoint in {"", "False", "false"}:
        args.resume_from_checkpoint = None
    check_arguments(args)
    check_drafter_flags(args, given_names(argv))
    args.output_dir = args.output_dir or _default_output_dir(args)
    if args.warmup_ratio is not None:
        args.warmup_steps = args.warmup_ratio
    names = {item.name for item in fields(TrainingArguments) if item.init} - {"debug"}
    training = TrainingArguments(**{name: value for name, value in vars(args).items() if name in names})
    if args.targets == "distilled" and training.kl_share:
        raise UsageError(
            f"--targets distilled with --objective {args.objective}: KL needs the verifier's distribution along the "
            "text, continuations have tokens alone; use --objective ce or --kd_alpha 0"
        )
    return args, training


def given_names(argv: Sequence[str]) -> set[str]:
    """Return the settings that the command line itself names, by their place in the namespace."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def check_drafter_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse flags that shape a new drafter where one is named; of beams and copies keep what was given for it.

    Raises:
        UsageError: the drafter that was named has a shape already.
    """
    if not args.drafter_name_or_path:
        return
    if shaping := sorted(given & {"exit_dim_multiplier", "draft_vocab_size", "rnn", "drafter_num_layers"}):
        raise UsageError(
            f"--{shaping[0]} shapes a new drafter, and {args.drafter_name_or_path} has its shape: drop one of the two"
        )
    for name in {"beam_width", "beam_length", "lookup_length"} - given:
        setattr(args, name, None)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        UsageError: with the range or the choices.
    """
    from recurrent_drafting import BeamConfig

    least = {"model_max_length": 3, "max_train_samples": 1, "max_eval_samples": 1, "serve_check_prompts": 0}
    least.update(distill_num_future_tokens=1, distill_max_examples=1, drafter_num_layers=0)
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise UsageError(f"--{name} must be >= {minimum}, got {value}")
    if not 0 < args.exit_dim_multiplier < math.inf:
        raise UsageError(f"--exit_dim_multiplier must be > 0 and finite, got {args.exit_dim_multiplier}")
    if args.draft_vocab_size != "auto" and not args.draft_vocab_size.isdecimal():
        raise UsageError(f"--draft_vocab_size must be auto or a number >= 0, got {args.draft_vocab_size!r}")
    BeamConfig(args.beam_width, args.beam_length, lookup_length=args.lookup_length)
    if not 0 <= args.distill_temperature < math.inf:
        raise UsageError(f"--distill_temperature must be >= 0 and finite, got {args.distill_temperature}")
    if args.targets == "distilled" and args.distill_num_future_tokens < args.drafter_predict_n_tokens:
        raise UsageError(
            f"--distill_num_future_tokens must be >= --drafter_predict_n_tokens ({args.drafter_predict_n_tokens}), "
            f"got {args.distill_num_future_tokens}"
        )
    if args.phase == "eval" and not args.drafter_name_or_path:
        raise UsageError("--phase eval measures a drafter: name it with --drafter_name_or_path")


def _bf16_pays(argv: Sequence[str]) -> bool:
    import torch

    from recurrent_drafting.verifier import resolve_device, resolve_dtype

    return not {"--bf16", "--fp16"} & set(argv) and resolve_dtype("auto", resolve_device("auto")) == torch.bfloat16


def _default_output_dir(args: argparse.Namespace) -> str:
    """Return ./models/<base>-recurrent-drafter; a second --quick gets a number."""
    base = re.sub(r"[^\w.-]+", "-", Path(args.llm_name_or_path).name)
    stem = Path("models") / f"{base}-recurrent-drafter"
    path, number = stem, 1
    while args.quick and path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return str(path)


@contextmanager
def claim_output_dir(args: argparse.Namespace) -> Iterator[None]:
    """Hold the output directory for this run alone, and clear what a killed one left half-written.

    Raises:
        UsageError: it holds something, cannot be written or belongs to another run.
    """
    from recurrent_drafting import manifest, resume, run_guard
    from recurrent_drafting.distillation import SELF_DATA

    path = Path(args.output_dir)
    check_output_dir(args, leftovers={manifest.PARTIAL, run_guard.LOCK, SELF_DATA})
    with run_guard.only_run(path):
        manifest.remove_partial(path)
        # Before anything is loaded: there must be a checkpoint to go on from.
        args.resume_from_checkpoint = resume.locate(args.resume_from_checkpoint, path)
        yield


def check_output_dir(args: argparse.Namespace, leftovers: set[str]) -> None:
    """Refuse an output directory that holds something besides a killed run's leftovers, or cannot be written.

    Raises:
        UsageError: with what to pass instead.
    """
    path = Path(args.output_dir)
    goes_on = args.overwrite_output_dir or args.resume_from_checkpoint
    try:
        if path.exists() and {item.name for item in path.iterdir()} - leftovers and not goes_on:
            raise UsageError(
                f"--output_dir {path} is not empty: expected a new directory; pass --resume_from_checkpoint, "
                "--overwrite_output_dir or another directory"
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path} cannot be used: {error.strerror}; name another directory") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path} is read-only; name another directory")


def load_data(
    args: argparse.Namespace, verifier: Verifier, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenDataset, TokenDataset]:
    """Load, cut and split the training rows: (training, evaluation)."""
    from recurrent_drafting import data, distillation, estimate

    if args.dataset_name == "self":
        expected = estimate.self_written(verifier, tokenizer, args.max_train_samples)
        require_consent(args, verifier, expected, "or --dataset_name with replies of your own")
        rows = distillation.self_rows(verifier, tokenizer, Path(args.output_dir), args.max_train_samples)
    else:
        conversations, report = data.load_dataset_by_name(
            args.dataset_name,
            split=args.dataset_split,
            max_rows=args.max_train_samples,
            skip_bad_rows=args.skip_bad_rows,
        )
        print(f"data: {report.read} conversations from {args.dataset_name}, left out {report.skipped or 'none'}")
        if args.targets == "regenerated":
            rows = regenerated(args, verifier, tokenizer, conversations)
        else:
            rows, encoded = data.encode_all(
                conversations,
                tokenizer,
                args.model_max_length,
                assistant_only=args.train_on_assistant_only,
                skip_bad_rows=args.skip_bad_rows,
            )
            print(f"data: {encoded.read} rows rendered, left out {encoded.skipped or 'none'}")
    made = len(rows := rows[: args.max_train_samples])
    rows, cut = data.truncate(rows, args.model_max_length)
    data.check_token_ids(rows, verifier.vocab_size, args.llm_name_or_path)
    training, evaluation = data.split(rows, args.max_eval_samples)
    if len(training) < args.per_device_train_batch_size:
        raise DataError(
            f"{len(training)} training rows are fewer than one batch of {args.per_device_train_batch_size}: "
            "add data or lower --per_device_train_batch_size"
        )
    print(
        f"data: {len(training)} training rows ({training.reply_tokens} reply tokens), "
        f"{len(evaluation)} evaluation rows, {cut} cut at {args.model_max_length} tokens, "
        f"{made - len(rows)} left out without a reply token before that"
    )
    if (config := distil_config(args)) is not None:
        if args.phase == "train":
            training = distilled(config, verifier, training, args.distill_max_examples)
        evaluation = distilled(config, verifier, evaluation, None)
    return training, evaluation


def regenerated(
    args: argparse.Namespace,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
) -> list[EncodedRow]:
    """Let the base answer the conversations anew, and print how many replies that gave."""
    from recurrent_drafting import distillation, estimate

    limits = reply_limits(args)
    expected = estimate.written_replies(conversations, tokenizer, **limits)
    require_consent(args, verifier, expected, "or --targets ground_truth")
    rows, report = distillation.regenerate(conversations, verifier, tokenizer, **limits)
    print(f"data: {report.read} replies written, left out {report.skipped or 'none'}")
    return rows


def reply_limits(args: argparse.Namespace) -> dict[str, Any]:
    """Return how long the base's replies may be, how many it writes, and what it passes over."""
    return {
        "max_length": args.model_max_length,
        "max_rows": args.max_train_samples,
        "skip_bad_rows": args.skip_bad_rows,
    }


def distilled(config: DistilConfig, verifier: Verifier, rows: TokenDataset, limit: int | None) -> TokenDataset:
    """Give the first ``limit`` rows the base's own continuations at every position; leave the others out."""
    from recurrent_drafting import data, distillation

    start = time.perf_counter()
    found = data.TokenDataset(distillation.distil(rows.rows[:limit], verifier, config))
    positions = sum(len(row.continuations) for row in found.rows if row.continuations is not None)
    print(
        f"distilled targets: {len(found)} rows, {positions} positions of {config.num_future_tokens} tokens, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return found


def distil_config(args: argparse.Namespace) -> DistilConfig | None:
    """Return how targets are distilled, None if they are not."""
    from recurrent_drafting.distillation import DistilConfig

    if args.targets != "distilled":
        return None
    return DistilConfig(args.distill_num_future_tokens, args.distill_temperature, args.seed)


def require_consent(args: argparse.Namespace, verifier: Verifier, expected: ExpectedData, instead: str) -> None:
    """Stop before hours of writing, unless --yes or --max_train_samples was given; print what is written."""
    from recurrent_drafting import estimate

    if args.yes or args.max_train_samples is not None or not expected.replies_written:
        return
    print(f"data to be written: {estimate.require_consent(verifier, expected, instead)}")


def expect_data(args: argparse.Namespace, verifier: Verifier, tokenizer: PreTrainedTokenizerBase) -> ExpectedData:
    """Return what the data set of the run will be, without making it."""
    from recurrent_drafting import data, estimate

    if args.dataset_name == "self":
        return estimate.self_written(verifier, tokenizer, args.max_train_samples)
    conversations, _ = data.load_dataset_by_name(
        args.dataset_name, split=args.dataset_split, max_rows=args.max_train_samples, skip_bad_rows=args.skip_bad_rows
    )
    if args.targets == "regenerated":
        return estimate.written_replies(conversations, tokenizer, **reply_limits(args))
    return estimate.given_replies(
        conversations,
        tokenizer,
        args.model_max_length,
        assistant_only=args.train_on_assistant_only,
        skip_bad_rows=args.skip_bad_rows,
    )


def dry_run(args: argparse.Namespace, training: TrainingArguments) -> int:
    """Print the resolved run and what it would take; train nothing, write nothing."""
    from dataclasses import fields, replace

    from recurrent_drafting import estimate
    from recurrent_drafting.data import TokenDataset, load_tokenizer

    usual = {item.name: item.default for item in fields(training)}
    given = {name: value for name, value in vars(args).items() if name not in usual or value != usual[name]}
    print(json.dumps({name: value for name, value in given.items() if value is not None}, indent=2, default=str))
    verifier = load_base(args, training)
    tokenizer = load_tokenizer(args.llm_name_or_path, args.revision, trust_remote_code=args.trust_remote_code)
    expected = expect_data(args, verifier, tokenizer)
    if args.targets == "distilled" and args.distill_max_examples is not None:
        expected = replace(expected, count=min(expected.count, args.distill_max_examples))
    rows = TokenDataset(expected.rows)
    with tempfile.TemporaryDirectory(prefix="dry-run-") as scratch:
        training.output_dir, training.report_to = scratch, []
        # What the sample's replies would make of the draft vocabulary says nothing.
        with contextlib.redirect_stdout(io.StringIO()):
            drafter = make_drafter(args, verifier, rows, tokenizer)
        trainer = make_trainer(training, verifier, drafter, (rows, rows))
        stored = bool(args.hidden_state_cache or args.quick)
        found = estimate.run(trainer, expected, stored_states=stored, distilled=distil_config(args))
    print(
        f"data: {expected.count} rows of {expected.tokens_per_row:.0f} tokens, {expected.replies_written} to be written"
    )
    print(found.describe())
    print("dry run: nothing was trained or written")
    return 0


def load_base(args: argparse.Namespace, training: TrainingArguments) -> Verifier:
    """Load the base in the dtype of the run."""
    from recurrent_drafting import Verifier

    dtype = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    print(f"base: {args.llm_name_or_path} ({dtype})")
    device = "cpu" if training.use_cpu else "auto"
    return Verifier.from_pretrained(
        args.llm_name_or_path, dtype, device, revision=args.revision, trust_remote_code=args.trust_remote_code
    )


def with_hidden_states(
    args: argparse.Namespace, training: TrainingArguments, verifier: Verifier, rows: TokenDataset, scratch: str
) -> TokenDataset:
    """Store the base's states of the training rows; --quick does it in a scratch directory, others on request."""
    from recurrent_drafting import distributed
    from recurrent_drafting.hidden_cache import CachedDataset, HiddenStateCache

    if not (args.hidden_state_cache or args.quick):
        return rows

    def write() -> Path:
        directory = Path(args.hidden_state_cache or scratch)
        cache = HiddenStateCache(directory, verifier, rows)
        cost = cache.cost()
        size = f"{cost.tokens} tokens, {cost.bytes / 1e6:.0f} MB, about {cost.seconds:.0f} s"
        print(f"hidden states: {size}, in {directory}")
        cache.write(rebuild=args.rebuild_cache)
        return directory

    return CachedDataset(rows, HiddenStateCache(distributed.from_first_rank(training, write), verifier, rows))


def make_drafter(
    args: argparse.Namespace, verifier: Verifier, rows: TokenDataset, tokenizer: PreTrainedTokenizerBase
) -> Drafter:
    """Load the drafter that was named, or make a new one that starts from the verifier."""
    import torch

    from recurrent_drafting import Drafter, RecurrentDraftingConfig
    from recurrent_drafting.checkpoint import load_drafter
    from recurrent_drafting.data import check_tokenizer, tokenizer_fingerprint
    from recurrent_drafting.decoding import check_fit
    from recurrent_drafting.trainer import choose_draft_vocabulary, initialise_from_verifier

    if args.drafter_name_or_path:
        # Released weights may be in bfloat16, too coarse for the optimizer's steps.
        drafter = load_drafter(args.drafter_name_or_path).float()
        check_fit(verifier, drafter)
        check_tokenizer(tokenizer, drafter.config.tokenizer_fingerprint, args.llm_name_or_path)
        for name in ("beam_width", "beam_length", "lookup_length"):
            if (value := getattr(args, name)) is not None:
                setattr(drafter.config, name, value)
        if args.phase == "train":
            drafter.config.num_draft_tokens = args.drafter_predict_n_tokens
        return drafter
    token_ids, coverage = choose_draft_vocabulary(rows, args.draft_vocab_size, verifier.vocab_size)
    print(f"draft vocabulary: {len(token_ids)} of {verifier.vocab_size} tokens, {coverage:.1%} of the reply tokens")
    torch.manual_seed(args.seed)
    drafter = Drafter(
        RecurrentDraftingConfig(
            hidden_size=verifier.hidden_size,
            vocab_size=verifier.vocab_size,
            exit_dim=round(verifier.hidden_size * args.exit_dim_multiplier),
            num_draft_layers=args.drafter_num_layers,
            rnn=args.rnn,
            draft_vocab_size=len(token_ids),
            num_draft_tokens=args.drafter_predict_n_tokens,
            beam_width=args.beam_width,
            beam_length=args.beam_length,
            lookup_length=args.lookup_length,
            verifier_name_or_path=args.llm_name_or_path,
            verifier_fingerprint=verifier.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
    )
    initialise_from_verifier(drafter, verifier, token_ids)
    return drafter


def make_trainer(
    training: TrainingArguments, verifier: Verifier, drafter: Drafter, rows: tuple[TokenDataset, TokenDataset]
) -> DrafterTrainer:
    """Put drafter, verifier and data together."""
    from recurrent_drafting.data import Collator
    from recurrent_drafting.trainer import DrafterTrainer

    return DrafterTrainer(
        drafter, verifier, training, train_dataset=rows[0], eval_dataset=rows[1], data_collator=Collator()
    )


def find_checkpoint(
    args: argparse.Namespace, training: TrainingArguments, drafter: Drafter, rows: TokenDataset
) -> str | None:
    """Return the checkpoint to go on from, None for a new run; "True" is the newest complete one.

    Raises:
        UsageError: there is none.
        ModelError: it is torn or of another run.
    """
    from recurrent_drafting import resume

    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    record = resume.run_record(
        training.decisive(), training.world_size, drafter.config, resume.data_fingerprint(rows.rows)
    )
    path = resume.find_checkpoint(wanted, Path(args.output_dir), record)
    return None if path is None else str(path)


def measure(args: argparse.Namespace, trainer: DrafterTrainer, tokenizer: Any, started: float) -> Path:
    """Decode MT-Bench prompts with drafter and baseline in turn; print and write the figures and the report."""
    from recurrent_drafting import evaluation, lossless

    questions, _ = evaluation.load_questions("mt-bench", QUICK_PROMPTS, spread=True)
    settings = evaluation.RunSettings(
        base_model=args.llm_name_or_path,
        speculator_path=str(args.output_dir),
        max_new_tokens=QUICK_TOKENS,
    )
    decoder = evaluation.speculative_decoder(trainer.verifier, trainer.drafter, settings)
    result = evaluation.compare(trainer.verifier, decoder, tokenizer, questions, settings)
    path = Path(args.output_dir) / "quick_results.json"
    result["quick_seconds"] = time.perf_counter() - started
    evaluation.write_json(result, path)
    print(evaluation.format_summary(result["summary"]))
    write_report(args, trainer, {path.stem: result})
    lossless.LosslessReport(**result["lossless"]).require_lossless()
    return path


def write_report(args: argparse.Namespace, trainer: DrafterTrainer, results: Mapping[str, Any]) -> None:
    """Write the report of the training, and of evaluations by name, into the output directory."""
    from recurrent_drafting import report

    training = {"log_history": trainer.state.log_history, "global_step": trainer.state.global_step}
    named = {"training": training, **results}
    path = Path(args.output_dir) / "report.html"
    report.write([report.Result.of(name, data) for name, data in named.items()], path)
    print(f"report: {path}")


def compare_served(
    trainer: DrafterTrainer, rows: TokenDataset, limit: int | None, max_new_tokens: int
) -> TrainServeReport | None:
    """Compare what training simulates with what decoding serves; where that cannot be done say why and return None."""
    from recurrent_drafting import train_serve

    reason = "no evaluation row has a prompt before its reply"
    if prompts := train_serve.prompts_of(rows.rows, limit):
        try:
            return train_serve.compare(trainer.verifier, trainer.drafter, prompts, trainer.beam(), max_new_tokens)
        except ResourceError as error:
            reason = str(error)
    print(f"train equals serve: not compared: {reason}")
    return None


def evaluate(trainer: DrafterTrainer, rows: TokenDataset) -> int:
    """Print loss, accuracies and simulated tau of the rows, and the tau of decoding their prompts."""
    metrics = trainer.evaluate()
    if trainer.args.process_index == 0:
        report = compare_served(trainer, rows, None, max(sum(row.loss_mask) for row in rows.rows))
        served = report and {
            "served_prompts": report.prompts,
            "served_tau": report.served.tau,
            "served_acceptance_by_depth": report.served.acceptance_by_depth,
            "served_text_simulated_tau": report.simulated.tau,
        }
        print(json.dumps({**metrics, **(served or {})}, indent=2))
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
    if (report := compare_served(trainer, rows, args.serve_check_prompts, SERVE_CHECK_TOKENS)) is not None:
        print(f"train equals serve: {report.summary()}")
        table = train_serve.evaluation_table(metrics, report)
        tracking.log_table(trainer.callback_handler.callbacks, table, trainer.state.global_step)


def execute(args: argparse.Namespace, training: TrainingArguments, started: float) -> int:
    """Run what the command line asks for."""
    from recurrent_drafting import distributed, tracking
    from recurrent_drafting.data import load_tokenizer

    verifier = load_base(args, training)
    tokenizer = load_tokenizer(args.llm_name_or_path, args.revision, trust_remote_code=args.trust_remote_code)
    training_rows, evaluation_rows = distributed.from_first_rank(training, lambda: load_data(args, verifier, tokenizer))
    drafter = make_drafter(args, verifier, training_rows, tokenizer)
    print(f"drafter: {drafter.num_parameters() / 1e6:.2f} M parameters")
    if args.phase == "eval":
        with tempfile.TemporaryDirectory(prefix="eval-") as scratch:
            training.output_dir, training.report_to = scratch, []
            trainer = make_trainer(training, verifier, drafter, (training_rows, evaluation_rows))
            return evaluate(trainer, evaluation_rows)
    checkpoint = find_checkpoint(args, training, drafter, training_rows)
    with tempfile.TemporaryDirectory(prefix="hidden-states-", ignore_cleanup_errors=True) as scratch:
        training_rows = with_hidden_states(args, training, verifier, training_rows, scratch)
        trainer = make_trainer(training, verifier, drafter, (training_rows, evaluation_rows))
        with tracking.closing(trainer.callback_handler.callbacks):
            trainer.train(resume_from_checkpoint=checkpoint)
            finish(args, trainer, evaluation_rows)
    if training.process_index == 0:
        conclude(args, trainer, tokenizer, started)
    return 0


def conclude(
    args: argparse.Namespace, trainer: DrafterTrainer, tokenizer: PreTrainedTokenizerBase, started: float
) -> None:
    """Write the report; after --quick measure first, and say what to run next."""
    if not args.quick:
        write_report(args, trainer, {})
        return
    print(f"results: {measure(args, trainer, tokenizer, started)}")
    print(
        "next:\n"
        f"  python generate_speculator.py --interactive --speculator_path {args.output_dir}\n"
        f"  python generate_speculator.py --eval_mt_bench --compare --speculator_path {args.output_dir}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    started = time.perf_counter()
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)

    def body() -> int:
        from recurrent_drafting import distributed

        args, training = parse_arguments(argv)
        distributed.check_world(training)
        with distributed.one_voice(training):
            if args.dry_run:
                return dry_run(args, training)
            writes = training.should_save and args.phase == "train"
            with claim_output_dir(args) if writes else nullcontext():
                return execute(args, training, started)

    return cli.run(body, debug)


if __name__ == "__main__":
    sys.exit(main())
