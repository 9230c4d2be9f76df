#!/usr/bin/env bash
# Stage 2: selective fine-tuning, trains visual rows and the first quarter of the layers.
#   bash scripts/train-stage-2.sh <master_node_id> [model] [more arguments for the trainer]
# <master_node_id> selects hostfiles/hostfile-<id>; 0 is this machine alone. Every path can be set in the environment.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/path/to/your/workspace}"
DATA_PATH="${DATA_PATH:-$WORKSPACE/data/tokenized/sft_stage2/sft_stage2_data_vbpe.jsonl}"
OUTPUT_DIR="${OUTPUT_DIR:-$WORKSPACE/models/beingvl/stage-2}"
LOG_DIR="${LOG_DIR:-$WORKSPACE/logs/stage-2}"
MODEL_PATH="${MODEL_PATH:-$(dirname "$OUTPUT_DIR")/stage-1/final}" # default: stage 1's output

STAGE=2
MODEL_HINT="run stage 1 first (scripts/train-stage-1.sh), or set MODEL_PATH"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch_stage.sh"
