"""Behind transformers' ``model.generate(..., custom_generate=FOLDER)``: its arguments in, its kind of result out.

transformers runs ``custom_generate/generate.py`` of a folder or hub repository; ours (``SCRIPT``) calls
``generate`` here. What the decoders cannot honour is refused by name instead of being left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from recurrent_drafting.checkpoint import WEIGHTS, load_drafter
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import SpeculativeDecoder, Streamer
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import UsageError
from recurrent_drafting.verifier import Verifier

PATH = "custom_generate/generate.py"
SCRIPT = '''\
"""Decode speculatively with the drafter of this folder; the text is that of plain generation.

    model.generate(**inputs, custom_generate="this folder or repository", trust_remote_code=True)

Needs the package recurrent_drafting.
"""

from recurrent_drafting import custom_generate


def generate(model, **arguments):
    """Take what transformers' generate takes, and max_tree_nodes; return what it returns."""
    return custom_generate.generate(model, **arguments)
'''

_HONOURED = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "bad_words_ids",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
}
# They say how to compute, not what.
_IMMATERIAL = {
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "low_memory",
    "prefill_chunk_size",
    "continuous_batching_config",
    "transformers_version",
}
# Keywords that transformers' loading of the script has read; a tokenizer serves stop_strings alone.
_OF_LOADING = ("revision", "token", "cache_dir", "tokenizer")
_MAX_SEED = 2**62


@dataclass(frozen=True)
class _Source:
    """Where the drafter is: directory or hub id, and its revision."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class _Request:
    """A call of generate, in this package's words.

    Args:
        input_ids: left-padded, int64 ``[B, T]``.
        attention_mask: true at real tokens, ``[B, T]``, or None for all.
        max_new_tokens: limit per row.
        sampling: the pipeline's settings.
        eos_token_ids: tokens that end a row.
        pad_token_id: fills rows that end early.
        as_dict: return an output object.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    max_new_tokens: int
    sampling: SamplingConfig
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    as_dict: bool


def generate(
    model: PreTrainedModel,
    *,
    streamer: Streamer | None = None,
    speculator_path: str | None = None,
    max_tree_nodes: int | None = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue prompts speculatively, as transformers' ``generate`` would without a drafter.

    Args:
        model: the base model.
        streamer: one of transformers' streamers.
        speculator_path: drafter; default the folder or repository that transformers was told to run.
        max_tree_nodes: nodes verified per step, root included; None verifies the drafter's whole tree.
        arguments: what ``generate`` takes.

    Returns:
        Prompts and new tokens, int64 ``[B, T + new]``, filled up with the pad token; or an output
        object, with ``return_dict_in_generate``.

    Raises:
        UsageError: an argument that the decoders cannot honour; all of them are named.
        ModelError: the drafter does not load or fit, or the model cannot verify a tree.
    """
    source = _source() if speculator_path is None else _Source(speculator_path, arguments.get("revision"))
    request = _request(model, arguments)
    drafter = _drafter(source, _stamp(source))
    beam = replace(drafter.config.beam, max_nodes=max_tree_nodes)
    output = SpeculativeDecoder(Verifier(model), drafter, beam).generate(
        request.input_ids,
        request.attention_mask,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        eos_token_ids=request.eos_token_ids,
        streamer=streamer,
    )
    width = max(map(len, output.sequences))
    rows = [tokens + [request.pad_token_id] * (width - len(tokens)) for tokens in output.sequences]
    new = torch.tensor(rows, dtype=torch.long, device=request.input_ids.device).view(len(rows), width)
    sequences: Any = torch.cat([request.input_ids, new], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if request.as_dict else sequences


def _source() -> _Source:
    """Find what transformers was told to run: it does not hand its ``custom_generate`` argument on."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            name = frame.f_locals.get("custom_generate")
            if isinstance(name, str):
                return _Source(name, frame.f_locals["kwargs"].get("revision"))
        frame = frame.f_back  # type: ignore[assignment]
    raise UsageError("which drafter is not known: expected a call by transformers' generate, or speculator_path=...")


def _stamp(source: _Source) -> int | None:
    """Return what changes when a local drafter is saved anew."""
    weights = Path(source.name) / WEIGHTS
    return weights.stat().st_mtime_ns if weights.exists() else None


@lru_cache(maxsize=2)
def _drafter(source: _Source, stamp: int | None) -> Drafter:  # noqa: ARG001 - a part of the cache's key
    """Load a drafter once for many calls."""
    return load_drafter(source.name, source.revision)


def _request(model: Any, arguments: dict[str, Any]) -> _Request:
    """Resolve the arguments as transformers does: call, then model's generation config, then its defaults.

    Its own two private methods do it, so that the defaults of each version hold.
    """
    given = arguments.pop("generation_config", None)
    chosen = (arguments.get("max_length"), getattr(given, "max_length", None), model.generation_config.max_length)
    explicit_max_length = any(value is not None for value in chosen)
    ids = arguments.pop("inputs", None)
    config, rest = model._prepare_generation_config(given, **arguments)
    in_kwargs = rest.pop("input_ids", None)
    ids = in_kwargs if ids is None else ids
    mask = rest.pop("attention_mask", None)
    _refuse_unsupported(config.to_dict(), rest)
    if ids is None:
        raise UsageError("generate needs inputs or input_ids, int64 [B, T]; got none")
    eos = _token_ids(config.eos_token_id)
    pad = config.pad_token_id if config.pad_token_id is not None else (*eos, 0)[0]
    if mask is None and config.pad_token_id not in (None, *eos) and bool((ids == pad).any()):
        raise UsageError(f"input_ids hold the pad token {pad} and there is no attention_mask: pass the tokenizer's")
    width = ids.shape[1]
    return _Request(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=_max_new_tokens(config, width, explicit_max_length),
        sampling=_sampling(config, width),
        eos_token_ids=eos,
        pad_token_id=int(pad),
        as_dict=bool(config.return_dict_in_generate),
    )


def _refuse_unsupported(settings: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Name every setting that would change the result and that the decoders do not have."""
    neutral = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    known = _HONOURED | _IMMATERIAL
    unsupported = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if not (name in known or name.startswith("_") or _is_off(value) or value == neutral.get(name))
    ]
    unsupported += [name for name, value in rest.items() if not (name in _OF_LOADING or _is_off(value))]
    if unsupported:
        raise UsageError(
            f"generate with a recurrent drafter does not take {', '.join(unsupported)}: leave it out, or call generate "
            "without custom_generate"
        )


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list) and not value)


def _max_new_tokens(config: GenerationConfig, width: int, explicit_max_length: bool) -> int:
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if not explicit_max_length:
        # transformers' default of 20 counts new tokens, a chosen max_length counts the prompt too.
        return int(config.max_length)
    if config.max_length <= width:
        raise UsageError(
            f"max_length {config.max_length} leaves no room after {width} prompt tokens: raise it or set max_new_tokens"
        )
    return int(config.max_length) - width


def _sampling(config: GenerationConfig, width: int) -> SamplingConfig:
    """Read the sampling settings; drawing follows torch's global seed, as transformers' does."""
    sampled: dict[str, Any] = {}
    if config.do_sample:
        if not config.temperature:
            raise UsageError(f"do_sample needs a temperature > 0, got {config.temperature}: use do_sample=False")
        sampled = {
            "temperature": float(config.temperature),
            "top_k": int(config.top_k or 0),
            "top_p": 1.0 if config.top_p is None else float(config.top_p),
            "min_p": float(config.min_p or 0.0),
            "seed": int(torch.randint(_MAX_SEED, ())),
        }
    minimum = config.min_new_tokens
    return SamplingConfig(
        repetition_penalty=float(config.repetition_penalty or 1.0),
        min_new_tokens=max((config.min_length or 0) - width, 0) if minimum is None else int(minimum),
        bad_words_ids=tuple(tuple(word) for word in config.bad_words_ids or ()),
        **sampled,
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(int(token) for token in value) if isinstance(value, (list, tuple)) else (int(value),)
