"""The drafter: a small recurrent head over the verifier's hidden state (paper, section 3).

The state follows the drafted tokens, ``s_k = silu(W e(x_k) + U s_{k-1} + b)`` with ``s_0 = 0``;
the prediction reads the verifier's hidden state h and the state together, ``[h, s_k]``, through
an input projection, residual blocks ``x + silu(linear(x))`` and a head over the draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from recurrent_drafting.config import RecurrentDraftingConfig


class ResidualBlock(nn.Module):
    """Add a gated linear map of the input to the input: ``x + silu(linear(x))``.

    Args:
        dim: width D of input and output.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return x + nn.functional.silu(self.linear(x))


class Drafter(PreTrainedModel):
    """Predict the tokens that follow the root from the context and the drafted tokens.

    Token embeddings are the verifier's own and come in from outside; the drafter holds none.

    Args:
        config: the drafter's shape.
    """

    config_class = RecurrentDraftingConfig
    config: RecurrentDraftingConfig
    base_model_prefix = "drafter"
    main_input_name = "context"
    draft_token_ids: Tensor

    def __init__(self, config: RecurrentDraftingConfig) -> None:
        super().__init__(config)
        hidden, exit_dim = config.hidden_size, config.exit_dim or config.hidden_size
        if config.rnn:
            self.rnn_u = nn.Linear(hidden, hidden)
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
        self.input_proj = nn.Identity() if exit_dim == 2 * hidden else nn.Linear(2 * hidden, exit_dim)
        self.blocks = nn.ModuleList(ResidualBlock(exit_dim) for _ in range(config.num_draft_layers))
        draft_vocab_size = config.draft_vocab_size or config.vocab_size
        self.head = nn.Linear(exit_dim, draft_vocab_size, bias=False)
        # Draft token i is token draft_token_ids[i] of the verifier, in rising order.
        self.register_buffer("draft_token_ids", torch.arange(draft_vocab_size))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def initial_state(self, embeddings: Tensor) -> Tensor:
        """Return the state before the root, zeros shaped like ``embeddings`` ``[..., H]``."""
        return torch.zeros_like(embeddings)

    def advance(self, state: Tensor, embeddings: Tensor) -> Tensor:
        """Let the state take in one token.

        Args:
            state: ``[..., H]``.
            embeddings: the token's verifier embedding, ``[..., H]``.

        Returns:
            The next state, ``[..., H]``.
        """
        if self.config.emb_norm:
            embeddings = nn.functional.layer_norm(embeddings, embeddings.shape[-1:])
        if not self.config.rnn:
            return embeddings + state
        return nn.functional.silu(self.rnn_w(embeddings) + self.rnn_u(state))

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        """Return what the head reads, ``[..., D]``, from context and state ``[..., H]``."""
        x: Tensor = self.input_proj(torch.cat([context, state], dim=-1))
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, context: Tensor, state: Tensor) -> Tensor:
        """Score the draft vocabulary for the token after those the state has taken in.

        Args:
            context: verifier hidden state at the last committed token, ``[..., H]``.
            state: ``[..., H]``.

        Returns:
            ``[..., V_d]``.
        """
        scores: Tensor = self.head(self.features(context, state))
        return scores

    def unroll(self, context: Tensor, embeddings: Tensor) -> Tensor:
        """Return the head's input at every training depth.

        Args:
            context: verifier hidden states h_t, ``[P, H]``.
            embeddings: embeddings of the known tokens x_{t+1} (the root) .. x_{t+K}, ``[P, K, H]``.

        Returns:
            ``[P, K, D]``; entry k - 1 belongs to the prediction of x_{t+1+k}. ``head`` of it gives
            the logits.
        """
        state = self.initial_state(embeddings[:, 0])
        features = []
        for depth in range(embeddings.shape[1]):
            state = self.advance(state, embeddings[:, depth])
            features.append(self.features(context, state))
        return torch.stack(features, dim=1)

    def forward(self, context: Tensor, embeddings: Tensor) -> Tensor:
        """Do what ``unroll`` does, ``[P, K, D]``: the part of a training step that wrappers of the model see."""
        return self.unroll(context, embeddings)


AutoModel.register(RecurrentDraftingConfig, Drafter, exist_ok=True)
