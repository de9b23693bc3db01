"""Any command line, and any file: 0, 1 where `diff` finds differences, or 2 and one sentence."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from belief_dist import AdaBelief, checkpoint, cli
from tests.harness.nonsense import mutate, nonsense


def run(*arguments: object) -> int:
    """Return the exit status of a command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli.main(list(map(str, arguments)))


def check(status: int, capsys: pytest.CaptureFixture[str], command: list[Any]) -> None:
    said = capsys.readouterr()
    assert status in ((0, 1, 2) if "diff" in command else (0, 2)), command
    if status == 2:
        assert said.err.startswith("belief-dist") and said.err.endswith(".\n"), said.err
        assert said.err.count("\n") == 1 and len(said.err) < 1000, (command, said.err)
    else:
        assert not said.err and said.out, (command, said.err)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with good files, and with bad ones of every kind."""
    folder = tmp_path_factory.mktemp("files")
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = AdaBelief(model.named_parameters())
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    checkpoint.save(folder / "run", 1, model=model, optimizer=optimizer)
    checkpoint.save(folder / "weights_alone", 1, model=model)
    good = optimizer.state_dict()
    torch.save(good, folder / "good.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "junk.pt").write_bytes(b"hello")
    (folder / "junk.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not a header")
    (folder / "names.txt").write_text("0.weight 0.bias 1.weight 1.bias")
    (folder / "few.txt").write_text("0.weight")
    (folder / "pickle.pt").write_bytes(pickle.dumps(os.getcwd))
    torch.save([1, "a"], folder / "list.pt")
    torch.save({"w": 3}, folder / "no_tensors.pt")
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    torch.save(adam.state_dict(), folder / "adam.pt")
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    sgd.step()
    torch.save(sgd.state_dict(), folder / "sgd.pt")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    damaged = folder / "damaged"
    checkpoint.save(damaged, 1, model=model, optimizer=optimizer)
    (data,) = damaged.glob("*/*.distcp")
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 3] ^= 8
    data.write_bytes(flipped)
    for name, content in {"zero": {"optimizer_state_dict": 3}, "odd": [nonsense]}.items():
        (folder / name).mkdir()
        for part in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save(content, folder / name / part)
    return folder


def test_any_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    names = [*sorted(path.name for path in files.iterdir()), "missing", "", "run/latest", "a\0b"]
    for number in range(200):
        action = draw.choice(["inspect", "verify", "diff", "convert", "convert", "convert"])
        command: list[Any] = ["checkpoint", action, files / draw.choice(names)]
        if action == "diff":
            command.append(files / draw.choice(names))
        if action == "convert":
            targets = ["torch", "official", "safetensors", "belief_dist", "universal", "x"]
            place = draw.choice([tmp_path / f"{number}", files / "run", tmp_path / "no" / "where"])
            command += [place, "--to", draw.choice(targets)]
        options = {
            "--weights": files / draw.choice(["weights.pt", "weights.pt", *names]),
            "--names": files / draw.choice(["names.txt", *names]),
            "--options": draw.choice(
                ["{}", "[]", "x", '{"lr": "x"}', '{"betas": [2]}', '{"a": 1}']
            ),
            "--step": draw.choice([1, 7, -1, "x", 10**30]),
            "--template": files / draw.choice(names),
            "--eps": draw.choice([1e-16, "nan", "x", -1, 0]),
        }
        for name in draw.sample(sorted(options), draw.choice([0, 1, 1, 2, 3])):
            command += [name, options[name]]
        command += draw.sample(["--trust", "--from_adam", "--nonsense"], draw.choice([0, 0, 1, 2]))
        if draw.random() < 0.1:
            command.remove(draw.choice(command))
        check(run(*command), capsys, command)


@pytest.mark.parametrize("name", ["good.pt", "weights.pt"])
def test_any_damage_of_a_file(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes are changed, cut out or repeated; torch's own format has a checksum for most."""
    draw = random.Random(name)
    given = {each: files / each for each in ("good.pt", "weights.pt")}
    given[name] = tmp_path / name
    for _ in range(60):
        changed = bytearray((files / name).read_bytes())
        place = draw.randrange(len(changed))
        how = draw.choice(["flip", "cut", "repeat"])
        if how == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif how == "cut":
            del changed[place : place + draw.choice([1, 20, 1000])]
        else:
            changed[place:place] = changed[place : place + 50]
        given[name].write_bytes(changed)
        command = ["checkpoint", "convert", given["good.pt"], tmp_path / "out.pt", "--to", "torch"]
        command += ["--weights", given["weights.pt"], "--names", files / "names.txt"]
        check(run(*command), capsys, command)


