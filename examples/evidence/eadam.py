"""Adam with AdaBelief's eps, and nothing else of it: the control that isolates the belief.

Source: Yuan and Gao, EAdam optimizer, arXiv:2011.02150, which found that it gets most of what
AdaBelief gains over Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class EAdam(Optimizer):
    """v = beta2 v + (1 - beta2) g^2 + eps, where AdaBelief has (g - m)^2; decay as Adam or AdamW.

    Args:
        params: Parameters or param groups.
        lr: Learning rate.
        betas: Of m and v.
        eps: Added to v at every step, and to its root.
        weight_decay: Strength.
        decoupled: Shrink parameters instead of adding to the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            self._update(params, [param.grad for param in params], group)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                self.state[param].update(zeros)
        m = [self.state[param]["exp_avg"] for param in params]
        v = [self.state[param]["exp_avg_sq"] for param in params]
        lr, eps, decay, (beta1, beta2) = (
            group[key] for key in ("lr", "eps", "weight_decay", "betas")
        )
        if decay and group["decoupled"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        torch._foreach_add_(v, eps)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(params, m, denominator, -lr / (1 - beta1 ** group["step"]))
