# Sourced by every job script: the pipeline's paths, which the environment can override (sbatch exports it), and `beingvl`.
# Slurm runs a copy of the job script, so the repository is REPOSITORY, by default the folder in which `sbatch` was called.
REPOSITORY="${REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
for name in WORKSPACE IMAGE_PATH JSON_PATH JSON_PATH_1 JSON_PATH_2 JSON_PATH_3 LLAMA_PATH VQ_PATH VQ_CODES VBPE_PATH BASE_PATH TOKENIZED SHARDS STAGES; do
    [ -z "${!name:-}" ] || printf -v "$name" %s "$(realpath -m "${!name}")" # relative to the user's folder, not to the repository
done
cd "$REPOSITORY"
[ ! -f .venv/bin/activate ] || [ -n "${PYTHON:-}" ] || PYTHON="$REPOSITORY/.venv/bin/python"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"

WORKSPACE="${WORKSPACE:-/path/to/your/workspace}"
IMAGE_PATH="${IMAGE_PATH:-$WORKSPACE/images}"
JSON_PATH="${JSON_PATH:-$WORKSPACE/data/train.json}"
LLAMA_PATH="${LLAMA_PATH:-$WORKSPACE/models/llama3.1-8b}"
VQ_PATH="${VQ_PATH:-$WORKSPACE/models/being-vq-8k}"
VQ_CODES="${VQ_CODES:-$WORKSPACE/data/vq_codes}"
VBPE_PATH="${VBPE_PATH:-$WORKSPACE/data/vbpe}"
BASE_PATH="${BASE_PATH:-$WORKSPACE/models/beingvl/base}"
TOKENIZED="${TOKENIZED:-$WORKSPACE/data/tokenized}"
SHARDS="${SHARDS:-$WORKSPACE/data/shards}"
STAGES="${STAGES:-$WORKSPACE/models/beingvl}"
NUM_MERGES="${NUM_MERGES:-8192}"

beingvl() { "$PYTHON" -m beingvl "$@"; }

# An array task gets its share of the work from SLURM_ARRAY_TASK_ID and _COUNT; ranks set in the submitting shell would interfere.
unset RANK WORLD_SIZE LOCAL_RANK
