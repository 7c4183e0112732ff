"""Counters: definitions by hand, sums that add up in any order."""

from __future__ import annotations

import math
import random

import pytest

from recurrent_drafting import DecodingStats
from recurrent_drafting.metrics import PHASES, MeanMetrics


def counted(accepted: list[int]) -> DecodingStats:
    """Count steps of one row that starts with a token from the prefill and loses nothing to cuts."""
    stats = DecodingStats(rows=1, tokens=1, prefill_tokens=1)
    for length in accepted:
        stats.count_step(length)
        stats.tokens += length + 1
    return stats


def test_tau_is_tokens_per_step_without_those_of_the_prefill() -> None:
    stats = counted([2, 0, 4, 0])  # emits 3 + 1 + 5 + 1 = 10 in 4 steps
    assert stats.tau == 2.5
    assert stats.accepted == [2, 0, 1, 0, 1]
    assert stats.acceptance_by_depth == [0.5, 0.5, 0.25, 0.25]


def test_tau_is_one_plus_the_acceptance_rates_where_nothing_is_cut() -> None:
    rng = random.Random(0)
    for _ in range(20):
        stats = counted([rng.randint(0, 5) for _ in range(rng.randint(1, 40))])
        assert stats.tau == pytest.approx(1 + sum(stats.acceptance_by_depth))


def test_nothing_done_has_no_tau() -> None:
    stats = DecodingStats()
    assert math.isnan(stats.tau)
    assert math.isnan(stats.mean_nodes)
    assert stats.acceptance_by_depth == []
    assert stats.tokens_per_second == 0


def test_rates_are_per_row_step_and_per_second() -> None:
    stats = DecodingStats(tokens=30, row_steps=4, nodes=64, seconds=1.5)
    assert (stats.mean_nodes, stats.tokens_per_second) == (16, 20)


def random_stats(rng: random.Random) -> DecodingStats:
    stats = counted([rng.randint(0, 4) for _ in range(rng.randint(0, 9))])
    stats.forwards, stats.nodes, stats.seconds = rng.randint(1, 9), rng.randint(1, 99), rng.randint(1, 64) / 8
    stats.phase_seconds = {name: rng.randint(0, 64) / 8 for name in PHASES}
    return stats


@pytest.mark.parametrize("seed", range(10))
def test_merge_adds_every_sum_and_count(seed: int) -> None:
    rng = random.Random(seed)
    parts = [random_stats(rng) for _ in range(4)]
    merged = DecodingStats()
    for part in parts:
        merged.merge(part)
    for name in ("rows", "tokens", "prefill_tokens", "row_steps", "forwards", "nodes", "seconds"):
        assert getattr(merged, name) == sum(getattr(part, name) for part in parts)
    longest = max(len(part.accepted) for part in parts)
    padded = [part.accepted + [0] * (longest - len(part.accepted)) for part in parts]
    assert merged.accepted == [sum(column) for column in zip(*padded, strict=True)]
    assert merged.phase_seconds == {name: sum(part.phase_seconds[name] for part in parts) for name in PHASES}
    steps = sum(part.row_steps for part in parts)
    assert merged.tau == pytest.approx(sum(part.tau * part.row_steps for part in parts if part.row_steps) / steps)


def test_merge_leaves_the_other_alone() -> None:
    first, second = counted([1]), counted([3, 0])
    first.merge(second)
    first.merge(second)
    assert second == counted([3, 0])
    assert first.accepted == [2, 1, 0, 2]


def test_phases_take_the_time_inside_even_when_it_fails() -> None:
    stats = DecodingStats()
    with stats.phase("draft"):
        pass
    with pytest.raises(ZeroDivisionError), stats.phase("verify"):
        _ = 1 / 0
    once = dict(stats.phase_seconds)
    assert once["draft"] > 0
    assert once["verify"] > 0
    with stats.phase("draft"):
        pass
    assert stats.phase_seconds["draft"] > once["draft"]
    assert sum(stats.phase_seconds[name] for name in PHASES if name not in {"draft", "verify"}) == 0


def test_time_that_no_phase_claims_is_other() -> None:
    stats = DecodingStats()
    stats.phase_seconds.update(prefill=0.5, verify=1.0)
    stats.close(2.0)
    assert (stats.seconds, stats.phase_seconds["other"]) == (2.0, 0.5)
    stats.close(2.0)
    assert sum(stats.phase_seconds.values()) == stats.seconds
    stats.close(1.0)  # a clock that went wrong yields no negative time
    assert stats.phase_seconds["other"] == 0


def test_means_are_exact_for_any_grouping_and_start_anew() -> None:
    values = [0.5, 1.25, 3.0, 8.0]
    for cut in range(len(values) + 1):
        means = MeanMetrics()
        for part in (values[:cut], values[cut:]):
            means.add("loss", sum(part), len(part))
        means.add("empty", 0.0, 0)
        assert means.pop_means() == {"loss": sum(values) / 4}
        assert means.pop_means() == {}
        means.add("loss", 3.0, 2)
        assert means.pop_means() == {"loss": 1.5}
