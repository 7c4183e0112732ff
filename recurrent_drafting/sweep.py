"""Sweep: the same prompts under several beam shapes, tree sizes and temperatures, against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recurrent_drafting import assets, checkpoint, cli, evaluation, lossless, manifest, prompt_files, result_files
from recurrent_drafting.config import BeamConfig, SamplingConfig, SweepGrid
from recurrent_drafting.decoding import AutoregressiveDecoder, GenerationOutput, SpeculativeDecoder
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import UsageError
from recurrent_drafting.evaluation import RunSettings
from recurrent_drafting.lossless import LosslessReport
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.prompt_files import Question
from recurrent_drafting.verifier import Verifier

_WARM_UP_TOKENS = 8
# Timed forwards per tree size; each beam shape has a curve of its own.
_TIMINGS = 3


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep tries; each field has the name of its flag.

    An axis has the values of its own flag, else the one that the flag of a single run names, else the usual ones.

    Args:
        sweep_widths: beam widths.
        sweep_lengths: beam lengths.
        sweep_nodes: tree nodes, or "auto" for the measured latency curve.
        sweep_temperatures: of the sampling.
        beam_width: fixes the widths.
        beam_length: fixes the lengths.
        max_tree_nodes: fixes the nodes, to "auto" too.
        temperature: fixes the temperatures.
        greedy_search: fixes them to 0.
    """

    sweep_widths: Sequence[int] | None = None
    sweep_lengths: Sequence[int] | None = None
    sweep_nodes: Sequence[int | str] | None = None
    sweep_temperatures: Sequence[float] | None = None
    beam_width: int | None = None
    beam_length: int | None = None
    max_tree_nodes: int | str | None = None
    temperature: float | None = None
    greedy_search: bool = False

    def grid(self) -> SweepGrid:
        """Return the values of every axis.

        Raises:
            UsageError: a value is out of range, or an axis is given twice.
        """
        temperature = 0.0 if self.greedy_search else self.temperature
        axes = {
            "widths": (f"--beam_width {self.beam_width}", self.beam_width),
            "lengths": (f"--beam_length {self.beam_length}", self.beam_length),
            "nodes": (f"--max_tree_nodes {self.max_tree_nodes}", self.max_tree_nodes),
            "temperatures": ("--greedy_search" if self.greedy_search else f"--temperature {temperature}", temperature),
        }
        chosen: dict[str, Any] = {}
        for axis, (flag, value) in axes.items():
            given = getattr(self, f"sweep_{axis}")
            if given and value is not None:
                raise UsageError(f"--sweep_{axis} excludes {flag}: give one")
            if given or value is not None:
                chosen[axis] = tuple(given or [value])
        if "nodes" in chosen:
            chosen["nodes"] = tuple(map(cli.fixed_number, chosen["nodes"]))
        return SweepGrid(**chosen)


@dataclass(frozen=True)
class _Batch:
    """Prompts that are decoded together, and how."""

    prompts: list[list[int]]
    request_ids: list[int]
    sampling: SamplingConfig


