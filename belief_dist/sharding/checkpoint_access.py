"""What checkpoints read and write of a `ShardedAdaBelief`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from belief_dist.deprecations import warn_once
from belief_dist.engine_options import EngineOptions
from belief_dist.sharding.engine import ShardEngine
from belief_dist.sharding.layout import Fragment


class CheckpointAccess:
    """The part of `ShardedAdaBelief` that a checkpoint of all ranks reads and writes."""

    _engine: ShardEngine
    _options: EngineOptions
    _label: Callable[[int], str]
    _wait: Callable[[], None]

    @torch.no_grad()
    def wait_pending(self) -> None:
        """Wait for all that is under way: parameters, states and masters are those of this step."""
        self._wait()
        self._engine.masters.follow()

    def check_states(self) -> None:
        """Compare masters and states with what the last update wrote; for this rank alone.

        Reads all of them, as saving a checkpoint does, which calls it. Without the option
        `check_states` it does nothing.

        Raises:
            RuntimeError: A bit has changed meanwhile, or the last update has read such a one.
        """
        update = self._engine.update
        if update.sums is not None:
            update.sums.compare_now()
            if said := update.describe_faults(self._label):
                raise RuntimeError(f"{said}: bits have changed since the last step has written.")

    def settle(self) -> None:
        """Wait as `wait_pending` does, the new name; warns once."""
        warn_once("ShardedAdaBelief.settle() is spelled wait_pending() now.", stacklevel=2)
        self.wait_pending()

    def fragment(self, index: int) -> Fragment:
        """Return which part of parameter number `index` this rank owns."""
        return self._engine.update.fragment(index)

    def fragment_tensors(self, index: int) -> dict[str, Tensor]:
        """Return what this rank holds of parameter number `index`, as views; after `wait_pending`.

        The keys are those of its state, without "master" and "step", and "param": the master, which
        may be the parameter itself, or with "remainder" the upper half of the master. All belong to
        the elements of `fragment`, but "wire_error" to the whole parameter.
        """
        state = self._engine.update.states[index]
        held = {key: value for key, value in state.items() if key not in ("step", "master")}
        return {**held, "param": self._engine.update.own_part(index).param}

    @torch.no_grad()
    def sync_params_from_masters(
        self, *, skipped_steps: int, seed: int, spike_history: Sequence[float] = ()
    ) -> None:
        """Make all parameters those of the masters, which have been written; called by all ranks.

        Args:
            skipped_steps: What `skipped_steps` shall be.
            seed: What the seed of the rounding noise shall be.
            spike_history: What `spike_history` shall be; empty, it begins anew.
        """
        self._engine.sync_params_from_masters()
        self._continue_from(skipped_steps, seed, spike_history)

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Copy all parameters into their masters, whether they seem to have changed or not."""
        self._wait()
        self._engine.refresh_masters()

    @property
    def spike_history(self) -> list[float]:
        """What `spike_guard` knows of the steps before, see `SpikeGuard.history`; else empty."""
        return self._engine.spikes.history()

    def _continue_from(self, skipped_steps: int, seed: int, spike_history: Sequence[float]) -> None:
        self._options = replace(self._options, seed=seed)
        self._engine.options = self._options
        self._engine.update.use_seed(seed)
        self._engine.skipped_steps = skipped_steps
        self._engine.spikes.restore(spike_history)
