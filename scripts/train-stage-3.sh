#!/usr/bin/env bash
# Stage 3: full fine-tuning, trains everything.
#   bash scripts/train-stage-3.sh <master_node_id> [model] [more arguments for the trainer]
# <master_node_id> selects hostfiles/hostfile-<id>; 0 is this machine alone. Every path can be set in the environment.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/path/to/your/workspace}"
DATA_PATH="${DATA_PATH:-$WORKSPACE/data/tokenized/sft_stage3/sft_stage3_data_vbpe.jsonl}"
OUTPUT_DIR="${OUTPUT_DIR:-$WORKSPACE/models/beingvl/stage-3}"
LOG_DIR="${LOG_DIR:-$WORKSPACE/logs/stage-3}"
MODEL_PATH="${MODEL_PATH:-$(dirname "$OUTPUT_DIR")/stage-2/final}" # default: stage 2's output

STAGE=3
MODEL_HINT="run stage 2 first (scripts/train-stage-2.sh), or set MODEL_PATH"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch_stage.sh"
