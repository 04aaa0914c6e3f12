"""Models by hub id, at a revision, and with code of their own: a whole run out of a hub's cache, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny import tiny_model, tiny_tokenizer

from .driver import SOURCES, recipe_values, write_recipe

pytestmark = pytest.mark.slow
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

print("code of the folder ran")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_model(folder: Path, seed: int) -> Path:
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def hub(home: Path, **models: Path) -> None:
    """A cache as huggingface_hub keeps it, of owner/tiny: {revision: folder}."""
    place = home / "hub" / "models--owner--tiny"
    (place / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(models.items()):
        commit = f"{number}" * 40
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)


def in_process_of_its_own(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "lorapar", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def short_recipe(path: Path, **model: object) -> Path:
    values = recipe_values(Path("unused")) | {"model": {"dtype": "float32", **model}, "stages": ["sft"]}
    return write_recipe(path, values | {"export": {"merged": True}, "data": {"sources": SOURCES, "held_out": 6}})


def test_a_hub_id_at_a_revision_goes_through_a_whole_run(tmp_path: Path):
    """`main` holds other weights, so what is loaded without the revision has other logits, and export would fail."""
    main, second = write_model(tmp_path / "main", 0), write_model(tmp_path / "second", 1)
    hub(tmp_path / "home", main=main, second=second)
    recipe = short_recipe(tmp_path / "r.yaml", name="owner/tiny", revision="second")
    run = tmp_path / "run"
    done = in_process_of_its_own(tmp_path / "home", "run", recipe, "--output_dir", run)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "stages.json").read_text())["export"]
    assert max(record["adapter_logit_difference"], record["merged_logit_difference"]) < 1e-3
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/tiny"
    # What no adapter sits on is the revision's own.
    merged, of_second = (load_file(folder / "model.safetensors") for folder in (run / "merged", second))
    assert (merged["model.embed_tokens.weight"] == of_second["model.embed_tokens.weight"]).all()


def test_a_hub_id_with_pickled_weights_alone_or_unknown_is_one_line(tmp_path: Path):
    pickled = write_model(tmp_path / "pickled", 0)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub(tmp_path / "home", main=pickled)
    for name in ("owner/tiny", "owner/nothing"):
        recipe = short_recipe(tmp_path / "r.yaml", name=name)
        run = tmp_path / name.replace("/", "-")
        done = in_process_of_its_own(tmp_path / "home", "run", recipe, "--output_dir", run)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"lorapar: error: model.name: '{name}' could not be loaded: ")
        assert "Traceback" not in done.stderr


def test_code_of_a_model_s_own_runs_only_where_the_recipe_says_so(tmp_path: Path):
    folder = write_model(tmp_path / "own", 0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    run = tmp_path / "run"
    done = in_process_of_its_own(tmp_path / "home", "run", short_recipe(tmp_path / "a.yaml", name=str(folder)),
                                 "--output_dir", run)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("lorapar: error: model.trust_remote_code: ")
    assert "code of the folder ran" not in done.stdout
    allowed = short_recipe(tmp_path / "b.yaml", name=str(folder), trust_remote_code=True)
    done = in_process_of_its_own(tmp_path / "home", "run", allowed, "--output_dir", run, "--update")
    assert done.returncode == 0, done.stderr
    assert "code of the folder ran" in done.stdout
    assert (run / "merged" / "own.py").is_file()
