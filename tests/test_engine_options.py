"""The engine's options are told once, in the fields of `EngineOptions`; old spellings warn once."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import MISSING, fields

import pytest
import torch

from belief_dist import ShardedAdaBelief, deprecations
from belief_dist.engine_options import EngineOptions


def test_every_option_is_a_keyword_with_the_same_default() -> None:
    keywords = inspect.signature(ShardedAdaBelief).parameters
    for option in fields(EngineOptions):
        assert option.default is not MISSING
        assert keywords[option.name].default == option.default, option.name
        assert f"        {option.name}: " in (ShardedAdaBelief.__doc__ or ""), option.name


def test_every_option_has_a_check_that_takes_its_default() -> None:
    for option in fields(EngineOptions):
        assert option.metadata["check"](option.name, option.default) == option.default
        # None of them takes just anything.
        with pytest.raises((TypeError, ValueError), match=option.name):
            option.metadata["check"](option.name, -1.5)


def test_every_option_is_compared_between_ranks() -> None:
    names = {f"option {option.name}" for option in fields(EngineOptions)}
    assert set(EngineOptions().by_name()) == names
    assert EngineOptions(stage=2).by_name()["option stage"] == [2]


def test_dtypes_may_be_names() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = ShardedAdaBelief([param], reduce_dtype="bfloat16", state_dtype="torch.uint8")
    assert optimizer.options.reduce_dtype == torch.bfloat16
    assert optimizer.options.state_dtype == torch.uint8


def test_auto_is_ordered_and_warns_once() -> None:
    deprecations.warn_once.cache_clear()
    param = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(FutureWarning, match="reduction='auto' means 'ordered'") as told:
        optimizer = ShardedAdaBelief([param], reduction="auto")  # type: ignore[arg-type]
    assert told[0].filename == __file__
    assert optimizer.options.reduction == "ordered"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedAdaBelief([torch.nn.Parameter(torch.zeros(3))], reduction="auto")  # type: ignore[arg-type]


def test_settle_is_wait_pending_and_warns_once() -> None:
    deprecations.warn_once.cache_clear()
    optimizer = ShardedAdaBelief([torch.nn.Parameter(torch.zeros(3))])
    with pytest.warns(FutureWarning, match="spelled wait_pending") as told:
        optimizer.settle()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.settle()


def test_a_switch_is_true_or_false() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    for name in ("overlap", "check_replicas"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            ShardedAdaBelief([param], **{name: "no"})  # type: ignore[arg-type]
