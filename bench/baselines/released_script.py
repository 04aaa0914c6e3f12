"""How the script released with the paper scores and selects (its section 3.3), as the thing to be faster than.

One example a step through PEFT's own LoRA layers; after each backward `.grad` of every factor goes into Σg and Σg²
(fp32, beside the parameter). The importance then becomes a data frame with a row an element, sorted descending and
walked with `iterrows` until θ of the total is reached. Only what the timing needs is here: no CSV, no zip, no files.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

Example = tuple[list[int], list[int]]  # token ids, labels (-100 on the prompt)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every factor by its name in `model.named_parameters()`."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def score(model: nn.Module, examples: Sequence[Example], device: str = "cpu") -> dict[str, Tensor]:
    """|g φ − ½ F φ²| by parameter name: g, F the means over examples of the gradient and of its square.

    The model is a PeftModel, in eval mode. Its own loss is the mean over an example's answer tokens.
    """
    factors = trainable(model)
    gradient = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    square = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    for ids, labels in examples:
        model.zero_grad()
        input_ids, targets = torch.tensor([ids], device=device), torch.tensor([labels], device=device)
        model(input_ids=input_ids, labels=targets, use_cache=False).loss.backward()
        for name, factor in factors.items():
            assert factor.grad is not None
            gradient[name] += factor.grad
            square[name] += factor.grad**2
    model.zero_grad()
    importance = {}
    with torch.no_grad():
        for name, factor in factors.items():
            g, fisher = gradient[name] / len(examples), square[name] / len(examples)
            importance[name] = (g * factor - 0.5 * fisher * factor**2).abs()
    return importance


def frame_of(importance: dict[str, Tensor]) -> "pd.DataFrame":
    """A row an element: parameter, row, column, importance."""
    import pandas as pd

    rows = []
    for name, values in importance.items():
        for i, line in enumerate(values.tolist()):
            for j, value in enumerate(line):
                rows.append({"parameter": name, "row": i, "column": j, "importance": value})
    return pd.DataFrame(rows)


def select(frame: "pd.DataFrame", theta: float) -> set[tuple[str, int, int]]:
    """The elements of the shortest descending prefix that holds θ of the total importance."""
    ordered = frame.sort_values("importance", ascending=False, kind="stable")
    threshold = theta * frame["importance"].sum()
    kept, mass = set(), 0.0
    for _, element in ordered.iterrows():
        kept.add((element["parameter"], element["row"], element["column"]))
        mass += element["importance"]
        if mass >= threshold:  # type: ignore[reportGeneralTypeIssues]
            break
    return kept
