#!/usr/bin/env bash
# Stage 1: embedding alignment, trains visual rows only.
#   bash scripts/train-stage-1.sh <master_node_id> [model] [more arguments for the trainer]
# <master_node_id> selects hostfiles/hostfile-<id>; 0 is this machine alone. Every path can be set in the environment.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/path/to/your/workspace}"
DATA_PATH="${DATA_PATH:-$WORKSPACE/data/tokenized/pt/pretrain_data_vbpe.jsonl}"
OUTPUT_DIR="${OUTPUT_DIR:-$WORKSPACE/models/beingvl/stage-1}"
LOG_DIR="${LOG_DIR:-$WORKSPACE/logs/stage-1}"
MODEL_PATH="${MODEL_PATH:-$WORKSPACE/models/beingvl/base}"

STAGE=1
MODEL_HINT="make it with \`beingvl convert\`, or set MODEL_PATH"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch_stage.sh"
