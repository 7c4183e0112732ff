"""Deliberate faults: each must be found by a wrong result, so that a green suite means something.

A mutant replaces a piece of a module's source that must occur in it exactly once. The changed module
is compiled, and the functions that differ lend their code to the package's own until the check has
run. A check compares with what the unchanged package gave, or with what must hold of any decoder;
an exception is not a wrong result: it counts as "crashed" and fails the run.

    python -m tests.mutants [--only NAME ...] [--cases N]

Left out because they are no faults: anything that changes only which tokens are proposed cannot
change the text (the check "acceptance" finds some of these by what is accepted). Accepting a node
that is marked invalid is lossless too, since its token was verified like any other; so is top-k
before temperature, which does not change the order.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, ModuleType

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, GenerationOutput, SpeculativeDecoder, Verifier
from recurrent_drafting.decoding import Step
from recurrent_drafting.errors import RecurrentDraftingError
from tests import joint_distribution
from tests.families import FAMILIES
from tests.test_identity import Case, build_decoder, left_padded, random_case
from tests.tiny import VOCAB, NoisyOracleDecoder, make_verifier

CASES = 60  # per verifier
CRASHES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Args:
        name: what goes wrong.
        module: module of the package.
        old: source text that occurs in it exactly once.
        new: what stands there instead.
        check: the check that must find it.
    """

    name: str
    module: str
    old: str
    new: str
    check: str = "text"


