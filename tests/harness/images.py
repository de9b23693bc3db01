"""Builds and runs images without a daemon: podman, in a folder and a network of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.harness.cache import once
from tests.harness.paths import BIN, ROOT

CONFIG = Path(__file__).with_name("containers")
BASE = "localhost/python:3.11-slim-bookworm"  # Debian 12's Python
TOOLS = ("podman", "runc", "mmdebstrap", "ip", "nsenter", "iptables", "catatonit")


def missing() -> str | None:
    """Return why images cannot be built here, or None."""
    if os.geteuid() != 0:
        return "building images without a daemon needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: run tests/install.sh"
    if sys.version_info[:2] != (3, 11):
        return "the image's base has Python 3.11, and takes the wheels of this environment"
    return None


class Podman:
    """One store of images and containers, and a network namespace for them."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = os.environ | {
            "CONTAINERS_CONF": str(state / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(state / "storage.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "TMPDIR": str(state),
        }
        # In memory: a few gigabytes in small files, which are gone with the mount.
        self.run("mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", state)
        self.namespace = f"belief-images-{os.getpid()}"
        self._wheels = state / "wheels"
        for file in CONFIG.glob("*.*"):
            if file.suffix in (".conf", ".json"):
                text = file.read_text().replace("STATE", str(state))
                (state / file.name).write_text(text)
        (state / "networks").mkdir()
        self.run("ip", "netns", "add", self.namespace)
        self.run("ip", "-n", self.namespace, "link", "set", "lo", "up")

    def run(self, *command: str | Path, timeout: float = 600, **environment: str) -> str:
        """Run a command that must succeed; return what it wrote to standard output."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            errors="replace",  # an untrained model's sample
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def make_base(self) -> None:
        """Make the image `BASE` from Debian's packages."""
        packages = "--include=ca-certificates,python3-venv"
        make = partial(self.run, "mmdebstrap", "--variant=minbase", packages, "bookworm")
        archive = once("bookworm-python3-venv.tar", make)
        self.run("podman", "import", *self._policy, archive, BASE)

    def make_wheels(self) -> None:
        """Get what the image installs from this environment's package index."""
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", self._wheels]
        pip += ["--constraint", "constraints.txt", "--no-build-isolation", "setuptools"]
        needed = [sys.executable, "docker/requirements.py", "deepspeed", "mpi", "examples"]
        self.run(*pip, *self.run(*needed).splitlines())

    def build(self, dockerfile: str, tag: str, **arguments: str) -> None:
        """Build an image on `BASE`, with the wheels."""
        arguments |= {"BASE_IMAGE": BASE, "PIP_EXTRA_INDEX_URL": "", "PIP_NO_INDEX": "1"}
        arguments |= {"PIP_FIND_LINKS": "/wheels"}
        options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        options += ["--isolation=chroot", "--network=host", "--pull=never", "--layers=false"]
        # The docker format keeps HEALTHCHECK.
        options += ["--format=docker", f"--volume={self._wheels}:/wheels:ro"]
        options += [f"--file={dockerfile}"]
        self.run("podman", "build", *self._policy, *options, f"--tag={tag}", ".")

    def start(self, image: str, *command: str) -> str:
        """Run a command in a new container that is removed at its end; return its output."""
        return self.run(
            *["podman", "run", "--rm", "--network=none", "--ulimit=host", "--no-healthcheck"],
            *[image, *command],
        )

    def compose(self, file: str, *command: str, **environment: str) -> str:
        """Run podman-compose in the network namespace, with no image to be built."""
        return self.run(
            *["nsenter", f"--net=/run/netns/{self.namespace}", "podman-compose", "--in-pod=0"],
            *["--podman-run-args=--ulimit=host", "--file", file, *command],
            timeout=120,
            **environment,
        )

    def close(self) -> None:
        """Remove containers, the network namespace, and the mounts with the images."""
        self.run("podman", "rm", "--all", "--force", "--time=0")
        self.run("ip", "netns", "delete", self.namespace)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([m for m in mounts if Path(m).is_relative_to(self.state)]):
            self.run("umount", mount)

    @property
    def _policy(self) -> tuple[str, str]:
        return "--signature-policy", str(self.state / "policy.json")
