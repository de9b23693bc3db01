"""Data and random numbers of a step of numbered micro-batches, whatever ranks compute them.

With `ShardedAdaBelief(..., micro_batches=V)`, training has the same bits on any number of ranks if
micro-batch k has the same samples and the same random numbers there::

    sampler = MicroBatchSampler(dataset, batch_size=4, micro_batches=8)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    for epoch in range(sampler.epoch, epochs):
        sampler.set_epoch(epoch)
        for step, micro_batches in sampler.steps(loader):
            optimizer.zero_grad()
            for k, batch in micro_batches:
                with seeded(seed, step, k):
                    loss(model, batch).backward()
            optimizer.step()

The position of the sampler, `state_dict`, goes into a checkpoint beside model and optimizer.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from belief_dist.options import shown

Batch = TypeVar("Batch")


class MicroBatchSampler(Sampler[list[int]]):
    """Deals the samples of a map-style dataset to numbered micro-batches, for a DataLoader.

    An epoch has one order of samples, and each step of it takes the next ``micro_batches`` times
    ``batch_size``: micro-batch k those at ``[k * batch_size, (k + 1) * batch_size)`` among these. A
    rank gets its own, numbers ``rank``, ``rank + world_size``, ... Neither order nor micro-batches
    depend on how many ranks there are, so that a run may continue at any number in mid-epoch.

    What is left at the end of an epoch, too little for a step, is dropped; or, with
    ``drop_last=False``, it is a step of smaller micro-batches, as even as can be. If there are
    fewer samples left than micro-batches, the last step takes them in, one more in each of its
    first micro-batches.

    Args:
        dataset: The dataset, or its length.
        batch_size: Samples of a micro-batch.
        micro_batches: Of a step, over all ranks: what the optimizer has as `micro_batches`.
        shuffle: Draw a new order in every epoch; otherwise it is that of the dataset.
        seed: Of the orders.
        drop_last: See above.
        rank: This one among the ranks that train; None asks torch.distributed, and is 0 without it.
        world_size: How many they are; given with `rank`, or not at all.

    Attributes:
        epoch: The epoch under way, from 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, or there are too few samples for a step.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        micro_batches: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """See the class."""
        length = dataset if isinstance(dataset, int) else len(dataset)
        for name, number in (("batch_size", batch_size), ("micro_batches", micro_batches)):
            _check_integer(name, number, at_least=1)
        _check_integer("the length of the dataset", length, at_least=0)
        _check_integer("seed", seed)
        for name, switch in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(switch, bool):
                raise TypeError(f"{name} must be True or False, got {shown(switch)}.")
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size go together: pass both or none of them.")
        if rank is None or world_size is None:
            joined = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        _check_integer("world_size", world_size, at_least=1)
        _check_integer("rank", rank, at_least=0)
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size={world_size}, got {rank}.")
        self._rank, self._world_size = rank, world_size
        # What must be alike for a position to mean the same; the keys of `state_dict`.
        self._plan: dict[str, int | bool] = {
            "length": length,
            "batch_size": batch_size,
            "micro_batches": micro_batches,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
        }
        whole, rest = divmod(length, batch_size * micro_batches)
        least = batch_size * micro_batches if drop_last else micro_batches
        if length < least:
            raise ValueError(
                f"a step takes {least} samples at least (batch_size={batch_size}, micro_batches="
                f"{micro_batches}, drop_last={drop_last}), and the dataset has {length}; make "
                f"them smaller{', or set drop_last=False' if drop_last else ''}."
            )
        # How many samples each step has.
        self._sizes = [batch_size * micro_batches] * whole
        if not drop_last and rest >= micro_batches:
            self._sizes.append(rest)
        elif not drop_last:
            self._sizes[-1] += rest
        self.epoch = 0
        self._done = 0  # steps of the epoch

    # - Position

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""
        return len(self._sizes)

    @property
    def step(self) -> int:
        """The number of the step under way, from 0, counted over all epochs."""
        return self.epoch * len(self._sizes) + self._done

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; one that is under way goes on.

        Raises:
            TypeError: `epoch` is no integer.
            ValueError: It is negative.
        """
        _check_integer("epoch", epoch, at_least=0)
        if epoch != self.epoch:
            self.epoch, self._done = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and on what it rests: plain numbers, the same on every rank.

        A step counts as soon as all its micro-batches were taken from `steps`, so save between
        `optimizer.step()` and the next one. Batches that workers have loaded ahead do not count.
        """
        return {**self._plan, "epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a position that a sampler has saved on any rank of any number of ranks.

        Raises:
            TypeError: This is no state of a sampler.
            ValueError: It was saved with another dataset's length or other arguments, which would
                give samples twice, or never; or its position is not in the epoch.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"MicroBatchSampler.load_state_dict needs a dict, got {shown(state_dict)}."
            )
        for name, here in self._plan.items():
            saved = state_dict.get(name)
            if type(saved) is not type(here) or saved != here:
                raise ValueError(
                    f"{name} is {here} here, and the position was saved with {shown(saved)}; build "
                    f"the sampler as it was, as samples would come twice or never."
                )
        epoch, done = state_dict.get("epoch"), state_dict.get("done")
        _check_integer("epoch of the saved position", epoch, at_least=0)
        _check_integer("done of the saved position", done, at_least=0)
        assert isinstance(epoch, int) and isinstance(done, int)
        if done > len(self._sizes):
            raise ValueError(
                f"the position is damaged: step {done} of an epoch of {len(self._sizes)}."
            )
        self.epoch, self._done = epoch, done

    # - Samples

    def _order(self) -> list[int]:
        length = self._plan["length"]
        if not self._plan["shuffle"]:
            return list(range(length))
        generator = torch.Generator().manual_seed(_seed_of(self._plan["seed"], self.epoch))
        order: list[int] = torch.randperm(length, generator=generator).tolist()
        return order

    def _share(self) -> range:
        """Return the numbers of this rank's micro-batches."""
        return range(self._rank, self._plan["micro_batches"], self._world_size)

    def __len__(self) -> int:
        """Return how many micro-batches this rank has from here to the end of the epoch."""
        return len(self._share()) * (len(self._sizes) - self._done)

    def __iter__(self) -> Iterator[list[int]]:
        """Give the samples' indices of each of them."""
        order = self._order()
        count = self._plan["micro_batches"]
        first = sum(self._sizes[: self._done])
        for size in self._sizes[self._done :]:
            least, more = divmod(size, count)  # the first ones have one more
            for k in self._share():
                start = first + k * least + min(k, more)
                yield order[start : start + least + (k < more)]
            first += size

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Iterator[tuple[int, Batch]]]]:
        """Give each step from here to the end of the epoch, which then is over.

        Args:
            loader: Gives this rank's batches in the order of the sampler, which it was built with.

        Yields:
            The number of the step, counted over all epochs; and this rank's micro-batches of it,
            with the number k of each. On a rank that has none, they are empty. All must be taken.

        Raises:
            ValueError: `loader` has another sampler.
            RuntimeError: It has too few batches, or a step's were not all taken.
        """
        if getattr(loader, "batch_sampler", self) is not self:
            raise ValueError("pass the loader that was built with batch_sampler=this sampler.")
        batches = iter(loader)
        while self._done < len(self._sizes):
            number, done = self.step, self._done
            yield number, self._take(batches)
            if self._done != done + 1:
                raise RuntimeError(
                    f"step {number} has micro-batches that were not taken: a rank must compute all "
                    f"of its {len(self._share())}, each by one backward pass."
                )
        self.epoch, self._done = self.epoch + 1, 0

    def _take(self, batches: Iterator[Batch]) -> Iterator[tuple[int, Batch]]:
        for k in self._share():
            try:
                batch = next(batches)
            except StopIteration:
                raise RuntimeError(
                    f"the loader has no batch for micro-batch {k} of step {self.step}; it must "
                    f"give all that its sampler does, in this order."
                ) from None
            yield k, batch
        self._done += 1