# The cache.
MUTANTS = [
    Mutant(
        "accepted rows are not moved",
        "kv_cache",
        "storage[:, row, :, start + first : start + len(path)] = storage[:, row, :, source]",
        "pass",
    ),
    Mutant("rows move from one slot too low", "kv_cache", "[start + node for", "[start + node - 1 for"),
    Mutant("rows move from the prompt's slots", "kv_cache", "[start + node for", "[node for"),
    Mutant(
        "rows move from the first request", "kv_cache", "= storage[:, row, :, source]", "= storage[:, 0, :, source]"
    ),
    Mutant(
        "only one layer's rows move",
        "kv_cache",
        "storage[:, row, :, start + first : start + len(path)] = storage[:, row, :, source]",
        "storage[:2, row, :, start + first : start + len(path)] = storage[:2, row, :, source]",
    ),
    Mutant(
        "only the keys move",
        "kv_cache",
        "storage[:, row, :, start + first : start + len(path)] = storage[:, row, :, source]",
        "storage[::2, row, :, start + first : start + len(path)] = storage[::2, row, :, source]",
    ),
    Mutant(
        "the length is one short",
        "kv_cache",
        "self.lengths[row] = start + len(path)",
        "self.lengths[row] = start + len(path) - 1",
    ),
    Mutant(
        "ragged rows are written at the first row's length",
        "kv_cache",
        "if all(length == start",
        "if any(length == start",
    ),
    Mutant(
        "slots of the last step are reused",
        "kv_cache",
        "self.lengths[row] = start + len(path)\n        self._slots = None",
        "self.lengths[row] = start + len(path)",
    ),
    Mutant(
        "select() leaves the cache's order",
        "kv_cache",
        "storage[:, index, :, :length] = storage[:, row, :, :length]",
        "storage[:, index, :, :length] = storage[:, index, :, :length]",
    ),
    Mutant(
        "select() leaves the lengths' order",
        "kv_cache",
        "self.lengths = [self.lengths[row] for row in rows]",
        # The smaller of the right and the wrong one: a row that is too long would crash.
        "self.lengths = [min(self.lengths[row], self.lengths[place]) for place, row in enumerate(rows)]",
    ),
    # The verifier: positions, mask, prefill.
    Mutant(
        "positions are one high",
        "verifier",
        "lengths.unsqueeze(1) + tree.depths.to(self.device)",
        "lengths.unsqueeze(1) + tree.depths.to(self.device) + 1",
    ),
    Mutant(
        "positions count nodes, not depth",
        "verifier",
        "lengths.unsqueeze(1) + tree.depths.to(self.device)",
        "lengths.unsqueeze(1) + torch.arange(tree.num_nodes, device=self.device)",
    ),
    Mutant(
        "positions are those of the longest row",
        "verifier",
        "lengths.unsqueeze(1) + tree.depths.to(self.device)",
        "lengths.max() + tree.depths.to(self.device)",
    ),
    Mutant(
        "the last committed slot is masked",
        "verifier",
        "slots < lengths.view(-1, 1, 1)",
        "slots < lengths.view(-1, 1, 1) - 1",
    ),
    Mutant(
        "the first slot is masked",
        "verifier",
        "(slots < lengths.view(-1, 1, 1))",
        "((slots < lengths.view(-1, 1, 1)) & (slots > 0))",
    ),
    Mutant(
        "slots up to the longest row are visible",
        "verifier",
        "(slots < lengths.view(-1, 1, 1)).repeat(1,",
        "(slots < max_length).repeat(batch,",
    ),
    Mutant(
        "drafted slots are one off in the mask",
        "verifier",
        "allowed.scatter_(2, own.unsqueeze(1)",
        "allowed.scatter_(2, (own - 1).unsqueeze(1)",
    ),
    Mutant(
        "the window counts slots, not positions",
        "verifier",
        "slots.repeat(batch, 1).scatter_(1, own, positions)",
        "slots.repeat(batch, 1)",
    ),
    Mutant(
        "prefill reads the last column, padding or not",
        "verifier",
        "torch.tensor(cache.lengths, device=hidden.device) - 1",
        "torch.tensor(cache.lengths, device=hidden.device) * 0 - 1",
    ),
    Mutant(
        "padding of the prompt is committed",
        "verifier",
        "[range(length) for length in lengths]",
        "[range(width) for _ in lengths]",
    ),
    Mutant(
        "left padding counts as tokens",
        "decoding",
        "[token for token, real in zip(row, marks, strict=True) if real]",
        "[token for token, _ in zip(row, marks, strict=True)]",
    ),
    # The tree.
    Mutant(
        "siblings see each other",
        "draft_tree",
        "return torch.from_numpy(mask)",
        "return torch.from_numpy(mask) | (self.parents.unsqueeze(1) == self.parents.unsqueeze(2))",
    ),
    Mutant(
        "a node does not see itself",
        "draft_tree",
        "ancestor = np.broadcast_to(columns, (batch, nodes))",
        "ancestor = parents",
    ),
    Mutant(
        "nodes do not see the root",
        "draft_tree",
        "return torch.from_numpy(mask)",
        "mask[:, 1:, 0] = False\n        return torch.from_numpy(mask)",
    ),
    Mutant(
        "nodes do not see their grandparent",
        "draft_tree",
        "for _ in range(self.height + 1):",
        "for _ in range(min(self.height, 1) + 1):",
    ),
    Mutant("the mask is transposed", "draft_tree", "torch.from_numpy(mask)", "torch.from_numpy(mask).transpose(1, 2)"),
    Mutant(
        "pruning leaves the depths behind",
        "draft_tree",
        "depths[rows, kept]",
        "depths[:, :max_nodes]",
    ),
    # Acceptance.
    Mutant(
        "any child is accepted",
        "draft_tree",
        "self._children.get((row, node, token), 0)",
        "next((child for key, child in self._children.items() if key[:2] == (row, node)), 0)",
    ),
    Mutant(
        "a cousin is accepted",
        "draft_tree",
        "self._children.get((row, node, token), 0)",
        "next((child for key, child in self._children.items() if key[::2] == (row, token)"
        " and self.depths[row, child] == self.depths[row, node] + 1), 0)",
    ),
    Mutant("every pick reads the root's logits", "acceptance", "logits[rows, nodes]", "logits[rows, 0]"),
    Mutant("picks read another row's logits", "acceptance", "logits[rows, nodes]", "logits[rows.flip(0), nodes]"),
    Mutant(
        "a drafted token is accepted by a coin of min(1, p/q)",
        "acceptance",
        "picks = sampler.pick(logits[rows, nodes], active).tolist()",
        "\n".join(
            [
                "picks = sampler.pick(logits[rows, nodes], active).tolist()",
                "        p = sampler.process(logits[rows, nodes], active).softmax(dim=-1)",
                "        for i, (row, node) in enumerate(zip(active, nodes.tolist(), strict=True)):",
                "            for child in (tree.parents[row] == node).nonzero().flatten().tolist():",
                "                q = (tree.log_probs[row, child] - tree.log_probs[row, node]).exp()",
                "                if child and torch.rand(()) < p[i, tree.tokens[row, child]] / q:",
                "                    picks[i] = int(tree.tokens[row, child])",
                "                    break",
            ]
        ),
        check="distribution",
    ),
    Mutant(
        "the last accepted row is not kept",
        "decoding",
        "batch.cache.keep(accepted.paths)",
        "batch.cache.keep([path[:-1] or path for path in accepted.paths])",
    ),
    Mutant(
        "a path of the same length is kept, whichever",
        "decoding",
        "batch.cache.keep(accepted.paths)",
        "batch.cache.keep([range(len(path)) for path in accepted.paths])",
    ),
    Mutant(
        "the next root is the first pick", "decoding", "torch.tensor([tokens[-1] for", "torch.tensor([tokens[0] for"
    ),
    # What is emitted.
    Mutant(
        "the bonus token is dropped",
        "decoding",
        "[reply.add_step(tokens) for",
        "[reply.add_step(tokens[:-1] or tokens) for",
    ),
    Mutant(
        "the bonus token is emitted twice",
        "decoding",
        "[reply.add_step(tokens) for",
        "[reply.add_step([*tokens, tokens[-1]]) for",
    ),
    Mutant(
        "the first root is emitted twice",
        "decoding",
        "batch.replies[row].extend([token])",
        "batch.replies[row].extend([token, token])",
    ),
    Mutant("EOS is not noticed", "decoding", "elif self.tokens[-1] in self._eos_token_ids:", "elif not self.tokens:"),
    Mutant(
        "EOS and stop are looked for at the end of a block only",
        "decoding",
        "            if self._ended():\n                break\n",
        "        self._ended()\n",
    ),
    Mutant(
        "a block goes on after EOS",
        "decoding",
        "            if self._ended():\n                break\n",
        "            self._ended()\n",
    ),
    Mutant(
        "only the first EOS id counts",
        "decoding",
        "_Reply(row, *request, frozenset(eos), stop)",
        "_Reply(row, *request, frozenset(eos[:1]), stop)",
    ),
    Mutant("stop is not heeded", "decoding", "if keep is not None:", "if keep == len(self.tokens):"),
    Mutant("stop keeps a token too many", "decoding", "del self.tokens[keep:]", "del self.tokens[keep + 1 :]"),
    Mutant("the limit is one high", "decoding", "len(self.tokens) >= self.limit", "len(self.tokens) > self.limit"),
    # Rows that leave.
    Mutant(
        "replies stay in place when rows leave",
        "decoding",
        "self.replies = [self.replies[row] for row in live]",
        "self.replies = self.replies[: len(live)]",
    ),
    Mutant(
        "replies change order when rows leave",
        "decoding",
        "self.replies = [self.replies[row] for row in live]",
        "self.replies = [self.replies[row] for row in reversed(live)]",
    ),
    Mutant("the sampler stays in place when rows leave", "decoding", "self.sampler.select(live)", "pass"),
    Mutant("roots stay in place when rows leave", "decoding", "self.root[live]", "self.root[: len(live)]"),
    Mutant(
        "penalties stay in place when rows leave",
        "sampling",
        "None if self._counts is None else self._counts[index]",
        "self._counts",
    ),
    # Places that are given to other rows.
    Mutant(
        "a place keeps the request of the row before",
        "decoding",
        "self.sampler.replace(row, reply.prompt, reply.request_id, reply.row)",
        "self.sampler.replace(row, reply.prompt, self.sampler._requests[row], reply.row)",
    ),
    Mutant(
        "a place keeps the tokens that its penalties saw",
        "sampling",
        "self._seen[row] = False",
        "self._seen[row, 0] = False",
    ),
    Mutant("a place keeps its counts", "sampling", "self._counts[row] = 0", "pass"),
    Mutant("a place keeps its generated tokens", "sampling", "self._generated[row] = []", "pass"),
    Mutant("a place keeps its root", "decoding", "batch.root[rows] = torch.tensor(tokens)", "batch.root[rows[:0]] = 0"),
    Mutant(
        "a place keeps the cache of the row before",
        "kv_cache",
        "storage[:, row, :, :length] = theirs[:, index, :, :length]",
        "storage[:, row, :, 1:length] = theirs[:, index, :, 1:length]",
    ),
    Mutant(
        "prompts go to each other's places",
        "verifier",
        "cache.adopt([rows[index] for index in group], part)",
        "cache.adopt([rows[index] for index in reversed(group)], part)",
    ),
    # The pipeline.
    Mutant(
        "penalties apply twice",
        "sampling",
        "scores = self._penalise(scores, rows)",
        "scores = self._penalise(self._penalise(scores, rows), rows)",
    ),
    Mutant("the repetition penalty ignores the prompt", "sampling", "self._seen[row, list(prompt)] = True", "pass"),
    Mutant(
        "the repetition penalty ignores signs",
        "sampling",
        "torch.where(scores > 0, scores / penalty, scores * penalty)",
        "scores / penalty",
    ),
    Mutant(
        "the repetition penalty is a token late",
        "sampling",
        "self._seen[row, token] = True",
        "self._seen[row, self._generated[row][-2:][0]] = True",
    ),
    Mutant(
        "presence and frequency count the prompt",
        "sampling",
        "self._counts[row] = 0",
        "self._counts[row] = torch.tensor(prompt).bincount(minlength=len(self._counts[row])).float()",
    ),
    Mutant("frequency is not counted", "sampling", "self._counts[row, token] += 1", "self._counts[row, token] = 1"),
    Mutant(
        "presence counts occurrences",
        "sampling",
        "config.presence_penalty * (counts > 0)",
        "config.presence_penalty * counts",
    ),
    Mutant(
        "penalties do not see the path",
        "acceptance",
        "picks = sampler.pick(logits[rows, nodes], active).tolist()",
        "\n".join(
            [
                "seen, counts = sampler._seen, sampler._counts",
                "        if not any(len(path) > 1 for path in paths):",
                "            old_seen, old_counts = (None if x is None else x.clone() for x in (seen, counts))",
                "        sampler._seen, sampler._counts = old_seen, old_counts",
                "        picks = sampler.pick(logits[rows, nodes], active).tolist()",
                "        sampler._seen, sampler._counts = seen, counts",
            ]
        ),
    ),
    Mutant(
        "a bad word may start in the prompt",
        "sampling",
        "self._prompt_tails[row] + self._generated[row]",
        "self._generated[row]",
    ),
    Mutant("bad words bar their first token", "sampling", "tokens.append(word[-1])", "tokens.append(word[0])"),
    Mutant(
        "the minimum length is one high", "sampling", "< self.config.min_new_tokens", "<= self.config.min_new_tokens"
    ),
    Mutant(
        "the minimum length is one low",
        "sampling",
        "len(self._generated[row]) < self.config",
        "len(self._generated[row]) + 1 < self.config",
    ),
    Mutant(
        "temperature comes after top-p",
        "sampling",
        "return keep_min_p(keep_top_p(logits, config.top_p), config.min_p)",
        "return keep_min_p(keep_top_p(logits * config.temperature, config.top_p) / config.temperature, config.min_p)",
    ),
    Mutant(
        "top-p comes before top-k",
        "sampling",
        "keep_top_k(logits / config.temperature, config.top_k)\n    return keep_min_p(keep_top_p(logits, config.top_p)",
        "keep_top_p(logits / config.temperature, config.top_p)\n    return keep_min_p(keep_top_k(logits, config.top_k)",
    ),
    Mutant("top-k keeps one too many", "sampling", "logits.topk(top_k, dim=-1)", "logits.topk(top_k + 1, dim=-1)"),
    Mutant("top-p keeps one too many", "sampling", "before >= top_p", "before - probabilities >= top_p"),
    Mutant(
        "min-p is a share of the mean",
        "sampling",
        "probabilities.amax(dim=-1, keepdim=True)",
        "probabilities.mean(dim=-1, keepdim=True)",
    ),
    # The noise.
    Mutant(
        "two positions share their noise",
        "sampling",
        "len(self._generated[row]) for row in rows]\n            requests",
        "len(self._generated[row]) // 2 for row in rows]\n            requests",
        check="distribution",
    ),
    Mutant(
        "noise does not know the position",
        "sampling",
        "for part in (self._seed, request, position):",
        "for part in (self._seed, request):",
        check="distribution",
    ),
    Mutant(
        "noise does not know the request",
        "sampling",
        "for part in (self._seed, request, position):",
        "for part in (self._seed, position):",
        check="distribution",
    ),
    Mutant(
        "noise is uniform",
        "sampling",
        "return uniform.log_().neg_().log_().neg_()",
        "return uniform",
        check="distribution",
    ),
    Mutant(
        "noise is logistic",
        "sampling",
        "return uniform.log_().neg_().log_().neg_()",
        "return uniform.logit()",
        check="distribution",
    ),
    Mutant(
        "noise is as strong as the temperature",
        "sampling",
        "scores = scores.double() +",
        "scores = scores.double() + self.config.temperature *",
        check="distribution",
    ),
    Mutant(
        "noise is keyed by the row",
        "sampling",
        "[self._requests[row] for row in rows]\n            scores",
        "list(rows)\n            scores",
        check="batch",
    ),
    Mutant(
        "noise is keyed by the padded position",
        "sampling",
        "            self.replace(row, prompt, key, name)\n",
        "            self.replace(row, prompt, key, name)\n"
        "        self._prompt_lengths = [max(map(len, prompts)) for _ in prompts]\n",
        check="batch",
    ),
    Mutant(
        "noise stands still while tokens are accepted",
        "acceptance",
        "sampler.commit(row, token)",
        "sampler.commit(row, token) if not tree.child(row, paths[row][-1], token) else None",
    ),
    # Counters.
    Mutant(
        "the bonus token counts as drafted",
        "decoding",
        "drafted=min(emitted, len(tokens) - 1)",
        "drafted=emitted",
        check="counters",
    ),
    Mutant(
        "steps are counted once per batch",
        "decoding",
        "for reply in replies:\n        for step",
        "for reply in replies[:1]:\n        for step",
        check="counters",
    ),
    Mutant(
        "tokens that stop took away stay counted",
        "decoding",
        "excess = sum(step.emitted for step in self.steps) - max(len(self.tokens) - 1, 0)",
        "excess = 0",
        check="counters",
    ),
    Mutant(
        "the histogram starts at 1",
        "metrics",
        "self.accepted[accepted] += 1",
        "self.accepted[max(accepted - 1, 0)] += 1",
        check="counters",
    ),
    # The drafter's side: the text stays, fewer drafts are accepted.
    Mutant(
        "the context is the root's",
        "decoding",
        "output.hidden[torch.arange(len(last), device=last.device), last]",
        "output.hidden[:, 0]",
        check="acceptance",
    ),
    Mutant(
        "the context is another row's",
        "decoding",
        "output.hidden[torch.arange(len(last), device=last.device), last]",
        "output.hidden[torch.arange(len(last), device=last.device).flip(0), last]",
        check="acceptance",
    ),
    Mutant(
        "contexts stay in place when rows leave",
        "decoding",
        "self.context[live]",
        "self.context[: len(live)]",
        check="acceptance",
    ),
    Mutant("beams hang on the neighbour's node", "draft_tree", "* width + 1\n", "* width\n", check="acceptance"),
    Mutant(
        "pruning leaves the parents behind",
        "draft_tree",
        "new_index[rows, parents[rows, kept]]",
        "np.minimum(parents[:, :max_nodes], np.arange(max_nodes) - 1).clip(0)",
        check="acceptance",
    ),
    Mutant(
        "coupled drafting looks a position too far",
        "decoding",
        "upcoming_noise(rows, 1, depth, token_ids)",
        "upcoming_noise(rows, 1, depth + 1, token_ids)",
        check="acceptance",
    ),
    Mutant(
        "coupled drafting uses one noise at all depths",
        "beam_search",
        "self.noise(depth)",
        "self.noise(0)",
        check="acceptance",
    ),
    Mutant(
        "the drafter's state takes in the wrong beam",
        "beam_search",
        "state.gather(1, parents.unsqueeze(2)",
        "state.gather(1, parents.flip(1).unsqueeze(2)",
        check="acceptance",
    ),
]


