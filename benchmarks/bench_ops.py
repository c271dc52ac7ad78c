"""Native kernels beside their PyTorch definitions: ``make bench``.

A kernel is compared with its definition first; one that differs fails and prints no time.
"""

import pytest
import torch

import segkernels as sk

BACKENDS = ("reference", "native")


def both_agree(op):
    """Runs ``op(backend)`` on both backends and compares every float that comes out."""
    outs = [op(backend) for backend in BACKENDS]
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in outs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture
def stream():
    """64 responses of up to 1,024 tokens; about one token in eight ends a segment."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 1025, (64, 1), generator=g)
    mask = torch.arange(1024) < lengths
    entropy, rewards, logprobs, ref_logprobs, values = torch.randn(5, 64, 1024, generator=g)
    return entropy, rewards, logprobs, ref_logprobs, values, mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_boundaries_to_advantages(benchmark, stream, backend):
    entropy, rewards, logprobs, ref_logprobs, values, mask = stream
    normalizer = sk.LocationNormalizer(0.7668, 0.4705, 0.2569, 2.8339)

    def op(backend):
        ends = sk.segment_ends(entropy, mask, 1.15, backend=backend)
        return sk.segment_advantages(
            *(rewards, ends, logprobs, ref_logprobs, values, mask),
            normalizer=normalizer,
            backend=backend,
        )

    both_agree(op)
    benchmark(op, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropy(benchmark, dtype, backend):
    logits = 3 * torch.randn(512, 32_000, generator=torch.Generator().manual_seed(0))
    logits = logits.to(dtype)

    def op(backend):
        return sk.entropy_from_logits(logits, backend=backend)

    both_agree(op)
    benchmark(op, backend)
