"""Settings are checked when they are made, and a drafter's shape survives a save."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from recurrent_drafting import BeamConfig, RecurrentDraftingConfig, SamplingConfig
from recurrent_drafting.errors import UsageError

NAN, INF = float("nan"), float("inf")
NOT_POSITIVE_INT = [0, -1, True, False, 1.0, 2.5, NAN, INF, "3"]
NOT_NATURAL_INT = [-1, True, False, 1.0, 2.5, NAN, INF, "3"]
NOT_FINITE = [NAN, INF, -INF]


def shape(**overrides: object) -> RecurrentDraftingConfig:
    return RecurrentDraftingConfig(**{"hidden_size": 8, "vocab_size": 11, **overrides})  # type: ignore[arg-type]


# maker, field, the name and the range that the message states, values outside the range, values inside it
CHECKS: list[tuple[Callable[..., object], str, str, str, list[object], list[object]]] = [
    (BeamConfig, "width", "beam width", "an integer >= 1", NOT_POSITIVE_INT, [1, 1000]),
    (BeamConfig, "length", "beam length", "an integer >= 1", NOT_POSITIVE_INT, [1, 1000]),
    (BeamConfig, "max_nodes", "max_nodes", "an integer >= 1 or None", NOT_POSITIVE_INT, [None, 1, 1000]),
    (BeamConfig, "coupling", "coupling", "a finite number >= 0", [-0.1, *NOT_FINITE], [0, 0.0, 0.3, 5]),
    (BeamConfig, "lookup_length", "lookup_length", "an integer >= 0", NOT_NATURAL_INT, [0, 7]),
    (BeamConfig, "recycled_nodes", "recycled_nodes", "an integer >= 0", NOT_NATURAL_INT, [0, 7]),
    (SamplingConfig, "temperature", "temperature", "a finite number >= 0", [-1e-9, *NOT_FINITE], [0, 0.0, 1e-3, 2]),
    (SamplingConfig, "top_k", "top_k", "an integer >= 0", NOT_NATURAL_INT, [0, 1, 10**6]),
    (SamplingConfig, "top_p", "top_p", "in (0, 1]", [0, 0.0, -0.1, 1.0001, *NOT_FINITE], [1, 1e-9, 1.0]),
    (SamplingConfig, "min_p", "min_p", "in [0, 1]", [-1e-9, 1.0001, *NOT_FINITE], [0, 0.5, 1]),
    (
        SamplingConfig,
        "repetition_penalty",
        "repetition_penalty",
        "a finite number > 0",
        [0, -1.0, *NOT_FINITE],
        [0.5, 1, 1.3],
    ),
    (SamplingConfig, "presence_penalty", "presence_penalty", "a finite number", NOT_FINITE, [-2.0, 0, 2]),
    (SamplingConfig, "frequency_penalty", "frequency_penalty", "a finite number", NOT_FINITE, [-2.0, 0, 2]),
    (SamplingConfig, "min_new_tokens", "min_new_tokens", "an integer >= 0", NOT_NATURAL_INT, [0, 7]),
    (SamplingConfig, "seed", "seed", "an integer", [True, 1.0, NAN, "3", None], [0, -1, 2**70]),
    (
        SamplingConfig,
        "bad_words_ids",
        "bad_words_ids",
        "a tuple of non-empty token sequences",
        [((),), ((1,), ())],
        [(), ((1,), (2, 3))],
    ),
    (shape, "hidden_size", "hidden_size", "an integer >= 1", [0, -8, True], [1]),
    (shape, "vocab_size", "vocab_size", "an integer >= 1", [0, -8, True], [1]),
    (shape, "exit_dim", "exit_dim", "an integer >= 1", [0, -8, True], [1, 16, None]),
    (shape, "num_draft_tokens", "num_draft_tokens", "an integer >= 1", [0, -8, True], [1]),
    (shape, "num_draft_layers", "num_draft_layers", "an integer >= 0", [-1, True], [0, 5]),
    (shape, "draft_vocab_size", "draft_vocab_size", "in 1..vocab_size (11) or None", [0, -1, 12, True], [1, 11, None]),
    (shape, "beam_width", "beam width", "an integer >= 1", [0, -1, True], [1]),
    (shape, "beam_length", "beam length", "an integer >= 1", [0, -1, True], [1]),
    (shape, "lookup_length", "lookup_length", "an integer >= 0", [-1, True], [0, 9]),
    (shape, "recycled_nodes", "recycled_nodes", "an integer >= 0", [-1, True], [0, 9]),
]
NO_NUMBER = ["0.5", None, True]
OTHER_TYPES: list[tuple[Callable[..., object], str, list[object]]] = [
    (BeamConfig, "coupling", NO_NUMBER),
    *((SamplingConfig, name, NO_NUMBER) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    *((SamplingConfig, name, NO_NUMBER) for name in ("presence_penalty", "frequency_penalty")),
    (SamplingConfig, "bad_words_ids", [(3,), "ab", ((1, -3),), ((1.5,),)]),
    (shape, "rnn", ["no"]),
    (shape, "emb_norm", ["no"]),
]
REFUSED = [(make, name, label, range_, value) for make, name, label, range_, bad, _ in CHECKS for value in bad]
TAKEN = [(make, name, value) for make, name, *_, good in CHECKS for value in good]


@pytest.mark.parametrize(("make", "name", "label", "expected", "value"), REFUSED)
def test_value_out_of_range_is_refused_with_field_range_and_value(
    make: Callable[..., object], name: str, label: str, expected: str, value: object
) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{label} must be {expected}, got {value!r}")):
        make(**{name: value})


@pytest.mark.parametrize(
    ("make", "name", "value"), [(make, name, value) for make, name, values in OTHER_TYPES for value in values]
)
def test_value_of_another_type_is_refused_with_field_and_value(
    make: Callable[..., object], name: str, value: object
) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*got ") as caught:
        make(**{name: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("make", "name", "value"), TAKEN)
def test_value_in_range_is_taken_as_it_is(make: Callable[..., object], name: str, value: object) -> None:
    expected = 8 if (name, value) == ("exit_dim", None) else value
    assert getattr(make(**{name: value}), name) == expected


def test_every_setting_has_a_range_check() -> None:
    for config in (BeamConfig, SamplingConfig):
        checked = {name for make, name, *_ in CHECKS if make is config}
        assert checked == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("config", [BeamConfig(), SamplingConfig()])
def test_settings_are_frozen(config: BeamConfig | SamplingConfig) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 1)


def test_bad_words_become_tuples_so_that_settings_can_be_keys() -> None:
    config = SamplingConfig(bad_words_ids=[[1, 2], [3]])  # type: ignore[arg-type]
    assert config.bad_words_ids == ((1, 2), (3,))
    assert len({config, dataclasses.replace(config)}) == 1


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (1e-6, False), (1.0, False)])
def test_greedy_means_temperature_zero(temperature: float, greedy: bool) -> None:
    assert SamplingConfig(temperature=temperature).greedy is greedy


def test_drafter_defaults_to_the_beam_defaults_and_an_exit_as_wide_as_the_hidden_state() -> None:
    config = RecurrentDraftingConfig(hidden_size=24)
    beam = BeamConfig()
    assert (config.beam_width, config.beam_length, config.exit_dim) == (beam.width, beam.length, 24)


def test_every_field_of_a_drafter_survives_a_save(tmp_path: Path) -> None:
    values: dict[str, object] = {
        "hidden_size": 12,
        "vocab_size": 101,
        "exit_dim": 24,
        "num_draft_layers": 3,
        "rnn": False,
        "emb_norm": True,
        "draft_vocab_size": 50,
        "num_draft_tokens": 6,
        "beam_width": 3,
        "beam_length": 7,
        "verifier_name_or_path": "some/base",
        "verifier_fingerprint": "a1b2",
        "tokenizer_fingerprint": "c3d4",
    }
    default = RecurrentDraftingConfig()
    assert all(getattr(default, name) != value for name, value in values.items())
    RecurrentDraftingConfig(**values).save_pretrained(tmp_path)  # type: ignore[arg-type]
    loaded = RecurrentDraftingConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values


def test_damaged_record_is_refused_when_it_is_read(tmp_path: Path) -> None:
    shape().save_pretrained(tmp_path)
    record = tmp_path / "config.json"
    record.write_text(record.read_text().replace('"num_draft_layers": 2', '"num_draft_layers": -2'))
    with pytest.raises(UsageError, match="num_draft_layers must be an integer >= 0, got -2"):
        RecurrentDraftingConfig.from_pretrained(tmp_path)
