#!/usr/bin/env bash
# Usage: launch/deepspeed.sh HOSTFILE [SETTINGS...]
# Trains the example on several hosts through the deepspeed launcher. HOSTFILE has a line
# "HOST slots=RANKS" for each (launch/hostfile.example). On all of them, this repository and its
# environment lie at the same path, and ssh needs no password.
#   launch/deepspeed.sh hostfile --folder runs/first
#   LAUNCHER=openmpi launch/deepspeed.sh hostfile --engine deepspeed --deepspeed_config configs/deepspeed_zero2.json
# What you may change, by variables:
#   LAUNCHER      pdsh (default) or openmpi
#   MASTER_ADDR   address of the first host as the others reach it; default: its first one
#   MASTER_PORT   default: one that is free there
#   INTERFACE     of Open MPI's own messages, with LAUNCHER=openmpi; default: MPI chooses
#   DS_ENV_FILE   more variables for the ranks, "NAME=VALUE" a line (launch/deepspeed_env.example)
set -euo pipefail
# shellcheck source=launch/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

[[ ${1:-} && $1 != -h && $1 != --help ]] || die "usage: launch/deepspeed.sh HOSTFILE [SETTINGS...]"
hostfile=$1
shift
launcher=${LAUNCHER:-pdsh}
case $launcher in
    pdsh) tool=pdsh ;;
    openmpi) tool=ompi_info ;;
    *) die "LAUNCHER must be pdsh or openmpi, got $launcher" ;;
esac
command -v "$tool" >/dev/null || die "LAUNCHER=$launcher needs $tool, which is not on PATH"
command -v deepspeed >/dev/null || die "there is no deepspeed on PATH: pip install 'belief_dist[deepspeed]'"

read_hostfile "$hostfile"
check_hosts
first=${hosts[0]}
address=${MASTER_ADDR:-$(on_host "$first" 'hostname -I' | cut -d ' ' -f 1)}
[[ $address =~ ^[A-Za-z0-9._:-]+$ ]] || die "MASTER_ADDR must be a name or an address of $first, got \"$address\""
port=$(port_on "$first" "${MASTER_PORT:-}")

# The launcher forwards next to nothing of the environment but the lines of a file, and stumbles over
# blank lines and comments there: it gets a clean one.
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
job=$$-$(date +%s)-${port}
environment=$scratch/environment
check_line() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "$2: expected NAME=VALUE, got \"$1\""
    [[ $1 != *[\"\`\$\\]* ]] || die "$2: \"$1\" holds one of \" \` \$ \\, which deepspeed cannot pass on"
}
for name in $(forwarded); do
    [[ $name == PYTHON* || $name == UCX* ]] && continue # the launcher's own
    check_line "$name=${!name}" "$name"
    echo "$name=${!name}"
done >"$environment"
if [[ -n ${DS_ENV_FILE:-} ]]; then
    [[ -r $DS_ENV_FILE ]] || die "DS_ENV_FILE is $DS_ENV_FILE, which cannot be read"
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        check_line "$line" DS_ENV_FILE
        echo "$line"
    done <"$DS_ENV_FILE" >>"$environment"
fi
echo "BELIEF_DIST_JOB=$job" >>"$environment"

arguments=(--hostfile "$scratch/hostfile" --launcher "$launcher" --no_ssh_check --force_multi
    --master_addr "$address" --master_port "$port")
for i in "${!hosts[@]}"; do echo "${hosts[i]} slots=${slots[i]}"; done >"$scratch/hostfile"
if [[ $launcher == pdsh ]]; then
    export PDSH_SSH_ARGS_APPEND="${ssh_options[*]} ${PDSH_SSH_ARGS_APPEND:-}"
else
    mpi="--bind-to none --mca plm_rsh_args '${ssh_options[*]}'"
    if [[ -z ${INTERFACE:-} ]]; then
        # All networks but 127.0.0.0/8, as Open MPI does itself: the launcher would say eth0.
        networks=0.0.0.0/2,64.0.0.0/3,96.0.0.0/4,112.0.0.0/5,120.0.0.0/6,124.0.0.0/7,126.0.0.0/8,128.0.0.0/1
        mpi+=" --mca btl_tcp_if_include $networks"
    else
        mpi+=" --mca btl_tcp_if_include $INTERFACE --mca oob_tcp_if_include $INTERFACE"
    fi
    arguments+=("--launcher_args=$mpi")
    if ((EUID == 0)); then # containers
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
fi

# pdsh waits for every host, for one whose rank hangs for ever; but it says when another has failed.
# watch_hosts PID: pass lines on; send USR1 to PID then.
watch_hosts() {
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line"
        if [[ $line =~ ^pdsh@.*:\ ssh\ exited\ with\ exit\ code ]]; then
            kill -USR1 "$1" 2>/dev/null || true
        fi
    done
}

# shellcheck disable=SC2329 # called by trap
finish() {
    status=$?
    trap - EXIT
    trap '' USR1     # of the hosts that now end
    trap : INT TERM  # ends the wait below, and nothing else
    if ((status == 130 || status == 143)); then
        echo "deepspeed.sh: the ranks finish their step and save, for 30 seconds at most" >&2
        end_job "$job" TERM
        timeout --foreground 30 tail --pid "$pid" --follow /dev/null || true
    fi
    if ((status != 0)); then
        kill -KILL -- "-$pid" 2>/dev/null || true
        end_job "$job"
        echo "deepspeed.sh: the job ended with status $status; nothing of it is left on the hosts" >&2
    fi
    rm -r "$scratch"
    exit "$status"
}
pid=none
failed=
trap 'failed=yes' USR1
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# In a process group of its own: on Ctrl-C the launcher would end every process on the hosts that looks
# like its own, other jobs' too.
DS_ENV_FILE=$environment setsid deepspeed "${arguments[@]}" \
    "$root/examples/train_gpt.py" --config "$root/configs/gpt.yaml" "$@" \
    </dev/null 2> >(watch_hosts $$ >&2) &
pid=$!
status=0
wait "$pid" || status=$?
if [[ -n $failed ]]; then
    # The other hosts mostly end by themselves.
    for _ in {1..10}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 1
    done
    status=1
fi
exit "$status"
