"""The GPU kernels without a GPU: their bits in Triton's interpreter, and their machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from belief_dist import AdaBelief, kernels, verify
from belief_dist.device_scalars import device_scalars
from belief_dist.kernels.build import Unavailable, one_line
from belief_dist.kernels.triton_launch import TritonKernel
from belief_dist.options import DEFAULTS
from belief_dist.rule import Direction, step_scalars
from tests.harness.interpreter import run_interpreted
from tests.harness.paths import ROOT


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_interpreter_gives_the_bits_of_the_reference() -> None:
    run_interpreted("tests/kernels/triton_interpreted.py")


def test_the_benchmark_says_what_it_lacks() -> None:
    done = python("-m", "benchmarks.gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks.gpu needs a CUDA GPU; torch sees none.\n"


# - Scalars that the device computes


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decouple": False, "maximize": True},
        {"weight_decay": 0.1, "fixed_decay": True},
        {"rectify": True},
        {"rectify": True, "degenerated_to_sgd": False, "betas": (0.0, 0.9)},
        {"betas": (0.0, 0.0)},
        {"betas": (0.5, 0.0), "rectify": True},
    ],
    ids=str,
)
def test_device_scalars_equal_those_of_the_host(switches: dict[str, Any]) -> None:
    """Bound: eight roundings, and those of the powers, which 1 - beta**step magnifies.

    Rectification subtracts once more: its length of the moving average is a difference.
    """
    options = {**DEFAULTS, "lr": 0.0123, **switches}
    for step in [*range(1, 40), 100, 1000, 10**6, 2**31 + 5]:
        host = step_scalars(options, step)
        lr = torch.tensor(options["lr"], dtype=torch.float64)
        for rate in (lr, options["lr"]):
            device = device_scalars({**options, "lr": None}, torch.tensor(step), rate)
            assert device.coupled == (host.coupled_decay != 0.0)
            (found,) = device.on_host()
            # What no power enters has the same bits.
            for name in set(host._fields) - {"step_size", "denom_scale"}:
                assert getattr(found, name) == getattr(host, name), (name, step)
            smallest = min(1 - beta**step for beta in options["betas"])
            bound = 2.0**-52 * (8 + 2 / smallest) * (100 if options["rectify"] else 1)
            for name in {"step_size", "denom_scale"}:
                if host.direction != Direction.NONE:
                    theirs = getattr(host, name)
                    assert abs(getattr(found, name) - theirs) <= bound * theirs, (name, step)
                    ours32, theirs32 = torch.tensor([getattr(found, name), theirs]).unbind()
                    assert abs(ours32 - theirs32) <= 2.0**-23 * theirs32  # one place in float32


# - The choice


def test_without_a_gpu_there_is_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    kernel = kernels._triton()
    assert isinstance(kernel, Unavailable) and "torch sees no GPU" in str(kernel)
    found = {name: (usable, text) for name, usable, text in kernels.backends()}
    assert found["triton"] == (False, "torch sees no GPU")
    done = python(
        "-c", "import belief_dist.kernels as k; k.backends()", BELIEF_DIST_BACKEND="triton"
    )
    assert "BELIEF_DIST_BACKEND=triton, but torch sees no GPU" in done.stderr


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where torch sees a GPU, as far as the choice of a backend asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("BELIEF_DIST_BACKEND", raising=False)
    kernels._triton.cache_clear()
    yield
    kernels._triton.cache_clear()


@pytest.mark.usefixtures("a_gpu")
def test_a_broken_triton_is_a_warning_and_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # any import of it fails
    with pytest.warns(RuntimeWarning) as warned:
        for _ in range(2):
            param = torch.empty(1, device="meta")
            assert kernels.prefers_foreach(param, None, None)
    (warning,), (record,) = warned, caplog.records
    for said in (str(warning.message), record.getMessage()):
        assert "plain torch, because triton cannot be imported" in said
        assert "import of triton halted" in said
        assert "23.4 ms beside 2.7" in said and "BELIEF_DIST_BACKEND=eager" in said
    optimizer = AdaBelief([torch.nn.Parameter(torch.empty(2, device="meta"))])
    line = str(verify(optimizer))
    assert "foreach kernel" in line and "because triton cannot be imported" in line
    assert verify(AdaBelief([torch.nn.Parameter(torch.empty(2))])).reason == ""
    for option in ({"foreach": True}, {"fused": False}):
        asked = AdaBelief([torch.nn.Parameter(torch.empty(2, device="meta"))], **option)
        (name, value) = next(iter(option.items()))
        assert f"because {name}={value} asks for it" in str(verify(asked))


@pytest.mark.usefixtures("a_gpu")
def test_plain_torch_that_was_asked_for_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BELIEF_DIST_BACKEND", "eager")
    assert isinstance(kernels._triton(), Unavailable)
    optimizer = AdaBelief([torch.nn.Parameter(torch.empty(2, device="meta"))])
    assert verify(optimizer).reason == "BELIEF_DIST_BACKEND=eager forbids it"


def test_an_old_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from belief_dist.kernels import triton_kernel

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_kernel, "VERSION", (3, 3))
    with pytest.raises(Unavailable, match=r"is too old: it takes 3\.4 or newer"):
        TritonKernel()


def test_the_compilers_own_sentence_is_the_reason() -> None:
    """It comes after much source and a caret; or with the error that Triton's own one wraps."""
    source = "at 20:4:\n    some = kernel\n    source(here)\n    ^\n"
    sentence = "TypeError('cannot convert None of type NoneType to tensor')"
    assert one_line(ValueError(source + sentence)) == f"ValueError: {sentence}"
    outer = ValueError(source)
    outer.__cause__ = KeyError("inner")
    assert one_line(outer) == "KeyError: 'inner'"
    assert one_line(ValueError("first\n\nsecond")) == "ValueError: first second"
    assert one_line(ValueError()) == "ValueError"


