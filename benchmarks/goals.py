"""The numbers to reach, and what a result file says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from result_file import File, Measured
from tables import Table, number

UNMEASURED = "not yet measured"

# A number; or, where there is none, None and perhaps why.
Found = tuple[float | None, str]
NOTHING: Found = None, ""


@dataclass(frozen=True)
class Measure:
    """What is read off a case, and how it is written."""

    of: Callable[[File, Measured], Found]
    unit: str  # behind the number; "%" for a share
    what: str = ""  # behind the unit
    at_least: bool = True

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{number(value)}{self.unit}"

    def goal(self, bound: float) -> str:
        limit = f"{bound:.0%}" if self.unit == "%" else f"{bound:,g}{self.unit}"
        words = "at least" if self.at_least else "at most", limit, self.what
        return " ".join(filter(None, words))


# The shapes that a goal speaks of, field by field: a value, several, or any (...). A case that has
# other fields is not meant.
Shapes = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound, held against the worst of the cases that it speaks of."""

    about: str
    op: str
    passes: str
    dtype: str
    shapes: Shapes
    measure: Measure
    bound: float

    @property
    def text(self) -> str:
        return self.measure.goal(self.bound)

    def speaks_of(self, case: Measured) -> bool:
        named = (case.line["op"], case.line["pass"], case.line["dtype"])
        if named != (self.op, self.passes, self.dtype) or case.shape.keys() != self.shapes.keys():
            return False
        return all(
            wanted is ... or case.shape[name] in (wanted if isinstance(wanted, tuple) else [wanted])
            for name, wanted in self.shapes.items()
        )

    def measured(self, file: File) -> str:
        found = [self.measure.of(file, case) for case in file.cases if self.speaks_of(case)]
        values = [(value, note) for value, note in found if value is not None]
        reasons = [note for value, note in found if value is None and note]
        if reasons:
            return f"no number: {reasons[0][:100]}"
        if not values:
            return UNMEASURED
        at_least = self.measure.at_least
        worst, note = min(values) if at_least else max(values)
        reached = worst >= self.bound if at_least else worst <= self.bound
        said = [self.measure.shown(worst), note, "" if reached else "missed"]
        return ", ".join(filter(None, said))


# ---- measures ----------------------------------------------------------------------------------


def _median(case: Measured, **fields: Any) -> Found:
    result = case.find(**fields)
    if result is None:
        return NOTHING
    return (result["median"], "") if "median" in result else (None, result["reason"])


def _ratio(above: Found, below: Found) -> Found:
    for value, note in (above, below):
        if value is None:
            return None, note
    return above[0] / below[0], ""


def _ours(case: Measured) -> Found:
    return NOTHING if case.ours is None else (case.ours["median"], "")


def against(what: str = "", **fields: Any) -> Measure:
    """How many times our time the contender with these fields takes."""
    return Measure(
        lambda _, case: _ratio(_median(case, **fields), _ours(case)),
        "x",
        what or fields["name"],
    )


def over(what: str, **fields: Any) -> Measure:
    """How many times the time of the contender with these fields we take."""
    return Measure(
        lambda _, case: _ratio(_ours(case), _median(case, **fields)),
        "x",
        what,
        at_least=False,
    )


def _against_best(_: File, case: Measured) -> Found:
    others = [
        result["median"]
        for result in case.contenders
        if "median" in result
        and result["role"] in ("textbook", "compiled", "peer")
        and not result.get("partial")
    ]
    return _ratio((min(others), ""), _ours(case)) if others else NOTHING


def _bandwidth(file: File, case: Measured) -> Found:
    kind, available = file.bandwidth
    if case.ours is None:
        return NOTHING
    if available is None:
        return None, f"the {kind} bandwidth was not measured"
    return case.line["moved"] / case.ours["median"] / available, ""


def bandwidth(kind: str) -> Measure:
    return Measure(_bandwidth, "%", f"of the {kind} bandwidth")


def elements(size: int) -> Measure:
    """Of so many bytes each."""

    def measure(_: File, case: Measured) -> Found:
        if case.ours is None:
            return NOTHING
        return case.line["moved"] / size / case.ours["median"] / 1e9, ""

    return Measure(measure, " G elements/s")


def _workspace(_: File, case: Measured) -> Found:
    if case.ours is None or case.ours.get("peak_bytes") is None:
        return NOTHING
    return max(0, case.ours["peak_bytes"] - case.ours["output_bytes"]) / 2**20, ""


WORKSPACE = Measure(_workspace, " MiB", at_least=False)


def _cores(_: File, case: Measured) -> Found:
    by_threads = {ours.get("threads"): ours for ours in case.all(role="ours")}
    one, two = by_threads.get(1), by_threads.get(2)
    return (one["median"] / two["median"], "") if one and two else NOTHING


CORES = Measure(_cores, "x")


