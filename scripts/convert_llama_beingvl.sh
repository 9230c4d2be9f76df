#!/usr/bin/env bash
# Makes the base of the three stages from a LLaMA, Being-VL's tokenizer and VQ-GAN.
#   bash scripts/convert_llama_beingvl.sh [more options of `beingvl convert`]
# Every path can be set in the environment; command-line options come last and win.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/path/to/your/workspace}"
LLAMA_PATH="${LLAMA_PATH:-$WORKSPACE/models/llama3.1-8b}"
TOKENIZER_PATH="${TOKENIZER_PATH:-$WORKSPACE/models/being-tokenizer}"
VQ_PATH="${VQ_PATH:-$WORKSPACE/models/being-vq-8k}"
OUTPUT_PATH="${OUTPUT_PATH:-$WORKSPACE/models/beingvl/base}"

REPOSITORY="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
# use the repository's own environment if there is one, like the stage scripts
[ ! -x "$REPOSITORY/.venv/bin/python" ] || PYTHON="${PYTHON:-$REPOSITORY/.venv/bin/python}"
exec "${PYTHON:-python3}" "$REPOSITORY/beingvl/utils/convert_llama_beingvl.py" \
    --llama_path "$LLAMA_PATH" --being_tokenizer_config_path "$TOKENIZER_PATH" --being_vq_path "$VQ_PATH" \
    --output "$OUTPUT_PATH" --verify_loading "$@"
