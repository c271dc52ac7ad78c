"""Ctrl-C and SIGTERM become requests that a training loop meets between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that an update ends before the save."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self.before[kind] = signal.signal(kind, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once, without a new checkpoint")
        self.asked = True
        tqdm.write("interrupted: finishing this update and saving (again: stop at once)")


@contextmanager
def ctrl_c(trainer: Any) -> Iterator[None]:
    def request(signum: int, frame: Any) -> None:
        # A launcher repeats the signal to its processes, so only a lone process takes two as "now".
        if trainer.stop_requested and trainer.args.world_size == 1:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        if trainer.is_world_process_zero():
            print("\nCtrl-C: finishing this step and saving a checkpoint", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
