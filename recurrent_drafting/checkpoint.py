"""Save drafters whole or not at all; load them with checks first, and errors that say what does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from recurrent_drafting import assets, manifest, memory
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, NetworkError, ResourceError, first_line

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INDEX = f"{WEIGHTS}.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# httpx.HTTPError or httpx2.HTTPError, by version of the hub's client: what its own error is made from.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
# What transformers ends in when a file is damaged or a setting is of another kind than it expects.
LOAD_FAILURES = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError),
    *(SafetensorError, StrictDataclassError, HTTP_ERROR),
)
# What a fingerprint reads of a weight file: its first bytes, and pieces at equal distances.
_HEADER_BYTES, _FINGERPRINT_SAMPLES, _SAMPLE_BYTES = 65_536, 256, 256
_CONVERT = "convert with safetensors.torch.save_file"
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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


def base_fingerprint(directory: Path) -> str | None:
    """Return the identity of a base's weights, None where there are no weights in the directory.

    It is the packaged file's SHA-256, else one of the weight files' sizes, headers and a sample of their bytes:
    a fine-tuned copy differs everywhere, and weights of many gigabytes need not be read whole.

    Args:
        directory: a model as transformers saves it.

    Raises:
        ModelError: the record of a packaged model is damaged.
    """
    files = sorted(directory.glob("*.safetensors"))
    if (packaged := assets.asset_fingerprint(directory)) is not None or not files:
        return packaged
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little") + file.read(_HEADER_BYTES))
            for index in range(_FINGERPRINT_SAMPLES):
                file.seek(size * index // _FINGERPRINT_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
        record = manifest.read_json(directory / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("model_type") == RecurrentDraftingConfig.model_type


def load_drafter(name_or_path: str, revision: str | None = None) -> Drafter:
    """Load a drafter from a directory or a hub id; both are checked before anything of them is read.

    Raises:
        ModelError: missing, damaged, of another kind, or with non-finite weights.
        NetworkError: no local path, and the hub did not give it.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = _download(name_or_path, revision or "main")
    check_links(path)
    _check_directory(path)
    if (path / manifest.MANIFEST).exists():
        manifest.read(path)
    _check_header(path)
    try:
        loaded: Any = Drafter.from_pretrained(
            str(path),
            use_safetensors=True,
            output_loading_info=True,
            # Reported below, by name, instead of in a table on the log.
            ignore_mismatched_sizes=True,
        )
    except LOAD_FAILURES as error:
        if memory.is_shortage(error):
            raise
        raise ModelError(f"drafter {path} does not load: {first_line(error)}; train or download it again") from error
    drafter: Drafter = loaded[0]
    _check_weights(drafter, loaded[1], name_or_path)
    return drafter


def _download(name: str, revision: str) -> Path:
    """Bring the files of a drafter on the hub into the hub's cache; return their directory.

    Raises:
        NetworkError: the hub did not give it.
        ModelError: the repository holds no drafter.
        ResourceError: the cache cannot be written.
    """
    require_hub_cache()
    try:
        config = Path(huggingface_hub.hf_hub_download(name, CONFIG, revision=revision))
        for file in (WEIGHTS, manifest.MANIFEST):
            try:
                huggingface_hub.hf_hub_download(name, file, revision=revision)
            except EntryNotFoundError as error:
                # The manifest is optional; weights that the repository lacks are named by the directory's checks.
                if isinstance(error, LocalEntryNotFoundError) and file == WEIGHTS:
                    raise
    except (HTTP_ERROR, HFValidationError, OSError, ValueError) as error:
        raise NetworkError(
            f"drafter {name!r} is no local path and the hub did not give it: {first_line(error)}; check the name"
        ) from error
    return config.parent


def require_hub_cache() -> None:
    """Refuse a download that could not be kept, before it begins.

    Raises:
        ResourceError: the hub's cache cannot be written; names the variable that moves it.
    """
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(cache, os.W_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ResourceError(f"the hub's cache {cache} cannot be written: {reason}; set HF_HOME to a writable directory")


def check_base(path: Path) -> None:
    """Refuse a base model's directory whose files lead out of it, are pickled or declare what they do not hold.

    Nothing but indices and headers is read. Packaged and hub models pass as they are: a hub snapshot's
    files are links into the hub's own cache.

    Raises:
        ModelError: names the file, what was expected and what was found.
    """
    _require_inside(path, path / CONFIG)
    try:
        config = manifest.read_json(path / CONFIG)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {path}: expected a {CONFIG}, JSON as transformers saves it: {first_line(error)}"
        ) from error
    files = list(_weight_files(path))
    if not files:
        raise ModelError(f"base model {path} holds no safetensors: {_pickles(path)}; {_CONVERT}")
    tensors = sum(_tensor_count(path, file) for file in files)
    # A model of that many layers would be built before the first of them is missed.
    if (layers := _declared_layers(config)) > tensors:
        raise ModelError(f"base model {path}: {CONFIG} declares {layers} layers, the weights hold {tensors} tensors")


