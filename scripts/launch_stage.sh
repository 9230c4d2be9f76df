# Sourced by train-stage-{1,2,3}.sh: checks inputs, makes shards from a JSONL file, and starts the DeepSpeed launcher.
# Needs STAGE MODEL_PATH DATA_PATH OUTPUT_DIR LOG_DIR, and in "$@" <master_node_id> [model] [more arguments for the trainer].
# Optional variables: DS_CONFIG (instead of ds_configs/stage$STAGE.json), MASTER_PORT, NUM_RANKS (this machine alone),
# HOSTFILE (instead of hostfiles/hostfile-<id>), VBPE_PATH (for new shards; else the vbpe.json in MODEL_PATH), DRY_RUN=1.

fail() { echo "error: $*" >&2; exit 2; }
missing() { [ -n "${DRY_RUN:-}" ] && echo "note: $*" >&2 || fail "$*"; } # a dry run needs no inputs

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# use the repository's own environment if there is one, like the Slurm jobs
[ ! -x "$REPOSITORY/.venv/bin/python" ] || PYTHON="${PYTHON:-$REPOSITORY/.venv/bin/python}"
PYTHON="${PYTHON:-python3}"
DS_CONFIG="${DS_CONFIG:-$REPOSITORY/ds_configs/stage$STAGE.json}"
# Variables of Being-VL-0.5's scripts that have no effect here: the stage's JSON sets these values.
note() { [ -z "${!1:-}" ] || echo "note: $1=${!1} has no effect: $2" >&2; }
set_key() { note "$1" "it is $2 in $DS_CONFIG; add --set $2=${!1:-}"; }
set_key BS train_micro_batch_size_per_gpu
note GRAD_ACCUM "it follows from train_batch_size (all GPUs, all micro-batches) in $DS_CONFIG; add --set train_batch_size=SEQUENCES"
set_key EPOCH beingvl.epochs
set_key LR optimizer.params.lr
set_key LR_SCHE beingvl.schedule
set_key WARMUP beingvl.warmup_ratio
set_key SAVE_STEPS beingvl.checkpoint_every_steps
note MODEL_TYPE "the model folder determines it; set MODEL_PATH"
note TRAIN_WITH_VBPE "the data determines it; set DATA_PATH to NAME_vbpe.jsonl or NAME_base.jsonl"
note SHUFFLE_DATA "samples are always shuffled with beingvl.seed in $DS_CONFIG; add --set beingvl.seed=NUMBER for a different order"
note FREEZE_TEXT_HEADS "it is the rule text_rows of beingvl.trainable in $DS_CONFIG; add --set beingvl.trainable='[{\"match\": \"text_rows\", \"train\": false}, {\"match\": \".*\"}]'"
note INIT_IMAGE_HEADS "\`beingvl convert\` initialises the visual rows; give it --init"

MASTER_NODE_ID="${1:-}"
shift || true
case "${1:--}" in -*) ;; *) MODEL_PATH="$1"; shift ;; esac # [model] instead of MODEL_PATH
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
case "$MASTER_NODE_ID" in '' | *[!0-9]*) fail "<master_node_id> is '$MASTER_NODE_ID'; usage: bash scripts/train-stage-$STAGE.sh <master_node_id> [model] [more arguments for the trainer] (0 is this machine alone)" ;; esac
# MODEL_PATH may also be a stage folder
[ -f "$MODEL_PATH/manifest.json" ] || [ ! -f "$MODEL_PATH/final/manifest.json" ] || MODEL_PATH="$MODEL_PATH/final"
# a Being-VL-0.5 folder passes: the command that reads it will report it
[ -f "$MODEL_PATH/manifest.json" ] || grep -qs '"vq_config"' "$MODEL_PATH/config.json" || missing "$MODEL_PATH is missing or incomplete; ${MODEL_HINT:-give a finished model folder}"
[ -e "$DATA_PATH" ] || missing "$DATA_PATH does not exist; make it with \`beingvl tokenize\`, or set DATA_PATH"
HOSTFILE="${HOSTFILE:-$REPOSITORY/hostfiles/hostfile-$MASTER_NODE_ID}"
[ -f "$HOSTFILE" ] || fail "$HOSTFILE does not exist; write one line per host: NAME slots=GPUS"
[ -f "$DS_CONFIG" ] || fail "$DS_CONFIG does not exist; the stages' JSON files are in ds_configs/"
echo "stage $STAGE: start model $MODEL_PATH"

if [ -f "$DATA_PATH" ]; then # a JSONL file, as in the training guide: make its shards once, beside it
    SHARDS="${DATA_PATH%.jsonl}_shards"
    [ -n "${DRY_RUN:-}" ] || "$PYTHON" -m beingvl build-shards --jsonl_path "$DATA_PATH" --model "$MODEL_PATH" ${VBPE_PATH:+--vbpe "$VBPE_PATH"} --output "$SHARDS" ${BUILD_OPTIONS:-}
    DATA_PATH="$SHARDS"
fi

exec "$PYTHON" -m beingvl launch --hostfile "$HOSTFILE" ${NUM_RANKS:+--num_ranks "$NUM_RANKS"} --master_port "${MASTER_PORT:-29500}" \
    ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${DRY_RUN:+--dry_run} -- \
    --config "$DS_CONFIG" --model "$MODEL_PATH" --data "$DATA_PATH" --output "$OUTPUT_DIR" --log_dir "$LOG_DIR" "$@"
