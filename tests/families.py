"""Tiny configs of the verifier families, and the plain model's own answers to compare with.

``FAMILIES`` is the one table: every test of a family, and every longer run, is a loop over it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from recurrent_drafting import Verifier
from recurrent_drafting.draft_tree import DraftTree
from tests.tiny import VOCAB

# Most families accept these names; a family that has others for them says so in its own settings.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
_GPT_NAMES: dict[str, Any] = {
    **{name: _COMMON[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")},
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
_ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One verifier family, or one variant of it, as a tiny random model.

    Args:
        model_type: its name in transformers.
        settings: what differs from the common sizes.
        window: settings that turn its sliding window of 8 tokens on; None where it has none.
        sizes: names and values of the common sizes.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    window: dict[str, Any] | None = None
    sizes: dict[str, Any] = field(default_factory=lambda: _COMMON)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Return the attention implementations that this version of transformers offers for it."""
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config())]
        return ("sdpa", "eager") if model_class._supports_sdpa else ("eager",)

    def config(self, *, windowed: bool = False, **overrides: Any) -> PreTrainedConfig:
        window = (self.window or {}) if windowed else {}
        return AutoConfig.for_model(self.model_type, **{**self.sizes, **self.settings, **window, **overrides})

    def model(
        self, attention: str | None = None, *, windowed: bool = False, seed: int = 0, **overrides: Any
    ) -> PreTrainedModel:
        """Build the model in float64, with biases and norms that are not trivial."""
        config = self.config(windowed=windowed, **overrides)
        config._attn_implementation = attention or self.attentions[0]
        config._experts_implementation = "eager"  # the grouped kernel has no float64
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        return model.eval()


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", {"head_dim": 12}),
    "llama-tied-bias": Family("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "gpt2": Family("gpt2", sizes=_GPT_NAMES),
    "gptj": Family("gptj", {"rotary_dim": 4, "tie_word_embeddings": False}, sizes=_GPT_NAMES),
    "codegen": Family("codegen", {"rotary_dim": 4, "tie_word_embeddings": False}, sizes=_GPT_NAMES),
    "gpt-neox": Family("gpt_neox", {"rotary_pct": 0.5}),
    "opt": Family("opt", {"ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 32}),
    "opt-projected": Family("opt", {"ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 16}),
    "phi": Family("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Family("phi3", {"sliding_window": None}, {"sliding_window": 8}),
    "qwen2": Family(
        "qwen2", {}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}
    ),
    "qwen3": Family(
        "qwen3", {"head_dim": 12}, {"use_sliding_window": True, "sliding_window": 8, "layer_types": _ALTERNATING}
    ),
    "mistral": Family("mistral", {"sliding_window": None}, {"sliding_window": 8}),
    "mixtral": Family(
        "mixtral", {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}, {"sliding_window": 8}
    ),
    "qwen3-moe": Family(
        "qwen3_moe", {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        {
            # Keys and values differ in width. No experts: their router computes in float32.
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {"sliding_window": 8, "layer_types": _ALTERNATING},
    ),
    "starcoder2": Family("starcoder2", {"sliding_window": None}, {"sliding_window": 8}),
    "gemma": Family("gemma", {"head_dim": 12}),
    "gemma2": Family(
        "gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 4.0},
        {"sliding_window": 8, "layer_types": _ALTERNATING},
    ),
    "gemma3": Family(
        "gemma3_text",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0},
        {"sliding_window": 8, "layer_types": _ALTERNATING},
    ),
    "glm4": Family("glm4", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "exaone4": Family("exaone4", {"head_dim": 12}, {"sliding_window": 8, "layer_types": _ALTERNATING}),
    "olmo": Family("olmo", {"clip_qkv": 0.5}),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", {}, {"sliding_window": 8, "layer_types": _ALTERNATING}),
    "granite": Family(
        "granite",
        {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    ),
    "falcon-multi-query": Family("falcon", {"multi_query": True, "alibi": False, "ffn_hidden_size": 48}),
    "falcon-new": Family(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 48}
    ),
    "cohere": Family("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": Family(
        "cohere2", {"logit_scale": 0.25, "head_dim": 8}, {"sliding_window": 8, "layer_types": _ALTERNATING}
    ),
    "apertus": Family("apertus"),
    "arcee": Family("arcee", {"head_dim": 12}),
    "ernie4_5": Family("ernie4_5", {"head_dim": 12, "use_bias": True}),
    "stablelm": Family("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "smollm3": Family(
        "smollm3",
        {"no_rope_layers": [1, 0]},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": _ALTERNATING},
    ),
}


def variants() -> list[tuple[str, str, bool]]:
    """List (family, attention, windowed): what every test of a family runs over."""
    return [
        (name, attention, windowed)
        for name, family in FAMILIES.items()
        for attention in family.attentions
        for windowed in ((False, True) if family.window else (False,))
    ]


@torch.no_grad()
def plain_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Run the model itself over rows of one length: logits ``[R, T, V]`` and what fed its LM head ``[R, T, H]``."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(input_ids=torch.tensor([list(row) for row in rows]), use_cache=False).logits
    hook.remove()
    return logits, seen[0]


def plain(model: PreTrainedModel, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Run the model itself over one row: logits ``[T, V]`` and what fed its LM head ``[T, H]``."""
    logits, hidden = plain_rows(model, [tokens])
    return logits[0], hidden[0]


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def random_tree(rng: random.Random, batch: int, nodes: int) -> DraftTree:
    """Make trees of any shape, from chains to stars, parents first."""
    rows = []
    for _ in range(batch):
        reach = rng.choice([1, 2, 2, nodes])
        parents = [0] + [rng.randrange(max(0, node - reach), node) for node in range(1, nodes)]
        depths = [0] * nodes
        for node in range(1, nodes):
            depths[node] = depths[parents[node]] + 1
        rows.append((random_tokens(rng, nodes), parents, depths))
    tokens, parents, depths = (torch.tensor(part) for part in zip(*rows, strict=True))
    return DraftTree(
        tokens=tokens,
        parents=parents,
        depths=depths,
        log_probs=torch.zeros(batch, nodes),
        valid=torch.ones(batch, nodes, dtype=torch.bool),
        height=int(depths.max()),
    )


def path_to(tree: DraftTree, row: int, node: int) -> list[int]:
    """List the nodes from the root to a node."""
    path = [node]
    while path[0]:
        path.insert(0, int(tree.parents[row, path[0]]))
    return path


def largest_gap(
    verifier: Verifier, prefixes: Sequence[Sequence[int]], rng: random.Random, steps: int, nodes: int
) -> float:
    """Compare prefill and some verify steps over random trees with each branch run alone.

    After each step a random path is kept, so that later steps read a cache whose rows moved.

    Returns:
        The largest difference of any logit or hidden entry at any node, relative to the largest entry.
    """
    committed = [list(prefix) for prefix in prefixes]
    cache = verifier.new_cache(len(committed), max(map(len, committed)) + steps * nodes)
    output = verifier.prefill(committed, cache)
    gap = 0.0
    for row, prefix in enumerate(committed):
        logits, hidden = plain(verifier.model, prefix)
        gap = max(gap, _gap(output.logits[row, 0], logits[-1]), _gap(output.hidden[row, 0], hidden[-1]))
    for _ in range(steps):
        tree = random_tree(rng, len(committed), nodes)
        output = verifier.verify(tree, cache)
        kept = []
        for row, prefix in enumerate(committed):
            leaves = set(range(nodes)) - set(tree.parents[row, 1:].tolist())
            branches = sorted((path_to(tree, row, leaf) for leaf in leaves), key=len)
            for _, group in itertools.groupby(branches, key=len):
                paths = list(group)
                logits, hidden = plain_rows(
                    verifier.model, [prefix + tree.tokens[row, path].tolist() for path in paths]
                )
                gap = max(gap, _gap(output.logits[row, paths], logits[:, len(prefix) :]))
                gap = max(gap, _gap(output.hidden[row, paths], hidden[:, len(prefix) :]))
            kept.append(path_to(tree, row, rng.randrange(nodes)))
            prefix.extend(tree.tokens[row, kept[-1]].tolist())
        cache.keep(kept)
    return gap


def _gap(got: Tensor, expected: Tensor) -> float:
    gap = float((got - expected).abs().max() / expected.abs().max())
    return gap if math.isfinite(gap) else math.inf  # max() would drop a NaN
