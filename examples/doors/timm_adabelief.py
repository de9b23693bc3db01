"""AdaBelief for timm's train.py: `python timm_adabelief.py DATA --opt beliefdist --lr 1e-3`.

Run it in timm's repository. `--opt adabelief` is timm's own class, not this one.
"""

from __future__ import annotations

import runpy

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from belief_dist import AdaBelief

# No "_" in the name: timm takes the part before it for a wrapper, such as lookahead_adam.
default_registry.register(OptimInfo(name="beliefdist", opt_class=AdaBelief, has_betas=True))

if __name__ == "__main__":
    runpy.run_path("train.py", run_name="__main__")