# Applying a mutant.


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Give the package's functions the code of the changed source."""
    module = importlib.import_module(f"recurrent_drafting.{mutant.module}")
    source = inspect.getsource(module)
    if (found := source.count(mutant.old)) != 1:
        raise LookupError(
            f"{mutant.name}: {mutant.module} holds {mutant.old!r} {found} times: bring the mutant up to date"
        )
    twin = ModuleType(module.__name__)
    twin.__file__ = module.__file__
    exec(compile(source.replace(mutant.old, mutant.new), str(module.__file__), "exec"), vars(twin))
    changed = functions(twin)
    kept: list[tuple[FunctionType, CodeType]] = []
    for name, function in functions(module).items():
        if function.__code__ != changed[name].__code__:
            kept.append((function, function.__code__))
            function.__code__ = changed[name].__code__
    try:
        if not kept:
            raise LookupError(f"{mutant.name}: no function of {mutant.module} differs")
        yield
    finally:
        for function, code in kept:
            function.__code__ = code


def functions(module: ModuleType) -> dict[str, FunctionType]:
    """List the functions and methods that a module's source defines, without their decorators."""
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    members = {f"{name}.{key}": value for name, owner in classes.items() for key, value in vars(owner).items()}
    found = {}
    for name, value in {**vars(module), **members}.items():
        plain = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        plain = inspect.unwrap(plain) if callable(plain) else plain
        if isinstance(plain, FunctionType) and plain.__code__.co_filename == module.__dict__.get("__file__", ""):
            found[name] = plain
    return found


