"""The claim at temperature > 0: drafting leaves the joint distribution of the next tokens as it is.

The vocabulary is so small that every text of the next four tokens has a probability that can be
written down: the plain model's logits after each prefix, and the sampling pipeline spelt out below
in ordinary arithmetic. The speculative decoder then writes many texts under different request ids,
and a G-test compares their counts with those probabilities.

    python -m tests.joint_distribution [--samples N] [--output FILE]

The same test is applied to the rule of Apple's public code (github.com/apple/ml-recurrent-drafter,
``_choose_from_candidates`` and ``_prepare_next_input``), which must be rejected.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import recurrent_drafting
from recurrent_drafting import BeamConfig, DecodingStats, Drafter, SamplingConfig, SpeculativeDecoder, Verifier
from tests.tiny import make_drafter

VOCAB, LENGTH, PROMPT = 4, 4, (1, 3, 0)
WIDTH, DEPTH, BATCH = 2, 2, 256
ALPHA, POWER, MIN_EXPECTED = 1e-6, 0.99, 20.0
BIASED_SAMPLES = 4096

Text = tuple[int, ...]
Joint = dict[Text, float]


@dataclass(frozen=True)
class Setting:
    name: str
    sampling: SamplingConfig
    eos: tuple[int, ...] = ()


SETTINGS = [
    Setting("temperature 1", SamplingConfig(temperature=1.0, seed=1)),
    Setting("temperature 0.7, top-p 0.9", SamplingConfig(temperature=0.7, top_p=0.9, seed=2)),
    Setting("temperature 1.3, top-k 3, min-p 0.1", SamplingConfig(temperature=1.3, top_k=3, min_p=0.1, seed=3)),
    Setting(
        "temperature 1, repetition 1.3, presence 0.6, frequency 0.3",
        SamplingConfig(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.3, seed=4),
    ),
    Setting(
        "temperature 1, EOS after 2 tokens, bad words",
        SamplingConfig(temperature=1.0, min_new_tokens=2, bad_words_ids=((0, 2), (1, 1)), seed=5),
        eos=(3,),
    ),
]


# The exact distribution.


def next_token(logits: Sequence[float], text: Text, setting: Setting) -> list[float]:
    """Return the probabilities of the token after ``PROMPT + text``: the pipeline in plain arithmetic."""
    config = setting.sampling
    scores = list(logits)
    for token in {*PROMPT, *text}:
        penalty = config.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(text):
        scores[token] -= config.presence_penalty + config.frequency_penalty * text.count(token)
    for *start, last in config.bad_words_ids:
        if (PROMPT + text)[len(PROMPT + text) - len(start) :] == tuple(start):
            scores[last] = -math.inf
    for token in setting.eos if len(text) < config.min_new_tokens else ():
        scores[token] = -math.inf
    probabilities = normalised([math.exp(score / config.temperature) for score in scores])
    ranked = sorted(range(VOCAB), key=lambda token: (-probabilities[token], token))
    if config.top_k:
        probabilities = kept(probabilities, ranked[: config.top_k])
    before = [sum(probabilities[other] for other in ranked[:rank]) for rank in range(VOCAB)]
    probabilities = kept(
        probabilities, [token for token, mass in zip(ranked, before, strict=True) if mass < config.top_p]
    )
    floor = config.min_p * max(probabilities)
    return kept(probabilities, [token for token in ranked if probabilities[token] >= floor])


def kept(probabilities: Sequence[float], tokens: Sequence[int]) -> list[float]:
    return normalised([value if token in tokens else 0.0 for token, value in enumerate(probabilities)])


def normalised(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class Tiny:
    """A verifier with all that can be known of it: what it gives after each text."""

    verifier: Verifier
    logits: dict[Text, list[float]]
    context: dict[Text, Tensor]


def make_tiny() -> Tiny:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    verifier = Verifier(AutoModelForCausalLM.from_config(config, dtype=torch.float64), name_or_path="tiny-llama")
    logits, context = {}, {}
    for length in range(LENGTH + DEPTH):
        texts = list(itertools.product(range(VOCAB), repeat=length))
        ids = torch.tensor([PROMPT + text for text in texts])
        with torch.no_grad():
            rows = verifier.model(input_ids=ids, use_cache=False).logits[:, -1].tolist()
        logits.update(zip(texts, rows, strict=True))
        context.update(zip(texts, verifier.hidden_states(ids, torch.ones_like(ids).bool())[:, -1], strict=True))
    return Tiny(verifier, logits, context)


def exact_joint(tiny: Tiny, setting: Setting) -> Joint:
    """Enumerate every text of LENGTH tokens, or fewer up to an EOS, that has a probability above 0."""
    joint, open_texts = {}, {(): 1.0}
    while open_texts:
        text, mass = open_texts.popitem()
        for token, probability in enumerate(next_token(tiny.logits[text], text, setting)):
            longer = (*text, token)
            ended = len(longer) == LENGTH or token in setting.eos
            if probability:
                (joint if ended else open_texts)[longer] = mass * probability
    return joint


# The test and its power.


@dataclass(frozen=True)
class Fit:
    samples: int
    statistic: float
    degrees: int
    p_value: float
    detectable: float  # every deviation of this total variation is found with probability POWER


def goodness_of_fit(counts: Counter[Text], joint: Joint) -> Fit:
    """Compare counts with probabilities: G = 2 sum O ln(O / E), cells pooled to E >= MIN_EXPECTED."""
    samples = counts.total()
    impossible = any(text not in joint for text in counts)
    cells: list[list[float]] = []
    for text, probability in sorted(joint.items(), key=lambda item: item[1]):
        if cells and cells[-1][1] < MIN_EXPECTED:
            cells[-1][0] += counts[text]
            cells[-1][1] += samples * probability
        else:
            cells.append([counts[text], samples * probability])
    statistic = 2 * sum(observed * math.log(observed / expected) for observed, expected in cells if observed)
    degrees = len(cells) - 1
    p_value = 0.0 if impossible else chi_square_tail(statistic, degrees)
    return Fit(samples, statistic, degrees, p_value, detectable_variation(samples, degrees))


def chi_square_tail(value: float, degrees: float) -> float:
    """Return P(X > value) of a chi-square variable."""
    half = torch.tensor([degrees / 2, max(value, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def noncentral_tail(value: float, degrees: float, noncentrality: float) -> float:
    """Return P(X > value) of a non-central chi-square variable: a Poisson mixture of central ones."""
    rate = noncentrality / 2
    terms = torch.arange(int(rate + 12 * math.sqrt(rate) + 40), dtype=torch.float64)
    weights = (terms * math.log(rate) - rate - torch.lgamma(terms + 1)).exp()
    tails = torch.special.gammaincc(degrees / 2 + terms, torch.full_like(terms, value / 2))
    return float((weights * tails).sum())


def detectable_variation(samples: int, degrees: int) -> float:
    """Return the total variation that the test finds with probability POWER, whatever its shape.

    Probabilities p + d have non-centrality n sum d^2 / p, which is at least n (sum |d|)^2
    (Cauchy-Schwarz) = 4 n TV^2. Total variation is meant between the pooled cells.
    """
    critical = bisect(lambda value: chi_square_tail(value, degrees) < ALPHA, 1.0, 1e5)
    needed = bisect(lambda value: noncentral_tail(critical, degrees, value) > POWER, 1e-3, 1e5)
    return math.sqrt(needed / (4 * samples))


def bisect(reached, low: float, high: float) -> float:
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


# What is tested: the decoder with a drafter that knows nothing and one that was trained.


def train_drafter(tiny: Tiny) -> Drafter:
    """Fit a drafter to the verifier's exact distributions; what it learns decides only the speed."""
    drafter = make_drafter(tiny.verifier, seed=1)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH - 1))
    embeddings = tiny.verifier.embed(torch.tensor(texts)).detach()
    for _ in range(150):
        loss = torch.zeros((), dtype=torch.float64)
        for root in range(LENGTH - 1):
            context = torch.stack([tiny.context[text[:root]] for text in texts])
            features = drafter.unroll(context, embeddings[:, root : root + DEPTH])
            for depth in range(features.shape[1]):
                target = torch.tensor([tiny.logits[text[: root + depth + 1]] for text in texts], dtype=torch.float64)
                log_q = drafter.head(features[:, depth]).log_softmax(dim=-1)
                loss = loss - (target.softmax(dim=-1) * log_q).sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter


