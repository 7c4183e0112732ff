"""The rows of a training run: given or written by the base, cut, split, and distilled where that is wanted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recurrent_drafting import cli, continuations, data, estimate, regeneration, self_data, sources, token_rows
from recurrent_drafting.continuations import DistilConfig
from recurrent_drafting.errors import DataError, UsageError
from recurrent_drafting.estimate import ExpectedData
from recurrent_drafting.sources import Conversation, ReadReport
from recurrent_drafting.token_rows import EncodedRow, TokenDataset
from recurrent_drafting.trainer import TrainingArguments
from recurrent_drafting.verifier import Verifier

TARGETS = ("ground_truth", "regenerated", "distilled")
_SELF = "self"
_LEAST = {
    "model_max_length": 3,
    "max_train_samples": 1,
    "max_eval_samples": 1,
    "distill_num_future_tokens": 1,
    "distill_max_examples": 1,
}


@dataclass(frozen=True)
class DataSettings:
    """What a run learns from; each field has the name of its flag.

    Args:
        phase: "train" or "eval"; an evaluation needs no distilled training rows.
        seed: key of the noise of sampled continuations.
        dataset_name: see ``sources.load_dataset_by_name``, or "self" for rows that the base writes.
        dataset_split: of a hub data set, None for its usual one.
        model_max_length: tokens; longer rows are cut.
        max_train_samples: rows that are taken, None for all.
        max_eval_samples: rows of them that are held out, at most.
        greedy_share: share of greedy replies among rows that the base wrote, None as they come; see
            ``self_data.self_rows``.
        train_on_assistant_only: supervise replies alone.
        skip_bad_rows: leave malformed rows out and count them instead of stopping.
        yes: let the base write replies, however long that takes.
        targets: one of ``TARGETS``.
        distill_num_future_tokens: tokens of each distilled continuation.
        distill_temperature: 0 is greedy.
        distill_max_examples: training rows that are distilled, None for all; the others are left out.

    Raises:
        UsageError: a value is out of range.
    """

    phase: str
    seed: int
    dataset_name: str = "sharegpt"
    dataset_split: str | None = None
    model_max_length: int = 512
    max_train_samples: int | None = None
    max_eval_samples: int = 64
    greedy_share: float | None = None
    train_on_assistant_only: bool = True
    skip_bad_rows: bool = False
    yes: bool = False
    targets: str = "regenerated"
    distill_num_future_tokens: int = DistilConfig.num_future_tokens
    distill_temperature: float = DistilConfig.temperature
    distill_max_examples: int | None = None

    def __post_init__(self) -> None:
        cli.require_least(self, _LEAST)
        if not 0 <= self.distill_temperature < math.inf:
            raise UsageError(f"--distill_temperature must be >= 0 and finite, got {self.distill_temperature}")
        if self.greedy_share is None:
            return
        if not 0 <= self.greedy_share <= 1:
            raise UsageError(f"--greedy_share must be in [0, 1], got {self.greedy_share}")
        if self.dataset_name != _SELF:
            raise UsageError(
                f"--greedy_share tells greedy from sampled replies of --dataset_name {_SELF}, got --dataset_name "
                f"{self.dataset_name}: leave it out"
            )

    def require_depths(self, depths: int) -> None:
        """Refuse continuations that are shorter than what is predicted.

        Raises:
            UsageError: with both lengths.
        """
        if self.targets == "distilled" and self.distill_num_future_tokens < depths:
            raise UsageError(
                f"--distill_num_future_tokens must be >= --drafter_predict_n_tokens ({depths}), "
                f"got {self.distill_num_future_tokens}"
            )

    def refuse_kl(self, training: TrainingArguments) -> None:
        """Refuse an objective that needs more of distilled targets than they have.

        Raises:
            UsageError: names another objective.
        """
        if self.targets == "distilled" and training.kl_share:
            raise UsageError(
                f"--targets distilled with --objective {training.objective}: KL needs the verifier's distribution "
                "along the text, continuations have tokens alone; use --objective ce or --kd_alpha 0"
            )

    def distil_config(self) -> DistilConfig | None:
        """Return how targets are distilled, None if they are not."""
        if self.targets != "distilled":
            return None
        return DistilConfig(self.distill_num_future_tokens, self.distill_temperature, self.seed)

    def encoding(self) -> dict[str, Any]:
        """Return how conversations become rows: the settings of ``data.encode_all``."""
        return {
            "max_length": self.model_max_length,
            "assistant_only": self.train_on_assistant_only,
            "skip_bad_rows": self.skip_bad_rows,
        }

    def reply_limits(self) -> dict[str, Any]:
        """Return how long the base's replies may be, how many it writes, and what it passes over."""
        return {
            "max_length": self.model_max_length,
            "max_rows": self.max_train_samples,
            "skip_bad_rows": self.skip_bad_rows,
        }


