#!/usr/bin/env bash
# Set-up and all tests: format, lint, types, unit tests, a tiny run of the whole line on two ranks.
#   bash scripts/test.sh [--install_only | --full]     --full adds the long storms and full grids
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
[ "${1:-}" = "--install_only" ] && exit 0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

ruff format --check .
ruff check .
mypy
if [ "${1:-}" = "--full" ]; then pytest; else pytest -m "not slow"; fi
