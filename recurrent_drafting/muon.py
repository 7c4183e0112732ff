"""Muon for the drafter's hidden matrices, AdamW for its head and biases, as one optimizer.

Muon (Jordan et al., 2024) makes the momentum of a matrix orthogonal before it is applied, so that every direction
moves alike. It is meant for matrices between hidden layers, not for a head over a vocabulary nor for vectors. The
scale of "Muon is Scalable for LLM Training" (arXiv 2502.16982) gives its updates the size that AdamW's have, so that
one learning rate and one schedule serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# A head's rows are tokens.
_HEAD = "head.weight"


class MuonWithAdamW(torch.optim.Optimizer):
    """Step a list of matrices with Muon and the remaining parameters with AdamW.

    Args:
        model: the drafter, or what wraps it.
        lr: learning rate of both.
        weight_decay: of matrices, the head included; biases have none.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
    ) -> None:
        hidden, head, vectors = split_parameters(model)
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **common)
        groups = [{"params": head, **common}, {"params": vectors, "lr": lr, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, betas=betas, eps=eps)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    # Schedulers wrap the method and the base class declares it without types.
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: computes the loss anew, as for every optimizer of torch.

        Returns:
            What the closure returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Groups and state are those of this optimizer: schedulers and checkpoints know no other.
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adamw, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()  # type: ignore[no-untyped-call]
        return loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of a drafter: hidden matrices, the head's matrix, biases."""
    hidden: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = vectors if parameter.ndim < 2 else head if name.endswith(_HEAD) else hidden
            kind.append(parameter)
    return hidden, head, vectors
