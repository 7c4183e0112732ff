#!/usr/bin/env python
"""Generate text with a recurrent drafter: one prompt, a chat, or an evaluation.

Examples:
  python generate_speculator.py --interactive
  python generate_speculator.py --prompt "Why is the sky blue?"
  python generate_speculator.py --eval_mt_bench --compare --output_file results.json --report report.html
  python generate_speculator.py --eval_mt_bench --sweep --report sweep.html
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_drafting import cli
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig, SamplingConfig, SweepGrid
from recurrent_drafting.errors import DataError, ModelError, NetworkError, UsageError

if TYPE_CHECKING:
    from recurrent_drafting import Drafter, SpeculativeDecoder, Verifier
    from recurrent_drafting.detokenizer import StopStrings
    from recurrent_drafting.evaluation import RunSettings
    from recurrent_drafting.prompt_files import Question

MODES = ("--prompt", "--prompt_file", "--interactive", "--eval_mt_bench", "--eval_file")
TRAINED = "models/*-recurrent-drafter*"
RELEASED = Path(__file__).resolve().parent / "models"
MAX_PROMPT_BYTES = 64 * 1024 * 1024
# Timed forwards per tree size: a single reply must not wait for a careful measurement.
TIMINGS, TIMINGS_ONE_SHOT = 5, 1
# Prompts of a sweep, spread over the file.
SWEEP_PROMPTS = 8
AUTO = "auto"


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = cli.ArgumentParser(prog="generate_speculator.py", description=__doc__)
    _add_modes(parser)
    _add_models(parser)
    _add_sampling(parser)
    return parser


def _add_modes(parser: cli.ArgumentParser) -> None:
    from recurrent_drafting.evaluation import RunSettings

    modes = parser.add_argument_group(
        "modes", "one of these, or a prompt on standard input"
    ).add_mutually_exclusive_group()
    modes.add_argument("--prompt", metavar="TEXT", help="reply to this text")
    modes.add_argument("--prompt_file", metavar="FILE", help="reply to a file's text")
    modes.add_argument("--interactive", action="store_true", help="chat")
    modes.add_argument("--eval_mt_bench", action="store_true", help="evaluate on MT-Bench")
    modes.add_argument("--eval_file", metavar="FILE", help="evaluate on a .jsonl of question_id, category, turns")
    group = parser.add_argument_group("evaluation")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--autoregressive", action="store_true", help="baseline only, no drafter")
    which.add_argument("--compare", action="store_true", help="run the baseline too and compare prompt by prompt")
    which.add_argument("--sweep", action="store_true", help="try beam shapes, tree sizes and temperatures")
    group.add_argument(
        "--verify_lossless",
        action="store_true",
        help="--compare, and list every text that differs from the baseline's",
    )
    group.add_argument("--max_num_prompts", type=int, help="prompts used (default: all)")
    group.add_argument(
        "--max_prompt_length", type=int, default=RunSettings.max_prompt_length, help="tokens; the rest is cut"
    )
    group.add_argument("--batch_size", type=int, default=RunSettings.batch_size, help="prompts decoded together")
    group.add_argument("--turns", type=int, default=RunSettings.turns, help="turns per question")
    group.add_argument(
        "--output_file",
        metavar="FILE",
        help="write results as JSON; keeps finished prompts beside it meanwhile, so that the same command run again "
        "goes on where it was cut off",
    )
    group.add_argument(
        "--answer_file", metavar="FILE", help="write the replies as .jsonl for FastChat's and Spec-Bench's scripts"
    )
    group.add_argument("--report", metavar="FILE", help="write results as one HTML file with plots")
    group.add_argument("--use_wandb", action="store_true", help="send results to Weights & Biases")
    group.add_argument("--wandb_project", metavar="NAME", help="default: WANDB_PROJECT, else recurrent-drafting")
    group.add_argument("--skip_bad_rows", action="store_true", help="leave malformed rows out")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    _add_sweep(parser)


def _add_sweep(parser: cli.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sweep",
        f"with --sweep; each value with each, on {SWEEP_PROMPTS} prompts unless --max_num_prompts says otherwise; "
        "--beam_width, --beam_length, --max_tree_nodes, --temperature and --greedy_search fix theirs",
    )
    kinds = {"widths": int, "lengths": int, "nodes": _tree_nodes, "temperatures": float}
    for name, kind in kinds.items():
        usual = " ".join(AUTO if value is None else str(value) for value in getattr(SweepGrid, name))
        group.add_argument(f"--sweep_{name}", nargs="+", type=kind, metavar="X", help=f"default: {usual}")
    group.add_argument(
        "--save_recommended", action="store_true", help="make the best beam width and length the drafter's defaults"
    )


def _add_models(parser: cli.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--base_model", help=f"default: the base of the drafter, else {DEFAULT_BASE}")
    group.add_argument(
        "--speculator_path",
        help="drafter (default: the newest one in ./models for the base, else the released one)",
    )
    group.add_argument("--revision", help="hub revision of the base")
    group.add_argument("--trust_remote_code", action="store_true", help="run the base's own code")
    group.add_argument("--allow_base_mismatch", action="store_true", help="use a drafter of another base")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16 or fp64")
    group.add_argument("--compile", action="store_true", help="compile the base (torch.compile); first steps take long")
    group.add_argument("--num_threads", type=int, help="threads (default: torch's own choice)")
    beam = parser.add_argument_group("drafting")
    for name in ("width", "length"):
        usual = getattr(BeamConfig, name)
        beam.add_argument(f"--beam_{name}", type=int, help=f"default: the drafter's own, usually {usual}")
    beam.add_argument(
        "--lookup_length",
        type=int,
        metavar="N",
        help="tokens copied from the text's own past where it repeats; 0 = none (default: the drafter's own); "
        "copies take nodes of the tree, which has at most beam_width x beam_length + 1",
    )
    beam.add_argument(
        "--max_tree_nodes",
        type=_tree_nodes,
        metavar="auto|N",
        help="nodes verified per step, root included, at most beam_width x beam_length + 1; "
        f"{AUTO} follows the measured latency curve (default: {AUTO})",
    )


def _add_sampling(parser: cli.ArgumentParser) -> None:
    from recurrent_drafting.evaluation import RunSettings

    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max_generation_length", type=int, default=RunSettings.max_new_tokens, help="new tokens per reply"
    )
    group.add_argument("--greedy_search", action="store_true", help="temperature 0")
    for item in fields(SamplingConfig):
        if item.name != "bad_words_ids":
            # None: not given; the classes have the defaults.
            text = f"{_HELP[item.name]} (default: {item.default})"
            group.add_argument(f"--{item.name}", type=type(item.default), help=text)
    group.add_argument("--bad_words", nargs="+", default=[], metavar="WORD", help="never written")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="end the reply before this text; may be repeated",
    )


_HELP = {
    "temperature": "0 is greedy",
    "top_k": "tokens kept by rank; 0 keeps all",
    "top_p": "probability mass kept",
    "min_p": "least probability kept, as a share of the largest",
    "repetition_penalty": "on tokens of prompt and reply; 1 is off",
    "presence_penalty": "once per token of the reply",
    "frequency_penalty": "per occurrence in the reply",
    "min_new_tokens": "no end of sequence before",
    "seed": "of the noise",
}


def _tree_nodes(text: str) -> int | str:
    """Read a number of tree nodes, or auto."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {AUTO} or a number, got {text!r}") from None


