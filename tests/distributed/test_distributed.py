"""Joining the ranks of a job: what launchers leave in the environment, and real processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from belief_dist.distributed import LaunchError, handshake, slurm
from belief_dist.distributed.network import address_towards, interface_of, listen_at
from belief_dist.distributed.rank_info import HYDRA, OPEN_MPI, SLURM, read_rank_info
from benchmarks.jobs import free_port
from tests.harness.paths import ROOT

JOB = str(Path(__file__).with_name("distributed_job.py"))

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
    **{"CROSS_RANK": "1", "CROSS_SIZE": "2"},
}
MPI_OPEN = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
MPI_HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    **{"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
    **{"SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
}
# One process on each of two nodes, and in it another launcher.
OUTER_SRUN = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "the deepspeed launcher"),
        (MPI_OPEN, OPEN_MPI),
        (MPI_HYDRA, HYDRA),
        (SRUN, SLURM),
        (OUTER_SRUN | TORCHRUN, "torchrun"),
        (OUTER_SRUN | MPI_OPEN, OPEN_MPI),
        (OUTER_SRUN | MPI_HYDRA, HYDRA),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, SLURM),  # srun --mpi=pmi2
        (MPI_HYDRA | {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, HYDRA),  # deepspeed's mpich launcher
    ],
)
def test_every_launcher_tells_the_place(environ: dict[str, str], launcher: str) -> None:
    place = read_rank_info(environ)
    assert (place.rank, place.world_size) == (3, 4)
    assert (place.local_rank, place.local_world_size) == (1, 2)
    assert place.launcher == launcher


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        # A batch script, not a step: one process, however many tasks the job may start.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},
    ],
)
def test_without_a_launcher_a_process_is_alone(environ: dict[str, str]) -> None:
    place = read_rank_info(environ)
    assert (place.rank, place.world_size, place.local_rank) == (0, 1, 0)


BY_HAND = {"RANK": "1", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "1"}, "RANK is '1', but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK is -1"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK must be an integer, got 'one'"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "WORLD_SIZE must be an integer, got ''"),
        (BY_HAND | {"LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer, got 'x'"),
        (BY_HAND | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4 and WORLD_SIZE is 4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set"),
        ({"PMI_SIZE": "2"}, "PMI_RANK is not set"),
        (SRUN | {"SLURM_PROCID": "9"}, "SLURM_PROCID is 9 and SLURM_STEP_NUM_TASKS is 4"),
        (BY_HAND | MPI_OPEN, "RANK=1 and WORLD_SIZE=4 .* OMPI_COMM_WORLD_RANK=3"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | SRUN, "WORLD_SIZE=1 .* SLURM_STEP_NUM_TASKS=4"),
        (MPI_OPEN | MPI_HYDRA, "OMPI_COMM_WORLD_RANK=3 .* PMI_RANK=3"),
    ],
)
def test_an_impossible_environment_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        read_rank_info(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node0", "node0"),
        ("node0,node1", "node0"),
        ("node[0-3]", "node0"),
        ("gpu[03-05,7],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack[2-3]n[01-16]-ib.site,x", "rack2n01-ib.site"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    environ = {"SLURM_JOB_NODELIST": "other", "SLURM_STEP_NODELIST": nodes}
    assert slurm.first_host(environ) == (first, "SLURM_STEP_NODELIST")


def test_a_node_list_that_is_none_is_named() -> None:
    with pytest.raises(LaunchError, match="neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST"):
        slurm.first_host({})
    with pytest.raises(LaunchError, match=r"SLURM_JOB_NODELIST is ',node1'"):
        slurm.first_host({"SLURM_JOB_NODELIST": ",node1"})


def occupy(*ports: int) -> list[socket.socket]:
    """Listen without ever answering, as another program would."""
    return [socket.create_server(("", port)) for port in ports]


def free_token() -> str:
    """Return a job's token whose ports are free on this machine."""
    while True:
        token = f"test {os.urandom(8).hex()}"
        try:
            for server in occupy(*slurm.candidate_ports(token)):
                server.close()
        except OSError:
            continue
        return token


