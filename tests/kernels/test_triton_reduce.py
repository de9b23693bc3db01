"""The GPU's sums, squares, checksums and factors: in Triton's interpreter, and as machine code."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import pytest

from tests.harness.interpreter import run_interpreted

TILE, WARPS = 1024, 8


def test_the_interpreter_gives_the_bits_of_the_other_kernels() -> None:
    run_interpreted("tests/kernels/triton_reduce_interpreted.py")


class Sum(NamedTuple):
    """What is added, and how."""

    out: str | None
    pieces: str
    count: int = 1  # 0 where it is known at run time only
    accumulate: bool = False
    codes: bool = False
    squares: bool = True
    apart: bool = False  # each message lies at an address of its own

    def loads(self) -> Counter[int]:
        """Return how many bytes a thread reads at once: four elements of each message."""
        size = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}[self.pieces]
        messages = self.count or 2  # the first, and those of the loop
        loads = Counter({4 * size: messages})
        if self.codes:
            loads[4] += messages  # scales
        if self.accumulate:
            loads[16] += 1
        if self.apart:
            loads[8] += messages
        return loads


SUMS = {
    "float32, 2 ranks": Sum("fp32", "fp32", 2),
    "bfloat16, 8 ranks": Sum("fp32", "bf16", 8),
    "bfloat16, any ranks, accumulated": Sum("fp32", "bf16", 0, accumulate=True),
    "8-bit codes, 4 ranks": Sum("fp32", "u8", 4, codes=True),
    "float32, 4 ranks' memory": Sum("fp32", "fp32", 4, apart=True),
    "bfloat16, any ranks' memory, accumulated": Sum("fp32", "bf16", 0, accumulate=True, apart=True),
    "8-bit codes, 2 ranks' memory": Sum("fp32", "u8", 2, codes=True, apart=True),
    "squares of bfloat16": Sum(None, "bf16"),
    "sum alone": Sum("fp32", "fp32", 2, squares=False),
}


def compile_ahead(
    function: Any,
    kinds: dict[str, str | None],
    constants: dict[str, Any],
    target: Any,
    warps: int,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile for a target that need not be here; a kind of None is an absent pointer."""
    import triton
    from triton.compiler import ASTSource

    constants = {**constants, **{name: None for name, kind in kinds.items() if kind is None}}
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        kind = "constexpr" if name in constants else kinds[name]
        assert kind is not None
        signature[name] = kind
        if kind.startswith("*") or name in ("numel", "stride"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=target,
        options={
            "num_warps": warps,
            "num_stages": 1,
            "enable_fp_fusion": False,
            **(options or {}),
        },
    )


def compile_sum(form: Sum, target: Any, warps: int) -> Any:
    import triton.language as tl

    from belief_dist.kernels import triton_reduce

    dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16, "u8": tl.uint8}
    kinds = {
        "out": form.out and f"*{form.out}",
        "pieces": None if form.apart else f"*{form.pieces}",
        "addresses": "*i64" if form.apart else None,
        "bins": "*i64" if form.squares else None,
        **dict.fromkeys(("numel", "stride", "num_pieces"), "i32"),
    }
    constants = {
        "DTYPE": dtypes[form.pieces],
        "ALIGNED": 16,
        "PIECES": form.count,
        "ACCUMULATE": form.accumulate,
        "CODES": form.codes,
        "WIDE": False,
        "TILE": TILE,
    }
    return compile_ahead(triton_reduce.reduce, kinds, constants, target, warps)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", SUMS)
def test_nvidia_reduce(name: str, capability: int) -> None:
    from triton.backends.compiler import GPUTarget

    form = SUMS[name]
    ptx = compile_sum(form, GPUTarget("cuda", capability, 32), WARPS).asm["ptx"]
    # Nothing is fused, flushed, approximated or kept outside of registers.
    assert not re.search(r"\bfma\b|\.ftz|\.approx|\.local", ptx)
    loads: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global(?:\.v(\d))?\.b(\d+)", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    assert loads == form.loads()
    stores = re.findall(r"\bst\.global\S*", ptx)
    assert stores == ["st.global.v4.b32"] * (form.out is not None)