def _tensor_count(path: Path, file: Path) -> int:
    """Return the number of tensors that the header of a base's file declares; nothing else is read."""
    _require_inside(path, file)
    try:
        with safe_open(file, framework="pt") as weights:
            return len(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"base model {file} does not load: {first_line(error)}; download or save it again") from error


def _declared_layers(config: Any) -> int:
    if not isinstance(config, dict):
        return 0
    own = [value for name in _DEPTHS if isinstance(value := config.get(name), int)]
    return max([*own, *(_declared_layers(value) for value in config.values() if isinstance(value, dict))], default=0)


def _weight_files(path: Path) -> Iterator[Path]:
    """Yield what a load of a model would read: the one file, or those that the index names."""
    if not (path / INDEX).exists() and not (path / INDEX).is_symlink():
        if (path / WEIGHTS).exists() or (path / WEIGHTS).is_symlink():
            yield path / WEIGHTS
        return
    _require_inside(path, path / INDEX)
    try:
        record = manifest.read_json(path / INDEX)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / INDEX}: expected an index of shards: {first_line(error)}; save it again") from error
    shards = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{path / INDEX}: expected a weight_map of shards, found none; save the model again")
    for name in sorted(set(map(str, shards.values()))):
        if not manifest.is_plain(name) or not name.endswith(".safetensors"):
            raise ModelError(f"{path / INDEX}: expected .safetensors files of its own directory, found {name!r}")
        yield path / name


def _require_inside(path: Path, file: Path) -> None:
    # The hub's cache keeps a snapshot's files as links into its own blobs.
    inside = (path.resolve(), path.resolve().parent.parent / "blobs")
    target = file.resolve()
    if not any(target.is_relative_to(directory) for directory in inside):
        raise ModelError(f"{file}: expected a file of its own directory, found a link to {target}; copy it")
    # Opening a pipe would wait for ever.
    if target.exists() and not target.is_file():
        raise ModelError(f"{file}: expected a regular file, found something else; copy the checkpoint again")


def _pickles(path: Path) -> str:
    found = sorted(item.name for item in path.glob("*") if item.suffix in _PICKLES)
    return f"found {', '.join(found)}, which may run code when loaded" if found else "found none"


def check_links(path: Path) -> None:
    """Refuse files of a drafter that lead out of its directory, as an index of shards or a link can.

    Raises:
        ModelError: names the file.
    """
    if (path / INDEX).is_symlink() or (path / INDEX).exists():
        raise ModelError(f"{path / INDEX}: expected one {WEIGHTS}, found an index of shards; save the drafter again")
    for name in (CONFIG, WEIGHTS, manifest.MANIFEST):
        _require_inside(path, path / name)


def _check_directory(path: Path) -> None:
    if not is_drafter(path):
        raise ModelError(
            f"{path} is no drafter: expected a {CONFIG} with model_type "
            f"{RecurrentDraftingConfig.model_type!r}; train one with train_speculator.py"
        )
    if not (path / WEIGHTS).is_file():
        raise ModelError(f"{path} holds no {WEIGHTS}: {_pickles(path)}; {_CONVERT} or train again")


def _check_header(path: Path) -> None:
    """Compare the names and shapes that the weights file declares with the config's, before anything is allocated."""
    file = path / WEIGHTS
    try:
        with safe_open(file, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        config = RecurrentDraftingConfig.from_pretrained(path)
    except LOAD_FAILURES as error:
        at = file if isinstance(error, SafetensorError) else path
        raise ModelError(f"drafter {at} does not load: {first_line(error)}; train or download it again") from error
    expected = expected_shapes(config, len(found), path)
    if any(name.startswith("lm_head.") for name in found):
        raise ModelError(
            f"drafter {path}: {WEIGHTS} is in Apple's layout; run: python -m recurrent_drafting.checkpoint import "
            f"--format apple {path} NEW_DIRECTORY"
        )
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


def expected_shapes(config: RecurrentDraftingConfig, tensors: int, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a drafter's weights by name, without allocating any.

    Args:
        config: the drafter's.
        tensors: how many the weights file holds; a drafter of more layers is not even built.
        path: directory of both, for messages.

    Raises:
        ModelError: the config declares more layers than there are tensors, or sizes that cannot be.
    """
    if config.num_draft_layers > tensors:
        raise ModelError(
            f"drafter {path}: {CONFIG} declares {config.num_draft_layers} layers, {WEIGHTS} holds {tensors} tensors"
        )
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in Drafter(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise ModelError(f"drafter {path}: {CONFIG} declares sizes that cannot be: {first_line(error)}") from error


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
