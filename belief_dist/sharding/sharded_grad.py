"""What `param.grad` is at ZeRO-2 once the gradient lies in the shards of all ranks.

None would say that there is no gradient: a clip would see nothing to clip, `module.zero_grad()`
nothing to forget, and both would leave the gradient as it is without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


class ShardedGrad(Tensor):
    """Stands for a gradient that was reduced: its shape, dtype and device, but no values.

    Backward may add to it, `zero_` makes it zero, and `param.grad = None` forgets it. Whatever else
    would read or change it is an error that says what to do instead.

    Attributes:
        added: A gradient that came later, which the reducer has not taken yet.
        is_zeroed: Whether it was made zero, which the reducer has not noticed yet.
    """

    added: Tensor | None
    is_zeroed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> ShardedGrad:
        """Stand for a gradient of the shape of `like`, and of its dtype and device unless given."""
        grad: ShardedGrad = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=dtype or like.dtype,
            device=device or like.device,
        )
        grad.added, grad.is_zeroed = None, False
        return grad

    def __init__(self, like: Tensor, dtype: Any = None, device: Any = None) -> None:
        """See `__new__`."""

    def __repr__(self) -> str:  # type: ignore[override]
        """Tell what it is; there are no values to print."""
        return f"ShardedGrad(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def take_added(self) -> Tensor | None:
        """Return the gradient that came later, once."""
        added, self.added = self.added, None
        return added

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do what backward and zero_grad do to a gradient, and refuse the rest.

        Raises:
            RuntimeError: See the class.
        """
        if func is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            return None  # GradScaler looks for what is not finite, which the step does itself
        if func is _aten.zero_.default or func is _aten._foreach_zero_.default:
            grads = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            for grad in grads:
                grad.added, grad.is_zeroed = None, True
            return args[0] if func is _aten.zero_.default else None
        mine, other = (*args, None)[:2] if args else (None, None)
        adds = func in (_aten.add_.Tensor, _aten.add.Tensor) and not kwargs
        if adds and isinstance(mine, cls) and not isinstance(other, cls):
            assert isinstance(other, Tensor)
            # With create_graph, autograd asks for another tensor.
            grad = mine if func is _aten.add_.Tensor else cls(mine)
            grad.added = other if mine.added is None else mine.added + other
            grad.is_zeroed = mine.is_zeroed
            return grad
        if func is _aten.detach.default:
            return args[0]
        if func in (_aten._to_copy.default, _aten.clone.default):
            # A module that is converted or moved takes its gradients along.
            given = kwargs or {}
            return cls(args[0], given.get("dtype"), given.get("device"))
        raise RuntimeError(
            f"{func} on a gradient that ShardedAdaBelief has summed over the ranks already: with "
            f"stage=2 it lies in their shards and has no values here. Clip by max_grad_norm, read "
            f"optimizer.grad_norm after step(), change gradients in a hook that is registered "
            f"before the optimizer is built, or take stage=1."
        )
