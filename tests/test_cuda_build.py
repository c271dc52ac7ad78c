"""What nvcc made of the CUDA kernels: registers, memory and the width of loads, without a GPU. And
what the build does where nvcc fails."""

import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from segkernels import native

TARGETS = ("sm_80", "sm_90", "sm_100")
SHARED = 48 * 1024  # what every GPU gives a block unasked
# Two blocks of 512 threads fit on a processor with 64 registers. The pairs' loss runs once, moments
# of positions in blocks of 256 threads, and the fit of a normaliser in a single block.
REGISTERS = {
    "bradley_terry_kernel": 80,
    "location_moments_kernel": 80,
    "fit_location_kernel": 128,
}
WITHOUT_FLOATS = {"reward_grads_kernel", "fit_location_kernel"}
# segment_advantages_kernel by what its floats are stored as, "any" where not all are the same, and
# whether it finds the ends itself; with the vectors that a thread then reads: rewards, values and
# two log-probabilities, and the entropy.
STORED = {"f32": 2, "bf16": 1, "f16": 1, "any": 2}
ADVANTAGES = {
    f"segment_advantages_kernel<{stored}{', ends' if arrays == 5 else ''}>": arrays * vectors
    for stored, vectors in STORED.items()
    for arrays in (4, 5)
}


def cuobjdump(*arguments):
    if native.cuda_extension is None:
        pytest.skip(f"the extension was built without CUDA: {native.cuda_missing}")
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None:  # its wheels bring one along
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool is None or not Path(tool).exists():
        pytest.skip("there is no cuobjdump, of CUDA or of Triton")
    command = [str(tool), *arguments, native.cuda_extension.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_of(mangled):
    """The kernel's own name, with what its template was instantiated for."""
    name, rest = re.search(r"\d+([a-z_]+_kernel)(.*)", mangled).groups()
    if name == "segment_advantages_kernel":
        code, ends = re.search(r"(?:DTypeE(\d)|Floats)EL?E?E?Lb(\d)", rest).groups()
        stored = "any" if code is None else list(STORED)[int(code)]
        return f"{name}<{stored}{', ends' if ends == '1' else ''}>"
    term = re.search(r"(Policy|Value)Inputs", rest)
    return f"{name}<{term[0]}>" if term else name


def test_no_kernel_spills_and_all_fit():
    text = cuobjdump("--dump-resource-usage")
    kernels = {target: set() for target in TARGETS}
    target = None
    for line in text.splitlines():
        if line.startswith("arch = "):
            target = line.removeprefix("arch = ")
        elif "Function " in line:
            kernel = kernel_of(line)
        elif "REG:" in line:
            used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            assert used["REG"] <= REGISTERS.get(kernel, 64), (target, kernel)
            assert used["SHARED"] <= SHARED, (target, kernel)
            assert used["STACK"] == used["LOCAL"] == 0, (target, kernel)
            kernels[target].add(kernel)
    assert len(kernels["sm_90"]) == 14 + len(ADVANTAGES)
    assert kernels["sm_90"] >= ADVANTAGES.keys()
    assert all(kernels[target] == kernels["sm_90"] for target in TARGETS)
    assert "sm_100.ptx" in cuobjdump("--list-ptx")


@functools.cache
def machine_code():
    """(opcode, operands) of each instruction for sm_90, by kernel."""
    kernels = {}
    for line in cuobjdump("-sass", "-arch", "sm_90").splitlines():
        if "Function :" in line:
            kernel = kernels.setdefault(kernel_of(line), [])
        elif code := re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*) *(.*?);", line
        ):
            kernel.append(code.groups())
    return kernels


def count(kernel, pattern):
    return sum(re.match(pattern, opcode) is not None for opcode, _ in machine_code()[kernel])


def test_tokens_are_loaded_sixteen_bytes_at_a_time():
    wide = {kernel for kernel in machine_code() if count(kernel, r"LDG\.E\.[A-Z.]*128")}
    assert wide == machine_code().keys() - WITHOUT_FLOATS


