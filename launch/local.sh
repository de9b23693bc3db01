#!/usr/bin/env bash
# Usage: launch/local.sh RANKS [SETTINGS...]
# Trains the example on RANKS processes of this machine through the deepspeed launcher:
#   launch/local.sh 2
#   launch/local.sh 4 --engine deepspeed --deepspeed_config configs/deepspeed_zero2.json
# Any number of jobs may run side by side. Without GPUs the ranks share the processor's cores.
set -euo pipefail

ranks=${1:?usage: launch/local.sh RANKS [SETTINGS...]}
shift
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")

# A port that is free now. The launcher's own default is one fixed port for all jobs.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

exec deepspeed --num_accelerators "$ranks" --master_addr 127.0.0.1 --master_port "$port" \
    "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@"
