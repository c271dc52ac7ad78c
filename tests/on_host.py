"""Builds csrc/cuda for the CPU: the same kernels over the stand-in for CUDA in cuda_on_host/."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_on_host"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SOURCES = [
    HERE / "module.cpp",
    *(source for op in KERNELS for source in (op, ROOT / "csrc" / "bind" / f"{op.stem}.cpp")),
]
INCLUDES = [
    HERE,
    ROOT / "csrc",
    ROOT / "csrc" / "include",
    Path(pybind11.get_include()),
    Path(sysconfig.get_paths()["include"]),
]
# Contraction off, as in the build of the CPU kernels.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build() -> ModuleType:
    """The module, compiled once for each state of the sources, into build/."""
    compiler = os.environ.get("CXX", "c++")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    state = hashlib.sha256(f"{compiler} {FLAGS} {suffix}".encode())
    for folder in (HERE, ROOT / "csrc"):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                state.update(path.read_bytes())
    target = ROOT / "build" / "cuda_on_host" / state.hexdigest()[:16] / f"cuda_on_host{suffix}"
    if not target.exists():
        _compile(compiler, target)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_host", str(target))
    spec = importlib.util.spec_from_loader("cuda_on_host", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-I{path}" for path in INCLUDES]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compiled(source: Path) -> str:
            out = f"{folder}/{source.name}.o"
            subprocess.run(
                [compiler, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", out], check=True
            )
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, SOURCES))
        linked = f"{folder}/linked.so"
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", linked], check=True)
        os.replace(linked, target)  # whole or not at all: other test runs may look for it
