"""Train and run Recurrent Drafters (ReDrafter, arXiv 2403.09919) for Hugging Face causal LMs."""

from typing import TYPE_CHECKING, Any

from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig, SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder, GenerationOutput, SpeculativeDecoder
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import RecurrentDraftingError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.verifier import Verifier

if TYPE_CHECKING:
    from recurrent_drafting.trainer import DrafterTrainer, TrainingArguments

__version__ = "0.1.0"

_TRAINING = ("DrafterTrainer", "TrainingArguments")

__all__ = [
    "AutoregressiveDecoder",
    "BeamConfig",
    "DecodingStats",
    "Drafter",
    "DrafterTrainer",
    "GenerationOutput",
    "RecurrentDraftingConfig",
    "RecurrentDraftingError",
    "SamplingConfig",
    "SpeculativeDecoder",
    "TrainingArguments",
    "Verifier",
]


def __getattr__(name: str) -> Any:
    """Import the training side when it is asked for: decoding does not wait for the Trainer."""
    if name in _TRAINING:
        from recurrent_drafting import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
