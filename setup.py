"""Builds the compiled extension with CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extensions(self):
        # One run of CMake puts every module into the same folder.
        target = Path(self.get_ext_fullpath("segkernels._native")).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    ext_modules=[
        Extension("segkernels._native", sources=[]),
        Extension("segkernels._native_avx2", sources=[], optional=True),  # on x86
        Extension("segkernels._native_avx512", sources=[], optional=True),
        Extension("segkernels._cuda", sources=[], optional=True),  # where nvcc is
    ],
    cmdclass={"build_ext": CMakeBuild},
)
