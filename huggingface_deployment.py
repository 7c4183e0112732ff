#!/usr/bin/env python
"""Put a trained drafter on the Hugging Face hub: card from its evaluation, all files in one commit.

The token comes from HF_TOKEN or from `hf auth login`.

Examples:
  python huggingface_deployment.py --model_path models/my-drafter --repo_name user/my-drafter --dry_run
  python huggingface_deployment.py --model_path models/my-drafter --repo_name user/my-drafter --private
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recurrent_drafting import cli
from recurrent_drafting.errors import ModelError, UsageError


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = cli.ArgumentParser(prog="huggingface_deployment.py", description=__doc__)
    parser.add_argument("--model_path", required=True, metavar="DIR", help="directory of the drafter")
    parser.add_argument("--repo_name", required=True, metavar="USER/NAME", help="repository on the hub")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--dry_run", action="store_true", help="show card and files; write and send nothing")
    card = parser.add_argument_group("card")
    card.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="evaluation files (default: *results*.json of DIR)"
    )
    card.add_argument("--base_model", metavar="HUB_ID", help="hub id of the base (default: what the drafter names)")
    card.add_argument("--license", help="of the drafter (default: that of a packaged base)")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run what the command line asks for."""
    directory = cli.user_path(args.model_path)
    check_names(args.repo_name, directory)

    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from recurrent_drafting import hub
    from recurrent_drafting.checkpoint import load_drafter

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    config = load_drafter(str(directory)).config
    evaluations = hub.read_evaluations(directory, args.results)
    base = hub.base_of(config, evaluations, args.base_model)
    base = replace(base, licence=args.license or base.licence)
    card = hub.model_card(args.repo_name, config, evaluations, base)
    if hub.own_card(directory) is not None:
        cli.note(f"{directory / hub.CARD} is your own: it is used as it is")
        card = hub.own_card(directory) or card
    elif missing := [flag for flag, value in (("--base_model", base.name), ("--license", base.licence)) if not value]:
        cli.note(f"the card does not state what {' and '.join(missing)} would")
    files = hub.files_to_upload(directory, args.repo_name, card, evaluations)
    if args.dry_run:
        show(card, files)
        return 0
    hub.require_token()
    hub.write_files(directory, card)
    print(hub.upload(args.repo_name, files, private=args.private, revision=args.revision))
    return 0


def check_names(repo_name: str, directory: Path) -> None:
    """Refuse names that cannot be, before anything is loaded.

    Raises:
        UsageError: the repository's name.
        ModelError: no such directory.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_name)
    except HFValidationError as error:
        raise UsageError(f"--repo_name {repo_name!r}: {error}") from error
    if repo_name.count("/") != 1:
        raise UsageError(f"--repo_name {repo_name!r}: expected user/name")
    if not directory.is_dir():
        raise ModelError(f"--model_path {directory} is no directory: expected one written by train_speculator.py")


def show(card: str, files: dict[str, bytes | Path]) -> None:
    """Print the card and the file list of a dry run."""
    print(card)
    for name, item in files.items():
        size = len(item) if isinstance(item, bytes) else item.stat().st_size
        print(f"{size:>12,} bytes  {name}")
    print("dry run: nothing was written or sent")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: execute(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
