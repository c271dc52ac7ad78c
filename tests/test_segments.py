import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases

from segkernels import segment_ends, segment_offsets
from segkernels.backend import BackendError
from segkernels.native.segments import segment_ends_fwd
from segkernels.segments import _segment_offsets

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
THRESHOLD = 1.0
NAN = float("nan")

backends = pytest.mark.parametrize("backend", BACKENDS)
alignments = pytest.mark.parametrize("entropy_of", ["next", "current"])
case_names = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def naive_ends(entropy, mask, lengths, threshold, entropy_of, exclude_last):
    """Ends token by token; lists in, list out."""
    ends = [False] * len(mask)
    start = 0
    for row, length in enumerate(lengths):
        action = [t for t in range(start, start + length) if mask[t]]
        m = len(action)
        start += length
        if m == 0:
            continue
        if m == 1:
            ends[action[0]] = True
            continue
        final = m - 2 if exclude_last[row] else m - 1
        for i in range(final):
            boundary = action[i] if entropy_of == "next" else action[i + 1]
            ends[action[i]] = entropy[boundary] > threshold
        ends[action[final]] = True
    return ends


def draw_entropy(case: Case, dtype=torch.float32, seed=0):
    """Multiples of a quarter nat, so that many tie with the threshold; NaN outside the mask."""
    g = torch.Generator().manual_seed(seed)
    entropy = torch.randint(0, 9, (case.n_tokens,), generator=g).to(dtype) / 4
    return entropy.masked_fill(~case.mask, NAN)


def naive_for(case, entropy, entropy_of="next", exclude_last=None, threshold=THRESHOLD):
    if exclude_last is None:
        exclude_last = [True] * len(case.lengths)
    ends = naive_ends(
        entropy.tolist(), case.mask.tolist(), case.lengths, threshold, entropy_of, exclude_last
    )
    return torch.tensor(ends, dtype=torch.bool)


H = [0.2, 3.0, 0.5, 2.0, 2.5]
HOLES = [True, True, False, True, True]


@backends
@pytest.mark.parametrize(
    ("mask", "entropy_of", "exclude_last", "expected"),
    [
        ([True] * 5, "next", True, [0, 1, 0, 1, 0]),
        ([True] * 5, "next", False, [0, 1, 0, 0, 1]),
        ([True] * 5, "current", True, [1, 0, 0, 1, 0]),
        ([True] * 5, "current", False, [1, 0, 0, 1, 1]),
        (HOLES, "next", False, [0, 1, 0, 0, 1]),
        (HOLES, "current", False, [1, 0, 0, 1, 1]),
        (HOLES, "current", True, [1, 0, 0, 1, 0]),
        ([False, True, False, True, False], "next", True, [0, 1, 0, 0, 0]),
        ([False, False, True, False, False], "next", True, [0, 0, 1, 0, 0]),
        ([False, False, True, False, False], "current", False, [0, 0, 1, 0, 0]),
        ([False] * 5, "next", True, [0] * 5),
    ],
)
def test_by_hand(mask, entropy_of, exclude_last, expected, backend):
    ends = segment_ends(
        torch.tensor([H]),
        torch.tensor([mask]),
        2.0,
        entropy_of=entropy_of,
        exclude_last=exclude_last,
        backend=backend,
    )
    assert ends.dtype == torch.bool
    assert ends.int().tolist() == [expected]


@backends
@case_names
@alignments
@pytest.mark.parametrize("exclude_last", [True, False])
def test_named_layouts(case, entropy_of, exclude_last, backend):
    entropy = draw_entropy(case)
    expected = naive_for(case, entropy, entropy_of, [exclude_last] * len(case.lengths))
    options = {"entropy_of": entropy_of, "exclude_last": exclude_last, "backend": backend}
    packed = segment_ends(entropy, case.mask, THRESHOLD, cu_seqlens=case.cu_seqlens, **options)
    assert torch.equal(packed, expected)
    grid_mask = case.grid(case.mask, False)
    padded = segment_ends(case.grid(entropy, NAN), grid_mask, THRESHOLD, **options)
    assert torch.equal(padded, case.grid(expected, False))


