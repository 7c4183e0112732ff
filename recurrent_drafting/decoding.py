"""The speculative decoder and the autoregressive baseline: one loop, two ways to propose.

A step: propose a tree from the context, verify it in one forward, walk it with the verifier's
picks, keep the accepted rows of the cache. The baseline proposes the root alone.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recurrent_drafting import acceptance, beam_search, memory
from recurrent_drafting.config import BeamConfig, SamplingConfig
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import DataError, ModelError, ResourceError, UsageError
from recurrent_drafting.kv_cache import VerifierCache
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.packed_model import decoding_twin
from recurrent_drafting.prompt_lookup import Copies, RepeatIndex, join
from recurrent_drafting.recycling import RecycledNodes
from recurrent_drafting.sampling import Sampler, warp
from recurrent_drafting.tree_budget import DraftBudget, LatencyCurve, LatencyTable
from recurrent_drafting.verifier import Verifier, VerifierOutput

logger = logging.getLogger(__name__)

# Of many unlikely tokens the noise lifts most the one whose probability the drafter overrates, so its distribution is
# sharpened. Fitted on sampled replies of the packaged base at temperatures 0.4, 0.7 and 1; no prompt of MT-Bench.
_COUPLING_SHARPNESS = 1.3
# Where trees are chosen by cost, paths that the drafter overrates cost the time of following them, so that its error is
# allowed more. Chosen at temperature 1 on prompts that the packaged base wrote, with one machine's costs (ADR 3).
_CAUTION = 1.2

StopFunction = Callable[[Sequence[int]], int | None]


class Streamer(Protocol):
    """What transformers' streamers offer."""

    def put(self, value: Tensor) -> None:
        """Take token ids, int64 ``[n]``; the prompt comes first."""

    def end(self) -> None:
        """Learn that the reply is complete."""


@dataclass(frozen=True)
class Step:
    """One verifier step of one row, after cuts: tokens emitted, and how many of them were drafted."""

    emitted: int
    drafted: int


@dataclass
class GenerationOutput:
    """Result of ``generate``.

    Args:
        sequences: per row the new token ids, EOS included if produced, nothing after it.
        finish_reasons: "eos", "length" or "stop" per row.
        stats: counters of the whole call.
        steps: per row its verifier steps in order; the first token comes from the prefill.
    """

    sequences: list[list[int]]
    finish_reasons: list[str]
    stats: DecodingStats
    steps: list[list[Step]]


class _Reply:
    """A request, and its reply while it grows: ends it exactly and keeps its steps.

    Args:
        row: its row in the output.
        prompt: token ids.
        request_id: key of its noise.
        limit: most new tokens.
        eos_token_ids: tokens that end it.
        stop: see ``generate``.
    """

    def __init__(
        self,
        row: int,
        prompt: list[int],
        request_id: int,
        limit: int,
        eos_token_ids: frozenset[int],
        stop: StopFunction | None,
    ) -> None:
        self.row = row
        self.prompt = prompt
        self.request_id = request_id
        self.limit = limit
        self.tokens: list[int] = []
        self.steps: list[Step] = []
        self.finish_reason = "" if limit else "length"
        self._eos_token_ids = eos_token_ids
        self._stop = stop

    def extend(self, tokens: Sequence[int]) -> int:
        """Append tokens until the reply ends; return how many new ones it keeps (never negative)."""
        before = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            if self._ended():
                break
        return max(len(self.tokens) - before, 0)

    def add_step(self, tokens: Sequence[int]) -> int:
        """Append a verifier step's tokens, the bonus token last; return how many are kept."""
        emitted = self.extend(tokens)
        self.steps.append(Step(emitted=emitted, drafted=min(emitted, len(tokens) - 1)))
        # A stop sequence that began in an earlier step takes tokens from that step too.
        excess = sum(step.emitted for step in self.steps) - max(len(self.tokens) - 1, 0)
        for index in range(len(self.steps) - 2, -1, -1):
            if excess <= 0:
                break
            step = self.steps[index]
            left = max(step.emitted - excess, 0)
            excess -= step.emitted - left
            self.steps[index] = Step(emitted=left, drafted=min(step.drafted, left))
        return emitted

    def _ended(self) -> bool:
        keep = self._stop(self.tokens) if self._stop is not None else None
        if keep is not None:
            del self.tokens[keep:]
            self.finish_reason = "stop"
        elif self.tokens[-1] in self._eos_token_ids:
            self.finish_reason = "eos"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return bool(self.finish_reason)


