"""From and to the files of other packages: round trips are equal in every bit."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import adabelief_pytorch
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from belief_dist import AdaBelief, checkpoint, cli
from belief_dist.checkpoint.formats import convert
from belief_dist.checkpoint.formats.full_state import read_full_state, write_full_state
from belief_dist.checkpoint.formats.safetensors import read_safetensors, write_safetensors
from belief_dist.checkpoint.formats.torch import from_state_dict, to_official, to_state_dict
from tests.harness.checkpoints import BF16, FP32, build, train
from tests.harness.models import HYPER
from tests.harness.ranks import run_ranks


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for step in numbers:
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(6, 7, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_adabelief_and_its_checkpoint(tmp_path: Path) -> None:
    model = small()
    optimizer = AdaBelief(model.named_parameters(), **HYPER)
    steps(model, optimizer, range(3))
    whole = from_state_dict(optimizer.state_dict(), model.state_dict())
    write_full_state(whole, tmp_path)
    again = read_full_state(tmp_path)
    assert not convert.differences(whole, again) and again.step == 3
    assert same(to_state_dict(again)["state"], optimizer.state_dict()["state"])
    other = small(1)
    other_optimizer = AdaBelief(other.named_parameters())
    checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    third, third_optimizer = small(2), None
    third.load_state_dict(again.model_weights())
    third_optimizer = AdaBelief(third.named_parameters())
    third_optimizer.load_state_dict(to_state_dict(again))
    for each in (model, optimizer), (other, other_optimizer), (third, third_optimizer):
        steps(*each, range(3, 5))
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(dict(model.state_dict()), dict(third.state_dict()))


def official(model: nn.Module) -> Any:
    return adabelief_pytorch.AdaBelief(
        model.parameters(), lr=0.05, eps=1e-8, rectify=False, print_change_log=False
    )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_official_package(tmp_path: Path, amsgrad: bool) -> None:
    model = small()
    theirs = official(model)
    for group in theirs.param_groups:
        group["amsgrad"] = amsgrad
    steps(model, theirs, range(3))
    whole = from_state_dict(
        theirs.state_dict(), model.state_dict(), names=names_of(model), options={"rectify": False}
    )
    write_full_state(whole, tmp_path)
    again = to_official(read_full_state(tmp_path))
    assert same(again["state"], theirs.state_dict()["state"])
    assert same(again["param_groups"], theirs.state_dict()["param_groups"])
    other = small(1)
    other.load_state_dict(model.state_dict())
    back = official(other)
    back.load_state_dict(again)
    steps(model, theirs, range(3, 5))
    steps(other, back, range(3, 5))
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def consolidates(folder: Path) -> None:
    model = small()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdaBelief, **HYPER)
    steps(model, optimizer, range(3))
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        saved = optimizer.state_dict()
        assert len(saved["state"]) == len(names_of(model))  # of all ranks
        whole = from_state_dict(saved, model.state_dict(), names=names_of(model))
        write_full_state(whole, folder)
        again = to_state_dict(read_full_state(folder))
        assert same(again["state"], dict(saved["state"]))
        for group in again["param_groups"]:
            del group["param_names"]
        torch.save(again, folder / "again.pt")
    dist.barrier()
    # All ranks load it, each keeps its own parameters' states, and all train on alike.
    again = torch.load(folder / "again.pt", weights_only=True)
    other = small()
    other.load_state_dict(model.state_dict())
    back = ZeroRedundancyOptimizer(other.parameters(), AdaBelief)
    back.load_state_dict(again)
    for each in (model, optimizer), (other, back):
        steps(*each, range(3, 5))  # type: ignore[arg-type]
    assert same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("ranks", [1, 3])
def test_zero_redundancy_optimizer(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, tmp_path, partial(consolidates, tmp_path / "run"))


def test_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shared = torch.randn(3, 4)
    weights = {"a": shared, "b": shared[1:], "t": shared.t(), "i": torch.arange(3), "e": shared[:0]}
    write_safetensors(weights, file)
    assert same(read_safetensors(file), weights) and list(tmp_path.iterdir()) == [file]
    with file.open("rb+") as damaged:
        damaged.truncate(40)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_safetensors(file)


def test_adam_to_adabelief() -> None:
    """Of gradients that scatter around a mean, the estimate of s is right on average."""
    torch.manual_seed(0)
    parameters = {kind: nn.Parameter(torch.zeros(2000)) for kind in ("adam", "belief")}
    adam = torch.optim.AdamW([parameters["adam"]], lr=0.0, betas=(0.9, 0.99))
    belief = AdaBelief([("w", parameters["belief"])], lr=0.0, betas=(0.9, 0.99))
    for _ in range(500):
        gradient = 0.3 + torch.randn(2000)
        for parameter in parameters.values():
            parameter.grad = gradient.clone()
        adam.step()
        belief.step()
    weights = {"w": parameters["adam"].detach()}
    whole = convert.warm_start_from_adam(from_state_dict(adam.state_dict(), weights, names=["w"]))
    state, true = whole.states["w"], belief.state[parameters["belief"]]
    torch.testing.assert_close(state["exp_avg"], true["exp_avg"], rtol=1e-5, atol=1e-6)
    assert state["exp_avg_sq"].mean().item() == pytest.approx(
        true["exp_avg_sq"].mean().item(), rel=0.02
    )
    assert whole.steps == {"w": 500} and whole.groups[0]["options"]["eps"] == 1e-16


def run(*arguments: Any) -> int:
    return cli.main(["checkpoint", *map(str, arguments)])


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = build(BF16, master="remainder8", state_dtype="uint8")
    train(model, optimizer, range(2))
    ours = tmp_path / "run"
    checkpoint.save(ours, 2, model=model, optimizer=optimizer)
    train(model, optimizer, range(2, 3))
    checkpoint.save(ours, 3, model=model, optimizer=optimizer)
    assert run("inspect", ours) == 0
    said = capsys.readouterr().out
    assert "step 3, 3 files" in said or "step 3, 2 files" in said
    assert "param group 1: 3 parameters, lr=0.05" in said and "embed.weight" in said
    assert run("verify", ours, "--step", 2) == 0
    assert run("diff", ours, ours) == 0
    assert "no difference in any bit" in capsys.readouterr().out

    def told(*arguments: Any) -> Any:
        status = run(*arguments, "--json")
        assert status == (1 if arguments[0] == "diff" else 0)
        return json.loads(capsys.readouterr().out)

    held = told("inspect", ours, "--step", 2)
    assert held["path"] == str(ours / "step-00000002") and held["step"] == 2 and held["ranks"] == 1
    assert held["groups"][1]["parameters"] == 3 and held["groups"][1]["options"]["lr"] == 0.05
    weight = {"name": "model.embed.weight", "shape": [33, 31], "dtype": "float32"}
    assert weight in held["tensors"]
    checked = {key: held[key] for key in ("path", "step", "files", "bytes")}
    assert told("verify", ours, "--step", 2) == checked
    whole = {"path": str(tmp_path / "told.pt"), "format": "torch", "step": 3}
    assert told("convert", ours, tmp_path / "told.pt", "--to", "torch").items() >= whole.items()

    state, weights = tmp_path / "optimizer.pt", tmp_path / "model.safetensors"
    assert run("convert", ours, state, "--to", "torch") == 0
    assert run("convert", ours, weights, "--to", "safetensors") == 0
    read = read_safetensors(weights)
    assert same(read, {name: read[name] for name in model.state_dict()})
    assert same(dict(model.state_dict()), read)
    # What has 8 bits is float32 now, and the weights are those of the model.
    assert (
        run("convert", state, tmp_path / "back", "--weights", weights, "--to", "belief_dist") == 0
    )
    capsys.readouterr()
    assert run("diff", ours, tmp_path / "back") == 1
    said = capsys.readouterr().out
    assert "weight of embed.weight: torch.float32 (33, 31) and" in said
    assert told("diff", ours, tmp_path / "back") == {"differences": said.splitlines()}
    one, two = read_full_state(ours), read_full_state(tmp_path / "back")
    assert same(one.states, two.states) and same(one.steps, two.steps)

    for arguments, sentence in [
        (("inspect", tmp_path / "nothing"), "there is no checkpoint in"),
        (("inspect", tmp_path), "itself; there is one in"),
        (("diff", ours, tmp_path / "no"), "there is nothing at"),
        (("convert", state, tmp_path / "x", "--to", "torch"), "pass weights, too"),
        (("convert", ours, tmp_path / "x", "--to", "universal"), "needs a template"),
    ]:
        assert run(*arguments) == 2
        assert sentence in capsys.readouterr().err


DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("folder", sorted(DATA.glob("format-*")), ids=lambda path: path.name)
def test_old_formats(folder: Path) -> None:
    """Every format that there ever was, with the numbers that were saved then."""
    model, optimizer = build(FP32, seed=8)
    loaded = checkpoint.load(folder, model=model, optimizer=optimizer)
    assert loaded.step == 3 and loaded.extra == {"epoch": 7}
    expected = torch.load(folder / "expected.pt", weights_only=True)
    whole = read_full_state(folder)
    assert same(dict(model.state_dict()), expected["model"])
    assert same(whole.states, expected["states"]) and same(whole.steps, expected["steps"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.04, 0.05]


def test_there_is_a_file_of_this_format() -> None:
    from belief_dist.checkpoint.metadata import FORMAT

    assert (DATA / f"format-{FORMAT}" / "latest").exists() and os.path.isdir(DATA)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_states_of_adam_are_not_taken_for_ours(tmp_path: Path, cls: Any) -> None:
    """Its exp_avg_sq is the mean of squares, not of squared deviations: it must be asked for."""
    model = torch.nn.Linear(3, 2)
    optimizer = cls(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    arguments = {"weights": tmp_path / "weights.pt", "names": ["weight", "bias"]}
    with pytest.raises(ValueError, match=r"holds states of Adam or AdamW.*--from_adam"):
        convert.read(tmp_path / "adam.pt", **arguments)
    assert convert.read(tmp_path / "adam.pt", from_adam=True, **arguments).steps == {
        "weight": 1,
        "bias": 1,
    }


def test_a_file_takes_the_place_of_files_only(tmp_path: Path) -> None:
    """A link, folder or pipe of this name stays; and a writer that fails leaves the old file."""
    real = tmp_path / "real"
    real.write_text("kept")
    odd = [tmp_path / name for name in ("link", "folder", "pipe")]
    odd[0].symlink_to(real)
    odd[1].mkdir()
    os.mkfifo(odd[2])
    for path in odd:
        with pytest.raises(ValueError, match="is no regular file"):
            write_safetensors({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="cannot hold the dtype"):
        write_safetensors({"a": torch.zeros(1, dtype=torch.complex128)}, real)
    assert real.read_text() == "kept" and sorted(tmp_path.iterdir()) == sorted([real, *odd])
    write_safetensors({"a": torch.ones(1)}, real)
    assert torch.equal(read_safetensors(real)["a"], torch.ones(1))
