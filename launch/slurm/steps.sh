# Sourced by the batch scripts: job steps that may be asked to stop, and the way back into the queue.
#
# SLURM tells a step to stop with USR1 (--signal, before the time limit) or TERM (preemption). All ranks then save the
# same step and end with 3. srun would kill the slower ones at the first code that is not 0, so each task's shell
# turns 3 into 0, and the first task, which runs on the node of the batch script, notes that it was asked to stop.
# USR1 and TERM also end a Python that has not come to its handlers yet: nothing was done, so that is a stop too.

PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# since SLURM 22.05 srun does not take sbatch's --cpus-per-task over by itself
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}; fi

# step COMMAND...: runs it as a job step, one process per task; ends with 3 if it was asked to stop
step() {
    local note code=0
    note=$(mktemp)
    # shellcheck disable=SC2016 # expands in the task
    NOTE=$note srun --kill-on-bad-exit=1 bash -c '
        trap : INT TERM USR1 # this shell must outlive what its Python answers
        "$@"
        code=$?
        case $code in
            3 | 130 | 138 | 143) ((SLURM_PROCID)) || echo stopped >"$NOTE" ; exit 0 ;;
        esac
        exit "$code"' - "$@" || code=$?
    if [[ $code -eq 0 && -s $note ]]; then code=3; fi
    rm -f "$note"
    return "$code"
}

# back_to_queue CODE: after 3 this job runs again from where it stopped; preempting, SLURM has queued it by itself
back_to_queue() {
    if [[ $1 -eq 3 ]]; then scontrol requeue "$SLURM_JOB_ID" || true; fi
    exit "$1"
}
