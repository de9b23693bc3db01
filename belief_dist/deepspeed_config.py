"""Finds what is wrong in a DeepSpeed configuration, and mends what can only mean one thing.

DeepSpeed ignores a misspelled section, and with it everything in there; it takes "1e-3" for a
number in some places and fails far from the file in others; and what was right for Adam can ruin
AdaBelief. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from belief_dist.deepspeed_keys import DEVICES, SCHEDULERS, SECTIONS, TOP
from belief_dist.engine_options import EngineOptions
from belief_dist.options import (
    ALIASES,
    OF_ADAM,
    OPTION_NAMES,
    shown,
    validate_options,
    without_adams,
)
from belief_dist.options import DEFAULTS as OPTIONS

_OURS = {"adabelief": "AdaBelief", "shardedadabelief": "ShardedAdaBelief"}
_ADAMS_EPS = 1e-10  # of this size or more, eps was meant for Adam
_AUTO_NEEDS_CLIENT = (
    'is "auto", which only the Transformers Trainer and Accelerate replace; write a value (or '
    "check with --hf or --accelerate)."
)
# What the Transformers Trainer and Accelerate replace where a file says "auto".
_AUTO_IN_OPTIMIZER = ("lr", "betas", "eps", "weight_decay")
# The sharded engine's own options, which are not those of a param group.
_ENGINES = tuple(option.name for option in fields(EngineOptions))
_SWITCHES = {"true": True, "false": False}


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        path: Where, for example "zero_optimization.stage".
        sentence: What is wrong, and what to do.
        is_fixed: Whether `Report.corrected` has it right.
    """

    path: str
    sentence: str
    is_fixed: bool


class Report(NamedTuple):
    """What was found in a configuration.

    Attributes:
        findings: In the order of the file's sections.
        given: The configuration.
        corrected: The same with everything mended that can only mean one thing.
    """

    findings: list[Finding]
    given: dict[str, Any]
    corrected: dict[str, Any]

    def diff(self) -> str:
        """Return how the corrected file differs, as a unified diff of both in one layout."""
        before, after = (
            json.dumps(each, indent=2).splitlines(keepends=True)
            for each in (self.given, self.corrected)
        )
        return "".join(difflib.unified_diff(before, after, "given", "corrected", n=2))


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration from a file.

    Raises:
        ValueError: It is no JSON object, or has a key twice, of which JSON's readers drop one.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{path} has {twice[0]!r} twice in one table; remove one of them.")
        return dict(pairs)

    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file.") from None
    try:
        found = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}. JSON has "
            f"no comments and no comma before a closing bracket."
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a configuration.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(found)}.")
    return found


def check_config(config: Mapping[str, Any], *, replaces_auto: bool = False) -> Report:
    """Return what is wrong in a DeepSpeed configuration.

    Args:
        config: From the JSON file.
        replaces_auto: The Transformers Trainer or Accelerate fills in what is "auto".
    """
    checker = _Checker(config, replaces_auto)
    checker.check()
    return Report(checker.findings, checker.given, checker.config)