@dataclass(frozen=True)
class Run:
    setting: Setting
    drafter: str
    coupled: bool


def runs() -> list[Run]:
    """Every setting with both drafters, uncoupled and coupled."""
    return [Run(*parts) for parts in itertools.product(SETTINGS, ("random", "trained"), (False, True))]


def draw(
    tiny: Tiny, drafter: Drafter, run: Run, samples: int, first_request: int = 0
) -> tuple[Counter[Text], DecodingStats]:
    """Let the decoder write ``samples`` texts, each under a request id of its own."""
    beam = BeamConfig(width=WIDTH, length=DEPTH, coupling=float(run.coupled))
    decoder = SpeculativeDecoder(tiny.verifier, drafter, beam)
    counts: Counter[Text] = Counter()
    stats = DecodingStats()
    for start in range(0, samples, BATCH):
        rows = min(BATCH, samples - start)
        output = decoder.generate(
            [PROMPT] * rows,
            max_new_tokens=LENGTH,
            sampling=run.setting.sampling,
            eos_token_ids=run.setting.eos,
            request_ids=range(first_request + start, first_request + start + rows),
        )
        counts.update(map(tuple, output.sequences))
        stats.merge(output.stats)
    return counts, stats


# The rule that must be caught.


@dataclass(frozen=True)
class Candidates:
    """Chains of DEPTH tokens that are proposed together, and the probability that these are."""

    mass: float
    chains: list[Text]


