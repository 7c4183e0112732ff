"""The parts of ``benchmarks/peers.py`` that need no base: curves, efficiency, and processes that wait their turn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import peers
from our_decoders import Answer
from peer_processes import CompiledDecoders, Worker
from peer_rounds import FinishedRounds
from recurrent_drafting.errors import DataError, ResourceError, UsageError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.tree_budget import LatencyCurve

# Says how it was called, and for a prompt returns its tokens doubled, with counters where the request names a decoder.
ECHO = """
import json, sys
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "prompt" not in request:
        curve = {"nodes": [1, 2], "seconds": [1.0, 1.5], "depth_seconds": 0.25, "narrow": [], "baseline_seconds": 0.5}
        print(json.dumps({"curve": curve, "beam": {"width": 3}, "compile_seconds": 7.0}), flush=True)
        continue
    answer = {"tokens": [2 * token for token in request["prompt"]], "seconds": 0.5}
    if "speculative" in request:
        answer["stats"] = {"rows": 1, "tokens": request["count"], "row_steps": 2, "accepted": [1, 1]}
    print(json.dumps(answer), flush=True)
"""


def curve(*seconds: float, baseline: float, depth: float = 0.0) -> LatencyCurve:
    return LatencyCurve((1, 2, 4)[: len(seconds)], seconds, depth, (), baseline)


class Timed:
    """Decoders whose curves are known."""

    compile_seconds = 0.0

    def __init__(self, *curves: LatencyCurve | None) -> None:
        self.beam: dict[str, Any] = {}
        self._curves = iter(curves)

    def time_curve(self) -> LatencyCurve | None:
        return next(self._curves)


def speculation(*curves: LatencyCurve | None) -> peers.Speculation:
    found = peers.Speculation(Timed(*curves), "speculative", "baseline")  # type: ignore[arg-type]
    for _ in curves:
        found.time_curve()
    return found


def test_the_middle_curve_has_the_median_of_each_place_over_the_rounds() -> None:
    curves = (
        curve(1.0, 5.0, baseline=3.0, depth=0.3),
        curve(3.0, 4.0, baseline=1.0, depth=0.1),
        curve(2.0, 6.0, baseline=2.0, depth=0.2),
    )
    middle = speculation(*curves).middle_curve()
    assert middle == curve(2.0, 5.0, baseline=2.0, depth=0.2)


def test_trees_of_a_fixed_size_have_no_curve() -> None:
    assert speculation(None, None).middle_curve() is None


def method(seconds: list[list[float]], tokens: list[int], stats: list[DecodingStats]) -> peers.Method:
    texts = [[[0] * count] for count in tokens]
    return peers.Method(lambda _: Answer([], 0.0), 0.0, seconds, texts, stats)


def test_efficiency_is_the_median_of_the_calls_each_beside_its_own_ideal() -> None:
    # Two tokens a step at two nodes, three at four; t(1) / t(N) is 1 / 1.25 and 1 / 1.5: ideals of 1.6 and 2.
    calls = [
        DecodingStats(rows=1, tokens=9, prefill_tokens=1, row_steps=4, nodes=8),
        DecodingStats(rows=1, tokens=13, prefill_tokens=1, row_steps=4, nodes=16),
    ]
    ours = method([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]], [9, 13], calls)
    baseline = method([[1.2, 1.2, 9.0], [1.5, 1.5, 1.5]], [9, 13], [])
    figures = peers.efficiency(ours, baseline, curve(1.1, 1.25, 1.5, baseline=1.0))
    assert figures["efficiency"] == pytest.approx((1.2 / 1.6 + 1.5 / 2) / 2)
    total = DecodingStats(rows=2, tokens=22, prefill_tokens=2, row_steps=8, nodes=24)
    assert figures["ideal_speedup"] == pytest.approx(total.tau / 1.375)
    rate = 22 / (4 / 3 + 1), 22 / (11.4 / 3 + 1.5)
    assert figures["efficiency_total"] == pytest.approx(rate[0] / rate[1] / figures["ideal_speedup"])


def test_a_call_without_a_step_has_no_efficiency() -> None:
    nothing = DecodingStats(rows=1, tokens=1, prefill_tokens=1)
    ours = method([[1.0]], [1], [nothing])
    assert peers.efficiency(ours, method([[1.0]], [1], []), curve(1.0, baseline=1.0)) == {}


def test_methods_take_turns_in_an_order_that_rotates_and_keep_what_came_last() -> None:
    order: list[tuple[str, int]] = []

    def answer(name: str) -> peers.Method:
        def run(batch: Any) -> Answer:
            order.append((name, batch[0][0]))
            return Answer([[len(order)]], 1.0, DecodingStats(rows=len(order)))

        return peers.Method(run, 0.0)

    methods = {"a": answer("a"), "b": answer("b")}
    peers.take_turns(methods, [[[7]], [[8]]], 2, [], FinishedRounds(None, {}))
    warm = [("a", 7), ("b", 7)]
    assert order == [*warm, *[("a", 7), ("b", 7), ("b", 8), ("a", 8)], *[("b", 7), ("a", 7), ("a", 8), ("b", 8)]]
    assert methods["a"].seconds == [[1.0, 1.0], [1.0, 1.0]]
    assert methods["a"].texts == [[[8]], [[9]]]
    assert [stats.rows for stats in methods["a"].stats] == [8, 9]


def run_rounds(output: Path, rounds: int, fails_at: int | None = None) -> tuple[peers.Method, peers.Speculation]:
    """Let one method answer two prompts per round; its seconds count the answers of this process."""
    answers = 0

    def run(batch: Any) -> Answer:
        nonlocal answers
        answers += 1
        if answers == fails_at:
            raise KeyboardInterrupt
        return Answer([[answers]], float(answers), DecodingStats(rows=answers, tokens=1, accepted=[answers]))

    method = peers.Method(run, 0.0)
    curves = [curve(float(n), baseline=float(n)) for n in range(1, rounds + 2)]
    speculation = peers.Speculation(Timed(*curves), "ours", "baseline")  # type: ignore[arg-type]
    finished = FinishedRounds(output, {"command": "c", "shape": (1, 2)})
    peers.take_turns({"ours": method}, [[[7]], [[8]]], rounds, [speculation], finished)
    finished.close()
    return method, speculation


def test_a_run_that_was_cut_off_goes_on_with_the_next_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt):
        run_rounds(output, rounds=3, fails_at=5)  # one answer to warm up, two of the first round, one of the second
    assert capsys.readouterr().out == ""
    method, speculation = run_rounds(output, rounds=3)
    assert "going on from" in capsys.readouterr().out
    # The first round is the first run's; the second run warmed up with answer 1.
    assert method.seconds == [[2.0, 2.0, 4.0], [3.0, 3.0, 5.0]]
    assert (method.texts, [stats.accepted for stats in method.stats]) == ([[[4]], [[5]]], [[4], [5]])
    # A curve that is timed to learn a decoder's beam is not a round's.
    assert [found.seconds for found in speculation.curves] == [(1.0,), (2.0,), (3.0,)]
    assert list(tmp_path.iterdir()) == []


def test_rounds_that_are_all_finished_are_taken_over_as_they_are(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    kept = FinishedRounds(output, {"command": "c", "shape": (1, 2)})
    stats = {"rows": 5, "tokens": 1, "accepted": [5]}
    part = {"seconds": [2.5, 3.5], "texts": [[[9]], [[8]]], "stats": [stats, stats]}
    kept.add({"methods": {"ours": part}, "curves": {"ours": None}})
    method, speculation = run_rounds(output, rounds=1)
    assert (method.seconds, method.texts) == ([[2.5], [3.5]], [[[9]], [[8]]])
    assert method.stats[1] == DecodingStats(rows=5, tokens=1, accepted=[5])
    assert speculation.curves == []


def test_rounds_of_another_run_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    FinishedRounds(output, {"command": "a"}).add({})
    with pytest.raises(UsageError, match=r"rounds of another run: command 'a', now 'b'; choose another --output"):
        FinishedRounds(output, {"command": "b"})
    with pytest.raises(UsageError, match=r"machine\.cores None, now 2"):
        FinishedRounds(output, {"command": "a", "machine": {"cores": 2}})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"identity": {}}), json.dumps({"identity": 3, "rounds": []})])
def test_a_file_that_holds_no_rounds_is_named(text: str, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    (tmp_path / "record.json.rounds.json").write_text(text)
    with pytest.raises(DataError, match=r"expected the finished rounds of a run, got .+; delete it to begin anew"):
        FinishedRounds(output, {})


def test_a_worker_is_stopped_while_it_is_not_its_turn() -> None:
    worker = Worker([sys.executable, "-c", ECHO])
    try:
        answer = worker.answer([[1, 2], [3]], count=4)
        assert answer == Answer([[2, 4], [6]], 1.0, None)
        # Stopped, not ended; a signal takes its time.
        _, status = os.waitpid(worker._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        worker.close()
    assert worker._process.returncode is not None


def test_compiled_decoders_hand_on_what_their_worker_counts_and_times() -> None:
    worker = Worker([sys.executable, "-c", ECHO])
    try:
        decoders = CompiledDecoders(worker)
        answer = decoders.answer(True, [[1]], 6, 0.0)
        assert answer.stats is not None and (answer.stats.tokens, answer.stats.row_steps) == (6, 2)
        assert decoders.time_curve() == LatencyCurve((1, 2), (1.0, 1.5), 0.25, (), 0.5)
        assert (decoders.beam, decoders.compile_seconds) == ({"width": 3}, 7.0)
    finally:
        worker.close()


def test_a_worker_that_ends_by_itself_is_named() -> None:
    with pytest.raises(ResourceError, match="ended by itself"):
        Worker([sys.executable, "-c", ""])
    with pytest.raises(ResourceError, match="expected it to say that it is ready"):
        Worker([sys.executable, "-c", "print('[]')"])


@pytest.mark.parametrize("flags", [["--sampled_too", "0"], ["--sampled_too", "1", "--temperature", "0.5"]])
def test_sampled_decoders_go_beside_greedy_ones_only(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sampled_too is a temperature above 0 beside greedy text"):
        peers.main(["--speculator_path", str(tmp_path), *flags])
