"""The images: linted, and the one for CPUs built and trained in, on two nodes, by two launchers.

`tests/install.sh` installs what building and running need. The base is made here from
Debian's packages; the base for GPUs cannot be: its Dockerfile is linted only.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import images
from tests.harness.images import Podman
from tests.harness.paths import BIN, ROOT

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(1200),  # the first test waits for the build: a minute or two
]

IMAGE = "localhost/belief-dist:cpu"
SETTINGS = (
    "--layers 1 --width 32 --heads 2 --context 32 --batch 8 --steps 6 --warmup 2 --eval_every 3 "
    "--sample_bytes 20 --out runs/cluster"
)


def check(*command: str | Path) -> None:
    done = subprocess.run([str(BIN / command[0]), *map(str, command[1:])], capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dockerfiles_pass_the_linter(device: str) -> None:
    check("hadolint", ROOT / "docker" / f"Dockerfile.{device}")


def test_scripts_pass_the_linter() -> None:
    check("shellcheck", *sorted((ROOT / "docker").glob("*.sh")), ROOT / "tests" / "install.sh")


def test_both_images_are_made_alike() -> None:
    """So that what is tried with the CPU's holds for the GPU's, too, from the user's setup on."""

    def instructions(device: str) -> list[str]:
        text = (ROOT / "docker" / f"Dockerfile.{device}").read_text()
        _, text = text.split("\nENV PATH", 1)
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return [line for line in lines if not line.startswith("ARG PIP_EXTRA_INDEX_URL")]

    assert instructions("cpu") == [line.replace(" triton", "") for line in instructions("cuda")]


def test_compose_files_fit_the_specification() -> None:
    files = sorted((ROOT / "docker").glob("compose*.yaml"))
    assert len(files) == 2
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Give a podman that has built the image for CPUs."""
    reason = images.missing()
    if reason:
        pytest.skip(reason)
    made = Podman(tmp_path_factory.mktemp("podman"))
    try:
        with ThreadPoolExecutor() as threads:  # both mostly wait for a network
            for done in [threads.submit(made.make_base), threads.submit(made.make_wheels)]:
                done.result()
        made.build("docker/Dockerfile.cpu", IMAGE, VERSION="1.2.3", REVISION="abc")
        yield made
    finally:
        made.close()
    assert str(made.state) not in Path("/proc/mounts").read_text()


def test_the_update_was_compiled_at_build_time(podman: Podman) -> None:
    """The default command tells, and the user that it runs as cannot change the code."""
    assert "built at installation" in podman.start(IMAGE)
    owned = podman.start(IMAGE, "bash", "-c", "id -un; test ! -w /opt/belief_dist && echo kept")
    assert owned.split() == ["mpiuser", "kept"]


def test_labels_and_the_health_check(podman: Podman) -> None:
    (config,) = json.loads(podman.run("podman", "image", "inspect", IMAGE))
    labels = {key.rsplit(".", 1)[-1]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "belief_dist" and labels["licenses"] == "Apache-2.0"
    assert (labels["version"], labels["revision"]) == ("1.2.3", "abc")
    kind, *command = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    podman.start(IMAGE, *command)
    # It can fail: here there is no library, and no compiler to make one.
    broken = "rm -r /opt/venv/lib/python3*/site-packages/belief_dist/kernels/_cpu_kernel*; exec"
    with pytest.raises(AssertionError, match="no C\\+\\+ compiler"):
        podman.start(
            "--user=root", "--env=CXX=none", IMAGE, "bash", "-c", f'{broken} "$@"', "-", *command
        )


SSH = """
/opt/belief_dist/docker/sshd.sh 2>/dev/null & first=$!
until ssh localhost true 2>/dev/null; do sleep 0.1; done
echo "user $(cut -d ' ' -f 2 ~/.ssh/id_rsa.pub)"
echo "host $(ssh-keyscan -p 2222 localhost 2>/dev/null | cut -d ' ' -f 3)"
chmod o+w ~/.ssh; ssh localhost true 2>/dev/null || echo "refused"; chmod o-w ~/.ssh
kill $first; wait $first
/opt/belief_dist/docker/sshd.sh 2>/dev/null &
until ssh localhost true 2>/dev/null; do sleep 0.1; done
echo "next $(ssh-keyscan -p 2222 localhost 2>/dev/null | cut -d ' ' -f 3)"
"""


def test_every_start_of_sshd_has_a_host_key_of_its_own(podman: Podman) -> None:
    """The cluster's key lets in, and says nothing about which node answers."""
    said = [line.split() for line in podman.start(IMAGE, "bash", "-c", SSH).splitlines()]
    assert [line[0] for line in said] == ["user", "host", "refused", "next"]
    keys = [line[1] for line in said if len(line) == 2]
    assert len(set(keys)) == 3 and all(key.startswith("AAAA") for key in keys)


def test_kubeflow_can_start_sshd_alone(podman: Podman) -> None:
    start = "cd ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f id_rsa && cp id_rsa.pub authorized_keys"
    serve = "(/usr/sbin/sshd -De -f /home/mpiuser/.sshd_config &) 2>/dev/null"
    ask = "chmod 3777 ~/.ssh; until ssh localhost true 2>/dev/null; do sleep 0.1; done; echo served"
    assert podman.start(IMAGE, "bash", "-c", f"{start} && {serve}; {ask}").strip() == "served"


@pytest.fixture(scope="module")
def trained(podman: Podman) -> dict[str, list[dict[str, Any]]]:
    """Give, for each compose file, the log of what two nodes have trained."""
    logs = {}
    for name, more in {"compose": (), "compose.ssh": ("--exit-code-from", "node0")}.items():
        file = f"docker/{name}.yaml"
        podman.compose(file, "up", "--no-build", *more, SETTINGS=SETTINGS)
        project = "belief-dist" + name.removeprefix("compose").replace(".", "-")
        for node in ("node0", "node1") if name == "compose" else ("node0",):
            state = podman.run(
                "podman", "inspect", f"{project}_{node}_1", "--format={{.State.ExitCode}}"
            )
            assert state.strip() == "0"
        place = podman.run(
            "podman", "volume", "inspect", f"{project}_runs", "--format={{.Mountpoint}}"
        )
        run = Path(place.strip(), "cluster")
        # Both nodes write into one checkpoint: the shared volume is one folder for them.
        assert {path.name for path in run.glob("step-00000006/*/*.distcp")} >= {
            "__0_0.distcp",
            "__1_0.distcp",
        }
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs[name] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
        podman.compose(file, "down", "--volumes")
    return logs


def test_two_nodes_train_and_save_in_the_shared_volume(trained: dict[str, Any]) -> None:
    log = trained["compose"]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"]


def test_both_launchers_train_the_same(trained: dict[str, Any]) -> None:
    """torchrun on each node, and deepspeed from one node over ssh: equal to the last digit."""
    assert trained["compose.ssh"] == trained["compose"]
