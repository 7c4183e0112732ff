"""The drafter inside vLLM: one chain per request, checked by vLLM's own rejection sampler.

Serve with ``RECURRENT_DRAFTING_SPECULATOR=DIR vllm serve BASE --speculative-config CONFIG``, CONFIG being
``{"model": "recurrent_drafting.vllm_proposer.RecurrentDraftingProposer", "num_speculative_tokens": 3}``.

vLLM's interface for custom proposers hands over tokens, not hidden states. ``_EngineWatch`` is the only
place that reaches around it; it is known to be right for the versions in ``KNOWN_VERSIONS``. One function of the
engine is replaced where it is broken (``_mend_expansion``), and embeddings are read from the table itself
(``_embedding_table``). Nothing else in the package imports vLLM.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from recurrent_drafting import beam_search, checkpoint
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, UsageError
from recurrent_drafting.prompt_lookup import Copies, RepeatIndex, best_chain

SPECULATOR_VARIABLE = "RECURRENT_DRAFTING_SPECULATOR"
KNOWN_VERSIONS = ("0.32",)


@dataclass
class _StepRecord:
    """What one engine step showed.

    Args:
        hidden: input of the LM head, one row per logit that is sampled from, ``[R, H]``; None before it ran.
        num_drafts: draft tokens that were verified, per request; None if no request had any.
    """

    hidden: Tensor | None = None
    num_drafts: list[int] | None = None


@dataclass
class _EngineWatch:
    """Note what vLLM's runner computes in a step and does not hand to custom proposers.

    The sampled rows are those of the last ``compute_logits`` before a sampler ran: prompt log-probabilities call
    it again afterwards. A forward marks no step, since a replayed CUDA graph runs none. The scheduler may trim
    drafts, so how many were verified is read from what the rejection sampler is given.

    Args:
        step: record of the current step; a sampler begins a new one.
        latest: input of the last ``compute_logits``.
    """

    step: _StepRecord = field(default_factory=_StepRecord)
    latest: Tensor | None = None

    def attach(self, model: Any) -> None:
        """Watch a model and the samplers of this process.

        Raises:
            ModelError: this vLLM is none of the known ones.
        """
        if not vllm.__version__.startswith(KNOWN_VERSIONS):
            raise ModelError(
                f"vLLM {vllm.__version__} is not known to work with this proposer: expected "
                f"{' or '.join(f'{version}.x' for version in KNOWN_VERSIONS)}; install one of them"
            )
        compute_logits, sample, reject = model.compute_logits, Sampler.forward, RejectionSampler.forward

        @functools.wraps(compute_logits)
        def watched_logits(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.latest = hidden
            return compute_logits(hidden, *args, **kwargs)

        @functools.wraps(sample)
        def watched_sample(sampler: Any, *args: Any, **kwargs: Any) -> Any:
            self.step = _StepRecord(self.latest)
            return sample(sampler, *args, **kwargs)

        @functools.wraps(reject)
        def watched_reject(sampler: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            # It runs the other sampler for the last row of each request, so the record comes after it.
            output = reject(sampler, metadata, *args, **kwargs)
            self.step = _StepRecord(self.latest, list(metadata.num_draft_tokens))
            return output

        model.compute_logits = watched_logits
        Sampler.forward, RejectionSampler.forward = watched_sample, watched_reject


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat a value of each request for each of its draft tokens, as vLLM's function of this name.

    Args:
        x: ``[B]``.
        cu_num_tokens: tokens up to and including each request, ``[B]``.
        num_tokens: tokens of all requests together, T.
        replace_from: a value that is replaced where it occurs.
        replace_to: by this one.

    Returns:
        ``[T]``.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


def _mend_expansion(device: torch.device) -> None:
    """Replace the engine's expansion of temperatures, top-k and top-p if it does not work.

    vLLM 0.32 on a CPU without Triton writes it into a copy that is thrown away, so that the rejection sampler
    divides by uninitialised memory: sampled text then has another distribution than the target's.
    """
    if device.type != "cpu":
        return
    values, ends = torch.tensor([0.5, 2.0], device=device), torch.tensor([1, 3], device=device)
    found = rejection_sampler.expand_batch_to_tokens(values, ends, 3)
    if found.tolist() != [0.5, 2.0, 2.0]:
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _embedding_table(model: nn.Module, hidden_size: int) -> nn.Module:
    """Return the module that gives the rows of a model's token embeddings as they are stored.

    The drafter is trained on these rows; ``embed_input_ids`` multiplies them for Gemma and MiniCPM.

    Args:
        model: as vLLM builds it.
        hidden_size: width of the rows; other tables (Gemma 3n has one for its layers) have other widths.

    Raises:
        ModelError: there is no such table, or more than one.
    """
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    found = [table for table in tables if not isinstance(table, ParallelLMHead) and table.embedding_dim == hidden_size]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} of vLLM {vllm.__version__} has {len(found)} tables of token embeddings of width "
            f"{hidden_size}: expected one, whose rows the drafter reads; serve this model without the drafter"
        )
    table: nn.Module = found[0]
    return table


class _Texts:
    """Repeats of the engine's rows; an index grows with its row, and a row that holds another text gets a new one."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[np.ndarray[Any, Any], RepeatIndex]] = {}

    def index(self, row: int, tokens: np.ndarray[Any, Any]) -> RepeatIndex:
        """Return the index of a row that holds these tokens, its root the last."""
        known, index = self._kept.get(row, (tokens[:0], None))
        if index is None or not np.array_equal(known, tokens[: len(known)]):
            index = RepeatIndex(tokens.tolist())
        else:
            index.extend(tokens[len(known) :].tolist())
        self._kept[row] = tokens.copy(), index
        return index


