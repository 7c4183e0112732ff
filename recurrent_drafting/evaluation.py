"""Evaluation: runs over prompts, comparison with the baseline, and the record of both."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recurrent_drafting import assets, evaluation_log, lossless
from recurrent_drafting.config import BeamConfig, SamplingConfig
from recurrent_drafting.decoding import (
    AutoregressiveDecoder,
    GenerationOutput,
    SpeculativeDecoder,
    Step,
)
from recurrent_drafting.detokenizer import StopStrings, decode, token_texts
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import first_line
from recurrent_drafting.evaluation_log import EvaluationLog
from recurrent_drafting.latency_cache import latency_table
from recurrent_drafting.lossless import LosslessReport
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.prompt_files import Question, encode_prompt
from recurrent_drafting.reply_stream import ReplySettings
from recurrent_drafting.result_files import machine
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable
from recurrent_drafting.verifier import Verifier

_WARM_UP_TOKENS = 8
# Batches of prompts in one call: fewer places stay empty at its end, and an interruption loses more.
_CALL_BATCHES = 4
# Timed forwards per tree size: a single reply must not wait for a careful measurement.
TIMINGS, TIMINGS_ONE_REPLY = 5, 1


@dataclass(frozen=True)
class RunSettings:
    """Settings of an evaluation.

    Args:
        base_model: as the user named it.
        speculator_path: as the user named it, None for the baseline alone.
        max_new_tokens: per reply.
        max_prompt_length: prompts are cut to this many tokens: the oldest turns leave first, then
            the end of the last user text.
        batch_size: prompts decoded at a time; above 1, a call has four times as many, and each that waits takes the
            place of one that ends.
        turns: turns per question.
        sampling: the pipeline's settings.
        beam: shape of beams and tree; ``max_nodes`` None with ``auto_tree`` is chosen by cost.
        auto_tree: choose the tree size from the measured latency curve.
        stop: strings that end a reply.
    """

    base_model: str
    speculator_path: str | None
    max_new_tokens: int = 100
    max_prompt_length: int = 500
    batch_size: int = 1
    turns: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    beam: BeamConfig | None = None
    auto_tree: bool = True
    stop: StopStrings | None = None

    @property
    def reply(self) -> ReplySettings:
        """Return what its replies are made with."""
        return ReplySettings(self.max_new_tokens, self.sampling, self.stop)


@dataclass
class _Row:
    """One prompt and its results."""

    question: Question
    turn: int
    prompt: list[int]
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tstamp: float = 0.0


@dataclass
class _Finished:
    """What all turns of some questions gave.

    Args:
        rows: one for each prompt.
        stats: what each decoder did.
        cut: prompts that were cut.
    """

    rows: list[_Row]
    stats: dict[str, DecodingStats]
    cut: int = 0

    def entry(self) -> dict[str, Any]:
        """Return it as a line of the log."""
        rows = [{"turn": row.turn, "prompt": row.prompt, "tstamp": row.tstamp, "outputs": {}} for row in self.rows]
        for line, row in zip(rows, self.rows, strict=True):
            line["outputs"] = {
                name: {**output, "steps": [astuple(step) for step in output["steps"]]}
                for name, output in row.outputs.items()
            }
        return {"rows": rows, "stats": {name: asdict(item) for name, item in self.stats.items()}, "cut": self.cut}

    @classmethod
    def of(cls, entry: dict[str, Any], questions: Sequence[Question], turns: int) -> _Finished:
        """Read a line of the log; its rows come turn by turn, in each the questions that have it."""
        asked = [question for turn in range(turns) for question in questions if turn < len(question.turns)]
        rows = []
        for question, line in zip(asked, entry["rows"], strict=True):
            outputs = {
                name: {**output, "steps": [Step(*step) for step in output["steps"]]}
                for name, output in line["outputs"].items()
            }
            rows.append(_Row(question, line["turn"], line["prompt"], outputs, line["tstamp"]))
        return cls(rows, {name: DecodingStats(**item) for name, item in entry["stats"].items()}, entry["cut"])


def speculative_decoder(
    verifier: Verifier,
    drafter: Drafter,
    settings: RunSettings,
    *,
    allow_base_mismatch: bool = False,
    repeats: int = TIMINGS,
) -> SpeculativeDecoder:
    """Build the decoder that the settings describe, with its latency curves if they say so.

    Args:
        verifier: the base.
        drafter: a drafter for it.
        settings: of the run.
        allow_base_mismatch: see ``SpeculativeDecoder``.
        repeats: timed forwards per tree size; few are enough for a short run.

    Raises:
        ModelError: the drafter does not fit the base.
    """
    decoder = SpeculativeDecoder(verifier, drafter, settings.beam, allow_base_mismatch=allow_base_mismatch)
    if settings.auto_tree and decoder.beam.max_nodes is None:
        decoder.latency = latency_table(verifier, decoder.drafter, decoder.beam, settings.batch_size, repeats=repeats)
    return decoder


class Evaluation:
    """Run prompts through one or both decoders, batch by batch, and collect what they did.

    Args:
        verifier: the base.
        decoder: the speculative decoder, or None.
        tokenizer: the base's.
        settings: of the run.
        baseline: run the baseline too (or alone).
    """

    def __init__(
        self,
        verifier: Verifier,
        decoder: SpeculativeDecoder | None,
        tokenizer: Any,
        settings: RunSettings,
        *,
        baseline: bool,
    ) -> None:
        self._verifier = verifier
        self._tokenizer = tokenizer
        self._settings = settings
        self._speculative = decoder
        self._decoders: dict[str, Any] = {}
        if baseline:
            self._decoders["baseline"] = AutoregressiveDecoder(verifier)
        if decoder is not None:
            self._decoders["speculative"] = decoder
        self._stats = {name: DecodingStats() for name in self._decoders}
        self._runs = 0
        self.cut_prompts = 0

    def run(self, questions: Sequence[Question], progress: Path | None = None) -> dict[str, Any]:
        """Decode every turn of every question and return the result record.

        Args:
            questions: what is asked.
            progress: file that keeps what is finished; a run whose file is there goes on from it.

        Raises:
            UsageError: the file cannot be written.
            ModelError: it is of a run with other settings.
        """
        with self._log(questions, progress) as log:
            rows = self._decode_batches(questions, log)
            return self._record(rows) | ({"sessions": log.sessions} if log else {})

    @contextmanager
    def _log(self, questions: Sequence[Question], progress: Path | None) -> Iterator[EvaluationLog | None]:
        if progress is None:
            yield None
            return
        with evaluation_log.opened(progress, self._identity(questions)) as log:
            yield log

    def _decode_batches(self, questions: Sequence[Question], log: EvaluationLog | None) -> list[_Row]:
        """Take what the log holds, and decode the rest."""
        size = self._settings.batch_size * (_CALL_BATCHES if self._settings.batch_size > 1 else 1)
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        done = self._finished(log, batches) if log else []
        rows: list[_Row] = []
        total = sum(min(self._settings.turns, len(question.turns)) for question in questions)
        with tqdm(total=total, desc="evaluation", unit="prompt") as bar:
            for finished in done:
                self._take(finished, rows, bar)
            self._share_latency_curves(log)
            if len(done) < len(batches):
                self._warm_up(questions[0])
            for batch in batches[len(done) :]:
                finished = self._batch(batch)
                if log is not None:
                    log.append(finished.entry())
                self._take(finished, rows, bar)
        return rows

    def _finished(self, log: EvaluationLog, batches: Sequence[Sequence[Question]]) -> list[_Finished]:
        """Read what an earlier session finished."""
        if len(log.entries) > len(batches):
            raise log.foreign(f"it holds {len(log.entries)} batches, the run has {len(batches)}")
        found = []
        for number, entry in enumerate(log.entries, 1):
            try:
                found.append(_Finished.of(entry, batches[number - 1], self._settings.turns))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise log.foreign(f"batch {number} is not what a run writes ({first_line(error)})") from error
        return found

    def _take(self, finished: _Finished, rows: list[_Row], bar: Any) -> None:
        """Count a finished batch."""
        rows += finished.rows
        self.cut_prompts += finished.cut
        self._runs += len({row.turn for row in finished.rows})
        for name, stats in finished.stats.items():
            self._stats[name].merge(stats)
        total = self._stats[self._main]
        bar.set_postfix(tok_s=f"{total.tokens_per_second:.1f}", tau=f"{total.tau:.2f}")
        bar.update(len(finished.rows))

    def _identity(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Return what decides texts and figures of the run."""
        settings = self._settings
        texts = json.dumps([[question.question_id, question.category, question.turns] for question in questions])
        measured = ("latency_curve", "compile_seconds")
        described = {name: value for name, value in self._describe().items() if name not in measured}
        return {
            "base_model": settings.base_model,
            "base": self._verifier.fingerprint,
            "compiled": self._verifier.compiles,
            "speculator_path": settings.speculator_path,
            "drafter": self._speculative and _weights_digest(self._speculative.drafter),
            "decoders": list(self._decoders),
            "dtype": str(self._verifier.dtype).removeprefix("torch."),
            "device": str(self._verifier.device),
            "batch_size": settings.batch_size,
            "questions": {"count": len(questions), "sha256": hashlib.sha256(texts.encode()).hexdigest()[:12]},
            "settings": described,
            "machine": machine(),
        }

    def _share_latency_curves(self, log: EvaluationLog | None) -> None:
        """Choose tree sizes by the same curves in all sessions: they are a setting that was measured."""
        decoder = self._speculative
        if log is None or decoder is None or not isinstance(decoder.latency, LatencyTable):
            return
        curves = log.first_curves({str(rows): asdict(curve) for rows, curve in decoder.latency.curves.items()})
        decoder.latency = LatencyTable({int(rows): LatencyCurve.of(curve) for rows, curve in curves.items()})

    def _warm_up(self, question: Question) -> None:
        prompt, _ = self._encode([{"role": "user", "content": question.turns[0]}])
        for decoder in self._decoders.values():
            decoder.generate([prompt], max_new_tokens=_WARM_UP_TOKENS, sampling=self._settings.sampling)

    def _batch(self, questions: Sequence[Question]) -> _Finished:
        """Decode all turns of some questions; a reply enters the history of the next turn."""
        finished = _Finished([], {name: DecodingStats() for name in self._decoders})
        histories: list[list[dict[str, str]]] = [[] for _ in questions]
        for turn in range(self._settings.turns):
            asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            if not asked:
                break
            batch = []
            for i in asked:
                histories[i].append({"role": "user", "content": questions[i].turns[turn]})
                prompt, cut = self._encode(histories[i])
                finished.cut += cut
                batch.append(_Row(questions[i], turn, prompt))
            self._decode_all(batch, finished.stats, first=self._runs + turn)
            for i, row in zip(asked, batch, strict=True):
                # With both decoders the baseline's reply goes on, so that both see one prompt.
                reply = self._text(next(iter(self._decoders)), row)
                histories[i].append({"role": "assistant", "content": reply})
            finished.rows += batch
        return finished

    @property
    def _main(self) -> str:
        return "speculative" if self._speculative else "baseline"

    def _decode_all(self, batch: list[_Row], stats: dict[str, DecodingStats], *, first: int) -> None:
        """Run every decoder; the order alternates, so that none always runs on warmer memory."""
        names = list(self._decoders)
        for name in names if first % 2 == 0 else reversed(names):
            self._decode(name, batch, stats[name])
        for row in batch:
            row.tstamp = time.time()

    def _decode(self, name: str, batch: list[_Row], stats: DecodingStats) -> None:
        settings = self._settings
        output: GenerationOutput = self._decoders[name].generate(
            [row.prompt for row in batch],
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            stop=settings.stop,
            request_ids=[row.question.request_id(row.turn) for row in batch],
            batch_size=settings.batch_size,
        )
        stats.merge(output.stats)
        for index, row in enumerate(batch):
            row.outputs[name] = {
                "tokens": output.sequences[index],
                "finish_reason": output.finish_reasons[index],
                "steps": output.steps[index],
                "seconds": output.stats.seconds,
            }

    def _encode(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], bool]:
        return encode_prompt(self._tokenizer, messages, self._settings.max_prompt_length)

    def _text(self, name: str, row: _Row) -> str:
        text = decode(self._tokenizer, row.outputs[name]["tokens"])
        return self._settings.stop.cut(text) if self._settings.stop else text

    def _record(self, rows: list[_Row]) -> dict[str, Any]:
        main = self._main
        summary = self._summary(main, rows)
        record: dict[str, Any] = {
            "summary": summary,
            "machine": machine(),
            "settings": self._describe(),
        }
        if len(self._decoders) == 2:
            report = self._audit(rows)
            summary |= self._comparison(rows, report)
            record["lossless"] = asdict(report)
        record["rows"] = [self._row_record(row, main) for row in rows]
        return record

    def _audit(self, rows: list[_Row]) -> LosslessReport:
        assert self._speculative is not None
        pairs = [
            lossless.Pair(
                prompt=row.prompt,
                request_id=row.question.request_id(row.turn),
                baseline=row.outputs["baseline"]["tokens"],
                speculative=row.outputs["speculative"]["tokens"],
            )
            for row in rows
        ]
        settings = lossless.Settings(
            sampling=self._settings.sampling,
            max_new_tokens=self._settings.max_new_tokens,
            eos_token_ids=self._verifier.eos_token_ids,
            stop=self._settings.stop,
        )
        return lossless.audit(self._speculative, pairs, settings)

    def _summary(self, main: str, rows: list[_Row]) -> dict[str, Any]:
        settings, stats = self._settings, self._stats[main]
        note = assets.ASSETS[settings.base_model].note if settings.base_model in assets.ASSETS else None
        beam = self._speculative.beam if main == "speculative" and self._speculative else None
        return {
            "method": main,
            "base_model": settings.base_model,
            "base_note": note,
            "speculator_path": settings.speculator_path if main == "speculative" else None,
            "dtype": str(self._verifier.dtype).removeprefix("torch."),
            "device": str(self._verifier.device),
            "batch_size": settings.batch_size,
            "temperature": settings.sampling.temperature,
            "prompts": len(rows),
            "cut_prompts": self.cut_prompts,
            "tokens": stats.tokens,
            "seconds": stats.seconds,
            "tokens_per_second": stats.tokens_per_second,
            "tau": stats.tau,
            "acceptance_by_depth": stats.acceptance_by_depth,
            "mean_tree_nodes": stats.mean_nodes,
            "lookup_length": beam.lookup_length if beam else 0,
            "recycled_nodes": beam.recycled_nodes if beam else 0,
            "phase_seconds": stats.phase_seconds,
        }

    def _comparison(self, rows: list[_Row], report: LosslessReport) -> dict[str, Any]:
        replied = [row for row in rows if row.outputs["baseline"]["tokens"]]
        speedups = [_rate(row, "speculative") / _rate(row, "baseline") for row in replied]
        base, ours = self._stats["baseline"], self._stats["speculative"]
        return {
            "baseline_tokens_per_second": base.tokens_per_second,
            "speculative_tokens_per_second": ours.tokens_per_second,
            "speedup_median": statistics.median(speedups) if speedups else float("nan"),
            "speedup_min": min(speedups, default=float("nan")),
            "speedup_max": max(speedups, default=float("nan")),
            "speedup_total": (ours.tokens_per_second / base.tokens_per_second if base.tokens else float("nan")),
            "identical": report.identical,
            "compared": len(rows),
            "near_ties": report.near_ties,
            "structural": report.structural,
            "unaudited": report.unaudited,
            "epsilon": report.epsilon,
        }

    def _row_record(self, row: _Row, main: str) -> dict[str, Any]:
        """Describe one prompt; with several at a time, seconds are those of the whole call."""
        output = row.outputs[main]
        steps = output["steps"]
        emitted = sum(step.emitted for step in steps)
        text = self._text(main, row)
        histogram = [0] * (max((step.drafted for step in steps), default=-1) + 1)
        for step in steps:
            histogram[step.drafted] += 1
        record = {
            "question_id": row.question.question_id,
            "category": row.question.category,
            "turn": row.turn + 1,
            "prompt": row.question.turns[row.turn],
            "prompt_tokens": len(row.prompt),
            "text": text,
            "token_texts": token_texts(self._tokenizer, output["tokens"]),
            "tokens": len(output["tokens"]),
            "seconds": output["seconds"],
            "tau": emitted / len(steps) if steps else None,
            "accepted": histogram,
            "accepted_by_step": [step.drafted for step in steps],
            "finish_reason": output["finish_reason"],
            "choices": [choice(text, len(output["tokens"]), output["seconds"], [step.emitted for step in steps])],
            "tstamp": row.tstamp,
        }
        if len(row.outputs) == 2:
            record["baseline_seconds"] = row.outputs["baseline"]["seconds"]
            record["baseline_tokens"] = len(row.outputs["baseline"]["tokens"])
            record["identical"] = row.outputs["baseline"]["tokens"] == output["tokens"]
            if not record["identical"]:
                record["baseline_text"] = self._text("baseline", row)
        return record

    def _describe(self) -> dict[str, Any]:
        settings = self._settings
        described = {
            "max_new_tokens": settings.max_new_tokens,
            "max_prompt_length": settings.max_prompt_length,
            "turns": settings.turns,
            "sampling": asdict(settings.sampling),
            "stop": settings.stop.strings if settings.stop else (),
        }
        if self._verifier.compiles:
            described["compile_seconds"] = self._verifier.compile_seconds
        if self._speculative is not None:
            latency = self._speculative.latency
            curve = latency.at(settings.batch_size) if isinstance(latency, LatencyTable) else latency
            described["beam"] = asdict(self._speculative.beam)
            described["latency_curve"] = None if curve is None else asdict(curve)
        return described


