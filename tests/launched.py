"""Several processes of one launch on this machine's CPU (gloo), as torchrun starts them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(processes: int, arguments: Sequence[str], *options: str) -> list[str]:
    """The words that start `python <arguments>` in so many processes; one: without a launch."""
    if processes == 1:
        return [sys.executable, *arguments]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, *options, *arguments]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, no GPU, and this checkout ahead of an installed one."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return os.environ | ours | more


def launch(
    processes: int, arguments: Sequence[str], timeout: float = 600, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `python <arguments>` in so many processes to the end; `more`: of the environment."""
    return subprocess.run(
        command(processes, arguments), capture_output=True, text=True, env=environment(**more), timeout=timeout,
        check=False,
    )  # fmt: skip