# What is decoded, and what must come out.

StopFunction = Callable[[Sequence[int]], int | None]


@dataclass(frozen=True)
class Scenario:
    """A case of the identity suite with penalties, bad words, EOS and stop that its own text runs into.

    Args:
        verifier: the base model.
        index: seed of the drafter.
        case: prompts, sampling, beam.
        eos: token ids.
        stop: cuts a text before a pair of tokens, or None.
        truth: what a good drafter proposes: the text that no EOS and no stop ends.
        expected: output of the unchanged baseline.
    """

    verifier: Verifier
    index: int
    case: Case
    eos: tuple[int, ...]
    stop: StopFunction | None
    truth: list[list[int]]
    expected: GenerationOutput

    def speculate(self) -> tuple[SpeculativeDecoder, GenerationOutput]:
        decoder = build_decoder(self.verifier, self.case, self.index)
        if isinstance(decoder, NoisyOracleDecoder):
            decoder.truth = self.truth
        inputs = left_padded(self.case.prompts) if self.case.as_tensor else (self.case.prompts,)
        settings = options(self.case, self.eos, self.stop)
        return decoder, decoder.generate(*inputs, **settings, batch_size=self.case.batch_size)


def options(case: Case, eos: tuple[int, ...] = (), stop: StopFunction | None = None) -> dict[str, object]:
    return {
        "max_new_tokens": case.max_new_tokens,
        "sampling": case.sampling,
        "request_ids": case.requests,
        "eos_token_ids": eos,
        "stop": stop,
    }