@given(cases(), st.sampled_from(["next", "current"]), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_random_layouts(case, entropy_of, seed):
    g = torch.Generator().manual_seed(seed)
    exclude_last = torch.rand(len(case.lengths), generator=g) < 0.5
    entropy = draw_entropy(case, seed=seed)
    expected = naive_for(case, entropy, entropy_of, exclude_last.tolist())
    for backend in BACKENDS:
        ends = segment_ends(
            entropy,
            case.mask,
            THRESHOLD,
            cu_seqlens=case.cu_seqlens,
            entropy_of=entropy_of,
            exclude_last=exclude_last,
            backend=backend,
        )
        assert torch.equal(ends, expected)


SERVED = [(b, d) for b in BACKENDS for d in STORAGE] + [("reference", torch.float64)]


@pytest.mark.parametrize(("backend", "dtype"), SERVED, ids=str)
def test_storage_types(backend, dtype):
    case = CASES["holes"]
    entropy = draw_entropy(case, dtype)
    ends = segment_ends(entropy, case.mask, THRESHOLD, cu_seqlens=case.cu_seqlens, backend=backend)
    assert torch.equal(ends, naive_for(case, entropy))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), ("native", torch.float32), ("reference", torch.float64)],
)
def test_threshold_is_compared_in_fp32(backend, dtype):
    entropy = torch.full((1, 4), 1.7, dtype=torch.float32).to(dtype)
    mask = torch.ones(1, 4, dtype=torch.bool)
    ends = segment_ends(entropy, mask, 1.7, backend=backend)
    assert ends.tolist() == [[False, False, True, False]]


@backends
@pytest.mark.parametrize("infinite", [float("inf"), 1e39])
def test_infinite_thresholds(infinite, backend):
    case = CASES["holes"]
    entropy = draw_entropy(case)
    where = {"cu_seqlens": case.cu_seqlens, "backend": backend, "exclude_last": False}
    tokens = segment_ends(entropy, case.mask, -infinite, **where)
    assert torch.equal(tokens, case.mask)
    bandit = segment_ends(entropy, case.mask, infinite, **where)
    for ends, mask in zip(bandit.split(case.lengths), case.mask.split(case.lengths), strict=True):
        assert ends.nonzero().tolist() == mask.nonzero()[-1:].tolist()


