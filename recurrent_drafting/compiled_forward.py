"""The base's decode forward through torch.compile: one row, a few tree sizes, weights frozen into the kernels.

A forward over few tokens spends much of its time between the products. The compiler fuses what lies between them,
and in float32 picks a kernel for every product by timing. It wants fixed shapes, so trees are padded to one of
``SIZES`` and the cache has a fixed capacity; only the width of the mask is left open, since further open lengths take
the compiler much longer. Larger trees and batches and longer texts go the usual way. Weights that change later are
not seen: compile anew.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from transformers.cache_utils import Cache

from recurrent_drafting.errors import ModelError, first_line
from recurrent_drafting.kv_cache import StorageLayer, VerifierCache
from recurrent_drafting.packed_model import grouped, product_dtype

# Nodes of the trees that are compiled; a smaller tree is padded to the next one.
SIZES = (1, 4, 8, 16)
# Slots of a cache that compiled forwards run over.
CAPACITY = 1024
# Mask columns come in multiples of this; the widest mask is narrower than the cache.
_COLUMNS = 64
# Every compiled forward of the process counts as one more variant of the same code.
_MOST_VARIANTS = 256


class _FixedLayer(StorageLayer):
    """Keys and values of one layer, written at given slots and read up to a given width.

    Args:
        keys: ``[1, heads, CAPACITY, dim]``.
        values: ``[1, heads, CAPACITY, value_dim]``.
        slots: where the n new entries go, int64 ``[n]``.
        width: slots that are read, those of the mask.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._slots, self._width = slots, width

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states ``[1, heads, n, dim]`` and return all, ``[1, heads, width, dim]``."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._slots, key_states)
        self.values.index_copy_(2, self._slots, value_states)
        return self.keys[:, :, : self._width], self.values[:, :, : self._width]

    def get_mask_sizes(self, _query_length: int) -> tuple[int, int]:
        """Return the number of key slots and their offset."""
        return self._width, 0

    def get_seq_length(self) -> int:
        """Return 0: positions come from outside."""
        return 0

    def get_max_length(self) -> int:
        """Return the width in tokens."""
        return self._width


class CompiledForward:
    """The body and the LM head of a base, compiled for one row.

    Args:
        body: token ids to hidden states.
        head: hidden states to logits.
        cache_argument: the name of the body's argument for the cache.
        name: of the base, for messages.
    """

    def __init__(self, body: nn.Module, head: nn.Module, cache_argument: str, name: str) -> None:
        self._name = name
        body = grouped(body)
        self._ready: set[int] = set()
        self.seconds = 0.0

        def forward(
            ids: Tensor, positions: Tensor, slots: Tensor, mask: Any, states: list[Tensor]
        ) -> tuple[Tensor, Tensor]:
            width = (next(iter(mask.values())) if isinstance(mask, dict) else mask).shape[-1]
            pairs = zip(states[::2], states[1::2], strict=True)
            cache = Cache(layers=[_FixedLayer(keys, values, slots, width) for keys, values in pairs])
            options: dict[str, Any] = {cache_argument: cache, "use_cache": True}
            hidden = body(input_ids=ids, attention_mask=mask, position_ids=positions, **options).last_hidden_state
            return hidden, head(hidden)

        # transformers keeps registries that grow with other models of the process: they change nothing here.
        filters: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
        self._forward = torch.compile(forward, fullgraph=True, dynamic=False, options=filters)

    @staticmethod
    def capacity(rows: int, slots: int) -> int:
        """Return the capacity to give a cache of so many rows that needs so many slots of each."""
        fits = rows == 1 and slots + SIZES[-1] + _COLUMNS <= CAPACITY
        return CAPACITY if fits else slots

    def takes(self, nodes: int, cache: VerifierCache) -> bool:
        """Tell whether a tree of so many nodes runs compiled over a cache."""
        if len(cache.lengths) != 1 or cache.capacity != CAPACITY or nodes > SIZES[-1]:
            return False
        return self.padded(nodes, cache.lengths[0])[1] < CAPACITY

    def padded(self, nodes: int, length: int) -> tuple[int, int]:
        """Return the nodes and the mask columns that a tree behind so many cached tokens is padded to."""
        size = next(size for size in SIZES if size >= nodes)
        return size, -(-(length + size) // _COLUMNS) * _COLUMNS

    def __call__(self, ids: Tensor, positions: Tensor, mask: Any, cache: VerifierCache) -> tuple[Tensor, Tensor]:
        """Run a padded tree; its entries go behind the row's length.

        Args:
            ids: int64 ``[1, n]``, n of ``SIZES``.
            positions: int64 ``[1, n]``.
            mask: additive ``[1, 1, n, columns]``, or by kind of layer.
            cache: of one row, prefilled.

        Returns:
            Hidden states ``[1, n, H]`` and logits ``[1, n, V]``.

        Raises:
            ModelError: the base does not compile.
        """
        size, states = ids.shape[1], cache.layer_states()
        slots = torch.arange(size, device=ids.device) + cache.lengths[0]
        if size in self._ready:
            found: tuple[Tensor, Tensor] = self._forward(ids, positions, slots, mask, states)
            return found
        for tensor in mask.values() if isinstance(mask, dict) else (mask,):
            torch._dynamo.mark_dynamic(tensor, 3)
        start = time.perf_counter()
        with _compiling(self._name, states[0]):
            found = self._forward(ids, positions, slots, mask, states)
        self.seconds += time.perf_counter() - start
        self._ready.add(size)
        return found


@contextlib.contextmanager
def _compiling(name: str, states: Tensor) -> Iterator[None]:
    """Choose how products are computed, with weights as constants where that lays them out anew: on the CPU.

    In bf16, on processors that multiply it, oneDNN's products are the best there are, and those that read the same
    input become one. Otherwise the compiler's own are, chosen by timing; oneDNN is kept out of them, since what it
    has packed cannot be written to the compiler's cache on disk, from which a second run starts sooner.

    Args:
        name: of the base, for messages.
        states: keys or values, which tell the device and the dtype.
    """
    own = states.device.type != "cpu" or states.dtype != torch.bfloat16 or product_dtype(states.dtype) != states.dtype
    options: dict[str, Any] = {"max_autotune": own}
    if states.device.type == "cpu":
        options |= {"freezing": True, "max_autotune_gemm_backends": "CPP,ATEN", "cpp.enable_concat_linear": True}
    with (
        warnings.catch_warnings(action="ignore"),
        torch._inductor.config.patch(**options),
        torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS),
        torch.backends.mkldnn.flags(enabled=not own),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(getattr(error, "inner_exception", error))
            raise ModelError(f"{name} does not compile: {reason}; run without --compile") from error