@dataclass
class _Batch:
    """The live rows of a decode; the places of finished ones are given to others, or they leave.

    Args:
        replies: the reply of each live row.
        sampler: text and noise of each live row.
        cache: the verifier's cache of each live row.
        context: hidden state at the last committed token, ``[B, H]``.
        root: the token chosen after it, int64 ``[B]``, on the host.
        budget: what drafting may cost, None where the tree's size is fixed.
        repeats: the text of each live row for prompt lookup, empty without.
        recycled: the nodes verified last, None without token recycling.
    """

    replies: list[_Reply]
    sampler: Sampler
    cache: VerifierCache
    context: Tensor
    root: Tensor
    budget: DraftBudget | None = None
    repeats: list[RepeatIndex] = field(default_factory=list)
    recycled: RecycledNodes | None = None

    def give_places(self, waiting: deque[_Reply]) -> list[int]:
        """Give the places of ended replies to those that wait; return the rows that are new."""
        ended = [row for row, reply in enumerate(self.replies) if reply.finish_reason]
        rows = ended[: len(waiting)]
        for row in rows:
            self.replies[row] = reply = waiting.popleft()
            self.sampler.replace(row, reply.prompt, reply.request_id, reply.row)
        return rows

    def drop_finished(self) -> None:
        """Let rows leave whose reply has ended, so that no work is done for them; the last rows take their places."""
        live = [row for row, reply in enumerate(self.replies) if not reply.finish_reason]
        if len(live) == len(self.replies):
            return
        # As few rows of the cache move as can be.
        last = [row for row in live if row >= len(live)]
        live = [last.pop() if self.replies[row].finish_reason else row for row in range(len(live))]
        self.replies = [self.replies[row] for row in live]
        self.repeats = [self.repeats[row] for row in live] if self.repeats else []
        if live:
            self.cache.select(live)
            self.sampler.select(live)
            self.context, self.root = self.context[live], self.root[live]
            if self.recycled is not None:
                self.recycled.select(live)


