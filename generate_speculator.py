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
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from recurrent_drafting import cli
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig, SamplingConfig, SweepGrid
from recurrent_drafting.errors import UsageError

if TYPE_CHECKING:
    from recurrent_drafting import SpeculativeDecoder
    from recurrent_drafting.base_and_drafter import Models
    from recurrent_drafting.evaluation import RunSettings
    from recurrent_drafting.prompt_files import Question

MODES = ("--prompt", "--prompt_file", "--interactive", "--eval_mt_bench", "--eval_file")
# Prompts of a sweep, spread over the file.
SWEEP_PROMPTS = 8


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
    group.add_argument("--batch_size", type=int, default=RunSettings.batch_size, help="prompts decoded at a time")
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
    kinds = {"widths": int, "lengths": int, "nodes": cli.auto_or_int, "temperatures": float}
    for name, kind in kinds.items():
        usual = " ".join(cli.AUTO if value is None else str(value) for value in getattr(SweepGrid, name))
        group.add_argument(f"--sweep_{name}", nargs="+", type=kind, metavar="X", help=f"default: {usual}")
    group.add_argument(
        "--save_recommended", action="store_true", help="make the best beam width and length the drafter's defaults"
    )


def _add_models(parser: cli.ArgumentParser) -> None:
    from recurrent_drafting.base_and_drafter import ModelSettings

    group = parser.add_argument_group("models")
    group.add_argument("--base_model", help=f"default: the base of the drafter, else {DEFAULT_BASE}")
    choice = "the newest one in ./models for the base, else the released one"
    group.add_argument("--speculator_path", help=f"drafter (default: {choice})")
    group.add_argument("--revision", help="hub revision of the base")
    group.add_argument("--trust_remote_code", action="store_true", help="run the base's own code")
    group.add_argument("--allow_base_mismatch", action="store_true", help="use a drafter of another base")
    group.add_argument("--device", default=ModelSettings.device, help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default=ModelSettings.dtype, help="auto, fp32, bf16, fp16 or fp64")
    group.add_argument(
        "--compile", action="store_true", help="compile the base for batch 1 (minutes; less when run again)"
    )
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
        "--recycled_nodes",
        type=int,
        metavar="N",
        help="verified nodes that are remembered: what the base said there counts where their token comes again; "
        "0 = none (default: the drafter's own)",
    )
    beam.add_argument(
        "--max_tree_nodes",
        type=cli.auto_or_int,
        metavar="auto|N",
        help="nodes verified per step, root included, at most beam_width x beam_length + 1; "
        f"{cli.AUTO} follows the measured latency curve (default: {cli.AUTO})",
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


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        UsageError: with the range or the choices.
    """
    from recurrent_drafting.delivery import DeliverySettings

    least = {"max_num_prompts": 1, "max_prompt_length": 1, "batch_size": 1, "turns": 1}
    least |= {"num_threads": 1, "max_generation_length": 0, "beam_width": 1, "beam_length": 1}
    least |= {"lookup_length": 0, "recycled_nodes": 0}
    cli.require_least(args, least)
    BeamConfig(max_nodes=cli.fixed_number(args.max_tree_nodes))
    if args.greedy_search and args.temperature:
        raise UsageError(f"--greedy_search excludes --temperature {args.temperature}: give one")
    sampling_config(args)
    if not all([*args.stop, *args.bad_words]):
        raise UsageError("--stop and --bad_words take non-empty text, got ''")
    if args.compile and args.batch_size > 1:
        raise UsageError(f"--compile is for one prompt at a time, got --batch_size {args.batch_size}: drop one of them")
    _check_evaluation(args)
    _check_sweep(args)
    cli.settings_of(DeliverySettings, args).require_deliverable()


def _check_evaluation(args: argparse.Namespace) -> None:
    """Refuse flags of an evaluation that do not fit the mode or each other."""
    evaluates = args.eval_mt_bench or args.eval_file is not None
    for name in ("autoregressive", "sweep"):
        if args.verify_lossless and getattr(args, name):
            raise UsageError(f"--verify_lossless compares with the baseline: drop --{name}")
    for name in ("compare", "verify_lossless", "output_file", "answer_file", "report", "sweep", "use_wandb"):
        if getattr(args, name) and not evaluates:
            raise UsageError(f"--{name} goes with --eval_mt_bench or --eval_file")


def _check_sweep(args: argparse.Namespace) -> None:
    """Refuse a sweep that cannot be run, and its flags without it."""
    if args.sweep:
        from recurrent_drafting.sweep import SweepSettings

        cli.settings_of(SweepSettings, args).grid()
        if args.answer_file is not None:
            raise UsageError("--answer_file takes the replies of one setting: drop --sweep")
        if args.max_generation_length < 2:
            raise UsageError(f"--sweep needs --max_generation_length >= 2, got {args.max_generation_length}")
        return
    for name in ("sweep_widths", "sweep_lengths", "sweep_nodes", "sweep_temperatures", "save_recommended"):
        if getattr(args, name):
            raise UsageError(f"--{name} goes with --sweep")


def sampling_config(args: argparse.Namespace, bad_words_ids: tuple[tuple[int, ...], ...] = ()) -> SamplingConfig:
    """Collect the sampling flags."""
    names = [item.name for item in fields(SamplingConfig) if item.name != "bad_words_ids"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return SamplingConfig(**given, bad_words_ids=bad_words_ids)


def read_prompt(args: argparse.Namespace) -> str | None:
    """Return the prompt of a one-shot run, None in the other modes.

    Raises:
        UsageError: no mode was chosen and standard input holds nothing.
        DataError: the prompt is empty, too long or not UTF-8.
    """
    from recurrent_drafting import single_prompt

    if args.interactive or args.eval_mt_bench or args.eval_file is not None:
        return None
    if args.prompt is not None:
        return single_prompt.checked(args.prompt, "--prompt")
    if args.prompt_file is not None:
        return single_prompt.from_file(args.prompt_file)
    prompt = single_prompt.from_pipe(sys.stdin)
    if prompt is None:
        raise UsageError(f"no mode was chosen: expected one of {', '.join(MODES)}, or a piped prompt")
    return prompt


def load_questions(args: argparse.Namespace) -> list[Question] | None:
    """Read the prompt file of an evaluation; None in the other modes."""
    from recurrent_drafting import prompt_files

    if not args.eval_mt_bench and args.eval_file is None:
        return None
    questions, note = prompt_files.load_questions(
        "mt-bench" if args.eval_mt_bench else args.eval_file,
        args.max_num_prompts,
        usual=SWEEP_PROMPTS if args.sweep else None,
        spread=args.sweep,
        skip_bad_rows=args.skip_bad_rows,
    )
    if note:
        cli.note(note)
    return questions


def run_settings(args: argparse.Namespace, models: Models) -> RunSettings:
    """Collect what decoding needs to know; what is not given is the drafter's own."""
    from recurrent_drafting import data
    from recurrent_drafting.detokenizer import StopStrings
    from recurrent_drafting.evaluation import RunSettings

    own = RecurrentDraftingConfig if models.drafter is None else models.drafter.config
    nodes = cli.fixed_number(args.max_tree_nodes)
    return RunSettings(
        base_model=models.base_model,
        speculator_path=models.speculator_path,
        max_new_tokens=args.max_generation_length,
        max_prompt_length=args.max_prompt_length,
        batch_size=args.batch_size,
        turns=args.turns,
        sampling=sampling_config(args, data.bad_words_ids(models.tokenizer, args.bad_words)),
        beam=BeamConfig(
            width=args.beam_width or own.beam_width,
            length=args.beam_length or own.beam_length,
            max_nodes=nodes,
            lookup_length=own.lookup_length if args.lookup_length is None else args.lookup_length,
            recycled_nodes=own.recycled_nodes if args.recycled_nodes is None else args.recycled_nodes,
        ),
        auto_tree=nodes is None,
        stop=StopStrings(models.tokenizer, args.stop) if args.stop else None,
    )


def reply(models: Models, decoder: SpeculativeDecoder | None, settings: RunSettings, prompt: str) -> None:
    """Write the reply to one prompt on standard output, its figures on stderr."""
    from recurrent_drafting import AutoregressiveDecoder, data, reply_stream

    def show(piece: reply_stream.Piece) -> None:
        sys.stdout.write(piece.text)
        sys.stdout.flush()

    ids = data.render(models.tokenizer, [{"role": "user", "content": prompt}], ask=True)
    streamer = reply_stream.ReplyStreamer(reply_stream.TextStream(models.tokenizer, settings.stop), show)
    output = reply_stream.write(decoder or AutoregressiveDecoder(models.verifier), ids, settings.reply, streamer)
    sys.stdout.write("\n")
    cli.note(f"[{reply_stream.format_stats(streamer.stats())}, finished by {output.finish_reasons[0]}]")


def talk(models: Models, decoder: SpeculativeDecoder | None, settings: RunSettings) -> None:
    """Chat on the terminal."""
    from recurrent_drafting import AutoregressiveDecoder, chat

    baseline, terminal = AutoregressiveDecoder(models.verifier), chat.Terminal.standard()
    chat.Chat(baseline, decoder, models.tokenizer, settings.reply, terminal).run()


def evaluate(
    args: argparse.Namespace,
    models: Models,
    decoder: SpeculativeDecoder | None,
    settings: RunSettings,
    questions: Sequence[Question],
) -> None:
    """Run questions, print the summary, and deliver the results."""
    from recurrent_drafting import delivery, evaluation, evaluation_log

    wanted = cli.settings_of(delivery.DeliverySettings, args)
    baseline = decoder is None or args.compare or args.verify_lossless
    run = evaluation.Evaluation(models.verifier, decoder, models.tokenizer, settings, baseline=baseline)
    with evaluation_log.announced(wanted.progress, cli.note):
        record = run.run(questions, wanted.progress)
    print(evaluation.format_summary(record["summary"]))
    delivery.deliver(record, wanted, print)


def sweep(args: argparse.Namespace, models: Models, settings: RunSettings, questions: Sequence[Question]) -> None:
    """Try the grid, print the table, deliver the results, and save the best shape if that is wanted."""
    from recurrent_drafting import delivery
    from recurrent_drafting.sweep import Sweep, SweepSettings, drafter_directory, format_table, save_recommended

    assert models.drafter is not None and models.speculator_path is not None  # --sweep excludes --autoregressive
    directory = drafter_directory(models.speculator_path) if args.save_recommended else None
    grid, mismatch = cli.settings_of(SweepSettings, args).grid(), args.allow_base_mismatch
    run = Sweep(models.verifier, models.drafter, models.tokenizer, settings, grid, allow_base_mismatch=mismatch)
    record = run.run(questions)
    print(format_table(record))
    delivery.deliver(record, cli.settings_of(delivery.DeliverySettings, args), print)
    if directory is not None:
        save_recommended(record, directory)
        print(f"saved as the defaults of {directory}: beam width and length (tree nodes depend on the machine)")


def execute(args: argparse.Namespace) -> int:
    """Run what the command line asks for."""
    check_arguments(args)
    prompt = read_prompt(args)

    import torch
    from transformers.utils import logging

    from recurrent_drafting import base_and_drafter, evaluation

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    wanted = cli.settings_of(base_and_drafter.ModelSettings, args)
    wanted.require_device()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    questions = load_questions(args)
    models = base_and_drafter.load(wanted, cli.note)
    settings = run_settings(args, models)
    if args.sweep and questions is not None:
        sweep(args, models, settings, questions)
        return 0
    decoder = None
    if models.drafter is not None:
        decoder = evaluation.speculative_decoder(
            models.verifier,
            models.drafter,
            settings,
            allow_base_mismatch=args.allow_base_mismatch,
            repeats=evaluation.TIMINGS if prompt is None else evaluation.TIMINGS_ONE_REPLY,
        )
    if prompt is not None:
        reply(models, decoder, settings, prompt)
    elif questions is not None:
        evaluate(args, models, decoder, settings, questions)
    else:
        talk(models, decoder, settings)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: execute(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
