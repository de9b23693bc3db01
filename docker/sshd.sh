#!/usr/bin/env bash
# Serves ssh to the other nodes of a cluster whose volume ~/.ssh all nodes share. Whoever comes first
# makes the cluster's key in it.
set -euo pipefail
cd ~/.ssh

exec 9>>lock
flock 9
if [[ ! -f authorized_keys ]]; then
    ssh-keygen -q -t ed25519 -N '' -C belief_dist -f id_rsa
    cp id_rsa.pub authorized_keys
fi
exec 9>&-

exec /usr/sbin/sshd -De -f ~/.sshd_config
