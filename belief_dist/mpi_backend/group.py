"""A process group of torch.distributed over an MPI communicator."""

# mypy: disable-error-code="override,assignment,call-arg"
# torch's stubs give each operation a second signature, which torch itself never calls, and
# lack the constructor without a store.

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from belief_dist.mpi_backend.exchange import Exchange, receive, send
from belief_dist.mpi_backend.messages import (
    MAX_COUNT,
    Staging,
    bytes_spec,
    mpi_op,
    parts,
    values_spec,
)
from belief_dist.mpi_backend.reductions import Reductions, widened
from belief_dist.mpi_backend.watch import WATCH
from belief_dist.mpi_backend.work import PROGRESS, CoalescedWork, Health, MpiWork

_Start = Callable[[Staging], Sequence[MPI.Request]]


def create_group(options: Any) -> MpiProcessGroup:
    """Create a process group; torch calls this on all its ranks.

    Args:
        options: torch's `_DistributedBackendOptions`.

    Raises:
        RuntimeError: MPI was initialized without MPI_THREAD_MULTIPLE, or the ranks do not belong to
            one MPI job.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"the mpi4py backend needs MPI_THREAD_MULTIPLE (waiting and progress call MPI from "
            f"several threads), but MPI provides thread level {MPI.Query_thread()} of "
            f"{MPI.THREAD_MULTIPLE}; leave mpi4py.rc.thread_level at 'multiple' and use an MPI "
            f"library that supports it."
        )
    rank, size, store = options.group_rank, options.group_size, options.store
    # The order of ranks may differ from MPI's. They are exchanged through the store and not by MPI
    # because the store has a timeout, unlike MPI_Comm_create_group.
    store.set_timeout(options.timeout)
    store.set(f"mpi_rank/{rank}", str(MPI.COMM_WORLD.Get_rank()))
    world = [int(store.get(f"mpi_rank/{r}")) for r in range(size)]
    if len(set(world)) < size or max(world) >= MPI.COMM_WORLD.Get_size():
        raise RuntimeError(
            f"the {size} ranks of this group are {world} in MPI, whose world has "
            f"{MPI.COMM_WORLD.Get_size()}: they are not processes of one MPI job. Start them with "
            f"the mpirun (or srun) of the MPI library that mpi4py loads, which is "
            f"{MPI.Get_library_version().split(chr(10))[0].strip(chr(0))}."
        )
    what = f"making the mpi4py group {options.group_id!r} of MPI's ranks {world}"
    with WATCH.limit(options.timeout, what):
        comm = _communicator(world, options.group_id)
        return MpiProcessGroup(comm, options.group_id, options.timeout)


def _communicator(ranks: list[int], name: str) -> MPI.Intracomm:
    everyone = MPI.COMM_WORLD.Get_group()
    members = everyone.Incl(ranks)
    # MPI guarantees tags up to 32767. Different ones keep groups apart that are created at once.
    tag = zlib.crc32(name.encode()) % 32768
    comm = MPI.COMM_WORLD.Create_group(members, tag)
    members.Free()
    everyone.Free()
    return comm


class MpiProcessGroup(dist.ProcessGroup):
    """All of torch.distributed's operations, each on the tensors' own memory.

    Blocks of equal size use MPI's collectives. Lists of tensors and blocks of different sizes are
    sent as messages between pairs of ranks, which saves copying them into one buffer. 16-bit floats
    are reduced in float32 and rounded once.
    """

    def __init__(self, comm: MPI.Intracomm, name: str, timeout: timedelta) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._comm = comm
        self._lists = comm.Dup()
        # MPI's default handler aborts the job; with this one mpi4py raises MPI.Exception.
        for each in (self._comm, self._lists):
            each.Set_errhandler(MPI.ERRORS_RETURN)
        self._reductions, self._exchange = Reductions(self._comm), Exchange(self._lists)
        self._name, self._timeout = name, timeout
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._health = Health(f"mpi4py group {name!r} (rank {self._rank} of {self._size})")
        self._coalesced: list[MpiWork] | None = None

    # - Properties and lifetime

    def getBackendName(self) -> str:
        """Return the name under which the backend is registered."""
        return "mpi4py"

    @property
    def group_name(self) -> str:
        """The name that torch has given the group."""
        return self._name

    @property
    def pg_name(self) -> str:
        """The same as `group_name`."""
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        return [torch.device(kind) for kind in kinds]

    def shutdown(self) -> None:
        """Free the communicators; called by all ranks, when no operation is pending."""
        if self._health.failure is None and not MPI.Is_finalized():
            self._lists.Free()
            self._comm.Free()
            self._health.failure = "it has been destroyed."

    def abort(self) -> None:
        """Refuse all further operations."""
        self._health.fail("it has been aborted.")

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._coalesced = self._coalesced or [], None
        return CoalescedWork(works)

    # - Reductions

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Reduce each tensor in place."""
        tensors, op = _as_list(tensors), _op(opts)

        def start(staging: Staging) -> list[MPI.Request]:
            requests = []
            for tensor in tensors:
                buffer = self._reductions.in_place_buffer(staging, tensor, op)
                requests += [
                    self._comm.Iallreduce(
                        MPI.IN_PLACE, values_spec(buffer[part]), mpi_op(op, buffer.dtype)
                    )
                    for part in parts(buffer.numel())
                ]
            return requests

        return self._begin("all_reduce", tensors, start, opts)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """Reduce in place on the root; other ranks' tensors are unchanged."""
        (tensor,), op, root = tensors, _op(opts), opts.rootRank

        def start(staging: Staging) -> list[MPI.Request]:
            if self._rank == root:
                buffer = self._reductions.in_place_buffer(staging, tensor, op)
            else:
                mpi_op(op, tensor.dtype)  # the same check as on the root
                buffer = widened(staging.source(tensor))
                staging.keep_alive.append(buffer)
            kind = mpi_op(op, buffer.dtype)
            requests = []
            for part in parts(buffer.numel()):
                mine = values_spec(buffer[part])
                send, receive = (MPI.IN_PLACE, mine) if self._rank == root else (mine, None)
                requests.append(self._comm.Ireduce(send, receive, kind, root))
            return requests

        return self._begin("reduce", tensors, start, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """Reduce block r of `input` into rank r's `output`, which may be that block."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Do the same for several pairs of tensors."""
        for output, input in zip(outputs, inputs, strict=True):
            self._require_blocks("reduce_scatter", input, output)
        op = _op(opts)

        def start(staging: Staging) -> list[MPI.Request]:
            requests = []
            for output, input in zip(outputs, inputs, strict=True):
                buffer = staging.source(input)
                requests += self._reductions.reduce_scatter(staging, output, buffer, op)
            return requests

        return self._begin("reduce_scatter", outputs, start, opts)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        """Reduce tensor r of a list into rank r's output; sizes may differ."""
        (output,), (blocks,), op = outputs, inputs, _op(opts)
        self._require_count("reduce_scatter", blocks)

        def start(staging: Staging) -> list[MPI.Request]:
            kind = mpi_op(op, output.dtype)
            buffers = [widened(staging.source(block)) for block in blocks]
            staging.keep_alive += buffers
            result = self._reductions.result_buffer(staging, output, buffers, op)
            requests = []
            for root, buffer in enumerate(buffers):
                for part in parts(buffer.numel()):
                    receive = values_spec(result[part]) if root == self._rank else None
                    requests.append(
                        self._comm.Ireduce(values_spec(buffer[part]), receive, kind, root)
                    )
            return requests

        return self._begin("reduce_scatter", outputs, start, opts)

    # - Collectives that move data

    def broadcast(self, tensors: Any, opts: Any = None) -> dist.Work:
        """Give all ranks the root's tensors."""
        tensors = _as_list(tensors)
        root = 0 if opts is None else opts.rootRank

        def start(staging: Staging) -> list[MPI.Request]:
            take = staging.source if self._rank == root else staging.target
            buffers = [take(tensor) for tensor in tensors]
            return [
                self._comm.Ibcast(bytes_spec(buffer[part]), root)
                for buffer in buffers
                for part in parts(buffer.numel())
            ]

        return self._begin("broadcast", tensors, start, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """Put rank r's `input` into block r of `output`; it may be there already."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Do the same for several pairs of tensors."""
        for output, input in zip(outputs, inputs, strict=True):
            self._require_blocks("all_gather", output, input)

        def start(staging: Staging) -> list[MPI.Request]:
            requests = []
            for output, input in zip(outputs, inputs, strict=True):
                mine, flat = staging.source(input), staging.target(output)
                blocks = flat.view(self._size, -1)
                if mine.numel() > MAX_COUNT:
                    requests += self._exchange.start([mine] * self._size, list(blocks))
                    continue
                in_place = mine.data_ptr() == blocks[self._rank].data_ptr()
                send = MPI.IN_PLACE if in_place else bytes_spec(mine)
                requests.append(self._comm.Iallgather(send, bytes_spec(flat)))
            return requests

        return self._begin("all_gather", outputs, start, opts)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Put rank r's tensor into tensor r of a list; sizes may differ."""
        for blocks in outputs:
            self._require_count("all_gather", blocks)

        def start(staging: Staging) -> list[MPI.Request]:
            requests = []
            for blocks, input in zip(outputs, inputs, strict=True):
                mine = staging.source(input)
                requests += self._exchange.start(
                    [mine] * self._size, [staging.target(block) for block in blocks]
                )
            return requests

        return self._begin(
            "all_gather", [block for blocks in outputs for block in blocks], start, opts
        )

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Do the same with several; `outputs[r][i]` is rank r's tensor i."""
        return self.allgather([list(each) for each in zip(*outputs, strict=True)], inputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        opts: Any = None,
    ) -> dist.Work:
        """Send block r of `input` to rank r; blocks are rows, as many as the splits say."""

        def start(staging: Staging) -> list[MPI.Request]:
            read, written = staging.source(input), staging.target(output)
            return self._exchange.start(
                self._exchange.blocks(read, input, input_splits),
                self._exchange.blocks(written, output, output_splits),
            )

        return self._begin("all_to_all", [output], start, opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Send tensor r to rank r; sizes may differ."""
        self._require_count("all_to_all", outputs)
        self._require_count("all_to_all", inputs)

        def start(staging: Staging) -> list[MPI.Request]:
            return self._exchange.start(
                [staging.source(tensor) for tensor in inputs],
                [staging.target(tensor) for tensor in outputs],
            )

        return self._begin("all_to_all", outputs, start, opts)

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Put rank r's tensor into tensor r of the root's list."""
        root, (input,) = opts.rootRank, inputs
        blocks: list[Tensor] = outputs[0] if self._rank == root else []
        if self._rank == root:
            self._require_count("gather", blocks)

        def start(staging: Staging) -> list[MPI.Request]:
            empty = input.new_empty(0)
            outgoing = [empty] * self._size
            outgoing[root] = staging.source(input)
            incoming = [staging.target(block) for block in blocks] or [empty] * self._size
            return self._exchange.start(outgoing, incoming)

        return self._begin("gather", blocks, start, opts)

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        """Send tensor r of the root's list to rank r."""
        root, (output,) = opts.rootRank, outputs
        blocks: list[Tensor] = inputs[0] if self._rank == root else []
        if self._rank == root:
            self._require_count("scatter", blocks)

        def start(staging: Staging) -> list[MPI.Request]:
            empty = output.new_empty(0)
            incoming = [empty] * self._size
            incoming[root] = staging.target(output)
            outgoing = [staging.source(block) for block in blocks] or [empty] * self._size
            return self._exchange.start(outgoing, incoming)

        return self._begin("scatter", outputs, start, opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Complete when all ranks have called this."""
        return self._begin("barrier", [], lambda staging: [self._comm.Ibarrier()], opts)

    # - Point-to-point

    def send(self, tensors: list[Tensor], to: int, tag: int) -> dist.Work:
        """Send a tensor to a rank of the group."""
        (tensor,) = tensors

        def start(staging: Staging) -> list[MPI.Request]:
            return send(self._comm, staging.source(tensor), to, tag)

        return self._begin(f"send to rank {to}", tensors, start)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        """Receive a tensor from a rank of the group."""
        (tensor,) = tensors

        def start(staging: Staging) -> list[MPI.Request]:
            return receive(self._comm, staging.target(tensor), source, tag)

        return self._begin(f"recv from rank {source}", tensors, start)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Receive a tensor from any rank."""
        (tensor,) = tensors
        if tensor.numel() > MAX_COUNT:
            raise ValueError(
                f"recv from any rank takes up to {MAX_COUNT} elements, got {tensor.numel()}; name "
                f"the rank, or send parts."
            )

        def start(staging: Staging) -> list[MPI.Request]:
            return receive(self._comm, staging.target(tensor), MPI.ANY_SOURCE, tag)

        return self._begin("recv from any rank", tensors, start)

    # - Shared by all operations

    def _begin(
        self, what: str, results: Iterable[Tensor], start: _Start, opts: Any = None
    ) -> MpiWork:
        self._health.check()
        timeout = getattr(opts, "timeout", None)
        if timeout is None or timeout <= timedelta(0):
            timeout = self._timeout
        staging = Staging()
        try:
            with WATCH.limit(timeout, f"{self._health.name}: starting {what}"):
                requests = start(staging)
        except MPI.Exception as error:
            raise self._health.fail(
                f"{what} failed in MPI: {error.Get_error_string()}; a peer has probably ended."
            ) from error
        work = MpiWork(what, requests, staging, list(results), timeout, self._health)
        PROGRESS.add(work)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _require_blocks(self, what: str, whole: Tensor, block: Tensor) -> None:
        if whole.dtype != block.dtype or whole.numel() != block.numel() * self._size:
            raise ValueError(
                f"{what} over {self._size} ranks needs one tensor of {self._size} times as many "
                f"elements as the other and the same dtype, got {whole.numel()} of {whole.dtype} "
                f"and {block.numel()} of {block.dtype}."
            )

    def _require_count(self, what: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self._size:
            raise ValueError(
                f"{what} needs a list of {self._size} tensors, one for each rank, got "
                f"{len(tensors)}."
            )

    # Names of these operations before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _op(opts: Any) -> Any:
    return dist.ReduceOp.SUM if opts is None else opts.reduceOp
