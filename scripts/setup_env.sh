# Sourced by quickstart.sh and test.sh: makes .venv from requirements.lock, once, and puts it first in PATH.
# A second start with the same lock file reuses it. PYTHON sets the interpreter (3.10 to 3.12).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

compile_kernels() { # the first call of the vBPE kernels takes half a minute; numba caches the result on disk
    local folder
    folder="$(mktemp -d)"
    .venv/bin/python -c "import numpy; numpy.save('$folder/codes.npy', numpy.arange(512).reshape(8, 8, 8).astype('uint16') % 5)"
    .venv/bin/beingvl train-vbpe --codes "$folder/codes.npy" --output "$folder/vbpe.json" --num_merges 4
    .venv/bin/python -c "
import numpy
from beingvl.vbpe.visual_bpe import VisualBPE
vbpe, grid = VisualBPE.load('$folder/vbpe.json'), numpy.load('$folder/codes.npy')[0]
assert (vbpe.decode(vbpe.encode(grid), 8, 8) == grid).all()"
    rm -r "$folder"
}

if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then PYTHON=$candidate; break; fi
    done
fi
if [ -z "${PYTHON:-}" ] || ! supported "$PYTHON"; then
    echo "error: no Python 3.10, 3.11 or 3.12 found (looked for ${PYTHON:-python3, python3.12, python3.11, python3.10}); install one or set PYTHON" >&2
    exit 2
fi

wanted="$("$PYTHON" --version) $(cat requirements.lock setup.py | sha256sum | cut -c1-16)"
if [ "$(cat .venv/.beingvl-setup 2>/dev/null)" != "$wanted" ]; then
    echo "== set-up: .venv with $("$PYTHON" --version), versions of requirements.lock (2.6 GB, silent for 3 to 6 minutes, once)"
    rm -rf .venv
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -r requirements.lock
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
    compile_kernels > /dev/null
    echo "$wanted" > .venv/.beingvl-setup
fi

export PATH="$PWD/.venv/bin:$PATH"
PYTHON="$PWD/.venv/bin/python" # the stage scripts read it, too, if the user exported it to set the interpreter