@backends
@alignments
def test_infinite_entropy_is_a_number(entropy_of, backend):
    entropy = torch.tensor([[float("inf"), 0.0, float("inf"), 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    ends = segment_ends(entropy, mask, 1.0, entropy_of=entropy_of, backend=backend)
    expected = [[1, 0, 1, 0]] if entropy_of == "next" else [[0, 1, 1, 0]]
    assert ends.int().tolist() == expected


@backends
def test_exclude_last_row_by_row(backend):
    entropy = torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    ends = segment_ends(
        entropy, mask, 1.0, exclude_last=torch.tensor([True, False, True]), backend=backend
    )
    assert ends.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


@backends
@alignments
def test_rows_are_independent(entropy_of, backend):
    case = CASES["holes"]
    entropy, mask = case.grid(draw_entropy(case), NAN), case.grid(case.mask, False)
    options = {"entropy_of": entropy_of, "backend": backend}
    ends = segment_ends(entropy, mask, THRESHOLD, **options)
    order = torch.randperm(len(entropy), generator=torch.Generator().manual_seed(1))
    permuted = segment_ends(entropy[order], mask[order], THRESHOLD, **options)
    assert torch.equal(permuted, ends[order])
    for row in range(len(entropy)):
        alone = segment_ends(entropy[row : row + 1], mask[row : row + 1], THRESHOLD, **options)
        assert torch.equal(alone[0], ends[row])


@backends
def test_strided_inputs(backend):
    case = CASES["holes"]
    entropy, mask = case.grid(draw_entropy(case), NAN), case.grid(case.mask, False)
    expected = segment_ends(entropy, mask, THRESHOLD, backend=backend)
    wide = torch.full((len(entropy), entropy.shape[1] * 2), NAN)
    wide[:, ::2] = entropy
    ends = segment_ends(wide[:, ::2], mask.t().contiguous().t(), THRESHOLD, backend=backend)
    assert torch.equal(ends, expected)


@backends
def test_no_gradient(backend):
    entropy = torch.rand(2, 5, requires_grad=True)
    ends = segment_ends(entropy, torch.ones(2, 5, dtype=torch.bool), 0.5, backend=backend)
    assert not ends.requires_grad


@backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing(shape, backend):
    ends = segment_ends(
        torch.empty(shape), torch.empty(shape, dtype=torch.bool), 1.0, backend=backend
    )
    assert ends.shape == shape


def test_threads_do_not_matter(two_threads):
    case = CASES["giant"]
    entropy, mask = case.grid(draw_entropy(case), NAN), case.grid(case.mask, False)
    many = segment_ends(entropy, mask, THRESHOLD, backend="native")
    torch.set_num_threads(1)
    assert torch.equal(many, segment_ends(entropy, mask, THRESHOLD, backend="native"))


@backends
@alignments
def test_nan_names_the_first_row_and_position(entropy_of, backend):
    entropy = torch.zeros(3, 4)
    entropy[1, 2] = entropy[2, 1] = NAN
    mask = torch.ones(3, 4, dtype=torch.bool)
    options = {"entropy_of": entropy_of, "backend": backend}
    with pytest.raises(ValueError, match=r"entropy: .* got NaN at row 1, position 2; look for NaN"):
        segment_ends(entropy, mask, 1.0, **options)
    cu = torch.tensor([0, 0, 5, 12]).int()
    with pytest.raises(ValueError, match="got NaN at row 2, position 1"):
        segment_ends(entropy.reshape(-1), mask.reshape(-1), 1.0, cu_seqlens=cu, **options)


@backends
def test_nan_before_the_first_action_token_decides_nothing(backend):
    entropy = torch.tensor([[NAN, NAN, 3.0, 0.0], [NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[False, True, True, True], [False, False, False, True]])
    ends = segment_ends(entropy, mask, 1.0, entropy_of="current", backend=backend)
    assert ends.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="got NaN at row 0, position 1"):
        segment_ends(entropy, mask, 1.0, entropy_of="next", backend=backend)


ENTROPY = torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)


@backends
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"threshold": NAN}, ValueError, "threshold: expected nats or .*got NaN"),
        ({"entropy": torch.zeros(6)}, ValueError, r"entropy: expected shape \[rows, tokens\]"),
        ({"entropy": ENTROPY.long()}, TypeError, r"entropy: expected float32.*entropy.float\(\)"),
        ({"exclude_last": MASK[:, 0].to("meta")}, ValueError, "exclude_last: expected device cpu"),
        ({"mask": MASK.float()}, TypeError, r"mask: expected bool, got torch.float32; pass mask"),
        ({"mask": MASK[:, :2]}, ValueError, r"mask: expected shape \[2, 3\] like entropy, got \["),
        ({"entropy_of": "last"}, ValueError, "entropy_of: expected 'next' or 'current', got 'last"),
        ({"exclude_last": torch.ones(2)}, TypeError, "exclude_last: expected bool, got torch.floa"),
        ({"exclude_last": MASK[0]}, ValueError, r"exclude_last: expected shape \[2\], .* got \[3"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"entropy: expected shape \[tokens\]"),
    ],
)
def test_bad_arguments(changed, error, message, backend):
    arguments = {"entropy": ENTROPY, "mask": MASK, "threshold": 1.0, "backend": backend} | changed
    with pytest.raises(error, match=message):
        segment_ends(**arguments)


