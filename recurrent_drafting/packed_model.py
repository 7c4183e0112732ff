"""A model's twin for decoding on a CPU: same weights, laid out once as the matrix kernels want them.

A plain ``nn.Linear`` in bf16 lays its weight out anew in every call, which costs as much as the product
itself while a forward has few tokens; and attention with a mask copies grouped keys and values once per
query head, which grows with the context. The twin does neither, and attends rows of unlike length apart.
Where the processor has no bf16 products, a plain layer takes as long for n tokens as for one token n times;
the twin computes those products in float32.
The model itself stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from recurrent_drafting import memory
from recurrent_drafting.length_groups import cut_into_runs

_PACKABLE = (torch.bfloat16, torch.float32)
_GROUPED = "recurrent_drafting_grouped_sdpa"
# Packed weights come on top of the model's own: leave at least as much memory free as they take.
_MEMORY_FACTOR = 2
_SAMPLES = 64
# Up to so many rows a bf16 product without bf16 units is bound by reading the weight, and bf16 is half of float32.
_FEW_ROWS = 2
# Key slots of one query that cost as much as one more call of the attention kernel.
_CALL_SLOTS, _FEWEST_CALL_SLOTS = 256, 32

# Where the rows of the current forward may be attended apart: start, stop and key slots of each run of rows.
_runs: ContextVar[tuple[tuple[int, int, int], ...]] = ContextVar("_runs", default=())


class PackedLinear(nn.Module):
    """Compute what an ``nn.Linear`` does, from a packed copy of its weight.

    Args:
        linear: a layer on the CPU; its parameters are shared, not copied.
        dtype: of the products; float32 for a bf16 layer widens all but the smallest inputs, and the output is
            rounded to bf16 once, as a bf16 product's is. Default: the weight's.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.widened = dtype not in (None, linear.weight.dtype)
        weight = linear.weight.detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype) if self.widened else weight, None)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, without gradients."""
        if not self.widened:
            return self._product(x, self.bias)
        if x.numel() <= _FEW_ROWS * self.in_features:
            return nn.functional.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return self._product(x.float(), bias).to(x.dtype)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return y


@dataclass(frozen=True)
class _Entry:
    """What is known of a model.

    Args:
        twin: None where nothing can be packed.
        versions: memory and in-place changes of each parameter.
        sample: some elements of each packed weight.
    """

    twin: nn.Module | None
    versions: tuple[tuple[int, int], ...]
    sample: Tensor


# Twins live as long as their models, however often a model is wrapped.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def decoding_twin(model: nn.Module) -> nn.Module:
    """Return a model's twin for decoding, the model itself where nothing can be packed.

    It is made at the first call, and again when weights have changed. Changes through ``.data``, which leave
    no trace in a parameter's version (merged adapters), show in a sample of the elements.

    Args:
        model: ask again before each generation.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    versions = tuple(_version(parameter) for parameter in model.parameters())
    sample = _sample([linear.weight for linear in linears])
    entry = _entries.get(model)
    if entry is None or entry.versions != versions or not torch.equal(entry.sample, sample):
        _entries.pop(model, None)  # two packed copies at a time could be too much
        entry = _Entry(pack(model) if _packable(model, linears) else None, versions, sample)
        _entries[model] = entry
    return model if entry.twin is None else entry.twin


def pack(model: nn.Module) -> nn.Module:
    """Return a twin of a model on the CPU: its plain linear layers packed, all other tensors the model's own."""
    twin = grouped(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _is_plain(child):
                setattr(parent, name, PackedLinear(child, product_dtype(child.weight.dtype)))
    return twin


def grouped(model: nn.Module) -> nn.Module:
    """Return a twin with all tensors the model's own, whose attention does not copy grouped keys and values."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    layers: list[Any] = [module for module in twin.modules() if getattr(module, "num_key_value_groups", 0) != 0]
    shared_heads = [layer for layer in layers if layer.num_key_value_groups > 1 and hasattr(layer, "config")]
    for config in {id(layer.config): layer.config for layer in shared_heads}.values():
        if config._attn_implementation == "sdpa":
            AttentionInterface.register(_GROUPED, _grouped_sdpa)
            config._attn_implementation = _GROUPED
    return twin


def _packable(model: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    """Tell whether packing is possible and fits in memory: on the CPU, in a dtype that its kernels know."""
    weights = [linear.weight for linear in linears]
    if not weights or any(w.device.type != "cpu" or w.dtype not in _PACKABLE for w in weights):
        return False
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False  # weights that come and go
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    packed_bytes = sum(weight.numel() * product_dtype(weight.dtype).itemsize for weight in weights)
    free = memory.machine_free_bytes()
    return free is None or packed_bytes * _MEMORY_FACTOR <= free


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what packed kernels of this processor compute in for weights of a dtype: float32 where it has no bf16."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """Return a few elements of each weight on the CPU, in one tensor; those elsewhere are never packed."""
    local = [weight.detach() for weight in weights if weight.device.type == "cpu" and weight.dtype in _PACKABLE]
    parts = [weight.reshape(-1)[:: max(weight.numel() // _SAMPLES, 1)].float() for weight in local]
    return torch.cat(parts) if parts else torch.empty(0)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def _version(parameter: Tensor) -> tuple[int, int]:
    """Identify a parameter's memory and its number of in-place changes."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend with the query heads of one key/value head as further rows, so that nothing is copied per head.

    Args:
        module: the attention layer.
        query: ``[B, heads, n, dim]``.
        key: ``[B, kv_heads, S, dim]``.
        value: ``[B, kv_heads, S, value_dim]``.
        attention_mask: additive, ``[B, 1, n, S]``.
        options: what transformers passes to an attention function.
    """
    batch, heads, count, dim = query.shape
    groups = heads // key.shape[1]
    special = any(options.get(name) is not None for name in ("softcap", "position_bias"))
    if special or groups == 1 or attention_mask is None or attention_mask.shape[1] != 1:
        function = AttentionInterface()["sdpa"]
        return function(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    rows = query.reshape(batch, key.shape[1], groups * count, dim)
    mask = attention_mask.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)  # a view for one token
    scale = options.get("scaling")
    runs = () if torch.compiler.is_compiling() else _runs.get()
    if len(runs) > 1:
        outputs = []
        for start, stop, slots in runs:
            keys, values = (states[start:stop, :, :slots] for states in (key, value))
            outputs.append(_attend(rows[start:stop], keys, values, mask[start:stop, ..., :slots], scale))
        output = torch.cat(outputs)
    else:
        output = _attend(rows, key, value, mask, scale)
    return output.reshape(batch, heads, count, value.shape[-1]).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attend; ``[B, heads, n, dim]``, twice ``[B, heads, S, dim]`` and a mask ``[B, 1, n, S]``."""
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@contextmanager
def rows_of(lengths: Sequence[int], nodes: int) -> Iterator[None]:
    """Tell a twin's attention what each row has in the cache, so that no row attends as far as the longest.

    Args:
        lengths: cached tokens of each row, none of which sees a slot behind its own and the new nodes'.
        nodes: tokens of each row in the forward.
    """
    stops = [length + nodes for length in lengths]
    runs = cut_into_runs(stops, max(_CALL_SLOTS // nodes, _FEWEST_CALL_SLOTS))
    token = _runs.set(tuple((start, stop, max(stops[start:stop])) for start, stop in runs))
    try:
        yield
    finally:
        _runs.reset(token)
