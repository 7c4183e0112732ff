"""Adapter over a Hugging Face causal language model: prefill, verify, hidden states.

The adapter runs the model's own body with an explicit mask and explicit positions over a cache
that can roll back, and the model's own head on the rows that need it. Whether a model honours all
of that is not assumed from its name: it is probed once, on a few tokens, when it is wrapped.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recurrent_drafting import assets, checkpoint, memory
from recurrent_drafting.compiled_forward import SIZES, CompiledForward
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.errors import DataError, ModelError, NetworkError, ResourceError, UsageError, first_line
from recurrent_drafting.kv_cache import VerifierCache
from recurrent_drafting.length_groups import group_by_length
from recurrent_drafting.packed_model import decoding_twin, rows_of

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Largest relative gap between a probed tree and the plain model, by dtype: far above rounding, far
# below what a wrong mask or position gives (order 1). The head alone runs the very same operations,
# so a tenth of it must do there: a missing soft cap can be as small as a few per cent.
_PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# Tokens of a forward that cost as much as one more forward: few where the products of a short prompt fill the device.
_CALL_TOKENS, _CALL_TOKENS_ELSEWHERE = {"cpu": 48}, 4096


@dataclass(frozen=True)
class VerifierOutput:
    """Result of one forward.

    Args:
        logits: ``[B, n, V]`` in the model's dtype.
        hidden: what fed the LM head, ``[B, n, H]``.
    """

    logits: Tensor
    hidden: Tensor


class Verifier:
    """The frozen base model as the decoders and the trainer see it.

    Args:
        model: any transformers causal LM in memory.
        name_or_path: for messages and for the drafter's record.
        fingerprint: identity of the weights, None if unknown.

    Raises:
        ModelError: the family cannot verify a tree; the reason is named.
    """

    def __init__(self, model: PreTrainedModel, name_or_path: str | None = None, fingerprint: str | None = None) -> None:
        self.model = model.eval()
        self.name_or_path = name_or_path or getattr(model.config, "_name_or_path", "") or model.config.model_type
        self.fingerprint = fingerprint
        self._text_config = model.config.get_text_config(decoder=True)
        if (reason := _unsupported_reason(model, self._text_config)) is not None:
            raise self._unsupported(reason)
        self._body: nn.Module = model.base_model
        self._head: nn.Module = model.get_output_embeddings()
        # What decoding runs; the model's twin takes over with the first cache.
        self._twin: nn.Module = model
        self._fast_body, self._fast_head = self._body, self._head
        self._compiled: CompiledForward | None = None
        self._embedding: nn.Module = model.get_input_embeddings()
        # transformers 5.24 renamed the argument.
        names = inspect.signature(self._body.forward).parameters
        self.cache_argument = "cache" if "cache" in names else "past_key_values"
        self._probe()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Verifier:
        """Load a base model by packaged asset name, local path or hub id.

        Args:
            name_or_path: where the model is.
            dtype: auto, fp32, bf16, fp16 or fp64; auto is bf16 where the device computes in it.
            device: auto, cpu, cuda or cuda:N.
            revision: hub revision.
            trust_remote_code: allow the model's own Python code to run.

        Raises:
            UsageError: no such device or dtype here.
            NetworkError: the hub did not answer.
            ModelError: the model does not load or cannot verify a tree.
        """
        place = resolve_device(device)
        kind = resolve_dtype(dtype, place)
        source = assets.source_of(name_or_path)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = _load(source, kind, options)
        nn.Module.to(model, place)
        model.requires_grad_(False)
        return cls(model, name_or_path=name_or_path, fingerprint=_fingerprint(source, revision))

    def converted(self, dtype: torch.dtype) -> Verifier:
        """Return a copy of the base in another dtype.

        Raises:
            ResourceError: there is no room for it beside this one.
        """
        wanted, free = memory.bytes_of(self.model, dtype), memory.free_bytes()
        if free is not None and wanted > free:
            raise ResourceError(
                f"a copy of {self.name_or_path} in {dtype} needs {wanted} bytes, {free} are "
                "free; run it on a machine with more memory"
            )
        return Verifier(copy.deepcopy(self.model).to(dtype), self.name_or_path, self.fingerprint)

    def compile(self) -> None:
        """Compile decode forwards of one row over few nodes (torch.compile); see ``compiled_forward``.

        Takes minutes in the first run of a machine, less when the compiler's own cache on disk has them.

        Raises:
            ModelError: the base does not compile, or gives other logits compiled.
        """
        self._compiled = None
        prompts = self._probe_tokens()[0][:1]
        trees = [[(7 * node + 5) % self.vocab_size for node in range(size)] for size in SIZES]
        plain = [self._probe_tree(prompts, tokens) for tokens in trees]
        compiled = CompiledForward(self._body, self._head, self.cache_argument, self.name_or_path)
        self._compiled, ready = compiled, False
        try:
            for tokens, expected in zip(tqdm(trees, desc="compiling the base, tree sizes"), plain, strict=True):
                gap = _relative_gap(self._probe_tree(prompts, tokens), expected)
                if gap > self._tolerance:
                    words = f"compiled, a tree of {len(tokens)} nodes gives logits {gap:.2g} (relative) off"
                    raise ModelError(f"{self.name_or_path} is not decoded: {words}; run without --compile")
            ready = True
        finally:
            self._compiled = compiled if ready else None

    @property
    def compiles(self) -> bool:
        """Tell whether decode forwards of one row are compiled."""
        return self._compiled is not None

    @property
    def compile_seconds(self) -> float:
        """Return what compiling took."""
        return 0.0 if self._compiled is None else self._compiled.seconds

    @property
    def device(self) -> torch.device:
        """Return where token ids go in."""
        return next(self._embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of hidden states."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Return H, the width of what feeds the LM head (some families project to it after the last layer)."""
        return int(getattr(self._head, "in_features", self._text_config.hidden_size))

    @property
    def vocab_size(self) -> int:
        """Return V, the number of logits."""
        return int(self._text_config.vocab_size)

    @property
    def context_window(self) -> int | None:
        """Return the largest number of positions, None if the model states none.

        With "longrope" it ends where the short frequencies do: beyond, one forward turns all its
        tokens by the frequencies of its furthest position, so a text would depend on the tree.
        """
        window: int | None = getattr(self._text_config, "max_position_embeddings", None)
        rope = getattr(self._text_config, "rope_parameters", None) or {}
        if window is not None and rope.get("rope_type") == "longrope":
            return min(window, int(rope["original_max_position_embeddings"]))
        return window

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every end-of-sequence id that the generation config or the model config names."""
        value = self.model.generation_config.eos_token_id if self.model.generation_config else None
        value = self._text_config.eos_token_id if value is None else value
        if value is None:
            return ()
        return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)

    def new_cache(self, batch_size: int, capacity: int) -> VerifierCache:
        """Make an empty cache of ``capacity`` tokens per row."""
        twin: Any = decoding_twin(self.model)
        if twin is not self._twin:
            self._twin = twin
            self._use_twin(twin)
        return self._empty_cache(batch_size, capacity)

    def _empty_cache(self, batch_size: int, capacity: int) -> VerifierCache:
        if self._compiled is not None:
            capacity = self._compiled.capacity(batch_size, capacity)
        return VerifierCache(int(self._text_config.num_hidden_layers), batch_size, capacity)

    def _use_twin(self, twin: Any) -> None:
        """Decode with the twin from now on, unless its tree differs from the model's."""
        self._fast_body, self._fast_head = self._body, self._head
        if twin is self.model:
            return
        expected = self._probe_tree(*self._probe_tokens())
        self._fast_body, self._fast_head = twin.base_model, twin.get_output_embeddings()
        gap = _relative_gap(self._probe_tree(*self._probe_tokens()), expected)
        if gap > self._tolerance:
            logger.warning(
                "%s (%s) gives other logits with packed weights (gap %.2g): it decodes without them, slower",
                self.name_or_path,
                self.model.config.model_type,
                gap,
            )
            self._fast_body, self._fast_head = self._body, self._head

    def decoding_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return the body and the LM head that decoding runs, for timing them alone."""
        return self._fast_body, self._fast_head

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings: int64 ``[...]`` -> ``[..., H]``.

        These are the table's rows as they are, which is what the drafter sees. A factor that the
        model applies to them (Gemma, Granite) is left out, wherever a version of transformers keeps it.
        """
        return nn.functional.embedding(token_ids, self._embedding.get_parameter("weight"))

    def head(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Turn hidden states into the model's own logits.

        Args:
            hidden: ``[..., H]``.
            token_ids: compute only these tokens' logits, int64 ``[V_d]``; None computes all.

        Returns:
            ``[..., V]`` or ``[..., V_d]``.
        """
        if token_ids is None:
            logits = self._head(hidden)
        else:
            bias = getattr(self._head, "bias", None)
            bias = None if bias is None else bias[token_ids]
            logits = nn.functional.linear(hidden, self.head_rows(token_ids), bias)
        return self._finish(logits)

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """Return the LM head's weight of some tokens, int64 ``[n]`` -> ``[n, H]``.

        Raises:
            ModelError: the head is no plain linear layer (quantised, adapted), so it has no such rows.
        """
        if type(self._head) is not nn.Linear:
            raise ModelError(
                f"the LM head of {self.name_or_path} is a {type(self._head).__name__}: expected a plain linear layer "
                "to read single tokens' rows from; keep the head out of quantisation and adapters"
            )
        weight: Tensor = self._head.weight
        return weight[token_ids.to(weight.device)]

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: VerifierCache, rows: Sequence[int] | None = None
    ) -> VerifierOutput:
        """Run prompts into a cache, those of like length together.

        Args:
            prompts: token ids per row, without padding; lengths may differ.
            cache: with room for the prompts.
            rows: the cache's row of each prompt, whose entries it replaces; default all rows of an empty cache.

        Returns:
            Logits ``[B, 1, V]`` and hidden states ``[B, 1, H]`` at each row's last token.
        """
        lengths = [len(prompt) for prompt in prompts]
        groups = group_by_length(lengths, _CALL_TOKENS.get(self.device.type, _CALL_TOKENS_ELSEWHERE))
        in_order = rows is None or list(rows) == list(range(len(cache.lengths)))
        if len(groups) == 1 and in_order and not any(cache.lengths):
            return self._output(self._last_hidden(prompts, cache))
        rows = range(len(prompts)) if rows is None else rows
        parts = []
        for group in groups:
            part = self._empty_cache(len(group), max(lengths[index] for index in group))
            parts.append(self._last_hidden([prompts[index] for index in group], part))
            cache.adopt([rows[index] for index in group], part)
        order = [index for group in groups for index in group]
        return self._output(torch.cat(parts)[[order.index(index) for index in range(len(order))]])

    def _last_hidden(self, prompts: Sequence[Sequence[int]], cache: VerifierCache) -> Tensor:
        """Run prompts into an empty cache together and return what feeds the LM head at their ends, ``[B, 1, H]``."""
        hidden = self.read(prompts, cache)
        last = torch.tensor(cache.lengths, device=hidden.device) - 1
        return hidden[torch.arange(len(last), device=hidden.device), last].unsqueeze(1)

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]], cache: VerifierCache) -> Tensor:
        """Run texts into an empty cache and return what feeds the LM head at every position.

        Args:
            texts: token ids per row, without padding; lengths may differ.
            cache: empty, with room for the texts.

        Returns:
            ``[B, T, H]``; positions behind a row's text hold no meaning.
        """
        ids, lengths = self._right_padded(texts)
        width = ids.shape[1]
        positions = torch.arange(width, device=self.device).expand(len(texts), -1)
        causal = positions.unsqueeze(1) <= positions.unsqueeze(2)
        hidden = self._forward(ids, positions, causal, positions, cache)
        cache.keep([range(length) for length in lengths])
        return hidden

    @torch.inference_mode()
    def branch(self, tokens: Tensor, cuts: Tensor, depth: int, cache: VerifierCache) -> VerifierOutput:
        """Run the next token of R branches that leave each cached text at places of their own.

        A branch sees its text up to its cut, and itself. The caller commits all R with ``cache.keep``
        before the next token, and takes the branches back with ``cache.rewind``.

        Args:
            tokens: one token per branch, int64 ``[B, R]``.
            cuts: text tokens that each branch follows, int64 ``[B, R]``.
            depth: tokens of each branch before this one, committed behind the text.
            cache: the texts, and behind each ``depth`` times R entries.

        Returns:
            Logits ``[B, R, V]`` and hidden states ``[B, R, H]`` per branch.
        """
        allowed, key_positions = self._branch_mask(cuts, depth, cache)
        hidden = self._forward(tokens, cuts + depth, allowed, key_positions, cache)
        return self._output(hidden)

    @torch.inference_mode()
    def verify(self, tree: DraftTree, cache: VerifierCache) -> VerifierOutput:
        """Run every node of the trees in one forward; the caller commits with ``cache.keep``.

        Args:
            tree: B trees of N nodes.
            cache: committed prefixes of the B rows.

        Returns:
            Logits ``[B, N, V]`` and hidden states ``[B, N, H]`` per node.
        """
        lengths = torch.tensor(cache.lengths, device=self.device)
        tokens, positions = tree.tokens.to(self.device), lengths.unsqueeze(1) + tree.depths.to(self.device)
        allowed, key_positions = self._tree_mask(tree, lengths, positions, cache.max_length)
        if self._compiled is not None and self._compiled.takes(tree.num_nodes, cache):
            return self._compiled_output(self._compiled, tokens, positions, allowed, key_positions, cache)
        with rows_of(cache.lengths, tree.num_nodes):
            hidden = self._forward(tokens, positions, allowed, key_positions, cache)
        return self._output(hidden)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return what feeds the LM head at every position, without gradients.

        Args:
            input_ids: right-padded, int64 ``[B, T]``.
            attention_mask: true at real tokens, bool ``[B, T]``.

        Returns:
            ``[B, T, H]``; padded positions hold no meaning.
        """
        # The frozen model computes in its own dtype; autocast would convert around every layer.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            positions = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)
            # Padding is on the right, where causal attention never looks: the model's own mask will do.
            output = self._body(input_ids=input_ids * attention_mask, position_ids=positions, use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

    def _forward(
        self, ids: Tensor, positions: Tensor, allowed: Tensor, key_positions: Tensor, cache: VerifierCache
    ) -> Tensor:
        """Run the body: boolean mask ``[B, n, S]`` and key positions ``[B, S]`` in, hidden states out."""
        positions = self._within_window(positions)
        output = self._fast_body(
            input_ids=ids,
            attention_mask=self._attention_mask(allowed, positions, key_positions),
            position_ids=positions,
            use_cache=True,
            **{self.cache_argument: cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _compiled_output(
        self,
        compiled: CompiledForward,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor,
        key_positions: Tensor,
        cache: VerifierCache,
    ) -> VerifierOutput:
        """Run one row padded to a compiled shape; nobody attends to the padding."""
        nodes, columns = ids.shape[1], key_positions.shape[1]
        size, width = compiled.padded(nodes, cache.lengths[0])
        ids, positions = (nn.functional.pad(part, (0, size - nodes)) for part in (ids, self._within_window(positions)))
        allowed = nn.functional.pad(allowed, (0, width - columns, 0, size - nodes))
        key_positions = nn.functional.pad(key_positions, (0, width - columns))
        mask = self._attention_mask(allowed, positions, key_positions)
        hidden, logits = compiled(ids, positions, mask, cache)
        return VerifierOutput(logits=self._finish(logits[:, :nodes]), hidden=hidden[:, :nodes])

    def _within_window(self, positions: Tensor) -> Tensor:
        """Clamp: nodes past the window can only yield tokens that the length limit cuts."""
        return positions if self.context_window is None else positions.clamp(max=self.context_window - 1)

    def _output(self, hidden: Tensor) -> VerifierOutput:
        """Put the logits beside hidden states ``[B, n, H]`` of a decoding forward."""
        return VerifierOutput(logits=self._finish(self._fast_head(hidden)), hidden=hidden)

    def _tree_mask(self, tree: DraftTree, lengths: Tensor, positions: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Let each node see its row's committed slots and its own ancestors.

        Returns:
            allowed bool ``[B, N, S]`` and the position of each slot ``[B, S]``, S = max_length + N.
        """
        batch, nodes = tree.tokens.shape
        slots = torch.arange(max_length + nodes, device=lengths.device)
        own = lengths.unsqueeze(1) + slots[:nodes]
        allowed = (slots < lengths.view(-1, 1, 1)).repeat(1, nodes, 1)
        allowed.scatter_(2, own.unsqueeze(1).expand(-1, nodes, -1), tree.ancestor_mask().to(lengths.device))
        key_positions = slots.repeat(batch, 1).scatter_(1, own, positions)
        return allowed, key_positions

    def _branch_mask(self, cuts: Tensor, depth: int, cache: VerifierCache) -> tuple[Tensor, Tensor]:
        """Let each branch see its text up to its cut and its own entries among those behind the text.

        Returns:
            allowed bool ``[B, R, S]`` and the position of each slot ``[B, S]``, S = max_length + R.
        """
        batch, branches = cuts.shape
        slots = torch.arange(cache.max_length + branches, device=cuts.device).expand(batch, -1)
        texts = torch.tensor(cache.lengths, device=cuts.device) - depth * branches
        offset = slots - texts.unsqueeze(1)
        written = (offset >= 0) & (offset < (depth + 1) * branches)
        owner = offset % branches
        own = owner.unsqueeze(1) == torch.arange(branches, device=cuts.device).view(1, -1, 1)
        # A cut lies within its text, so the slots below it hold text.
        allowed = (slots.unsqueeze(1) < cuts.unsqueeze(2)) | (own & written.unsqueeze(1))
        key_positions = torch.where(written, cuts.gather(1, owner) + offset // branches, slots)
        return allowed, key_positions

    def _attention_mask(self, allowed: Tensor, positions: Tensor, key_positions: Tensor) -> Any:
        """Turn a boolean mask into what the family takes: additive, with windows, per layer type."""
        window = _sliding_window(self._text_config)
        if window is None:
            return self._additive(allowed)
        near = allowed & (key_positions.unsqueeze(1) > positions.unsqueeze(2) - window)
        layer_types = getattr(self._text_config, "layer_types", None)
        if layer_types is None:
            return self._additive(near)
        return {kind: self._additive(near if kind == _SLIDING else allowed) for kind in set(layer_types)}

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min).unsqueeze(1)

    def _finish(self, logits: Tensor) -> Tensor:
        """Apply what the family does after its LM head; the probe compares with the model itself."""
        config = self._text_config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _right_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        lengths = [len(prompt) for prompt in prompts]
        if not prompts or min(lengths) == 0:
            raise DataError("prefill needs at least one token per row, got an empty prompt; add a BOS token")
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
        return ids.to(self.device), lengths

    @torch.inference_mode()
    def _probe(self) -> None:
        """Compare the head, and a branching tree behind two prefixes, with plain forwards of the model.

        The window is narrowed meanwhile, so that these few tokens reach beyond it.
        """
        prompts, (root, left, right) = self._probe_tokens()
        head_gap = tree_gap = 0.0
        try:
            with _narrow_window(self._text_config):
                logits = self._probe_tree(prompts, [root, left, right])
                for got, prompt in zip(logits, prompts, strict=True):
                    hidden, expected = self._plain([[*prompt, root, leaf] for leaf in (left, right)])
                    head_gap = max(head_gap, _relative_gap(self.head(hidden), expected))
                    tree_gap = max(tree_gap, _relative_gap(got[1:], expected[:, -1]))
        except (TypeError, AttributeError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            if memory.is_shortage(error):
                raise
            raise self._unsupported(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if head_gap > self._tolerance / 10:
            raise self._unsupported(f"its LM head alone gives logits {head_gap:.2g} (relative) off its forward")
        if tree_gap > self._tolerance:
            raise self._unsupported(f"a tree of 3 nodes gives logits {tree_gap:.2g} (relative) off a plain forward")

    @property
    def _tolerance(self) -> float:
        """Return the largest relative gap that rounding explains; a dtype that is not listed counts as coarse."""
        return _PROBE_TOLERANCE.get(self.dtype, max(_PROBE_TOLERANCE.values()))

    def _probe_tokens(self) -> tuple[list[list[int]], list[int]]:
        """Return two prompts, and a root with two children."""
        *prefix, root, left, right = (id_ % self.vocab_size for id_ in (5, 7, 11, 13, 17, 19, 23))
        return [prefix, prefix[:2]], [root, left, right]

    def _probe_tree(self, prompts: list[list[int]], tokens: list[int]) -> Tensor:
        """Prefill and verify a root with children."""
        rows, nodes = len(prompts), len(tokens)
        root = torch.zeros(1, dtype=torch.long)
        cache = self._empty_cache(rows, max(map(len, prompts)) + nodes)
        tree = DraftTree(
            tokens=torch.tensor([tokens] * rows),
            parents=torch.zeros(rows, nodes, dtype=torch.long),
            depths=torch.ones(rows, nodes, dtype=torch.long).index_fill(1, root, 0),
            log_probs=torch.zeros(rows, nodes),
            valid=torch.ones(rows, nodes, dtype=torch.bool),
            height=min(nodes - 1, 1),
        )
        self.prefill(prompts, cache)
        return self.verify(tree, cache).logits

    def _plain(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Run the model as it is: what fed its LM head, and its logits."""
        seen: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(input_ids=torch.tensor(rows, device=self.device), use_cache=False).logits
        finally:
            hook.remove()
        return seen[0], logits

    def _unsupported(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.name_or_path} ({self.model.config.model_type}) cannot verify a draft tree: expected a decoder-only "
            f"model with 4-D attention masks, explicit positions and a cache that rolls back; {reason}. "
            "Use transformers' generate, or a model of a supported family (docs/adding_a_family.md)"
        )


def _unsupported_reason(model: PreTrainedModel, text_config: Any) -> str | None:
    """Say why a model cannot verify a tree, as far as it shows without running; the probe finds the rest."""
    takes = inspect.signature(model.base_model.forward).parameters
    foreign = sorted(set(getattr(text_config, "layer_types", None) or ()) - {_FULL, _SLIDING})
    checks = (
        (model.config.is_encoder_decoder, "it is an encoder-decoder model"),
        (model.get_output_embeddings() is None, "it has no LM head: load it with AutoModelForCausalLM"),
        (model._is_stateful, "it keeps a recurrent state, which cannot roll back to the accepted path"),
        (bool(foreign), f"it has layers of type {', '.join(foreign)}"),
        ("position_ids" not in takes, "its body takes no positions (ALiBi and the like count cache slots instead)"),
        (getattr(text_config, "alibi", False), "its ALiBi biases count cache slots, not depths in the tree"),
        (
            "local" in getattr(text_config, "attention_layers", ()),
            "its local attention counts cache slots, not depths in the tree",
        ),
        (
            any(parameter.is_meta for parameter in model.parameters()),
            "some of its weights are not in memory (offloaded): load it without offloading",
        ),
    )
    return next((reason for applies, reason in checks if applies), None)


def _relative_gap(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest expected value; infinite where either is not finite."""
    gap = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    return gap if math.isfinite(gap) else math.inf


@contextmanager
def _narrow_window(config: Any) -> Iterator[None]:
    """Set the sliding window, if the config names one, to 3 tokens for a while."""
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    config.sliding_window = min(window, 3)
    try:
        yield
    finally:
        config.sliding_window = window


def _sliding_window(config: Any) -> int | None:
    """Return the sliding window in tokens, None where every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) if layer_types is None else _SLIDING in layer_types
    return int(window) if window and slides else None


def resolve_device(name: str) -> torch.device:
    """Turn a device flag into a device of this machine.

    Raises:
        UsageError: there is no such device, or it has no float64; those that can be used are named.
    """
    present = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name.partition(":")[0] == "mps":
        raise UsageError(
            f"device {name!r} cannot be used: sampling draws its noise in float64, which Apple's GPUs do not have; "
            f"expected one of auto, {', '.join(present)}"
        )
    if name == "auto":
        return torch.device(present[1] if len(present) > 1 else "cpu")
    if ("cuda:0" if name == "cuda" else name) not in present:
        raise UsageError(f"device {name!r} is not on this machine: expected one of auto, {', '.join(present)}")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype flag into a torch dtype; auto is bf16 only where the device computes in it.

    Raises:
        UsageError: unknown.
    """
    if name == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise UsageError(f"dtype {name!r} is unknown: expected one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _load(source: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load a causal LM, turning the library's many failures into ours."""
    if Path(source).exists():
        checkpoint.check_base(Path(source))
    else:
        checkpoint.require_hub_cache()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise ModelError(f"{source} ({config.model_type}) is an encoder-decoder model: expected a causal LM")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except checkpoint.LOAD_FAILURES as error:
        if memory.is_shortage(error):
            raise ResourceError(f"base model {source} does not load: {memory.describe(error)}") from error
        reason = first_line(error)
        if Path(source).exists() or not isinstance(error, (OSError, checkpoint.HTTP_ERROR)):
            raise ModelError(f"base model {source} does not load: {reason}") from error
        raise NetworkError(
            f"base model {source!r} is no local path and the hub did not give it: {reason} "
            f"Use a local path or a packaged model ({', '.join(assets.model_names())})"
        ) from error
    model: PreTrainedModel
    model, report = loaded
    _check_weights(model, source, report)
    return model


def _fingerprint(source: str, revision: str | None) -> str | None:
    """Return the identity of a base that was loaded from a directory or through the hub's cache."""
    if Path(source).is_dir():
        return checkpoint.base_fingerprint(Path(source))
    found = try_to_load_from_cache(source, checkpoint.CONFIG, revision=revision)
    return checkpoint.base_fingerprint(Path(found).parent) if isinstance(found, str) else None


def _check_weights(model: PreTrainedModel, source: str, report: dict[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random values in their place.
        raise ModelError(f"base model {source} does not load: {len(missing)} weights are missing, first {missing[0]}")
    for name, weights in model.named_parameters():
        if weights.dtype in _PROBE_TOLERANCE and not bool(torch.isfinite(weights).all()):
            raise ModelError(f"base model {source}: weights {name} hold NaN or infinity; download or save it again")