def test_sums_that_do_not_work_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates stay with Triton; sums are those of plain torch."""

    class Broken:
        def find_problem(self, device: str) -> str:
            return "a first launch failed (CompilationError: no)"

    kernel = TritonKernel.__new__(TritonKernel)
    kernel.interprets, kernel.reductions = False, Broken()  # type: ignore[assignment]
    monkeypatch.setattr(kernels, "_triton", lambda: kernel)
    kernels._checked_reductions.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match=r"sums.* plain torch.*CompilationError: no"
        ) as all_:
            for _ in range(2):
                assert kernels._reductions(torch.device("cuda")) is None
        assert len(all_) == 1
    finally:
        kernels._checked_reductions.cache_clear()


def test_triton_is_preferred_to_multi_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton", lambda: TritonKernel.__new__(TritonKernel))
    param = torch.empty(1, device="meta")
    assert not kernels.prefers_foreach(param, None, None)
    assert kernels.prefers_foreach(param, True, None)
    assert kernels.prefers_foreach(param, None, False)


# - Machine code, compiled ahead of time


class Form(NamedTuple):
    """Types of the streams, and what the compiled kernel may cost."""

    param: str
    grad: str
    state: str
    out: str | None = None
    remainder: str | None = None
    exponent: str | None = None
    # A program has 256 threads and a multiprocessor 65,536 registers, given out by eights: up to
    # 40 let 6 programs run at once (75 % of all threads), 48 let 5 (62 %), 64 let 4 (50 %). A full
    # house takes 32, which spills: four elements of four streams, their addresses, and a division
    # and a root that are rounded to nearest. It would not help: 1,024 threads with 32 bytes each
    # on their way are twice of what an H100's memory needs to be busy.
    registers: int = 40
    average: str | None = None


FORMS = {
    "float32": Form("fp32", "fp32", "fp32"),
    "masters and bfloat16": Form("fp32", "bf16", "fp32", out="bf16"),
    "remainder": Form("bf16", "bf16", "fp32", remainder="i16"),
    "bfloat16 states": Form("fp32", "bf16", "bf16", out="bf16", registers=48),
    "remainder, bfloat16 states": Form("bf16", "bf16", "bf16", remainder="i16", registers=48),
    "8 bits": Form("fp32", "bf16", "u8", out="bf16", exponent="u8", registers=64),
    "remainder8, 8 bits": Form("bf16", "bf16", "u8", None, "i8", "u8", registers=64),
    "average": Form("fp32", "fp32", "fp32", average="fp32"),
    "remainder8, bfloat16 average": Form(
        "bf16", "bf16", "fp32", remainder="i8", average="bf16", registers=48
    ),
}
OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
SIZES = {"fp32": 4, "bf16": 2, "i16": 2, "i8": 1, "u8": 1}


def compile_ahead(
    entry: str,
    form: Form,
    target: Any,
    warps: int,
    *,
    slots: int | None = None,
    several: bool = False,
) -> Any:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    from belief_dist.kernels import triton_kernel

    types = {
        "param": form.param,
        "grad": form.grad,
        "exp_avg": form.state,
        "exp_avg_sq": form.state,
        "max_exp_avg_sq": None,
        "param_out": form.out,
        "remainder": form.remainder,
        "param_ema": form.average,
        "exp_avg_exponent": form.exponent,
        "exp_avg_sq_exponent": form.exponent,
        "max_exp_avg_sq_exponent": None,
        "sums": None if slots is None else "i32",
        "segments": "i64",
        "grads": "i64",
        "chunks": "i64",
        "skip_at": None,
        "grad_scale_at": None,
        "scalars_at": "fp64" if several else None,
    }
    integers = {"numel": "i64", "first": "i64", "key": "i32", "direction": "i32", "step": "i32"}
    floats = {"fp32": tl.float32, "bf16": tl.bfloat16, None: None}
    dtypes = {**floats, "i16": tl.int16, "i8": tl.int8, "u8": tl.uint8}
    constants = {name: None for name, kind in types.items() if kind is None} | {
        "PARAM": dtypes[form.param],
        "GRAD": dtypes[form.grad],
        "STATE": dtypes[form.state],
        "MAX": None,
        "OUT": dtypes[form.out],
        "REMAINDER": dtypes[form.remainder],
        "EMA": dtypes[form.average],
        "EXPONENT": dtypes[form.exponent],
        "MAX_EXPONENT": None,
        "SLOTS": slots,
        "ALIGNED": True,
        "COUPLED": False,
        "TILE": triton_kernel.TILE,
        "CHUNK_TILES": triton_kernel.CHUNK_TILES,
        "ROW": 12 if several else None,
    }
    function = getattr(triton_kernel, entry)
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = f"*{types[name]}"
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = integers.get(name, "fp32")
    present = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(
        ASTSource(function, signature, present, aligned),
        target=target,
        options=OPTIONS | {"num_warps": warps},
    )


def expected_accesses(form: Form) -> tuple[Counter[int], Counter[int]]:
    """Return how many loads and stores of how many bytes a thread has, by the definition.

    In a full tile each stream moves its four elements at once; the last tile of a segment has
    masks, and one access for each element. Exponents are one byte each.
    """
    states = [SIZES[form.state]] * 2
    masters = [SIZES[t] for t in (form.param, form.remainder, form.average) if t is not None]
    loads = [*states, *masters, SIZES[form.grad]]
    stores = [*states, *masters, *([] if form.out is None else [SIZES[form.out]])]
    counts = []
    for streams in (loads, stores):
        count = Counter([4 * size for size in streams])
        count.update(streams * 4)
        count[1] += 0 if form.exponent is None else 4
        counts.append(+count)
    return counts[0], counts[1]


ENTRIES = ["update_flat", "update_many"]
STORE = r"\bst\.global(?:\.v(\d))?\.b(\d+)"


def table_reads(form: Form) -> int:
    """Return how many numbers `update_many` reads of its table; unused ones are not read."""
    exponents = 0 if form.exponent is None else 2
    pointers = 4 + sum(t is not None for t in (form.out, form.remainder, form.average)) + exponents
    place = 2  # the chunk, and the number of elements
    return pointers + place + 2 * is_noisy(form)  # what keys the noise


def is_noisy(form: Form) -> bool:
    return form.state != "fp32" or form.average == "bf16" or form.remainder == "i8"


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Return what machine code for NVIDIA's GPUs takes: REG, STACK and LOCAL."""
    import triton

    cubin = folder / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("entry", ENTRIES)
