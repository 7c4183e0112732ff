"""Other layouts of a drafter's files, out and in; what a layout cannot hold is refused with the reason.

Run as ``python -m recurrent_drafting.checkpoint export|import --format apple|speculators FROM TO``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from recurrent_drafting import cli, manifest
from recurrent_drafting.checkpoint import (
    CONFIG,
    WEIGHTS,
    check_links,
    config_fields,
    expected_shapes,
    load_drafter,
    save_drafter,
)
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, UsageError

# What the class of Apple's config takes; it keeps further keys, such as our beam sizes, unread.
_APPLE_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
# Apple's config has this key with -1 for "not set"; nothing that decodes reads it.
_LOOKBACK = "num_lookback_tokens"
_UNSET = -1
_METADATA = {"format": "pt"}
# The layout of the speculators library: its discriminator of our algorithm, and the version it was written for.
SPECULATORS_TYPE = "recurrent_drafting"
SPECULATORS_VERSION = "0.9.0"
SPECULATORS_ARCHITECTURE = "RecurrentDraftingSpeculator"
_GREEDY = "greedy"
# Target token = draft token + offset, as int64 [V_d]; which target tokens can be drafted, as bool [V].
_OFFSETS, _MASK = "d2t", "t2d"
_SPECULATORS_KEYS = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn", "draft_vocab_size")


def export_apple(drafter: Drafter, directory: Path) -> None:
    """Write a drafter as Apple's ``config.json`` and ``model.safetensors``.

    Args:
        drafter: the drafter.
        directory: new or empty.

    Raises:
        ModelError: the layout cannot express this drafter.
        UsageError: the directory holds something.
        ResourceError: the disk is full.
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
    written = {names[name]: tensor.contiguous() for name, tensor in tensors.items()}
    manifest.save_tensors(written, directory / WEIGHTS, _METADATA)
    _write_config(directory, record)


def import_apple(directory: Path) -> Drafter:
    """Read a drafter from Apple's layout.

    Raises:
        ModelError: missing, damaged, or not what its config declares.
    """
    check_links(directory)
    config = _apple_config(directory / CONFIG)
    tensors = _our_tensors(config, _apple_names, _tensors(directory / WEIGHTS, "Apple's"), directory)
    return _assemble(config, tensors, None)


def export_speculators(drafter: Drafter, directory: Path) -> None:
    """Write a drafter in the layout of the speculators library.

    Its proposal methods know a greedy chain alone: beams go along as settings that it does not read.

    Args:
        drafter: the drafter.
        directory: new or empty.

    Raises:
        UsageError: the directory holds something.
        ResourceError: the disk is full.
    """
    config, ids = drafter.config, drafter.draft_token_ids
    names = _speculators_names(config)
    tensors = drafter.state_dict()
    written = {names[name]: tensors[name].contiguous() for name in names}
    if len(ids) < config.vocab_size:
        mask = torch.zeros(config.vocab_size, dtype=torch.bool, device=ids.device)
        mask[ids] = True
        written |= {_OFFSETS: ids - torch.arange(len(ids), device=ids.device), _MASK: mask}
    _make_empty(directory)
    manifest.save_tensors(written, directory / WEIGHTS, _METADATA)
    _write_config(directory, speculators_record(drafter))


def speculators_record(drafter: Drafter) -> dict[str, Any]:
    """Return the ``config.json`` of a drafter in the layout of the speculators library."""
    config = drafter.config
    chain = {
        "proposal_type": _GREEDY,
        "speculative_tokens": config.beam_length,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {"name_or_path": config.verifier_name_or_path, "architectures": _architectures(config)}
    return {
        **{key: value for key, value in config_fields(config).items() if key != "verifier_name_or_path"},
        "draft_vocab_size": len(drafter.draft_token_ids),
        "dtype": str(drafter.dtype).removeprefix("torch."),
        "architectures": [SPECULATORS_ARCHITECTURE],
        "speculators_model_type": SPECULATORS_TYPE,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": SPECULATORS_TYPE,
            "proposal_methods": [chain],
            "default_proposal_method": _GREEDY,
            "verifier": verifier,
        },
    }


