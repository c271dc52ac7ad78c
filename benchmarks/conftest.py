"""Puts every contender of a case through pytest-benchmark, in alternation.

One test is one case, one round of pytest-benchmark goes through all of its contenders in turn, and
the time of each is kept apart. ``--benchmark-json`` holds them under ``extra_info``; the result
file under ``benchmarks/results`` is written at the end of a run over everything.
"""

import os
from pathlib import Path

import instruction_sets  # noqa: F401  (before torch computes)

# Inductor finds code in its cache that was made for another instruction set, and crashes in it:
# each has a cache of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    Path(__file__).resolve().parent.parent
    / "build"
    / f"inductor-{os.environ.get('SEGKERNELS_ISA', 'default')}"
)

import machine
import pytest
import result_file
import tables
from compare import compare


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", type=float, default=0.5, help="for each contender of a case (default 0.5)"
    )
    parser.addoption("--results", type=Path, help="write the results of this run here")


def pytest_configure(config):
    config.measured = []
    config.bandwidth = []


@pytest.fixture
def side_by_side(request, benchmark):
    """Checks, alternates and records the contenders of a case."""
    config = request.config
    if not config.bandwidth:
        config.bandwidth.append(machine.read_bandwidth())

    def run(case):
        comparison = compare(case, config.getoption("seconds"))
        alternation = comparison.alternation
        benchmark.pedantic(alternation.round, rounds=alternation.rounds)
        line = comparison.finish()
        benchmark.extra_info["contenders"] = line["contenders"]
        config.measured.append(line)

    return run


def _facts(config):
    facts = machine.header("cpu")
    # Other work on the machine only takes bandwidth away: the better of two probes is nearer.
    config.bandwidth.append(machine.read_bandwidth())
    return facts | {"read_bandwidth": max(config.bandwidth)}


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not config.measured:
        return
    facts = _facts(config)
    terminalreporter.write_line("")
    terminalreporter.write_line(tables.text(result_file.File(facts, config.measured)))
    path = config.getoption("results")
    if path is not None and exitstatus == pytest.ExitCode.OK:
        if path.is_dir():
            path = path / result_file.file_name(facts)
        result_file.write(path, facts, config.measured)
        terminalreporter.write_line(f"results: {path}")
