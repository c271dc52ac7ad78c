"""Commands under torchrun that are stopped by signals, as people and schedulers send them."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from segrlhf.runtime.interrupt import SIGNALS

# torchrun does not tell its workers' exit statuses when it was signalled itself.
WORKER = """
import os, sys
from pathlib import Path
from segrlhf.cli import main

status = main(sys.argv[2:])
Path(sys.argv[1], "status-" + os.environ["RANK"]).write_text(str(status))
sys.exit(status)
"""


def stop_under_torchrun(words, env, directory, ready, kind):
    """Runs ``-m segrlhf.cli`` with ``words[2:]`` on two processes and, when the path ``ready``
    exists, sends ``kind`` to launcher and workers together, twice.

    Returns what was said on stderr, after both workers ended with the signal's exit status.
    """
    worker = directory / "worker.py"
    worker.write_text(WORKER)

    def not_ignored():  # as in a terminal, though the tests may run in the background
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         worker, directory, *words[2:]],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=not_ignored,
    ) as launcher:  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while not ready.exists():
                assert launcher.poll() is None, launcher.stderr.read()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as handle:
                workers = [int(pid) for pid in handle.read().split()]
            assert len(workers) == 2
            for _ in range(2):
                for pid in (launcher.pid, *workers):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, kind)
                time.sleep(0.1)
            _, said = launcher.communicate(timeout=120)
        finally:
            launcher.kill()
    statuses = {p.name: int(p.read_text()) for p in directory.glob("status-*")}
    assert statuses == {f"status-{rank}": 128 + kind for rank in range(2)}, said[-3000:]
    return said
