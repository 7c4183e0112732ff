"""The verifier's key/value cache: preallocated, written in place, rolled back by moving rows.

Slot i of a row holds the token at position i, without padding: rows of a batch differ in length
and a forward writes its n new entries behind each row's own length. After a verify step the
entries of the accepted path move next to the committed ones; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StorageLayer(CacheLayerMixin):
    """What transformers asks of one attention layer's cache, where the storage is the verifier cache's."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing with states ``[B, heads, n, dim]``: the verifier cache allocates at the first write."""

    def get_max_cache_shape(self) -> int:
        """Return what ``get_max_length`` does, by the name that older versions use."""
        return int(self.get_max_length())


class _LayerView(StorageLayer):
    """Let one attention layer write to and read from the shared storage."""

    def __init__(self, cache: VerifierCache, layer_index: int) -> None:
        super().__init__()
        self._cache = cache
        self._layer_index = layer_index

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new states ``[B, heads, n, dim]`` and return all of them, ``[B, heads, S, dim]``."""
        found: tuple[Tensor, Tensor] = self._cache.append(self._layer_index, key_states, value_states)
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key slots of a forward over ``query_length`` tokens and their offset."""
        return self._cache.max_length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the committed length of the longest row."""
        return self._cache.max_length

    def get_max_length(self) -> int:
        """Return the capacity in tokens."""
        return self._cache.capacity


class VerifierCache(Cache):
    """Key/value storage of a batch.

    One row of length 3, then a verify step over nodes 0..3 whose accepted path is 0, 2, 3: slots 3..6 hold the
    four nodes; ``keep`` moves slot 5 to 4 and slot 6 to 5, and the row's length becomes 6.

    >>> cache = VerifierCache(num_layers=1, batch_size=1, capacity=8)
    >>> for entries, path in (([1, 2, 3], [0, 1, 2]), ([10, 11, 12, 13], [0, 2, 3])):
    ...     states = torch.tensor(entries).view(1, 1, -1, 1)
    ...     keys, values = cache.append(0, states, states)
    ...     cache.keep([path])
    >>> cache.lengths, keys.flatten()[:6].tolist()
    ([6], [1, 2, 3, 10, 12, 13])

    Args:
        num_layers: attention layers of the verifier.
        batch_size: rows B.
        capacity: slots per row, in tokens.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        super().__init__(layers=[_LayerView(self, index) for index in range(num_layers)])
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch_size
        self._num_layers = num_layers
        # One tensor [2 * layers, B, heads, capacity, dim] per shape of layer: families that mix
        # head counts get one each, all others a single one that moves with a single copy.
        self._storage: dict[tuple[int, int, torch.device], Tensor] = {}
        # Which of them holds each layer's keys and values; known once written.
        self._places: dict[int, tuple[int, int, torch.device]] = {}
        self._slots: Tensor | None = None

    @property
    def max_length(self) -> int:
        """Return the committed length of the longest row, in tokens."""
        return max(self.lengths, default=0)

    def append(self, layer_index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new entries behind each row's length; the lengths stay until ``keep``.

        Args:
            layer_index: which attention layer.
            keys: ``[B, heads, n, dim]``.
            values: ``[B, heads, n, value_dim]``.

        Returns:
            Views of keys and values, ``[B, heads, max_length + n, dim]``.
        """
        stop = self.max_length + keys.shape[2]
        if stop > self.capacity:
            raise IndexError(f"cache holds {self.capacity} tokens per row, asked to write up to {stop}")
        return tuple(  # type: ignore[return-value]
            self._write(self._buffer(states, 2 * layer_index + part), states)[:, :, :stop]
            for part, states in enumerate((keys, values))
        )

    @torch.inference_mode()
    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit the accepted nodes of the last forward and forget the others.

        Args:
            paths: per row the written entries to keep, ascending, as offsets behind the row's
                length; entry 0 (the root) comes first.
        """
        for row, path in enumerate(paths):
            start = self.lengths[row]
            first = next((i for i, node in enumerate(path) if node != i), len(path))
            if first < len(path):
                moved = torch.tensor([start + node for node in path[first:]])
                for storage in self._storage.values():
                    source = moved.to(storage.device)
                    storage[:, row, :, start + first : start + len(path)] = storage[:, row, :, source]
            self.lengths[row] = start + len(path)
        self._slots = None

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what was committed behind the given length of each row, in tokens."""
        self.lengths = list(lengths)
        self._slots = None

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows, in the given order; the others leave the batch.

        Where no row moves onto one that is still to move, only what is committed of those that move is copied.
        """
        moves = [(row, index) for index, row in enumerate(rows) if row != index]
        in_place = all(row >= index for row, index in moves)
        for key, storage in self._storage.items():
            if in_place:
                for row, index in moves:
                    length = self.lengths[row]
                    storage[:, index, :, :length] = storage[:, row, :, :length]
                self._storage[key] = storage[:, : len(rows)]
            else:
                self._storage[key] = storage[:, list(rows)]
        self.lengths = [self.lengths[row] for row in rows]
        self._slots = None

    @torch.inference_mode()
    def adopt(self, rows: Sequence[int], part: VerifierCache) -> None:
        """Take the entries of another cache in place of what some rows have.

        Args:
            rows: which rows, one for each of the other cache.
            part: of the same layers; it is not used afterwards.
        """
        self._places.update(part._places)
        for key, theirs in part._storage.items():
            storage = self._storage_of(key, theirs)
            for index, (row, length) in enumerate(zip(rows, part.lengths, strict=True)):
                storage[:, row, :, :length] = theirs[:, index, :, :length]
        for row, length in zip(rows, part.lengths, strict=True):
            self.lengths[row] = length
        self._slots = None

    def layer_states(self) -> list[Tensor]:
        """Return keys and values of every layer in turn, views ``[B, heads, capacity, dim]``; all written before."""
        return [self._storage[self._places[index]][index] for index in range(2 * self._num_layers)]

    def _buffer(self, states: Tensor, index: int) -> Tensor:
        _, heads, _, dim = states.shape
        key = (heads, dim, states.device)
        self._places[index] = key
        return self._storage_of(key, states)[index]

    def _storage_of(self, key: tuple[int, int, torch.device], like: Tensor) -> Tensor:
        """Return the storage of a shape of layer, allocated at the first call in the dtype of a tensor ``[...]``."""
        if key not in self._storage:
            # Zeros, not empty: masked slots are multiplied by zero, and 0 * NaN is NaN.
            shape = (2 * self._num_layers, len(self.lengths), key[0], self.capacity, key[1])
            self._storage[key] = like.new_zeros(shape)
        return self._storage[key]

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        count = states.shape[2]
        start = self.lengths[0]
        if all(length == start for length in self.lengths):
            buffer[:, :, start : start + count] = states
            return buffer
        if self._slots is None or self._slots.shape[1] != count:
            lengths = torch.tensor(self.lengths, device=states.device)
            self._slots = lengths.unsqueeze(1) + torch.arange(count, device=states.device)
        # Not scatter_: on a CPU its time grows with the buffer, not with what is written.
        rows = torch.arange(len(self.lengths), device=states.device).unsqueeze(1)
        buffer.transpose(1, 2).index_put_((rows, self._slots), states.transpose(1, 2))
        return buffer