def _since_none_gated(file: File, case: Measured) -> Found:
    same = {**case.line, "shape": {**case.shape, "gated": 0.0}}
    names = ("op", "pass", "shape", "dtype")
    for other in file.cases:
        if all(other.line[name] == same[name] for name in names):
            return _ratio(_ours(case), _ours(other))
    return NOTHING


GATED = Measure(_since_none_gated, "%", "of the time with none gated", at_least=False)


def _launches(_: File, case: Measured) -> Found:
    if case.ours is None or "launches" not in case.ours:
        return NOTHING
    if case.ours["synchronises"]:
        return None, "the host waits for the device"
    return case.ours["launches"], ""


LAUNCHES = Measure(_launches, "", "without synchronisation", at_least=False)


def _memory_beside(_: File, case: Measured) -> Found:
    """Of a process, with all that it holds."""
    trl = case.find(name="TRL")
    if case.ours is None or trl is None:
        return NOTHING
    if "median" not in trl:
        return None, trl["reason"]
    if case.ours["peak_bytes"] is None or trl["peak_bytes"] is None:
        return None, "peak memory was not measured"
    return case.ours["peak_bytes"] / trl["peak_bytes"], ""


TRL_MEMORY = Measure(_memory_beside, "%", "of TRL's peak memory", at_least=False)

LIGER = "Liger, SM90"
# What Liger reports for that form on an H100, for 8,192 x 4,096 x 131,072 with entropy: forward,
# and forward + backward. The rate of its machine's products is not reported; that of the forward
# pass, which is one product, stands for it.
LIGER_FORWARD, LIGER_BOTH = 12.30e-3, 50.2e-3


def _against_liger(_: File, case: Measured) -> Found:
    """Our share of Liger's time in the same rounds, or else of the time that it reports, scaled by
    the rate of the products here."""
    beside = _ratio(_ours(case), _median(case, name=LIGER))
    bare = case.find(role="bare", products=4)
    if beside[0] is not None or bare is None:
        return beside
    reported = LIGER_BOTH * (bare["median"] / 4) / LIGER_FORWARD
    value, reason = _ratio(_ours(case), (reported, ""))
    return value, reason or f"of {reported * 1e3:.1f} ms, the reported time at this product rate"


LIGER_SHARE = Measure(_against_liger, "x", "Liger's SM90 form", at_least=False)


# ---- goals -------------------------------------------------------------------------------------

FWD, BWD, BOTH = "forward", "backward", "forward + backward"
FP32, BF16 = "float32", "bfloat16"
ENTROPY, STATS = "entropy_from_logits", "logprobs_and_entropy"
LINEAR, LINEAR_LOSS = "linear_logprobs_and_entropy", "linear_policy_loss"
PATH = "boundaries to advantages"
ONE_PRODUCT = over("one bare product", role="bare", products=1)
FOUR_PRODUCTS = over("four bare products", role="bare", products=4)


def _logits(*vocab: int, rows: Any = ...) -> Shapes:
    return {"rows": rows, "vocab": vocab}


def _product(tokens: int, hidden: int, vocab: int, **gated: float) -> Shapes:
    return {"tokens": tokens, "hidden": hidden, "vocab": vocab, **gated}


def _uniform(rows: Any, each: Any = ...) -> Shapes:
    tokens = ... if each is ... else rows * each
    return {"layout": "uniform", "rows": rows, "tokens": tokens}


def _goals(about: str, op: str, passes: str, dtype: str, shapes: Shapes, *bounds) -> list[Goal]:
    """Several of the same cases; ``bounds`` are (measure, bound) each."""
    return [Goal(about, op, passes, dtype, shapes, *bound) for bound in bounds]


VOCABS = _logits(32_064, 151_936)
LOGITS = "V = 32,064 and 151,936"
SMALL = _product(256, 1024, 32_000)

