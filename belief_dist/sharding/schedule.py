"""The order in which the buckets of gradients are reduced, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence


class Schedule:
    """In which order buckets are reduced, and how far the running round has come.

    Attributes:
        order: Bucket indices in the order in which reductions start; the same on all ranks.
        turn: The position of each bucket in `order`.
        rounds: How many have begun to be reduced.
        next: The position of the bucket that is reduced next.
        pending_grads: How many gradients each bucket still lacks; None before the first one.
        arrived: Which parameters' gradients have been counted.
        completed: Buckets that became full in the last backward pass, in this order.
    """

    def __init__(self, num_buckets: int, num_params: int) -> None:
        """Begin in the order of the layout."""
        self._num_params = num_params
        self.rounds = 0
        self.completed: list[int] = []
        self.set_order(range(num_buckets))
        self.begin_round()

    def set_order(self, order: Sequence[int]) -> None:
        """Start reductions in this order from the next round on."""
        self.order = list(order)
        self.turn = {bucket: turn for turn, bucket in enumerate(order)}

    def begin_round(self) -> None:
        """Count all buckets down anew."""
        self.next = 0
        self.pending_grads: list[int] | None = None
        self.arrived = [False] * self._num_params
