"""Adam whose cost does not grow with the vocabulary: rows of a table that a batch did not look up are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from penstock.ops.rows import adam_rows_, rows_of


class LazyAdam(torch.optim.Adam):
    """Adam or AdamW that takes sparse gradients as news of their rows only.

    What has a dense gradient is updated as by `torch.optim.Adam`. Of what has a sparse one (an embedding with
    ``sparse=True``), only the rows in it: neither their moments nor their decay go on while they are not looked up. So it
    is not Adam on the same gradients with zeros filled in, where rows drift on for some steps and decay always.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.Adam`.
        decoupled_weight_decay: AdamW's decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled_weight_decay
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    self._step_rows(p, group)
                    waiting.append((p, p.grad))
                    p.grad = None
        super().step()
        for p, grad in waiting:
            p.grad = grad
        return loss

    def _step_rows(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        assert p.grad is not None
        adam_rows_(
            *rows_of(p.grad),
            p,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
        )
