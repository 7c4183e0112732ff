"""What the benchmarks share: the flags that most of them have, MT-Bench's prompts, and how a record begins and ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recurrent_drafting import cli, data, manifest, prompt_files, result_files
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.checkpoint import WEIGHTS


def build_parser(description: str | None, *, drafter: bool = True, **defaults: str | float) -> cli.ArgumentParser:
    """Begin a command line: base, drafter, output, and flags that take one value.

    Args:
        description: the benchmark's docstring.
        drafter: it needs one.
        defaults: further flags by name, each with its default, whose type is the flag's.
    """
    parser = cli.ArgumentParser(description=description)
    parser.add_argument("--base_model", default=DEFAULT_BASE)
    if drafter:
        parser.add_argument("--speculator_path", required=True)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--output", type=Path, help="JSON; where there is a plot, it goes beside it")
    return parser


def command(script: str, args: argparse.Namespace, *flags: str) -> str:
    """Return the command that measures the same again.

    Args:
        script: the benchmark's file.
        args: of the run.
        flags: what decides the figures; a switch is named where it is on, other flags where they are set.
    """
    words = [f"python benchmarks/{Path(script).name}"]
    for name in flags:
        value = getattr(args, name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def head(script: str, args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """Return how a record begins: its ``command``, the base, the drafter where there is one, and the machine."""
    drafter = getattr(args, "speculator_path", None)
    return {
        "command": command(script, args, *flags),
        "base_model": args.base_model,
        **({} if drafter is None else {"drafter": drafter_named(drafter)}),
        "machine": result_files.machine(),
    }


def drafter_named(name: str) -> dict[str, str]:
    """Return which drafter a record is of: the last part of its path, and the hash of its weights, or its hub id."""
    path = cli.user_path(name)
    weights = path / WEIGHTS
    found = {"name": path.resolve().name if path.is_dir() else name}
    return found | {"weights_sha256": manifest.sha256(weights)} if weights.is_file() else found


def mt_bench_prompts(base_model: str, count: int | None, most_tokens: int = 0) -> list[list[int]]:
    """Return the token ids of MT-Bench's first turns, so many of them spread over the file, or all.

    Args:
        base_model: whose tokenizer and chat template.
        count: of prompts, None is all.
        most_tokens: puts as many of the next questions before each one as fit in so many tokens; 0 leaves it alone.
    """
    tokenizer = data.load_tokenizer(base_model)
    every = [item.turns[0] for item in prompt_files.load_questions("mt-bench", None)[0]]
    questions, _ = prompt_files.load_questions("mt-bench", count, spread=True)

    def render(text: str) -> list[int]:
        return data.render(tokenizer, [{"role": "user", "content": text}], ask=True)

    prompts = []
    for question in questions:
        text = question.turns[0]
        start = every.index(text) + 1
        for other in every[start:] + every[:start] if most_tokens else ():
            longer = f"{other}\n\n{text}"
            if len(render(longer)) > most_tokens:
                break
            text = longer
        prompts.append(render(text))
    return prompts


def write(record: dict[str, Any], output: Path | None, plot: Callable[[dict[str, Any]], str] | None = None) -> None:
    """Write a record where ``--output`` says, and the page that ``plot`` draws of it beside it."""
    if output:
        result_files.write_json(record, output)
        if plot:
            result_files.write_text(plot(record), output.with_suffix(".html"))