def asked_for_at_once(code):
    """The most vectors on their way from memory before an instruction reads one of them."""
    most, vectors, awaited = 0, 0, set()
    for opcode, operands in code:
        to, *sources = re.findall(r"\bR(\d+)\b", operands) or [""]
        is_load = opcode.startswith("LDG.E.128")
        if awaited & {*sources, *([] if is_load else [to])} or opcode == "DEPBAR.LE":
            vectors, awaited = 0, set()
        if is_load:
            awaited |= {str(int(to) + i) for i in range(4)}
        vectors += is_load or opcode.startswith("LDGSTS.E.128")
        most = max(most, vectors)
    return most


@pytest.mark.parametrize("kernel", ADVANTAGES)
def test_advantages_ask_for_everything_before_they_wait(kernel):
    assert asked_for_at_once(machine_code()[kernel]) >= ADVANTAGES[kernel]
    # Two vectors of each of four outputs, and both of a sector side by side (see store).
    assert count(kernel, r"STG\.E\.128") == 8


ROOT = Path(__file__).resolve().parent.parent

# Like cmake, but for the compiling: makes the CPU module, and fails at the CUDA module.
CMAKE = """#!{python}
import pathlib, sys
here = pathlib.Path({here!r})
for option in sys.argv:
    name, _, value = option.partition("=")
    if name == "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY":
        (here / "output").write_text(value)
        (here / "cuda").write_text("ON" if "-DSEGK_CUDA=ON" in sys.argv else "AUTO")
if "--build" in sys.argv:
    pathlib.Path((here / "output").read_text(), "_native{suffix}").touch()
    of_cuda = "cuda_if_possible" in sys.argv or (here / "cuda").read_text() == "ON"
    sys.exit("ptxas error" if of_cuda else 0)
"""


def build_ext(folder, program, options):
    """setup.py with this cmake, as ``make gpu`` calls it, into this folder."""
    cmake = folder / "bin" / "cmake"
    cmake.parent.mkdir(exist_ok=True)
    cmake.write_text(program)
    cmake.chmod(0o755)
    return subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet", "build_ext"),
            *("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")),
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{cmake.parent}:{os.environ['PATH']}", "CMAKE_ARGS": options},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("cuda", ["", "-DSEGK_CUDA=ON"])
def test_cpu_modules_do_not_depend_on_the_cuda_module(tmp_path, cuda):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    modules = tmp_path / "lib" / "segkernels"
    modules.mkdir(parents=True)
    stale = modules / f"_cuda{suffix}"
    stale.touch()
    program = CMAKE.format(python=sys.executable, here=str(tmp_path), suffix=suffix)
    done = build_ext(tmp_path, program, cuda)
    assert "ptxas error" in done.stderr
    said = "the CUDA kernels could not be compiled, see the errors above" in done.stderr
    assert (done.returncode != 0, said) == ((True, False) if cuda else (False, True))
    assert (modules / f"_native{suffix}").exists()
    assert not stale.exists(), "a module of an earlier build would be loaded"


# The cmake behind it on the PATH, but for the compiling.
CONFIGURES = """#!/bin/sh
case "$1" in --build) exit 0 ;; esac
PATH=${PATH#*:} exec cmake "$@"
"""


def test_warnings_are_errors_where_that_was_asked_for_and_never_in_a_users_build(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    # One after the other in one folder: no option of an earlier build may stay.
    for options, strict in ("-DSEGK_STRICT=ON", True), ("", False):
        done = build_ext(tmp_path, CONFIGURES, options)
        assert done.returncode == 0, done.stderr
        commands = json.loads((tmp_path / "temp" / "cmake" / "compile_commands.json").read_text())
        suffixes = {Path(one["file"]).suffix for one in commands}
        assert suffixes == {".cpp", ".cu"} or "CUDA kernels: none" in done.stdout
        for one in commands:
            found = re.search(r"-Werror|--warning-as-error", one["command"])
            assert (found is not None) == strict, (options, one["file"])
