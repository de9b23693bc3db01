#!/usr/bin/env bash
# Installs what the tests of this folder need from Debian, if it is missing and can be installed.
# Usage: tests/cluster/install.sh
set -euo pipefail

declare -A package=(
    [ip]=iproute2 [sshd]=openssh-server [pdsh]=pdsh [mpirun.openmpi]=openmpi-bin
    [slurmctld]=slurm-wlm [munged]=munge
)
missing=()
for tool in "${!package[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "tests/cluster will skip: ${missing[*]} cannot be installed without root and apt-get." >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The nodes' daemons belong to the tests; the host's own must not start.
install() { apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
install || { apt-get update -qq >"$log" 2>&1 && install; } || {
    echo "tests/cluster will skip: apt-get install ${missing[*]} failed:" >&2
    tail -5 "$log" >&2
}
