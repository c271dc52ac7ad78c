"""Time against tokens, vocabulary and cores: the points of the plots in docs/benchmarks.md."""

from __future__ import annotations

import pytest
import shapes
import torch
from bench_linear import linear
from bench_sequence import boundaries_to_advantages
from bench_token_stats import entropy, logprobs_and_entropy
from cases import OURS, Case, Contender
from timing import on_threads


def by_threads(case: Case, axis: str, x: int) -> Case:
    """Ours alone, on one core and on all of them."""
    forward = case.named(OURS).forward
    assert callable(forward)
    case.contenders = [
        Contender(
            f"{OURS}, {count} thread{'s' * (count > 1)}",
            on_threads(count, forward),
            "ours",
            threads=count,
        )
        for count in sorted({1, torch.get_num_threads()})
    ]
    case.yardstick = None
    case.axis, case.x = axis, x
    return case


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 4096])
def test_entropy_tokens(side_by_side, tokens):
    side_by_side(by_threads(entropy(tokens, 32_064, torch.float32), "tokens", tokens))


@pytest.mark.parametrize("vocab", [8_000, 32_000, 64_000, 128_000])
def test_entropy_vocabulary(side_by_side, vocab):
    side_by_side(by_threads(entropy(1024, vocab, torch.float32), "vocabulary", vocab))


@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048])
def test_backward_tokens(side_by_side, tokens):
    case = logprobs_and_entropy(tokens, 32_064, torch.float32, backward=True)
    side_by_side(by_threads(case, "tokens", tokens))


@pytest.mark.parametrize("tokens", [64, 128, 256, 512])
def test_linear_tokens(side_by_side, tokens):
    side_by_side(by_threads(linear(tokens, 1024, 32_000, torch.float32), "tokens", tokens))


@pytest.mark.parametrize("vocab", [8_000, 16_000, 32_000, 64_000])
def test_linear_vocabulary(side_by_side, vocab):
    side_by_side(by_threads(linear(256, 1024, vocab, torch.float32), "vocabulary", vocab))


@pytest.mark.parametrize("rows", [64, 256, 512, 1024])
def test_advantages_tokens(side_by_side, rows):
    stream = shapes.stream([1024] * rows, "cpu")
    case = boundaries_to_advantages("uniform", stream)
    side_by_side(by_threads(case, "tokens", stream.count))