class _Decoder(ABC):
    """The loop that both decoders share."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        # Nodes that a forward had no memory for; later trees stay below.
        self._too_many_nodes: int | None = None

    @abstractmethod
    def _propose(self, batch: _Batch) -> DraftTree:
        """Return the trees to verify next."""

    @property
    @abstractmethod
    def _max_tree_nodes(self) -> int:
        """Return the most nodes a tree can have."""

    @torch.inference_mode()
    def generate(  # noqa: PLR0913 - the public contract of docs/design.md
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | Sequence[int],
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        eos_token_ids: Sequence[int] | None = None,
        stop: StopFunction | None = None,
        request_ids: Sequence[int] | None = None,
        streamer: Streamer | None = None,
        batch_size: int | None = None,
    ) -> GenerationOutput:
        """Continue each prompt.

        Args:
            input_ids: token ids per row as lists, or a left-padded int64 tensor ``[B, T]``.
            attention_mask: true at real tokens, ``[B, T]``; needed with a padded tensor.
            max_new_tokens: limit in tokens, one for all or one per row; the context window limits too.
            sampling: the pipeline's settings; default greedy.
            eos_token_ids: tokens that end a reply; default the verifier's own.
            stop: gets a row's new tokens after each one and returns how many to keep, or None.
            request_ids: key of each row's noise; default the row index.
            streamer: gets the prompt, then tokens as they are decided; one row only.
            batch_size: rows decoded at a time, the next prompt taking the place of one that ends; default all.

        Returns:
            Texts, finish reasons and counters. Texts depend on prompts, settings and request ids
            alone: not on the drafter, the tree or the rest of the batch.

        Raises:
            DataError: an empty prompt, one as long as the context window, or token ids that the verifier has not.
            UsageError: arguments that do not fit together.
            NumericsError: non-finite verifier logits.
            ResourceError: out of memory, and a smaller tree does not help.
        """
        start = time.perf_counter()
        prompts = self._prompts(input_ids, attention_mask)
        _check_arguments(prompts, request_ids, streamer, batch_size)
        limits = self._limits(prompts, max_new_tokens)
        eos = self.verifier.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
        requests = zip(prompts, range(len(prompts)) if request_ids is None else request_ids, limits, strict=True)
        replies = [_Reply(row, *request, frozenset(eos), stop) for row, request in enumerate(requests)]
        stats = DecodingStats(rows=len(prompts))
        _stream(streamer, prompts[0])
        if any(limits):
            self._answer(replies, batch_size or len(prompts), sampling, eos, stats, streamer)
        if streamer is not None:
            streamer.end()
        return _collect(replies, stats, time.perf_counter() - start)

    def _answer(
        self,
        replies: Sequence[_Reply],
        batch_size: int,
        sampling: SamplingConfig,
        eos: Sequence[int],
        stats: DecodingStats,
        streamer: Streamer | None,
    ) -> None:
        """Decode until every reply has ended, so many at a time; where one ends, the next takes its place."""
        # Shortest prompt first: neighbours are then attended together.
        waiting = deque(sorted((r for r in replies if not r.finish_reason), key=lambda reply: len(reply.prompt)))
        # Replies stop at their limit, so a row never commits more than prompt + limit tokens.
        longest = max(len(reply.prompt) + reply.limit for reply in waiting)
        first = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        batch = self._new_batch(first, longest, sampling, eos)
        new = list(range(len(first)))
        while batch.replies:
            if new:
                self._prefill(batch, new, stats)
                _stream(streamer, batch.replies[0].tokens)
            else:
                tokens = self._step(batch, stats)
                _stream(streamer, tokens)
            new = batch.give_places(waiting)
            if not new:
                batch.drop_finished()

    def _new_batch(self, replies: list[_Reply], longest: int, sampling: SamplingConfig, eos: Sequence[int]) -> _Batch:
        """Make room for some rows; ``longest`` is the most tokens that any row will ever commit."""
        verifier, rows = self.verifier, len(replies)
        sampler = Sampler(
            sampling,
            [reply.prompt for reply in replies],
            [reply.request_id for reply in replies],
            eos,
            verifier.vocab_size,
            verifier.device,
            names=[reply.row for reply in replies],
        )
        cache = verifier.new_cache(rows, longest + self._max_tree_nodes)
        context = torch.zeros(rows, verifier.hidden_size, dtype=verifier.dtype, device=verifier.device)
        return _Batch(replies, sampler, cache, context, torch.zeros(rows, dtype=torch.long))

    def _prefill(self, batch: _Batch, rows: Sequence[int], stats: DecodingStats) -> None:
        """Read the prompts of rows that are new, and pick their first tokens."""
        with stats.phase("prefill"):
            output = self.verifier.prefill([batch.replies[row].prompt for row in rows], batch.cache, rows)
            tokens = batch.sampler.pick(output.logits[:, 0], rows).tolist()
            batch.context[rows] = output.hidden[:, 0].to(batch.context)
            batch.root[rows] = torch.tensor(tokens)
            for row, token in zip(rows, tokens, strict=True):
                batch.sampler.commit(row, token)
                batch.replies[row].extend([token])

    def _step(self, batch: _Batch, stats: DecodingStats) -> list[int]:
        """Run one step of every live row; return what the first of them emitted."""
        with stats.phase("draft"):
            tree = self._propose(batch)
        with stats.phase("verify"):
            tree, output = self._verify(tree, batch.cache)
        with stats.phase("sample"):
            accepted = acceptance.walk(tree, output.logits, batch.sampler)
        if batch.budget is not None:
            batch.budget.record(sum(len(path) - 1 for path in accepted.paths))
        for text, tokens in zip(batch.repeats, accepted.tokens, strict=bool(batch.repeats)):
            text.extend(tokens)
        with stats.phase("cache"):
            batch.cache.keep(accepted.paths)
            last = torch.tensor([path[-1] for path in accepted.paths], device=output.hidden.device)
            batch.context = output.hidden[torch.arange(len(last), device=last.device), last]
            batch.root = torch.tensor([tokens[-1] for tokens in accepted.tokens])
        if batch.recycled is not None:
            with stats.phase("draft"):
                batch.recycled.record(tree, output.logits, last)
        stats.forwards += 1
        stats.nodes += tree.num_nodes * len(batch.replies)
        kept = [reply.add_step(tokens) for reply, tokens in zip(batch.replies, accepted.tokens, strict=True)]
        return accepted.tokens[0][: kept[0]]

    def _verify(self, tree: DraftTree, cache: VerifierCache) -> tuple[DraftTree, VerifierOutput]:
        """Verify a tree, or as much of it as there is memory for: the text does not depend on its size."""
        if self._too_many_nodes is not None:
            tree = tree.prune(max(self._too_many_nodes // 2, 1))
        while True:
            try:
                return tree, self.verifier.verify(tree, cache)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_shortage(error):
                    raise
                if tree.num_nodes == 1:
                    raise ResourceError(f"a forward over one token of each row: {memory.describe(error)}") from error
                self._too_many_nodes = tree.num_nodes
                tree = tree.prune(max(tree.num_nodes // 2, 1))
                logger.warning(
                    "no memory to verify %d nodes: trees shrink to %d from here on; the text is the same",
                    self._too_many_nodes,
                    tree.num_nodes,
                )

    def _prompts(self, input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None) -> list[list[int]]:
        """Return the prompts without padding; all their tokens are the verifier's."""
        prompts = _token_lists(input_ids, mask)
        vocab_size = self.verifier.vocab_size
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                if not 0 <= token < vocab_size:
                    raise DataError(
                        f"prompt of row {row}, position {position}: expected a token id of {self.verifier.name_or_path}"
                        f" in 0..{vocab_size - 1}, got {token}; use the tokenizer of this model"
                    )
        return prompts

    def _limits(self, prompts: list[list[int]], max_new_tokens: int | Sequence[int]) -> list[int]:
        """Return how many new tokens fit per row, within the context window."""
        wanted = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
        if len(wanted) != len(prompts):
            expected = f"one number or one for each of {len(prompts)} prompts"
            raise UsageError(f"max_new_tokens must be {expected}, got {len(wanted)}")
        if min(wanted) < 0:
            raise UsageError(f"max_new_tokens must be >= 0, got {min(wanted)}")
        window = self.verifier.context_window
        if window is None:
            return wanted
        for row, prompt in enumerate(prompts):
            if len(prompt) >= window:
                raise DataError(
                    f"prompt of row {row} has {len(prompt)} tokens and the context window of "
                    f"{self.verifier.name_or_path} is {window}: expected at most {window - 1}; shorten the prompt"
                )
        return [min(count, window - len(prompt)) for count, prompt in zip(wanted, prompts, strict=True)]


