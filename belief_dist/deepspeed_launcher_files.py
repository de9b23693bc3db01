"""Finds what is wrong in the files that the `deepspeed` launcher reads beside the configuration.

These are the hostfile, and `.deepspeed_env`, the variables that every rank gets. The launcher takes
some mistakes without a word, and ends in a traceback of its own after others. What is told here is
how that of DeepSpeed 0.19 reads them; nothing here imports it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from belief_dist.deepspeed_config import Finding
from belief_dist.options import shown

_HOST = re.compile(r"(\S+)\s+slots=(\d+)(?:\s.*)?")
# As other launchers write it, or with a slip of the pen: a host and a number that can only be one.
_NEARLY = re.compile(
    r"([^\s:=]+)(?::|\s+(?:slots|slot|max_slots|max-slots)?\s*[=:]?\s*)(\d+)\D*", re.I
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_EACH_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.I)


class FileReport(NamedTuple):
    """What was found in a file of lines.

    Attributes:
        findings: In the order of the lines.
        given: The lines.
        corrected: The same with everything mended that can only mean one thing.
    """

    findings: list[Finding]
    given: list[str]
    corrected: list[str]

    def diff(self) -> str:
        """Return how the corrected file differs, as a unified diff."""
        before, after = ([f"{line}\n" for line in lines] for lines in (self.given, self.corrected))
        return "".join(difflib.unified_diff(before, after, "given", "corrected", n=2))


def kind_of(path: Path) -> str:
    """Return by its name what a file is: "hostfile", "environment" or "configuration"."""
    name = path.name.lower()
    if name.endswith(".json"):
        return "configuration"
    if "hostfile" in name:
        return "hostfile"
    return "environment" if "deepspeed_env" in name else "configuration"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file.

    Raises:
        ValueError: It is no text file.
    """
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file.") from None


def check_hostfile(lines: list[str]) -> FileReport:
    """Return what is wrong in a hostfile: lines such as "node0 slots=8"."""
    findings: list[Finding] = []
    corrected: list[str] = []
    hosts: dict[str, tuple[int, int]] = {}  # the line of each, and where it is in `corrected`

    def tell(number: int, sentence: str, *, is_fixed: bool) -> None:
        findings.append(Finding(f"line {number}", sentence, is_fixed))

    for number, given in enumerate(lines, 1):
        line = given.strip()
        if not line or line.startswith("#"):
            corrected.append(given)
            continue
        match = _HOST.fullmatch(line)
        if match is None:
            match = _NEARLY.fullmatch(line)
            right = f"{match[1]} slots={int(match[2])}" if match else ""
            said = f'must be "HOST slots=RANKS", got {shown(line)}, which the launcher '
            reads = re.match(r"\S+\s+slots=\d+", line)
            said += f"reads as {shown(reads[0])}" if reads else "refuses"
            tell(
                number,
                f'{said}; write "{right}".' if match else f"{said}; say how many ranks it runs.",
                is_fixed=match is not None,
            )
            line = right or given
        if match is None:
            corrected.append(given)
            continue
        host, slots = match[1], int(match[2])
        if slots == 0:
            tell(
                number, f"gives {host} no ranks; give it at least 1, or remove it.", is_fixed=False
            )
        if host in hosts:
            _, place = hosts[host]
            before = _HOST.fullmatch(corrected[place].strip())
            assert before is not None
            corrected[place] = f"{host} slots={int(before[2]) + slots}"
            said = f"names {host} a second time, which the launcher refuses; its slots are added up"
            tell(number, f"{said} in one line.", is_fixed=True)
            continue
        hosts[host] = number, len(corrected)
        corrected.append(given if line == given.strip() else line)
    for host, (number, _) in hosts.items():
        if len(hosts) > 1 and re.fullmatch(r"localhost|127(\.\d+){3}|::1", host):
            tell(
                number,
                f"{host} is another host for each of the others, which look for rank 0 there; "
                f"write the name or address by which they reach it.",
                is_fixed=False,
            )
    if not hosts and not findings:
        findings.append(
            Finding("the file", 'names no host; write lines "HOST slots=RANKS".', False)
        )
    return FileReport(findings, lines, corrected)


def check_environment(lines: list[str]) -> FileReport:
    """Return what is wrong in a `.deepspeed_env`: lines such as "NCCL_DEBUG=INFO"."""
    findings: list[Finding] = []
    corrected: list[str] = []
    seen: dict[str, int] = {}

    def tell(number: int, sentence: str, *, is_fixed: bool) -> None:
        findings.append(Finding(f"line {number}", sentence, is_fixed))

    for number, given in enumerate(lines, 1):
        line = given.strip()
        if not line or line.startswith("#"):
            what = "is a comment" if line else "is empty"
            ends = "exports it as a variable" if "=" in line else "ends in a traceback over it"
            tell(number, f"{what}, and the launcher {ends}; leave it out.", is_fixed=True)
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        bare = name.removeprefix("export ").strip()
        if not equals or not _NAME.fullmatch(bare):
            said = "the launcher ends in a traceback" if not equals else "the ranks' shells refuse"
            tell(number, f"must be NAME=VALUE, got {shown(line)}; {said}.", is_fixed=False)
            corrected.append(given)
            continue
        if bare != name:
            tell(number, f"must be {bare}=VALUE: the launcher writes export itself.", is_fixed=True)
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
            tell(number, f"quotes {bare}, which the launcher does once more.", is_fixed=True)
        if re.search(r'[$`"\\]', value):
            said = f"has {bare}={value}, which the shell of every rank expands"
            tell(number, f"{said}; write what it shall be.", is_fixed=False)
        if bare in _OF_EACH_RANK:
            tell(
                number,
                f"sets {bare}, which the launcher gives each rank; leave it out.",
                is_fixed=True,
            )
            continue
        if _SECRET.search(bare):
            said = f"puts {bare} on command lines, which every user of the hosts reads with ps"
            tell(number, f"{said}; keep it in a file that the script reads.", is_fixed=False)
        if bare in seen:
            said = f"sets {bare} a second time, and the launcher takes this one"
            tell(number, f"{said}; line {seen[bare]} is left out.", is_fixed=True)
            corrected = [each for each in corrected if each.partition("=")[0].strip() != bare]
        seen[bare] = number
        corrected.append(f"{bare}={value}")
    return FileReport(findings, lines, corrected)