def choice(text: str, tokens: int, seconds: float, accept_lengths: list[int]) -> dict[str, Any]:
    """Return one turn in the words of FastChat's and Spec-Bench's answer files.

    Args:
        text: the reply.
        tokens: its new tokens.
        seconds: of the wall clock.
        accept_lengths: tokens emitted by each verifier step; the first token comes from the prefill.
    """
    return {
        "index": 0,
        "turns": [text],
        "decoding_steps": [len(accept_lengths)],
        "new_tokens": [tokens],
        "wall_time": [seconds],
        "accept_lengths": accept_lengths,
    }


def _weights_digest(drafter: Drafter) -> str:
    """Return the identity of a drafter's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _rate(row: _Row, name: str) -> float:
    output = row.outputs[name]
    return float(len(output["tokens"]) / output["seconds"])


def compare(
    verifier: Verifier,
    decoder: SpeculativeDecoder,
    tokenizer: Any,
    questions: Sequence[Question],
    settings: RunSettings,
    progress: Path | None = None,
) -> dict[str, Any]:
    """Run baseline and speculative decoder in turn on every prompt, and audit the texts."""
    return Evaluation(verifier, decoder, tokenizer, settings, baseline=True).run(questions, progress)


def run_speculative(
    decoder: SpeculativeDecoder,
    tokenizer: Any,
    questions: Sequence[Question],
    settings: RunSettings,
    progress: Path | None = None,
) -> dict[str, Any]:
    """Run the speculative decoder alone."""
    return Evaluation(decoder.verifier, decoder, tokenizer, settings, baseline=False).run(questions, progress)


def run_baseline(
    verifier: Verifier,
    tokenizer: Any,
    questions: Sequence[Question],
    settings: RunSettings,
    progress: Path | None = None,
) -> dict[str, Any]:
    """Run the autoregressive baseline alone."""
    return Evaluation(verifier, None, tokenizer, settings, baseline=True).run(questions, progress)


def format_summary(summary: dict[str, Any]) -> str:
    """Return the closing block of an evaluation."""
    s = summary
    rate = f"{s['tokens_per_second']:.1f} tokens/s"
    base = f"{s['base_model']} ({s['base_note']})" if s["base_note"] else s["base_model"]
    per_prompt = s["tokens"] / max(s["prompts"], 1)
    lines = [
        "Evaluation summary",
        f"  method {s['method']}, base {base}, drafter {s['speculator_path'] or 'none'}",
        f"  {s['dtype']} on {s['device']}, batch {s['batch_size']}, temperature {s['temperature']}",
        f"  {s['prompts']} prompts ({s['cut_prompts']} cut), {s['tokens']} tokens, "
        f"{s['seconds']:.1f} s, {per_prompt:.1f} tokens/prompt, {rate}",
    ]
    if s["method"] == "speculative":
        depths = " ".join(f"{share:.2f}" for share in s["acceptance_by_depth"])
        lines.append(
            f"  tau {s['tau']:.3f} tokens per verifier step, acceptance by depth {depths}, "
            f"mean tree nodes {s['mean_tree_nodes']:.1f}"
        )
        if s["lookup_length"]:
            lines.append(f"  prompt lookup: up to {s['lookup_length']} tokens are copied where the text repeats")
        if s["recycled_nodes"]:
            lines.append(f"  token recycling: the last {s['recycled_nodes']} verified nodes are remembered")
    total = max(s["seconds"], 1e-9)
    split = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in s["phase_seconds"].items())
    lines.append(f"  time split: {split}")
    if "compared" in s:
        unjudged = f", {s['unaudited']} differing and not judged" if s["unaudited"] else ""
        lines += [
            "Against the baseline",
            f"  speculative {s['speculative_tokens_per_second']:.1f} tok/s, baseline "
            f"{s['baseline_tokens_per_second']:.1f} tok/s, speed-up {s['speedup_median']:.2f} "
            f"(median; {s['speedup_min']:.2f}-{s['speedup_max']:.2f} over prompts; "
            f"{s['speedup_total']:.2f} on all tokens)",
            f"  identical outputs {s['identical']}/{s['compared']}: {s['identical']} identical, "
            f"{s['near_ties']} rounding near-ties, {s['structural']} structural{unjudged}",
        ]
    return "\n".join(lines)