def test_a_port_of_another_program_is_passed_over() -> None:
    token = free_token()
    ports = slurm.candidate_ports(token)
    taken = occupy(ports[0])
    with slurm.answering(token, 4711):
        patience = timedelta(seconds=20)
        assert slurm.ask_for_port("127.0.0.1", token, patience) == 4711
    with pytest.raises(LaunchError, match=f"rank 0 did not answer on 127.0.0.1, ports {ports[0]}"):
        slurm.ask_for_port("127.0.0.1", token, timedelta(seconds=0.5))
    taken += occupy(*ports[1:])
    with pytest.raises(LaunchError, match="are all taken"), slurm.answering(token, 4711):
        pass
    for server in taken:
        server.close()


def test_an_answer_for_another_job_does_not_count() -> None:
    token = free_token()
    with slurm.answering(token, 4711):
        (port,) = [p for p in slurm.candidate_ports(token) if slurm._ask("127.0.0.1", p, token)]
        assert slurm._ask("127.0.0.1", port, token + "0") is None


def test_interfaces_are_found_by_their_addresses() -> None:
    assert interface_of("127.0.1.1") == "lo"
    assert interface_of("::1") == "lo"
    assert interface_of(address_towards("127.0.0.1")) == "lo"
    assert interface_of("198.51.100.77") is None


