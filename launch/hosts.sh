# shellcheck shell=bash
# Sourced by the recipes that start a job over ssh: everything that can be wrong with hosts is found,
# and said in one line, before the job starts.

# The repository and its environment must lie at the same path on all hosts.
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=$(command -v python || true)

# Never asks for a password, never waits long. Users, ports and keys belong into ~/.ssh/config.
ssh_options=(-o BatchMode=yes -o ConnectTimeout=5)

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# read_hostfile FILE: sets hosts=(NAME...), slots=(N...) and ranks, their sum.
read_hostfile() {
    local file=$1 line number=0
    hosts=() slots=() ranks=0
    [[ -r $file ]] || die "cannot read the hostfile $file: write a line \"HOST slots=RANKS\" for each host"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%%#*}
        [[ $line =~ ^[[:space:]]*$ ]] && continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9._:@-]+)[[:space:]]+slots=([0-9]+)[[:space:]]*$ ]] ||
            die "$file, line $number: expected \"HOST slots=RANKS\", got \"$line\""
        local host=${BASH_REMATCH[1]} count=$((10#${BASH_REMATCH[2]}))
        ((count > 0)) || die "$file, line $number: $host has slots=0; give it at least 1, or remove the line"
        [[ " ${hosts[*]} " != *" $host "* ]] ||
            die "$file, line $number: $host appears twice; add its slots up in one line"
        hosts+=("$host") slots+=("$count")
        ranks=$((ranks + count))
    done <"$file"
    ((ranks > 0)) || die "$file names no host: write a line \"HOST slots=RANKS\" for each"
}

# What a host must have; prints its own name and the number of its cores.
# shellcheck disable=SC2016 # expanded on the host
check='test -x "$1" || { echo "has no $1"; exit 9; }
       test -f "$2/examples/train_gpt.py" || { echo "has no $2/examples/train_gpt.py"; exit 9; }
       echo "$(uname -n) $(nproc)"'

# check_hosts: all hosts answer, are different, and have this repository and Python; sets OMP_NUM_THREADS
# to the cores of each rank where it is unset.
check_hosts() {
    local answers host i said own share least=0 pids=() names=()
    [[ -n $python ]] || die "there is no python on PATH: activate the environment first"
    [[ $python$root != *\'* ]] || die "the paths $python and $root must not hold a quote: shells of the hosts read them"
    answers=$(mktemp -d)
    for i in "${!hosts[@]}"; do
        on_host "${hosts[i]}" "bash -c '$check' check '$python' '$root'" >"$answers/$i" 2>&1 &
        pids+=($!)
    done
    for i in "${!hosts[@]}"; do
        host=${hosts[i]}
        if ! wait "${pids[i]}"; then
            said=$(grep -v '^Warning' "$answers/$i" | tail -n 1)
            rm -r "$answers"
            die "$host: ${said:-no answer} (tried: ssh ${ssh_options[*]} $host)"
        fi
        read -r own share < <(tail -n 1 "$answers/$i")
        [[ " ${names[*]} " != *" $own "* ]] || {
            rm -r "$answers"
            die "$host is the host $own, which the hostfile names twice"
        }
        names+=("$own")
        share=$((share / slots[i]))
        ((least > 0 && least < share)) || least=$share
    done
    rm -r "$answers"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((least > 0 ? least : 1))}
}

# on_host HOST COMMAND: run it there; on this machine without ssh.
on_host() {
    if [[ $1 == localhost ]]; then
        bash -c "$2" </dev/null
    else
        ssh -n "${ssh_options[@]}" "$1" "$2"
    fi
}

# port_on HOST [PORT]: print PORT if it is free on HOST, or any free one.
port_on() {
    [[ -z ${2:-} ]] || { [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] && (($2 <= 65535)); } ||
        die "MASTER_PORT must be in 1..65535, got \"$2\""
    on_host "$1" "'$python' -c 'import socket; s = socket.socket(); s.setsockopt(1, 2, 1); s.bind((\"\", ${2:-0})); print(s.getsockname()[1])'" 2>/dev/null ||
        die "MASTER_PORT is $2, which is taken on $1: choose another, or none"
}

# forwarded: print the names of the variables that every rank should see, one a line. Secrets are not
# among them: launchers pass variables in command lines, which every user of a host can read.
forwarded() {
    compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|(OMP|NCCL|GLOO|TORCH|TRITON|HF|UCX|DS|PYTHON|MPI4PY|BELIEF_DIST)_?[A-Z0-9_]*)$' |
        grep -Ev 'TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$'
}

# end_job ID [SIGNAL]: end what is left of a job on all hosts, stopped processes too, and nothing else; or
# send it another signal than KILL.
# shellcheck disable=SC2016 # expanded on the hosts
end_job() {
    local host
    for host in "${hosts[@]}"; do
        on_host "$host" 'for process in /proc/[0-9]*; do
            if grep -qzx "BELIEF_DIST_JOB='"$1"'" "$process/environ" 2>/dev/null; then
                kill -'"${2:-KILL}"' "${process#/proc/}"
            fi
        done' 2>/dev/null &
    done
    wait
}