class AutoregressiveDecoder(_Decoder):
    """The baseline: one token per forward, same verifier, same sampling code.

    Args:
        verifier: the frozen base model.
    """

    @property
    def _max_tree_nodes(self) -> int:
        return 1

    def _propose(self, batch: _Batch) -> DraftTree:
        return DraftTree.root_only(batch.root)


class SpeculativeDecoder(_Decoder):
    """Draft a tree, verify it in one forward, keep what the verifier would have said itself.

    Args:
        verifier: the frozen base model.
        drafter: a drafter that was trained for it.
        beam: shape of the beam search and the tree; default the drafter's own width and length.
        latency: costs by tree size, for one batch size or several; when given, each step drafts as deep and
            verifies as many nodes (at most ``beam.max_nodes``) as maximise expected tokens per second, and
            where drafting does not pay the decoder goes on as the baseline does.
        allow_base_mismatch: accept a drafter that was trained for another base of equal sizes.

    Raises:
        ModelError: the drafter does not fit the verifier.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter,
        beam: BeamConfig | None = None,
        *,
        latency: LatencyCurve | LatencyTable | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        super().__init__(verifier)
        check_fit(verifier, drafter, allow_base_mismatch)
        self.beam = _fit_width(beam or drafter.config.beam, drafter)
        self.latency = latency
        if drafter.dtype != verifier.dtype or drafter.device != verifier.device:
            # A copy: the caller may still be training this one in float32.
            drafter = copy.deepcopy(drafter)
            nn.Module.to(drafter, device=verifier.device, dtype=verifier.dtype)
        drafter.train(False)
        self.drafter = drafter
        self._fast_drafter: Any = drafter
        self._told = False
        self._warned = False

    @property
    def _max_tree_nodes(self) -> int:
        full = self.beam.width * self.beam.length + 1
        return full if self.beam.max_nodes is None else min(full, self.beam.max_nodes)

    def _new_batch(self, replies: list[_Reply], longest: int, sampling: SamplingConfig, eos: Sequence[int]) -> _Batch:
        batch = super()._new_batch(replies, longest, sampling, eos)
        self._fast_drafter = decoding_twin(self.drafter)
        if self.latency is not None:
            table = LatencyTable({1: self.latency}) if isinstance(self.latency, LatencyCurve) else self.latency
            batch.budget = DraftBudget(table, self.beam, self._max_tree_nodes)
        batch.repeats = [RepeatIndex([]) for _ in replies] if self.beam.lookup_length else []
        last = torch.tensor([reply.prompt[-1] for reply in replies], device=batch.context.device)
        capacity = self.beam.recycled_nodes if self._max_tree_nodes > 1 else 0
        batch.recycled = RecycledNodes.of(last, self.drafter, capacity)
        return batch

    def _prefill(self, batch: _Batch, rows: Sequence[int], stats: DecodingStats) -> None:
        super()._prefill(batch, rows, stats)
        for row in rows:
            prompt = batch.replies[row].prompt
            if batch.repeats:
                batch.repeats[row] = RepeatIndex(prompt + batch.replies[row].tokens)
            if batch.recycled is not None:
                batch.recycled.replace(row, prompt[-1])

    def _propose(self, batch: _Batch) -> DraftTree:
        budget = batch.budget
        if self._max_tree_nodes == 1 or (budget is not None and not self._worth_drafting(budget, len(batch.replies))):
            return DraftTree.root_only(batch.root)
        width = self.beam.width if budget is None else budget.width(len(batch.replies))
        beams = beam_search.draft(
            self._fast_drafter,
            batch.context,
            batch.root.to(batch.context.device),
            self.verifier.embed,
            self.beam if width == self.beam.width else replace(self.beam, width=width),
            beam_search.Hints(self._coupling(batch), batch.recycled),
            None if budget is None else budget.worth_going_on,
        ).on_host()
        sound = len(batch.replies) - beams.log_probs[:, 0, 0].tolist().count(-math.inf)
        if sound < len(batch.replies):
            self._warn_of_failed_draft(sound)
            if not sound:
                return DraftTree.root_only(batch.root)
        depths = beams.tokens.shape[1]
        if any(text.repeats for text in batch.repeats):
            beams = join(beams, Copies.of(batch.repeats, self.beam.lookup_length))
        nodes = self._max_tree_nodes if budget is None else budget.choose(beams.log_probs, depths)
        return DraftTree.root_only(batch.root) if nodes == 1 else DraftTree.from_beams(batch.root, beams, nodes)

    def _worth_drafting(self, budget: DraftBudget, rows: int) -> bool:
        wanted = budget.wants_draft(rows)
        if budget.hopeless and not self._told:
            self._told = True
            logger.warning(
                "drafting does not pay here (%d rows at a time): going on without it, as the baseline does; "
                "texts stay the same, --max_tree_nodes N drafts all the same",
                rows,
            )
        return wanted

    def _warn_of_failed_draft(self, sound_rows: int) -> None:
        if not self._warned:
            logger.warning(
                "the drafter's logits are not finite in a step (%d rows are sound): such a step proposes nothing and "
                "the text is the same; try --dtype fp32, or train the drafter again",
                sound_rows,
            )
        self._warned = True

    def _coupling(self, batch: _Batch) -> beam_search.Coupling | None:
        sampling = batch.sampler.config
        if self.beam.coupling == 0 or sampling.greedy:
            return None
        rows = range(len(batch.replies))
        allowance = self.beam.coupling if batch.budget is None else _CAUTION * self.beam.coupling

        def noise_of(depth: int, token_ids: Tensor) -> Tensor:
            found = batch.sampler.upcoming_noise(rows, 1, depth, token_ids)
            assert found is not None
            return found[:, 0]

        return beam_search.Coupling(
            noise=lambda depth: noise_of(depth, self.drafter.draft_token_ids),
            warp=lambda logits: warp(logits, sampling),
            # The request's temperature has stretched the drafter's error with its logits.
            temperature=allowance / sampling.temperature,
            sharpness=_COUPLING_SHARPNESS,
            noise_of=noise_of,
        )


def _fit_width(beam: BeamConfig, drafter: Drafter) -> BeamConfig:
    """Cut a beam width to the draft vocabulary, and say so."""
    most = len(drafter.draft_token_ids)
    if beam.width <= most:
        return beam
    logger.warning("beam width %d is cut to the draft vocabulary of %d tokens", beam.width, most)
    return replace(beam, width=most)


def check_fit(verifier: Verifier, drafter: Drafter, allow_base_mismatch: bool = False) -> None:
    """Compare a drafter's record with a verifier.

    Raises:
        ModelError: sizes differ, or it was trained for another base (which may be overridden).
    """
    config = drafter.config
    for name, expected in (("hidden_size", verifier.hidden_size), ("vocab_size", verifier.vocab_size)):
        if getattr(config, name) != expected:
            raise ModelError(
                f"the drafter does not fit {verifier.name_or_path}: expected {name} {expected}, the drafter "
                f"has {getattr(config, name)}; use the base it was trained for ({config.verifier_name_or_path})"
            )
    known = verifier.fingerprint is not None and config.verifier_fingerprint is not None
    if known and verifier.fingerprint != config.verifier_fingerprint and not allow_base_mismatch:
        raise ModelError(
            f"the drafter was trained for another base: expected {config.verifier_name_or_path} "
            f"({config.verifier_fingerprint}), got {verifier.name_or_path} ({verifier.fingerprint}); "
            "the text stays exact but few drafts will be accepted; --allow_base_mismatch uses it all the same"
        )


def _token_lists(input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None) -> list[list[int]]:
    """Drop the padding: the engine works on real tokens only."""
    if not isinstance(input_ids, Tensor):
        if mask is not None:
            raise UsageError("attention_mask goes with a tensor of input_ids, got it with lists")
        return [list(row) for row in input_ids]
    if input_ids.dim() != 2 or (mask is not None and mask.shape != input_ids.shape):
        shapes = f"{tuple(input_ids.shape)} and {None if mask is None else tuple(mask.shape)}"
        raise UsageError(f"input_ids and attention_mask must both be [B, T], got {shapes}")
    if mask is None:
        return [list(row) for row in input_ids.tolist()]
    return [
        [token for token, real in zip(row, marks, strict=True) if real]
        for row, marks in zip(input_ids.tolist(), mask.tolist(), strict=True)
    ]


def _check_arguments(
    prompts: list[list[int]], request_ids: Sequence[int] | None, streamer: Streamer | None, batch_size: int | None
) -> None:
    if not prompts:
        raise DataError("generate needs at least one prompt, got none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt of row {row} has no tokens: expected at least one; start it with a BOS token")
    if request_ids is not None and len(request_ids) != len(prompts):
        raise UsageError(f"request_ids must name each of the {len(prompts)} prompts, got {len(request_ids)}")
    if streamer is not None and len(prompts) != 1:
        raise UsageError(f"a streamer takes one prompt, got {len(prompts)}")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be >= 1, got {batch_size}")


def _stream(streamer: Streamer | None, tokens: Sequence[int]) -> None:
    if streamer is not None and tokens:
        streamer.put(torch.tensor(list(tokens)))


def _collect(replies: list[_Reply], stats: DecodingStats, seconds: float) -> GenerationOutput:
    for reply in replies:
        for step in reply.steps:
            stats.count_step(step.drafted)
    stats.tokens = sum(len(reply.tokens) for reply in replies)
    # A stop sequence may have taken even the prefill's token back.
    stats.prefill_tokens = sum(min(len(reply.tokens), 1) for reply in replies)
    stats.close(seconds)
    return GenerationOutput(
        sequences=[reply.tokens for reply in replies],
        finish_reasons=[reply.finish_reason for reply in replies],
        stats=stats,
        steps=[reply.steps for reply in replies],
    )
