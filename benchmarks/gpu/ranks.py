"""Ranks that share one GPU, against one process on the CPU that adds their gradients in order.

One rank talks by NCCL; several by gloo, which carries CUDA tensors: NCCL refuses two ranks on a
GPU. What they run is `AllToAll`, as with NCCL on several GPUs, and then `SymmetricMemory`: torch
lets ranks of one GPU map each other's memory where an environment variable asks for it.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from belief_dist import ShardedAdaBelief, kernels
from belief_dist.engine_options import EngineOptions
from belief_dist.kernels import eager
from belief_dist.options import DEFAULTS
from belief_dist.sharding.grad_codec import BLOCK, BLOCK_BYTES
from belief_dist.sharding.symmetric_memory import SymmetricMemory
from benchmarks.gpu.cases import SAME, Case, Outcome, Size, describe
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.reference import Reference, backward

_TIMEOUT = datetime.timedelta(seconds=40)
_STEPS = 4
BF16, U8 = torch.bfloat16, torch.uint8
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": BF16},
    "bfloat16, stage 2, clipping": {"dtype": BF16, "stage": 2, "max_grad_norm": 0.5},
    "bfloat16, remainder, 8-bit states": {"dtype": BF16, "master": "remainder", "state_dtype": U8},
    "bfloat16, remainder8, 8-bit states": {
        "dtype": BF16,
        "master": "remainder8",
        "state_dtype": U8,
    },
    "bfloat16 states, clipping": {"state_dtype": BF16, "max_grad_norm": 0.5},
    "no overlap": {"overlap": False},
    "bfloat16, offload": {"dtype": BF16, "offload": "cpu"},
    "bfloat16 sent": {"reduce_dtype": BF16},
    "int8 sent, clipping": {"reduce_dtype": torch.int8, "max_grad_norm": 0.5},
}
# The same without messages.
PEERS = {
    f"{name}, peers' memory": {**FORMS[name], "shared_memory": "cuda"}
    for name in (
        "float32",
        "bfloat16, stage 2, clipping",
        "bfloat16, remainder, 8-bit states",
        "int8 sent, clipping",
    )
}


class Wire:
    """What arrives of each rank's gradients, in the form in which they travel."""

    def __init__(self, ranks: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        counts = [max(int(torch.Size(shape).numel()), 0) for shape in SHAPES]
        padded = [-(-count // BLOCK) * BLOCK for count in counts]
        self._errors = [[torch.zeros(count) for count in padded] for _ in range(ranks)]

    def arrives(self, rank: int, index: int, grad: Tensor) -> Tensor:
        if self._dtype != torch.int8:
            return grad.to(self._dtype)
        error = self._errors[rank][index]
        values = torch.zeros_like(error)
        values[: grad.numel()] = grad.reshape(-1)
        wire = torch.empty(len(error) // BLOCK * BLOCK_BYTES, dtype=torch.uint8)
        kernels.encode_int8_(wire, values, error)
        return eager.decode_int8(wire)[: grad.numel()].view(grad.shape)


def first_difference(form: dict[str, Any], device: str) -> str | None:
    """Train on all ranks; return what differs first from the reference, on this rank."""
    options = dict(form)
    dtype = options.pop("dtype", torch.float32)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    reference = Reference(
        make_params(dtype, seed=0),
        [{**DEFAULTS, **HYPER}] * len(SHAPES),
        remainders=EngineOptions(master=options.get("master", "fp32")).remainder_dtype,
        state_dtype=options.get("state_dtype", torch.float32),
    )
    # The constructor must spread the first rank's.
    params = [nn.Parameter(p.detach().to(device)) for p in make_params(dtype, seed=rank)]
    optimizer = ShardedAdaBelief(params, bucket_bytes=4096, **options, **HYPER)
    reads = isinstance(optimizer.comm, SymmetricMemory)
    if options.get("shared_memory") == "cuda" and not reads:
        raise RuntimeError("GPUs do not read each other's memory: the log says why not")
    wire = Wire(ranks, options.get("reduce_dtype") or dtype)
    found = None
    for step in range(_STEPS):
        grads = [
            [make_grad(shape, step, of, i).to(dtype) for i, shape in enumerate(SHAPES)]
            for of in range(ranks)
        ]
        backward(params, [grad.to(device) for grad in grads[rank]])
        optimizer.step()
        arrived = [[wire.arrives(of, i, g) for i, g in enumerate(grads[of])] for of in range(ranks)]
        reference.step(arrived, options.get("max_grad_norm"), ranks)
        found = found or _difference(optimizer, params, reference, step)
        optimizer.zero_grad()
    return found


def _difference(
    optimizer: ShardedAdaBelief, params: Sequence[nn.Parameter], reference: Reference, step: int
) -> str | None:
    norms = float(optimizer.grad_norm), reference.norm.item()
    found = [] if norms[0] == norms[1] else [f"norm {norms[0]!r} is not {norms[1]!r}"]
    for i, (param, expected) in enumerate(zip(params, reference.low, strict=True)):
        if not torch.equal(param.detach().cpu(), expected):
            found.append(f"parameter {i}")
    names = list(reference.states[0])
    held = [{k: optimizer.state[p][k].cpu() for k in names} for p in params]
    everyone = optimizer.comm.exchange(held)
    for i, states in enumerate(reference.states):
        for name, expected in states.items():
            whole = torch.cat([theirs[i][name] for theirs in everyone])
            if not torch.equal(whole, expected.reshape(-1)):
                found.append(f"{name} of parameter {i}")
    return f"step {step}: {found[0]}" if found else None


def _rank(rank: int, ranks: int, backend: str, device: str, names: list[str], folder: str) -> None:
    """Write a line for each form: its name, and what differs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )
    with Path(folder, f"{rank}.jsonl").open("w", buffering=1) as file:
        for name in names:
            try:
                form = {**FORMS, **PEERS}[name]
                line = {"name": name, "differs": first_difference(form, device)}
            except Exception as error:  # the others wait for this rank: all have to end
                traceback.print_exc()
                line = {"name": name, "error": describe(error)}
            file.write(json.dumps(line) + "\n")
            if "error" in line:
                os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def compare(
    ranks: int, backend: str, device: str, names: Sequence[str] = tuple(FORMS)
) -> list[Outcome]:
    """Return a row for each form."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ended = None
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, backend, device, list(names), folder)
        try:
            multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        except Exception as error:  # it ends the other ranks
            ended = describe(error)
        found = [_lines(Path(folder, f"{rank}.jsonl")) for rank in range(ranks)]
    rows = []
    for name in names:
        of_ranks = [each[name] for each in found if name in each]
        errors = [line["error"] for line in of_ranks if "error" in line]
        if errors or len(of_ranks) < ranks:
            note = errors[0] if errors else f"did not get there: {ended}"
            rows.append({"name": name, "status": "failed", "note": note})
            continue
        differs = [line["differs"] for line in of_ranks if line["differs"]]
        notes = {"note": differs[0]} if differs else {}
        rows.append({"name": name, "steps": _STEPS, SAME: not differs, **notes})
    return rows


def _lines(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    return {line["name"]: line for line in map(json.loads, file.read_text().splitlines())}


def cases(device: str, size: Size) -> list[Case]:
    found = []
    for ranks in size.ranks:
        # NCCL refuses two ranks on one GPU.
        backend = "nccl" if device == "cuda" and ranks == 1 else "gloo"
        run = partial(compare, ranks, backend, device)
        table = f"{ranks} rank{'s' * (ranks > 1)}, {backend}"
        found.append(Case(table, f"{ranks} {backend}", run))
        if device == "cuda" and ranks > 1:
            peers = partial(compare, ranks, backend, device, tuple(PEERS))
            found.append(Case(table, f"{ranks} {backend}, peers' memory", peers))
    return found