@dataclass(frozen=True)
class TrainingData:
    """The source of a run's rows.

    Args:
        settings: what they are.
        verifier: the base, which checks them and writes what is to be written.
        tokenizer: the base's.
        say: told in a line what was read, written and left out, as it happens.
    """

    settings: DataSettings
    verifier: Verifier
    tokenizer: Any
    say: Callable[[str], None]

    def load(self, directory: Path, batch_size: int) -> tuple[TokenDataset, TokenDataset]:
        """Load the rows or let the base write them; cut, split and distil them.

        Args:
            directory: what the base writes of its own is kept there.
            batch_size: training rows that there must be at least.

        Returns:
            Training rows and evaluation rows.

        Raises:
            DataError: see ``data``; fewer training rows than a batch.
            UsageError: the base would write for hours and nobody asked for that.
        """
        training, evaluation = self._split(self._rows(directory), batch_size)
        config = self.settings.distil_config()
        if config is None:
            return training, evaluation
        if self.settings.phase == "train":
            training = self._distilled(training, config, self.settings.distill_max_examples)
        return training, self._distilled(evaluation, config, None)

    def expect(self) -> ExpectedData:
        """Return what the rows will be, without making them."""
        expected, most = self._expected(), self.settings.distill_max_examples
        if self.settings.targets != "distilled" or most is None:
            return expected
        return replace(expected, count=min(expected.count, most))

    def _rows(self, directory: Path) -> list[EncodedRow]:
        settings = self.settings
        if settings.dataset_name == _SELF:
            self._require_consent(self._expected(), "or --dataset_name with replies of your own")
            return self_data.self_rows(
                self.verifier, self.tokenizer, directory, settings.max_train_samples, settings.greedy_share
            )
        conversations, report = self._conversations()
        self.say(f"data: {report.read} conversations from {settings.dataset_name}, left out {report.skipped or 'none'}")
        if settings.targets == "regenerated":
            return self._regenerated(conversations)
        rows, encoded = data.encode_all(conversations, self.tokenizer, **settings.encoding())
        self.say(f"data: {encoded.read} rows rendered, left out {encoded.skipped or 'none'}")
        return rows

    def _conversations(self) -> tuple[list[Conversation], ReadReport]:
        settings = self.settings
        return sources.load_dataset_by_name(
            settings.dataset_name,
            split=settings.dataset_split,
            max_rows=settings.max_train_samples,
            skip_bad_rows=settings.skip_bad_rows,
        )

    def _regenerated(self, conversations: Sequence[Conversation]) -> list[EncodedRow]:
        """Let the base answer the conversations anew."""
        limits = self.settings.reply_limits()
        expected = estimate.written_replies(conversations, self.tokenizer, **limits)
        self._require_consent(expected, "or --targets ground_truth")
        rows, report = regeneration.regenerate(conversations, self.verifier, self.tokenizer, **limits)
        self.say(f"data: {report.read} replies written, left out {report.skipped or 'none'}")
        return rows

    def _require_consent(self, expected: ExpectedData, instead: str) -> None:
        """Stop before hours of writing, unless they or a number of rows were asked for; say what is written."""
        if self.settings.yes or self.settings.max_train_samples is not None or not expected.replies_written:
            return
        self.say(f"data to be written: {estimate.require_consent(self.verifier, expected, instead)}")

    def _split(self, rows: list[EncodedRow], batch_size: int) -> tuple[TokenDataset, TokenDataset]:
        """Cut the rows and hold some out: training rows and evaluation rows."""
        longest = self.settings.model_max_length
        made = len(rows := rows[: self.settings.max_train_samples])
        rows, cut = token_rows.truncate(rows, longest)
        token_rows.check_token_ids(rows, self.verifier.vocab_size, self.verifier.name_or_path)
        training, evaluation = token_rows.split(rows, self.settings.max_eval_samples)
        if len(training) < batch_size:
            raise DataError(
                f"{len(training)} training rows are fewer than one batch of {batch_size}: "
                "add data or lower --per_device_train_batch_size"
            )
        self.say(
            f"data: {len(training)} training rows ({training.reply_tokens} reply tokens), "
            f"{len(evaluation)} evaluation rows, {cut} cut at {longest} tokens, "
            f"{made - len(rows)} left out without a reply token before that"
        )
        return training, evaluation

    def _distilled(self, rows: TokenDataset, config: DistilConfig, limit: int | None) -> TokenDataset:
        """Give the first ``limit`` rows the base's own continuations at every position; leave the others out."""
        start = time.perf_counter()
        found = TokenDataset(continuations.distil(rows.rows[:limit], self.verifier, config))
        positions = sum(len(row.continuations) for row in found.rows if row.continuations is not None)
        self.say(
            f"distilled targets: {len(found)} rows, {positions} positions of {config.num_future_tokens} tokens, "
            f"{time.perf_counter() - start:.1f} s"
        )
        return found

    def _expected(self) -> ExpectedData:
        settings = self.settings
        if settings.dataset_name == _SELF:
            return estimate.self_written(
                self.verifier, self.tokenizer, settings.max_train_samples, settings.greedy_share
            )
        conversations, _ = self._conversations()
        if settings.targets == "regenerated":
            return estimate.written_replies(conversations, self.tokenizer, **settings.reply_limits())
        return estimate.given_replies(conversations, self.tokenizer, **settings.encoding())
