"""Builds csrc's shared libraries into lorapar_kernels, where a compiler is found.

The libraries have a C interface and are loaded with ctypes (lorapar_kernels/native.py), so neither torch nor
Python's headers are needed to build them, and a wheel fits every Python 3 of its platform. Without a
compiler, or with one that fails, a warning says so, the install goes on, and the PyTorch reference serves.

Environment: CXX and NVCC name the compilers (an empty NVCC leaves the CUDA library out).
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Ampere, Hopper and Blackwell of the data centre; their consumer kin run sm_80's code or the PTX.
CUDA_ARCHS = (80, 90, 100)


def cxx_command(source, target):
    """The command line that builds the CPU library, or the reason why there is none."""
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not found:
        return None, "no C++ compiler was found (CXX is not set; none of c++, g++, clang++ is on the path)"
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    return [*found, *flags, str(source), "-o", str(target)], None


def nvcc_command(source, target):
    """The command line that cross-compiles the CUDA library (no GPU needed), or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC")
    nvcc = named if named is not None else shutil.which("nvcc") or (home and shutil.which(f"{home}/bin/nvcc"))
    if not nvcc:
        return None, "nvcc was not found (NVCC, CUDA_HOME and the path name none)"
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{nvcc} --list-gpu-arch failed: {error}"
    # An older nvcc does not know the newest of them; the PTX of the newest it knows carries it forward.
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.stdout.split()]
    if not archs:
        return None, f"{nvcc} knows none of {CUDA_ARCHS}"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    names = " ".join(f"sm_{arch}" for arch in archs) + f" and PTX {archs[-1]}"
    flags = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    return [
        nvcc,
        *flags,
        *host,
        *codes,
        f'-DLORAPAR_CUDA_ARCHS="{names}"',
        str(source),
        "-o",
        str(target),
    ], None


COMMANDS = {"liblorapar_cpu": cxx_command, "liblorapar_cuda": nvcc_command}


class BuildLibraries(build_ext):
    """Each extension is one source and one compiler call; what goes wrong is said, and leaves it out."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Neither an older build nor half of this one may stay behind for native.py to load.
        target.unlink(missing_ok=True)
        partial = target.with_suffix(".partial")
        command, reason = COMMANDS[ext.name.rpartition(".")[2]](ext.sources[0], partial)
        if command is not None:
            reason = run(command)
        if reason is None:
            partial.replace(target)
        else:
            partial.unlink(missing_ok=True)
            print(f"warning: {ext.name} is left out, the PyTorch reference serves: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


def run(command):
    """None when the compiler succeeded, else what it said."""
    print(shlex.join(command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip()
    return f"{shlex.join(command)} exited {done.returncode}: {said[-2000:]}"


class PlainWheel(bdist_wheel):
    """Platform-specific, but of no particular Python: nothing in it is compiled against Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# optional: setuptools then tolerates that the file is not there afterwards.
header = ["csrc/lorapar.h"]
libraries = [
    Extension("lorapar_kernels.liblorapar_cpu", ["csrc/cpu/lorapar.cpp"], depends=header, optional=True),
    Extension("lorapar_kernels.liblorapar_cuda", ["csrc/cuda/lorapar.cu"], depends=header, optional=True),
]

setup(ext_modules=libraries, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlainWheel})
