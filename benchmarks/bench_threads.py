"""What alternating torch's threads and ours costs: ``python benchmarks/bench_threads.py``.

A training step calls torch ops and kernels in turn, and each side has a thread pool of its own. For
every pair the loop of one after the other is timed beside the loops of each alone, interleaved. A
ratio of 1 is no cost; more is what the pools take from each other.
"""

import argparse
import statistics
import time

import torch

import segkernels as sk


def loops(rows, vocab):
    """Torch ops and kernels of comparable length, as functions of nothing."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=g)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    left, right = torch.randn(2, 256, 256, generator=g)
    wide = torch.randn(rows * vocab // 4, generator=g)
    entropy, rewards, values = torch.randn(3, 64, 1024, generator=g)
    mask = torch.ones(64, 1024, dtype=torch.bool)
    torch_ops = {"matmul": lambda: left @ right, "relu": lambda: wide.relu()}
    ours = {
        "entropy_from_logits": lambda: sk.entropy_from_logits(logits),
        "logprobs_and_entropy": lambda: sk.logprobs_and_entropy(logits, targets),
        "segment_ends": lambda: sk.segment_ends(entropy, mask, 1.0),
        "gae": lambda: sk.gae(rewards, values, mask),
    }
    return torch_ops, ours


def seconds(calls, *functions):
    begin = time.perf_counter()
    for _ in range(calls):
        for function in functions:
            function()
    return (time.perf_counter() - begin) / calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_064)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch_ops, ours = loops(options.rows, options.vocab)
    print(f"{torch.get_num_threads()} threads, microseconds a call, medians")
    print(f"{'torch':8} {'segkernels':22} {'alone':>8} {'alone':>8} {'both':>8} {'ratio':>6}")
    for torch_name, a in torch_ops.items():
        for name, b in ours.items():
            seconds(options.calls, a, b)
            rounds = [
                (seconds(options.calls, a), seconds(options.calls, b), seconds(options.calls, a, b))
                for _ in range(options.rounds)
            ]
            alone_a, alone_b, both = (1e6 * statistics.median(t) for t in zip(*rounds, strict=True))
            ratio = statistics.median(both / (a + b) for a, b, both in rounds)
            print(
                f"{torch_name:8} {name:22} {alone_a:8.0f} {alone_b:8.0f} {both:8.0f} {ratio:6.2f}"
            )


if __name__ == "__main__":
    main()
