"""Starts a worker process that says so and sleeps, and waits for it."""

import time

from beingvl.artefact.work import worker_processes


def nothing() -> None: ...


def sleep() -> None:
    print("sleeping", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    with worker_processes(1, nothing) as pool:
        pool.submit(sleep).result()