def make_verifiers() -> list[Verifier]:
    """Rotary and learnt positions, a window shorter than a draft, and one whose logits are often tied at 0."""
    tied = make_verifier("llama", seed=1)
    head = tied.model.get_output_embeddings().weight
    head.data[[token for token in range(VOCAB) if token not in (5, 9)]] = 0
    windowed = Verifier(FAMILIES["mistral"].model(windowed=True, sliding_window=3), "tiny-mistral")
    return [make_verifier("llama"), make_verifier("gpt2"), windowed, tied]


def make_scenario(verifier: Verifier, index: int, rng: random.Random) -> Scenario:
    baseline = AutoregressiveDecoder(verifier)
    case = random_case(rng)
    row = rng.randrange(len(case.prompts))

    def write(eos: tuple[int, ...] = (), stop: StopFunction | None = None) -> GenerationOutput:
        return baseline.generate(case.prompts, **options(case, eos, stop))

    def change(**sampling: object) -> Case:
        return replace(case, sampling=replace(case.sampling, **sampling))

    if rng.random() < 0.4:
        # Hot enough that tokens of negative logits are drawn as well.
        temperature = rng.choice([case.sampling.temperature, 5.0])
        penalties = {"repetition_penalty": rng.choice([0.6, 1.6, 3.0]), "presence_penalty": rng.choice([0.0, 1.0])}
        case = change(temperature=temperature, **penalties)
    text = write().sequences[row]
    if len(text) > 4 and rng.random() < 0.4:
        case = change(bad_words_ids=((case.prompts[row][-1], text[0]), (text[2], text[3]), (text[-1],)))
    eos: tuple[int, ...] = ()
    if rng.random() < 0.6:
        # Where the minimum length ends is the place to look at.
        least = rng.choice([0, 4])
        case = change(min_new_tokens=least)
        text = write().sequences[row]
        place = rng.choice([least - 1, least]) if least else rng.randrange(len(text))
        eos = (VOCAB - 1, text[min(place, len(text) - 1)])
    stop = None
    if len(text) > 4 and rng.random() < 0.4:
        place = rng.randrange(len(text) - 1)
        stop = stop_before(text[place : place + 2])
    return Scenario(verifier, index, case, eos, stop, write().sequences, write(eos, stop))