class CoinRule:
    """Accept each drafted token with a coin of probability min(1, p/q), else draw from norm(max(p - q, 0)).

    Right for candidates that are drawn from q. Apple's code applies it to the beams of a beam search:
    independent coins for every beam, the beam with the longest accepted prefix wins. All its
    outcomes are enumerated here, so its joint distribution is exact too.
    """

    def __init__(self, tiny: Tiny, drafter: Drafter, setting: Setting, *, beams: bool) -> None:
        self._tiny, self._drafter, self._setting, self._beams = tiny, drafter, setting, beams

    def joint(self) -> Joint:
        first = next_token(self._tiny.logits[()], (), self._setting)
        joint: Joint = {}
        open_texts = {(token,): mass for token, mass in enumerate(first)}
        while open_texts:
            text = min(open_texts, key=len)
            mass = open_texts.pop(text)
            for emitted, probability in self._step(text):
                longer = (text + emitted)[:LENGTH]
                texts = joint if len(longer) == LENGTH else open_texts
                texts[longer] = texts.get(longer, 0.0) + mass * probability
        return joint

    def _step(self, text: Text) -> Iterator[tuple[Text, float]]:
        q = {drafted: self._q(text, drafted) for n in range(DEPTH) for drafted in words(n)}
        p = {
            drafted: next_token(self._tiny.logits[text + drafted], text + drafted, self._setting)
            for n in range(DEPTH + 1)
            for drafted in words(n)
        }
        for candidates in self._candidates(q):
            lengths = [self._accepted(chain, p, q) for chain in candidates.chains]
            for counts in itertools.product(range(DEPTH + 1), repeat=len(lengths)):
                mass = candidates.mass * math.prod(odds[n] for odds, n in zip(lengths, counts, strict=True))
                if not mass:
                    continue
                count = max(counts)
                prefix = candidates.chains[counts.index(count)][:count]
                bonus = p[prefix]
                if count < DEPTH:
                    bonus = normalised([max(a - b, 0.0) for a, b in zip(p[prefix], q[prefix], strict=True)])
                yield from (((*prefix, token), mass * chance) for token, chance in enumerate(bonus) if chance)

    def _candidates(self, q: dict[Text, list[float]]) -> list[Candidates]:
        scored = [(math.prod(q[chain[:n]][chain[n]] for n in range(DEPTH)), chain) for chain in words(DEPTH)]
        if not self._beams:
            return [Candidates(mass, [chain]) for mass, chain in scored]
        return [Candidates(1.0, [chain for _, chain in sorted(scored, reverse=True)[:WIDTH]])]

    def _accepted(self, chain: Text, p: dict[Text, list[float]], q: dict[Text, list[float]]) -> list[float]:
        """Return the probabilities that 0, 1, .. DEPTH coins in a row come up for a chain."""
        odds = [min(1.0, p[chain[:n]][chain[n]] / q[chain[:n]][chain[n]]) for n in range(DEPTH)]
        return [math.prod(odds[:n]) * (1 - odds[n] if n < DEPTH else 1.0) for n in range(DEPTH + 1)]

    @torch.no_grad()
    def _q(self, text: Text, drafted: Text) -> list[float]:
        context = self._tiny.context[text[:-1]]
        embeddings = self._tiny.verifier.embed(torch.tensor([text[-1], *drafted]))
        features = self._drafter.unroll(context.unsqueeze(0), embeddings.unsqueeze(0))
        return self._drafter.head(features[0, -1]).softmax(dim=-1).tolist()


