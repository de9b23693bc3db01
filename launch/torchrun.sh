#!/usr/bin/env bash
# Usage, on every node: HEAD=HOST NNODES=N launch/torchrun.sh [SETTINGS...]
# Trains the example on several nodes through torchrun; HEAD is one of them.
#   HEAD=node0 NNODES=2 launch/torchrun.sh                          # nodes may start in any order
#   HEAD=node0 NNODES=2 NODE_RANK=0 launch/torchrun.sh              # ranks by NODE_RANK (static)
#   HEAD=node0 NNODES=1:4 launch/torchrun.sh --folder /shared/first    # elastic
# An elastic job goes on with whatever nodes are left or come back, from the last checkpoint, which it
# reshards: --folder must lie on a file system that all nodes share, and batch must be a multiple of
# every number of ranks that may happen. What you may change, by variables:
#   NPROC          ranks on this node; default: its GPUs, or 1
#   PORT           of HEAD; default 29400
#   RDZV_ID        tells jobs apart that share HEAD and PORT
#   MAX_RESTARTS   default 3 in an elastic job, else 0
set -euo pipefail

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
die() {
    echo "torchrun.sh: $*" >&2
    exit 2
}
head=${HEAD:?set HEAD to the host at which all nodes meet}
nodes=${NNODES:?set NNODES to the number of nodes, or MIN:MAX}
port=${PORT:-29400}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || die "NNODES must be a number or MIN:MAX, got $nodes"
{ [[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port <= 65535)); } || die "PORT must be in 1..65535, got $port"
elastic=
[[ $nodes == *:* ]] && elastic=yes
restarts=${MAX_RESTARTS:-${elastic:+3}}
if [[ ${restarts:-0} != 0 && " $*" != *" --folder"* ]]; then
    die "a job that restarts needs --folder FOLDER, to continue there"
fi
[[ -z ${NODE_RANK:-} || -z $elastic ]] || die "an elastic job (NNODES=$nodes) has no fixed NODE_RANK: unset it"
if [[ -n ${NODE_RANK:-} ]] && ! [[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $nodes ]]; then
    die "NODE_RANK must be in 0..NNODES-1 (NNODES is $nodes), got $NODE_RANK"
fi
command -v torchrun >/dev/null || die "there is no torchrun on PATH: activate the environment first"

# Whether the name means something, whether the port is free where it is to be opened, this node's
# address for the others (its own name may mean 127.0.1.1), and its devices.
facts=$(
    python - "$head" "$port" <<'PYTHON'
import socket, sys

head, port, here = sys.argv[1], int(sys.argv[2]), socket.gethostname()
try:
    family, _, _, _, where = socket.getaddrinfo(head, port, type=socket.SOCK_STREAM)[0]
except OSError:
    sys.exit(f"torchrun.sh: HEAD is {head!r}, which {here} cannot resolve")


def can_bind(address, port):
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


if can_bind(where[0], 0):  # an address of this host: it is the head
    if not can_bind("", port):
        sys.exit(
            f"torchrun.sh: PORT is {port}, which is taken on {head}: choose another for all nodes"
        )
else:
    try:
        socket.create_connection((head, port), timeout=5).close()
    except ConnectionRefusedError:
        pass  # not started yet
    except OSError as error:
        why = error.strerror or "timed out"
        sys.exit(f"torchrun.sh: HEAD, {head}, does not answer {here}: {why} (port {port})")

# Only now: importing torch takes seconds.
import torch

from belief_dist.distributed.network import address_towards, is_loopback, outward_address

address = address_towards(head)
if is_loopback(address):
    address = outward_address()
count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
print("-" if is_loopback(address) else address, count or 1)
PYTHON
) || exit 2
read -r address devices <<<"$facts"
ranks=${NPROC:-$devices}

arguments=(--nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${restarts:-0}")
if [[ -n ${NODE_RANK:-} ]]; then
    arguments+=(--node-rank "$NODE_RANK" --master-addr "$head" --master-port "$port")
else
    # A node that has died is missed after 15 s; others that come are waited for 15 s at most.
    arguments+=(--rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "${RDZV_ID:-belief_dist}"
        --rdzv-conf "join_timeout=300,last_call_timeout=15,keep_alive_interval=5,keep_alive_max_attempt=3")
    [[ $address == - ]] || arguments+=(--local-addr "$address")
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec torchrun "${arguments[@]}" "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@"