@contextmanager
def seeded(seed: int, step: int, micro_batch: int) -> Iterator[None]:
    """Give a micro-batch random numbers of its own, which do not depend on the rank.

    Inside, torch's generators of the CPU and of the current CUDA device (if CUDA is in use
    already), Python's `random`, and NumPy's legacy generator (if it is imported) begin anew, from a
    seed made of the three numbers. Afterwards all of them are as they were. Forward and backward
    belong inside it: checkpointed activations draw again in backward.

    Args:
        seed: Of the run.
        step: Number of the step, counted over all epochs.
        micro_batch: Number of the micro-batch in its step.

    Raises:
        TypeError: One of them is no integer.
    """
    for name, number in (("seed", seed), ("step", step), ("micro_batch", micro_batch)):
        _check_integer(name, number)
    drawn = _seed_of(seed, step, micro_batch)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    numpy: Any = sys.modules.get("numpy")
    before, numpy_before = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
        torch.default_generator.manual_seed(drawn)
        if on_gpu:
            torch.cuda.manual_seed(drawn)
        random.seed(drawn)
        if numpy:
            numpy.random.seed(drawn)
        try:
            yield
        finally:
            random.setstate(before)
            if numpy:
                numpy.random.set_state(numpy_before)


def _seed_of(*numbers: int) -> int:
    # 32 bits are what all of these generators take.
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _check_integer(name: str, value: Any, at_least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)}.")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}.")
