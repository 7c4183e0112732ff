"""Train and run Recurrent Drafters (ReDrafter, arXiv 2403.09919) for Hugging Face causal LMs."""

from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig, SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder, GenerationOutput, SpeculativeDecoder
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import RecurrentDraftingError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.verifier import Verifier

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveDecoder",
    "BeamConfig",
    "DecodingStats",
    "Drafter",
    "GenerationOutput",
    "RecurrentDraftingConfig",
    "RecurrentDraftingError",
    "SamplingConfig",
    "SpeculativeDecoder",
    "Verifier",
]
