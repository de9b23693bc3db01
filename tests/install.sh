#!/usr/bin/env bash
# Usage: tests/install.sh
# Installs what some tests need beyond Python from Debian's packages, if it is missing and this is root:
# several hosts on one machine (tests/cluster), images (tests/launch/test_images.py), DeepSpeed's NVMe offload,
# and a browser (tests/telemetry/test_report_in_browser.py).
# Without it those tests are skipped and say why.
set -euo pipefail

declare -A package=(
    [ip]=iproute2 [sshd]=openssh-server [pdsh]=pdsh [mpirun.openmpi]=openmpi-bin
    [slurmctld]=slurm-wlm [munged]=munge
    [mmdebstrap]=mmdebstrap [podman]=podman [buildah]=buildah [runc]=runc [catatonit]=catatonit
    [iptables]=iptables [chromium]=chromium
)
declare -A file=(
    [/usr/include/libaio.h]=libaio-dev
    [/usr/lib/podman/netavark]=netavark [/usr/lib/podman/aardvark-dns]=aardvark-dns
    [/usr/share/keyrings/debian-archive-keyring.gpg]=debian-archive-keyring
)
missing=()
for tool in "${!package[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
done
for path in "${!file[@]}"; do
    [[ -e $path ]] || missing+=("${file[$path]}")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Some tests will be skipped: ${missing[*]} cannot be installed without root and apt-get." >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
install || { apt-get update -qq >"$log" 2>&1 && install; } || {
    echo "Some tests will be skipped: apt-get install ${missing[*]} failed:" >&2
    tail -5 "$log" >&2
}
