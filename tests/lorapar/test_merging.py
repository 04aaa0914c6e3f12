"""Which files of a checkpoint are its weights, and what a merged checkpoint is made of."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorapar.adapter.attach import save_adapter
from lorapar.adapter.merging import merge_checkpoint, weight_files
from tests.lorapar import ggufs
from tests.lorapar.test_hub import hub
from tests.tiny import tiny_model


@pytest.fixture
def sharded(tmp_path):
    """A model in shards, with other safetensors beside them that transformers does not read."""
    place = tmp_path / "model"
    tiny_model().save_pretrained(place, max_shard_size="50KB")
    for name in ("consolidated", "model-00001-of-00009", "zzz"):
        save_file({"norm.weight": torch.zeros(3)}, place / f"{name}.safetensors")
    return place


def shards_of(place):
    index = json.loads((place / "model.safetensors.index.json").read_text())
    return sorted(set(index["weight_map"].values()))


def test_the_weights_of_a_folder_are_those_that_transformers_reads(sharded):
    index, files = weight_files(str(sharded))
    assert index == sharded / "model.safetensors.index.json"
    assert [path.name for path in files] == shards_of(sharded)
    assert len(files) > 1
    # The whole file comes before an index.
    save_file({"norm.weight": torch.zeros(3)}, sharded / "model.safetensors")
    assert weight_files(str(sharded)) == (None, [sharded / "model.safetensors"])
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"transformers_weights": "zzz.safetensors"}))
    assert weight_files(str(sharded)) == (None, [sharded / "zzz.safetensors"])


def test_safetensors_of_other_names_are_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    assert weight_files(str(tmp_path)) == (None, [])


@pytest.mark.slow
def test_the_weights_of_a_hub_id_are_those_of_its_index(sharded, tmp_path):
    hub(tmp_path / "home", main=sharded)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    code = "from lorapar.adapter.merging import weight_files; print(*(p.name for p in weight_files('owner/tiny')[1]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.split() == shards_of(sharded), done.stderr


def test_a_merged_checkpoint_is_made_of_the_model_s_own_files(tmp_path):
    place, out = ggufs.save(tmp_path / "model"), tmp_path / "out"
    model = ggufs.moved(place)
    save_adapter(model, tmp_path / "adapter")
    for other in ("", "beside"):
        if other:
            zeros = {name: torch.zeros_like(one) for name, one in load_file(place / "model.safetensors").items()}
            save_file(zeros, place / "model_backup.safetensors", metadata={"format": "pt"})
        (out / other).mkdir()
        merge_checkpoint(str(place), tmp_path / "adapter", out / other, torch.float32)
    assert [path.name for path in (out / "beside").glob("*.safetensors")] == ["model.safetensors"]
    one, two = load_file(out / "model.safetensors"), load_file(out / "beside" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one | two)
