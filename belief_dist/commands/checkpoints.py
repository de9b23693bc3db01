"""Commands about checkpoints: inspect, verify, diff, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from belief_dist.checkpoint import verify as verify_files
from belief_dist.checkpoint.checksummed_files import read_manifest
from belief_dist.checkpoint.formats import convert as formats
from belief_dist.checkpoint.formats.full_state import FullState
from belief_dist.checkpoint.loading import read_metadata
from belief_dist.checkpoint.run_directory import find
from belief_dist.commands.output import print_json, print_table, progress_bars
from belief_dist.options import CLIPPING_NAMES, OPTION_NAMES


def inspect(*, path: Path, step: int | None, as_json: bool) -> int:
    """Show what a checkpoint holds."""
    path = find(path, step)
    saved_step, checksums = read_manifest(path)
    dcp_metadata, metadata, extra = read_metadata(path)
    nbytes = sum(checksum.nbytes for checksum in checksums.values())
    ranks, groups = metadata.get("ranks", 1), metadata.get("groups", [])
    tensors = []
    for key, entry in dcp_metadata.state_dict_metadata.items():
        size = getattr(entry, "size", None)
        if size is not None:
            dtype = entry.properties.dtype  # type: ignore[union-attr]
            tensors.append((key, tuple(size), str(dtype).removeprefix("torch.")))
    if as_json:
        print_json(
            {
                "path": str(path),
                "step": saved_step,
                "files": len(checksums),
                "bytes": nbytes,
                "ranks": ranks,
                "extra": sorted(extra),
                "groups": [
                    {"parameters": len(group["params"]), "options": group["options"]}
                    for group in groups
                ],
                "tensors": [
                    {"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in tensors
                ],
            }
        )
        return 0
    print(f"{path}: step {saved_step}, {len(checksums)} files, {nbytes / 1e6:.1f} MB")
    print(f"saved by {ranks} {'rank' if ranks == 1 else 'ranks'}; extra: {sorted(extra)}")
    for number, group in enumerate(groups):
        options = ", ".join(f"{key}={value}" for key, value in group["options"].items())
        print(f"param group {number}: {len(group['params'])} parameters, {options}")
    rows = [(name, "x".join(map(str, shape)) or "scalar", dtype) for name, shape, dtype in tensors]
    print_table(("tensor", "shape", "dtype"), rows)
    return 0


def verify(*, path: Path, step: int | None, as_json: bool) -> int:
    """Compare all files with their checksums."""
    with progress_bars():
        path = verify_files(path, step=step)
    if as_json:
        saved_step, checksums = read_manifest(path)
        nbytes = sum(checksum.nbytes for checksum in checksums.values())
        print_json(
            {"path": str(path), "step": saved_step, "files": len(checksums), "bytes": nbytes}
        )
    else:
        print(f"{path}: every file is as it was written")
    return 0


def diff(*, source: Path, target: Path, as_json: bool, **given: Any) -> int:
    """Show in which bits two training states differ, and return 1 if they do."""
    with progress_bars():
        found = formats.differences(_read(source, **given), _read(target, **given))
    if as_json:
        print_json({"differences": found})
    else:
        print(*found or ["no difference in any bit"], sep="\n")
    return 1 if found else 0


def convert(
    *,
    source: Path,
    target: Path,
    to: str,
    template: Path | None,
    averages: bool,
    from_adam: bool,
    eps: float,
    as_json: bool,
    **given: Any,
) -> int:
    """Convert a training state to another format."""
    with progress_bars():
        full = _read(source, **given, from_adam=from_adam, eps=eps)
        written = formats.write(full, target, to, template=template, averages=averages)
    if as_json:
        print_json(
            {"path": str(written), "format": to, "parameters": len(full.names), "step": full.step}
        )
    else:
        print(f"{written}: {len(full.names)} optimized parameters, step {full.step}")
    return 0


def _read(path: Path, *, names: Path | None, options: str, **given: Any) -> FullState:
    return formats.read(
        path, names=_names(names) if names else None, options=_options(options), **given
    )


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--names needs a file with names, and {path} is no file.")
    try:
        return path.read_text().split()
    except UnicodeDecodeError:
        raise ValueError(f"--names needs a text file with names, which {path} is not.") from None


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(
            f"--options must be a JSON object such as '{{\"rectify\": true}}', got {text!r:.80}."
        )
    unknown = sorted(options.keys() - {*OPTION_NAMES, *CLIPPING_NAMES})
    if unknown:
        raise ValueError(
            f"--options has no {unknown[0]!r:.80}; there are {', '.join(OPTION_NAMES)}."
        )
    return options
