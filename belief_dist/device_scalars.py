"""The scalars of a step, computed on the device: for a CUDA graph that captures `step`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.async_device import is_capturing, upload
from belief_dist.rule import RECTIFY_THRESHOLD, Direction, StepScalars


class DeviceScalars(NamedTuple):
    """The scalars of a step whose number and learning rate the host does not know.

    A captured CUDA graph computes and reads them at every replay. Only the Triton kernels read
    them where they are; other updates visit the host, see `on_host`.
    """

    values: Tensor  # (12,), float64: StepScalars in its order; (11,) without ema_weight; or rows
    coupled: bool  # whether coupled_decay is not zero, in any row

    def on_host(self) -> list[StepScalars]:
        """Return the same for the host, which waits for the device: one, or of each row.

        Raises:
            RuntimeError: A CUDA graph is captured, which nothing may wait for.
        """
        if is_capturing(self.values.device):
            raise RuntimeError(
                "a CUDA graph can capture this step only where Triton updates all tensors: see "
                "belief_dist.backends(), and lay out gradients in memory as their parameters."
            )
        rows = self.values.view(-1, self.values.shape[-1]).tolist()
        return list(map(_listed, rows))


def _listed(values: list[float]) -> StepScalars:
    numbers, (direction, sign, step), ema_weight = values[:8], values[8:11], values[11:]
    known = (*numbers, Direction(int(direction)), sign, int(step))
    return StepScalars._make((*known, *(ema_weight or [0.0])))


# Of an update: one for all operands, or several, of which each operand names its own.
Scalars = StepScalars | DeviceScalars | list[StepScalars]


def together(each: Sequence[StepScalars | DeviceScalars]) -> Scalars:
    """Return the scalars of one update, of which operands name theirs by its position here."""
    if len(each) == 1:
        return each[0]
    late = [scalars for scalars in each if isinstance(scalars, DeviceScalars)]
    if not late:
        return [scalars for scalars in each if isinstance(scalars, StepScalars)]
    device, width = late[0].values.device, len(late[0].values)
    rows = [
        scalars.values
        if isinstance(scalars, DeviceScalars)
        else upload([float(x) for x in scalars[:width]], torch.float64, device)
        for scalars in each
    ]
    coupled = [s.coupled if isinstance(s, DeviceScalars) else s.coupled_decay != 0.0 for s in each]
    return DeviceScalars(torch.stack(rows), any(coupled))


@torch.no_grad()
def device_scalars(
    options: Mapping[str, Any], step: Tensor, lr: Tensor | float, *, ema_weight: float = 0.0
) -> DeviceScalars:
    """Compute `step_scalars` where `step` is, without a visit to the host.

    The operations are the same in the same order, in float64. Powers may be rounded differently in
    their last place, which leaves relative differences of about 2**-52 / (1 - beta**step).

    Args:
        options: As for `step_scalars`, but for the learning rate.
        step: One element of any dtype, 1-based.
        lr: One element on the same device, or a float.
        ema_weight: As for `step_scalars`.
    """
    t = step.detach().reshape(()).to(torch.float64)
    rate = lr.detach().reshape(()).to(t) if isinstance(lr, Tensor) else torch.full_like(t, lr)
    beta1, beta2 = (float(beta) for beta in options["betas"])
    weight_decay = float(options["weight_decay"])
    bias1 = 1.0 - beta1**t
    power2 = beta2**t
    bias2 = 1.0 - power2

    direction = torch.full_like(t, float(Direction.ADAPTIVE))
    step_size = rate / bias1
    denom_scale = 1.0 / bias2.sqrt()
    if options["rectify"]:
        sma_max = 2.0 / (1.0 - beta2) - 1.0
        sma = sma_max - 2.0 * t * power2 / bias2
        rectified = sma >= RECTIFY_THRESHOLD
        rectification = (
            bias2
            * (sma - 4.0) / (sma_max - 4.0)
            * (sma - 2.0) / sma
            * sma_max / (sma_max - 2.0)
        ).sqrt()  # fmt: skip
        early = Direction.MOMENTUM if options["degenerated_to_sgd"] else Direction.NONE
        step_size = torch.where(rectified, rate * rectification / bias1, step_size)
        denom_scale = torch.where(rectified, 1.0, denom_scale)
        direction = torch.where(rectified, direction, float(early))

    decay: Tensor | float = 1.0
    coupled_decay = 0.0
    if options["weight_decouple"]:
        decay = 1.0 - (weight_decay if options["fixed_decay"] else rate * weight_decay)
    else:
        coupled_decay = weight_decay
    scalars: dict[str, Tensor | float] = {
        "weight1": 1.0 - beta1,
        "beta2": beta2,
        "weight2": 1.0 - beta2,
        "eps": float(options["eps"]),
        "decay": decay,
        "coupled_decay": coupled_decay,
        "step_size": step_size,
        "denom_scale": denom_scale,
        "direction": direction,
        "sign": -1.0 if options["maximize"] else 1.0,
        "step": t,
        "ema_weight": ema_weight,
    }
    # Constants are filled in, not copied: a captured graph may not read the host's memory.
    each = [scalars[name] for name in StepScalars._fields if ema_weight or name != "ema_weight"]
    values = [x if isinstance(x, Tensor) else torch.full_like(t, x) for x in each]
    return DeviceScalars(torch.stack(values), coupled_decay != 0.0)
