"""Runs a function on several gloo ranks. Light on imports: every rank imports this file anew."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from segkernels import (
    RunningLocationNormalizer,
    vocab_parallel_logprobs_and_entropy,
    whiten,
)


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


def vocab_parallel(rank, cases):
    """(logprobs, entropy, dlogits, shapes that were gathered) of each case with this rank in it."""
    gathered = []
    all_gather = dist.all_gather
    dist.all_gather = lambda out, x, **kwargs: (
        gathered.append(x.shape),
        all_gather(out, x, **kwargs),
    )[1]
    results = []
    for ranks, shards, arguments, upstream in cases:
        group = dist.new_group(ranks) if ranks else None
        if ranks and rank not in ranks:
            continue
        mine = dist.get_rank(group)
        logits = shards[mine].requires_grad_()
        start = sum(shard.shape[-1] for shard in shards[:mine])
        gathered.clear()
        outputs = vocab_parallel_logprobs_and_entropy(
            logits, vocab_start=start, group=group, **arguments
        )
        (dlogits,) = torch.autograd.grad(outputs, logits, upstream)
        results.append((*(x.detach() for x in outputs), dlogits, [tuple(s) for s in gathered]))
    return results
