"""The base of a run, its tokenizer and a drafter for it: named or chosen, loaded, and compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recurrent_drafting import data, local_drafters
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.verifier import Verifier, resolve_device, resolve_dtype


@dataclass(frozen=True)
class ModelSettings:
    """Which models a run takes; each field has the name of its flag.

    Args:
        base_model: packaged name, local path or hub id; None takes the drafter's base, else the packaged one.
        speculator_path: directory or hub id; None takes the newest drafter on this machine for the base.
        autoregressive: take no drafter.
        revision: hub revision of the base.
        trust_remote_code: let the base run its own Python code.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, fp32, bf16, fp16 or fp64.
        compile: compile the base's forward.
    """

    base_model: str | None = None
    speculator_path: str | None = None
    autoregressive: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False

    def require_device(self) -> None:
        """Refuse a device or a dtype that is not here, before anything is loaded.

        Raises:
            UsageError: those that are here are named.
        """
        resolve_dtype(self.dtype, resolve_device(self.device))


@dataclass(frozen=True)
class Models:
    """What a run decodes with.

    Args:
        base_model: as the user named it, or as it was chosen.
        speculator_path: the same; it may be named though the run takes no drafter.
        verifier: the base.
        drafter: for it, None for none.
        tokenizer: the base's.
    """

    base_model: str
    speculator_path: str | None
    verifier: Verifier
    drafter: Drafter | None
    tokenizer: Any


def load(settings: ModelSettings, say: Callable[[str], None]) -> Models:
    """Load the models of a run.

    Args:
        settings: which ones.
        say: told in a line which ones they are, before the base is loaded.

    Raises:
        UsageError: no such device or dtype here.
        DataError: the base has no tokenizer.
        ModelError: one of them does not load, or the drafter was trained with another tokenizer.
        NetworkError: the hub did not answer.
    """
    drafter: Drafter | None = None
    base, path = settings.base_model, settings.speculator_path
    if not settings.autoregressive:
        if path is None:
            base = base or DEFAULT_BASE
            path = str(local_drafters.choose(base))
        drafter = local_drafters.load_named(path)
        base = base or drafter.config.verifier_name_or_path
    base = base or DEFAULT_BASE
    say(f"base: {base}; drafter: {'none' if drafter is None else path}")
    revision, trust = settings.revision, settings.trust_remote_code
    verifier = Verifier.from_pretrained(base, settings.dtype, settings.device, revision, trust)
    if settings.compile:
        verifier.compile()
        say(f"compiled the base's decode forwards in {verifier.compile_seconds:.0f} s")
    tokenizer = data.load_tokenizer(base, revision, trust_remote_code=trust)
    if drafter is not None:
        data.check_tokenizer(tokenizer, drafter.config.tokenizer_fingerprint, base)
    return Models(base, path, verifier, drafter, tokenizer)
