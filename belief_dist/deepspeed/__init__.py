"""All that concerns DeepSpeed: AdaBelief in its ZeRO stages, ShardedAdaBelief in its engine.

Nothing here imports DeepSpeed before a script does. `patches` has the table of DeepSpeed's methods
that are wrapped.
"""
