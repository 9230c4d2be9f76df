#!/usr/bin/env bash
# Set-up and all tests: format, lint, types, unit tests, a tiny run of the whole line on two ranks, two hosts, a Slurm cluster.
#   bash scripts/test.sh [--install_only | --full]     --full adds the long storms and full grids
# Root and a Debian are needed for the last two (network namespaces, sshd, slurmd): their programs are installed, or named.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

install_launchers() {
    local program missing='' PATH="$PATH:/usr/sbin:/sbin"
    for program in sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 pkill:procps slurmctld:slurm-wlm munged:munge ${1:+chromium:chromium g++:g++}; do
        command -v "${program%%:*}" > /dev/null || missing+=" ${program##*:}"
    done
    [ -z "${1:-}" ] || [ -e /usr/include/libaio.h ] || missing+=' libaio-dev' # offload to NVMe
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "== set-up: apt packages$missing"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing; } > /dev/null && return 0
    fi
    echo "warning: the tests of the launchers will fail; as root: apt-get install$missing" >&2
}
install_launchers "$([ "${1:-}" != --full ] || echo with-browser)"
[ "${1:-}" = "--install_only" ] && exit 0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

ruff format --check .
ruff check .
mypy
if [ "${1:-}" = "--full" ]; then pytest --durations=20; else pytest --durations=20 -m "not slow"; fi
