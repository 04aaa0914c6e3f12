"""What many tests share: a two-layer Llama of random weights, a byte tokenizer, and a recipe for them."""

import os
import random
from pathlib import Path

import pytest

# Before torch is imported: two test threads on two cores are slower than one each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whatever ran before it: alone, in another order, in another process."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load: 2 layers, hidden 64, byte-level tokens."""
    from tests.tiny import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path):
    """A fresh (model, tokenizer) pair in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="float32")
    return model, AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def gsm8k() -> Path:
    """The folder of GSM8K's train.jsonl and test.jsonl; the test is skipped without it."""
    folder = os.environ.get("LORAPAR_GSM8K")
    if not folder:
        pytest.skip("LORAPAR_GSM8K is not set: it names a folder with GSM8K's train.jsonl and test.jsonl")
    return Path(folder)
