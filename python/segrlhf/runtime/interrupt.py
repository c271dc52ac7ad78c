"""SIGINT, SIGTERM and SIGHUP become a request that a training loop meets between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Interrupted
from .checkpoints import last_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Launchers repeat a signal to their workers, shells send it to every process of a job, and people
# press twice: within this time it is the same request.
REPEAT_SECONDS = 5.0


@dataclass
class _Request:
    signum: int = 0  # 0: nobody asked
    at: float = 0.0  # time.monotonic() of the first signal


class Interrupt:
    """While its block runs, a signal asks for an end instead of bringing it about.

    The loop inside looks at ``requested`` after every step, saves a checkpoint and raises
    ``stopped(...)``. A request that the loop has no more occasion to meet, because the last step
    was under way, is raised when the outermost block ends: what was to be saved then has been.
    Signals that come within ``REPEAT_SECONDS`` of the first are the same request; one that comes
    later raises ``Interrupted`` where the program stands, naming the newest checkpoint in
    ``output_dir``. Without ``output_dir`` nothing is worth waiting for, and the first signal does
    that: temporary files are removed, and the exit status tells of the signal, whichever it was.
    A block with an ``output_dir`` may stand within one without.

    Signals that were ignored when the block began (``nohup``, background jobs of scripts) stay so.
    Other threads than the main one cannot handle signals; there, the block changes nothing.
    """

    _innermost: ClassVar[Interrupt | None] = None

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self._output_dir = output_dir
        self._before: dict[int, Any] = {}
        self._request = _Request()

    def __enter__(self) -> Interrupt:
        self._outer = Interrupt._innermost
        Interrupt._innermost = self
        if self._outer is not None:
            # Blocks within blocks share a request, so that all know a repeated signal as such.
            self._request = self._outer._request
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                # None is a handler that was not installed from Python.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        Interrupt._innermost = self._outer
        waiting = self._outer is not None and self._outer._output_dir is not None
        if kind is None and self._request.signum and not waiting:
            raise self.stopped("the last step was under way: it was finished, and all was saved")

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to end; all must call this, and get the same answer."""
        if accelerator.num_processes > 1:
            import torch  # `segrlhf --help` imports this module, and needs no torch

            mine = torch.tensor([self._request.signum], device=accelerator.device)
            self._request.signum = int(accelerator.gather(mine).max())
        if self._request.signum and self._request.at == 0.0:
            self._request.at = time.monotonic()  # another process was asked; ours may be yet
        return self._request.signum != 0

    def stopped(self, message: str) -> Interrupted:
        """The exception to raise when the request was met; ``message`` says what was saved."""
        return Interrupted(message, self._request.signum)

    def _handle(self, signum: int, _: object) -> None:
        if os.getpid() != self._pid:
            _in_child(signum)
            return
        request, now = self._request, time.monotonic()
        if request.at == 0.0:
            request.signum, request.at = signum, now
            if self._output_dir is None:
                raise Interrupted("stopped at once", signum)
            _say(
                f"{signal.Signals(signum).name}: finishing this step and saving a checkpoint "
                f"(again after {REPEAT_SECONDS:.0f} seconds: stop at once, without one)"
            )
        elif now - request.at >= REPEAT_SECONDS:
            last = self._output_dir and last_checkpoint(self._output_dir)
            raise Interrupted(
                f"stopped at once, without a new checkpoint; newest complete one: {last or 'none'}",
                signum,
            )


def _in_child(signum: int) -> None:
    """What a worker that was forked in the block does: Ctrl-C reaches it too, but its parent still
    needs it for the step under way, and ends it by SIGTERM."""
    if signum != signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _say(text: str) -> None:
    """To stderr, once a launch. Not by print: the signal may have come inside of one."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
