# shellcheck shell=bash
# Sourced by the batch scripts: the run's folder, and what happens before Slurm ends the job.

[[ -f examples/train_gpt.py ]] || {
    echo "submit from the repository's root: $PWD has no examples/train_gpt.py" >&2
    exit 2
}
[[ -d .venv ]] && export PATH=$PWD/.venv/bin:$PATH
# A requeued job has the same id: it continues there, from the last checkpoint.
run=${RUN:-runs/slurm-$SLURM_JOB_ID}
[[ " $*" != *" --folder"* ]] || {
    echo "set RUN=FOLDER instead of --folder: the job is asked to save in that folder" >&2
    exit 2
}

# train COMMAND...: run it. When Slurm sends USR1 (see --signal), ask the run to save and end, and put
# the job into the queue again.
train() {
    local pid status=0 interrupted=
    trap 'interrupted=yes' USR1
    "$@" &
    pid=$!
    while wait "$pid" || status=$?; do
        [[ -n $interrupted ]] || break
        trap '' USR1
        echo "Slurm will end this job: saving in $run"
        while kill -0 "$pid" 2>/dev/null; do
            mkdir -p "$run"
            touch "$run/stop"
            sleep 1
        done
        status=0
        wait "$pid" || status=$?
        if ((status == 0)); then
            scontrol requeue "$SLURM_JOB_ID"
        fi
        break
    done
    return "$status"
}
