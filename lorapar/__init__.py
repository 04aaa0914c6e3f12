"""LoRA-PAR: fine-tune a language model as two systems, on one GPU.

Label → score → partition → SFT → GRPO → evaluate → export: each a function here, and all of them in turn with
`run("recipe.yaml")`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.attach import attach as attach
    from .adapter.attach import load_adapter as load_adapter
    from .adapter.layers import activate as activate
    from .errors import InputError as InputError
    from .evaluating.evaluate import evaluate as evaluate
    from .exporting.export import export as export
    from .labeling import label as label
    from .partitioning.choose import partition as partition
    from .partitioning.partition import Partition as Partition
    from .pipeline.running import run as run
    from .recipe.reading import load_recipe as load_recipe
    from .renewing.renew import renew as renew
    from .reporting.report import report as report
    from .scoring.score import score as score
    from .scoring.scores import Scores as Scores
    from .scoring.scores import load_scores as load_scores
    from .scoring.scores import save_scores as save_scores
    from .training.grpo import grpo as grpo
    from .training.optimizer import PartitionedAdamW as PartitionedAdamW
    from .training.sft import sft as sft

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which (0.50) warns on a CPU with AVX512-BF16 that a kernel of the package `kernels` is
# missing. Our layers never call that kernel (lorapar_kernels/bnb_weights.py), so nobody need install it. The filter is
# here because this file runs before any other of the package, and so before PEFT is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg)
)

# Each public name and the module that has it. No module directly under lorapar/ shares a name with one of them.
_WHERE = {
    "InputError": "errors",
    "Partition": "partitioning.partition",
    "PartitionedAdamW": "training.optimizer",
    "Scores": "scoring.scores",
    "activate": "adapter.layers",
    "attach": "adapter.attach",
    "evaluate": "evaluating.evaluate",
    "export": "exporting.export",
    "grpo": "training.grpo",
    "label": "labeling",
    "load_adapter": "adapter.attach",
    "load_recipe": "recipe.reading",
    "load_scores": "scoring.scores",
    "partition": "partitioning.choose",
    "renew": "renewing.renew",
    "report": "reporting.report",
    "run": "pipeline.running",
    "save_scores": "scoring.scores",
    "score": "scoring.score",
    "sft": "training.sft",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """The public object `name`, imported when first asked for, so that `lorapar --help` need not load TRL."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
