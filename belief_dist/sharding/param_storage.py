"""Parameters that were given another storage are moved back into their buckets.

Assigning to `.data` does so: `module.half().float()`, `vector_to_parameters`, SAM's and averages'
swaps. Without this, the former places would be trained in their stead, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from belief_dist.sharding.bucket import BucketBuffers, own_fragment
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.layout import Layout


class ParamStorage:
    """Knows where every parameter lies, and looks whether it still does.

    Looking costs a call into torch for each parameter, so it is done once for a backward pass and
    once for a step, not where a parameter is used.

    Attributes:
        is_lent: Whether parameters have other values for a while, which no master may take.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        layout: Layout,
        buckets: Sequence[BucketBuffers],
        label: Callable[[int], str],
    ) -> None:
        """Remember where the parameters lie now: in their buckets."""
        self._local = [local_part(param) for param in params]
        self._layout = layout
        self._buckets = buckets
        self._label = label
        self._addresses = list(map(Tensor.data_ptr, self._local))
        self.is_lent = False

    def check_not_lent(self) -> None:
        """Refuse what must see the weights themselves.

        Raises:
            RuntimeError: Parameters have other values at present.
        """
        if self.is_lent:
            raise RuntimeError(
                "the parameters are their averages inside `with optimizer.averaged_parameters():`; "
                "leave it before backward, step, saving, loading, or entering it again."
            )

    def take_over(self) -> bool:
        """Move what lies elsewhere now back to its place, with its values, masters included.

        Returns:
            Whether there was any.

        Raises:
            ValueError: A parameter has another dtype, device or shape than its place.
            RuntimeError: See `check_not_lent`.
        """
        self.check_not_lent()
        moved = self._moved()
        for index in moved:
            self._take_over(index)
        return bool(moved)

    def put_back(self) -> None:
        """Move what lies elsewhere now back to its place, which keeps the values that it has."""
        for index in self._moved():
            buffers, position = self._place(index)
            self._local[index].data = buffers.view(buffers.flat_param, position)
            if buffers.flat_grad is not None:
                buffers.grad_views[position].data = buffers.view(buffers.flat_grad, position)

    def _moved(self) -> list[int]:
        addresses = list(map(Tensor.data_ptr, self._local))
        if addresses == self._addresses:
            return []
        pairs = enumerate(zip(self._addresses, addresses, strict=True))
        return [index for index, (old, new) in pairs if old != new]

    def _place(self, index: int) -> tuple[BucketBuffers, int]:
        """Return a parameter's bucket, and its position in it."""
        number, slot = self._layout.place(index)
        buffers = self._buckets[number]
        return buffers, buffers.bucket.slots.index(slot)

    def _take_over(self, index: int) -> None:
        param, (buffers, position) = self._local[index], self._place(index)
        place = buffers.view(buffers.flat_param, position)
        if (param.dtype, param.device, param.shape) != (place.dtype, place.device, place.shape):
            raise ValueError(
                f"parameter {self._label(index)} is {param.dtype} of shape {tuple(param.shape)} on "
                f"{param.device} now, and was {place.dtype} of shape {tuple(place.shape)} on "
                f"{place.device} when ShardedAdaBelief was built: convert and move the model "
                f"first, and build the optimizer then."
            )
        place.copy_(param.detach())
        param.data = place
        part = own_fragment(self._layout, self._buckets, index)
        buffers.refresh_master(part.in_shard, part.in_shard + part.numel)
        if buffers.flat_grad is not None:
            # Modules convert gradients with their parameters, in the same way.
            grad, place = buffers.grad_views[position], buffers.view(buffers.flat_grad, position)
            if grad.data_ptr() != place.data_ptr():
                place.copy_(grad)
                grad.data = place
