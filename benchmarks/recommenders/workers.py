"""Runs, in processes of one thread each, until all are done or somebody presses Ctrl-C."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from benchmarks.recommenders.runs import Bench, Task


def do_all(work: Path, folder: Path, tasks: Sequence[Task], workers: int) -> None:
    """Does the tasks, each worker the next one that is left; prints a line a run.

    Processes are ended when this is left, however that happens; what they had finished is kept,
    and a fit goes on from its last epoch when it is asked for again.

    Args:
        work: see Bench.
        folder: see Bench.
        tasks: to do.
        workers: how many processes.

    Raises:
        RuntimeError: if a process failed; the others have done what they could.
    """
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    count = min(workers, len(tasks))
    processes = [
        context.Process(
            target=_work, args=(work, folder, tuple(tasks), taken, os.getpid()), daemon=True
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            process.start()
        left = list(processes)
        while left:
            ended = wait([process.sentinel for process in left])
            left = [process for process in left if process.sentinel not in ended]
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        raise RuntimeError(f"{failed} of {count} processes failed; run it again to go on")


def _work(
    work: Path, folder: Path, tasks: tuple[Task, ...], taken: "Synchronized[int]", parent: int
) -> None:
    """A worker's life."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    bench = Bench(work, folder)
    while os.getppid() == parent:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(tasks):
            return
        print(bench.do(tasks[number]), flush=True)
