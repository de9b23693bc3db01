#!/usr/bin/env bash
# Usage: launch/venv.sh VENV
# Makes VENV a virtual environment with belief_dist (editable) and everything that training and
# tests need, at the versions of constraints.txt. Does nothing, and needs no network, if it already
# is one. Any number of runs may start at once. PYTHON chooses the interpreter (default: python3).
set -euo pipefail

venv=$(realpath -m "${1:?usage: launch/venv.sh VENV}")
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "belief_dist needs Python 3.10 or newer; set PYTHON to one (now: $python)." >&2
    exit 1
}

# All that the environment depends on. Its own path is part: the scripts of a moved one are broken.
wanted=$({ echo "$venv" "$PWD"; "$python" -VV; cat pyproject.toml setup.py constraints.txt; } | sha256sum)
stamp=$venv/.belief_dist
up_to_date() { [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; }
up_to_date && exit 0

# The lock file lies beside the environment and tells that it is ours, to be replaced at will.
lock=$venv.lock
if [[ -e $venv && ! -e $lock ]]; then
    echo "$venv exists, but this script did not make it: delete it, or choose another with VENV=..." >&2
    exit 1
fi
mkdir -p "$(dirname "$venv")"
exec 9>>"$lock"
flock 9
up_to_date && exit 0 # another run has just finished it

echo "Setting up $venv: this takes a minute or two, and happens once."
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt)
# Packages are built with the environment's pinned setuptools, not with a freshly downloaded one.
"${pip[@]}" setuptools
"${pip[@]}" --no-build-isolation --editable '.[deepspeed,docs,hf,lightning,monitor,mpi,prometheus,triton,examples,dev]'
echo "$wanted" >"$stamp"
