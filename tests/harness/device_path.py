"""CPU tensors on the way of a GPU's, and what a GPU would be asked to do for them.

Triton's kernels run in its interpreter, so the process must have been started with
TRITON_INTERPRET=1 and BELIEF_DIST_BACKEND=triton. A copy from the device to the host cannot be told
from others by its device here; it is told by how it is written, see `Watch`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from belief_dist import async_device
from belief_dist.async_device import LateRead
from tests.harness.paths import ROOT

PACKAGE = str(ROOT / "belief_dist")
# They reserve or name memory, or make a tensor of the host.
_NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_",
    "detach_", "lift_fresh", "_unsafe_view",
}  # fmt: skip
_MAKE = ("arange", "empty", "full", "ones", "zeros")
_TO_THE_HOST = ("cpu", "numpy", "tolist", "__array__", "__dlpack__")


@contextmanager
def device_path() -> Iterator[None]:
    """Inside, optimizers that are built take the CPU for a device that runs behind the host."""
    with patch.object(async_device, "runs_behind", lambda device: True):
        yield


def is_launch(func: Any) -> bool:
    """Return whether an operation of torch starts a kernel, a copy or a fill on a GPU."""
    aliases = [each.alias_info for each in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and func._schema.name.split("::")[1] not in _NO_LAUNCH


class Queue(TorchDispatchMode):
    """Sees all that a GPU would be asked to do: operations of torch, and kernels of Triton."""

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Do what torch asks for."""
        return func(*args, **kwargs)

    def kernel(self, name: str, run: Callable[[], None]) -> None:
        """Run a kernel."""
        run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # type: ignore
        if func.namespace != "aten":  # the profiler's
            return func(*args, **(kwargs or {}))
        return self.operation(func, args, kwargs or {})

    def __enter__(self) -> Any:
        from triton.runtime.interpreter import InterpretedFunction

        launch = InterpretedFunction.run

        def run(function: Any, *args: Any, **kwargs: Any) -> None:
            def quietly() -> None:
                with _disable_current_modes():  # the interpreter uses torch as well
                    launch(function, *args, **kwargs)

            self.kernel(function.fn.__name__, quietly)

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(InterpretedFunction, "run", run))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)


class Waits(AssertionError):
    """Something that would make the host wait for a GPU."""


class Watch(Queue):
    """Counts launches of the package, and refuses what would make the host wait, wherever it is.

    Refused are operations of torch whose result is a number of the host or whose shape depends on
    values; methods that give the host the values; tensors that are made on the host, as each would
    have to be copied from memory that is not pinned, but in `async_device.upload`; and a `LateRead`
    of anything but the step before this one.

    Attributes:
        refuses: Set it after the steps in which tables are uploaded.
        launched: Launches by name, those of the package only.
        places: The same by file and line.
        late_reads: How many verdicts were read.
    """

    def __init__(self, *, computes: bool = True) -> None:
        """Watch; without `computes` kernels are counted and not run, which takes no time."""
        super().__init__()
        self.refuses = False
        self._computes = computes
        self.launched: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.late_reads = 0
        self._step = 0
        self._made: dict[int, int] = {}

    def next_step(self) -> None:
        """Begin an iteration of the training loop, and count anew."""
        self._step += 1
        self.launched.clear()
        self.places.clear()

    @property
    def total(self) -> int:
        return sum(self.launched.values())

    def count(self, name: str) -> None:
        place = next(_package_frames(), None)
        if place is not None:
            self.launched[name] += 1
            file = place.f_code.co_filename.removeprefix(PACKAGE)
            self.places[f"{name} at {file}:{place.f_lineno}"] += 1

    def refuse(self, what: str) -> None:
        if self.refuses:
            raise Waits(f"{what}, in step {self._step}")

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._check(func, args)
        if is_launch(func):
            self.count(func._schema.name.removeprefix("aten::"))
        return func(*args, **kwargs)

    def kernel(self, name: str, run: Callable[[], None]) -> None:
        self.count(name)
        if self._computes:
            run()

    def _check(self, func: Any, args: Sequence[Any]) -> None:
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.data_dependent_output in func.tags:
            self.refuse(name)
        if torch.Tag.dynamic_output_shape in func.tags and not _has_integer_indices(name, args):
            self.refuse(name)
        if name == "lift_fresh":
            if any(each.f_code is async_device.upload.__code__ for each in _package_frames()):
                self.count("copy to the device")
            else:
                self.refuse("a tensor made from numbers")

    def __enter__(self) -> Any:
        super().__enter__()
        watch, get = self, LateRead.get

        def begin(late: LateRead, number: Tensor) -> None:
            watch.count("copy to the host")
            watch._made[id(late)] = watch._step
            with _disable_current_modes():
                late._event, late._copy = None, number.clone()

        def read(late: LateRead) -> int:
            age = watch._step - watch._made[id(late)]
            if age != 1:
                watch.refuse(f"a verdict that is {age} steps old")
            watch.late_reads += 1
            with _disable_current_modes():
                return get(late)

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if "cpu" in [x for x in (*args, *kwargs.values()) if isinstance(x, str)]:
                watch.refuse("to('cpu')")
            return torch._C.TensorBase.to(tensor, *args, **kwargs)

        self._patches.enter_context(patch.object(LateRead, "__init__", begin))
        self._patches.enter_context(patch.object(LateRead, "get", read))
        self._patches.enter_context(patch.object(Tensor, "to", to))
        for name in _MAKE:
            self._patches.enter_context(patch.object(torch, name, self._on_a_device(name)))
        for name in _TO_THE_HOST:
            self._patches.enter_context(patch.object(Tensor, name, self._refusing(name)))
        return self

    def _on_a_device(self, name: str) -> Callable[..., Any]:
        make = getattr(torch, name)

        def making(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("device") is None and "out" not in kwargs:
                self.refuse(f"{name} on the host")
            return make(*args, **kwargs)

        return making

    def _refusing(self, name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def refusing(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.refuse(name)
            return method(tensor, *args, **kwargs)

        return refusing


def _has_integer_indices(name: str, args: Sequence[Any]) -> bool:
    """Return whether it is an index by numbers, whose shape is known without their values."""
    if name != "index":
        return False
    return all(each is None or each.dtype in (torch.int32, torch.int64) for each in args[1])


def _package_frames() -> Iterator[FrameType]:
    """Give the running functions of the package, the innermost first.

    But for the mode that looks at every function of torch while parameters travel.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _is_of_the_package(code):
            yield frame
        frame = frame.f_back


@cache
def _is_of_the_package(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE) and code.co_name != "__torch_function__"
