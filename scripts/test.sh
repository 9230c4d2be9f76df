#!/usr/bin/env bash
# Set-up and all tests: format, lint, types, unit tests, a tiny run of the whole pipeline on two ranks, two hosts, a Slurm cluster.
#   bash scripts/test.sh [--install_only | --full | --quickstart]
# --full adds the long storms, the full grids and the quickstart; --quickstart runs only the quickstart, which checks that it learns.
# Two hosts and Slurm need root and Debian (network namespaces, sshd, slurmd): missing programs are installed, or listed. Without
# root, these tests are skipped, with a message.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

install_launchers() {
    local program missing='' PATH="$PATH:/usr/sbin:/sbin"
    for program in sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 pkill:procps slurmctld:slurm-wlm munged:munge ${1:+chromium:chromium g++:g++ sshfs:sshfs}; do
        command -v "${program%%:*}" > /dev/null || missing+=" ${program##*:}"
    done
    [ -z "${1:-}" ] || [ -e /usr/include/libaio.h ] || missing+=' libaio-dev' # offload to NVMe
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "== set-up: apt packages$missing"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing; } > /dev/null && return 0
    fi
    echo "warning: some tests need packages that are missing; as root: apt-get install$missing" >&2
}
install_launchers "$([ "${1:-}" != --full ] || echo with-browser)"
[ "${1:-}" = "--install_only" ] && exit 0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ "${1:-}" != "--quickstart" ] || exec pytest --durations=3 tests/test_quickstart.py

chosen='not slow' workers='-n 3 --dist loadfile --no-loadscope-reorder' # tests of hosts and Slurm mostly wait
[ "${1:-}" != "--full" ] || chosen='slow or not slow' workers=''
if [ "$(id -u)" != 0 ]; then
    echo "not root: the tests of two hosts, of a Slurm cluster and of mounted disks are left out" >&2
    chosen="($chosen) and not needs_root"
fi
ruff format --check .
ruff check .
mypy
pytest --durations=20 -m "$chosen" $workers