CPU_GOALS = (
    *_goals(
        f"entropy, {LOGITS}, fp32",
        *(ENTROPY, FWD, FP32, VOCABS),
        (against("torch.compile", role="compiled"), 5),
        (against("eager", role="textbook"), 20),
        (bandwidth("read"), 0.5),
    ),
    *_goals(
        f"entropy, {LOGITS}, bf16",
        *(ENTROPY, FWD, BF16, VOCABS),
        (against("torch.compile", role="compiled"), 4),
        (against("eager", role="textbook"), 5),
        (elements(2), 4),
    ),
    *(
        Goal(
            f"log-prob + entropy, {BOTH}, {LOGITS}, {short}",
            *(STATS, BOTH, dtype, VOCABS),
            Measure(_against_best, "x", "the best of the others"),
            4,
        )
        for short, dtype in (("fp32", FP32), ("bf16", BF16))
    ),
    Goal(
        "linear form, 256 x 1,024 x 32,000, fp32, forward",
        *(LINEAR, FWD, FP32, SMALL, ONE_PRODUCT, 1.08),
    ),
    Goal("same, forward + backward", LINEAR, BOTH, FP32, SMALL, FOUR_PRODUCTS, 1.1),
    Goal(
        "same, extra memory, forward + backward",
        *(LINEAR, BOTH, FP32, SMALL, WORKSPACE, 64),
    ),
    *(
        Goal(
            f"linear form, {tokens} x 1,024 x 32,000, bf16 weights, {passes}",
            *(LINEAR, passes, BF16, _product(tokens, 1024, 32_000)),
            against("torch's own bf16 path", name="eager"),
            3,
        )
        for passes, tokens in ((FWD, 256), (BOTH, 64))
    ),
    *_goals(
        f"{PATH}, 64 x 1,024",
        *(PATH, FWD, FP32, _uniform(64, 1024)),
        (against("Python loops", name="Python loops over tokens"), 1000),
        (against("a GAE loop over time", name="eager, GAE loops over time"), 100),
        (against("fully vectorised", name="eager, GAE as a matrix"), 10),
    ),
    Goal(
        "entropy, 4,096 x 32,064, fp32, 1 to 2 cores",
        *(ENTROPY, FWD, FP32, _logits(32_064, rows=4096), CORES, 1.8),
    ),
    Goal(
        "log-prob + entropy, forward + backward, 2,048 x 32,064, 1 to 2 cores",
        *(STATS, BOTH, FP32, _logits(32_064, rows=2048), CORES, 1.8),
    ),
    Goal(
        f"{PATH}, 1,024 x 1,024, 1 to 2 cores",
        *(PATH, FWD, FP32, _uniform(1024, 1024), CORES, 1.8),
    ),
)

# SmolLM2-135M with the head of a reward model, on pairs of up to 2,048 tokens.
TRAINED = {
    "model": "llama",
    "parameters": 134_515_584,
    "data": ...,
    "pairs": ...,
    "longest": 2048,
}

TRAINING_GOALS = tuple(
    goal
    for batch, times in ((8, 3.5), (16, 4.2))
    for goal in _goals(
        f"reward training, SmolLM2-135M, {batch} pairs a batch",
        *("reward training", BOTH, FP32, {**TRAINED, "batch": batch}),
        (against(name="TRL"), times),
        (TRL_MEMORY, 0.5),
    )
)

WIDE = _logits(151_936, rows=8192)
LARGE = (8192, 4096, 131_072)

GPU_GOALS = (
    Goal(
        "entropy, forward, 8,192 x 151,936, bf16",
        *(ENTROPY, FWD, BF16, WIDE, bandwidth("copy"), 0.9),
    ),
    Goal(
        "entropy + log-prob, backward, same",
        *(STATS, BWD, BF16, WIDE, bandwidth("copy"), 0.85),
    ),
    Goal(
        "linear form, forward, 8,192 x 4,096 x 131,072, bf16",
        *(LINEAR, FWD, BF16, _product(*LARGE), ONE_PRODUCT, 1.1),
    ),
    Goal(
        "linear form, forward + backward, same",
        *(LINEAR, BOTH, BF16, _product(*LARGE), FOUR_PRODUCTS, 1.12),
    ),
    Goal(
        "linear_policy_loss, forward + backward, same",
        *(LINEAR_LOSS, BOTH, BF16, _product(*LARGE, gated=0.0), LIGER_SHARE, 0.85),
    ),
    *(
        Goal(
            f"same, {gated:.0%} of the rows gated",
            *(LINEAR_LOSS, BOTH, BF16, _product(*LARGE, gated=gated), GATED, most),
        )
        for gated, most in ((0.5, 0.7), (0.9, 0.45))
    ),
    Goal(
        f"{PATH}, 512 x 4,096",
        *(PATH, FWD, FP32, _uniform(512, 4096), bandwidth("copy"), 0.5),
    ),
    Goal(
        f"{PATH}, 4,096 x 4,096 (16M tokens)",
        *(PATH, FWD, FP32, _uniform(4096, 4096), bandwidth("copy"), 0.7),
    ),
    *(
        Goal(
            f"Bradley-Terry, {passes}, launches",
            *("segment_bradley_terry", passes, FP32, _uniform(...), LAUNCHES, most),
        )
        for passes, most in ((FWD, 1), (BOTH, 2))
    ),
    *(
        Goal(f"{op}, {BOTH}, extra memory", op, BOTH, BF16, shape, WORKSPACE, 512)
        for op, shape in (
            (LINEAR, _product(*LARGE)),
            (LINEAR_LOSS, _product(*LARGE, gated=0.0)),
        )
    ),
)


def table(goals: Iterable[Goal], files: Sequence[File]) -> Table:
    """One row a goal, one column a file."""
    rows: list[list[str]] = []
    about = ""
    for goal in goals:
        measured = [goal.measured(file) for file in files] or [UNMEASURED]
        rows.append(["" if goal.about == about else goal.about, goal.text, *measured])
        about = goal.about
    return Table(["", "goal", *([file.name for file in files] or ["measured"])], rows)
