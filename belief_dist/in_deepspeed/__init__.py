"""ShardedAdaBelief as the optimizer of a DeepSpeed engine at ZeRO stage 0.

The engine hands itself over while it is built (`integrations.deepspeed.watch_engines`), and `enter`
gives engine and optimizer the classes `ShardedEngine` and `EngineOptimizer`: subclasses of their
own, which differ where both would do the same work, or neither. DeepSpeed itself stays as it is.
"""

from belief_dist.in_deepspeed.enter import enter

__all__ = ["enter"]
