#!/usr/bin/env bash
# Usage: launch/local.sh [RANKS] [SETTINGS...]
# Trains the example on RANKS processes of this machine through the deepspeed launcher; without a number
# on one for each of its GPUs, or on 2 if there is none:
#   launch/local.sh
#   launch/local.sh 4 --engine deepspeed --deepspeed_config configs/deepspeed_zero2.json
# Any number of jobs may run side by side. Without GPUs the ranks share the processor's cores.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n 's/^# \?//p; /^set/q' "${BASH_SOURCE[0]}" | tail -n +2
    exit 0
fi
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    ranks=$1
    shift
elif [[ -z ${1:-} || $1 == --* ]]; then
    # Two is the smallest number that shards anything.
    ranks=$(python -c 'import torch; print(torch.accelerator.device_count() or 2)')
else
    echo "local.sh: RANKS must be a number, at least 1, or left out, got $1" >&2
    exit 2
fi

# A port that is free now. The launcher's own default is one fixed port for all jobs.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# Ctrl-C is for the ranks, which save: the launcher in front of them would leave at once, without them.
trap '' INT
exec deepspeed --num_accelerators "$ranks" --master_addr 127.0.0.1 --master_port "$port" \
    "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@"