def _node_limit(given: int | str | None) -> int | None:
    """Return the limit on tree nodes that a value of the command line means; None has no fixed one."""
    return given if isinstance(given, int) else None


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        UsageError: with the range or the choices.
    """
    least = {"max_num_prompts": 1, "max_prompt_length": 1, "batch_size": 1, "turns": 1}
    least |= {"num_threads": 1, "max_generation_length": 0, "beam_width": 1, "beam_length": 1, "lookup_length": 0}
    cli.require_least(args, least)
    BeamConfig(max_nodes=_node_limit(args.max_tree_nodes))
    if args.greedy_search and args.temperature:
        raise UsageError(f"--greedy_search excludes --temperature {args.temperature}: give one")
    sampling_config(args, ())
    if not all([*args.stop, *args.bad_words]):
        raise UsageError("--stop and --bad_words take non-empty text, got ''")
    _check_evaluation(args)


def _check_evaluation(args: argparse.Namespace) -> None:
    """Refuse flags of an evaluation that do not fit the mode or each other."""
    evaluates = args.eval_mt_bench or args.eval_file is not None
    for name in ("autoregressive", "sweep"):
        if args.verify_lossless and getattr(args, name):
            raise UsageError(f"--verify_lossless compares with the baseline: drop --{name}")
    for name in ("compare", "verify_lossless", "output_file", "answer_file", "report", "sweep", "use_wandb"):
        if getattr(args, name) and not evaluates:
            raise UsageError(f"--{name} goes with --eval_mt_bench or --eval_file")
    _check_sweep(args)
    for name in ("output_file", "answer_file", "report"):
        if getattr(args, name) is not None:
            _check_output_file(f"--{name}", Path(getattr(args, name)))
    if args.use_wandb:
        from recurrent_drafting import tracking

        tracking.require_installed(["wandb"])


def _check_sweep(args: argparse.Namespace) -> None:
    """Refuse a sweep that cannot be run, and its flags without it."""
    if args.sweep:
        sweep_grid(args)
        if args.answer_file is not None:
            raise UsageError("--answer_file takes the replies of one setting: drop --sweep")
        if args.max_generation_length < 2:
            raise UsageError(f"--sweep needs --max_generation_length >= 2, got {args.max_generation_length}")
        return
    for name in ("sweep_widths", "sweep_lengths", "sweep_nodes", "sweep_temperatures", "save_recommended"):
        if getattr(args, name):
            raise UsageError(f"--{name} goes with --sweep")


def sweep_grid(args: argparse.Namespace) -> SweepGrid:
    """Collect what a sweep tries: its own flags, else the flag of one value, else the default.

    Raises:
        UsageError: a value is out of range, or an axis is given twice.
    """
    temperature = 0.0 if args.greedy_search else args.temperature
    axes = {
        "widths": (f"--beam_width {args.beam_width}", args.beam_width),
        "lengths": (f"--beam_length {args.beam_length}", args.beam_length),
        "nodes": (f"--max_tree_nodes {args.max_tree_nodes}", args.max_tree_nodes),
        "temperatures": ("--greedy_search" if args.greedy_search else f"--temperature {temperature}", temperature),
    }
    chosen: dict[str, Any] = {}
    for axis, (flag, value) in axes.items():
        given = getattr(args, f"sweep_{axis}")
        if given and value is not None:
            raise UsageError(f"--sweep_{axis} excludes {flag}: give one")
        if given or value is not None:
            chosen[axis] = tuple(given or [value])
    if "nodes" in chosen:
        chosen["nodes"] = tuple(map(_node_limit, chosen["nodes"]))
    return SweepGrid(**chosen)


def _check_output_file(flag: str, path: Path) -> None:
    """Refuse a file that could not be written when the work is done."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {path} cannot be written: name a file in a writable folder")


