"""Tasks in processes of their own."""

import functools
import os
import time
from contextlib import suppress

import pytest
import torch

from segrlhf.runtime.workers import workers


def test_one_job_runs_in_this_process(tmp_path):
    with workers(1, tmp_path / "log.txt", int) as executor:
        assert executor.submit(os.getpid).result() == os.getpid()
        with pytest.raises(ValueError, match="invalid literal"):
            executor.submit(int, "x")


def test_workers_keep_a_log_pass_errors_on_and_drop_what_has_not_begun(tmp_path, capfd):
    log = tmp_path / "log.txt"
    with suppress(KeyError), workers(2, log, functools.partial(print, "ready")) as executor:
        assert executor.submit(os.getpid).result() != os.getpid()
        threads = executor.submit(torch.get_num_threads).result()
        assert threads == max(torch.get_num_threads() // 2, 1)
        executor.submit(print, "said").result()
        with pytest.raises(ValueError, match="invalid literal"):
            executor.submit(int, "x").result()
        tasks = [executor.submit(time.sleep, 0.05) for _ in range(20)]
        raise KeyError
    assert tasks[-1].cancelled()
    assert {"ready", "said"} <= set(log.read_text().split())
    assert capfd.readouterr().out == ""
