#!/usr/bin/env bash
# Usage: train_over_ssh.sh "NODE..." [SETTINGS...]
# On one of the nodes: trains the example with a rank on every node, which DeepSpeed starts over ssh.
set -euo pipefail

read -ra nodes <<<"${1:?usage: train_over_ssh.sh \"NODE...\" [SETTINGS...]}"
shift
root=/opt/belief_dist

"$root/docker/sshd.sh" & # this node is one of them
for node in "${nodes[@]}"; do
    timeout 60 bash -c "until ssh $node true 2>/dev/null; do sleep 0.2; done" || {
        echo "$node does not answer to ssh: is docker/sshd.sh running there?" >&2
        exit 1
    }
done

printf '%s slots=1\n' "${nodes[@]}" >~/hostfile
# DeepSpeed sends these to the other nodes, and nothing else of this environment.
env | grep -E '^(DS_ACCELERATOR|GLOO_SOCKET_IFNAME|NCCL_|OMP_NUM_THREADS)' >~/.deepspeed_env || true
exec deepspeed --hostfile ~/hostfile --launcher pdsh --master_addr "${nodes[0]}" \
    "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@"
