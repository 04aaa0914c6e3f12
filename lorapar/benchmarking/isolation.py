"""A fresh process without network, for code that a model has written.

    work in a folder of its own, which goes with it; a home that is empty; an environment without secrets
    a network namespace of its own, without an interface: the kernel refuses every connection, of its children's too
    a process namespace of its own: it signals no other process, and what it has started ends with it
    a user namespace of its own: it may look into no other process, and regains nothing through sudo or as root
    limits of CPU time, memory and the size of a file

What stays open to the code is the disk, as the user who runs it may read and write it, and with it the local (Unix)
sockets that this user may open by their path. Linux alone has such namespaces; a container's own policy may forbid
them. Nothing runs then.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, StageFailed

# linux/sched.h and linux/prctl.h
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NOT_CUT_OFF = 3  # exit status of a process that could not be cut off
KILLED = 128  # exit status, and the signal's number, of one that a signal has ended; as in a shell
MEMORY = 16 << 30  # bytes of data a process may have; torch and the data sets take two
FILE = 1 << 30  # bytes of a file
RESULT, SAID = 64 << 20, 1 << 16  # bytes of a result, and of the end of what it says, that are read
# Variables that say where programs are and how text is written; all others may hold a secret.
KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "NLTK_DATA")
INSTEAD = (
    "code that a model writes is run without network or not at all; use Linux with user namespaces (in a container: "
    "--security-opt seccomp=unconfined, or a machine of its own)"
)


def cut_off(port: int) -> None:
    """Cut this process off from the network and from other processes, before it has a second thread.

    It returns in a process of its own, the second of its namespace. The first stands by, and the kernel ends all others
    with it; the one that made this call waits, and the first ends with it. The code can reach neither. Where something
    fails, the process ends.

    port: of a listener on 127.0.0.1, which must not be reached afterwards.
    """
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) != 0:
        _end(f"unshare: {os.strerror(ctypes.get_errno())}")
    try:
        # The same user inside, so that files are read as before.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        _end(f"prctl: {os.strerror(ctypes.get_errno())}")
    if _reaches(port):
        _end("127.0.0.1 is reached nevertheless")
    # The code will have the same user's number and rights: it may not trace the two that stand by, nor write to them.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    for _ in range(2):
        child = os.fork()
        if child != 0:
            _stand_by(child)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    # A signal to its own group reaches nobody else.
    os.setsid()


def _stand_by(child: int) -> None:
    """Wait for a process and end as it does; nothing that it says is taken for a failure to cut it off."""
    ended, status = 0, 0
    while ended != child:
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(KILLED - code if code < 0 else 1 if code == NOT_CUT_OFF else code)


def limit(seconds: int) -> None:
    """Limit this process, and each that it starts: CPU time, memory, the size of a file; no core dumps."""
    # Not on every system, which is told in other words.
    import resource

    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_DATA, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def check_isolation() -> None:
    """InputError where a process of this system cannot be cut off from the network; found by cutting one off."""
    run_isolated("lorapar.benchmarking.isolation", "", 60)


def run_isolated(module: str, request: str, seconds: int) -> str:
    """Run `python -m MODULE PORT REQUEST RESULT` in a process that cuts itself off; returns what it wrote to RESULT.

    Args:
        module: calls `cut_off(PORT)` before it does or imports anything else. request: the text of the file REQUEST.
        seconds: after which the process and those that it has started are stopped.

    Raises InputError where the process could not be cut off, StageFailed where it failed or took too long.
    """
    if sys.platform != "linux":
        raise InputError(f"evaluate.run_code: {sys.platform} cuts no process off from the network: {INSTEAD}")
    with (
        tempfile.TemporaryDirectory(prefix="lorapar-", ignore_cleanup_errors=True) as given,
        open(Path(given) / "result", "w+b") as result,
        open(Path(given) / "said", "w+b") as said,
        _listener() as port,
    ):
        home, asked = Path(given) / "home", Path(given) / "request"
        home.mkdir()
        asked.write_text(request, encoding="utf-8")
        words = [sys.executable, "-m", module, str(port), str(asked), result.name]
        process = subprocess.Popen(words, env=_environment(home), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   start_new_session=True)  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise StageFailed(f"code that the model wrote was stopped after {seconds} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = _end_of(said, SAID).strip().splitlines()
        why = "".join(filter(str.isprintable, lines[-1]))[:300] if lines else "it said nothing"
        if status == NOT_CUT_OFF:
            raise InputError(f"evaluate.run_code: a process could not be cut off from the network ({why}): {INSTEAD}")
        if status == KILLED + signal.SIGXCPU:
            raise StageFailed(f"code that the model wrote was stopped after {seconds} s of CPU time")
        if status != 0:
            raise StageFailed(f"the process that runs the model's code ended with status {status}: {why}")
        # Through what was opened before the code ran, whatever it has put in the file's place.
        return _end_of(result, RESULT)


def _end_of(file: BinaryIO, most: int) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), most, max(0, size - most)).decode("utf-8", errors="replace")


def _environment(home: Path) -> dict[str, str]:
    """The variables of the isolated process: what Python needs, the data sets already here, and nothing else."""
    import datasets.config
    import evaluate.config
    import huggingface_hub.constants as hub

    caches = {
        "HF_HUB_CACHE": hub.HF_HUB_CACHE,
        "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE,
        "HF_MODULES_CACHE": datasets.config.HF_MODULES_CACHE,
        "HF_EVALUATE_CACHE": evaluate.config.HF_EVALUATE_CACHE,
    }
    return {
        **{name: os.environ[name] for name in KEPT if name in os.environ},
        **{name: str(Path(folder).absolute()) for name, folder in caches.items()},
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_ALLOW_CODE_EVAL"), "1"),
        # Modules are found as they are here, the working directory's too.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        "HOME": str(home),
        "TMPDIR": str(home),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@contextlib.contextmanager
def _listener() -> Iterator[int]:
    """A port of 127.0.0.1 that this process reaches; otherwise not reaching it would say nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not _reaches(port):
            raise InputError("evaluate.run_code: 127.0.0.1 is not reached from here, so that nothing shows whether a "
                             "process has been cut off from the network")  # fmt: skip
        yield port


def _reaches(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def _end(why: str) -> None:
    print(why, file=sys.stderr, flush=True)
    os._exit(NOT_CUT_OFF)


if __name__ == "__main__":
    cut_off(int(sys.argv[1]))
    Path(sys.argv[3]).write_text("", encoding="utf-8")
