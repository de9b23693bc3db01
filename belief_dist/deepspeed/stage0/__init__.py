"""ShardedAdaBelief as the optimizer of a DeepSpeed engine at ZeRO stage 0."""
