"""Shows how a training script, or a DeepSpeed JSON, takes AdaBelief where it has Adam or AdamW.

A script is read as text and never run: calls are found by the names that it imports. What stays the
same stays, what AdaBelief has no use for goes, and what was a default of the other one is written
out. Nothing is edited.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from belief_dist.deepspeed_config import read_config
from belief_dist.options import DEFAULTS, OF_ADAM

# Optimizers by their whole names; the value is the weight decay that they have by default.
_ADAMW = {
    "torch.optim.AdamW": 0.01,
    "torch.optim.adamw.AdamW": 0.01,
    "transformers.AdamW": 0.0,
    "transformers.optimization.AdamW": 0.0,
    "bitsandbytes.optim.AdamW": 0.01,
    "bitsandbytes.optim.AdamW8bit": 0.01,
    "bitsandbytes.optim.PagedAdamW8bit": 0.01,
    "torchao.optim.AdamW8bit": 0.01,
    "apex.optimizers.FusedAdam": 0.0,
    "deepspeed.ops.adam.FusedAdam": 0.0,
    "deepspeed.ops.adam.DeepSpeedCPUAdam": 0.0,
}
_ADAM = ("torch.optim.Adam", "torch.optim.adam.Adam", "bitsandbytes.optim.Adam8bit")
_OFFICIAL = ("adabelief_pytorch.AdaBelief", "adabelief_pytorch.AdaBelief.AdaBelief")
_ZERO = "torch.distributed.optim.ZeroRedundancyOptimizer"
_POSITIONS = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
# What AdaBelief takes as they do.
_KEPT = ("params", "lr", "betas", "weight_decay", "amsgrad", "maximize", "foreach", "capturable")
_OFFICIALS = ("weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd")
_DEEPSPEEDS = {"adam", "adamw", "fusedadam", "deepspeedcpuadam"}

_EPS = (
    "Adam's eps is left out: AdaBelief adds its own to s in every step, and with 1e-8 it trains as "
    "SGD does; the default is 1e-16"
)
_LR = (
    "keep the learning rate and the warm-up: AdamW's best ones were AdaBelief's, too "
    "(docs/evidence.md)"
)
# What else a script may do, by the last part of a call's name.
_ASIDE = {
    "DistributedDataParallel": "AdaBelief works under it. ShardedAdaBelief(model."
    "named_parameters(), ...) of the bare model, in the place of both, cuts states over the ranks",
    "clip_grad_norm_": "stays right with AdaBelief; ShardedAdaBelief clips by max_grad_norm=, as "
    "gradients are reduced when this is called",
    "TrainingArguments": "the Trainer's optim= has no AdaBelief: pass optimizer_cls_and_kwargs="
    "(belief_dist.AdaBelief, {...}) to the Trainer, or name it in a DeepSpeed JSON",
    "fully_shard": "AdaBelief works on FSDP2's parameters as they are",
    "unscale_": "stays right with AdaBelief; ShardedAdaBelief unscales inside step, and refuses it",
}


class Note(NamedTuple):
    """Something to know about a change, or about what is near it.

    Attributes:
        line: Of the file; 0 for the whole of it.
        text: A sentence.
    """

    line: int
    text: str


class Migration(NamedTuple):
    """How a file takes AdaBelief.

    Attributes:
        before: The file's text; of JSON, in the layout of `after`.
        after: The same with AdaBelief.
        notes: In the order of lines.
        name: Of the file.
    """

    before: str
    after: str
    notes: list[Note]
    name: str

    def diff(self) -> str:
        """Return the change as a unified diff, or nothing."""
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        names = self.name, f"{self.name}, with AdaBelief"
        return "".join(difflib.unified_diff(before, after, *names, n=2))


def migrate(path: Path) -> Migration:
    """Return how a file takes AdaBelief.

    Args:
        path: A Python script, or a DeepSpeed JSON.

    Raises:
        ValueError: It is neither.
        OSError: It cannot be read.
    """
    if path.suffix == ".json":
        return _migrate_json(read_config(path), path.name)
    try:
        text = path.read_text()
        tree = ast.parse(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file.") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no Python script: {error}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read.") from None
    return _Script(text, tree, path.name).migrate()


# - Scripts


class _Script:
    def __init__(self, text: str, tree: ast.Module, name: str) -> None:
        self._text, self._tree, self._name = text, tree, name
        self._imported = dict(_imports(tree))
        self._notes: list[Note] = []
        lines = text.encode().splitlines(keepends=True)
        self._starts = list(accumulate(map(len, lines), initial=0))  # of the lines, in bytes

    def migrate(self) -> Migration:
        changes: list[tuple[int, int, str]] = []  # from and to which byte, and what comes there
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.Call):
                continue
            called = self._name_of(node.func)
            call = self._rewritten(node, called)
            if call is not None:
                changes.append((*self._extent(node), call))
            elif (aside := _ASIDE.get(called.rpartition(".")[2])) is not None:
                self._note(node, f"{ast.unparse(node.func)}: {aside}")
        whole = self._text.encode()
        for start, stop, call in sorted(changes, reverse=True):
            whole = whole[:start] + call.encode() + whole[stop:]
        after = whole.decode()
        if changes and "belief_dist" not in self._imported.values():
            after = self._with_import(after)
        return Migration(self._text, after, sorted(set(self._notes)), self._name)

    def _note(self, node: ast.AST, text: str) -> None:
        self._notes.append(Note(getattr(node, "lineno", 0), text))

    def _name_of(self, node: ast.AST) -> str:
        """Return the whole name of what is called, as far as imports tell it."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return parts[0] if parts else ""
        return ".".join([self._imported.get(node.id, node.id), *reversed(parts)])

    def _rewritten(self, node: ast.Call, called: str) -> str | None:
        """Return the call of AdaBelief in the place of an optimizer's; None if it is none."""
        decay = _ADAMW.get(called, 0.0)
        if called == _ZERO:
            self._note(
                node,
                "ZeroRedundancyOptimizer: ShardedAdaBelief(model.named_parameters(), ...) of the "
                "bare model takes the place of it and of DistributedDataParallel",
            )
            return None
        if called not in {*_ADAMW, *_ADAM, *_OFFICIAL}:
            return None
        if len(node.args) > len(_POSITIONS) or any(isinstance(a, ast.Starred) for a in node.args):
            self._note(node, f"{called} is called with arguments that only a run knows: by hand")
            return None
        given: dict[str, ast.expr] = dict(zip(_POSITIONS, node.args, strict=False))
        unknown = [each.value for each in node.keywords if each.arg is None]
        given |= {each.arg: each.value for each in node.keywords if each.arg is not None}
        kept = [*_KEPT, *(("eps", *_OFFICIALS) if called in _OFFICIAL else ())]
        arguments = {name: self._source(given[name]) for name in kept if name in given}
        if called in _OFFICIAL and "rectify" not in arguments:
            arguments["rectify"] = "True"
            self._note(node, "rectify=True is the official package's default, and not ours")
        if decay and "weight_decay" not in arguments and not unknown:
            arguments["weight_decay"] = repr(decay)
            self._note(node, f"weight_decay={decay} is the default of {called}; ours is 0")
        if called in _ADAM and "weight_decay" in arguments:
            arguments["weight_decouple"] = "False"
            self._note(node, "weight_decouple=False adds the decay to the gradient, as Adam does")
        if called not in _OFFICIAL:
            self._note(node, _EPS)
            self._note(node, _LR)
        if unknown:
            usual = f" ({called} has {decay} by default)" if decay else ""
            self._note(
                node,
                f"what ** brings must have no eps and no option of Adam's alone, and may have "
                f"weight_decay{usual}",
            )
        dropped = sorted(given.keys() - arguments.keys() - {"eps"})
        if dropped:
            self._note(node, f"{', '.join(dropped)}: AdaBelief has no such option, or needs none")
        listed = [
            value if name == "params" else f"{name}={value}" for name, value in arguments.items()
        ]
        listed += [f"**{self._source(value)}" for value in unknown]
        return f"belief_dist.AdaBelief({', '.join(listed)})"

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text, node) or ast.unparse(node)

    def _extent(self, node: ast.expr) -> tuple[int, int]:
        """Return from and to which byte of the text a call reaches."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _with_import(self, text: str) -> str:
        """Return a script that imports belief_dist, too, before its first other import."""
        first = [
            node
            for node in self._tree.body
            if getattr(node, "module", None) != "__future__"
            and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        imports = [node for node in first if isinstance(node, (ast.Import, ast.ImportFrom))]
        at = (imports or first)[0].lineno
        lines = text.splitlines(keepends=True)
        return "".join([*lines[: at - 1], "import belief_dist\n", *lines[at - 1 :]])


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each imported name with the whole name of what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


# - DeepSpeed's JSON


def _migrate_json(config: Mapping[str, Any], name: str) -> Migration:
    optimizer = config.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    before = json.dumps(config, indent=2) + "\n"
    if not isinstance(kind, str) or kind.lower() not in _DEEPSPEEDS:
        return Migration(before, before, [], name)
    assert isinstance(optimizer, dict)
    notes = [Note(0, f"optimizer: {_EPS}"), Note(0, f"optimizer: {_LR}")]
    params = dict(optimizer.get("params") or {})
    if params.pop("adam_w_mode", True) is False:
        params["weight_decouple"] = False
        notes.append(Note(0, "weight_decouple: false is what adam_w_mode: false was"))
    params.pop("eps", None)
    dropped = [each for each in params if each in OF_ADAM or each not in DEFAULTS]
    for each in dropped:
        del params[each]
    if dropped:
        notes.append(Note(0, f"{', '.join(dropped)}: AdaBelief has no such option, or needs none"))
    changed = {**config, "optimizer": {**optimizer, "type": "AdaBelief", "params": params}}
    return Migration(before, json.dumps(changed, indent=2) + "\n", notes, name)