def stop_before(pair: list[int]) -> StopFunction:
    return lambda tokens: len(tokens) - len(pair) if list(tokens[-len(pair) :]) == pair else None


class Suite:
    """The checks, with all expectations computed by the unchanged package beforehand.

    Each check yields one verdict per case, true where the result is right.

    Args:
        cases: scenarios per verifier.
    """

    CHECKS = ("text", "batch", "counters", "distribution", "acceptance")

    def __init__(self, cases: int = CASES) -> None:
        rng = random.Random(0)
        verifiers = make_verifiers()
        self.scenarios = [make_scenario(verifier, index, rng) for index in range(cases) for verifier in verifiers]
        self._tiny = joint_distribution.make_tiny()
        self._drafter = joint_distribution.train_drafter(self._tiny)
        self._runs = [run for run in joint_distribution.runs() if run.drafter == "trained"]
        self._joint = {run: joint_distribution.exact_joint(self._tiny, run.setting) for run in self._runs}
        self._steps = {run: self._accepted(run) for run in self._runs}

    def text(self) -> Iterator[bool]:
        """Compare texts and finish reasons with the unchanged baseline's."""
        for scenario in self.scenarios:
            _, output = scenario.speculate()
            expected = scenario.expected
            yield (output.sequences, output.finish_reasons) == (expected.sequences, expected.finish_reasons)

    def batch(self) -> Iterator[bool]:
        """Compare each request's text in a batch with its text alone."""
        for scenario in self.scenarios:
            case = scenario.case
            _, output = scenario.speculate()
            for row, prompt in enumerate(case.prompts):
                alone = replace(case, prompts=[prompt], requests=[case.requests[row]], oracle=False)
                _, single = replace(scenario, case=alone).speculate()
                yield single.sequences == [output.sequences[row]]

    def counters(self) -> Iterator[bool]:
        """Derive the counters from the texts and from how often rows were verified."""
        for scenario in self.scenarios:
            decoder, output = scenario.speculate()
            stats = output.stats
            lengths = [len(tokens) for tokens in output.sequences]
            after_prefill = [max(length - 1, 0) for length in lengths]
            steps = [step for row in output.steps for step in row]
            # What a stop sequence takes away may reach back into any step.
            whole = [row[:-1] for row, why in zip(output.steps, output.finish_reasons, strict=True) if why != "stop"]
            facts = [
                [sum(step.emitted for step in row) for row in output.steps] == after_prefill,
                all(step.emitted == step.drafted + 1 for row in whole for step in row),
                all(0 <= step.drafted <= step.emitted for step in steps),
                (stats.rows, stats.tokens) == (len(lengths), sum(lengths)),
                sum(stats.accepted) == stats.row_steps == len(steps),
                sum(count * length for length, count in enumerate(stats.accepted)) == sum(s.drafted for s in steps),
                not steps or math.isclose(stats.tau, sum(after_prefill) / len(steps)),
                not isinstance(decoder, NoisyOracleDecoder) or decoder.steps == len(steps),
            ]
            yield all(facts)

    def distribution(self) -> Iterator[bool]:
        """Compare counts of short texts with their exact probabilities."""
        for run in self._runs:
            counts, _ = joint_distribution.draw(self._tiny, self._drafter, run, 1024)
            yield joint_distribution.goodness_of_fit(counts, self._joint[run]).p_value > joint_distribution.ALPHA

    def acceptance(self) -> Iterator[bool]:
        """Compare what a trained drafter gets accepted, step by step, with the unchanged package."""
        for run in self._runs:
            yield self._accepted(run) == self._steps[run]

    def _accepted(self, run: joint_distribution.Run) -> list[list[Step]]:
        beam = BeamConfig(width=2, length=3, max_nodes=5, coupling=float(run.coupled))
        decoder = SpeculativeDecoder(self._tiny.verifier, self._drafter, beam)
        prompts = [joint_distribution.PROMPT[: 1 + row % 3] for row in range(8)]
        sampling, eos = run.setting.sampling, run.setting.eos
        return decoder.generate(prompts, max_new_tokens=20, sampling=sampling, eos_token_ids=eos).steps


