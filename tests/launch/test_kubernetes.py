"""The manifests for Kubeflow Trainer, against its own models of the API; no cluster is here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from pydantic import ValidationError

from tests.harness.paths import BIN, ROOT

MANIFESTS = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every leaf of nested dicts and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from paths(item, f"{prefix}.{key}")
    else:
        yield f"{prefix} = {value}"


def unknown(manifest: dict[str, Any]) -> set[str]:
    """Return what the API does not know: its models drop it without a word.

    Raises:
        ValidationError: A value has the wrong type, or a required one is missing.
    """
    known = TrainerV1alpha1TrainJob.from_dict(manifest).to_dict()
    return set(paths(manifest)) - set(paths(known))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_api_knows_every_key(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert manifest["kind"] == "TrainJob"
    assert unknown(manifest) == set()

    manifest["spec"]["trainer"]["numNodez"] = 2
    assert unknown(manifest) == {".spec.trainer.numNodez = 2"}
    manifest["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValidationError):
        unknown(manifest)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_it_starts_is_in_the_image(path: Path) -> None:
    """Paths under /opt/belief_dist are those of this repository."""
    trainer = yaml.safe_load(path.read_text())["spec"]["trainer"]
    named = [arg.split("=")[-1] for arg in trainer["args"] if "/opt/belief_dist/" in arg]
    assert len(named) >= 2
    for name in named:
        assert (ROOT / Path(name).relative_to("/opt/belief_dist")).exists()


def test_yaml_is_clean() -> None:
    done = subprocess.run([str(BIN / "yamllint"), "--strict", "."], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
