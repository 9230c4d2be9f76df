#!/usr/bin/env bash
# From nothing to a trained Being-VL on this machine, without a GPU: installs into .venv, runs the whole pipeline on real images
# (scikit-learn's handwritten digits), and shows answers about images the model has never seen.
#   bash scripts/quickstart.sh [--install_only | --raw | --inputs_only]     --raw trains on VQ codes without vBPE, for comparison;
#                                                                           --inputs_only stops before the first shards
# Started again, it reuses every finished step. RUN sets the folder, SEED the seed, NUM_RANKS the number of CPU ranks (1 or 2),
# MASTER_PORT their port; STAGE3_STEPS shortens the last stage.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
case "${1:-}" in
--install_only) echo '== ready: source .venv/bin/activate' && exit 0 ;;
--raw) VARIANT=base ;;
'' | --inputs_only) VARIANT=vbpe ;;
*) echo "usage: [SEED=0] [RUN=runs/quickstart] [NUM_RANKS=2] [MASTER_PORT=29500] bash scripts/quickstart.sh [--install_only | --raw | --inputs_only]" >&2 && exit 2 ;;
esac

SEED="${SEED:-0}"
RUN="${RUN:-runs/quickstart}"
case "${NUM_RANKS:=2}" in 1 | 2) ;; *) echo "error: NUM_RANKS is '$NUM_RANKS', expected 1 or 2: the batches of the quickstart are not divisible by more" >&2 && exit 2 ;; esac
case "$SEED" in '' | *[!0-9]*) echo "error: SEED is '$SEED', expected a whole number" >&2 && exit 2 ;; esac
export NUM_RANKS OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_MININTERVAL=1 PYTHONWARNINGS=ignore
STARTED=$(date +%s)
[ "$VARIANT" = vbpe ] && STAGES="$RUN" || STAGES="$RUN/raw"
mkdir -p "$STAGES"
SPENT=$(cat "$STAGES/wall-seconds" 2> /dev/null || true) # by earlier starts
case "$SPENT" in '' | *[!0-9]* | 0?*) SPENT=0 ;; esac
[ -e "$STAGES/eval/stage-3/manifest.json" ] && IS_FINISHED=1 || IS_FINISHED=
wall_seconds() { [ -n "$IS_FINISHED" ] && echo "$SPENT" || echo "$((SPENT + $(date +%s) - STARTED))"; }
trap 'wall_seconds > "$STAGES/wall-seconds"' EXIT
say() { printf '\n== %3d s  %s\n' "$(($(date +%s) - STARTED))" "$*"; }

say "real images: handwritten digits as PNG files and LLaVA JSON"
python scripts/make_digits_dataset.py --output_dir "$RUN/data" --image_size 20 --seed "$SEED"

say "VQ-GAN: images to 10 x 10 codes out of 32, and back"
beingvl train-vq --image_path "$RUN/data/images/train" --validation_path "$RUN/data/images/validation" --output "$RUN/vqgan" \
    --image_size 20 --grid 10 --num_codes 32 --steps 300 --seed "$SEED"

for SPLIT in train test; do
    say "[1] encode-images: $SPLIT"
    beingvl encode-images --image_path "$RUN/data/images" --json_path "$RUN/data/$SPLIT.json" --vqgan "$RUN/vqgan" \
        --output "$RUN/vq_codes/$SPLIT"
done

say "[2] train-vbpe: 128 merges"
beingvl train-vbpe --codes "$RUN/vq_codes/train" --output "$RUN/vbpe" --num_merges 128

say "a small text LLaMA stands in for Llama-3.1-8B"
python scripts/make_text_llama.py --texts "$RUN/data/texts.txt" --output_path "$RUN/llama" --vocab_size 448 --steps 60 --seed "$SEED"

say "[3] convert: LLaMA + VQ-GAN + vBPE -> Being-VL base"
beingvl convert --llama_path "$RUN/llama" --vqgan "$RUN/vqgan" --vbpe "$RUN/vbpe" --output "$RUN/base" \
    --init codebook --seed "$SEED" --verify_loading

say "[4] tokenize"
beingvl tokenize --mode sft --json_path "$RUN/data/train.json" --codes "$RUN/vq_codes/train" --vbpe "$RUN/vbpe" \
    --model "$RUN/base" --output "$RUN/tokenized" --dataset_name digits

[ "${1:-}" != --inputs_only ] || exit 0
say "[5] build-shards"
beingvl build-shards --jsonl_path "$RUN/tokenized/digits_$VARIANT.jsonl" --vbpe "$RUN/vbpe" --output "$RUN/shards-$VARIANT"

evaluate() { # model folder, output folder
    beingvl evaluate --model "$1" --vbpe "$RUN/vbpe" --json_path "$RUN/data/test.json" --codes "$RUN/vq_codes/test" \
        --output "$2" $([ "$VARIANT" = base ] && echo --raw)
}

for STAGE in 1 2 3; do
    say "[6] stage $STAGE of 3: deepspeed, ZeRO-3, $NUM_RANKS CPU ranks"
    [ "$STAGE" = 1 ] && export MODEL_PATH="$RUN/base" || unset MODEL_PATH
    DATA_PATH="$RUN/shards-$VARIANT" OUTPUT_DIR="$STAGES/stage-$STAGE" LOG_DIR="$STAGES/logs/stage-$STAGE" OMP_NUM_THREADS='' \
        DS_CONFIG="ds_configs/quickstart-stage$STAGE.json" bash "scripts/train-stage-$STAGE.sh" 0 $([ "$STAGE" != 3 ] || echo ${STAGE3_STEPS:+--set "beingvl.max_steps=$STAGE3_STEPS"})
    say "evaluate stage $STAGE on images it has never seen$([ "$STAGE" != 1 ] || echo ": none is right yet, it still answers in whole sentences")"
    evaluate "$STAGES/stage-$STAGE/final" "$STAGES/eval/stage-$STAGE"
done

say "report"
cp scripts/equal_time.json "$RUN/equal_time.json" # three seeds; too long to be measured here
beingvl report run "$RUN" --stages_path "$STAGES" --output "$STAGES/report" --wall_seconds "$(wall_seconds)"
say "ask it yourself"
echo "source .venv/bin/activate
beingvl generate --model $STAGES/stage-3 --image $RUN/data/images/test/0002-0.png --prompt 'Which digit is this?'$([ "$VARIANT" = base ] && echo ' --raw')"
