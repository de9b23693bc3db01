"""A JSON schema of DeepSpeed configurations, for editors: keys, kinds, the options of AdaBelief.

It says what `deepspeed_config` looks at first: names, and kinds of values. What depends on other
values, and what to do, only that tells.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from belief_dist.deepspeed_keys import DEVICES, SCHEDULERS, SECTIONS, TOP
from belief_dist.engine_options import EngineOptions
from belief_dist.options import ALIASES, DEFAULTS

Schema = dict[str, Any]
_KINDS: dict[str, Schema] = {
    "flag": {"type": "boolean"},
    "count": {"type": "integer", "minimum": 0},
    "number": {"type": "number"},
    "text": {"type": "string"},
    "table": {"type": "object"},
    "any": {},
}
_AUTO: Schema = {"const": "auto"}  # the Transformers Trainer and Accelerate replace it
_NO_DECAY: Schema = {"enum": ["1d", None]}
_CHOICES: dict[str, list[str]] = {
    "zero_optimization.offload_optimizer.device": list(DEVICES),
    "zero_optimization.offload_param.device": list(DEVICES),
}


def schema() -> Schema:
    """Return the schema, in the draft of 2020-12."""
    optimizer = _table("optimizer")
    ours = {"AdaBelief": _rule(), "ShardedAdaBelief": {**_rule(), **_engine()}}
    optimizer["allOf"] = [
        {
            "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
            "then": {
                "properties": {"params": {"properties": known, "additionalProperties": False}}
            },
        }
        for name, known in ours.items()
    ]
    top = _table("")
    top["properties"]["optimizer"] = optimizer
    top["properties"]["scheduler"]["properties"]["type"]["examples"] = list(SCHEDULERS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A DeepSpeed configuration with AdaBelief",
        **top,
    }


def _table(section: str) -> Schema:
    """Return the schema of a section, of the whole file if it has no name."""
    known = SECTIONS[section] if section else TOP
    properties: dict[str, Schema] = {}
    for name, kind in known.items():
        path = f"{section}.{name}" if section else name
        if path in SECTIONS:
            properties[name] = _table(path)
        elif path in _CHOICES:
            properties[name] = {"enum": _CHOICES[path]}
        else:
            properties[name] = _or_auto(_KINDS[kind])
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _or_auto(kind: Schema) -> Schema:
    is_text = not kind or kind.get("type") in ("string", "object")
    return dict(kind) if is_text else {"anyOf": [kind, _AUTO]}


def _rule() -> dict[str, Schema]:
    """Return the options of a param group, and what other spellings they have."""
    found: dict[str, Schema] = {"no_decay": _NO_DECAY}
    for name, value in DEFAULTS.items():
        if isinstance(value, tuple):
            pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
            found[name] = _or_auto(pair)
        else:
            found[name] = _or_auto(_KINDS["flag" if isinstance(value, bool) else "number"])
        found[name] |= {"default": list(value) if isinstance(value, tuple) else value}
    return {**found, **{other: found[name] for other, name in ALIASES.items()}}


def _engine() -> dict[str, Schema]:
    """Return the options of the sharded engine."""
    hints = get_type_hints(EngineOptions)
    return {each.name: _of_type(hints[each.name]) for each in fields(EngineOptions)}


def _of_type(hint: Any) -> Schema:
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if hint is torch.dtype:
        return {"enum": ["float32", "bfloat16", "uint8", "int8"]}
    kinds = {bool: "boolean", int: "integer", float: "number", type(None): "null"}
    if hint in kinds:
        return {"type": kinds[hint]}
    return {"anyOf": [_of_type(each) for each in get_args(hint)]}
