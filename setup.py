"""Builds csrc's shared libraries into lorapar_kernels, where a compiler is found.

The libraries have a C interface and are loaded with ctypes (lorapar_kernels/native.py), so neither torch nor
Python's headers are needed to build them, and a wheel fits every Python 3 of its platform. Without a
compiler, or with one that fails, a warning says so, the install goes on, and the PyTorch reference serves.

Environment: CXX and NVCC name the compilers (an empty NVCC leaves the CUDA library out); LORAPAR_CUDA_ARCHS names the
architectures instead of CUDA_ARCHS ("90", or "80 90"), which builds faster for a machine that is known.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Ampere, Hopper and Blackwell of the data centre; their consumer kin run sm_80's code or the PTX.
CUDA_ARCHS = (80, 90, 100)


def cxx_command(sources, target):
    """The command line that builds the CPU library, or the reason why there is none."""
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not found:
        return None, "no C++ compiler was found (CXX is not set; none of c++, g++, clang++ is on the path)"
    # No contraction into fused multiply-adds: the same result to the bit on every machine, and on the GPU.
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    # Roots in vectors; nobody reads errno or the floating-point flags.
    flags += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    openmp = ["-fopenmp"] if has_openmp(found) else []
    return [*found, *flags, *openmp, *sources, "-o", str(target)], None


def has_openmp(compiler):
    """Whether the compiler builds and links a program with -fopenmp (Apple's does not)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.cpp")
        program.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        return run([*compiler, "-fopenmp", str(program), "-o", str(program.with_suffix(".out"))]) is None


def nvcc_command(sources, target):
    """The command line that cross-compiles the CUDA library (no GPU needed), or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC")
    # Where NVIDIA's packages put it, which many images leave off the path.
    folder = f"{home or '/usr/local/cuda'}/bin"
    nvcc = named if named is not None else shutil.which("nvcc") or shutil.which("nvcc", path=folder)
    if not nvcc:
        return None, f"nvcc was not found (NVCC and the path name none, and there is none in {folder})"
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{nvcc} --list-gpu-arch failed: {error}"
    # An older nvcc does not know the newest of them; the PTX of the newest it knows carries it forward.
    asked = os.environ.get("LORAPAR_CUDA_ARCHS", "").split() or CUDA_ARCHS
    archs = [arch for arch in asked if f"compute_{arch}" in listed.stdout.split()]
    if not archs:
        return None, f"{nvcc} knows none of {' '.join(map(str, asked))}"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    names = " ".join(f"sm_{arch}" for arch in archs) + f" and PTX {archs[-1]}"
    flags = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    # The same roundings as on the CPU; these kernels wait for memory, not for arithmetic. What each costs is printed.
    flags += ["-fmad=false", "-Xptxas=-v", "--threads=0"]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    return [
        nvcc,
        *flags,
        *host,
        *codes,
        f'-DLORAPAR_CUDA_ARCHS="{names}"',
        *sources,
        "-o",
        str(target),
    ], None


COMMANDS = {"liblorapar_cpu": cxx_command, "liblorapar_cuda": nvcc_command}


class BuildLibraries(build_ext):
    """Each extension is one compiler call; what goes wrong is said, and leaves it out."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Neither an older build nor half of this one may stay behind for native.py to load.
        target.unlink(missing_ok=True)
        partial = target.with_suffix(".partial")
        command, reason = COMMANDS[ext.name.rpartition(".")[2]](ext.sources, partial)
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
        print(done.stderr, end="")
        return None
    said = (done.stderr or done.stdout).strip()
    return f"{shlex.join(command)} exited {done.returncode}: {said[-2000:]}"


class PlainWheel(bdist_wheel):
    """Platform-specific, but of no particular Python: nothing in it is compiled against Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def library(kind, pattern):
    """Every source of one library; a new topic is a new file beside the others."""
    # Relative, as setuptools wants them.
    root = Path(__file__).parent
    sources = sorted(str(path.relative_to(root)) for path in root.glob(f"csrc/{kind}/{pattern}"))
    headers = sorted(str(path.relative_to(root)) for path in root.glob("csrc/**/*.*h"))
    # optional: setuptools then tolerates that the file is not there afterwards.
    return Extension(f"lorapar_kernels.liblorapar_{kind}", sources, depends=headers, optional=True)


setup(
    ext_modules=[library("cpu", "*.cpp"), library("cuda", "*.cu")],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlainWheel},
)
