"""A pytest plugin for PEFT's tests: has every LoRA layer made as ours ("ours"), or accelerated as it is made
("accelerated"), where LORAPAR_PEERS says so, and writes down what came of each test.

Loaded by name (`-p peers_plugin`) and not out of the package `tests`, since PEFT's tests are a package of that name.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora.model import LoraModel

RESULTS = Path(os.environ["LORAPAR_PEERS_RESULTS"])
LAYERS = os.environ["LORAPAR_PEERS"]
OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"
# Other tuners, whose layers are none of LoRA's.
OTHERS = ("adalora", "gralora", "glora", "randlora", "tinylora", "unilora", "vblora")

_made = 0  # layers of ours, so far
_results: dict[str, dict[str, Any]] = {}


def pytest_configure() -> None:
    if LAYERS == "ours":
        _register_for_every_config()
    elif LAYERS == "accelerated":
        _accelerate_every_layer()


def _register_for_every_config() -> None:
    from torch import nn

    from lorapar.adapter.layers import MaskedLayer, MaskedLinear
    from lorapar.adapter.layers_bnb import LAYERS

    ours = {**LAYERS, nn.Linear: MaskedLinear}
    make = LoraModel._create_new_module

    def make_ours(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        global _made
        given = lora_config._custom_modules
        # A parameter's adapter is another layer. What a test registers itself goes first.
        if kwargs.get("parameter_name") is None:
            lora_config._custom_modules = {**(given or {}), **{k: v for k, v in ours.items() if k not in (given or {})}}
        try:
            made = make(lora_config, adapter_name, target, **kwargs)
        finally:
            lora_config._custom_modules = given
        _made += isinstance(made, MaskedLayer)
        return made

    LoraModel._create_new_module = staticmethod(make_ours)


def _accelerate_every_layer() -> None:
    from torch import nn

    import lorapar_kernels as lk
    from lorapar_kernels.peft_layers import FastLayer

    make = LoraModel._create_new_module

    def make_accelerated(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        global _made
        made = make(lora_config, adapter_name, target, **kwargs)
        with contextlib.suppress(ValueError):  # what it refuses stays PEFT's
            lk.accelerate(made)
        _made += isinstance(made, FastLayer)
        return made

    LoraModel._create_new_module = staticmethod(make_accelerated)


class _EveryModel(dict):
    """PEFT's tests ask the hub for each model once and count here which they have; offline it is never asked."""

    def __contains__(self, model: object) -> bool:
        return True

    def __missing__(self, model: object) -> int:
        return 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    about = [item for item in items if not any(other in item.nodeid.lower() for other in OTHERS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(about)])
    items[:] = about
    helpers: Any = sys.modules.get("tests.testing_utils")
    if OFFLINE and helpers is not None:
        helpers._HUB_MODEL_ACCESSES = _EveryModel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    before = _made
    result = yield
    _results.setdefault(item.nodeid, {"outcome": "skipped", "why": ""})["ours"] = _made > before
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        already = _results.get(report.nodeid, {}).get("outcome")
        if already != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = "" if crash is None else " ".join(str(crash.message).split())[:300]
            _results[report.nodeid] = {"outcome": report.outcome, "why": why}


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        why = str(report.longrepr).strip().splitlines()[-1]
        _results[report.nodeid] = {"outcome": "uncollected", "why": why, "ours": False}


def pytest_sessionfinish() -> None:
    RESULTS.write_text(json.dumps(_results, indent=1), encoding="utf-8")
