"""PEFT's own tests of LoRA, once with PEFT's layers and once with ours: what passes there and not here (`make peers`).

    python -m tests.peers.run [-k EXPRESSION] [--layers accelerated]

With `--layers accelerated` ours are what `lorapar_kernels.accelerate` makes of PEFT's, and not `lorapar.attach`'s.

The tests are those of the installed PEFT's version: the folder that PEFT_SOURCE names (a checkout), else its source
package from the index, unpacked under build/peers. They need what PEFT's tests need: pip install -e '.[peers]'.
Models are random ones under the names that the tests ask the hub for (stand_ins.py), and nothing is fetched;
PEERS_HUB=1 takes the hub's instead, which runs more of the tests.

differences.toml names each test that may differ, with the reason. Any other difference fails, and so does a test in it
that differs no more.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
WORK = ROOT / "build" / "peers"
# What needs a GPU, several of them, or packages of other projects; what takes minutes and makes no layer of its own.
LEFT_OUT = ("common_gpu", "gpu_examples", "gptqmodel", "lora_megatron", "stablediffusion", "torch_compile",
            "quantization", "vision_models", "hub_features")  # fmt: skip
# Tests of LoRA whose names do not say so.
ABOUT_LORA = ("lora", "initialization", "tuners_utils", "low_level", "mixed", "other", "helpers", "target_parameters",
              "trainable_tokens")  # fmt: skip
Results = dict[str, dict[str, Any]]


def source() -> Path:
    """A folder that holds `tests/` of the installed PEFT's version."""
    if os.environ.get("PEFT_SOURCE"):
        return Path(os.environ["PEFT_SOURCE"]).resolve()
    version = importlib.metadata.version("peft")
    folder = WORK / f"peft-{version}"
    if not (folder / "tests").is_dir():
        WORK.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", str(WORK), f"peft=={version}"], check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as package:
            package.extractall(WORK, filter="data")
    (folder / "tests" / "__init__.py").touch()
    return folder


def outcomes(layers: str, where: Path, chosen: list[str], again: str = "") -> Results:
    """What came of each test with `layers` ("theirs", "ours" or "accelerated"); `chosen`: pytest's arguments."""
    WORK.mkdir(parents=True, exist_ok=True)
    results, settings = WORK / f"{layers}{again}.json", WORK / "pytest.ini"
    results.unlink(missing_ok=True)
    settings.write_text("[pytest]\n", encoding="utf-8")
    path = os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LORAPAR_PEERS": layers, "LORAPAR_PEERS_RESULTS": str(results),
    }  # fmt: skip
    if os.environ.get("PEERS_HUB") != "1":
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(WORK / "hub"), "HF_HUB_CACHE": str(WORK / "hub" / "hub")}
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(where), "-p", "peers_plugin"]
    quiet = ["-p", "no:cacheprovider", "-q", "--tb=line", "-W", "ignore", "--continue-on-collection-errors"]
    with open(WORK / f"{layers}{again}.log", "w", encoding="utf-8") as log:
        subprocess.run([*command, *quiet, *chosen], cwd=where, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not results.is_file():
        raise SystemExit(f"pytest wrote no results; see {WORK / f'{layers}{again}.log'}")
    return json.loads(results.read_text(encoding="utf-8"))


def differ(theirs: Results, ours: Results) -> list[str]:
    """The tests that pass with PEFT's layers and not with ours."""
    passed = [test for test, result in theirs.items() if result["outcome"] == "passed"]
    return [test for test in passed if ours.get(test, {}).get("outcome") != "passed"]


def uncollected(results: Results) -> dict[str, str]:
    """{file: why} of the files whose tests could not even be read, of which nothing is known."""
    return {test: result["why"] for test, result in results.items() if result["outcome"] == "uncollected"}


def expected() -> dict[str, str]:
    """{test: the reason why it may differ}."""
    listed = tomllib.loads((HERE / "differences.toml").read_text(encoding="utf-8")).get("difference", [])
    return {test: entry["reason"] for entry in listed for test in entry["tests"]}


def counts(results: Results) -> str:
    outcomes = [result["outcome"] for result in results.values()]
    return ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.run", description="PEFT's tests with our layers")
    parser.add_argument("-k", dest="expression", help="pytest's own: of those tests, the ones that this names")
    parser.add_argument("--layers", choices=["ours", "accelerated"], default="ours", help="which of our layers")
    given = parser.parse_args(arguments)
    where = source()
    if os.environ.get("PEERS_HUB") != "1":
        from .stand_ins import write_stand_ins

        write_stand_ins(WORK / "hub" / "hub")
    files = [
        f"tests/{path.name}"
        for path in sorted((where / "tests").glob("test_*.py"))
        if "LoraConfig" in path.read_text(encoding="utf-8") and path.stem.removeprefix("test_") not in LEFT_OUT
    ]
    chosen = [*files, "-k", f"({' or '.join(ABOUT_LORA)})" + (f" and ({given.expression})" if given.expression else "")]
    began = time.perf_counter()
    theirs, ours = outcomes("theirs", where, chosen), outcomes(given.layers, where, chosen)
    reasons = expected()
    differing = differ(theirs, ours)
    # What a machine under load or a draw of random numbers decides differs once and not again.
    surprising = [test for test in differing if test not in reasons]
    if surprising:
        again = [outcomes(layers, where, surprising, again="_again") for layers in ("theirs", given.layers)]
        surprising = differ(*again)
        differing = [test for test in differing if test in reasons or test in surprising]
        ours |= {test: again[1][test] for test in surprising}
    vanished = [test for test in reasons if theirs.get(test, {}).get("outcome") == "passed" and test not in differing]
    passed = [test for test, result in theirs.items() if result["outcome"] == "passed"]
    same = len(passed) - len(differing)
    print(f"PEFT {importlib.metadata.version('peft')}, {len(files)} files, {time.perf_counter() - began:.0f} s")
    print(f"with PEFT's layers: {counts(theirs)}")
    print(f"with ours: {counts(ours)}; {sum(result['ours'] for result in ours.values())} tests made a layer of ours")
    print(f"{len(passed)} pass with PEFT's layers, {same} of them with ours")
    for test in differing:
        if test in reasons:
            print(f"  expected: {test}\n    {reasons[test]}\n    {ours.get(test, {}).get('why', 'not run')}")
    for test in surprising:
        print(f"  UNEXPECTED: {test}\n    {ours.get(test, {}).get('why', 'not run')}")
    for test in vanished:
        print(f"  NO LONGER DIFFERS, so it may leave differences.toml: {test}")
    missing = uncollected(theirs) | uncollected(ours)
    for file, why in missing.items():
        print(f"  NOT READ, install what it needs (pip install -e '.[peers]'): {file}\n    {why}")
    return 1 if surprising or vanished or missing or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