class _Checker:
    def __init__(self, config: Mapping[str, Any], replaces_auto: bool) -> None:
        self.given: dict[str, Any] = copy.deepcopy(dict(config))
        self.config: dict[str, Any] = copy.deepcopy(dict(config))
        self.findings: list[Finding] = []
        self._replaces_auto = replaces_auto

    def check(self) -> None:
        # Names first, as a section under a wrong name is looked at under the right one.
        self._names(self.config, "", TOP)
        for name in ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "bfloat16"):
            self._section(self.config, name)
        zero = self.config.get("zero_optimization")
        if isinstance(zero, dict):
            for name in ("offload_optimizer", "offload_param"):
                self._section(zero, name, "zero_optimization.")
        for table, where, kinds in self._tables():
            for name, kind in kinds.items():
                if name in table:
                    self._kind(table, name, where, kind)
        self._precision()
        self._zero()
        self._optimizer()
        self._scheduler()
        self._batches()
        self._clipping()

    def _tell(self, path: str, sentence: str, fix: Callable[[], Any] | None = None) -> None:
        if fix is not None:
            fix()
        self.findings.append(Finding(path, sentence, fix is not None))

    # - Names and kinds

    def _tables(self) -> Iterator[tuple[dict[str, Any], str, dict[str, str]]]:
        yield self.config, "", TOP
        for section, kinds in SECTIONS.items():
            table: Any = self.config
            for part in section.split("."):
                table = table.get(part) if isinstance(table, dict) else None
            if isinstance(table, dict):
                yield table, f"{section}.", kinds

    def _section(self, parent: dict[str, Any], name: str, where: str = "") -> None:
        table = parent.get(name)
        if isinstance(table, dict):
            self._names(table, f"{where}{name}.", SECTIONS[f"{where}{name}"])

    def _names(self, table: dict[str, Any], where: str, known: Mapping[str, str]) -> None:
        for name in list(table):
            if name in known:
                continue
            lower = {each.lower(): each for each in known}
            guess = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75)
            right = lower[guess[0]] if guess else None
            said = f"DeepSpeed knows no such key and {'refuses' if where else 'ignores'} it"
            if right is None or right in table:
                also = f" ({right!r} is there, too)" if right else ""
                self._tell(f"{where}{name}", f"{said}{also}.")
                continue
            said += f"; it is spelled {right!r}."
            self._tell(f"{where}{name}", said, partial(_rename, table, name, right))

    def _kind(self, table: dict[str, Any], name: str, where: str, kind: str) -> None:
        value, path = table[name], f"{where}{name}"
        if value == "auto" and isinstance(value, str):
            if not self._replaces_auto:
                self._tell(path, _AUTO_NEEDS_CLIENT)
            return
        if kind in ("count", "number") and isinstance(value, str):
            number = _number(value)
            if number is None:
                self._tell(path, f"must be a number, got {shown(value)}.")
            else:
                self._tell(
                    path,
                    f"must be a number, and {value!r} is text: without the quotes.",
                    lambda: table.update({name: number}),
                )
                value = number
        if kind == "flag" and isinstance(value, (str, int)) and not isinstance(value, bool):
            meant = _SWITCHES.get(str(value).lower(), {"0": False, "1": True}.get(str(value)))
            said = f"must be true or false, got {shown(value)}."
            fix = None if meant is None else lambda: table.update({name: meant})
            self._tell(path, said, fix)
        elif kind == "count" and (isinstance(value, bool) or not _is_count(value)):
            self._tell(path, f"must be a whole number, 0 or more, got {shown(value)}.")
        elif kind == "number" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            if not isinstance(value, str):
                self._tell(path, f"must be a number, got {shown(value)}.")
        elif kind == "text" and value is not None and not isinstance(value, str):
            self._tell(path, f"must be text, got {shown(value)}.")
        elif kind == "table" and value is not None and not isinstance(value, dict):
            self._tell(path, f"must be a table {{...}}, got {shown(value)}.")

    # - What does not go together

    def _is_on(self, *names: str) -> bool:
        tables = [self.config.get(name) for name in names]
        return any(isinstance(t, dict) and t.get("enabled") is True for t in tables)

    def _stage(self) -> Any:
        zero = self.config.get("zero_optimization")
        return zero.get("stage", 0) if isinstance(zero, dict) else 0

    def _precision(self) -> None:
        if self._is_on("fp16") and self._is_on("bf16", "bfloat16"):
            self._tell("bf16.enabled", "fp16 and bf16 are both on; switch one of them off.")
        if "bf16" in self.config and "bfloat16" in self.config:
            self._tell("bfloat16", "bf16 is there, too, which means the same; keep one of them.")
        if self._is_on("fp16") and self._stage() == 0 and self._optimizer_name() == "adabelief":
            self._tell(
                "fp16.enabled",
                "DeepSpeed at stage 0 divides gradients by a loss scale that it never multiplies "
                "the loss by, and AdaBelief would hardly move: use zero_optimization.stage 1, "
                "bf16, or ShardedAdaBelief.",
            )

    def _zero(self) -> None:
        zero, stage = self.config.get("zero_optimization"), self._stage()
        if not isinstance(zero, dict):
            return
        if isinstance(stage, int) and not isinstance(stage, bool) and stage not in (0, 1, 2, 3):
            self._tell("zero_optimization.stage", f"must be 0, 1, 2 or 3, got {stage}.")
        if "cpu_offload" in zero:
            is_plain = zero["cpu_offload"] is True and "offload_optimizer" not in zero
            self._tell(
                "zero_optimization.cpu_offload",
                'was replaced by "offload_optimizer": {"device": "cpu"}.',
                partial(_replace_cpu_offload, zero) if is_plain else None,
            )
        for name in ("offload_optimizer", "offload_param"):
            self._offload(zero, stage, name)

    def _offload(self, zero: dict[str, Any], stage: Any, name: str) -> None:
        table, path = zero.get(name), f"zero_optimization.{name}"
        if not isinstance(table, dict):
            return
        device = table.get("device", "none")
        if isinstance(device, str) and device not in (*DEVICES, "auto"):
            lower = device.lower()
            fix = (lambda: table.update(device=lower)) if lower in DEVICES else None
            said = f"must be {', '.join(DEVICES)}, got {shown(device)}."
            self._tell(f"{path}.device", said, fix)
            device = lower
        if device in ("none", "auto") or not isinstance(device, str):
            return
        if device == "nvme" and not table.get("nvme_path"):
            self._tell(f"{path}.nvme_path", "is needed by device nvme: a folder on that disk.")
        if name == "offload_param" and stage in (0, 1, 2):
            self._tell(path, f"works at stage 3 only; at stage {stage} DeepSpeed ignores it.")
        elif stage == 0:
            self._tell(path, "is ignored at stage 0; take stage 1, 2 or 3, or remove it.")
        elif device == "nvme" and stage in (1, 2):
            self._tell(f"{path}.device", f'at stage {stage}, "nvme" is silently the same as "cpu".')

    def _optimizer_name(self) -> str:
        table = self.config.get("optimizer")
        name = table.get("type") if isinstance(table, dict) else None
        return name.lower() if isinstance(name, str) else ""

    def _optimizer(self) -> None:
        table = self.config.get("optimizer")
        if not isinstance(table, dict):
            return
        name = self._optimizer_name()
        if name not in _OURS:
            near = difflib.get_close_matches(name, _OURS, n=1, cutoff=0.75)
            if near:
                right = _OURS[near[0]]
                self._tell(
                    "optimizer.type",
                    f"DeepSpeed knows no {shown(table.get('type'))}; it is spelled {right!r}.",
                    lambda: table.update(type=right),
                )
                name = near[0]
            elif "type" not in table:
                self._tell("optimizer.type", 'is missing; write "type": "AdaBelief".')
        if name not in _OURS:
            return
        stage = self._stage()
        if name == "shardedadabelief" and stage in (1, 2, 3):
            self._tell(
                "optimizer.type",
                f"ShardedAdaBelief shards by itself and works at zero_optimization.stage 0; at "
                f'stage {stage} use "AdaBelief".',
            )
        params = table.get("params")
        if isinstance(params, dict):
            self._options(params, _OURS[name])

    def _options(self, params: dict[str, Any], where: str) -> None:
        path = "optimizer.params."
        known = [*OPTION_NAMES, "no_decay", *(_ENGINES if where == "ShardedAdaBelief" else ())]
        for name in list(params):
            value = params[name]
            if name not in known and name not in ALIASES and name not in OF_ADAM:
                near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
                right = ALIASES.get(near[0], near[0]) if near else None
                if right is None or right in params:
                    self._tell(f"{path}{name}", f"{where} has no such option.")
                    continue
                said = f"{where} has no such option; it is spelled {right!r}."
                self._tell(f"{path}{name}", said, partial(_rename, params, name, right))
                name = right
            if value == "auto" and isinstance(value, str):
                self._auto(params, name, path)
            elif name in ("lr", "eps", "weight_decay") and isinstance(value, str):
                number = _number(value)
                if number is None:
                    self._tell(f"{path}{name}", f"must be a number, got {shown(value)}.")
                    continue
                self._tell(
                    f"{path}{name}",
                    f"must be a number, and {value!r} is text: without the quotes.",
                    partial(params.update, {name: number}),
                )
        eps = params.get("eps")
        if isinstance(eps, (int, float)) and not isinstance(eps, bool) and eps >= _ADAMS_EPS:
            self._tell(
                f"{path}eps",
                f"{eps:g} was probably meant for Adam: AdaBelief adds eps to exp_avg_sq in every "
                f"step, so that steps shrink with small gradients as SGD's do. Leave it out (the "
                f"default is 1e-16), or keep it if you mean it.",
            )
        given = {n: v for n, v in params.items() if not isinstance(v, str)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = without_adams(given, where)
                validate_options({**OPTIONS, **{n: own[n] for n in OPTION_NAMES if n in own}})
        except (TypeError, ValueError) as error:
            self._tell("optimizer.params", str(error))

    def _auto(self, params: dict[str, Any], name: str, path: str) -> None:
        if name == "eps":
            self._tell(
                f"{path}eps",
                'for "auto" the Trainer writes its adam_epsilon, 1e-8, and AdaBelief is nearly '
                "SGD then; leave it out (the default is 1e-16).",
                lambda: params.pop(name),
            )
        elif name in _AUTO_IN_OPTIMIZER:
            if not self._replaces_auto:
                self._tell(f"{path}{name}", _AUTO_NEEDS_CLIENT)
        else:
            self._tell(
                f"{path}{name}",
                f'is "auto", which only the Trainer and Accelerate replace, and only for '
                f"{', '.join(_AUTO_IN_OPTIMIZER)}; write a value, or leave it out.",
            )

    def _scheduler(self) -> None:
        table = self.config.get("scheduler")
        if not isinstance(table, dict):
            return
        name = table.get("type")
        if not isinstance(name, str) or name in SCHEDULERS:
            return
        near = difflib.get_close_matches(name, SCHEDULERS, n=1)
        said = f"must be {', '.join(SCHEDULERS)} or a class of torch's, got {shown(name)}."
        if near:
            self._tell("scheduler.type", said, lambda: table.update(type=near[0]))

    def _batches(self) -> None:
        whole, micro, accumulated = (
            self.config.get(name)
            for name in (
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
            )
        )
        parts = [n for n in (micro, accumulated) if _is_count(n) and n]
        product = 1
        for number in parts:
            product *= number
        if _is_count(whole) and whole and whole % product:
            self._tell(
                "train_batch_size",
                f"{whole} is no multiple of train_micro_batch_size_per_gpu times "
                f"gradient_accumulation_steps, {product}, and so fits no number of ranks.",
            )

    def _clipping(self) -> None:
        if "gradient_clipping" not in self.config:
            self._tell(
                "gradient_clipping",
                "is not there, and DeepSpeed 0.19 clips to a norm of 1.0 then, older ones not at "
                "all; write 1.0 or 0.0.",
                lambda: self.config.update(gradient_clipping=1.0),
            )


def _rename(table: dict[str, Any], name: str, right: str) -> None:
    """Give a key another name at its place."""
    items = [(right if key == name else key, value) for key, value in table.items()]
    table.clear()
    table.update(items)


def _replace_cpu_offload(zero: dict[str, Any]) -> None:
    del zero["cpu_offload"]
    zero["offload_optimizer"] = {"device": "cpu"}


def _number(text: str) -> int | float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and text.strip().lstrip("+-").isdigit() else value


def _is_count(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) and value >= 0
