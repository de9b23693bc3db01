"""The fused updates, and the choice between them.

CPU tensors are updated by the compiled C++ kernel and GPU tensors by Triton, where these are
usable, and all others by plain torch, which on a GPU is a warning. The results are bitwise those of
`state_formats.update_stored_reference_`. One log line for each kind of device names the backend.
The environment variable BELIEF_DIST_BACKEND ("auto", "cpp", "triton" or "eager") forces one;
"triton" leaves CPU tensors to C++ unless TRITON_INTERPRET=1 makes Triton work on them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache

import torch
from torch import Tensor

from belief_dist import norm
from belief_dist.device_scalars import DeviceScalars, Scalars
from belief_dist.kernels import eager
from belief_dist.kernels.build import Unavailable
from belief_dist.kernels.cpp import CppKernel
from belief_dist.kernels.foreach import foreach_update_
from belief_dist.kernels.threads import idle_cores, one_thread_sentence
from belief_dist.kernels.triton_launch import OLDEST, Again, TritonKernel
from belief_dist.kernels.triton_meet_launch import Meetings
from belief_dist.kernels.triton_reduce_launch import TritonReductions
from belief_dist.operands import Operands
from belief_dist.rule import compute_dtype

__all__ = [
    "Again",
    "again",
    "backends",
    "check_choice",
    "checksums",
    "encode_int8_",
    "foreach_update_",
    "grad_scales",
    "meetings",
    "ordered_sum_",
    "prefers_foreach",
    "require_fused",
    "serving",
    "squared_norm_bins_",
    "sum_int8_",
    "update_",
    "why_plain",
]

logger = logging.getLogger("belief_dist")

# Measured on one H200 with 303 M parameters in 290 tensors.
_SLOW = (
    "GPU updates run in plain torch, because {reason}. A step of AdaBelief takes about nine times "
    "as long as a fused AdamW (23.4 ms beside 2.7), and ordered sums and exact norms of "
    "ShardedAdaBelief far longer. Install a Triton that your torch supports, "
    f"{'.'.join(map(str, OLDEST))} or newer (torch 2.8 and newer bring one), or set "
    "BELIEF_DIST_BACKEND=eager if plain torch is what you want."
)
_CHOICES = ("auto", "cpp", "triton", "eager")


def _choice() -> str:
    choice = os.environ.get("BELIEF_DIST_BACKEND", "auto")
    if choice not in _CHOICES:
        raise ValueError(
            f"BELIEF_DIST_BACKEND must be one of {', '.join(_CHOICES)}, got {choice!r}."
        )
    return choice


def check_choice() -> None:
    """Refuse a wrong environment variable when an optimizer is built, and not in its first step.

    Raises:
        ValueError: BELIEF_DIST_BACKEND is none of its choices.
    """
    _choice()


@lru_cache(maxsize=1)
def _cpp() -> CppKernel | Unavailable:
    """Return the compiled kernel or the reason why there is none; log the choice once."""
    choice = _choice()
    if choice == "eager":
        logger.info("CPU updates run in chunked plain torch, as BELIEF_DIST_BACKEND asks")
        return Unavailable("BELIEF_DIST_BACKEND=eager forbids it")
    try:
        kernel = CppKernel()
    except Unavailable as reason:
        if choice == "cpp":
            raise RuntimeError(
                f"BELIEF_DIST_BACKEND=cpp, but {reason}. Install g++ (apt install g++) or unset it."
            ) from reason
        logger.warning(
            "CPU updates run in chunked plain torch, 5 to 8 times slower than C++, because %s; "
            "install g++ (apt install g++) to end this",
            reason,
        )
        return reason
    logger.info("CPU updates run in %s", kernel.description)
    # Without a launcher's variable the number of ranks on this host is not known here.
    share = idle_cores(1) if "LOCAL_WORLD_SIZE" in os.environ else 0
    if share:
        logger.warning("AdaBelief %s", one_thread_sentence(share))
    return kernel


@lru_cache(maxsize=1)
def _triton() -> TritonKernel | Unavailable:
    """Return the GPU kernels or the reason why there are none; log the choice once."""
    choice = _choice()
    if choice in ("cpp", "eager"):
        return Unavailable(f"BELIEF_DIST_BACKEND={choice} forbids it")
    try:
        kernel = TritonKernel()
    except Unavailable as reason:
        if choice == "triton":
            raise RuntimeError(f"BELIEF_DIST_BACKEND=triton, but {reason}. Unset it.") from reason
        if torch.cuda.is_available():
            sentence = _SLOW.format(reason=reason)
            logger.warning(sentence)
            # Many programs show no logs of libraries, and this costs more than the training saves.
            warnings.warn(f"belief_dist: {sentence}", RuntimeWarning, stacklevel=3)
        return reason
    logger.info("GPU updates run in %s", kernel.description)
    return kernel


def _kernel(device: torch.device) -> CppKernel | TritonKernel | Unavailable:
    """Return the kernel for tensors on `device`, or the reason why only plain torch is left."""
    if device.type != "cpu" or _choice() == "triton":
        kernel = _triton()
        if isinstance(kernel, Unavailable) or kernel.serves(device):
            return kernel
    return _cpp()


@lru_cache(maxsize=1)
def _checked_reductions() -> TritonReductions | None:
    """Return the GPU's sums and checksums, which are compiled now; warn if they do not work."""
    kernel = _triton()
    if isinstance(kernel, Unavailable):
        return None
    problem = None if kernel.interprets else kernel.reductions.find_problem("cuda")
    if problem is not None:
        sentence = (
            f"sums, norms and checksums run in plain torch, with some hundred launches for each "
            f"bucket, because {problem}; updates run in Triton. Install the Triton that your torch "
            f"was built with, or set BELIEF_DIST_BACKEND=eager to have no kernels at all."
        )
        logger.warning(sentence)
        warnings.warn(f"belief_dist: {sentence}", RuntimeWarning, stacklevel=4)
        return None
    return kernel.reductions


