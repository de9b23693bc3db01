"""`no_decay` takes norms and biases out of weight decay, and what Adam's configurations say."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, ShardedAdaBelief, options

BOTH = pytest.mark.parametrize("cls", [AdaBelief, ShardedAdaBelief])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    for ours, theirs in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs)


HYPER = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-9}


@BOTH
@pytest.mark.parametrize("no_decay", ["1d", lambda name, parameter: parameter.dim() < 2])
def test_equals_two_groups_made_by_hand(cls, no_decay):
    model, other = make_model(), make_model()
    optimizer = cls(model.parameters(), no_decay=no_decay, **HYPER)
    by_hand = [
        {"params": [p for p in other.parameters() if p.dim() > 1]},
        {"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    train(model, optimizer)
    train(other, cls(by_hand, **HYPER))
    assert_equal(model, other)
    without = make_model()
    train(without, cls(without.parameters(), **HYPER))
    assert not torch.equal(without[1].weight, model[1].weight)


@BOTH
def test_groups_keep_options_order_and_names(cls):
    model = make_model()
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, named[n]) for n in ("0.weight", "0.bias", "1.weight")], "lr": 0.5},
        {"params": [("1.bias", named["1.bias"])]},
        {"params": [("2.weight", named["2.weight"])], "weight_decay": 0.1},
    ]
    optimizer = cls(groups, no_decay="1d", **HYPER)
    optimizer.add_param_group({"params": [("2.bias", named["2.bias"])]})
    found = [(g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [
        (["0.weight"], 0.5, 0.3),
        (["0.bias", "1.weight"], 0.5, 0.0),
        (["1.bias"], 0.1, 0.0),
        (["2.weight"], 0.1, 0.1),
        (["2.bias"], 0.1, 0.0),
    ]


@BOTH
def test_a_function_sees_names(cls):
    model = make_model()
    optimizer = cls(model.named_parameters(), no_decay=lambda name, _: name[0] == "1", **HYPER)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["0.weight", "0.bias", "2.weight", "2.bias"],
        ["1.weight", "1.bias"],
    ]


@BOTH
def test_survives_a_state_dict(cls):
    model, resumed = make_model(), make_model()
    optimizer = cls(model.parameters(), no_decay="1d", **HYPER)
    train(model, optimizer)
    resumed.load_state_dict(model.state_dict())
    again = cls(resumed.parameters(), no_decay="1d", **HYPER)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(resumed, again)
    assert_equal(model, resumed)


def test_copies_know_it():
    bias, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for copied in (
        copy.deepcopy(AdaBelief([bias], no_decay="1d", **HYPER)),
        pickle.loads(pickle.dumps(AdaBelief([bias], no_decay="1d", **HYPER))),
    ):
        copied.add_param_group({"params": [later]})
        assert [group["weight_decay"] for group in copied.param_groups] == [0.0, 0.0]


def test_a_parameter_that_zero_init_has_emptied_is_judged_by_its_whole_shape():
    emptied = nn.Parameter(torch.empty(0))
    emptied.ds_shape = torch.Size((4, 3))
    bias = nn.Parameter(torch.empty(0))
    bias.ds_shape = torch.Size((4,))
    optimizer = AdaBelief([emptied, bias], no_decay="1d", **HYPER)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def fail(name, parameter):
    return name.startswith("b")


@BOTH
@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"no_decay": "2d"}, ValueError, "no_decay must be None, '1d' .* got '2d'"),
        ({"no_decay": True}, ValueError, "no_decay must be None, '1d' .* got True"),
        ({"no_decay": fail}, ValueError, r"no_decay failed on .*model.named_parameters\(\)"),
        ({"no_decay": lambda n, p: 1}, TypeError, "no_decay must return True or False, got 1"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'.*without quotes in JSON"),
        ({"lr": "auto"}, TypeError, "lr='auto', which only the Transformers Trainer replaces"),
        ({"betas": "auto"}, TypeError, r"betas='auto'.* leave betas out for \(0.9, 0.999\)"),
        ({"rectify": "auto"}, TypeError, "only for lr, betas, eps and weight_decay"),
        ({"bias_correction": False}, ValueError, "AdaBelief always corrects the bias"),
        ({"fp32_optimizer_states": False}, ValueError, "states are float32. Remove it"),
    ],
)
def test_what_a_configuration_may_not_say(cls, given, error, sentence):
    with pytest.raises(error, match=sentence):
        cls([nn.Parameter(torch.ones(2))], **given)


@BOTH
@pytest.mark.parametrize(
    ("given", "sentence", "same"),
    [
        ({"adam_w_mode": True}, "'adam_w_mode' is spelled 'weight_decouple'", {}),
        ({"adam_w_mode": False}, "spelled 'weight_decouple'", {"weight_decouple": False}),
        ({"torch_adam": True}, "'torch_adam' is Adam's and was ignored", {}),
        ({"bias_correction": True}, "'bias_correction' is Adam's and was ignored", {}),
    ],
)
def test_what_is_left_over_from_adam(cls, given, sentence, same):
    with pytest.warns(UserWarning, match=sentence) as warnings:
        optimizer = cls([nn.Parameter(torch.ones(2))], **HYPER, **given)
    assert len(warnings) == 1 and warnings[0].filename == __file__
    expected = cls([nn.Parameter(torch.ones(2))], **HYPER, **same)
    assert optimizer.defaults == expected.defaults


def test_adams_eps_is_said_once(caplog, monkeypatch):
    options._warn_of_large_eps.cache_clear()
    parameter = nn.Parameter(torch.ones(2))
    with caplog.at_level(logging.WARNING, "belief_dist"):
        AdaBelief([parameter], eps=1e-12)
        assert not caplog.messages
        for _ in range(2):
            AdaBelief([parameter], eps=1e-8)
    (sentence,) = caplog.messages
    assert "eps=1e-08 is large for AdaBelief" in sentence
    assert "less than about 3e-03" in sentence and "leave eps out" in sentence
