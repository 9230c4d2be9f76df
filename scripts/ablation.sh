#!/usr/bin/env bash
# The paper's ablation on this machine: {raw codes, merged codes at running positions, merged codes at anchor positions} x
# {curriculum and progressive unfreezing, each alone, a single stage}, the same number of tokens for all, on the quickstart's data.
#   [RUN=runs/ablation] [SEEDS='0 1 2'] [STEPS=600] bash scripts/ablation.sh [--full_size]
# STEPS is the total over all stages. Started again, it continues; in the background: nohup bash scripts/ablation.sh > ablation.log &
# --full_size runs nothing but prints the Slurm jobs that do it at 8B; it needs SHARDS-raw, SHARDS-running and SHARDS-anchor
# (`beingvl build-shards --image_positions`), and BASE_PATH.
set -euo pipefail
REGIMES="${REGIMES:-both progressive curriculum single}" CODES="${CODES:-raw running anchor}" SEEDS="${SEEDS:-0 1 2}"

# How a regime's stage differs from its JSON: stage 3's rules, its own mixture, or the mean mixture of all stages.
words() { # regime, stage, steps of all stages, prefix of the JSON files
    local json=$2 steps=$(($3 / 3)) mixture=''
    case "$1" in progressive | single) mixture="$(mixture "$4" 1 2 3)" ;; curriculum) mixture="$(mixture "$4" "$2")" ;; esac
    case "$1" in curriculum | single) json=3 ;; esac
    [ "$1" != single ] || steps=$3
    echo "$4$json.json --set beingvl.max_steps=$steps --set beingvl.epochs=20 ${mixture:+--set beingvl.mixture=$mixture}"
}
mixture() { # prefix of the JSON files, stages
    python3 -c "
import json, sys
found = [json.load(open(f'{sys.argv[1]}{stage}.json'))['beingvl']['mixture'] for stage in sys.argv[2:]]
mean = {name: round(sum(one.get(name, 0) for one in found) / len(found), 4) for name in found[-1]}
print(json.dumps(mean, separators=(',', ':')))" "$@"
}
stages() { [ "$1" = single ] && echo 1 || echo 1 2 3; }

if [ "${1:-}" = --full_size ]; then
    STEPS="${STEPS:-30000}"
    echo "# ${SBATCH_OPTIONS:=--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --time=48:00:00}"
    for seed in $SEEDS; do for codes in $CODES; do for regime in $REGIMES; do
        model='$BASE_PATH' after=''
        for stage in $(stages "$regime"); do
            set -- $(words "$regime" "$stage" "$STEPS" ds_configs/stage)
            output="\$STAGES/ablation/seed-$seed/$codes-$regime/stage-$stage" config=$1
            shift
            echo "JOB=\$(MODEL_PATH=$model DATA_PATH=\$SHARDS-$codes OUTPUT_DIR=$output DS_CONFIG=$config sbatch --parsable $SBATCH_OPTIONS $after" \
                "scripts/slurm/train.sbatch $stage --set train_batch_size=32 --set beingvl.seed=$seed" "$(printf "'%s' " "$@"))"
            model="$output/final" after='--dependency=afterok:$JOB'
        done
    done; done; done
    exit 0
fi

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
RUN="${RUN:-runs/ablation}" STEPS="${STEPS:-600}"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore NUM_RANKS="${NUM_RANKS:-2}"
for seed in $SEEDS; do
    inputs="$RUN/seed-$seed"
    RUN="$inputs" SEED="$seed" bash scripts/quickstart.sh --inputs_only
    for codes in $CODES; do
        [ "$codes" = raw ] && variant=base raw=--raw || variant=vbpe raw=''
        [ "$codes" = anchor ] && positions=anchor || positions=running
        shards="$inputs/shards-$codes"
        beingvl build-shards --jsonl_path "$inputs/tokenized/digits_$variant.jsonl" --vbpe "$inputs/vbpe" --output "$shards" --image_positions $positions
        for regime in $REGIMES; do
            folder="$inputs/$codes-$regime" model="$inputs/base"
            for stage in $(stages "$regime"); do
                set -- $(words "$regime" "$stage" "$STEPS" ds_configs/quickstart-stage)
                output="$folder/stage-$stage" config=$1
                shift
                MODEL_PATH="$model" DATA_PATH="$shards" OUTPUT_DIR="$output" LOG_DIR="$folder/logs" DS_CONFIG="$config" \
                    bash "scripts/train-stage-$stage.sh" 0 --set train_batch_size=8 --set beingvl.seed="$seed" "$@"
                model="$output/final"
            done
            beingvl evaluate --model "$model" --vbpe "$inputs/vbpe" --json_path "$inputs/data/test.json" --codes "$inputs/vq_codes/test" \
                --output "$folder/eval" $raw
        done
    done
done
python scripts/ablation_table.py "$RUN"
