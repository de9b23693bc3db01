#!/usr/bin/env bash
# What tests/test_images.py needs beyond Python: an image builder and runner without a daemon, and a
# way to make a base image from Debian's packages.
set -euo pipefail
apt-get install --yes --no-install-recommends \
    aardvark-dns buildah catatonit debian-archive-keyring iproute2 iptables mmdebstrap netavark \
    podman runc
