"""The inside of a step's process: `python -m bench.gpu.run MODULE` calls main() of bench/gpu/MODULE.py.

Exit status: 0 it ran, 1 a case was wrong or it raised, 3 a package that it needs is missing.
"""

import ctypes
import importlib
import signal
import sys
import traceback

from bench.gpu import record

MISSING = 3
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(module: str) -> int:
    try:
        importlib.import_module(f"bench.gpu.{module}").main()
        record.strike()
    except ModuleNotFoundError as error:
        traceback.print_exc()
        print(f"{error.name} is not installed", file=sys.stderr)
        return MISSING
    if record.wrongs():
        print(f"{record.wrongs()} cases were wrong", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.platform == "linux":
        # A driver that is killed outright must not leave a step behind on the GPU.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.exit(main(sys.argv[1]))
