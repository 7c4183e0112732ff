"""DrafterTrainer: the Hugging Face Trainer with the drafter as its model and the verifier beside it.

One step: hidden states of the frozen verifier, the drafter unrolled K depths from every supervised
position, one loss value per position and depth, normalised here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler, Subset
from transformers.integrations.integration_utils import WandbCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from recurrent_drafting import beam_search, distributed, losses, resume, token_rows, tracking
from recurrent_drafting.config import BeamConfig, RecurrentDraftingConfig
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import DataError, NumericsError, UsageError
from recurrent_drafting.metrics import DecodingStats, MeanMetrics
from recurrent_drafting.muon import MuonWithAdamW
from recurrent_drafting.resumable_trainer import ResumableTrainer
from recurrent_drafting.token_rows import TokenDataset
from recurrent_drafting.verifier import Verifier

OBJECTIVES = ("ce", "kl", "expected_length")
AUTO_DRAFT_VOCABULARY = 8192
# Rows whose tokens are counted at a time: a count is as long as the vocabulary.
_COUNTED_ROWS = 1024
Counters = TypeVar("Counters", DecodingStats, MeanMetrics)
# Of the base class's arguments those that decide what the weights become; our own all do, but for the reports.
DECISIVE = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "train_sampling_strategy",
    "dataloader_drop_last", "average_tokens_across_devices",
)  # fmt: skip
# Muon's companion is torch's AdamW, whichever of its implementations.
_WITH_MUON = ("adamw_torch", "adamw_torch_fused")
_REPORTS = ("drafter_top_k", "use_wandb", "wandb_project", "wandb_run_name")


def _flag(default: Any, text: str) -> Any:
    """Return a field whose description ``--help`` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Every Hugging Face training argument, some with another default, and the drafter's own."""

    # The title above them in ``--help``.
    _argument_group_name: ClassVar[str] = "training (every Hugging Face argument, and the drafter's own at the end)"

    learning_rate: float = _flag(5e-4, "peak of the schedule")
    train_sampling_strategy: str = _flag(
        "group_by_length", "order of the rows; padding is computed like text, so rows of a length go together"
    )
    remove_unused_columns: bool = _flag(
        False, "drop columns that forward does not name; the drafter needs some of them"
    )
    logging_nan_inf_filter: bool = _flag(
        False, "leave losses that are not finite out of the log; such a loss ends the run"
    )
    ddp_timeout: int = _flag(60, "seconds after which a rank that hangs is noticed")
    ddp_find_unused_parameters: bool | None = _flag(
        False, "the head's weight is used in the loss, outside the forward that a search would look at"
    )
    drafter_predict_n_tokens: int = _flag(4, "depths K that are trained")
    drafter_num_layers: int = _flag(2, "residual blocks of a drafter that is made new")
    drafter_top_k: int = _flag(5, "accuracies are reported for top-1 and top-k")
    objective: str = _flag(
        "kl",
        "kl (the base's distribution), ce (the text's own tokens) or expected_length (of the chain along the text that "
        "is accepted)",
    )
    expected_length_share: float = _flag(
        1.0,
        "share of the expected length where that is the objective; KL and cross-entropy have the rest; it has no depth "
        "weights",
    )
    kd_alpha: float = _flag(1.0, "share of KL beside cross-entropy, unless the objective is ce")
    kd_temperature: float = _flag(1.0, "divisor of the base's logits in the KL target")
    depth_decay: float = _flag(0.9, "depth k weighs depth_decay^(k-1)")
    muon: bool = _flag(
        False, "Muon steps the matrices of recurrence, projection and blocks, AdamW (--optim) head and biases alone"
    )
    use_wandb: bool = _flag(False, "report to Weights & Biases")
    wandb_project: str | None = _flag(None, "its project (default: WANDB_PROJECT)")
    wandb_run_name: str | None = _flag(None, "name of the run there; the same as run_name")

    def __post_init__(self) -> None:
        self._check()
        trackers = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "simulated_tau"
        if self.use_wandb:
            trackers = [*(name for name in trackers if name not in ("none", "all", "wandb")), "wandb"]
            self.report_to = trackers
        tracking.require_installed(trackers)
        self.run_name = self.wandb_run_name or self.run_name
        if not torch.cuda.is_available():  # where the base goes; the base class would take an Apple GPU
            self.use_cpu = True
        distributed.begin(self)
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _check(self) -> None:
        """Refuse what the base class lets pass until it fails in the middle of a run."""
        self._check_objective()
        for name in ("kd_temperature", "depth_decay", "drafter_predict_n_tokens", "drafter_top_k"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        self._check_muon()
        if not 0 <= self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be >= 0 and finite, got {self.learning_rate}")
        least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        for name, minimum in {**least, "seed": 0}.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} must be >= {minimum}, got {getattr(self, name)}")

    def _check_muon(self) -> None:
        if self.muon and self.optim not in _WITH_MUON:
            raise UsageError(f"muon goes with optim {' or '.join(_WITH_MUON)}, got {self.optim}: drop one of the two")
        if self.muon and self.optim_args:
            raise UsageError(f"muon takes no optim_args, got {self.optim_args!r}: drop one of the two")

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        for name in ("kd_alpha", "expected_length_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def length_share(self) -> float:
        """Return the share of the expected accepted length in the loss."""
        return self.expected_length_share if self.objective == "expected_length" else 0.0

    @property
    def kl_share(self) -> float:
        """Return the share of KL in what the expected length leaves; 0 where it leaves nothing."""
        return 0.0 if self.objective == "ce" or self.length_share == 1 else self.kd_alpha

    def decisive(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the one it goes on from."""
        own = {name for name in TrainingArguments.__annotations__ if name not in _REPORTS}
        values: dict[str, Any] = self.to_dict()  # type: ignore[no-untyped-call]
        return {name: value for name, value in values.items() if name in own or name in DECISIVE}

    def run_record(self, config: RecurrentDraftingConfig, data_fingerprint: str | None) -> dict[str, Any]:
        """Return what a checkpoint's manifest says about a run with these settings; see ``resume.run_record``."""
        return resume.run_record(self.decisive(), self.world_size, config, data_fingerprint)


@dataclass(frozen=True)
class Supervision:
    """The supervised positions of a batch, flattened to P positions of K depths.

    Position t has hidden state h_t and known root x_{t+1}; depth k predicts x_{t+1+k} from them and
    x_{t+2} .. x_{t+k}. It is supervised where root and first target belong to a reply. With distilled
    targets the tokens after the root are those of the position's own continuation.

    Args:
        rows: batch row of each position, int64 ``[P]``.
        positions: t, int64 ``[P]``.
        known: tokens x_{t+1} .. x_{t+K}, int64 ``[P, K]``.
        targets: tokens x_{t+2} .. x_{t+1+K}, int64 ``[P, K]``.
        valid: depths whose target belongs to the reply, bool ``[P, K]``.
        distilled: the tokens after the root are a continuation's, not the text's.
    """

    rows: Tensor
    positions: Tensor
    known: Tensor
    targets: Tensor
    valid: Tensor
    distilled: bool = False

    @classmethod
    def from_batch(cls, input_ids: Tensor, loss_mask: Tensor, depths: int) -> Supervision:
        """Collect the supervised positions of ``input_ids`` and ``loss_mask``, both ``[B, T]``.

        From position 0 the root is 11 and the targets are 12 and 13; the 14 belongs to no reply:

        >>> text, reply = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[False, True, True, True, False]])
        >>> batch = Supervision.from_batch(text, reply, depths=2)
        >>> batch.positions.tolist(), batch.known.tolist(), batch.targets.tolist()
        ([0, 1], [[11, 12], [12, 13]], [[12, 13], [13, 14]])
        >>> batch.valid.tolist()
        [[True, True], [True, False]]
        """
        rows, positions = token_rows.supervised(loss_mask).nonzero(as_tuple=True)
        offsets = positions.unsqueeze(1) + torch.arange(1, depths + 2, device=input_ids.device)
        inside = offsets < input_ids.shape[1]
        offsets = offsets.clamp(max=input_ids.shape[1] - 1)
        window = input_ids[rows.unsqueeze(1), offsets]
        real = loss_mask[rows.unsqueeze(1), offsets] & inside
        # A reply that ends takes the deeper targets with it, even if another turn follows.
        valid = real[:, 1:].cumprod(dim=1).bool()
        return cls(rows, positions, window[:, :-1], window[:, 1:], valid)

    @classmethod
    def from_continuations(
        cls, input_ids: Tensor, loss_mask: Tensor, continuations: Tensor, depths: int
    ) -> Supervision:
        """Collect the same positions with distilled targets, ``continuations`` ``[B, P, n]``.

        Raises:
            UsageError: the continuations are shorter than the depths.
        """
        if continuations.shape[2] < depths:
            raise UsageError(
                f"distilled targets hold {continuations.shape[2]} future tokens and {depths} depths are trained: "
                "raise --distill_num_future_tokens or lower --drafter_predict_n_tokens"
            )
        supervised = token_rows.supervised(loss_mask)
        rows, positions = supervised.nonzero(as_tuple=True)
        places = torch.arange(continuations.shape[1], device=continuations.device)
        targets = continuations[places < supervised.sum(dim=1, keepdim=True)][:, :depths]
        root = input_ids[rows, positions + 1].unsqueeze(1)
        valid = targets >= 0
        targets = targets.clamp(min=0)
        return cls(rows, positions, torch.cat([root, targets[:, :-1]], dim=1), targets, valid, distilled=True)


class LengthGroupedSampler(Sampler[int]):
    """Order rows at random, those of similar length beside each other.

    An epoch's order is a function of seed and epoch alone, so that a resumed run sees the same one.

    Args:
        lengths: tokens of each row.
        batch_size: rows per optimizer step.
        seed: key of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; the data loader calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class DrafterTrainer(ResumableTrainer):
    """Train a drafter against a frozen verifier.

    Args:
        model: the drafter.
        verifier: the frozen base model; unseen by optimizer and checkpoints.
        args: see ``TrainingArguments``.
        **kwargs: as for ``transformers.Trainer``; data sets yield what ``token_rows.Collator`` takes.
    """

    args: TrainingArguments

    def __init__(self, model: Drafter, verifier: Verifier, args: TrainingArguments, **kwargs: Any) -> None:
        self.verifier = verifier
        self.drafter = model
        self._means = MeanMetrics()
        super().__init__(model=model, args=args, **kwargs)
        if self.pop_callback(WandbCallback) is not None:
            self.add_callback(tracking.WandbRun(args.wandb_project))
        # The loss is divided by the step's item count below, accumulation and ranks included.
        self.model_accepts_loss_kwargs = True

    def compute_loss(  # noqa: D102 - the base class documents it
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = self._supervise(inputs)
        result = self._head_loss(model, inputs, batch)
        items = batch.valid.sum() if num_items_in_batch is None else num_items_in_batch
        loss = result.total / items * self._ranks_averaged
        if not torch.isfinite(loss):
            raise NumericsError(
                f"training loss is {loss.item()} at step {self.state.global_step}: expected a finite number; the "
                "optimizer was not stepped; lower --learning_rate or train in float32 (no --bf16/--fp16)"
            )
        self._record(batch, result)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to the Trainer's own figures."""
        if "loss" in logs:
            logs = {**logs, **self._of_all_ranks(self._means).pop_means()}
            self._means = MeanMetrics()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002 - the base class passes it
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure loss, teacher-forced accuracies and simulated tau on the evaluation rows.

        Returns:
            ``eval_loss``, ``eval_top1_depth_k``, ``eval_simulated_tau`` ...
        """
        training_means, self._means = self._means, MeanMetrics()
        stats = DecodingStats()
        self.drafter.train(False)
        with torch.no_grad():
            for rows in self._eval_batches(eval_dataset):
                inputs = self._prepare_inputs(rows)
                hidden = self._hidden_states(inputs)
                with self.compute_loss_context_manager():
                    batch = self._supervise(inputs)
                    result = self._head_loss(self.drafter, inputs, batch, hidden)
                    self._means.add("loss", float(result.total), int(batch.valid.sum()))
                    self._record(batch, result)
                    simulate(self.drafter, self.verifier, inputs, hidden, self.beam(), stats)
        means = self._of_all_ranks(self._means).pop_means()
        stats = self._of_all_ranks(stats)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self._means = training_means
        metrics[f"{metric_key_prefix}_simulated_tau"] = stats.tau
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self, eval_dataset: Any) -> Any:
        """Return this rank's batches; together the ranks see every row once, none twice."""
        ranks = self.args.world_size
        if ranks == 1:
            return self.get_eval_dataloader(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        own = Subset(rows, range(self.args.process_index, len(rows), ranks))
        return DataLoader(own, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def _of_all_ranks(self, counters: Counters) -> Counters:
        """Return the sum of every rank's counters."""
        every = distributed.gather(self.args, counters)
        for item in every[1:]:
            every[0].merge(item)
        return every[0]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, made at the first call: Muon beside AdamW where the arguments ask for it."""
        if self.args.muon and self.optimizer is None:
            self.optimizer = MuonWithAdamW(
                self.drafter if model is None else model,
                self.args.learning_rate,
                self.args.weight_decay,
                (self.args.adam_beta1, self.args.adam_beta2),
                self.args.adam_epsilon,
            )
        return super().create_optimizer(model)

    def run_record(self) -> dict[str, Any]:
        """Return what the manifests of this run's checkpoints say about it."""
        return self.args.run_record(self.drafter.config, self._data_fingerprint)

    @cached_property
    def _data_fingerprint(self) -> str | None:
        """Return the identity of the training rows; it is computed once, not at every checkpoint."""
        rows = self.train_dataset
        return resume.data_fingerprint(rows.rows) if isinstance(rows, TokenDataset) else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Group by length, which the base class can do for data sets of its own kind only."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, TokenDataset):
            return super()._get_train_sampler(train_dataset)
        step_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler([len(row.input_ids) for row in rows.rows], step_rows, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if isinstance(eval_dataset, TokenDataset):
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    @property
    def _ranks_averaged(self) -> int:
        """Return the factor that undoes the gradient averaging over ranks."""
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    def beam(self) -> BeamConfig:
        """Return the shape of beams and tree that evaluation uses: the drafter's own, nothing copied or recycled."""
        return replace(self.drafter.config.beam, lookup_length=0, recycled_nodes=0)

    def _supervise(self, inputs: dict[str, Tensor]) -> Supervision:
        ids, mask, depths = inputs["input_ids"], inputs["loss_mask"], self.args.drafter_predict_n_tokens
        if "continuations" in inputs:
            return Supervision.from_continuations(ids, mask, inputs["continuations"], depths)
        return Supervision.from_batch(ids, mask, depths)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Count supervised (position, depth) pairs; the base class counts ``labels``, which we have not."""
        count = sum(int(self._supervise(batch).valid.sum()) for batch in batch_samples)
        items = torch.tensor(count, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        if items == 0:
            raise DataError(
                "no supervised position in a training step: every label is masked or every reply is shorter "
                "than 2 tokens; check the data set's roles and --model_max_length"
            )
        return items

    def _head_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], batch: Supervision, hidden: Tensor | None = None
    ) -> losses.HeadLoss:
        if hidden is None:
            hidden = self._hidden_states(inputs)
        with torch.no_grad():
            context = hidden[batch.rows, batch.positions]
            embeddings = self.verifier.embed(batch.known)
        features = model(context.to(self.drafter.dtype), embeddings.to(self.drafter.dtype))
        depth_weights = self.args.depth_decay ** torch.arange(batch.valid.shape[1], device=features.device)
        row_weights = (batch.valid * depth_weights)[batch.valid]
        targets = self._targets(batch, hidden)
        # The base class autocasts the model's forward only, and the head's product is most of the work.
        with self.accelerator.autocast():
            return losses.head_loss(features[batch.valid], self.drafter.head.weight, targets, row_weights)

    def _hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Take stored states where the rows bring them, else run the verifier, ``[B, T, H]``."""
        if "hidden" in inputs:
            return inputs["hidden"].to(self.verifier.dtype)
        return self.verifier.hidden_states(inputs["input_ids"], inputs["attention_mask"])

    def _targets(self, batch: Supervision, hidden: Tensor) -> losses.HeadTargets:
        """Collect hard targets, and the verifier's distribution once per position of the text."""
        ids = _inverse(self.drafter.draft_token_ids, self.drafter.config.vocab_size)[batch.targets[batch.valid]]
        depths = torch.arange(batch.valid.shape[1], device=ids.device)
        targets = losses.HeadTargets(
            ids=ids,
            table=None,
            index=ids,
            kl_share=0.0,
            depths=depths.expand_as(batch.valid)[batch.valid],
            length_share=self.args.length_share,
        )
        if not self.args.kl_share:
            return targets
        if batch.distilled:
            raise UsageError(
                f"objective {self.args.objective} with distilled targets: KL needs the verifier's distribution along "
                "the text, continuations have tokens alone; use --objective ce or --kd_alpha 0"
            )
        # The target of depth k is the verifier's distribution at position t + k.
        flat = batch.rows.unsqueeze(1) * hidden.shape[1] + batch.positions.unsqueeze(1) + depths + 1
        unique, index = flat[batch.valid].unique(return_inverse=True)
        # Rows that no target points to; see losses.ROW_MULTIPLE.
        unique = nn.functional.pad(unique, (0, -len(unique) % losses.ROW_MULTIPLE))
        with torch.no_grad():
            logits = self.verifier.head(hidden.flatten(0, 1)[unique], self.drafter.draft_token_ids)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            table = (logits / self.args.kd_temperature).softmax(dim=-1)
        return replace(targets, table=table, index=index, kl_share=self.args.kl_share)

    def _record(self, batch: Supervision, result: losses.HeadLoss) -> None:
        """Add the expected length, per-depth losses and teacher-forced accuracies to the running means."""
        depth = torch.arange(batch.valid.shape[1], device=batch.valid.device).expand_as(batch.valid)[batch.valid]
        tops = (1, self.args.drafter_top_k)
        figures = [torch.ones_like(result.per_row), result.per_row, *(result.ranks < top for top in tops)]
        columns = torch.stack([figure.double() for figure in figures], dim=1)
        # Sums by depth on the device: the host waits for it once.
        sums = columns.new_zeros(batch.valid.shape[1], len(figures)).index_add_(0, depth, columns)
        total = result.paths.double().sum().expand(1, len(figures))
        *by_depth, [expected, *_] = torch.cat([sums, total]).tolist()
        self._means.add("expected_length", expected, int(by_depth[0][0]))
        for k, (count, loss, *hits) in enumerate(by_depth, 1):
            self._means.add(f"loss_depth_{k}", loss, int(count))
            for top, hit in zip(tops, hits, strict=True):
                self._means.add(f"top{top}_depth_{k}", int(hit), int(count))


def simulate(
    drafter: Drafter,
    verifier: Verifier,
    inputs: dict[str, Tensor],
    hidden: Tensor,
    beam: BeamConfig,
    stats: DecodingStats,
) -> list[list[int]]:
    """Walk the verifier's own text as decoding would and count what each step accepts.

    The same beam search and tree as in decoding; only the picks come from the text. A row's walk
    starts at its first reply token and ends with its last.

    Args:
        drafter: the drafter.
        verifier: gives the embeddings.
        inputs: ``input_ids`` and ``loss_mask``, ``[B, T]``; the first reply of each row counts.
        hidden: what feeds the LM head, ``[B, T, H]``.
        beam: shape of the beams and the tree.
        stats: counters that are added to.

    Returns:
        Accepted length of each step, per row of the batch.
    """
    steps: list[list[int]] = [[] for _ in inputs["loss_mask"]]
    spans = list(_reply_spans(inputs["loss_mask"]))
    rows = [row for row, _, _ in spans]
    roots = [start for _, start, _ in spans]
    stops = [stop for _, _, stop in spans]
    stats.prefill_tokens += len(spans)
    stats.tokens += sum(stop - start for _, start, stop in spans)
    while live := [i for i in range(len(rows)) if roots[i] + 1 < stops[i]]:
        index = torch.tensor([rows[i] for i in live], device=hidden.device)
        at = torch.tensor([roots[i] for i in live], device=hidden.device)
        root = inputs["input_ids"][index, at]
        context = hidden[index, at - 1].to(drafter.dtype)
        beams = beam_search.draft(drafter, context, root, lambda ids: verifier.embed(ids).to(drafter.dtype), beam)
        tree = DraftTree.from_beams(root, beams, beam.max_nodes)
        texts = [inputs["input_ids"][rows[i], roots[i] + 1 : stops[i]].tolist() for i in live]
        for i, accepted, text in zip(live, _follow(tree, texts), texts, strict=True):
            emitted = min(accepted + 1, len(text))
            stats.count_step(min(accepted, emitted))
            steps[rows[i]].append(min(accepted, emitted))
            roots[i] += emitted
    return steps


def _follow(tree: DraftTree, texts: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens of each text the row's tree holds as a path from the root."""
    lengths = []
    for row, text in enumerate(texts):
        path = [0]
        for token in text:
            if not (child := tree.child(row, path[-1], token)):
                break
            path.append(child)
        lengths.append(len(path) - 1)
    return lengths


def _reply_spans(loss_mask: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, stop) of the first reply of each row that has one."""
    for row, mask in enumerate(loss_mask.tolist()):
        if True in mask:
            start = mask.index(True)
            stop = mask.index(False, start) if False in mask[start:] else len(mask)
            if start:
                yield row, start, stop


def _inverse(draft_token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return the draft id of each verifier token, int64 ``[V]``, -1 where it cannot be drafted."""
    inverse = torch.full((vocab_size,), -1, device=draft_token_ids.device)
    inverse[draft_token_ids] = torch.arange(len(draft_token_ids), device=draft_token_ids.device)
    return inverse


def choose_draft_vocabulary(rows: TokenDataset, size: str, vocab_size: int) -> tuple[Tensor, float]:
    """Choose the tokens that may be drafted: the most frequent ones of the training replies.

    Room that the replies leave is filled with the lowest ids, which byte-pair vocabularies give to
    their most common pieces.

    Args:
        rows: training rows.
        size: a number of tokens, 0 for all, or "auto" (all of a small vocabulary, else 8,192).
        vocab_size: the verifier's V.

    Returns:
        Token ids in rising order, int64 ``[V_d]``, and the share of reply tokens they cover.

    Raises:
        UsageError: not a size.
    """
    if size != "auto" and not (size.isdecimal() and int(size) <= vocab_size):
        raise UsageError(f"draft_vocab_size must be auto or in 0..{vocab_size}, got {size!r}")
    count = min(vocab_size, AUTO_DRAFT_VOCABULARY) if size == "auto" else int(size) or vocab_size
    frequency = torch.zeros(vocab_size, dtype=torch.long)
    for start in range(0, len(rows.rows), _COUNTED_ROWS):
        part = rows.rows[start : start + _COUNTED_ROWS]
        ids = [token for row in part for token in itertools.compress(row.input_ids, row.loss_mask)]
        frequency += torch.tensor(ids, dtype=torch.long).bincount(minlength=vocab_size)
    chosen = frequency.sort(descending=True, stable=True).indices[:count].sort().values
    return chosen, float(frequency[chosen].sum() / max(int(frequency.sum()), 1))


def initialise_from_verifier(drafter: Drafter, verifier: Verifier, draft_token_ids: Tensor) -> None:
    """Start the drafter from what the verifier knows.

    The head takes the verifier's LM head rows and the projection passes the context through, so
    the first prediction is the verifier's own at the context; recurrent weights are scaled to the
    size of the embeddings. With another exit_dim than H the random start stays.

    Args:
        drafter: a new drafter.
        verifier: the base it will draft for.
        draft_token_ids: the draft vocabulary, int64 ``[V_d]``, rising.
    """
    hidden = drafter.config.hidden_size
    with torch.no_grad():
        drafter.draft_token_ids.copy_(draft_token_ids)
        embedding_scale = verifier.embed(draft_token_ids.to(verifier.device)).float().std()
        if drafter.config.rnn and not drafter.config.emb_norm:
            drafter.rnn_w.weight.div_(embedding_scale.to(drafter.device))
        if drafter.config.exit_dim != hidden:
            return
        rows = verifier.head_rows(draft_token_ids)
        drafter.head.weight.copy_(rows)
        if isinstance(drafter.input_proj, nn.Linear):
            drafter.input_proj.weight[:, :hidden].copy_(torch.eye(hidden))
        for block in drafter.blocks:
            block.get_submodule("linear").get_parameter("weight").mul_(0.1)
