"""A launch over two machines: two network namespaces of this one, with a host name each, joined by a cable (veth).

It takes root: `ip netns add` is not permitted elsewhere, and the tests are then skipped.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launched import environment
from tests.lorapar.driver import recipe_values, succeeds, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29500"
STEPS, SAVE_STEPS = 240, 20


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Why no machines can be made here."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "there is no `ip` (iproute2) or no `unshare`"
    name = f"lorapar{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"`ip netns add` is not permitted: {tried.stderr.strip()}"
    ip("netns", "delete", name)
    return None


class Machine:
    """A network namespace; what runs in it finds a host name of its own, and the cable as eth0."""

    def __init__(self, number: int):
        self.number, self.name = number, f"lorapar{os.getpid()}-{number}"
        self.said = Path()
        self.process: subprocess.Popen[bytes] | None = None
        ip("netns", "add", self.name)

    def start(self, log: Path, *arguments: object, host: str | None = None) -> None:
        """torchrun's part of `python -m lorapar <arguments>` on this machine; `log` gets what it prints."""
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(self.number),
                 "--nproc_per_node", "1", "--master_addr", ADDRESSES[0], "--master_port", PORT, "-m", "lorapar",
                 *map(str, arguments)]  # fmt: skip
        # Numbers of processes, too, are a machine's own.
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        numbered = f"echo {1000 * self.number + 100} > /proc/sys/kernel/ns_last_pid"
        named = [*own, "sh", "-c", f'{numbered} && hostname "$0" && exec "$@"', host or f"machine{self.number}", *words]
        self.said = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(["ip", "netns", "exec", self.name, *named], stdout=out, stderr=out,
                                            env=environment(GLOO_SOCKET_IFNAME="eth0"))  # fmt: skip

    def kill(self) -> None:
        """SIGKILL for everything that runs here."""
        for process in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def unplug(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "down")

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, within: float) -> tuple[int, list[str]]:
        """(exit status, the lines of ours that name an end) once all that runs here has ended by itself."""
        assert self.process is not None
        until = time.monotonic() + within
        status = self.process.wait(within)
        while left := ip("netns", "pids", self.name).split():
            assert time.monotonic() < until, f"{left} live on"
            time.sleep(0.05)
        return status, [line for line in self.said.read_text().splitlines()
                        if line.startswith("lorapar: ") and ("resumes" in line or "error" in line)]  # fmt: skip


@pytest.fixture(scope="module")
def permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def machines(permitted) -> Iterator[tuple[Machine, Machine]]:
    both: list[Machine] = []
    try:
        for number in range(2):
            both.append(Machine(number))
        first, second = both
        ip("link", "add", "eth0", "netns", first.name, "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for machine, address in zip(both, ADDRESSES, strict=True):
            ip("-n", machine.name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", machine.name, "link", "set", link, "up")
        yield first, second
    finally:
        for machine in both:
            machine.kill()
            if machine.process:
                machine.process.wait(20)
            ip("netns", "delete", machine.name)


@pytest.fixture(scope="module")
def file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose training of two rows a step and process takes some seconds, and writes checkpoints."""
    values: dict[str, Any] = recipe_values(tiny_folder) | {"stages": ["sft"]}
    values["sft"] |= {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 3, "learning_rate": 1e-4,
                      "per_device_train_batch_size": 2}  # fmt: skip
    # 44 rows of System 1: a launch would fill up an epoch's last batch that is not full with other rows.
    values["data"] = {**values["data"], "held_out": 9}
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", values)


@pytest.fixture(scope="module")
def alone(permitted, file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """(an output folder up to its partition, the losses of one process at the batch of two)."""
    folder = tmp_path_factory.mktemp("alone")
    for verb in ("label", "score", "partition"):
        succeeds(verb, file, "--output_dir", folder / "partitioned")
    trained = shutil.copytree(folder / "partitioned", folder / "trained")
    succeeds("sft", file, "--output_dir", trained, "--sft.per_device_train_batch_size", 4, "--update")
    return folder / "partitioned", losses(trained)


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in json.loads((folder / "sft" / "log_history.json").read_text()) if "loss" in e]


def wait_for_checkpoint(folder: Path, *machines: Machine) -> None:
    """Until the second has been begun, so that the first is whole."""
    until = time.monotonic() + 120
    while not list((folder / "sft").glob(f"checkpoint-{2 * SAVE_STEPS}")):
        for machine in machines:
            assert machine.runs(), machine.said.read_text()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_two_machines_train_as_one_process_does(machines, alone, file, tmp_path):
    partitioned, trained = alone
    folder = shutil.copytree(partitioned, tmp_path / "run")
    for machine in machines:
        # Machines of one image may have one name.
        machine.start(tmp_path / f"{machine.number}.log", "sft", file, "--output_dir", folder, host="localhost")
    for machine in machines:
        assert machine.end(200) == (0, []), machine.said.read_text()
    assert len(losses(folder)) == STEPS
    assert losses(folder) == pytest.approx(trained, rel=1e-3)


@pytest.mark.parametrize("how", ["killed", "unplugged"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_ends_the_run_which_the_other_resumes(machines, alone, file, tmp_path, lost, how):
    partitioned, trained = alone
    folder = shutil.copytree(partitioned, tmp_path / "run")
    for machine in machines:
        machine.start(tmp_path / f"{machine.number}.log", "sft", file, "--output_dir", folder)
    wait_for_checkpoint(folder, *machines)
    left, gone = machines[1 - lost], machines[lost]
    began = time.monotonic()
    gone.kill() if how == "killed" else gone.unplug()
    status, lines = left.end(70)
    seconds = time.monotonic() - began
    assert status != 0
    assert len(lines) == 1, left.said.read_text()
    assert lines[0].endswith("the same command resumes from here")
    assert seconds < 60
    if how == "unplugged":  # it is cut off from the other just so
        status, lines = gone.end(30)
        assert status != 0
        assert len(lines) == 1, gone.said.read_text()
    assert not (folder / "sft" / "log_history.json").exists()
    log = succeeds("sft", file, "--output_dir", folder)
    resumed = json.loads((folder / "stages.json").read_text())["sft"]["resumed_from"]
    assert int(resumed.removeprefix("checkpoint-")) >= SAVE_STEPS, log
    assert len(losses(folder)) == STEPS
    assert losses(folder) == pytest.approx(trained, rel=1e-3)


def test_a_folder_that_the_machines_do_not_share_is_refused(machines, alone, file, tmp_path):
    partitioned, _ = alone
    for machine in machines:
        # As a disk of its own would be mounted.
        folder = shutil.copytree(partitioned, tmp_path / str(machine.number))
        machine.start(tmp_path / f"{machine.number}.log", "sft", file, "--output_dir", folder)
    (status, first), (other, second) = [machine.end(150) for machine in machines]
    assert status != 0
    assert other != 0
    [line] = first + second
    assert re.fullmatch(
        rf"lorapar: error: output_dir: {tmp_path}/[01] is another folder for process 1 on machine1; give one on a file "
        "system that all machines share",
        line,
    )
    assert not (tmp_path / "0" / "sft").exists()
