"""Token recycling against plain Python: what is remembered, what is found, and how it is mixed into the beams."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, SamplingConfig, SpeculativeDecoder, beam_search
from recurrent_drafting.beam_search import Coupling, Hints
from recurrent_drafting.decoding import _Batch
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.recycling import _LAST_STEP, _OLDER, _SAME_PAIR, KEPT, RecycledNodes, most_likely
from recurrent_drafting.sampling import GumbelNoise
from tests.test_beam_search import BATCH, TOLERANCE, World, paths_of
from tests.test_prompt_lookup import make_looping_verifier
from tests.tiny import CONFIGS, make_drafter

V = 12


@dataclass
class Memory:
    """One row's nodes in plain Python, by slot: step, token, predecessor, likeliest next tokens."""

    before: int
    capacity: int
    step: int = 0
    free: int = 0
    slots: dict[int, tuple[int, int, int, dict[int, float]]] = field(default_factory=dict)

    def record(self, tree: DraftTree, row: int, logits: Tensor, last: int) -> None:
        self.step += 1
        count = min(tree.num_nodes, self.capacity)
        start = self.free if self.free + count <= self.capacity else 0  # a tree's nodes lie side by side
        self.free = start + count
        for node in range(count):
            above = int(tree.tokens[row, tree.parents[row, node]]) if node else self.before
            best = logits[row, node].log_softmax(dim=0).sort(descending=True)
            likely = dict(zip(best.indices[:KEPT].tolist(), best.values[:KEPT].exp().tolist(), strict=True))
            token = int(tree.tokens[row, node]) if tree.valid[row, node] else -1
            self.slots[start + node] = (self.step, token, above, likely)
        self.before = int(tree.tokens[row, last])

    def weights(self, token: int, before: int) -> dict[int, float]:
        found = [node for node in self.slots.values() if node[1] == token]
        pairs = [node for node in found if node[2] == before]
        if not found:
            return {}
        # Of a step's nodes with that token any may answer: the tests let them differ by predecessor alone.
        step, _, _, likely = max(pairs or found, key=lambda node: node[0])
        share = _SAME_PAIR if pairs else _LAST_STEP if step == self.step else _OLDER
        return {next_token: share * probability for next_token, probability in likely.items()}

    def mix(self, log_q: dict[int, float], token: int, before: int) -> dict[int, float]:
        weights = self.weights(token, before)
        left = 1 - sum(weights.values())
        mixed = {key: left * math.exp(value) for key, value in log_q.items()}
        for key, weight in weights.items():
            mixed[key] = mixed.get(key, 0.0) + weight
        return {key: math.log(value) for key, value in mixed.items()}


def random_tree(rng: random.Random, vocab: int, width: int = 3) -> DraftTree:
    """Return trees of two depths whose tokens are distinct within a depth, so that no node has a double."""
    tokens = [[rng.sample(range(vocab), width) for _ in range(2)] for _ in range(BATCH)]
    parents = [[[0] * width, [rng.randrange(width) for _ in range(width)]] for _ in range(BATCH)]
    log_probs = [[[-1.0] * width, [rng.choice([-2.0, -math.inf]) for _ in range(width)]] for _ in range(BATCH)]
    kept = Beams(*(torch.tensor(part) for part in (tokens, parents, log_probs)))
    return DraftTree.from_beams(torch.tensor([rng.randrange(vocab) for _ in range(BATCH)]), kept)


