"""What is asked of a GPU: three programs, each a list of rows of steps; the steps of a row run beside each other.

The order is most telling first: whatever ends a run early, what it has by then is what was wanted most. Limits are
seconds on a GPU of Hopper's kind; together they may come to more than the budget, since most steps end well before.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One process: main() of bench/gpu/NAME.py.

    limit: seconds after which it is ended. least: seconds that must be left for it to be started.
    needs: packages without which it is not started. interpreted: in a rehearsal, under Triton's interpreter.
    """

    name: str
    limit: float
    least: float = 5.0
    needs: tuple[str, ...] = ()
    interpreted: bool = False


Row = tuple[Step, ...]

KERNELS: tuple[Row, ...] = (
    # The CPU's cores compile while the GPU's own rates are measured; nothing else of this row needs the GPU.
    (Step("ceilings", 60), Step("compiling", 90), Step("build", 90)),
    (
        Step("correctness", 75, interpreted=True),
        Step("native_ops", 60),
        Step("sanitizer", 90, interpreted=True),
    ),
    (Step("layer", 100, least=20, interpreted=True),),
    (Step("probes", 30),),
    (Step("decoder", 130, least=20, needs=("peft", "transformers"), interpreted=True),),
    (Step("short", 60, least=15, interpreted=True),),
    (Step("adamw", 30),),
    (Step("selection", 30),),
    (Step("scoring", 120, least=25, needs=("peft", "transformers")),),
    (Step("matrix", 500, least=20, needs=("pytest", "hypothesis")),),
)
TRAINING: tuple[Row, ...] = (
    # Without bitsandbytes the NF4 cases are left out, each with a line, and the bf16 ones run.
    (Step("training_step", 280, least=40, needs=("peft", "transformers")),),
    (Step("training_context", 140, least=40, needs=("peft", "transformers")),),
    (Step("training_plan", 90, least=40, needs=("peft", "transformers")),),
)
METHOD: tuple[Row, ...] = (
    (Step("method_quickstart", 240, least=60, needs=("trl", "datasets", "reasoning_gym", "gguf")),),
    (Step("method_study", 500, least=30, needs=("trl", "datasets", "reasoning_gym", "gguf")),),
)

PROGRAMS: dict[str, tuple[Row, ...]] = {"kernels": KERNELS, "training": TRAINING, "method": METHOD}


def steps(program: str) -> list[Step]:
    """The program's steps in their order."""
    return [step for row in PROGRAMS[program] for step in row]