def test_any_state_dict(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(1)
    source = tmp_path / "odd.pt"
    for kind in ("good.pt", "adam.pt"):
        good = torch.load(files / kind, weights_only=True)
        for number in range(75):
            with contextlib.suppress(Exception):  # not everything can be written
                torch.save(mutate(copy.deepcopy(good), draw), source)
            command = ["checkpoint", "convert", source, tmp_path / f"{kind}{number}"]
            command += ["--weights", files / "weights.pt", "--names", files / "names.txt"]
            command += ["--to", draw.choice(["torch", "official", "belief_dist"])]
            command += ["--from_adam"] * (kind == "adam.pt")
            check(run(*command), capsys, command)


DIFF = ["checkpoint", "diff", "run"]
WEIGHTS = ["--weights", "weights.pt", "--names", "names.txt"]
SENTENCES: list[tuple[list[str], str]] = [
    (
        [],
        "Missing command; there are doctor, plan, bench, check, migrate, report, checkpoint (see ",
    ),
    (["docter"], "No such command 'docter'. Did you mean 'doctor'? (see belief-dist --help)."),
    (
        ["checkpoint", "look"],
        "No such command 'look'; there are inspect, verify, diff, convert (see",
    ),
    ([*DIFF, "junk.pt", "--weihgts", "x"], "--weights) (see belief-dist checkpoint diff --help)."),
    ([*DIFF, "junk.pt", "--step", "last"], "'--step': 'last' is no whole number (see belief-dist"),
    (
        ["checkpoint", "convert", "run", "x", "--to", "pt"],
        "'pt' is not one of 'belief_dist', 'torch'",
    ),
    (
        ["checkpoint", "inspect"],
        "Missing argument 'PATH' (see belief-dist checkpoint inspect --help)",
    ),
    ([*DIFF, "junk.pt", *WEIGHTS], "junk.pt is damaged, or"),
    ([*DIFF, "cut.pt", *WEIGHTS], "cut.pt is damaged, or no file of torch.save"),
    ([*DIFF, "pickle.pt", *WEIGHTS], "other objects than"),
    ([*DIFF, "sgd.pt", *WEIGHTS], "exp_avg and exp_avg_sq are needed"),
    ([*DIFF, "good.pt", "--weights", "pipe"], "pipe is no file"),
    ([*DIFF, "good.pt", "--weights", "no_tensors.pt"], "no_tensors.pt holds no model's weights"),
    ([*DIFF, "good.pt", *WEIGHTS[:2], "--names", "few.txt"], "but 1 names are given"),
    ([*DIFF, "good.pt", *WEIGHTS, "--options", "[]"], "--options must be a JSON object such as"),
    ([*DIFF, "good.pt", *WEIGHTS, "--options", '{"a": 1}'], "--options has no 'a'; there are lr"),
    ([*DIFF, "damaged"], "has changed since it was written"),
    (["checkpoint", "convert", "weights_alone", "out", "--to", "torch"], "holds weights alone"),
]


@pytest.mark.parametrize("arguments, sentence", SENTENCES, ids=lambda value: str(value)[-40:])
def test_sentences(
    arguments: list[str],
    sentence: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said


@pytest.mark.parametrize("one, other, status", [(float("nan"),) * 2 + (0,), (0.0, -0.0, 1)])
def test_diff_compares_bits(
    one: float, other: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NaN is the same as itself, and 0 is not -0."""
    for name, value in {"one": one, "other": other}.items():
        model = nn.Linear(2, 2)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(value)
        checkpoint.save(tmp_path / name, 1, model=model)
    assert run("checkpoint", "diff", tmp_path / "one", tmp_path / "other") == status
    assert ("4 of 4 elements differ" in capsys.readouterr().out) == bool(status)
