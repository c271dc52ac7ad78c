"""Kernels beside other threads of Python, numbers of threads that change, and fork."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import segkernels as sk
from segkernels import native

ROWS, LENGTH = 64, 4096  # enough tokens for the pool to be used


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Sequence:
    """The sequence ops on one batch."""

    def __init__(self, seed=0, rows=ROWS, length=LENGTH):
        g = generator(seed)
        self.x = torch.randn(rows, length, generator=g)
        self.mask = torch.rand(rows, length, generator=g) < 0.9

    def __call__(self):
        x = self.x.detach().requires_grad_()
        ends = sk.segment_ends(self.x, self.mask, 0.5, backend="native")
        loss = sk.segment_bradley_terry(x, ends, self.mask, backend="native").loss
        loss = loss + sk.policy_loss(x, -self.x, self.x, self.mask, backend="native").loss
        given = self.x, ends, self.x, 0.5 * self.x, self.x, self.mask
        advantages = sk.segment_advantages(*given, backend="native")
        streams = self.x, self.x, self.x, 0.5 * self.x, self.x, self.mask
        at_once = sk.segment_ends_and_advantages(*streams, 0.5, backend="native")
        white = sk.whiten(self.x, self.mask, backend="native")
        return [ends, loss.detach(), *advantages, *at_once, white, *torch.autograd.grad(loss, x)]


class Vocabulary:
    """The vocabulary ops on one batch."""

    def __init__(self, seed=0, rows=96, vocab=4001):
        g = generator(seed)
        self.logits = torch.randn(rows, vocab, generator=g)
        self.targets = torch.randint(0, vocab, (rows,), generator=g)

    def __call__(self):
        logits = self.logits.detach().requires_grad_()
        outs = sk.logprobs_and_entropy(logits, self.targets, backend="native")
        return [
            *(o.detach() for o in outs),
            *torch.autograd.grad(sum(o.sum() for o in outs), logits),
        ]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("work", [Sequence, Vocabulary])
def test_results_do_not_depend_on_a_number_of_threads_that_changes(work, two_threads):
    op = work()
    expected = op()
    for threads in (1, 3, 2, 5, 1, 4):
        torch.set_num_threads(threads)
        assert same(op(), expected), threads


def test_python_threads_share_the_pool(two_threads):
    """Forward and backward of different ops at once; each thread has a count of its own too."""
    ops = [kind(seed) for seed in range(3) for kind in (Sequence, Vocabulary)]
    expected = [op() for op in ops]

    def repeat(i):
        torch.set_num_threads(1 + i % 3)
        return all(same(ops[i](), expected[i]) for _ in range(4))

    with ThreadPoolExecutor(len(ops)) as pool:
        assert all(pool.map(repeat, range(len(ops))))


CALLS = {
    "segments": lambda s: sk.segment_ends(s.x, s.mask, 0.5, backend="native"),
    "advantages": lambda s: sk.gae(s.x, s.x, s.mask, backend="native"),
    "vocab": lambda s: sk.entropy_from_logits(s.x, backend="native"),
}


@pytest.mark.parametrize("room", CALLS)
def test_the_gil_is_released(room):
    """Another thread of Python gets to write down the time while a kernel runs."""
    batch = Sequence(rows=256, length=16384)
    times, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            times.append(time.perf_counter())
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(40):
            begin = time.perf_counter()
            CALLS[room](batch)
            end = time.perf_counter()
            # Calls reach and leave the kernel with the GIL; the middle half is the kernel's.
            quarter = (end - begin) / 4
            if any(begin + quarter < t < end - quarter for t in times):
                return
            times.clear()
    finally:
        stop.set()
        watcher.join()
    pytest.fail("no other thread ran during 40 calls")


TASKS = "/proc/self/task"


@pytest.mark.skipif(not os.path.isdir(TASKS), reason="threads are counted in /proc")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_the_pool_is_at_work():
    """The child gets helpers of its own instead of waiting for those that it does not have.

    It calls the extension itself: torch's pool does not survive a fork.
    """
    batch = Sequence()
    out, expected = torch.empty(2, ROWS, LENGTH), torch.empty(2, ROWS, LENGTH)

    def run(into):
        native.extension.gae_fwd(
            rewards=native.floats(batch.x),
            values=native.floats(batch.x),
            mask=native.ptr(batch.mask),
            rows=(ROWS, LENGTH, 0),
            gamma=0.99,
            lam=0.95,
            advantages=native.ptr(into[0]),
            returns=native.ptr(into[1]),
            executor=(3, -1),
        )

    run(expected)
    stop = threading.Event()

    def keep_busy():
        other = torch.empty_like(out)
        while not stop.is_set():
            run(other)

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        statuses = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                run(out)
                right = out.numpy().tobytes() == expected.numpy().tobytes()
                os._exit(len(os.listdir(TASKS)) if right else 100)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stop.set()
        for thread in busy:
            thread.join()
    assert statuses == [3] * 5
