#!/usr/bin/env bash
# The whole line as Slurm jobs, each waiting for those it needs; prints the job ids.
#   WORKSPACE=… bash scripts/slurm/submit-pipeline.sh [sbatch options for the three training stages]
# Called again it submits only what is neither finished (the file it writes last is there) nor in the queue. Paths: scripts/slurm/environment.sh.
# TRAINER_OPTIONS goes to the trainer of each stage, DS_CONFIG_PREFIX (ds_configs/stage) selects the JSON files.
# ENCODE_TASKS and TOKENIZE_TASKS are the array sizes; SBATCH_OPTIONS goes to every sbatch, DATA_OPTIONS to those of the data steps,
# ENCODE_OPTIONS to encode-images (--num_workers 8, say), BUILD_OPTIONS to build-shards (--duplicate_ids keep).
set -euo pipefail
export REPOSITORY="${REPOSITORY:-$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)}"
source "$REPOSITORY/scripts/slurm/environment.sh"
unset OUTPUT_DIR DATA_PATH DS_CONFIG MODEL_PATH # one value for three stages would be wrong for two
export PYTHON PYTHONPATH WORKSPACE IMAGE_PATH JSON_PATH LLAMA_PATH VQ_PATH VQ_CODES VBPE_PATH BASE_PATH TOKENIZED SHARDS STAGES NUM_MERGES
JOBS="$WORKSPACE/slurm"
mkdir -p "$JOBS"

submit() { # name, file that says it is finished, names it waits for (spaces), then sbatch words; the job's id goes to $JOBS/name.job
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
submit encode-images "$VQ_CODES/manifest.json" '' $D --array="0-$((${ENCODE_TASKS:-1} - 1))" "$S/encode-images.sbatch" ${ENCODE_OPTIONS:-}
case "$VBPE_PATH" in *.json) VBPE_MARKER="$VBPE_PATH" ;; *) VBPE_MARKER="$VBPE_PATH/manifest.json" ;; esac # a file has no manifest
submit train-vbpe "$VBPE_MARKER" 'encode-images' $D "$S/train-vbpe.sbatch"
submit convert "$BASE_PATH/manifest.json" 'train-vbpe' $D "$S/convert.sbatch"
# a folder of token rows may hold several datasets; the manifest must list this one
grep -qsF "\"${DATASET_NAME:-data}_vbpe.jsonl\"" "$TOKENIZED/manifest.json" && TOKENIZED_MARKER="$TOKENIZED/manifest.json" || TOKENIZED_MARKER=''
submit tokenize "$TOKENIZED_MARKER" 'encode-images train-vbpe convert' $D --array="0-$((${TOKENIZE_TASKS:-1} - 1))" "$S/tokenize.sbatch"
submit build-shards "$SHARDS/manifest.json" 'tokenize' $D "$S/build-shards.sbatch" ${BUILD_OPTIONS:-}
submit train-1 "$STAGES/stage-1/final/manifest.json" 'convert build-shards' "$@" "$S/train.sbatch" 1
submit train-2 "$STAGES/stage-2/final/manifest.json" 'build-shards train-1' "$@" "$S/train.sbatch" 2
submit train-3 "$STAGES/stage-3/final/manifest.json" 'build-shards train-2' "$@" "$S/train.sbatch" 3
