"""Cases of checkpoints of an engine at stage 0; see `stage0_job`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stage0_training import (
    SMALL_BUCKETS,
    Plain,
    assert_same,
    config_of,
    initialize,
    rank,
    states_of,
    train,
)


def save_and_resume(folder: Path) -> None:
    """Continues to the bit at the same world size, with every switch of load_checkpoint."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 9}}
    for dtype in (torch.float32, torch.bfloat16):
        config = config_of(dtype, 2, 0.5, scheduler=schedule)
        run = folder / f"resume-{dtype}".replace("torch.", "")
        engine = initialize(config, **SMALL_BUCKETS)
        train(engine, 0)
        train(engine, 1, spoil=True)
        train(engine, 2)
        engine.save_checkpoint(str(run), client_state={"epoch": 7})
        saved_states = states_of(engine.optimizer)
        again = initialize(config)  # other buckets
        path, client_state = again.load_checkpoint(str(run))
        assert path is not None and client_state["epoch"] == 7
        assert (again.global_steps, again.skipped_steps) == (3, 1)
        assert again.get_lr() == engine.get_lr()
        same_layout = initialize(config, **SMALL_BUCKETS)
        same_layout.load_checkpoint(str(run), tag="global_step3")
        assert_same(same_layout.optimizer, engine.optimizer, "loaded")
        for step in (3, 4):
            for each in (engine, again, same_layout):
                train(each, step)
        assert_same(same_layout.optimizer, engine.optimizer, "resumed")
        for ours, theirs in zip(again.module.parameters(), engine.module.parameters(), strict=True):
            assert torch.equal(ours, theirs)

        # Weights alone: they become the masters, and states stay what they are.
        for switches in ({"load_module_only": True}, {"load_optimizer_states": False}):
            fresh = initialize(config, **SMALL_BUCKETS)
            begin = fresh.lr_scheduler.state_dict()
            fresh.load_checkpoint(str(run), load_lr_scheduler_states=False, **switches)
            for ours, old in zip(states_of(fresh.optimizer), saved_states, strict=True):
                assert torch.equal(ours["param"], old["param"])
                assert ours["step"] == 0 and not ours["exp_avg"].any()
            masters = [s["master"] for s in states_of(fresh.optimizer) if "master" in s]
            assert all(torch.equal(m, m.bfloat16().float()) for m in masters)
            assert fresh.lr_scheduler.state_dict() == begin
            train(fresh, 3)
        # A custom way to load weights, and a tag that is written over.
        engine.save_checkpoint(str(run), tag="global_step3", save_latest=False)
        over = initialize(config, **SMALL_BUCKETS)
        over.load_checkpoint(
            str(run), custom_load_fn=lambda src, dst: dst.load_state_dict(src), tag="global_step3"
        )
        assert_same(over.optimizer, engine.optimizer, "written over")
        kept = list((run / "global_step3" / "belief_dist").glob("step-*"))
        assert len(kept) == 1 and over.global_steps == 5


def broken_checkpoints(folder: Path) -> None:
    """Each is one error on every rank, and the engine is as it was."""
    from belief_dist.checkpoint import CheckpointError

    run = folder / "broken"
    config = config_of(torch.bfloat16, 1, 0.5)
    engine = initialize(config)
    assert engine.load_checkpoint(str(run)) == (None, None)  # as DeepSpeed does: no `latest`
    for step in range(2):
        train(engine, step)
        engine.save_checkpoint(str(run), tag=f"at{step}")
    before = states_of(engine.optimizer)

    def fails(sentence: str, tag: str | None, kind: type[Exception] = CheckpointError) -> None:
        try:
            engine.load_checkpoint(str(run), tag=tag)
        except kind as error:
            assert re.search(sentence, str(error)), error
        else:
            raise AssertionError(f"{tag} was loaded")
        torch.distributed.barrier()

    def first_rank(action: Callable[[], Any]) -> None:
        if rank() == 0:
            action()
        torch.distributed.barrier()

    fails("there is no such checkpoint", "at9")
    ours = run / "at0" / "belief_dist"
    first_rank(lambda: shutil.move(ours, run / "aside"))
    fails("it has no folder 'belief_dist', so it was saved by an engine without", "at0")
    engine.load_checkpoint(str(run), tag="at0", load_module_only=True)
    engine.load_checkpoint(str(run), tag="at1")
    first_rank(lambda: shutil.move(run / "aside", ours))
    piece = sorted(ours.glob("step-*/__0_0.distcp"))[0]
    whole = piece.read_bytes()
    torch.distributed.barrier()
    first_rank(lambda: piece.write_bytes(whole[:-1]))
    fails("has .* bytes, and .* were written", "at0")
    first_rank(lambda: piece.write_bytes(whole))
    for found, old in zip(states_of(engine.optimizer), before, strict=True):
        assert all(torch.equal(found[k], v) for k, v in old.items() if k != "step")
    first_rank(lambda: shutil.copytree(ours, run / "at1" / "belief_dist", dirs_exist_ok=True))
    first_rank(lambda: shutil.rmtree(run / "at1" / "belief_dist" / "step-00000002"))
    fails("are of different saves", "at1", ValueError)


def save_for_others(folder: Path) -> None:
    """What another number of ranks will load."""
    for dtype in (torch.float32, torch.bfloat16):
        engine = initialize(config_of(dtype, 2, 0.5), **SMALL_BUCKETS)
        for step in range(3):
            train(engine, step)
        engine.save_checkpoint(str(folder / f"for-{dtype}".replace("torch.", "")))


def resume_from_others(folder: Path) -> None:
    """Continues what another number of ranks has saved, as the optimizer alone would."""
    from belief_dist import checkpoint

    for dtype in (torch.float32, torch.bfloat16):
        run = folder / f"for-{dtype}".replace("torch.", "")
        engine = initialize(config_of(dtype, 2, 0.5))
        engine.load_checkpoint(str(run))
        assert engine.global_steps == 3
        plain = Plain(dtype, 2, max_grad_norm=0.5)
        checkpoint.load(
            run / "global_step3" / "belief_dist", optimizer=plain.optimizer, model=plain.model
        )
        assert_same(engine.optimizer, plain.optimizer, "loaded")
        assert {s["step"] for s in states_of(engine.optimizer)} == {3}
        assert any(s["exp_avg"].any() for s in states_of(engine.optimizer))
        for step in (3, 4):
            train(engine, step)
            plain.step(step)
        assert_same(engine.optimizer, plain.optimizer, "resumed")
