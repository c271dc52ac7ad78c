"""Tasks side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class _ThisProcess(Executor):
    """Runs a task where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def workers(jobs: int, log: Path, prepare: Callable[[], object]) -> Iterator[Executor]:
    """An executor of ``jobs`` tasks at once; 1 runs them in this process.

    Workers share torch's threads of this process. They call ``prepare`` first, and what they would
    print goes to ``log``: progress bars of several would overwrite each other. Functions and
    arguments cross by pickle, within this machine. The processes start at once, so that their
    imports overlap with what this process does next. When the block raises, tasks that have not
    begun are dropped.
    """
    if jobs == 1:
        yield _ThisProcess()
        return
    threads = max(torch.get_num_threads() // jobs, 1)
    # Not fork: neither an accelerator nor threads survive it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _start, (threads, str(log), prepare))
    for _ in range(jobs):
        pool.submit(int)  # a process starts when there is something to do
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _start(threads: int, log: str, prepare: Callable[[], object]) -> None:
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(threads)
    prepare()
