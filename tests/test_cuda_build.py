"""What nvcc made of the CUDA kernels: registers, memory and the width of loads, without a GPU."""

import importlib.util
import re
import shutil
import subprocess
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
    term = re.search(r"(Policy|Value)Term", rest)
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
    assert len(kernels["sm_90"]) == 15
    assert all(kernels[target] == kernels["sm_90"] for target in TARGETS)
    assert "sm_100.ptx" in cuobjdump("--list-ptx")


def test_tokens_are_loaded_sixteen_bytes_at_a_time():
    wide, kernels = set(), set()
    for line in cuobjdump("-sass", "-arch", "sm_90").splitlines():
        if "Function :" in line:
            kernels.add(kernel := kernel_of(line))
        elif re.search(r"LDG\.E\.[A-Z.]*128", line):
            wide.add(kernel)
    assert wide == kernels - WITHOUT_FLOATS