def _reductions(device: torch.device) -> TritonReductions | CppKernel | Unavailable | None:
    """Return what sums and checks tensors on `device`; the last two leave plain torch alone."""
    kernel = _kernel(device)
    return _checked_reductions() if isinstance(kernel, TritonKernel) else kernel


def backends() -> list[tuple[str, bool, str]]:
    """Return (name, usable, description or reason) of every update backend."""
    found = [("cpp", _cpp()), ("triton", _triton())]
    return [
        (name, False, str(kernel))
        if isinstance(kernel, Unavailable)
        else (name, True, kernel.description)
        for name, kernel in found
    ] + [("eager", True, "plain torch, on every device")]


def serving(device: torch.device) -> str:
    """Return the name of the backend for tensors on `device`: "cpp", "triton" or "eager"."""
    kernel = _kernel(device)
    if isinstance(kernel, TritonKernel):
        return "triton"
    return "cpp" if isinstance(kernel, CppKernel) and device.type == "cpu" else "eager"


def why_plain(device: torch.device) -> str:
    """Return why tensors on a GPU are updated in plain torch; empty where a kernel serves them."""
    kernel = _kernel(device)
    return str(kernel) if device.type != "cpu" and isinstance(kernel, Unavailable) else ""


def require_fused() -> None:
    """Check that a compiled kernel is usable, for CPU tensors or for GPU tensors.

    Raises:
        RuntimeError: None is usable; the message gives the reason.
    """
    kernel = _cpp()
    if isinstance(kernel, Unavailable) and isinstance(_triton(), Unavailable):
        raise RuntimeError(f"fused=True needs the compiled kernel, but {kernel}.")


def prefers_foreach(param: Tensor, foreach: bool | None, fused: bool | None) -> bool:
    """Return whether tensors like `param` are best updated by multi-tensor operations."""
    if foreach is not None:
        return foreach
    if fused or param.device.type == "cpu":
        return False
    return fused is False or not isinstance(_triton(), TritonKernel)


