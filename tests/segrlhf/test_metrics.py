"""Metrics add up exactly over micro-batches and processes, and do not wait for the device."""

import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from segrlhf.runtime.distributed import any_rank
from segrlhf.runtime.metrics import Metrics

VALUES = [
    torch.tensor([1.0, 5.0]),
    torch.tensor([3.0]),
    torch.tensor([]),
    torch.tensor([-2.0, 9.0]),
]


def collect(parts):
    metrics = Metrics()
    for x in parts:
        metrics.mean("mean", x.sum(), len(x))
        metrics.means({"share": ((x > 2).sum(), torch.tensor(len(x)))})
        bounded = (
            torch.cat([x, torch.tensor([-math.inf])]),
            torch.cat([x, torch.tensor([math.inf])]),
        )
        metrics.maximum("max", bounded[0].max())
        metrics.minimum("min", bounded[1].min())
    return metrics


EXPECTED = {"mean": 16 / 5, "share": 3 / 5, "max": 9.0, "min": -2.0}


def test_parts_of_any_size_add_up():
    accelerator = Accelerator(cpu=True)
    metrics = collect(VALUES)
    assert metrics.reduce(accelerator) == EXPECTED
    assert metrics.reduce(accelerator) == {}  # starts anew
    metrics.mean("none", torch.tensor(0.0), 0)
    assert math.isnan(metrics.reduce(accelerator)["none"])


def _rank(rank, port, out):
    os.environ |= {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = collect(VALUES[:2] if rank == 0 else VALUES[2:]).reduce(accelerator)
    flags = [any_rank(accelerator, rank == 1), any_rank(accelerator, torch.tensor(False))]
    torch.save((found, flags), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_processes_add_up(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path / "out")), nprocs=2)
    for rank in range(2):
        assert torch.load(f"{tmp_path / 'out'}.{rank}") == (EXPECTED, [True, False])


class _Waits(TorchDispatchMode):
    """Fails where the host would wait for a GPU, or copy a number to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "lift_fresh")
        return function(*args, **(kwargs or {}))


def test_collecting_does_not_wait_for_the_device():
    metrics, x = Metrics(), torch.ones(3)
    with _Waits():
        for _ in range(2):
            metrics.mean("mean", x.sum(), 3)
            metrics.mean("other", x.sum(), (x > 0).sum())
            metrics.maximum("max", x.max())
            metrics.minimum("min", x.min())
    with pytest.raises(AssertionError), _Waits():
        float(x.sum())