def import_speculators(directory: Path) -> Drafter:
    """Read a drafter from the layout of the speculators library.

    Raises:
        ModelError: missing, damaged, not what its config declares, or of another algorithm.
    """
    check_links(directory)
    path = directory / WEIGHTS
    config = _speculators_config(directory / CONFIG)
    found = _tensors(path, "the speculators library's")
    ids = _draft_token_ids(config, found.pop(_OFFSETS, None), found.pop(_MASK, None), path)
    return _assemble(config, _our_tensors(config, _speculators_names, found, directory), ids)


class Format(NamedTuple):
    """How a layout is written and read."""

    export: Callable[[Drafter, Path], None]
    read: Callable[[Path], Drafter]


FORMATS = {
    "apple": Format(export_apple, import_apple),
    "speculators": Format(export_speculators, import_speculators),
}


def _write_config(directory: Path, record: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _our_tensors(
    config: RecurrentDraftingConfig,
    naming: Callable[[RecurrentDraftingConfig], dict[str, str]],
    found: dict[str, Tensor],
    directory: Path,
) -> dict[str, Tensor]:
    """Give a layout's tensors our names; all of them, of the right shapes, finite.

    Args:
        config: the drafter's shape; nothing is built of it that the tensors do not bear out.
        naming: maps our names to the layout's.
        found: by the layout's names.
        directory: of the files, for messages.

    Raises:
        ModelError: they are not those.
    """
    path, shapes = directory / WEIGHTS, expected_shapes(config, len(found), directory)
    names = naming(config)
    if found.keys() != set(names.values()):
        missing, surplus = sorted(set(names.values()) - found.keys()), sorted(found.keys() - set(names.values()))
        raise ModelError(
            f"{path} is not the layout asked for: missing {missing or 'nothing'}, unexpected "
            f"{surplus or 'nothing'}; a drafter of this package needs no import"
        )
    tensors = {name: found[theirs] for name, theirs in names.items()}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{path}: expected {names[name]} of shape {list(shapes[name])} by {CONFIG}, got "
                f"{list(tensor.shape)}; export the drafter again"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: {names[name]} holds NaN or infinity; export the drafter again")
    return tensors


def _assemble(config: RecurrentDraftingConfig, tensors: dict[str, Tensor], ids: Tensor | None) -> Drafter:
    """Make a drafter of checked tensors; all tokens can be drafted where ``ids`` is None."""
    with torch.device("meta"):
        drafter = Drafter(config)
    ids = torch.arange(config.vocab_size) if ids is None else ids
    drafter.load_state_dict({**tensors, "draft_token_ids": ids}, assign=True)
    return drafter


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
    record = _record(path)
    missing = [key for key in _APPLE_KEYS if key not in record]
    if record.get("model_type") != RecurrentDraftingConfig.model_type or missing:
        raise ModelError(
            f"{path} is no config of Apple's drafter: expected model_type {RecurrentDraftingConfig.model_type!r} and "
            f"{', '.join(_APPLE_KEYS)}; got model_type {record.get('model_type')!r}, missing "
            f"{', '.join(missing) or 'nothing'}"
        )
    return _config(path, record)


def _speculators_names(config: RecurrentDraftingConfig) -> dict[str, str]:
    """Map our tensors' names to those of the speculators layout: the head is its ``lm_head``."""
    with torch.device("meta"):
        names = Drafter(config).state_dict().keys() - {"draft_token_ids"}
    return {name: "lm_head.weight" if name == "head.weight" else name for name in sorted(names)}


def _speculators_config(path: Path) -> RecurrentDraftingConfig:
    record = _record(path)
    settings = record.get("speculators_config")
    if record.get("speculators_model_type") != SPECULATORS_TYPE or not isinstance(settings, dict):
        raise ModelError(
            f"{path} is no recurrent drafter of the speculators library: expected speculators_model_type "
            f"{SPECULATORS_TYPE!r} and a speculators_config, got {record.get('speculators_model_type')!r}; other "
            "algorithms have other weights"
        )
    methods, verifier = settings.get("proposal_methods") or [], settings.get("verifier") or {}
    _check_methods(methods, path)
    if not isinstance(verifier, dict):
        raise ModelError(f"{path}: expected verifier to be an object, got {type(verifier).__name__}; export again")
    fields = {name: record[name] for name in RecurrentDraftingConfig.__annotations__ if name in record}
    missing = [name for name in _SPECULATORS_KEYS if name not in fields]
    if missing:
        raise ModelError(f"{path}: missing {', '.join(missing)}; export the drafter again")
    if fields["draft_vocab_size"] == fields["vocab_size"]:
        fields["draft_vocab_size"] = None
    return _config(path, {**fields, "verifier_name_or_path": verifier.get("name_or_path")})


def _check_methods(methods: Any, path: Path) -> None:
    """Refuse proposal methods whose acceptance is not exact."""
    if not isinstance(methods, list) or not all(isinstance(method, dict) for method in methods):
        raise ModelError(f"{path}: expected proposal_methods to be a list of objects, got {methods!r}; export again")
    for method in methods:
        if (method.get("verifier_accept_k", 1), method.get("accept_tolerance", 0)) != (1, 0):
            raise ModelError(
                f"{path}: proposal method {method.get('proposal_type')!r} accepts tokens that the verifier would not "
                "pick (verifier_accept_k, accept_tolerance), and acceptance is exact here; set them to 1 and 0"
            )


def _draft_token_ids(
    config: RecurrentDraftingConfig, offsets: Tensor | None, mask: Tensor | None, path: Path
) -> Tensor | None:
    """Return the target tokens that can be drafted, int64 ``[V_d]``, from the layout's two tables; None is all."""
    size = config.draft_vocab_size
    if size is None and offsets is None and mask is None:
        return None
    if size is None or offsets is None or mask is None:
        found = [name for name, table in ((_OFFSETS, offsets), (_MASK, mask)) if table is not None]
        raise ModelError(
            f"{path}: expected {'neither' if size is None else 'both'} of {_OFFSETS} and {_MASK} with draft_vocab_size "
            f"{size or config.vocab_size} of {config.vocab_size}, got {', '.join(found) or 'none'}; export again"
        )
    ids = offsets.long() + torch.arange(len(offsets))
    allowed = mask.nonzero().flatten()
    if mask.shape != (config.vocab_size,) or ids.shape != (size,) or not ids.equal(allowed):
        raise ModelError(
            f"{path}: {_OFFSETS} {list(offsets.shape)} and {_MASK} {list(mask.shape)} do not name the same {size} of "
            f"{config.vocab_size} tokens in rising order; export the drafter again"
        )
    return ids


def _architectures(config: RecurrentDraftingConfig) -> list[str]:
    """Return the classes that the verifier's own config names, if it is a local directory."""
    path = Path(config.verifier_name_or_path or "") / CONFIG
    if config.verifier_name_or_path is None or not path.is_file():
        return []
    return list(_record(path).get("architectures") or [])


def _record(path: Path) -> dict[str, Any]:
    try:
        record = manifest.read_json(path)
    except OSError as error:
        reason = f"expected a drafter's config there, got {error.strerror}; name the directory that has it"
        raise ModelError(f"{path}: {reason}") from error
    except ValueError as error:
        raise ModelError(f"{path} does not read as JSON: {error}; expected a config") from error
    if not isinstance(record, dict):
        raise ModelError(f"{path}: expected an object of settings, got {type(record).__name__}")
    return record


def _config(path: Path, record: dict[str, Any]) -> RecurrentDraftingConfig:
    try:
        return RecurrentDraftingConfig(**record)
    except UsageError as error:
        raise ModelError(f"{path}: {error}; export the drafter again") from error


def _tensors(path: Path, whose: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} does not load: {error}; expected {whose} weights as safetensors") from error


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
        save_drafter(drafter, target)
    sys.stdout.write(f"{target}: {args.format} {args.action} of {args.source}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: convert(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
