#!/usr/bin/env bash
# Usage: launch/mpirun.sh HOSTFILE|RANKS [SETTINGS...]
# Trains the example through the mpirun on PATH: Open MPI's, MPICH's or Intel MPI's. HOSTFILE has a
# line "HOST slots=RANKS" for each host (launch/hostfile.example); a number means ranks on this one.
#   launch/mpirun.sh 2
#   launch/mpirun.sh hostfile --folder runs/first
# On all hosts, this repository and its environment lie at the same path, and ssh needs no password.
# mpi4py must load the MPI whose mpirun this is. What you may change, by variables:
#   MPIRUN_ARGS   more arguments for mpirun, for example "--mca btl_tcp_if_include eth0"
#   MASTER_PORT   of rank 0; default: any free one
set -euo pipefail
# shellcheck source=launch/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

[[ ${1:-} && $1 != -h && $1 != --help ]] || die "usage: launch/mpirun.sh HOSTFILE|RANKS [SETTINGS...]"
where=$1
shift
command -v mpirun >/dev/null || die "there is no mpirun on PATH: pip install mpich, or load your site's MPI module"
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
if [[ $where =~ ^[0-9]+$ ]]; then
    echo "localhost slots=$where" >"$scratch/local"
    where=$scratch/local
fi
read_hostfile "$where"
check_hosts
[[ -z ${MASTER_PORT:-} ]] || port_on "${hosts[0]}" "$MASTER_PORT" >/dev/null

version=$(mpirun --version 2>&1 || true)
case $version in
    *"Open MPI"* | *OpenRTE* | *PRRTE*)
        for i in "${!hosts[@]}"; do echo "${hosts[i]} slots=${slots[i]}"; done >"$scratch/hosts"
        arguments=(--hostfile "$scratch/hosts" -np "$ranks" --bind-to none)
        arguments+=(--mca plm_rsh_args "${ssh_options[*]}")
        for name in $(forwarded) ${MASTER_PORT:+MASTER_PORT}; do arguments+=(-x "$name"); done
        if ((EUID == 0)); then # containers
            export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
            export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
        fi
        ;;
    *HYDRA* | *"Intel(R) MPI"*) # they forward the whole environment
        for i in "${!hosts[@]}"; do echo "${hosts[i]}:${slots[i]}"; done >"$scratch/hosts"
        arguments=(-f "$scratch/hosts" -n "$ranks")
        export I_MPI_PIN=${I_MPI_PIN:-0} # ranks use OMP_NUM_THREADS cores each
        ;;
    *) die "this mpirun is neither Open MPI's, MPICH's nor Intel MPI's: ${version%%$'\n'*}" ;;
esac

# shellcheck disable=SC2086 # several arguments
mpirun "${arguments[@]}" ${MPIRUN_ARGS:-} \
    "$python" -u "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@"
