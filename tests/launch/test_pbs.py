"""scripts/pbs/train.pbs, with programs in the place of PBS' and of Open MPI's mpiexec."""

import subprocess
from pathlib import Path

import pytest

from tests.launcher import ENVIRONMENT

REPOSITORY = Path(__file__).parents[2]
MPIEXEC = """#!/bin/bash
# runs one rank, and passes USR1 on
while [ "$1" != bash ]; do shift; done
read -r _ _ _ SCRIPT _ < /proc/$PPID/stat # the parent of `timeout`
[ -z "$DELETED" ] || kill "$SCRIPT" # as qdel does
OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 "$@" &
trap "kill -USR1 $!" USR1
while CODE=0 && { wait $! || CODE=$?; } && kill -0 $! 2> /dev/null; do :; done
exit $CODE
"""
TRAINER = """#!/bin/bash
# trains until it is told to stop, or for TRAINS steps
trap 'echo stopped by USR1; exit 85' USR1
echo rank $RANK of $WORLD_SIZE
for ((i = 0; i < 20 * ${TRAINS:-60}; i++)); do sleep 0.05; done
"""


def run(folder: Path, walltime: str, **variables: str) -> tuple[str, int, bool]:
    """Output, exit code, and whether the job was submitted again."""
    for name, text in {
        "mpiexec": MPIEXEC,
        "python": TRAINER,
        "qstat": f"#!/bin/sh\necho '    Resource_List.walltime = {walltime}'\n",
        "qsub": "#!/bin/sh\necho $@ > $0.log\n",
    }.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (folder / "base").mkdir()
    (folder / "base/manifest.json").write_text("{}")
    (folder / "nodes").write_text("n1\nn2\n")
    own = {
        "PATH": f"{folder}/bin:{ENVIRONMENT['PATH']}",
        "PYTHON": f"{folder}/bin/python",
        "REPOSITORY": str(REPOSITORY),
        "PBS_NODEFILE": f"{folder}/nodes",
        "PBS_JOBID": "7",
        "BASE_PATH": f"{folder}/base",
        "STAGE": "1",
    }
    done = subprocess.run(
        # a rank that ran in this process before may have left TERM ignored, for children too
        ["env", "--default-signal=TERM", "bash", "scripts/pbs/train.pbs"],
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **own, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr, done.returncode, (folder / "bin/qsub.log").exists()


@pytest.mark.parametrize("deleted", ["", "yes"])
def test_before_the_walltime_a_job_that_is_not_deleted_is_submitted_again(
    tmp_path, deleted
) -> None:
    output, code, again = run(tmp_path, "00:08:01", LEAD_SECONDS="480", DELETED=deleted)
    assert "rank 0 of 2" in output and "stopped by USR1" in output
    assert code == 85 and again == (not deleted)


@pytest.mark.parametrize("walltime", ["00:08:01", ""])
def test_a_finished_stage_is_not_submitted_again(tmp_path, walltime) -> None:
    output, code, again = run(tmp_path, walltime, TRAINS="0")
    assert "stopped by USR1" not in output and code == 0 and not again, output
