"""The engine of `ShardedAdaBelief`, in the order in which a gradient meets its files.

layout, bucket      where every parameter and gradient lies
grad_reducer        hooks; buckets that fill (zero1, zero2; micro_batches counts them)
grad_codec          the form in which gradients travel
collectives         the ways to sum them over the ranks (point_to_point, hsdp; process_groups and
                    own_ranks choose), in buffers of a buffer_pool
step_consensus      what all ranks decide about the step (rank_sets, spike_guard)
shard_update        the fused update of this rank's shard (cpu_offload)
read_guard          parameters that are still on their way back

`engine` puts them together.
"""
