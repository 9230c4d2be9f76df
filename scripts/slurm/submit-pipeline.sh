#!/usr/bin/env bash
# The whole pipeline as Slurm jobs, each waiting for those it needs; prints the job ids. Submits nothing if a program or an input is
# missing.
#   WORKSPACE=… bash scripts/slurm/submit-pipeline.sh [sbatch options for the three training stages]
# Called again, it submits only jobs that are neither finished (their last file exists) nor in the queue. Paths: scripts/slurm/environment.sh.
# JSON_PATH holds the dataset rows of all three stages; JSON_PATH_1, _2 and _3 set them per stage, as in the training guide.
# TRAINER_OPTIONS goes to the trainer of each stage. DS_CONFIG_PREFIX (ds_configs/stage) selects the JSON files; DS_CONFIG_1, _2 and
# _3 set that of one stage.
# ENCODE_TASKS and TOKENIZE_TASKS are the array sizes; SBATCH_OPTIONS goes to every sbatch, DATA_OPTIONS to those of the data steps,
# ENCODE_OPTIONS to encode-images (for example --num_workers 8), BUILD_OPTIONS to build-shards (--duplicate_ids keep).
set -euo pipefail
export REPOSITORY="${REPOSITORY:-$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)}"
source "$REPOSITORY/scripts/slurm/environment.sh"
unset OUTPUT_DIR DATA_PATH DS_CONFIG MODEL_PATH # one value for three stages would be wrong for two
export PYTHON PYTHONPATH WORKSPACE IMAGE_PATH JSON_PATH LLAMA_PATH VQ_PATH VQ_CODES VBPE_PATH BASE_PATH TOKENIZED SHARDS STAGES NUM_MERGES
JOBS="$WORKSPACE/slurm"

refuse() { echo "error: $1" >&2; exit 2; }
needs() { # folder or file, the variable that names it, and the manifest of its result, which makes it unnecessary
    [ -e "$1" ] || [ -f "$3" ] || refuse "$2 is $1, which does not exist; set $2, or WORKSPACE"
}
case "$WORKSPACE" in /path/to/*) refuse "WORKSPACE is $WORKSPACE, the example; set WORKSPACE to the folder that holds images, data and models" ;; esac
for program in sbatch squeue; do
    command -v "$program" > /dev/null || refuse "no program $program; start this on a host of the cluster that submits jobs"
done
"$PYTHON" -c 'import beingvl.version' 2> /dev/null || refuse "$PYTHON cannot import beingvl; set PYTHON to the interpreter that has it"
ROWS=("$JSON_PATH") SETS=('') # one dataset for all stages, or one per stage
if [ -n "${JSON_PATH_1:-}${JSON_PATH_2:-}${JSON_PATH_3:-}" ]; then
    ROWS=("${JSON_PATH_1:-}" "${JSON_PATH_2:-}" "${JSON_PATH_3:-}") SETS=(-1 -2 -3)
fi
needs "$IMAGE_PATH" IMAGE_PATH "$VQ_CODES/manifest.json"
for i in "${!SETS[@]}"; do needs "${ROWS[i]:-not set}" "JSON_PATH${SETS[i]/-/_}" "$SHARDS${SETS[i]}/manifest.json"; done
needs "$LLAMA_PATH" LLAMA_PATH "$BASE_PATH/manifest.json"
needs "$VQ_PATH" VQ_PATH "$BASE_PATH/manifest.json"
for stage in 1 2 3; do
    name="DS_CONFIG_$stage"
    CONFIGS[stage]="${!name:-${DS_CONFIG_PREFIX:-ds_configs/stage}$stage.json}"
    [ -n "${!name:-}" ] || name=DS_CONFIG_PREFIX
    needs "${CONFIGS[stage]}" "$name" "$STAGES/stage-$stage/final/manifest.json"
done
mkdir -p "$JOBS"

submit() { # name, file that marks it finished, names it waits for (spaces), then sbatch arguments; the job id goes to $JOBS/name.job
    local name="$1" marker="$2" after="$3" ids='' id
    shift 3
    if [ -f "$marker" ]; then
        rm -f "$JOBS/$name.job"
        echo "$name: finished, $(dirname "$marker")"
        return
    fi
    if [ -f "$JOBS/$name.job" ] && in_queue "$(cat "$JOBS/$name.job")"; then
        echo "$name: in the queue, job $(cat "$JOBS/$name.job")"
        return
    fi
    for id in $after; do [ ! -f "$JOBS/$id.job" ] || ids+=":$(cat "$JOBS/$id.job")"; done
    # a job whose dependency failed must not wait forever
    id="$(sbatch --parsable --job-name="$name" --chdir="$REPOSITORY" --output="$JOBS/$name-%j.log" ${SBATCH_OPTIONS:-} \
        ${ids:+--dependency="afterok$ids" --kill-on-invalid-dep=yes} "$@")"
    echo "${id%%;*}" > "$JOBS/$name.job"
    echo "$name: job ${id%%;*}${ids:+, after${ids//:/ }}"
}
in_queue() { squeue --noheader --jobs="$1" --states=all --format=%T 2> /dev/null | grep -qE 'PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUED|SUSPENDED'; }

D="${DATA_OPTIONS:-}"
S="$REPOSITORY/scripts/slurm"
JSON_PATH="$(IFS=: && echo "${ROWS[*]}")" submit encode-images "$VQ_CODES/manifest.json" '' $D --array="0-$((${ENCODE_TASKS:-1} - 1))" "$S/encode-images.sbatch" ${ENCODE_OPTIONS:-}
case "$VBPE_PATH" in *.json) VBPE_MARKER="$VBPE_PATH" ;; *) VBPE_MARKER="$VBPE_PATH/manifest.json" ;; esac # a single file has no manifest
submit train-vbpe "$VBPE_MARKER" 'encode-images' $D "$S/train-vbpe.sbatch"
submit convert "$BASE_PATH/manifest.json" 'train-vbpe' $D "$S/convert.sbatch"
for i in "${!SETS[@]}"; do
    set_="${SETS[i]}"
    rows="$TOKENIZED$set_" shards="$SHARDS$set_" marker=''
    # a folder of token rows may hold several datasets; the manifest must list this one
    ! grep -qsF "\"${DATASET_NAME:-data}_vbpe.jsonl\"" "$rows/manifest.json" || marker="$rows/manifest.json"
    [ "$set_" = -1 ] && mode=pt || mode=sft # foundation data first, as in the training guide
    MODE="${MODE:-$mode}" JSON_PATH="${ROWS[i]}" TOKENIZED="$rows" submit "tokenize$set_" "$marker" 'encode-images train-vbpe convert' $D \
        --array="0-$((${TOKENIZE_TASKS:-1} - 1))" "$S/tokenize.sbatch"
    TOKENIZED="$rows" SHARDS="$shards" submit "build-shards$set_" "$shards/manifest.json" "tokenize$set_" $D "$S/build-shards.sbatch" ${BUILD_OPTIONS:-}
done
for stage in 1 2 3; do
    [ ${#SETS[@]} = 1 ] && set_='' || set_="-$stage"
    [ $stage = 1 ] && before=convert || before="train-$((stage - 1))"
    DS_CONFIG="${CONFIGS[stage]}" SHARDS="$SHARDS$set_" submit "train-$stage" "$STAGES/stage-$stage/final/manifest.json" "build-shards$set_ $before" "$@" "$S/train.sbatch" $stage
done
