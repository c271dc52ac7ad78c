"""Runs a function on several gloo ranks. Light on imports: every rank imports this file anew."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from segkernels.advantages import whiten
from segkernels.normalizer import RunningLocationNormalizer


def on_ranks(function, n_ranks, folder, *args):
    """What function(rank, *args), defined in this file, gives on each rank."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(_on_rank, (function, n_ranks, port, str(folder), args), nprocs=n_ranks)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(n_ranks)]


def _on_rank(rank, function, n_ranks, port, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=n_ranks
    )
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def whitened(rank, parts, backends):
    x, mask = parts[rank]
    return [whiten(x, mask, backend=backend) for backend in backends]


def running_states(rank, batches, decay):
    """The state after each (rewards, ends, mask) of this rank, and the all-reduces it took."""
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    running = RunningLocationNormalizer(decay=decay)
    states = []
    for batch in batches[rank]:
        running.update(*batch)
        running.all_reduce()
        running.refit()
        states.append(running.state_dict())
    return states, len(calls)