def sampling_config(args: argparse.Namespace, bad_words_ids: Sequence[Sequence[int]]) -> SamplingConfig:
    """Collect the sampling flags."""
    names = [item.name for item in fields(SamplingConfig) if item.name != "bad_words_ids"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return SamplingConfig(**given, bad_words_ids=tuple(tuple(word) for word in bad_words_ids))


def bad_words_ids(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Return each word's tokens, at the start of a text and after a space."""
    found = []
    for word in words:
        for text in (word, f" {word}"):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in found:
                found.append(ids)
    return found


def read_prompt(args: argparse.Namespace) -> str | None:
    """Return the prompt of a one-shot run, None in the other modes.

    Raises:
        UsageError: no mode was chosen and standard input holds nothing.
        DataError: the prompt is empty, too long or not UTF-8.
    """
    if args.interactive or args.eval_mt_bench or args.eval_file is not None:
        return None
    if args.prompt is not None:
        return _checked_prompt(args.prompt, "--prompt")
    if args.prompt_file is not None:
        try:
            with Path(args.prompt_file).open("rb") as file:
                raw = file.read(MAX_PROMPT_BYTES + 1)
        except OSError as error:
            raise DataError(f"{args.prompt_file} cannot be read: {error.strerror}; check the path") from error
        return _checked_prompt(_text(raw, args.prompt_file), args.prompt_file)
    raw = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if not raw:
        raise UsageError(f"no mode was chosen: expected one of {', '.join(MODES)}, or a piped prompt")
    return _checked_prompt(_text(raw, "standard input"), "standard input")


def _text(raw: bytes, where: str) -> str:
    if len(raw) > MAX_PROMPT_BYTES:
        raise DataError(f"{where} holds more than {MAX_PROMPT_BYTES} bytes: shorten the prompt")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}:{line}: expected UTF-8, got byte {raw[error.start]:#04x}; convert it") from error


def _checked_prompt(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where} is empty: expected a prompt of at least one character")
    place = next((index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if place is not None:
        raise DataError(f"{where}: expected UTF-8, got a byte that is none at character {place + 1}; convert it")
    return text.rstrip("\n")


def find_drafters() -> list[tuple[Path, str | None]]:
    """List the drafters on this machine, newest first and released ones last, with their bases."""
    from recurrent_drafting.checkpoint import CONFIG, WEIGHTS, is_drafter

    def usable(paths: Any) -> list[Path]:
        return [path for path in paths if is_drafter(path) and (path / WEIGHTS).is_file()]

    def age(path: Path) -> float:
        return (path / WEIGHTS).stat().st_mtime

    trained = sorted(usable(Path().glob(TRAINED)), key=age, reverse=True)
    released = usable(sorted(RELEASED.glob("*-redrafter")))
    return [
        (path, json.loads((path / CONFIG).read_text()).get("verifier_name_or_path")) for path in (*trained, *released)
    ]


def choose_drafter(base: str) -> Path:
    """Return the newest drafter trained here for a base, else the released one.

    Raises:
        ModelError: there is none; the others are listed.
    """
    found = find_drafters()
    for path, verifier in found:
        if verifier == base or path == RELEASED / f"{Path(base).name}-redrafter":
            return path
    raise ModelError(
        f"no drafter for {base}: {_list(found)}; train one with train_speculator.py, name one with "
        "--speculator_path, or use --autoregressive"
    )


def _list(found: Sequence[tuple[Path, str | None]]) -> str:
    if not found:
        return "no drafters found"
    return "drafters found: " + ", ".join(f"{path} (for {verifier})" for path, verifier in found)


def load_named_drafter(name: str) -> Drafter:
    """Load a drafter; say which others there are if it does not load."""
    from recurrent_drafting.checkpoint import load_drafter

    path = cli.user_path(name)
    local = name.count("/") != 1 or name.startswith((".", "~")) or path.parent.is_dir()
    if local and not path.exists():
        raise ModelError(f"--speculator_path {name} does not exist; {_list(find_drafters())}")
    try:
        return load_drafter(str(path) if local else name)
    except (ModelError, NetworkError) as error:
        raise type(error)(f"{error}; {_list(find_drafters())}") from error


def load_models(args: argparse.Namespace) -> tuple[Verifier, Drafter | None]:
    """Load base and drafter, and say on stderr which ones; fill in --base_model and the drafter."""
    from recurrent_drafting import Verifier

    drafter = None
    if not args.autoregressive:
        if args.speculator_path is None:
            args.base_model = args.base_model or DEFAULT_BASE
            args.speculator_path = str(choose_drafter(args.base_model))
        drafter = load_named_drafter(args.speculator_path)
        args.base_model = args.base_model or drafter.config.verifier_name_or_path
    args.base_model = args.base_model or DEFAULT_BASE
    _say(f"base: {args.base_model}; drafter: {args.speculator_path if drafter else 'none'}")
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    verifier = Verifier.from_pretrained(args.base_model, args.dtype, args.device, **options)
    if args.compile:
        verifier.compile()
    return verifier, drafter


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_settings(args: argparse.Namespace, tokenizer: Any, config: RecurrentDraftingConfig | None) -> RunSettings:
    """Collect what decoding needs to know."""
    from recurrent_drafting.detokenizer import StopStrings
    from recurrent_drafting.evaluation import RunSettings

    stop: StopStrings | None = StopStrings(tokenizer, args.stop) if args.stop else None
    own = config or RecurrentDraftingConfig
    return RunSettings(
        base_model=args.base_model,
        speculator_path=args.speculator_path,
        max_new_tokens=args.max_generation_length,
        max_prompt_length=args.max_prompt_length,
        batch_size=args.batch_size,
        turns=args.turns,
        sampling=sampling_config(args, bad_words_ids(tokenizer, args.bad_words)),
        beam=BeamConfig(
            width=args.beam_width or own.beam_width,
            length=args.beam_length or own.beam_length,
            max_nodes=_node_limit(args.max_tree_nodes),
            lookup_length=own.lookup_length if args.lookup_length is None else args.lookup_length,
        ),
        auto_tree=_node_limit(args.max_tree_nodes) is None,
        stop=stop,
    )


def reply(decoder: Any, tokenizer: Any, settings: RunSettings, prompt: str) -> None:
    """Write the reply to one prompt on standard output, its figures on stderr."""
    from recurrent_drafting import chat, data

    def show(piece: chat.Piece) -> None:
        sys.stdout.write(piece.text)
        sys.stdout.flush()

    ids = data.render(tokenizer, [{"role": "user", "content": prompt}], ask=True)
    streamer = chat.ReplyStreamer(chat.TextStream(tokenizer, settings.stop), show)
    output = decoder.generate(
        [ids],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        stop=settings.stop,
        streamer=streamer,
    )
    sys.stdout.write("\n")
    _say(f"[{chat.format_stats(streamer.stats())}, finished by {output.finish_reasons[0]}]")


def talk(verifier: Verifier, decoder: SpeculativeDecoder | None, tokenizer: Any, settings: RunSettings) -> None:
    """Chat on the terminal."""
    from recurrent_drafting import AutoregressiveDecoder, chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is no text would end the stream, and with it the lines behind it; so the chat gets it and refuses
        # its message alone. A pipe is UTF-8 in every locale, as one that brings a prompt is.
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="surrogateescape")
    chat.Chat(
        AutoregressiveDecoder(verifier),
        decoder,
        tokenizer,
        chat.ChatSettings(settings.max_new_tokens, settings.sampling, settings.stop),
        chat.Terminal(sys.stdin, sys.stdout),
    ).run()


def load_questions(args: argparse.Namespace) -> list[Question] | None:
    """Read the prompt file of an evaluation; None in the other modes."""
    from recurrent_drafting import prompt_files

    if not args.eval_mt_bench and args.eval_file is None:
        return None
    source = "mt-bench" if args.eval_mt_bench else args.eval_file
    count, spread = args.max_num_prompts, args.sweep
    if args.sweep and count is None:
        whole, _ = prompt_files.load_questions(source, skip_bad_rows=args.skip_bad_rows)
        count = min(SWEEP_PROMPTS, len(whole))
    questions, note = prompt_files.load_questions(source, count, spread=spread, skip_bad_rows=args.skip_bad_rows)
    if note:
        _say(note)
    return questions


def evaluate(
    args: argparse.Namespace,
    verifier: Verifier,
    decoder: SpeculativeDecoder | None,
    tokenizer: Any,
    settings: RunSettings,
    questions: Sequence[Question],
) -> None:
    """Run questions, print the summary, and deliver the results."""
    from recurrent_drafting import evaluation, evaluation_log

    progress = None if args.output_file is None else evaluation_log.path_for(Path(args.output_file))
    if progress is not None and evaluation_log.holds_batches(progress):
        _say(f"going on from {progress}")
    try:
        if decoder is None:
            record = evaluation.run_baseline(verifier, tokenizer, questions, settings, progress)
        elif args.compare or args.verify_lossless:
            record = evaluation.compare(verifier, decoder, tokenizer, questions, settings, progress)
        else:
            record = evaluation.run_speculative(decoder, tokenizer, questions, settings, progress)
    except KeyboardInterrupt:
        if progress is not None and evaluation_log.holds_batches(progress):
            _say(f"finished prompts are kept in {progress}: run the same command again to go on")
        raise
    print(evaluation.format_summary(record["summary"]))
    deliver(args, record)


def sweep(
    args: argparse.Namespace,
    verifier: Verifier,
    drafter: Drafter,
    tokenizer: Any,
    settings: RunSettings,
    questions: Sequence[Question],
) -> None:
    """Try the grid, print the table, deliver the results, and save the best shape if that is wanted.

    Raises:
        UsageError: the drafter to save to is no local directory.
    """
    from recurrent_drafting.sweep import Sweep, format_table, save_recommended

    path = cli.user_path(args.speculator_path)
    if args.save_recommended and not path.is_dir():
        raise UsageError(f"--save_recommended writes into the drafter: expected a local directory, got {path}")
    mismatch = args.allow_base_mismatch
    run = Sweep(verifier, drafter, tokenizer, settings, sweep_grid(args), allow_base_mismatch=mismatch)
    record = run.run(questions)
    print(format_table(record))
    deliver(args, record)
    if args.save_recommended:
        save_recommended(record, path)
        print(f"saved as the defaults of {path}: beam width and length (tree nodes depend on the machine)")


def deliver(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Write results and report, tell the tracker, and insist on equal texts."""
    from recurrent_drafting import answers, evaluation_log, evaluation_tracking, report, result_files
    from recurrent_drafting.lossless import LosslessReport

    if args.output_file is not None:
        result_files.write_json(record, Path(args.output_file))
        evaluation_log.path_for(Path(args.output_file)).unlink(missing_ok=True)
        print(f"results: {args.output_file}")
    if args.answer_file is not None:
        print(f"answers: {', '.join(map(str, answers.write(record, Path(args.answer_file))))}")
    if args.report is not None:
        report.write([report.Result.of(Path(args.report).stem, record)], Path(args.report))
        print(f"report: {args.report}")
    if args.use_wandb:
        evaluation_tracking.log(record, args.wandb_project)
    if "lossless" in record:
        audit = LosslessReport(**record["lossless"])
        if args.verify_lossless:
            print(audit.listing())
        audit.require_lossless()


def execute(args: argparse.Namespace) -> int:
    """Run what the command line asks for."""
    check_arguments(args)
    prompt = read_prompt(args)

    import torch
    from transformers.utils import logging

    from recurrent_drafting import AutoregressiveDecoder, data, evaluation
    from recurrent_drafting.verifier import resolve_device, resolve_dtype

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    resolve_dtype(args.dtype, resolve_device(args.device))
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    questions = load_questions(args)
    verifier, drafter = load_models(args)
    tokenizer = data.load_tokenizer(args.base_model, args.revision, trust_remote_code=args.trust_remote_code)
    if drafter is not None:
        data.check_tokenizer(tokenizer, drafter.config.tokenizer_fingerprint, args.base_model)
    settings = run_settings(args, tokenizer, drafter.config if drafter else None)
    if args.sweep and drafter is not None and questions is not None:
        sweep(args, verifier, drafter, tokenizer, settings, questions)
        return 0
    decoder = None
    if drafter is not None:
        decoder = evaluation.speculative_decoder(
            verifier,
            drafter,
            settings,
            allow_base_mismatch=args.allow_base_mismatch,
            repeats=TIMINGS if prompt is None else TIMINGS_ONE_SHOT,
        )
    if prompt is not None:
        reply(decoder or AutoregressiveDecoder(verifier), tokenizer, settings, prompt)
    elif questions is not None:
        evaluate(args, verifier, decoder, tokenizer, settings, questions)
    else:
        talk(verifier, decoder, tokenizer, settings)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: execute(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