def test_nvidia_code(entry: str, name: str, capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    form = FORMS[name]
    compiled = compile_ahead(entry, form, GPUTarget("cuda", capability, 32), 8)
    ptx = compiled.asm["ptx"]

    # Bits: nothing is fused, flushed or approximated.
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", ptx)
    operations = set(re.findall(r"\b(?:add|sub|mul|div|sqrt)\.\S*f32", ptx))
    assert operations == {f"{op}.rn.f32" for op in ("add", "sub", "mul", "div", "sqrt")}

    # Width: 16 bytes of float32 in one access, 8 of 16-bit numbers, 4 of 8-bit ones.
    for kind, expected in zip(("ld", "st"), expected_accesses(form), strict=True):
        found: Counter[int] = Counter()
        for vector, bits in re.findall(rf"\b{kind}\.global(?:\.v(\d))?\.b(\d+)", ptx):
            found[int(vector or 1) * int(bits) // 8] += 1
        if (entry, kind) == ("update_many", "ld"):
            expected[8] += table_reads(form)
        assert found == expected, kind

    # Nothing is spilled. What is shared is the largest number of a block, which two warps hold.
    assert ".local" not in ptx
    assert compiled.metadata.shared <= (0 if form.exponent is None else 32)
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= form.registers


@pytest.mark.parametrize("name", FORMS)
def test_sums_on_nvidia(name: str, tmp_path: Path) -> None:
    """They cost no traffic and spill nothing: what is added up is in registers."""
    from triton.backends.compiler import GPUTarget

    form = FORMS[name]
    compiled = compile_ahead("update_many", form, GPUTarget("cuda", 90, 32), 8, slots=256)
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", ptx)
    watched = 3 + (0 if form.exponent is None else 2) + (form.average is not None)
    # Of each what is read and what is written, in the path of full tiles and in that of the last.
    assert len(re.findall(r"\b(?:red|atom)\.global\.gpu\.relaxed\.add\.u32", ptx)) == 4 * watched
    stores = Counter(int(v or 1) * int(n) // 8 for v, n in re.findall(STORE, ptx))
    assert stores == expected_accesses(form)[1]
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 96


@pytest.mark.parametrize("name", FORMS)
def test_scalars_of_each_segment_on_nvidia(name: str, tmp_path: Path) -> None:
    """They are read by each program, in 8 bytes each, and nothing else changes."""
    from triton.backends.compiler import GPUTarget

    form = FORMS[name]
    compiled = compile_ahead("update_many", form, GPUTarget("cuda", 90, 32), 8, several=True)
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", ptx)
    loads, stores = expected_accesses(form)
    # But for coupled decay; direction and sign are numbers, too, and the step keys noise.
    numbers = 7 + 2 + (form.average is not None)
    loads[8] += table_reads(form) + 1 + numbers + is_noisy(form)
    for kind, expected in (("ld", loads), ("st", stores)):
        accesses = re.findall(rf"\b{kind}\.global(?:\.v(\d))?\.b(\d+)", ptx)
        assert Counter(int(v or 1) * int(n) // 8 for v, n in accesses) == expected, kind
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 96


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_amd_code(entry: str, name: str) -> None:
    from triton.backends.compiler import GPUTarget

    form = FORMS[name]
    compiled = compile_ahead(entry, form, GPUTarget("hip", "gfx942", 64), 4)
    code = compiled.asm["amdgcn"]

    # A division to nearest is made of six multiply-adds, a root of two, or of five by Triton before
    # 3.7; no other one is fused. Eight elements: four in the path of full tiles, four in that of
    # the last one. A packed instruction does two at once.
    fused = re.findall(r"\bv_(pk_)?(?:fma|fmac|mad|mac|div_fmas)_f32", code)
    root = 2 if "v_sqrt_f32" in code else 5
    assert len(fused) + fused.count("pk_") == 8 * (6 + root)

    widths = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
    widths |= {"dword": 4, "dwordx2": 8, "dwordx4": 16}
    by_buffers = "buffer_load_" in code  # since Triton 3.6, and then all of them
    for kind, expected in zip(("load", "store"), expected_accesses(form), strict=True):
        if not by_buffers:
            break
        assert not re.search(rf"\b(?:global|flat)_{kind}_", code)
        found = Counter(widths[w] for w in re.findall(rf"\bbuffer_{kind}_(\w+)", code))
        assert found == expected, kind

    used = dict(re.findall(r"\.(\w*vgpr\w*|private_segment_fixed_size):\s*(\d+)", code))
    assert used["vgpr_spill_count"] == used["private_segment_fixed_size"] == "0"
    assert int(used["vgpr_count"]) <= 64  # up to which 8 wavefronts, all there can be, fit
    assert compiled.metadata.shared <= (0 if form.exponent is None else 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_codec_on_nvidia(dtype: str, capability: int, tmp_path: Path) -> None:
    compiled = compile_codec(dtype, ("cuda", capability, 32), 8)
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\bfma\b|\.ftz|\.approx|div\.full", ptx)
    assert set(re.findall(r"\bdiv\.\S*f32", ptx)) == {"div.rn.f32"}
    assert ".local" not in ptx
    # Eight elements a thread of 16 bits are 16 bytes; of 32 bits, twice that.
    wide = re.findall(r"\bld\.global\.v4\.b32", ptx)
    assert len(wide) == (4 if dtype == "fp32" else 2)
    usage = resources(compiled, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 64


def test_the_codec_on_amd() -> None:
    code = compile_codec("bf16", ("hip", "gfx942", 64), 4).asm["amdgcn"]
    fused = re.findall(r"\bv_(pk_)?(?:fma|fmac|mad|mac|div_fmas)_f32", code)
    divisions = code.count("v_div_fmas_f32")
    assert divisions > 0 and len(fused) + fused.count("pk_") == 6 * divisions


def compile_codec(dtype: str, target: tuple[str, Any, int], warps: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from belief_dist.kernels import triton_codec

    signature = {"wire": "*u8", "values": f"*{dtype}", "error": f"*{dtype}", "blocks": "i32"}
    source = ASTSource(
        triton_codec.encode_int8,
        {**signature, "ROWS": "constexpr"},
        {"ROWS": triton_codec.ROWS},
        {(position,): [["tt.divisibility", 16]] for position in range(3)},
    )
    options = OPTIONS | {"num_warps": warps}
    return triton.compile(source, target=GPUTarget(*target), options=options)