def words(length: int) -> Iterator[Text]:
    return itertools.product(range(VOCAB), repeat=length)


def total_variation(first: Joint, second: Joint) -> float:
    return sum(abs(first.get(text, 0.0) - second.get(text, 0.0)) for text in {*first, *second}) / 2


def draw_from(joint: Joint, samples: int, seed: int) -> Counter[Text]:
    texts = list(joint)
    weights = torch.tensor([joint[text] for text in texts], dtype=torch.float64)
    picks = torch.multinomial(weights, samples, replacement=True, generator=torch.Generator().manual_seed(seed))
    return Counter(texts[index] for index in picks.tolist())


# The full run.


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test the joint distribution of drafted text against the exact one.")
    parser.add_argument("--samples", type=int, default=1 << 20, help="texts over all settings (default 1,048,576)")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args(argv)
    tiny = make_tiny()
    drafters = {"random": make_drafter(tiny.verifier), "trained": train_drafter(tiny)}
    each = -(-args.samples // len(runs()))
    results: list[dict[str, object]] = []
    failed = 0
    for setting in SETTINGS:
        joint = exact_joint(tiny, setting)
        print(f"{setting.name}: {len(joint)} texts")
        together: Counter[Text] = Counter()
        of_setting: list[dict[str, object]] = []
        for index, run in enumerate(run for run in runs() if run.setting is setting):
            counts, stats = draw(tiny, drafters[run.drafter], run, each, first_request=index * each)
            together += counts
            fit = goodness_of_fit(counts, joint)
            failed += fit.p_value < ALPHA
            facts = {"accepted": stats.acceptance_by_depth, "tau": stats.tau, **asdict(fit)}
            of_setting.append({"drafter": run.drafter, "coupled": run.coupled, **facts})
            name = f"{run.drafter} drafter, {'coupled' if run.coupled else 'uncoupled'}"
            print(f"  {name:27} {described(fit)}; {accepted(stats)}", flush=True)
        fit = goodness_of_fit(together, joint)
        failed += fit.p_value < ALPHA
        print(f"  {'all four':27} {described(fit)}", flush=True)
        results.append(
            {"setting": setting.name, **asdict(setting), "texts": len(joint), "runs": of_setting, "all": asdict(fit)}
        )
    biased, caught = check_biased_rule(tiny, drafters["trained"])
    total = sum(run["samples"] for result in results for run in result["runs"])  # type: ignore[attr-defined]
    print(
        f"{total:,} texts, {failed} rejections at alpha {ALPHA:g}; the biased rule is {'' if caught else 'NOT '}caught"
    )
    if args.output:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "recurrent_drafting": recurrent_drafting.__version__,
        }
        facts = {
            "samples": total,
            "alpha": ALPHA,
            "power": POWER,
            "rejections": failed,
            "settings": results,
            "biased_rule": biased,
            "versions": versions,
        }
        args.output.write_text(json.dumps(facts, indent=1) + "\n")
    return int(failed > 0 or not caught)


def check_biased_rule(tiny: Tiny, drafter: Drafter) -> tuple[dict[str, object], bool]:
    """Apply the G-test to Apple's rule, and to the same coins over candidates that are drawn from q."""
    joint = exact_joint(tiny, SETTINGS[0])
    facts: dict[str, object] = {}
    p_values = {}
    print(f"coins of min(1, p/q) instead of the verifier's own picks, {SETTINGS[0].name}, trained drafter:")
    for name, beams in (("beams (biased)", True), ("drawn from q (exact)", False)):
        wrong = CoinRule(tiny, drafter, SETTINGS[0], beams=beams).joint()
        fit = goodness_of_fit(draw_from(wrong, BIASED_SAMPLES, seed=0), joint)
        p_values[beams] = fit.p_value
        facts[name] = {"total_variation": total_variation(wrong, joint), **asdict(fit)}
        print(f"  {name:27} {described(fit)}; total variation of the rule {total_variation(wrong, joint):.2g}")
    return facts, p_values[True] < ALPHA < p_values[False]


def accepted(stats: DecodingStats) -> str:
    first, second = [*stats.acceptance_by_depth, 0.0, 0.0][:DEPTH]
    return f"accepted at depth 1 {first:.0%}, at 2 {second:.0%}"


def described(fit: Fit) -> str:
    return (
        f"n {fit.samples:9,}  G {fit.statistic:8.1f}  df {fit.degrees:3}  p {fit.p_value:8.2g}  "
        f"finds TV >= {fit.detectable:.4f} with probability {POWER}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
