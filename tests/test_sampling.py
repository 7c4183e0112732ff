"""The pipeline against transformers' own processors, the noise against its distribution, the pick."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from recurrent_drafting import SamplingConfig, sampling
from recurrent_drafting.errors import NumericsError
from recurrent_drafting.sampling import GumbelNoise, Sampler

CPU = torch.device("cpu")
V = 50
EOS = [2, 3]
PROMPTS = [[5, 6, 7, 7], [9, 8, 5, 6], [1, 1, 20, 30]]
REPLIES = [[5, 6, 11], [2, 9, 9], [30, 20, 9]]
BAD_WORDS = ((4,), (11, 12), (9, 9, 13), (6, 11, 14), (7, 7, 5, 6, 11, 15), (8, 16), (20, 9, 9))
Step = Callable[[Tensor, Tensor], Tensor]


def make_sampler(config: SamplingConfig, replies: Sequence[Sequence[int]] = REPLIES) -> Sampler:
    sampler = Sampler(config, PROMPTS, range(len(PROMPTS)), EOS, V, CPU)
    for row, reply in enumerate(replies):
        for token in reply:
            sampler.commit(row, token)
    return sampler


def random_logits(seed: int, rows: int = 3, vocab: int = V, ties: bool = False) -> Tensor:
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).round() / 2 if ties else logits


def presence_and_frequency(presence: float, frequency: float) -> Step:
    """Return the OpenAI API's definition: logit[j] - count[j] * frequency - (count[j] > 0) * presence."""

    def apply(_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, reply in enumerate(REPLIES):
            for token in set(reply):
                scores[row, token] -= reply.count(token) * frequency + presence
        return scores

    return apply


# setting of ours -> the processor of transformers, and the value that is not tested elsewhere
REFERENCES: dict[str, Step] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor(1.3),
    "presence_penalty": presence_and_frequency(1.5, 0.0),
    "frequency_penalty": presence_and_frequency(0.0, 0.8),
    "bad_words_ids": NoBadWordsLogitsProcessor([list(word) for word in BAD_WORDS]),
    "min_new_tokens": MinNewTokensLengthLogitsProcessor(4, 4, EOS),
    "temperature": TemperatureLogitsWarper(1.7),
    "top_k": TopKLogitsWarper(15),
    "top_p": TopPLogitsWarper(0.8),
    "min_p": MinPLogitsWarper(0.1),
}
VALUES: dict[str, object] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 1.5,
    "frequency_penalty": 0.8,
    "bad_words_ids": BAD_WORDS,
    "min_new_tokens": 4,
    "temperature": 1.7,
    "top_k": 15,
    "top_p": 0.8,
    "min_p": 0.1,
}


def reference(names: Sequence[str], logits: Tensor) -> Tensor:
    """Run transformers' processors in the given order."""
    ids = torch.tensor([prompt + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)])
    return LogitsProcessorList([REFERENCES[name] for name in names])(ids, logits.clone())


def config_of(*names: str) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, **{name: VALUES[name] for name in names}})  # type: ignore[arg-type]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_each_setting_equals_the_processor_of_transformers(name: str, ties: bool) -> None:
    """Top-p with ties has a rule of its own, tested below: transformers leaves their order open."""
    changed = 0
    for seed in range(20):
        logits = random_logits(seed, ties=ties and name != "top_p")
        got = make_sampler(config_of(name)).process(logits, range(3))
        torch.testing.assert_close(got, reference([name], logits), rtol=0, atol=1e-6)
        changed += not torch.equal(got, logits)
    assert changed == 20


ORDER = list(REFERENCES)


