"""A quick run: what it sets, and the measurement that ends it."""

from __future__ import annotations

from typing import Any

from recurrent_drafting import evaluation, prompt_files
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.verifier import Verifier

# Flags of the training script, whose defaults these are.
SETTINGS = {
    "llm_name_or_path": DEFAULT_BASE,
    "dataset_name": "self",
    "max_train_samples": 640,
    "max_steps": 400,
    "drafter_predict_n_tokens": 3,
    "lookup_length": 16,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "max_eval_samples": 16,
    "learning_rate": 2e-3,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 40,
    "save_strategy": "no",
}
_PROMPTS, _NEW_TOKENS = 16, 64


def measure(verifier: Verifier, drafter: Drafter, tokenizer: Any, speculator_path: str) -> dict[str, Any]:
    """Decode MT-Bench prompts, spread over its categories, with drafter and baseline in turn.

    Args:
        verifier: the base.
        drafter: trained for it.
        tokenizer: the base's.
        speculator_path: where the drafter is saved, for the record.

    Returns:
        See ``evaluation.compare``.
    """
    questions, _ = prompt_files.load_questions("mt-bench", _PROMPTS, spread=True)
    settings = evaluation.RunSettings(verifier.name_or_path, speculator_path, max_new_tokens=_NEW_TOKENS)
    decoder = evaluation.speculative_decoder(verifier, drafter, settings)
    return evaluation.compare(verifier, decoder, tokenizer, questions, settings)