@dataclass
class _Tally:
    """What one shape did at one temperature.

    Args:
        stats: its counters.
        speedups: against the baseline, one for each batch.
        pairs: its texts beside the baseline's.
    """

    stats: DecodingStats = field(default_factory=DecodingStats)
    speedups: list[float] = field(default_factory=list)
    pairs: list[lossless.Pair] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Return the median speed-up; NaN before the first reply."""
        return statistics.median(self.speedups) if self.speedups else float("nan")

    def point(self, beam: BeamConfig, temperature: float) -> dict[str, Any]:
        """Return the record of this point of the grid."""
        return {
            "width": beam.width,
            "length": beam.length,
            "max_nodes": beam.max_nodes,
            "temperature": temperature,
            "speedup_median": self.speedup,
            "speedup_min": min(self.speedups, default=float("nan")),
            "speedup_max": max(self.speedups, default=float("nan")),
            "tokens": self.stats.tokens,
            "seconds": self.stats.seconds,
            "tokens_per_second": self.stats.tokens_per_second,
            "tau": self.stats.tau,
            "acceptance_by_depth": self.stats.acceptance_by_depth,
            "mean_tree_nodes": self.stats.mean_nodes,
            "identical": sum(pair.baseline == pair.speculative for pair in self.pairs),
            "compared": len(self.pairs),
        }


class Sweep:
    """Decode first turns with the baseline and every shape of a grid, batch by batch in turn.

    All decoders see a prompt one after the other, so that a machine that slows down meanwhile
    slows all of them.

    Args:
        verifier: the base.
        drafter: a drafter for it.
        tokenizer: the base's.
        settings: of the run; beam, tree and temperature come from the grid.
        grid: what is tried.
        allow_base_mismatch: see ``SpeculativeDecoder``.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter,
        tokenizer: Any,
        settings: RunSettings,
        grid: SweepGrid,
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        self._verifier = verifier
        self._tokenizer = tokenizer
        self._settings = settings
        self._grid = grid
        self._baseline = AutoregressiveDecoder(verifier)
        self._decoders: dict[BeamConfig, SpeculativeDecoder] = {}
        own = settings.beam or drafter.config.beam
        for beam in tqdm(grid.beams(), desc="latency curves", unit="shape"):
            shape = replace(beam, lookup_length=own.lookup_length, recycled_nodes=own.recycled_nodes)
            shaped = replace(settings, beam=shape, auto_tree=beam.max_nodes is None)
            decoder = evaluation.speculative_decoder(
                verifier, drafter, shaped, allow_base_mismatch=allow_base_mismatch, repeats=_TIMINGS
            )
            self._decoders[beam] = decoder
            drafter = decoder.drafter  # in the verifier's dtype: one copy serves all

    def run(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Try the grid on the first turn of each question and return the result record."""
        tallies: dict[tuple[float, BeamConfig], _Tally] = {}
        rates = {}
        total = len(self._grid.temperatures) * len(questions) * (len(self._decoders) + 1)
        with tqdm(total=total, desc="sweep", unit="reply") as bar:
            for temperature in self._grid.temperatures:
                baseline = DecodingStats()
                for beam in self._decoders:
                    tallies[temperature, beam] = _Tally()
                for number, batch in enumerate(self._batches(questions, temperature)):
                    self._try(batch, number, {b: tallies[temperature, b] for b in self._decoders}, baseline)
                    bar.update(len(batch.prompts) * (len(self._decoders) + 1))
                    best = max(tallies[temperature, b].speedup for b in self._decoders)
                    bar.set_postfix(temperature=temperature, best=f"{best:.2f}x")
                rates[str(temperature)] = baseline.tokens_per_second
        return self._record(tallies, rates, len(questions))

    def _batches(self, questions: Sequence[Question], temperature: float) -> Iterator[_Batch]:
        """Yield the prompts batch by batch, after a warm-up of every decoder."""
        settings, size = self._settings, self._settings.batch_size
        sampling = replace(settings.sampling, temperature=temperature)
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            messages = [[{"role": "user", "content": question.turns[0]}] for question in asked]
            prompts = [
                prompt_files.encode_prompt(self._tokenizer, item, settings.max_prompt_length)[0] for item in messages
            ]
            if start == 0:
                for decoder in (self._baseline, *self._decoders.values()):
                    decoder.generate(prompts, max_new_tokens=_WARM_UP_TOKENS, sampling=sampling)
            yield _Batch(prompts, [question.request_id(0) for question in asked], sampling)

    def _try(self, batch: _Batch, number: int, tallies: dict[BeamConfig, _Tally], baseline: DecodingStats) -> None:
        """Run every decoder on a batch; each batch begins with another one."""
        order: list[BeamConfig | None] = [None, *self._decoders]
        first = number % len(order)
        outputs = {beam: self._generate(beam, batch) for beam in order[first:] + order[:first]}
        plain = outputs[None]
        baseline.merge(plain.stats)
        for beam, tally in tallies.items():
            ours = outputs[beam]
            tally.stats.merge(ours.stats)
            if plain.stats.tokens:
                tally.speedups.append(ours.stats.tokens_per_second / plain.stats.tokens_per_second)
            texts = zip(batch.prompts, batch.request_ids, plain.sequences, ours.sequences, strict=True)
            tally.pairs += [lossless.Pair(*text) for text in texts]

    def _generate(self, beam: BeamConfig | None, batch: _Batch) -> GenerationOutput:
        decoder = self._baseline if beam is None else self._decoders[beam]
        return decoder.generate(
            batch.prompts,
            max_new_tokens=self._settings.max_new_tokens,
            sampling=batch.sampling,
            stop=self._settings.stop,
            request_ids=batch.request_ids,
        )

    def _record(
        self, tallies: dict[tuple[float, BeamConfig], _Tally], rates: dict[str, float], prompts: int
    ) -> dict[str, Any]:
        settings = self._settings
        points = [tally.point(beam, temperature) for (temperature, beam), tally in tallies.items()]
        best, gain = recommend(points)
        audit = self._audit(best, tallies)
        sampling = {name: value for name, value in asdict(settings.sampling).items() if name != "temperature"}
        return {
            "sweep": {
                "method": "speculative",
                "base_model": settings.base_model,
                "base_note": assets.ASSETS[settings.base_model].note if settings.base_model in assets.ASSETS else None,
                "speculator_path": settings.speculator_path,
                "dtype": str(self._verifier.dtype).removeprefix("torch."),
                "device": str(self._verifier.device),
                "batch_size": settings.batch_size,
                "prompts": prompts,
                "baseline_tokens_per_second": rates,
                "points": points,
                "recommended": {
                    "width": best.width,
                    "length": best.length,
                    "max_nodes": best.max_nodes,
                    "speedup": gain,
                },
            },
            "machine": result_files.machine(),
            "settings": {
                "max_new_tokens": settings.max_new_tokens,
                "max_prompt_length": settings.max_prompt_length,
                "stop": settings.stop.strings if settings.stop else (),
                "sampling": sampling,
                "grid": asdict(self._grid),
            },
            "lossless": asdict(audit),
        }

    def _audit(self, best: BeamConfig, tallies: dict[tuple[float, BeamConfig], _Tally]) -> LosslessReport:
        """Audit the texts of the recommended shape at every temperature."""
        total = LosslessReport()
        for temperature in self._grid.temperatures:
            settings = lossless.Settings(
                sampling=replace(self._settings.sampling, temperature=temperature),
                max_new_tokens=self._settings.max_new_tokens,
                eos_token_ids=self._verifier.eos_token_ids,
                stop=self._settings.stop,
            )
            total.merge(lossless.audit(self._decoders[best], tallies[temperature, best].pairs, settings))
        return total


def recommend(points: Sequence[dict[str, Any]]) -> tuple[BeamConfig, float]:
    """Return the shape with the highest speed-up over all temperatures, and that speed-up.

    Args:
        points: of the grid; the geometric mean of a shape's median speed-ups counts.
    """
    gains: dict[BeamConfig, list[float]] = {}
    for point in points:
        beam = BeamConfig(point["width"], point["length"], point["max_nodes"])
        gains.setdefault(beam, []).append(point["speedup_median"])
    means = {beam: math.exp(statistics.fmean(map(math.log, values))) for beam, values in gains.items()}
    best = max(means, key=lambda beam: means[beam])
    return best, means[best]


def format_table(record: dict[str, Any]) -> str:
    """Return the points, fastest first for each temperature, and the recommendation."""
    sweep = record["sweep"]
    lines = ["Sweep", "  temperature  width  length  nodes  speed-up  (min-max)    tok/s    tau  tree nodes  identical"]
    for point in sorted(sweep["points"], key=lambda item: (item["temperature"], -item["speedup_median"])):
        spread = f"({point['speedup_min']:.2f}-{point['speedup_max']:.2f})"
        lines.append(
            f"  {point['temperature']:11g}  {point['width']:5d}  {point['length']:6d}  "
            f"{point['max_nodes'] or 'auto':>5}  {point['speedup_median']:8.2f}  {spread:>11}  "
            f"{point['tokens_per_second']:5.1f}  {point['tau']:5.3f}  {point['mean_tree_nodes']:10.1f}  "
            f"{point['identical']:4d}/{point['compared']}"
        )
    for temperature, rate in sweep["baseline_tokens_per_second"].items():
        lines.append(f"  baseline at temperature {temperature}: {rate:.1f} tok/s")
    best = sweep["recommended"]
    lines.append(
        f"recommended: --beam_width {best['width']} --beam_length {best['length']} --max_tree_nodes "
        f"{best['max_nodes'] or 'auto'} ({best['speedup']:.2f} times the baseline over all temperatures)"
    )
    return "\n".join(lines)


def drafter_directory(name: str) -> Path:
    """Return the directory of a drafter whose defaults are to be changed.

    Args:
        name: the drafter, as the user named it.

    Raises:
        UsageError: it is no local directory.
    """
    path = cli.user_path(name)
    if not path.is_dir():
        raise UsageError(f"--save_recommended writes into the drafter: expected a local directory, got {path}")
    return path


def save_recommended(record: dict[str, Any], directory: Path) -> None:
    """Make the recommended beam width and length the drafter's defaults.

    The tree size is not saved: it is a matter of the machine.

    Args:
        record: of a sweep.
        directory: the drafter's.

    Raises:
        ModelError: the drafter does not load.
        ResourceError: the disk is full; what was there stays.
    """
    best, drafter = record["sweep"]["recommended"], checkpoint.load_drafter(str(directory))
    drafter.config.beam_width, drafter.config.beam_length = best["width"], best["length"]
    sealed = (directory / manifest.MANIFEST).exists()
    fingerprints = manifest.read(directory)["fingerprints"] if sealed else {}
    own = checkpoint.config_fingerprints(drafter.config)
    others = {name: value for name, value in fingerprints.items() if name not in own}
    checkpoint.save_drafter(drafter, directory, others)