def test_whole_pipeline_equals_the_processors_in_the_documented_order() -> None:
    for seed in range(50):
        logits = random_logits(seed)
        got = make_sampler(config_of(*ORDER)).process(logits, range(3))
        torch.testing.assert_close(got, reference(ORDER, logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("repetition_penalty", "presence_penalty"),
        ("presence_penalty", "temperature"),
        ("bad_words_ids", "top_k"),
        ("min_new_tokens", "top_p"),
        ("temperature", "top_p"),
        ("top_k", "top_p"),
        ("top_p", "min_p"),
    ],
)
def test_any_other_order_would_have_been_noticed(first: str, second: str) -> None:
    swapped = [{first: second, second: first}.get(name, name) for name in ORDER]
    differs = 0
    for seed in range(50):
        logits = random_logits(seed)
        got = make_sampler(config_of(*ORDER)).process(logits, range(3))
        differs += not torch.allclose(got, reference(swapped, logits), rtol=0, atol=1e-5)
    assert differs >= 1


def test_greedy_runs_penalties_and_bars_but_no_warpers() -> None:
    names = ORDER[:5]
    config = SamplingConfig(top_k=2, top_p=0.1, min_p=0.9, **{name: VALUES[name] for name in names})  # type: ignore[arg-type]
    logits = random_logits(0)
    torch.testing.assert_close(make_sampler(config).process(logits, range(3)), reference(names, logits))


def test_penalties_of_the_reply_ignore_the_prompt() -> None:
    sampler = make_sampler(SamplingConfig(presence_penalty=1.0, frequency_penalty=0.5), replies=[[5, 5], [], [20]])
    penalties = -sampler.process(torch.zeros(3, V), range(3))
    assert penalties.count_nonzero(dim=1).tolist() == [1, 0, 1]
    assert (penalties[0, 5], penalties[2, 20]) == (2.0, 1.5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 60])
def test_top_k_keeps_ties_with_the_last_one_kept(top_k: int) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0]])
    threshold = sorted(logits[0].tolist(), reverse=True)[min(top_k, 6) - 1]
    kept = sampling.keep_top_k(logits, top_k)[0] > -torch.inf
    assert kept.tolist() == [value >= threshold for value in logits[0].tolist()]


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.3, 0.5, 0.65, 0.8, 0.95, 0.99999, 1.0])
def test_top_p_takes_equally_likely_tokens_by_rising_id(top_p: float) -> None:
    logits = torch.tensor([[0.3, 0.1, 0.3, 0.05, 0.1, 0.1, 0.05]]).log()
    kept, mass = set(), 0.0
    for token in sorted(range(7), key=lambda token: (-float(logits[0, token]), token)):
        if mass < top_p - 1e-6:
            kept.add(token)
        mass += math.exp(float(logits[0, token]))
    got = sampling.keep_top_p(logits, top_p)[0] > -torch.inf
    assert set(got.nonzero().flatten().tolist()) == (kept or {0})


def test_top_p_of_many_equally_likely_tokens_is_a_prefix_of_the_ids() -> None:
    kept = sampling.keep_top_p(torch.zeros(1, 200), 0.5025)[0] > -torch.inf  # 101 tokens of mass 0.005
    assert kept.nonzero().flatten().tolist() == list(range(101))