def filled(seed: int, capacity: int, steps: int, drafted: Tensor) -> tuple[RecycledNodes, list[Memory]]:
    """Record random trees in both."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    before = [rng.randrange(V) for _ in range(BATCH)]
    ring = RecycledNodes(torch.tensor(before), drafted, V, capacity)
    memories = [Memory(token, capacity) for token in before]
    for _ in range(steps):
        tree = random_tree(rng, V)
        logits = 2 * torch.randn(BATCH, tree.num_nodes, V, generator=generator, dtype=torch.float64)
        last = [rng.randrange(tree.num_nodes) for _ in range(BATCH)]
        ring.record(tree, logits, torch.tensor(last))
        for row, memory in enumerate(memories):
            memory.record(tree, row, logits, last[row])
    return ring, memories


@pytest.mark.parametrize("vocab", [5, 61, 1100, 1300, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_most_likely_tokens_are_those_of_a_sort(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = (10 * torch.randn(2, 3, vocab)).to(dtype)  # as peaked as a trained model's
    count = min(KEPT, vocab)
    tokens, log_probs = most_likely(logits, count)
    assert log_probs.dtype == torch.float32 and tokens.shape == (2, 3, count)
    # Rounding to bfloat16 makes ties; their order is free.
    assert torch.equal(logits.gather(2, tokens), logits.topk(count, dim=2).values)
    assert all(len(set(row)) == count for row in tokens.flatten(0, 1).tolist())
    true = logits.float().log_softmax(dim=2).gather(2, tokens)
    missing = log_probs - true
    assert (missing > -1e-4).all() and (missing < 0.1).all()
    if vocab <= 1024:  # no block is left out
        torch.testing.assert_close(log_probs, true, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_predict_nothing(value: float) -> None:
    logits = torch.full((2, 2000), value)
    logits[1] = torch.arange(2000.0)
    _, log_probs = most_likely(logits, KEPT)
    assert log_probs[0].isneginf().all() and log_probs[1].isfinite().all()


@pytest.mark.parametrize("capacity", [4, 7, 20, 100])
@pytest.mark.parametrize("seed", range(3))
def test_the_latest_node_is_found_one_of_the_same_pair_first(capacity: int, seed: int) -> None:
    drafted = torch.tensor([0, 2, 3, 5, 7, 11])
    for steps in (0, 1, 5):
        ring, memories = filled(seed, capacity, steps, drafted)
        assert ring.before.tolist() == [memory.before for memory in memories]
        pairs = list(itertools.product(range(V), range(V)))
        tokens, before = (torch.tensor(column).expand(BATCH, -1) for column in zip(*pairs, strict=True))
        found = ring.look_up(tokens, before)
        for row, (place, (token, above)) in itertools.product(range(BATCH), enumerate(pairs)):
            weights = found.log_weights[row, place].exp().tolist()
            got = dict(zip(found.tokens[row, place].tolist(), weights, strict=True)) if any(weights) else {}
            assert got == pytest.approx(memories[row].weights(token, above), abs=TOLERANCE)


def test_the_mixture_is_a_distribution() -> None:
    drafted = torch.tensor([0, 2, 3, 5, 7, 11])
    ring, memories = filled(1, 30, 4, drafted)
    torch.manual_seed(0)
    logits, tokens = torch.randn(BATCH, V, 6), torch.arange(V).expand(BATCH, -1)
    before = ring.before.unsqueeze(1).expand(-1, V)
    found = ring.look_up(tokens, before)
    mixed = ring.blend(logits, found)
    torch.testing.assert_close(mixed.logsumexp(dim=2), torch.zeros(BATCH, V), atol=1e-5, rtol=0)
    for row, token in itertools.product(range(BATCH), range(V)):
        choices = [*drafted.tolist(), *found.tokens[row, token].tolist()]
        log_q = dict(zip(drafted.tolist(), logits[row, token].log_softmax(dim=0).tolist(), strict=True))
        got = {
            choice: value
            for choice, value in zip(choices, mixed[row, token].tolist(), strict=True)
            if value > -math.inf
        }
        assert got == pytest.approx(memories[row].mix(log_q, token, int(before[row, token])), abs=TOLERANCE)


def test_rows_that_leave_take_their_nodes_along() -> None:
    ring, memories = filled(2, 30, 3, torch.arange(V))
    ring.select([2, 0])
    tokens = torch.arange(V).expand(2, -1)
    found = ring.look_up(tokens, ring.before.unsqueeze(1).expand(-1, V))
    for place, row in enumerate((2, 0)):
        for token in range(V):
            weights = sum(memories[row].weights(token, memories[row].before).values())
            assert float(found.log_weights[place, token].exp().sum()) == pytest.approx(weights, abs=TOLERANCE)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("drafted", [None, 5])
def test_beams_equal_a_search_over_the_mixture_in_plain_python(coupled: bool, drafted: int | None) -> None:
    world = World(seed=1, draft_vocab_size=drafted)
    ring, memories = filled(3, 40, 5, world.drafter.draft_token_ids)
    noise = torch.stack([GumbelNoise(0, V, torch.device("cpu")).rows([b] * 3, [4, 5, 6]) for b in range(BATCH)])
    coupling = Coupling(
        lambda depth: noise[:, depth, world.drafter.draft_token_ids],
        lambda logits: logits,
        temperature=0.7,
        sharpness=1.3,
        noise_of=lambda depth, ids: noise[:, depth].unsqueeze(1).expand(-1, ids.shape[1], -1).gather(2, ids),
    )
    beam = BeamConfig(width=4, length=3)
    with torch.no_grad():
        hints = Hints(coupling if coupled else None, ring)
        got = beam_search.draft(world.drafter, world.context, world.root, world.embed, beam, hints)
    outside = 0
    for row, memory in enumerate(memories):
        kept: dict[tuple[int, ...], float] = {(): 0.0}
        for depth in range(3):
            grown: dict[tuple[int, ...], float] = {}
            for path, score in kept.items():
                text = [memory.before, int(world.root[row]), *path]
                step = memory.mix(world.step(row, path), text[-1], text[-2])
                scores = torch.tensor(list(step.values()), dtype=torch.float64)
                if coupled:
                    scores = ((1.3 * scores + noise[row, depth, list(step)]) / 0.7).log_softmax(dim=0)
                for token, value in zip(step, scores.tolist(), strict=True):
                    grown[(*path, token)] = score + value
            kept = dict(sorted(grown.items(), key=lambda item: -item[1])[:4])
            outside += sum(path[-1] not in world.proposable for path in kept)
            assert paths_of(got, row, depth) == pytest.approx(kept, abs=TOLERANCE)
    assert (outside > 0) == (drafted is not None)


def test_an_lm_head_may_have_more_rows_than_there_are_tokens() -> None:
    ring = RecycledNodes(torch.tensor([1]), torch.arange(4), 10, 8)
    tree = DraftTree.root_only(torch.tensor([3]))
    ring.record(tree, torch.arange(12.0).view(1, 1, 12), torch.tensor([0]))
    found = ring.look_up(torch.tensor([[3, 5]]), torch.tensor([[1, 1]]))
    assert found.tokens[0, 0].tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert ring.blend(torch.zeros(1, 2, 4), found).logsumexp(dim=2).abs().max() < 1e-5


def test_the_default_dtype_of_the_process_does_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        ring, _ = filled(4, 20, 3, torch.arange(5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert ring.look_up(torch.arange(V).expand(BATCH, -1), torch.zeros(BATCH, V)).log_weights.dtype == torch.float32


@pytest.mark.parametrize("family", CONFIGS)
def test_nodes_are_kept_with_the_token_before_them(family: str) -> None:
    """From one step to the next the ring is told which text it follows: the prompt's end, then the accepted path."""
    verifier = make_looping_verifier(family)
    seen: list[tuple[int, list[int]]] = []

    class Watcher(SpeculativeDecoder):
        def _propose(self, batch: _Batch) -> DraftTree:
            assert batch.recycled is not None
            for place, reply in enumerate(batch.replies):
                seen.append((int(batch.recycled.before[place]), [*prompts[reply.row], *reply.tokens]))
            return super()._propose(batch)

    prompts = [[5, 9], [7, 1, 3], [11]]
    beam = BeamConfig(width=3, length=3, recycled_nodes=64)
    Watcher(verifier, make_drafter(verifier), beam).generate(prompts, max_new_tokens=40)
    assert len(seen) > 20 and all(before == text[-2] for before, text in seen)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_that_comes_back_to_its_tokens_is_drafted_from_them(family: str, temperature: float) -> None:
    """A random drafter of five tokens accepts next to nothing; here the next token is the verifier's to know."""
    verifier = make_looping_verifier(family)
    prompts, sampling = [[5, 9], [7, 1, 3], [11]], SamplingConfig(temperature=temperature / 4, seed=3)
    baseline = AutoregressiveDecoder(verifier).generate(prompts, max_new_tokens=90, sampling=sampling)
    drafter = make_drafter(verifier, draft_vocab_size=5)
    taus = []
    for recycled_nodes in (0, 64):
        beam = BeamConfig(width=3, length=3, recycled_nodes=recycled_nodes)
        output = SpeculativeDecoder(verifier, drafter, beam).generate(prompts, max_new_tokens=90, sampling=sampling)
        assert output.sequences == baseline.sequences
        taus.append(output.stats.tau)
    assert taus[1] > 1.5 * taus[0]
