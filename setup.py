"""Builds the C kernels of memopt/optim/native.py, or leaves them out: memopt works without them.

The library is loaded with ctypes and knows nothing of Python: its file name and the wheel's tag name a platform, but no
version of Python. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = "memopt/optim/csrc"
KERNELS = Extension(
    "memopt.optim._step8",
    sources=[f"{SOURCES}/step8.c"],
    depends=[f"{SOURCES}/{name}" for name in sorted(os.listdir(SOURCES)) if name.endswith(".h")],
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-g0",
        "-pthread",
        "-fno-strict-aliasing",
        "-ffp-contract=off",  # fused multiply-add where the compiler likes would make numbers depend on the machine
        "-fno-math-errno",  # this and the next change no number
        "-fno-trapping-math",
    ],
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)


class BuildKernels(build_ext):
    """Builds a plain shared library; setuptools warns and goes on where that fails, as the extension is optional."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        # an editable installation writes into the tree: a process that has the old library mapped must keep its file
        with contextlib.suppress(FileNotFoundError):
            os.unlink(outfile)
        return super().copy_file(infile, outfile, *args, **kwargs)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever it is, an optional extension must not stop the installation
            raise CompileError(f"{error}; 8-bit optimizer steps on the CPU will use the slower torch code") from error


class TagWheel(bdist_wheel):
    """py3-none-PLATFORM with the kernels, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(os.path.exists(path) for path in self.get_finalized_command("build_ext").get_outputs())
        self.root_is_pure = not built
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel})