@alignments
def test_operator_is_registered_soundly(entropy_of):
    case = CASES["response"]
    entropy = draw_entropy(case)
    exclude = torch.ones(len(case.lengths), dtype=torch.bool)
    current = entropy_of == "current"
    packed = (entropy, case.mask, case.cu_seqlens, 1.0, current, exclude, True)
    grid = (case.grid(entropy, NAN), case.grid(case.mask, False), None, 1.0, current, None, False)
    torch.library.opcheck(segment_ends_fwd, packed)
    torch.library.opcheck(segment_ends_fwd, grid)


def test_compiles():
    case = CASES["holes"]
    entropy = draw_entropy(case)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def ends_of(entropy, mask, cu):
        return segment_ends(entropy, mask, THRESHOLD, cu_seqlens=cu, exclude_last=False)

    ends = ends_of(entropy, case.mask, case.cu_seqlens)
    assert torch.equal(ends, naive_for(case, entropy, exclude_last=[False] * len(case.lengths)))
    ends = ends_of(case.grid(entropy, NAN), case.grid(case.mask, False), None)
    assert torch.equal(
        case.flat(ends), naive_for(case, entropy, exclude_last=[False] * len(case.lengths))
    )
    with pytest.raises(ValueError, match="cu_seqlens: expected to run from 0 to"):
        ends_of(entropy, case.mask, case.cu_seqlens - 1)


def naive_offsets(ends, mask, lengths):
    seg_offsets, row_offsets, start = [0], [0], 0
    for length in lengths:
        open_tokens = 0
        for t in range(start, start + length):
            open_tokens += mask[t]
            if ends[t]:
                seg_offsets.append(seg_offsets[-1] + open_tokens)
                open_tokens = 0
        row_offsets.append(len(seg_offsets) - 1)
        start += length
    return seg_offsets, row_offsets


@case_names
@pytest.mark.parametrize("exclude_last", [True, False])
def test_offsets(case, exclude_last):
    ends = segment_ends(
        draw_entropy(case),
        case.mask,
        THRESHOLD,
        cu_seqlens=case.cu_seqlens,
        exclude_last=exclude_last,
    )
    expected = naive_offsets(ends.tolist(), case.mask.tolist(), case.lengths)
    packed = segment_offsets(ends, case.mask, cu_seqlens=case.cu_seqlens)
    assert [x.tolist() for x in packed] == list(expected)
    assert all(x.dtype == torch.int64 for x in packed)
    padded = segment_offsets(case.grid(ends, False), case.grid(case.mask, False))
    assert all(torch.equal(a, b) for a, b in zip(packed, padded, strict=True))


def test_offsets_cut_a_row_as_documented():
    tokens = torch.tensor([[9, 10, 11, 12, 13, 99], [20, 21, 22, 99, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    ends = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).bool()
    seg_offsets, row_offsets = segment_offsets(ends, mask)
    assert seg_offsets.diff().tolist() == [2, 2, 1, 2]
    assert row_offsets.diff().tolist() == [2, 2]
    found = []
    for n in range(2):
        row_actions = tokens[n][mask[n]].tolist()
        of_row = seg_offsets[row_offsets[n] : row_offsets[n + 1] + 1]
        found.append([row_actions[i:j] for i, j in (of_row - of_row[0]).unfold(0, 2, 1)])
    assert found == [[[10, 11], [12, 13]], [[20], [21, 22]]]


def test_offsets_errors():
    ends = torch.tensor([[True, False, False], [False, True, False]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    with pytest.raises(TypeError, match=r"ends: expected bool, got torch.int64"):
        segment_offsets(ends.long(), mask)
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 3\] like ends"):
        segment_offsets(ends, mask[:1])
    with pytest.raises(BackendError, match=r"segment_offsets: .* serves no device"):
        segment_offsets(ends, ends, backend="native")


def test_offsets_are_a_custom_operator():
    case = CASES["holes"]
    ends = naive_for(case, draw_entropy(case))
    torch.library.opcheck(_segment_offsets, (ends, case.mask, case.cu_seqlens))
    grid = case.grid(ends, False), case.grid(case.mask, False), None
    torch.library.opcheck(_segment_offsets, grid)