LISTENING = """
import os, belief_dist.distributed
belief_dist.distributed.init()
mine = set()
for fd in os.listdir("/proc/self/fd"):
    try:
        mine.add(os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:
        pass
for file in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
    for line in open(file).read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
            print(words[1].split(":")[0])
"""


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}],
    ids=["alone", "localhost"],
)
def test_who_needs_no_other_host_cannot_be_reached_from_one(environ: dict[str, str]) -> None:
    """Anybody who reaches the store of a job may change what its ranks tell each other."""
    if environ:
        environ = {**environ, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found and set(found) == {"0100007F"}  # 127.0.0.1


def test_an_address_of_another_host_is_not_listened_at() -> None:
    """Behind a router that translates addresses, say: then all interfaces serve, as before."""
    assert listen_at("192.0.2.1", 0) is None and listen_at("node0", 0) is None
    with listen_at("127.0.0.1", 0) or pytest.fail() as first:
        assert listen_at("127.0.0.1", first.getsockname()[1]) is None


def test_the_hash_changes_with_any_source_file(tmp_path: Path) -> None:
    hashes = [handshake.source_hash(tmp_path)]
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.cpp", "2"), ("notes.txt", "2")):
        (tmp_path / name).write_text(text)
        hashes.append(handshake.source_hash(tmp_path))
    assert len(set(hashes)) == 4 and hashes[-1] == hashes[-2]


# Real processes


def launch(command: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI"))}
    environment = kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | variables
    environment["PYTHONPATH"] = variables.get("PYTHONPATH", str(ROOT))
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(processes: list[subprocess.Popen[str]], code: int = 0) -> list[dict[str, Any]]:
    """Return what all processes print, ordered by rank; they must end with `code`."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        found += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda row: row.get("rank", 0))


def by_hand(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    return variables | {"MASTER_ADDR": "127.0.0.1"} | more


def check(found: list[dict[str, Any]], launcher: str) -> None:
    size = len(found)
    for rank, row in enumerate(found):
        assert row["rank"] == row["local_rank"] == rank
        assert row["total"] == size * (size + 1) // 2
        assert row["launcher"] == launcher
        assert row["exported"] == [str(rank), str(size), str(rank)] and row["master"]


def test_tasks_of_srun_find_each_other_without_a_port() -> None:
    """By the job's id, although the first port that it gives is taken."""
    job_id = str(os.getpid())
    common = {"SLURM_JOB_ID": job_id, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3"}
    common |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    taken = occupy(slurm.candidate_ports(slurm.job_token(common))[0])
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(3)]
    check(results([launch([sys.executable, JOB], common | rank) for rank in ranks]), SLURM)
    taken[0].close()


def test_torchrun_and_a_second_group_after_the_first() -> None:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=3"]
    check(results([launch([*torchrun, JOB, "twice"], {})]), "torchrun")


def mpiruns() -> list[str]:
    here = str(Path(sys.executable).parent)
    return [path for path in (shutil.which("mpirun", path=here), shutil.which("mpirun")) if path]


@pytest.mark.skipif(not mpiruns(), reason="there is no mpirun: pip install mpich")
def test_mpirun_needs_no_variables() -> None:
    version = subprocess.run([mpiruns()[0], "--version"], capture_output=True, text=True).stdout
    is_open_mpi = "Open MPI" in version
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--oversubscribe"] if is_open_mpi else []
    command = [mpiruns()[0], *options, "-n", "3", sys.executable, JOB]
    found = results([launch(command, more if is_open_mpi else {})])
    check(found, OPEN_MPI if is_open_mpi else HYDRA)
    assert all(row["mpi"] for row in found)


def test_a_process_alone_and_local_ranks_that_nobody_tells() -> None:
    alone = launch([sys.executable, JOB, "twice"], {})
    port = free_port()
    pair = [launch([sys.executable, JOB], by_hand(rank, 2, port)) for rank in range(2)]
    check(results([alone]), "nobody: alone")
    found = results(pair)
    check(found, "RANK and WORLD_SIZE")
    assert not found[0]["mpi"]


def test_other_code_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    """Within seconds, although the timeout is longer."""
    shutil.copytree(ROOT / "belief_dist", tmp_path / "belief_dist")
    shutil.copy(ROOT / "_belief_dist_autoload.py", tmp_path)
    with (tmp_path / "belief_dist" / "rule.py").open("a") as file:
        file.write("# another version\n")
    port, started = free_port(), time.monotonic()
    processes = [
        launch(
            [sys.executable, JOB],
            by_hand(rank, 3, port, PYTHONPATH=str(tmp_path if rank == 2 else ROOT), TIMEOUT="100"),
        )
        for rank in range(3)
    ]
    found = results(processes, code=2)
    assert len(found) == 3 and time.monotonic() - started < 60
    for row in found:
        assert "the source code of belief_dist differs" in row["error"]
        assert "on rank 2" in row["error"]


def test_ranks_that_do_not_fit_are_told_why() -> None:
    """A taken port, an interface that does not exist, a rank that is there twice, one missing."""
    ports = free_port(), free_port()
    with socket.create_server(("", 0)) as server:
        taken = str(server.getsockname()[1])
        bad_port = launch([sys.executable, JOB], by_hand(0, 2, taken))
        pair = [
            launch([sys.executable, JOB], by_hand(0, 2, ports[0])),
            launch([sys.executable, JOB], by_hand(1, 2, ports[0], GLOO_SOCKET_IFNAME="eth99")),
        ]
        trio = [
            launch([sys.executable, JOB], by_hand(rank, 4, ports[1], TIMEOUT="8", LOCAL_RANK="0"))
            for rank in (0, 2, 2)
        ]
        (row,) = results([bad_port], code=2)
    assert f"MASTER_PORT is {taken}, which is taken" in row["error"]
    for row in results(pair, code=2):
        assert "rank 1 on" in row["error"] and "GLOO_SOCKET_IFNAME is 'eth99'" in row["error"]
    said = [row["error"] for row in results(trio, code=2)]
    assert sum("another process is rank 2 of this job already" in error for error in said) == 1
    assert sum("ranks 1, 3 of 4 did not join within 8 s" in error for error in said) == 2


def test_beside_deepspeed_in_either_order() -> None:
    pytest.importorskip("deepspeed")
    ports = free_port(), free_port()
    jobs = [
        launch([sys.executable, JOB, how], by_hand(rank, 2, port, LOCAL_RANK=str(rank)))
        for how, port in zip(("deepspeed-first", "deepspeed-next"), ports, strict=True)
        for rank in range(2)
    ]
    for found in (results(jobs[:2]), results(jobs[2:])):
        check(found, "RANK and WORLD_SIZE")
