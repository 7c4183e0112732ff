"""The drafter as an algorithm of the speculators library (0.9), which is optional and needs Python >= 3.11.

Importing this module registers config and model there, so that ``SpeculatorModel.from_pretrained`` loads what
``python -m recurrent_drafting.checkpoint export --format speculators`` writes. Nothing else imports it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from speculators import SpeculatorModel, SpeculatorModelConfig, reload_schemas
from torch import Tensor

from recurrent_drafting import formats
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.drafter import Drafter

# transformers builds a config without arguments, to write what differs.
_DEFAULT = RecurrentDraftingConfig()


@SpeculatorModelConfig.register(formats.SPECULATORS_TYPE)
class RecurrentDraftingSpeculatorConfig(SpeculatorModelConfig):  # type: ignore[misc]
    """A drafter's settings as the library keeps them; meanings as in ``RecurrentDraftingConfig``."""

    speculators_model_type: Literal["recurrent_drafting"] = "recurrent_drafting"
    architectures: list[str] = Field(default_factory=lambda: [formats.SPECULATORS_ARCHITECTURE])
    hidden_size: int = Field(default=_DEFAULT.hidden_size, description="width H of the verifier's hidden state")
    vocab_size: int = Field(default=_DEFAULT.vocab_size, description="the verifier's vocabulary V")
    draft_vocab_size: int = Field(default=_DEFAULT.vocab_size, description="tokens that can be drafted, V_d")
    exit_dim: int = Field(default=_DEFAULT.hidden_size, description="width D of the residual blocks")
    num_draft_layers: int = Field(default=_DEFAULT.num_draft_layers, description="residual blocks before the head")
    rnn: bool = Field(default=_DEFAULT.rnn, description="update the state by the recurrence")
    emb_norm: bool = Field(default=_DEFAULT.emb_norm, description="normalise token embeddings")

    def drafter_config(self) -> RecurrentDraftingConfig:
        """Return the shape of the drafter."""
        names = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn", "emb_norm", "draft_vocab_size")
        return RecurrentDraftingConfig(**{name: getattr(self, name) for name in names})


# The library's unions of known algorithms are built before this one joins them.
reload_schemas()


@SpeculatorModel.register(formats.SPECULATORS_TYPE)
class RecurrentDraftingSpeculator(SpeculatorModel):  # type: ignore[misc]
    """The drafter's tensors under the layout's names, inside the library's model class.

    Args:
        config: the drafter's settings.
    """

    config_class = RecurrentDraftingSpeculatorConfig

    def __init__(self, config: RecurrentDraftingSpeculatorConfig, **_: Any) -> None:
        super().__init__(config=config)
        drafter = Drafter(config.drafter_config())
        for name, module in drafter.named_children():
            self.add_module("lm_head" if name == "head" else name, module)
        # Not a child: its parts are, under the layout's names.
        object.__setattr__(self, "_drafter", drafter)
        few = config.draft_vocab_size < config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if few else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if few else None)
        self.post_init()

    def forward(self, context: Tensor, embeddings: Tensor) -> Tensor:
        """Score the draft vocabulary after each known token.

        Args:
            context: verifier hidden states, ``[P, H]``.
            embeddings: verifier embeddings of the root and the tokens after it, ``[P, K, H]``.

        Returns:
            ``[P, K, V_d]``; add ``d2t`` to an index for the verifier's token.
        """
        drafter: Drafter = self._drafter
        scores: Tensor = drafter.head(drafter.unroll(context, embeddings))
        return scores