# The run.


@dataclass(frozen=True)
class Result:
    """Outcome of a check: "killed", "survived" or "crashed: ...", the cases it took, and seconds."""

    verdict: str
    cases: int
    seconds: float


def run_check(suite: Suite, name: str) -> Result:
    """Run a check until a case comes out wrong."""
    start = time.perf_counter()
    cases, verdict = 0, "survived"
    try:
        for right in getattr(suite, name)():
            cases += 1
            if not right:
                verdict = "killed"
                break
    except (*CRASHES, RecurrentDraftingError) as error:
        verdict = f"crashed: {type(error).__name__}: {error}"
    return Result(verdict, cases, time.perf_counter() - start)


def run_mutant(suite: Suite, mutant: Mutant) -> Result:
    with applied(mutant):
        return run_check(suite, mutant.check)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check that every deliberate fault is found by a wrong result.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutants only")
    parser.add_argument("--cases", type=int, default=CASES, help="scenarios per verifier (default %(default)s)")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only]
    suite = Suite(args.cases)
    sound = True
    print("the unchanged package")
    for name in Suite.CHECKS:
        if not any(mutant.check == name for mutant in chosen):
            continue
        result = run_check(suite, name)
        sound &= result.verdict == "survived"
        verdict = "right" if result.verdict == "survived" else f"WRONG ({result.verdict})"
        print(f"  {name:14} {result.cases:4} cases {verdict} {result.seconds:6.1f} s", flush=True)
    print(f"{'mutant':56} {'where':12} {'found by':13} {'cases':>5} {'seconds':>7}")
    killed = 0
    for mutant in chosen:
        result = run_mutant(suite, mutant)
        killed += result.verdict == "killed"
        found = mutant.check if result.verdict == "killed" else result.verdict
        print(f"{mutant.name:56} {mutant.module:12} {found:13} {result.cases:5} {result.seconds:7.2f}", flush=True)
    print(f"killed {killed} of {len(chosen)}")
    return int(not sound or killed < len(chosen) or not chosen)


if __name__ == "__main__":
    raise SystemExit(main())