@pytest.mark.parametrize("name", SUMS)
def test_amd_reduce(name: str) -> None:
    from triton.backends.compiler import GPUTarget

    code = compile_sum(SUMS[name], GPUTarget("hip", "gfx942", 64), 4).asm["amdgcn"]
    assert not re.search(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_f32|v_fma_f64", code)
    used = dict(re.findall(r"\.(\w*vgpr\w*|private_segment_fixed_size):\s*(\d+)", code))
    assert used["vgpr_spill_count"] == used["private_segment_fixed_size"] == "0"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_nvidia_reduce_squares_of_many(dtype: str, capability: int) -> None:
    """Four elements a thread in one access, whatever address the table has."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from belief_dist.kernels import triton_reduce

    kinds: dict[str, str | None] = dict.fromkeys(("segments", "chunks", "bins"), "*i64")
    constants = {
        "DTYPE": tl.float32 if dtype == "fp32" else tl.bfloat16,
        "WIDE": False,
        "TILE": TILE,
        "CHUNK_TILES": 8,
    }
    target = GPUTarget("cuda", capability, 32)
    kinds["num_chunks"] = "i32"
    ptx = compile_ahead(triton_reduce.squares, kinds, constants, target, WARPS).asm["ptx"]
    assert not re.search(r"\bfma\b|\.ftz|\.approx|\.local", ptx)
    assert f"ld.global.v{4 if dtype == 'fp32' else 2}.b32" in ptx


TARGETS = [
    pytest.param(target, id=f"{target[0]}-{target[1]}")
    for target in (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
]


@pytest.mark.parametrize("target", TARGETS)
def test_reduce_checksums_compile(target: tuple[str, Any, int]) -> None:
    """Full chunks are read 16 bytes at a time; each program adds to memory once."""
    from triton.backends.compiler import GPUTarget

    from belief_dist.kernels import triton_reduce

    kinds: dict[str, str | None] = dict.fromkeys(("segments", "chunks", "sums"), "*i64")
    constants = {"TILE": 2048, "CHUNK_TILES": 8}
    compiled = compile_ahead(triton_reduce.checksums, kinds, constants, GPUTarget(*target), 8)
    if target[0] == "cuda":
        ptx = compiled.asm["ptx"]
        assert ".local" not in ptx and "ld.global.v2.b64" in ptx
        assert len(re.findall(r"\batom\.|\bred\.", ptx)) == 1


@pytest.mark.parametrize("rank", [0, 1])  # Triton takes ones for constants
@pytest.mark.parametrize("target", TARGETS)
def test_reduce_meetings_compile(target: tuple[str, Any, int], rank: int) -> None:
    """Numbers are released to, and acquired from, the whole system; whoever waits in vain ends.

    On NVIDIA's by stores and loads: not every link between GPUs has atomic operations.
    """
    from triton.backends.compiler import GPUTarget

    from belief_dist.kernels import triton_meet
    from belief_dist.kernels.triton_meet_launch import _width

    kinds: dict[str, str | None] = dict.fromkeys(("pads", "own", "late"), "*i64")
    kinds |= {"rank": "i32", "world_size": "i32", "limit": "i64"}
    constants: dict[str, Any] = {"PTX": target[0] == "cuda", "WIDTH": _width(8), "ASSERTS": True}
    if rank == 1:
        constants["rank"] = 1
    compiled = compile_ahead(
        triton_meet.meet, kinds, constants, GPUTarget(*target), 1, {"debug": True}
    )
    if target[0] == "cuda":
        ptx = compiled.asm["ptx"]
        assert "atom." not in ptx and "has not come in time" in compiled.asm["ttir"]
        # Two of the 64 slots for each thread; what is stored is a number, or who was late.
        assert len(re.findall(r"\bst\.release\.sys\.global\.u64", ptx)) == 4
        looks = [line for line in ptx.splitlines() if "ld.acquire.sys.global.u64" in line]
        assert len(looks) == 2 and not any("@" in line for line in looks)
        assert "%globaltimer" in ptx and "trap;" in ptx
    else:
        assert "s_trap" in compiled.asm["amdgcn"]
    kinds = {"out": "*i64", "addresses": "*i64", "numel": "i32", "num_pieces": "i32"}
    compile_ahead(triton_meet.add_words, kinds, {"TILE": 256}, GPUTarget(*target), 1)


@pytest.mark.parametrize("target", TARGETS)
def test_reduce_factors_compile(target: tuple[str, Any, int]) -> None:
    """Division and root are rounded to nearest."""
    from triton.backends.compiler import GPUTarget

    from belief_dist.kernels import triton_scales

    kinds: dict[str, str | None] = {
        "scales": "*fp64",
        "bins": "*i64",
        "constants": "*fp64",
        "loss_scale_at": "*fp32",
    }
    compiled = compile_ahead(
        triton_scales.grad_scales, kinds, {"CLIP": True}, GPUTarget(*target), 1
    )
    if target[0] == "cuda":
        ptx = compiled.asm["ptx"]
        assert not re.search(r"\bfma\b|\.approx", ptx)
        assert "div.rn.f64" in ptx and "sqrt.rn.f64" in ptx
