"""A process for each job, so that one that crashes or hangs costs that job alone.

The parent sends a request as a line of JSON and gets the result in a file. Processes are started
one ahead: the next one imports torch while the last one measures.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MARK = "== next: "  # what a worker prints before it runs something that may take it down


class Failed(RuntimeError):
    """A command or job that did not pass. ``at`` is what it said to run last."""

    def __init__(self, reason: str, at: str = ""):
        super().__init__(reason)
        self.at = at


def execute(
    command: Sequence[str], seconds: float, log: IO[str], cwd: Path, **environment: str
) -> None:
    """Runs a command, its output in the log; after ``seconds`` ends it and its children."""
    print("$", *(f"{k}={v}" for k, v in environment.items()), *command, file=log, flush=True)
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    _wait(process, seconds)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        status = process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        # pytest sums up what ran when it is interrupted.
        for sent, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
        raise Failed(f"did not end within {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left running
    if status < 0:
        raise Failed(f"ended by {signal.Signals(-status).name}")
    if status:
        raise Failed(f"exit status {status}")


@dataclass
class Worker:
    process: subprocess.Popen
    log: Path
    start: int  # where its output begins in the log


class Workers:
    """Runs jobs by ``command``, each in a process of its own."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str):
        self.command, self.log = list(command), log
        self.environment = os.environ | environment
        self.spare: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                text=True,
            )

    def run(self, request: Mapping[str, Any], seconds: float, ahead: bool = True) -> dict[str, Any]:
        """The result of a job; ``ahead`` starts the process of the next one too."""
        process, self.spare = self.spare or self._start(), None
        begin = self.log.stat().st_size
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            with contextlib.suppress(BrokenPipeError):  # it is dead: its status says how
                assert process.stdin is not None
                process.stdin.write(json.dumps({**request, "result": str(result)}) + "\n")
                process.stdin.close()
            if ahead:
                self.spare = self._start()
            try:
                _wait(process, seconds)
            except Failed as error:
                raise self._explained(error, begin) from None
            if not result.exists():
                raise self._explained(Failed("ended without a result"), begin)
            return json.loads(result.read_text())

    def _explained(self, error: Failed, begin: int) -> Failed:
        """With what the worker said last: an error's last line, and what it was about to run."""
        with self.log.open(errors="replace") as log:
            log.seek(begin)
            lines = [line.strip() for line in log if line.strip()]
        at = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        reason = str(error)
        if reason.startswith("exit status") and lines and not lines[-1].startswith(MARK):
            reason += f": {lines[-1][:200]}"
        return Failed(reason, at[-1] if at else "")

    def close(self) -> None:
        if self.spare is not None:
            os.killpg(self.spare.pid, signal.SIGKILL)
            self.spare.wait()
            assert self.spare.stdin is not None
            self.spare.stdin.close()
            self.spare = None


def announce(name: str) -> None:
    print(f"{MARK}{name}", flush=True)


def serve(jobs: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]) -> None:
    """The worker's side: waits for one request, runs its job, writes the result."""
    faulthandler.enable()
    line = sys.stdin.readline()
    if not line:
        return
    request = json.loads(line)
    begin = time.monotonic()
    result = jobs[request["job"]](request)
    path = Path(request["result"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)
    print(f"{request['job']}: {time.monotonic() - begin:.1f} s", flush=True)