@pytest.mark.parametrize("word", [(5,), (7, 7, 5), (1, 7), (5, 6, 7, 7, 5)])
def test_bad_word_is_never_completed_across_the_prompt_and_the_reply(word: tuple[int, ...]) -> None:
    """Try every split of the word into text and last token; a shorter text never matches."""
    config = SamplingConfig(bad_words_ids=(word,))
    for cut in range(len(word)):
        sampler = Sampler(config, [list(word[:cut]) or [40]], [0], EOS, V, CPU)
        for token in word[cut:-1]:
            sampler.commit(0, token)
        barred = sampler.process(torch.zeros(1, V), [0])[0] == -torch.inf
        assert barred.nonzero().flatten().tolist() == [word[-1]]
    short = Sampler(config, [list(word[1:-1]) or [40]], [0], EOS, V, CPU)
    assert bool((short.process(torch.zeros(1, V), [0]) == -torch.inf).any()) is (len(word) == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float32_or_float64(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for config in (SamplingConfig(), config_of(*ORDER)):
        assert make_sampler(config).process(random_logits(0).to(dtype), range(3)).dtype == wanted


def test_process_leaves_its_input_alone() -> None:
    logits = random_logits(0)
    make_sampler(config_of(*ORDER)).process(logits, range(3))
    assert torch.equal(logits, random_logits(0))


# --- noise ---

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: int) -> int:
    """Run splitmix64's finaliser on Python's integers."""
    value = (value ^ value >> 30) * MIX_1 & MASK
    value = (value ^ value >> 27) * MIX_2 & MASK
    return value ^ value >> 31


def unmix(value: int) -> int:
    """Undo ``mix``."""
    for shift, factor in ((31, MIX_2), (27, MIX_1), (30, 1)):
        undone = value
        for _ in range(64 // shift):
            undone = value ^ undone >> shift
        value = undone * pow(factor, -1, 1 << 64) & MASK
    return value


def absorb(key: int, part: int) -> int:
    return mix(mix(key + GOLDEN & MASK) + part & MASK)


def request_key(seed: int, request: int) -> int:
    return absorb(absorb(0, seed), request)


def bits_of(seed: int, request: int, position: int, token: int) -> int:
    return mix(absorb(request_key(seed, request), position) + (token + 1) * GOLDEN & MASK)


def position_with(bits: int, seed: int, request: int, token: int) -> int:
    """Return the position whose 64 random bits of a token are the given ones."""
    key = unmix(bits) - (token + 1) * GOLDEN & MASK
    return unmix(key) - mix(request_key(seed, request) + GOLDEN & MASK) & MASK


def gumbel(bits: int) -> float:
    """Return the noise of the upper 53 of 64 bits, read as the middle of their cell of (0, 1)."""
    share = ((bits >> 11) + 0.5) / 2**53
    return -math.log(-math.log(share))


def test_the_mix_is_splitmix64() -> None:
    """The first outputs of the published generator from seed 1234567 (Rosetta Code's check)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix(1234567 + k * GOLDEN & MASK) for k in (1, 2, 3, 4)] == published
    assert all(unmix(mix(value)) == value for value in (*published, 0, 1, MASK))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 + 5])
@pytest.mark.parametrize(("request_id", "position"), [(0, 0), (81, 1500), (-3, 7), (2**40, 2**33)])
def test_tensor_arithmetic_equals_pythons_integers(seed: int, request_id: int, position: int) -> None:
    got = GumbelNoise(seed, 200, CPU).row(request_id, position)
    expected = [gumbel(bits_of(seed, request_id, position, token)) for token in range(200)]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("token", [0, 17])
@pytest.mark.parametrize("top_bits", [0, 1, 2**52, 2**53 - 3, 2**53 - 2, 2**53 - 1])
def test_tails_are_bounded_and_53_bits_wide(top_bits: int, token: int) -> None:
    """The cells nearest 0 and 1 have their middles 2^-54 from the ends: G in [-3.63, 37.43]."""
    position = position_with(top_bits << 11, 3, 9, token)
    assert bits_of(3, 9, position, token) >> 11 == top_bits
    got = float(GumbelNoise(3, 20, CPU).row(9, position)[token])
    near_one = (2**53 - top_bits - 0.5) / 2**53
    exact = -math.log(near_one) if near_one < 1e-9 else gumbel(top_bits << 11)
    assert math.isfinite(got)
    assert got == pytest.approx(exact, abs=0.7 if near_one < 1e-9 else 1e-12)  # float64 is coarse next to 1


def test_noise_is_reproducible_and_independent_of_who_asks() -> None:
    requests, positions = [4, 0, 4, 7], [10, 10, 11, 3]
    together = GumbelNoise(5, V, CPU).rows(requests, positions)
    noise = GumbelNoise(5, V, CPU)
    for index in (2, 0, 3, 1):
        alone = noise.rows([requests[index]], [positions[index]])[0]
        assert torch.equal(alone, together[index])
        assert torch.equal(alone, noise.row(requests[index], positions[index]))


def test_noise_differs_between_seeds_requests_and_positions() -> None:
    grid = [0, 1, 2, 3, -1, 80, 2**31, 2**40]
    keys = list(itertools.product(grid, grid, grid))
    firsts = {float(GumbelNoise(seed, 1, CPU).row(request, position)[0]) for seed, request, position in keys}
    assert len(firsts) == len(keys) == 512


SAMPLES = 1 << 15
AXES: dict[str, Callable[[], Tensor]] = {
    "token": lambda: GumbelNoise(0, SAMPLES, CPU).row(0, 0),
    "position": lambda: torch.stack([GumbelNoise(0, 4, CPU).row(0, t)[3] for t in range(SAMPLES // 4)]),
    "request": lambda: torch.stack([GumbelNoise(0, 4, CPU).row(r, 0)[3] for r in range(SAMPLES // 4)]),
    "seed": lambda: torch.stack([GumbelNoise(s, 4, CPU).row(0, 0)[3] for s in range(SAMPLES // 4)]),
}


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_gumbel_along_every_axis(axis: str) -> None:
    """Kolmogorov-Smirnov at p = 0.001: D < 1.95 / sqrt(n); neighbours are uncorrelated.

    Power: a distribution function that is off by 3.9 / sqrt(n) anywhere (0.022 of probability with
    n = 32,768, 0.043 with 8,192) is rejected with a chance above 0.999.
    """
    noise = AXES[axis]()
    count = len(noise)
    uniform = (-(-noise).exp()).exp()
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    ordered = uniform.sort().values
    distance = max(float((grid[1:] - ordered).max()), float((ordered - grid[:-1]).max()))
    assert distance < 1.95 / math.sqrt(count)
    centred = uniform - 0.5
    assert abs(float((centred[1:] * centred[:-1]).mean() * 12)) < 4 / math.sqrt(count)
    assert uniform.unique().numel() == count  # 32-bit noise would have 2^30 / 2^33 = 0.12 collisions, 24-bit 32


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("top_k", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_picks_follow_the_softmax(top_k: int) -> None:
    """Chi-square over 8 tokens, 7 degrees of freedom: 29.9 is exceeded once in 10,000 seeds.

    Power: the same counts refute the distribution at a temperature 10 % off.
    """
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    requests, steps = 500, 40
    config = SamplingConfig(temperature=0.8, top_k=top_k, seed=11)
    sampler = Sampler(config, [[1]] * requests, range(requests), [], 8, CPU)
    counts = torch.zeros(8)
    for _ in range(steps):
        picks = sampler.pick(logits.expand(requests, -1), range(requests))
        counts += picks.bincount(minlength=8)
        for row, token in enumerate(picks.tolist()):
            sampler.commit(row, token)
    kept = logits.topk(top_k or 8).indices
    assert counts.sum() == counts[kept].sum() == requests * steps
    assert chi_square(counts[kept], (logits[kept] / 0.8).softmax(dim=0)) < 29.9
    assert chi_square(counts[kept], (logits[kept] / 0.88).softmax(dim=0)) > 29.9


# --- pick and memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, V, dtype=dtype)
    logits[0, [7, 3, 40]] = 2.0
    logits[1, [49, 48]] = 1.0
    assert make_sampler(SamplingConfig()).pick(logits, range(3)).tolist() == [3, 48, 0]


def test_pick_adds_the_noise_of_the_next_position() -> None:
    sampler = make_sampler(SamplingConfig(temperature=0.5, seed=6))
    logits = random_logits(1)
    noise = GumbelNoise(6, V, CPU).rows([0, 1, 2], [7, 7, 7])  # four of the prompt, three of the reply
    expected = (logits.double() / 0.5 + noise).argmax(dim=1)
    assert torch.equal(sampler.pick(logits, range(3)), expected)
    assert torch.equal(sampler.pick(logits[[2, 0]], [2, 0]), expected[[2, 0]])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", ["nan", "+inf", "all -inf"])
def test_logits_that_are_not_finite_raise_with_token_row_and_request(
    bad: str, filters: dict[str, float], temperature: float
) -> None:
    config = SamplingConfig(temperature=temperature, **filters)  # type: ignore[arg-type]
    sampler = Sampler(config, PROMPTS, [80, 81, 82], EOS, V, CPU)
    sampler.commit(1, 4)
    logits = random_logits(0)
    logits[1, slice(None) if bad == "all -inf" else 33] = {"nan": math.nan, "+inf": math.inf}.get(bad, -math.inf)
    with pytest.raises(NumericsError, match=r"not finite at new token 1 of row 1 \(request 81\)"):
        sampler.pick(logits, [0, 1, 2])
    assert sampler.pick(logits[[0, 2]], [0, 2]).shape == (2,)


def test_memory_of_the_noise_stays_bounded() -> None:
    sampler = make_sampler(SamplingConfig(temperature=1.0), replies=[[], [], []])
    assert sampler.noise is not None
    for step in range(50):
        assert sampler.upcoming_noise(range(3), 4) is not None
        for row in range(3):
            sampler.pick(random_logits(step)[[row]], [row])
            sampler.commit(row, 1)
        assert sum(map(len, sampler.noise._rows.values())) == 3 * 3  # what the next step will use again, and no more


def test_branches_of_one_text_keep_the_noise_that_another_still_needs() -> None:
    prompts = [[4] * length for length in (3, 5, 8)]
    sampler = Sampler(SamplingConfig(temperature=1.0), prompts, [7, 7, 7], EOS, V, CPU)
    assert sampler.noise is not None
    for step in range(4):
        sampler.pick(random_logits(step), range(3))
        kept = sampler.noise._rows[7]
        assert {3 + step, 5 + step, 8 + step} <= set(kept)
        assert min(kept) == 3 + step
        for row in range(3):
            sampler.commit(row, 1)
    assert sorted(kept) == [7, 8, 9, 10, 11]  # 7 was made for the second branch, and the first is there now


def test_forgetting_a_request_leaves_the_others() -> None:
    noise = GumbelNoise(0, V, CPU)
    before = noise.rows([1, 1, 2], [5, 6, 5])
    noise.forget(1, before=6)
    assert {request: list(kept) for request, kept in noise._rows.items()} == {1: [6], 2: [5]}
    assert torch.equal(noise.rows([1, 1, 2], [5, 6, 5]), before)


def test_upcoming_noise_is_what_the_next_picks_add() -> None:
    sampler = make_sampler(SamplingConfig(temperature=1.0, seed=2))
    ahead = sampler.upcoming_noise([2, 0], 3)
    assert ahead is not None
    assert ahead.shape == (2, 3, V)
    later = sampler.upcoming_noise([2, 0], 2, skip=1)
    assert later is not None
    assert torch.equal(later, ahead[:, 1:])
    for step in range(3):
        picks = sampler.pick(torch.zeros(2, V), [2, 0])
        assert torch.equal(picks, ahead[:, step].argmax(dim=1))
        for row, token in zip([2, 0], picks.tolist(), strict=True):
            sampler.commit(row, token)
    assert make_sampler(SamplingConfig()).upcoming_noise([0], 3) is None


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), config_of("bad_words_ids"), config_of(*ORDER)],
    ids=["greedy", "bad words", "everything"],
)
def test_selected_rows_go_on_as_before(config: SamplingConfig, rows: list[int]) -> None:
    logits = random_logits(3, rows=len(rows))
    whole, part = make_sampler(config), make_sampler(config)
    part.select(rows)
    for step in range(4):
        new = range(len(rows))
        torch.testing.assert_close(part.process(logits, new), whole.process(logits, rows), rtol=0, atol=0)
        picks = part.pick(logits, new)
        assert torch.equal(picks, whole.pick(logits, rows)), step
        for index, row in enumerate(rows):
            part.commit(index, int(picks[index]))
            whole.commit(row, int(picks[index]))
