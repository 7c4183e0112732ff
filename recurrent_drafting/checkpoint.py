"""Save drafters whole or not at all; load them with checks first, and errors that say what does not fit."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from recurrent_drafting import manifest
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, NetworkError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INDEX = f"{WEIGHTS}.index.json"


def save_drafter(drafter: Drafter, directory: str | Path, fingerprints: Mapping[str, str | None] | None = None) -> None:
    """Write config, weights and manifest; they appear when all of them are on the disk.

    Args:
        drafter: the drafter.
        directory: new, or one whose files of these names are replaced.
        fingerprints: of what it was made from besides what its config knows, e.g. ``data``.

    Raises:
        ResourceError: the disk is full; what was there stays.
    """
    record = {"fingerprints": {**config_fingerprints(drafter.config), **(fingerprints or {})}}
    with manifest.files_of(Path(directory), record) as partial:
        drafter.save_pretrained(partial)


def config_fingerprints(config: RecurrentDraftingConfig) -> dict[str, str | None]:
    """Return the identities that a drafter's config knows; ``None`` is unknown."""
    fields = json.dumps(config_fields(config), sort_keys=True)
    return {
        "verifier": config.verifier_fingerprint,
        "tokenizer": config.tokenizer_fingerprint,
        "configuration": hashlib.sha256(fields.encode()).hexdigest(),
    }


def config_fields(config: RecurrentDraftingConfig) -> dict[str, Any]:
    """Return a drafter's own settings, without what the library adds."""
    values = config.to_dict()
    return {name: values[name] for name in RecurrentDraftingConfig.__annotations__ if name in values}


def is_drafter(directory: Path) -> bool:
    """Tell whether a directory says it holds a drafter."""
    try:
        record = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("model_type") == RecurrentDraftingConfig.model_type


def load_drafter(name_or_path: str, revision: str | None = None) -> Drafter:
    """Load a drafter from a directory or a hub id.

    Raises:
        ModelError: missing, damaged, of another kind, or with non-finite weights.
        NetworkError: no local path, and the hub did not give it.
    """
    path = Path(name_or_path)
    if path.exists():
        _check_links(path)
        _check_directory(path)
        if (path / manifest.MANIFEST).exists():
            manifest.read(path)
        _check_header(path)
    try:
        loaded: Any = Drafter.from_pretrained(
            name_or_path,
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
            # Reported below, by name, instead of in a table on the log.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = _first_line(error)
        if path.exists():
            raise ModelError(f"drafter {path} does not load: {reason}; train or download it again") from error
        raise NetworkError(
            f"drafter {name_or_path!r} is no local path and the hub did not give it: {reason}; check the name"
        ) from error
    drafter: Drafter = loaded[0]
    _check_weights(drafter, loaded[1], name_or_path)
    return drafter


def _check_links(path: Path) -> None:
    """Refuse files that lead out of the directory, as an index of shards or a link can."""
    if (path / INDEX).is_symlink() or (path / INDEX).exists():
        raise ModelError(f"{path / INDEX}: expected one {WEIGHTS}, found an index of shards; save the drafter again")
    # The hub's cache keeps a snapshot's files as links into its own blobs.
    inside = (path.resolve(), path.resolve().parent.parent / "blobs")
    for name in (CONFIG, WEIGHTS, manifest.MANIFEST):
        target = (path / name).resolve()
        if not any(target.is_relative_to(directory) for directory in inside):
            raise ModelError(f"{path / name}: expected a file of its own directory, found a link to {target}; copy it")


def _check_directory(path: Path) -> None:
    if not is_drafter(path):
        raise ModelError(
            f"{path} is no drafter: expected a {CONFIG} with model_type "
            f"{RecurrentDraftingConfig.model_type!r}; train one with train_speculator.py"
        )
    if not (path / WEIGHTS).is_file():
        pickles = sorted(item.name for item in path.glob("*") if item.suffix in {".bin", ".pt", ".pth"})
        found = f"found {', '.join(pickles)}, which may run code when loaded" if pickles else "found none"
        raise ModelError(f"{path} holds no {WEIGHTS}: {found}; convert with safetensors.torch.save_file or train again")


def _check_header(path: Path) -> None:
    """Compare the names and shapes that the weights file declares with the config's, before anything is allocated."""
    file = path / WEIGHTS
    try:
        with safe_open(file, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        config = RecurrentDraftingConfig.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        at = file if isinstance(error, SafetensorError) else path
        raise ModelError(f"drafter {at} does not load: {_first_line(error)}; train or download it again") from error
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Drafter(config).state_dict().items()}
    for kind, names in (("missing", expected.keys() - found), ("unexpected", found.keys() - expected)):
        if names:
            raise ModelError(f"drafter {path}: {kind} keys in {WEIGHTS}: {', '.join(sorted(names))}")
    wrong = [
        f"{name} {list(found[name])}, not {list(shape)}" for name, shape in expected.items() if found[name] != shape
    ]
    if wrong:
        raise ModelError(
            f"drafter {path}: shapes in {WEIGHTS} differ from {CONFIG}: {'; '.join(wrong)}; train it again"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_weights(drafter: Drafter, info: dict[str, object], name: str) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = info.get(kind) or ()
        keys = sorted(str(item[0] if isinstance(item, tuple) else item) for item in found)  # type: ignore[attr-defined]
        if keys:
            raise ModelError(f"drafter {name}: {kind.replace('_', ' ')} in {WEIGHTS}: {', '.join(keys)}")
    for key, tensor in drafter.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"drafter {name}: weights {key} hold NaN or infinity; train or download it again")
    ids, vocab_size = drafter.draft_token_ids, drafter.config.vocab_size
    if not bool((ids.diff() > 0).all()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise ModelError(f"drafter {name}: expected draft_token_ids rising in 0..{vocab_size - 1}; download it again")


if __name__ == "__main__":
    # The layouts stand below this module, so their command line is run, not imported.
    runpy.run_module("recurrent_drafting.formats", run_name="__main__", alter_sys=True)
