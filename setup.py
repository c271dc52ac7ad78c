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
            "-U",
            "SEGK_*",  # options of an earlier build
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
        compile_ = ["cmake", "--build", str(build), "--parallel", jobs]
        for module in target.parent.glob("_cuda.*"):
            module.unlink()  # a failure below must not leave that of an earlier build
        subprocess.run(configure, check=True)
        subprocess.run(compile_, check=True)
        if subprocess.run([*compile_, "--target", "cuda_if_possible"]).returncode:
            print(
                "segkernels: the CUDA kernels could not be compiled, see the errors above; the "
                "extension is built without them. CMAKE_ARGS=-DSEGK_CUDA=ON makes that an error, "
                "CMAKE_ARGS=-DSEGK_CUDA=OFF does not try.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        for extension in self.extensions:
            module = self.get_ext_filename(extension.name)
            if not Path(self.build_lib, module).exists():
                (ROOT / module).unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension("segkernels._native", sources=[]),
        Extension("segkernels._native_avx2", sources=[], optional=True),  # on x86
        Extension("segkernels._native_avx512", sources=[], optional=True),
        Extension("segkernels._cuda", sources=[], optional=True),  # where nvcc is
    ],
    cmdclass={"build_ext": CMakeBuild},
)
