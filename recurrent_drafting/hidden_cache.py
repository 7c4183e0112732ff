"""The verifier's hidden states of a data set on disk: computed once, read in every epoch and run.

States are stored in bfloat16, the rows of a shard end to end in one tensor ``hidden`` ``[tokens, H]``.
A shard is named after the token ids it belongs to, and appears when it is complete; a rerun goes on
with the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import TrainingArguments

from recurrent_drafting import distributed, manifest
from recurrent_drafting.errors import DataError, ResourceError, first_line
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from recurrent_drafting.verifier import Verifier

_ROWS_PER_SHARD, _ROWS_PER_FORWARD = 64, 8
# Below what a process may usually hold open.
_OPEN_SHARDS = 256
_SETTINGS = "settings.json"
_NAME, _DTYPE = "hidden", torch.bfloat16


@dataclass(frozen=True)
class CacheCost:
    """What writing the missing shards takes.

    Args:
        tokens: positions whose states are missing.
        bytes: on disk.
        seconds: extrapolated from one timed forward.
    """

    tokens: int
    bytes: int
    seconds: float

    def describe(self) -> str:
        """Return the cost in a few words."""
        return f"{self.tokens} tokens, {self.bytes / 1e6:.0f} MB, about {self.seconds:.0f} s"


@dataclass(frozen=True)
class _Shard:
    """Rows of the data set that share a file: their indices, and the file."""

    indices: tuple[int, ...]
    path: Path


class HiddenStateCache:
    """Hidden states of the rows of one data set.

    Args:
        directory: where shards are; it belongs to one verifier.
        verifier: the base that the states come from.
        rows: the data set.

    Raises:
        DataError: the directory holds states of another base or dtype.
        ResourceError: it cannot be written.
    """

    def __init__(self, directory: Path, verifier: Verifier, rows: TokenDataset) -> None:
        self._verifier = verifier
        self._rows = rows.rows
        # Rows of similar length share a forward, so that little of it is padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows.rows[index].input_ids))
        groups = [tuple(order[start : start + _ROWS_PER_SHARD]) for start in range(0, len(order), _ROWS_PER_SHARD)]
        self._shards = [_Shard(group, directory / f"shard-{_digest(rows.rows, group)}.safetensors") for group in groups]
        self._places: dict[int, tuple[Path, int, int]] = {}
        for shard in self._shards:
            start = 0
            for index in shard.indices:
                stop = start + len(rows.rows[index].input_ids)
                self._places[index] = (shard.path, start, stop)
                start = stop
        self._open: dict[Path, Any] = {}
        self._claim(directory)

    def cost(self) -> CacheCost:
        """Estimate what ``write`` has to do; runs one forward to time it."""
        missing = self._missing_rows()
        if not missing:
            return CacheCost(0, 0, 0.0)
        sample = missing[len(missing) // 2 :][:_ROWS_PER_FORWARD]
        start = time.perf_counter()
        self._states(sample)
        seconds = time.perf_counter() - start
        tokens = self._tokens(missing)
        return CacheCost(tokens, self._bytes(tokens), tokens * seconds / self._tokens(sample))

    def write(self, *, rebuild: bool = False) -> None:
        """Check the shards that are there and compute those that are not.

        Args:
            rebuild: compute damaged shards anew instead of stopping.

        Raises:
            DataError: a shard is damaged.
            ResourceError: the disk is full.
        """
        for shard in self._shards:
            if shard.path.exists() and (reason := self._damage(shard)):
                if not rebuild:
                    raise DataError(f"{shard.path} is damaged: {reason}; pass --rebuild_cache to compute it anew")
                shard.path.unlink()
        missing, needed = self._missing(), self._bytes(self._tokens(self._missing_rows()))
        free = shutil.disk_usage(self._shards[0].path.parent).free
        if needed > free:
            raise ResourceError(f"hidden states need {needed} bytes, {free} are free; free space or name another disk")
        for shard in tqdm(missing, desc="hidden states", unit="shard", disable=not missing):
            parts = [
                self._states(shard.indices[start : start + _ROWS_PER_FORWARD])
                for start in range(0, len(shard.indices), _ROWS_PER_FORWARD)
            ]
            states = torch.cat([state for part in parts for state in part])
            manifest.save_tensors({_NAME: states}, shard.path, {"sha256": _checksum(states)})

    def states(self, index: int) -> Tensor:
        """Return the states of a row, bfloat16 ``[T, H]``, read from the mapped file."""
        path, start, stop = self._places[index]
        if path not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[path] = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        states: Tensor = self._open[path].get_slice(_NAME)[start:stop]
        return states

    def _claim(self, directory: Path) -> None:
        wanted = {
            "base": self._verifier.name_or_path,
            "fingerprint": self._verifier.fingerprint,
            "computed_in": str(self._verifier.dtype).removeprefix("torch."),
            "hidden_size": self._verifier.hidden_size,
        }
        path = directory / _SETTINGS
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                manifest.write_text(json.dumps(wanted), path)
        except OSError as error:
            raise ResourceError(
                f"hidden-state cache {directory} cannot be written: {error.strerror}; name another directory"
            ) from error
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; name another directory") from error
        if found != wanted:
            raise DataError(f"{path}: expected states of {wanted}, found {found}; name another directory")

    def _missing(self) -> list[_Shard]:
        return [shard for shard in self._shards if not shard.path.exists()]

    def _missing_rows(self) -> list[int]:
        return [index for shard in self._missing() for index in shard.indices]

    def _tokens(self, indices: Sequence[int]) -> int:
        return sum(len(self._rows[index].input_ids) for index in indices)

    def _bytes(self, tokens: int) -> int:
        return tokens * self._verifier.hidden_size * _DTYPE.itemsize

    def _states(self, indices: Sequence[int]) -> list[Tensor]:
        batch = Collator()([self._rows[index] for index in indices])
        device = self._verifier.device
        hidden = self._verifier.hidden_states(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        return [hidden[row, : len(self._rows[index].input_ids)].to("cpu", _DTYPE) for row, index in enumerate(indices)]

    def _damage(self, shard: _Shard) -> str:
        """Name what is wrong with a shard that is there, or return an empty string."""
        expected = (self._tokens(shard.indices), self._verifier.hidden_size)
        try:
            with safe_open(shard.path, framework="pt") as file:
                states = file.get_tensor(_NAME)
                recorded = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            return first_line(error)
        if tuple(states.shape) != expected or states.dtype != _DTYPE:
            return f"expected {_DTYPE} {expected}, found {states.dtype} {tuple(states.shape)}"
        found = _checksum(states)
        return "" if found == recorded else f"expected SHA-256 {recorded}, found {found}"


class CachedDataset(TokenDataset):
    """Rows that bring their hidden states along.

    Args:
        rows: the data set.
        cache: of the same rows, written.
    """

    def __init__(self, rows: TokenDataset, cache: HiddenStateCache) -> None:
        super().__init__(rows.rows)
        self._cache = cache

    def __getitem__(self, index: int) -> EncodedRow:
        return replace(self.rows[index], hidden=self._cache.states(index))


def store(
    rows: TokenDataset,
    verifier: Verifier,
    directory: Path,
    training: TrainingArguments,
    *,
    rebuild: bool,
    say: Callable[[str], None],
) -> CachedDataset:
    """Compute the missing states once, on rank 0, for all ranks to read.

    Args:
        rows: the data set.
        verifier: the base.
        directory: where shards are; that of rank 0 counts.
        training: of the run.
        rebuild: see ``HiddenStateCache.write``.
        say: told in a line what it takes.
    """

    def write() -> Path:
        cache = HiddenStateCache(directory, verifier, rows)
        say(f"hidden states: {cache.cost().describe()}, in {directory}")
        cache.write(rebuild=rebuild)
        return directory

    return CachedDataset(rows, HiddenStateCache(distributed.from_first_rank(training, write), verifier, rows))


def _digest(rows: Sequence[EncodedRow], indices: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for index in indices:
        digest.update(torch.tensor([len(rows[index].input_ids), *rows[index].input_ids]).numpy().tobytes())
    return digest.hexdigest()[:24]


def _checksum(states: Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()
