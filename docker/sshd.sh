#!/usr/bin/env bash
# Serves ssh to the other nodes of a cluster whose volume ~/.ssh all nodes share. Whoever comes first
# makes the cluster's key in it. This container's host key is its own, new at every start, in its own files.
set -euo pipefail
umask 077
cd ~/.ssh
chmod 700 . || {
    echo "${0##*/}: ~/.ssh must belong to $(id -un), with id $(id -u): sshd trusts no other folder" >&2
    exit 1
}

exec 9>>lock
flock 9
if [[ ! -f authorized_keys ]]; then
    ssh-keygen -q -t ed25519 -N '' -C belief_dist -f id_rsa
    cp id_rsa.pub authorized_keys
fi
exec 9>&-

host_key=$(mktemp -d)/host_key
ssh-keygen -q -t ed25519 -N '' -C "$(uname -n)" -f "$host_key"
exec /usr/sbin/sshd -De -f /opt/belief_dist/docker/sshd_config -h "$host_key"
