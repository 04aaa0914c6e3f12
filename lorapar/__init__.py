"""LoRA-PAR: fine-tune a language model as two systems, on one GPU.

Label → score → partition → SFT → GRPO → evaluate → export: each a function here, and all of them in turn with
`run("recipe.yaml")`.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter.attach import attach, load_adapter
    from .adapter.layers import activate
    from .errors import InputError
    from .evaluating.evaluate import evaluate
    from .exporting.export import export
    from .labeling import label
    from .partitioning.choose import partition
    from .partitioning.partition import Partition
    from .pipeline.running import run
    from .recipe.reading import load_recipe
    from .reporting.report import report
    from .scoring.score import score
    from .scoring.scores import Scores, load_scores, save_scores
    from .training.grpo import grpo
    from .training.optimizer import PartitionedAdamW
    from .training.sft import sft

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which (0.50) warns on a CPU with AVX512-BF16 that a kernel of the package `kernels` is
# missing. Our layers never call that kernel (layers_bnb.py), so nobody need install it. Said here, before any import of
# PEFT by this package.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg)
)

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
    "report": "reporting.report",
    "run": "pipeline.running",
    "save_scores": "scoring.scores",
    "score": "scoring.score",
    "sft": "training.sft",
}
__all__ = [
    "InputError",
    "Partition",
    "PartitionedAdamW",
    "Scores",
    "activate",
    "attach",
    "evaluate",
    "export",
    "grpo",
    "label",
    "load_adapter",
    "load_recipe",
    "load_scores",
    "partition",
    "report",
    "run",
    "save_scores",
    "score",
    "sft",
]


def _lazily(name: str) -> property:
    """The public object `name`, imported when first asked for, so that `lorapar --help` need not load TRL.

    Several functions share their module's name. The import system binds a submodule on its package once it is loaded;
    the setter ignores that, so that `lorapar.score` is the function always.
    """

    def get(_: types.ModuleType):
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)

    def ignore(_: types.ModuleType, value: object) -> None:
        del value

    return property(get, ignore)


class _Package(types.ModuleType):
    pass


for _name in __all__:
    setattr(_Package, _name, _lazily(_name))
sys.modules[__name__].__class__ = _Package
