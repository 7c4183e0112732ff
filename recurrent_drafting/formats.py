"""Other layouts of a drafter's files, out and in; what a layout cannot hold is refused with the reason.

Run as ``python -m recurrent_drafting.checkpoint export|import --format apple FROM TO``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from recurrent_drafting import cli
from recurrent_drafting.checkpoint import CONFIG, WEIGHTS, load_drafter
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, UsageError

# What the class of Apple's config takes; it keeps further keys, such as our beam sizes, unread.
_APPLE_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
# Apple's config has this key with -1 for "not set"; nothing that decodes reads it.
_LOOKBACK = "num_lookback_tokens"
_UNSET = -1
_METADATA = {"format": "pt"}


def export_apple(drafter: Drafter, directory: Path) -> None:
    """Write a drafter as Apple's ``config.json`` and ``model.safetensors``.

    Args:
        drafter: the drafter.
        directory: new or empty.

    Raises:
        ModelError: the layout cannot express this drafter.
        UsageError: the directory holds something.
    """
    _refuse_unless_apple_can(drafter)
    config = drafter.config
    record = {key: value for key, value in config.to_diff_dict().items() if key not in ("architectures", "dtype")}
    record |= {key: getattr(config, key) for key in _APPLE_KEYS}
    record = {_LOOKBACK: _UNSET, **record, "model_type": config.model_type}
    tensors = drafter.state_dict()
    del tensors["draft_token_ids"]
    names = _apple_names(config)
    _make_empty(directory)
    save_file({names[name]: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, _METADATA)
    (directory / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def import_apple(directory: Path) -> Drafter:
    """Read a drafter from Apple's layout.

    Raises:
        ModelError: missing, damaged, or not what its config declares.
    """
    config = _apple_config(directory / CONFIG)
    names = _apple_names(config)
    found = _tensors(directory / WEIGHTS)
    if found.keys() != set(names.values()):
        missing, surplus = sorted(set(names.values()) - found.keys()), sorted(found.keys() - set(names.values()))
        raise ModelError(
            f"{directory / WEIGHTS} is not Apple's layout: missing {missing or 'nothing'}, unexpected "
            f"{surplus or 'nothing'}; a drafter of this package needs no import"
        )
    with torch.device("meta"):
        drafter = Drafter(config)
    shapes = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
    tensors = {name: found[theirs] for name, theirs in names.items()}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{directory / WEIGHTS}: expected {names[name]} of shape {list(shapes[name])} by {CONFIG}, got "
                f"{list(tensor.shape)}; export the drafter again"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{directory / WEIGHTS}: {names[name]} holds NaN or infinity; export the drafter again")
    tensors["draft_token_ids"] = torch.arange(config.vocab_size)
    drafter.load_state_dict(tensors, assign=True)
    return drafter


class Format(NamedTuple):
    """How a layout is written and read."""

    export: Callable[[Drafter, Path], None]
    read: Callable[[Path], Drafter]


FORMATS = {"apple": Format(export_apple, import_apple)}


def _apple_names(config: RecurrentDraftingConfig) -> dict[str, str]:
    """Map our tensors' names to Apple's."""
    both = ("weight", "bias")
    names = {f"rnn_u.{part}": f"rnn_u.{part}" for part in both} | {"rnn_w.weight": "rnn_w.weight"} if config.rnn else {}
    if config.exit_dim != 2 * config.hidden_size:
        names |= {f"input_proj.{part}": f"input_proj.{part}" for part in both}
    for layer in range(config.num_draft_layers):
        names |= {f"blocks.{layer}.linear.{part}": f"lm_head.{layer}.linear.{part}" for part in both}
    return names | {"head.weight": f"lm_head.{config.num_draft_layers}.weight"}


def _refuse_unless_apple_can(drafter: Drafter) -> None:
    config, ids = drafter.config, drafter.draft_token_ids
    reasons = []
    if not ids.equal(torch.arange(config.vocab_size, device=ids.device)):
        reasons.append(
            f"it drafts from {len(ids)} of {config.vocab_size} tokens, and Apple's head scores all of them; train with "
            "--draft_vocab_size 0"
        )
    if config.emb_norm:
        reasons.append("it normalises embeddings (emb_norm), and Apple's takes them as they are; train without")
    if unknown := sorted(drafter.state_dict().keys() - _apple_names(config).keys() - {"draft_token_ids"}):
        reasons.append(f"Apple's has no place for {', '.join(unknown)}")
    if reasons:
        raise ModelError(f"Apple's layout cannot express this drafter: {'; and '.join(reasons)}")


def _apple_config(path: Path) -> RecurrentDraftingConfig:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} does not read as JSON: {error}; expected Apple's drafter config") from error
    kind = record.get("model_type") if isinstance(record, dict) else None
    missing = [key for key in _APPLE_KEYS if not isinstance(record, dict) or key not in record]
    if kind != RecurrentDraftingConfig.model_type or missing:
        raise ModelError(
            f"{path} is no config of Apple's drafter: expected model_type {RecurrentDraftingConfig.model_type!r} and "
            f"{', '.join(_APPLE_KEYS)}; got model_type {kind!r}, missing {', '.join(missing) or 'nothing'}"
        )
    try:
        return RecurrentDraftingConfig(**record)
    except UsageError as error:
        raise ModelError(f"{path}: {error}; export the drafter again") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} does not load: {error}; expected Apple's weights as safetensors") from error


def _make_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not empty: name a new directory")
    directory.mkdir(parents=True, exist_ok=True)


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = cli.ArgumentParser(
        prog="python -m recurrent_drafting.checkpoint", description="Turn a drafter into another layout, or back."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="export|import")
    for action, description in (("export", "write another layout"), ("import", "read another layout")):
        own = actions.add_parser(action, help=description, description=description)
        own.add_argument("--format", required=True, choices=sorted(FORMATS), help="the other layout")
        own.add_argument(
            "source", metavar="FROM", help="directory of the drafter" + " (or hub id)" * (action == "export")
        )
        own.add_argument("target", metavar="TO", help="new directory")
        own.add_argument("--debug", action="store_true", help="print tracebacks")
    return parser


def convert(args: Any) -> int:
    """Run what the command line asks for."""
    logging.disable_progress_bar()
    chosen, target = FORMATS[args.format], Path(args.target)
    if args.action == "export":
        chosen.export(load_drafter(args.source), target)
    else:
        drafter = chosen.read(Path(args.source))
        _make_empty(target)
        drafter.save_pretrained(target)
    sys.stdout.write(f"{target}: {args.format} {args.action} of {args.source}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: convert(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
