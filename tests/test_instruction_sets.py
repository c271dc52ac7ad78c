"""Every instruction set is a module of its own, passes the same tests and runs where it may."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_giant_rows import draw, every_op, giant_case

from segkernels import _native, native

HERE = Path(__file__).parent
SETS = ("scalar", "avx2", "avx512")
KERNELS = [
    *("token_stats", "segments", "bradley_terry", "rewards", "advantages"),
    *("normalizer", "ppo_loss", "giant_rows"),
]


def run(isa, *command):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "SEGKERNELS_ISA": isa},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def library(isa):
    name = "_native" if isa == "scalar" else f"_native_{isa}"
    return Path(_native.__file__).with_name(Path(_native.__file__).name.replace("_native", name))


@pytest.fixture(scope="module")
def runnable():
    """An unknown name is refused with a list of what this processor and build can run."""
    message = run("sse9", "-c", "import segkernels").stderr.strip().splitlines()[-1]
    found = re.fullmatch(
        r"ValueError: SEGKERNELS_ISA: expected one that this processor and build run \((.*)\), "
        r"got 'sse9'; unset it to use the best of them",
        message,
    )
    assert found, message
    return found[1].split(", ")


def test_the_best_is_chosen(runnable):
    assert runnable == list(SETS[: len(runnable)])
    best = "import segkernels.native as n; print(n.extension.build_info())"
    for asked, given in (("", runnable[-1]), *((name, name) for name in runnable)):
        assert run(asked, "-c", best).stdout == f"isa {given}\n"


@pytest.mark.parametrize("isa", SETS)
def test_the_same_checks_hold(isa, runnable):
    """The tests of all kernels; the set that this process runs with has them already."""
    if isa not in runnable:
        pytest.skip(f"this processor has no {isa}")
    if native.extension.build_info() == f"isa {isa}":
        pytest.skip("the tests around this one run with it")
    files = [f"tests/test_{name}.py" for name in KERNELS]
    quiet = "-q", "-p", "no:cacheprovider"
    done = run(isa, "-m", "pytest", *quiet, "-m", "not triton and not gpu", *files)
    assert done.returncode == 0, done.stdout[-4000:]


def digest_of_sequence_ops():
    """Of all results on ragged rows with holes, one of them in blocks, in three dtypes."""
    case = giant_case(0.1, (3, 40_000, 0, 511, 8, 1030))
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [x.to(dtype) for x in draw(case, 0.2)]
        for outputs in every_op(inputs, case.mask, case.cu_seqlens):
            for x in outputs:
                digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_sequence_ops_give_the_same_bits(runnable):
    code = "import test_instruction_sets as t; print(t.digest_of_sequence_ops())"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); {code}"
    digests = {isa: run(isa, "-c", code).stdout for isa in runnable}
    assert set(digests.values()) == {digest_of_sequence_ops() + "\n"}, digests


def instructions(isa):
    """Names of the vector registers that a module's instructions use: xmm of VEX, ymm, zmm, k."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    path = library(isa)
    header = subprocess.run([objdump, "-f", path], capture_output=True, text=True, check=True)
    if "x86-64" not in header.stdout:
        pytest.skip("one instruction set on this architecture")
    listing = subprocess.run(
        [objdump, "--disassemble", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = set()
    for line in listing.splitlines():
        # Every VEX or EVEX instruction on vectors begins with v; those on masks name a %k.
        if re.match(r"\s*[0-9a-f]+:\s+v", line):
            found.add("vex")
        found.update(re.findall(r"%(ymm|zmm|k)\d", line))
    return found


def test_modules_hold_what_their_processors_have():
    """Inline functions of the standard library included: modules share none with each other."""
    assert instructions("scalar") == set()
    assert instructions("avx2") == {"vex", "ymm"}
    assert instructions("avx512") == {"vex", "ymm", "zmm", "k"}
