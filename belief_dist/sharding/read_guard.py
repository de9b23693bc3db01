"""Waits for a parameter's all-gather when the parameter is first read.

After a step, parameters travel while the program goes on. Until all have arrived, a torch function
mode looks at the arguments of every torch function and waits for those that are still on the way:
a layer's forward waits for its own weights only, while reading anything else early (a tied weight,
`state_dict()`, `copy.deepcopy`, another model that shares a parameter) waits just as well.

What runs below torch functions does not pass through the mode. A hook before every forward waits
for everything in front of compiled and scripted modules, and in front of any module without
children for its own parameters, which it may hand to an extension. The mode leaves at the first
module call after everything has arrived (it cannot leave while one of its own calls is under way).
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from belief_dist.phases import Phases

logger = logging.getLogger("belief_dist")

# These tell about a parameter, or about its gradient, without reading its values.
_HARMLESS_PROPERTIES = (
    "dtype device requires_grad is_leaf ndim shape grad grad_fn layout is_cuda is_cpu is_sparse "
    "is_meta is_quantized itemsize nbytes _version output_nr retains_grad"
).split()
_HARMLESS = frozenset(
    accessor
    for name in _HARMLESS_PROPERTIES
    for kind in ("__get__", "__set__", "__delete__")
    if (accessor := getattr(getattr(Tensor, name, None), kind, None)) is not None
) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.register_hook,
    Tensor.__hash__,
}


class TornParameters(RuntimeError):
    """Parameters have not arrived, and never will: a rank has ended, say."""


def _fail(said: str) -> None:
    raise TornParameters(said)


def _never() -> bool:
    return False


def _in_a_block_of_others() -> bool:
    """Return whether a mode is entered that the user will leave, such as `with torch.device(...)`.

    Modes are popped by position: the end of such a block would take a guard above it away, and
    leave the user's own mode for good. The default device set by `torch.set_default_device` stays.
    """
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    stack = _get_current_function_mode_stack()
    return any(not isinstance(mode, ReadGuard) and mode is not default for mode in stack)


# Guards that may have something to wait for, in any thread.
_armed: weakref.WeakSet[ReadGuard] = weakref.WeakSet()


def _wait_before_fork() -> None:
    """Complete all parameters: a forked child has the memory, and no thread that receives."""
    for guard in list(_armed):
        guard.wait_all()


os.register_at_fork(before=_wait_before_fork)


class ReadGuard(TorchFunctionMode):
    """Waits for pending parameters when they are first read.

    Usage: `expect(params, wait)` for everything that is on the way, then `arm()`; `wait_all()` ends
    it at any time.
    """

    def __init__(self, phases: Phases | None = None) -> None:
        """Begin with nothing to wait for.

        Args:
            phases: Of the optimizer; None for some of its own.
        """
        super().__init__()
        self._phases = phases or Phases()
        self._pending: dict[int, Callable[[], None]] = {}
        self._keys: dict[Callable[[], None], list[int]] = {}  # of `_pending`
        self._has_arrived: dict[Callable[[], None], Callable[[], bool]] = {}  # of `_keys`
        self._hook: RemovableHandle | None = None
        self._active = False

    def expect(
        self,
        params: Sequence[Tensor],
        wait: Callable[[], None],
        has_arrived: Callable[[], bool] = _never,
    ) -> None:
        """Call `wait` once before the first use of any of `params`.

        Args:
            params: What is on the way.
            wait: Waits for it.
            has_arrived: Tells without waiting whether `wait` has nothing left to wait for. False
                where that is not known.
        """
        self._expect([id(param) for param in params], wait, has_arrived)

    def _expect(
        self, keys: list[int], wait: Callable[[], None], has_arrived: Callable[[], bool]
    ) -> None:
        self._pending.update(dict.fromkeys(keys, wait))
        self._keys[wait] = keys
        self._has_arrived[wait] = has_arrived

    def arm(self) -> None:
        """Start to watch, if anything is on the way; wait for it where that is not possible."""
        if self._pending and _in_a_block_of_others():
            self.wait_all()
        elif self._pending and not self._active:
            self._active = True
            _armed.add(self)
            self.__enter__()  # type: ignore[no-untyped-call]  # torch's modes carry no types
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def wait_all(self) -> None:
        """Wait for everything, in the order in which it was launched.

        Raises:
            TornParameters: Something has not arrived. It stays expected, so that nobody reads a
                mixture of two steps later, or saves it.
        """
        for wait in list(self._keys):
            self._wait(wait)
        self._disarm()

    def abandon(self) -> None:
        """Stop to watch, for an optimizer that is dropped; what fails to arrive is logged."""
        for wait in list(self._keys):
            try:
                self._wait(wait)
            except TornParameters as error:
                logger.error("%s", error)
        self._keys.clear()
        self._pending.clear()
        self._has_arrived.clear()
        self._disarm()

    def _wait(self, wait: Callable[[], None]) -> None:
        # Not pending meanwhile: waiting may read them itself.
        keys = self._keys.pop(wait)
        del self._has_arrived[wait]
        for key in keys:
            del self._pending[key]
        try:
            with self._phases("gather_wait"):
                wait()
        except TornParameters as error:
            self._expect(keys, partial(_fail, str(error)), _never)
            raise
        except RuntimeError as error:
            said = (
                f"{error} These parameters may be half those of this step and half those of the "
                f"last: drop the optimizer (del), load a checkpoint, and build a new one."
            )
            # Without waiting again, which could take a timeout at every read.
            self._expect(keys, partial(_fail, said), _never)
            raise TornParameters(said) from error

    def _disarm(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        # A mode that was entered above ours may still be there. Modes leave from the top only, so
        # ours stays below it, idle, until a step or another guard finds it on top.
        while stack := _get_current_function_mode_stack():
            top = stack[-1]
            if not isinstance(top, ReadGuard) or top._pending:
                return
            top._active = False
            top.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        # Looking at every function costs most where the host has nothing to hide it behind; there,
        # all has arrived by the first layers.
        while self._has_arrived:
            oldest, has_arrived = next(iter(self._has_arrived.items()))
            if not has_arrived():
                break
            self._wait(oldest)
        if not self._pending:
            self._disarm()
            return
        opaque = (
            isinstance(module, torch.jit.ScriptModule)
            or hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
        )
        if opaque:
            self.wait_all()
        elif not module._modules:
            # A layer of its own kind may hand its weights to an extension, unseen.
            for param in module._parameters.values():
                wait = self._pending.get(id(param))
                if wait is not None:
                    self._wait(wait)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Wait for what `func` is about to read, then call it."""
        kwargs = kwargs or {}
        if self._pending and func not in _HARMLESS:
            self._look_at(args)
            if kwargs:
                self._look_at(kwargs.values())
        return func(*args, **kwargs)

    def _look_at(self, values: Iterable[Any]) -> None:
        # Before every torch function: no generator, and the usual parameter is found first.
        for value in values:
            wait = self._pending.get(id(value))
            if wait is not None:
                self._wait(wait)
            elif isinstance(value, Tensor):
                if is_functorch_wrapped_tensor(value):  # torch.func hides what is inside
                    self.wait_all()
            elif isinstance(value, (list, tuple)):
                self._look_at(value)