def update_(
    work: Sequence[Operands],
    scalars: Scalars,
    *,
    grad_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Apply one step in place with the fastest usable backend, in one call for many tensors.

    Args:
        work: Contiguous tensors on one device. All entries have the same dtypes and the same
            optional tensors.
        scalars: From `rule.step_scalars`, `device_scalars` or, several, `together`.
        grad_scale: As for `rule.update_reference_`.
        skip: One element on the tensors' device; if it is not zero, nothing is changed.
        fused: True requires a compiled kernel, False excludes it, None takes it if it is usable.

    Raises:
        RuntimeError: `fused` is True and no compiled kernel supports these tensors.
    """
    if not work:
        return
    kernel = None if fused is False else _kernel(work[0].param.device)
    if isinstance(kernel, TritonKernel) and kernel.updates(work):
        kernel.update_(work, scalars, grad_scale=grad_scale, skip=skip)
        return
    if isinstance(scalars, DeviceScalars):
        scalars = scalars.on_host()
    several = scalars if isinstance(scalars, list) else [scalars]
    # The C++ kernel returns False, having done nothing, for dtypes that it does not support.
    if isinstance(kernel, CppKernel) and kernel.update_(work, several, grad_scale, skip):
        return
    if fused:
        first = work[0].param
        raise RuntimeError(
            f"fused=True, but no compiled kernel serves {first.dtype} tensors on {first.device}."
        )
    for operands in work:
        eager.update_(operands, several[operands.scalars], grad_scale=grad_scale, skip=skip)


def again(work: Sequence[Operands]) -> Again | None:
    """Return the update of these tensors in this and later steps, for `update_` with less to do.

    Returns:
        None if it has no advantage: it has one where Triton updates them.
    """
    kernel = _kernel(work[0].param.device)
    return kernel.again(work) if isinstance(kernel, TritonKernel) and kernel.updates(work) else None


def ordered_sum_(
    out: Tensor, pieces: Sequence[Tensor], bins: Tensor | None = None, *, accumulate: bool = False
) -> None:
    """Add tensors in the given order, rounding after every addition.

    Args:
        out: (n,), float32 or float64; may be one of `pieces`.
        pieces: Tensors (n,) of one dtype, widened to that of `out` before they are added.
        bins: Receives the squares of the sums, as from `squared_norm_bins_`, or None.
        accumulate: Add to the present values of `out`, as if it were the first piece.
    """
    if out.dtype == compute_dtype(pieces[0].dtype):
        kernel = _reductions(out.device)
        if isinstance(kernel, TritonReductions):
            kernel.ordered_sum_(out, pieces, bins, accumulate=accumulate)
            return
        if isinstance(kernel, CppKernel) and kernel.supports(out, *pieces):
            kernel.ordered_sum_(out, pieces, bins, accumulate=accumulate)
            return
    eager.ordered_sum_(out, pieces, accumulate=accumulate)
    if bins is not None:
        norm.add_squares_(bins, out)


def squared_norm_bins_(bins: Tensor, *values: Tensor) -> None:
    """Add the squares of contiguous tensors to `bins`, exactly; see `norm.add_squares_`.

    Args:
        bins: (norm.NUM_WORDS,), int64.
        values: Of one dtype, on one device. Many are one launch on a GPU.
    """
    kernel = _reductions(bins.device)
    if isinstance(kernel, TritonReductions):
        kernel.add_squares_(bins, values)
        return
    for each in values:
        if isinstance(kernel, CppKernel) and kernel.supports(each):
            kernel.add_squares_(bins, each)
        else:
            norm.add_squares_(bins, each)


def encode_int8_(wire: Tensor, values: Tensor, error: Tensor) -> None:
    """Write gradients in 8 bits, and keep what that has cut off; see `eager.encode_int8_`."""
    kernel = _kernel(values.device)
    if isinstance(kernel, TritonKernel) and kernel.encodes(wire, values, error):
        kernel.encode_int8_(wire, values, error)
    else:
        eager.encode_int8_(wire, values, error)


def sum_int8_(
    out: Tensor, wires: Sequence[Tensor], bins: Tensor | None, *, accumulate: bool
) -> None:
    """Add what `encode_int8_` has written, in the given order; otherwise as `ordered_sum_`."""
    kernel = _reductions(out.device)
    if isinstance(kernel, TritonReductions) and out.dtype == torch.float32:
        kernel.ordered_sum_(out, wires, bins, accumulate=accumulate, codes=True)
    else:
        ordered_sum_(out, list(map(eager.decode_int8, wires)), bins, accumulate=accumulate)


def checksums(flats: Sequence[Tensor], firsts: Sequence[int]) -> Tensor:
    """Return `eager.checksum` of each buffer: (len(flats),), int64, on their device.

    Args:
        flats: Contiguous, multiples of 8 bytes; on a GPU they begin at multiples of 16.
        firsts: The position of the first 64-bit word of each among all that are added up.
    """
    kernel = _reductions(flats[0].device)
    if isinstance(kernel, TritonReductions):
        return kernel.checksums(flats, firsts)
    pairs = zip(flats, firsts, strict=True)
    if isinstance(kernel, CppKernel) and flats[0].is_cpu:
        return torch.tensor([kernel.checksum(*pair) for pair in pairs])
    return torch.stack([eager.checksum(*pair) for pair in pairs])


def meetings(pads: Sequence[Tensor], rank: int, timeout: timedelta) -> Meetings:
    """Return how ranks meet on their GPUs; the arguments are those of `Meetings`.

    Raises:
        RuntimeError: Triton does not serve them.
    """
    kernel = _kernel(pads[rank].device)
    if not isinstance(kernel, TritonKernel):
        raise RuntimeError(f"ranks can meet on GPUs by Triton alone, but {kernel}.")
    return Meetings(pads, rank, timeout, interprets=kernel.interprets)


def grad_scales(
    bins: Tensor, *, world_size: int, loss_scale: Tensor | None, limit: float | None
) -> Tensor:
    """Return the norm of the mean gradient, and the factors on summed ones; see `eager`."""
    kernel = _reductions(bins.device)
    if isinstance(kernel, TritonReductions):
        return kernel.grad_scales(bins, world_size, loss_scale, limit)
    return eager.grad_scales(bins, world_size=world_size, loss_scale=loss_scale, limit=limit)
