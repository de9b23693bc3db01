"""Who may import whom: every module has its place in one chain, and the core knows no adapter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "belief_dist"

# A module imports only from rows above its own. A folder stands for its `__init__`.
CHAIN = """
version deprecations rule operands options observers state_init_step async_device phases
engine_options device_scalars norm params state_dict state_formats data replay

kernels.build kernels.threads kernels.foreach kernels.triton_formats kernels.triton_tables
kernels.triton_kernel
kernels.cpp kernels.signals kernels.eager
kernels.triton_reduce kernels.triton_scales kernels.triton_codec kernels.triton_meet
kernels.triton_reduce_launch kernels.triton_meet_launch
kernels.triton_launch
kernels

host_memory.forks
host_memory.arena
host_memory.team
host_memory

sharding sharding.layout sharding.dtensor sharding.driver sharding.buffer_pool sharding.read_guard
sharding.outer_reducers sharding.sharded_grad sharding.group_options sharding.norms
sharding.schedule sharding.grad_codec sharding.param_specs
sharding.bucket sharding.collectives sharding.host_share
sharding.module_buffers
sharding.param_storage sharding.data_edits sharding.reduce_stream
sharding.host_lines sharding.point_to_point
sharding.host_collectives
sharding.trial
sharding.shared_memory sharding.across_hosts sharding.symmetric_memory
sharding.hsdp sharding.rank_checks sharding.cpu_offload
sharding.masters sharding.process_groups sharding.rank_sets sharding.grad_reducer
sharding.zero1 sharding.zero2 sharding.step_consensus sharding.own_ranks
sharding.micro_batches sharding.model_checks sharding.gathers
sharding.graph_counts sharding.disagreements sharding.replica_repair sharding.spike_guard
sharding.state_sums sharding.gradient_access
sharding.shard_update
sharding.engine sharding.loss_scale
sharding.checkpoint_access sharding.averages

step_plan
optimizer sharded

checkpoint.names checkpoint.chunks checkpoint.safe_reader checkpoint.plain_values
checkpoint.progress
checkpoint.checksummed_files checkpoint.atomic_file
checkpoint.errors checkpoint.dcp_tensor checkpoint.run_directory
checkpoint.local_shards checkpoint.metadata
checkpoint.entries
checkpoint.saving checkpoint.torch_api
checkpoint.async_save checkpoint.loading checkpoint.file_transfer
checkpoint.standby
checkpoint.formats checkpoint.formats.safetensors checkpoint.formats.full_state
checkpoint.formats.torch_file
checkpoint.formats.torch checkpoint.formats.deepspeed
checkpoint.formats.convert
checkpoint

deepspeed deepspeed.import_hook deepspeed.wrapping deepspeed.stage0
deepspeed.fp16 deepspeed.offload deepspeed.checkpoint_loading
deepspeed.stage0.loss_scale deepspeed.stage0.compatibility
deepspeed.stage0.driver
deepspeed.stage0.attach deepspeed.stage0.checkpoints
deepspeed.stage0.engine
deepspeed.patches

replacement_warning verification

distributed.errors
distributed.handshake distributed.network distributed.rank_info distributed.slurm
distributed.elastic_store distributed.mpi
distributed.store
distributed.init
distributed

mpi_backend.messages mpi_backend.watch
mpi_backend.exchange mpi_backend.reductions mpi_backend.work
mpi_backend.group
mpi_backend

integrations
integrations.mpi
__init__
deepspeed_keys figures
deepspeed_config deepspeed_schema doctor memory_plan
deepspeed_launcher_files plan_picture bench
telemetry.records telemetry.quantiles telemetry.prometheus telemetry.costs
telemetry.statistics telemetry.events
telemetry.monitor telemetry.drawings
telemetry
telemetry.report migrate
commands.output
commands.machine commands.training_files commands.checkpoints
commands
__main__ cli hf run
"""
ROWS = [line.split() for line in CHAIN.splitlines() if line]
# Folders that could be packages of their own: they import nothing of this one but its version.
STANDALONE = {"distributed", "mpi_backend"}
THIRD_PARTY = {"torch"}
# Beside the package: they import nothing of it before they are called.
BESIDE = {"_belief_dist_autoload", "_belief_dist_cli"}
OPTIONAL = {
    "mpi_backend": {"mpi4py"},
    "deepspeed": {"deepspeed"},
    "memory_plan": {"transformers"},
    "figures": {"matplotlib"},
    "kernels": {"triton"},
    "distributed": {"mpi4py"},
    "checkpoint": {"safetensors"},
    "commands": {"rich"},
    "hf": {"transformers"},
    "telemetry": {"matplotlib", "prometheus_client"},
}
# The only modules that may name an optional dependency at their top: no other imports them there.
LAZY = {f"triton_{name}" for name in ("formats", "kernel", "codec", "reduce", "scales", "meet")}


def module_of(path: Path) -> str:
    """Return the dotted name below the package; "__init__" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def own_module(name: str) -> str:
    """Return which module of the package provides `name`, such as "belief_dist.kernels.update_"."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()  # a name in the module in front of it
    return ".".join(parts) or "__init__"


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return the modules of the package, and the names of others, that a file imports anywhere."""
    own: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            is_own = module.split(".")[0] == "belief_dist"
            names = [f"{module}.{alias.name}" for alias in node.names] if is_own else [module]
        for name in names:
            if name.split(".")[0] == "belief_dist":
                own.add(own_module(name))
            else:
                other.add(name)
    return own, other


def test_every_module_has_its_place() -> None:
    placed = [name for row in ROWS for name in row]
    assert sorted(placed) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upward_in_the_chain(module: str) -> None:
    row = next(i for i, names in enumerate(ROWS) if module in names)
    above = {name for names in ROWS[:row] for name in names}
    own, other = imports_of(MODULES[module])
    room = module.split(".")[0]
    assert own - {module} <= above, f"{module} may not import {sorted(own - above)}"
    if room in STANDALONE:
        assert {name.split(".")[0] for name in own} <= {room, "version"}
    for name in other:
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names | BESIDE:
            assert top in THIRD_PARTY | OPTIONAL.get(room, set()), f"{module} imports {name}"


def test_the_package_alone_registers_adapters() -> None:
    """What observes the optimizers is imported by `__init__`, and by nothing that trains."""
    for module, path in MODULES.items():
        rooms = {name.split(".")[0] for name in imports_of(path)[0]}
        if module.split(".")[0] not in ("deepspeed", "__init__"):
            assert "deepspeed" not in rooms, module
        if module != "__init__":
            assert "replacement_warning" not in rooms, module


def imports_at_the_top(path: Path) -> set[str]:
    statements = ast.parse(path.read_text()).body
    return {
        name
        for node in statements
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        for name in (getattr(node, "module", None) or alias.name, alias.name)
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_is_imported_where_it_serves(path: Path) -> None:
    if path.stem in LAZY:
        return
    parts = {part for name in imports_at_the_top(path) for part in name.split(".")}
    assert not parts & {"triton", *LAZY}
    mentions = any(name.split(".")[0] == "triton" for name in imports_of(path)[1])
    assert not mentions or path.stem == "triton_launch"


def test_import_is_light() -> None:
    """Importing the package loads no optional dependency, and none of the command line."""
    code = (
        "import sys, torch; before = set(sys.modules); import belief_dist; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'deepspeed', 'mpi4py', 'triton', 'numpy', 'rich', 'typer', "
        "'pydantic', 'matplotlib', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