class RecurrentDraftingProposer:
    """Propose a chain of draft tokens for each request of a step; named in vLLM's speculative config.

    Where the drafter's config has a ``lookup_length``, the chain is the drafter's or a copy of what followed the
    text's last tokens before, whichever is expected to be accepted further; ``"lookup": false`` in the engine's
    additional config turns that off.

    Args:
        vllm_config: the engine's configuration.

    Raises:
        UsageError: no drafter is named.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._length = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_model_len = int(vllm_config.model_config.max_model_len)
        # Not that of a weight, which may be quantised.
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._base = str(vllm_config.model_config.model)
        additional = vllm_config.additional_config or {}
        self._path = additional.get("speculator_path") or os.environ.get(SPECULATOR_VARIABLE)
        # None: as the drafter's config says.
        self._copies: bool | None = additional.get("lookup")
        if not self._path:
            raise UsageError(
                f"no drafter is named: set {SPECULATOR_VARIABLE} to its directory, or pass "
                '--additional-config \'{"speculator_path": "DIR"}\''
            )
        self._watch = _EngineWatch()
        self._texts = _Texts()
        self._drafter: Drafter | None = None
        self._embed: Any = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter beside the model that it drafts for.

        Raises:
            ModelError: it does not fit, or this vLLM is not known.
        """
        drafter = load_drafter(str(self._path))
        self._check_fit(drafter, target_model)
        device = next(target_model.parameters()).device
        nn.Module.to(drafter, device=device, dtype=self._dtype)
        drafter.train(False)
        self._drafter = drafter
        self._embed = _embedding_table(target_model, drafter.config.hidden_size)
        self._watch.attach(target_model)
        _mend_expansion(device)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: object = None,  # noqa: ARG002 - vLLM passes it
    ) -> list[list[int]]:
        """Return up to ``num_speculative_tokens`` draft tokens per request.

        Args:
            sampled_token_ids: tokens that this step decided, per request; empty while a prompt is being read.
            num_tokens_no_spec: tokens of each request, the new ones included.
            token_ids_cpu: tokens by request, the new ones included, ``[R, T]``.
            slot_mappings: unused.

        Raises:
            ModelError: the rows of the step are not those that its requests should have.
        """
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        rooms = [self._room(int(num_tokens_no_spec[i])) for i in range(len(proposals))]
        asked = [i for i, tokens in enumerate(sampled_token_ids) if tokens and rooms[i] > 0]
        if not asked:
            return proposals
        rows = self._context_rows(sampled_token_ids)
        assert self._watch.step.hidden is not None
        context = self._watch.step.hidden[[rows[i] for i in asked]]
        root = torch.tensor([sampled_token_ids[i][-1] for i in asked], device=context.device)
        texts = [token_ids_cpu[i, : int(num_tokens_no_spec[i])] for i in asked]
        copies = Copies.of(self._indices(asked, texts), self._length)
        for i, chain in zip(asked, self._draft(context, root, copies), strict=True):
            proposals[i] = chain[: rooms[i]]
        return proposals

    def _indices(self, rows: Sequence[int], texts: Sequence[np.ndarray[Any, Any]]) -> list[RepeatIndex]:
        """Return each row's repeats; without prompt lookup none of them has any."""
        assert self._drafter is not None
        if not (bool(self._drafter.config.lookup_length) if self._copies is None else self._copies):
            return [RepeatIndex([])] * len(rows)
        return [self._texts.index(row, text) for row, text in zip(rows, texts, strict=True)]

    @torch.inference_mode()
    def _draft(self, context: Tensor, root: Tensor, copies: Copies) -> list[list[int]]:
        """Return a chain per request, from contexts ``[B, H]``, roots ``[B]`` and copies ``[B, L]``."""
        assert self._drafter is not None
        beam = BeamConfig(width=1, length=self._length)
        beams = beam_search.draft(self._drafter, context.to(self._drafter.dtype), root, self._embed, beam)
        tokens, expected = best_chain(beams, copies)
        chains: list[list[int]] = tokens.tolist()
        return [chain if gain > 0 else [] for chain, gain in zip(chains, expected.tolist(), strict=True)]

    def _room(self, tokens: int) -> int:
        """Return how many draft tokens still fit behind a request's tokens."""
        return min(self._length, self._max_model_len - tokens - 1)

    def _context_rows(self, sampled_token_ids: Sequence[Sequence[int]]) -> list[int]:
        """Return, per request, the row of the step that its last decided token was sampled from.

        A request that verified n draft tokens has n + 1 rows, also when its tokens are discarded; of these the
        last accepted one decided the last token.
        """
        step = self._watch.step
        num_drafts = step.num_drafts or [0] * len(sampled_token_ids)
        expected = sum(num_drafts) + len(num_drafts)
        found = None if step.hidden is None else len(step.hidden)
        if len(num_drafts) != len(sampled_token_ids) or found != expected:
            raise ModelError(
                f"vLLM {vllm.__version__} showed {found} hidden rows and {len(num_drafts)} requests in a step: "
                f"expected {expected} rows for {len(sampled_token_ids)} requests; please report the engine's settings"
            )
        rows, offset = [], 0
        for drafts, tokens in zip(num_drafts, sampled_token_ids, strict=True):
            rows.append(offset + max(len(tokens) - 1, 0))
            offset += drafts + 1
        return rows

    def _check_fit(self, drafter: Drafter, target_model: nn.Module) -> None:
        config, target = drafter.config, target_model.config
        for name in ("hidden_size", "vocab_size"):
            if getattr(config, name) != getattr(target, name):
                raise ModelError(
                    f"drafter {self._path} does not fit {self._base}: expected {name} {getattr(target, name)}, "
                    f"got {getattr(config, name)}; use the base it was trained for ({config.verifier_name_or_path})"
                )
        found = checkpoint.base_fingerprint(Path(self._base)) if Path(self._base).is_dir() else None
        if None not in (found, config.verifier_fingerprint) and found != config.verifier_fingerprint:
            raise ModelError(
                f"drafter {self._path} was trained for another base: expected {config.verifier_name_or_path} "
                f"({config.verifier_fingerprint}), got {self._base} ({found})"
            )
