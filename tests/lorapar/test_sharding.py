"""A base that is sharded over processes computes, is merged and is proved unchanged as the whole one (sharded.py)."""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lorapar.distributed import sharding
from lorapar.errors import InputError
from tests.architectures import make
from tests.launched import launch

pytestmark = pytest.mark.slow
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'lorapar[bnb]')",
)
BASES = pytest.mark.parametrize("base", ["fp32", pytest.param("nf4", marks=needs_bnb)])
BLOCK = ["input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm",
         "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]  # fmt: skip
# Of sums in another order; on the machines tried everything but the loop over three processes is equal to the bit.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def found(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict]]:
    """`found("base", "nf4", 2)`: what each of two processes found, each launched once."""

    @functools.cache
    def run(what: str, base: str, processes: int) -> list[dict]:
        out = tmp_path_factory.mktemp(f"{what}-{base}")
        done = launch(processes, ["-m", "tests.lorapar.sharded", what, str(tiny_folder), base, str(out)], timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]

    return run


@BASES
def test_each_process_holds_its_share_of_the_blocks_and_the_rest_whole(found, base):
    for of in found("base", base, 2):
        assert of["sharded"] == [True, False]
        assert of["share"] == 0.5
        assert of["in parts"] == [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in BLOCK]
        assert of["whole"] == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
        # Neither the weights that were there before nor those gathered for a forward are kept.
        assert of["kept"] == 0
        assert of["let go"]


@BASES
@pytest.mark.parametrize("way", ["gradients", "not reentrant", "reentrant", "evaluated", "attached before", "stepped"])
def test_loss_gradients_and_a_step_are_those_of_the_whole_model(found, base, way):
    """With dropout, plain and with both kinds of gradient checkpointing; siblings computed together."""
    for of in found("base", base, 2):
        assert of[way] <= ROUNDING
        assert of["siblings"][0] == of["siblings"][1]
        assert of["siblings"][0].count("shared") >= 7


@BASES
def test_answers_are_those_of_the_whole_model_where_processes_stop_at_different_steps(found, base):
    one, two = (of["answers"] for of in found("base", base, 2))
    assert one[0] == one[1]
    assert two[0] == two[1]
    assert len(one[0][-1]) == 7 < len(two[0][-1]) == 17


@BASES
def test_scores_merged_weights_and_a_start_from_the_base_are_those_of_the_whole_model(found, base):
    for of in found("base", base, 2):
        assert of["scores"] <= ROUNDING
        assert of["merged"]
        assert of["pissa"] <= ROUNDING


@BASES
def test_the_proof_is_of_the_whole_adapter_and_of_every_part_of_the_base(found, base):
    for of in found("base", base, 2):
        sharded, whole = of["proof"]
        assert sharded == whole
        assert sharded["moved"] == sharded["active"] > 4000
        assert of["adapters differ"] == "sft: the adapter of process 1 is not that of process 0"
        # Changed in process 1, and said in both.
        assert of["base changed"].endswith("self_attn.q_proj.base_layer.weight of the frozen base changed in process 1")


@BASES
def test_one_process_saves_the_adapter_alone_and_it_loads_onto_a_sharded_base(found, base):
    alone = found("base", base, 2)[0]
    assert alone["state"] == 24
    assert alone["class"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    for of in found("base", base, 2):
        assert of["loaded"] == 0
        assert of["same answers"]


@BASES
def test_sharding_draws_no_random_numbers(found, base):
    assert all(of["stream"] for of in found("base", base, 2))


@needs_bnb
@pytest.mark.parametrize("form", ["floating", "quantised"])
def test_other_four_bit_bases_are_sharded_too(found, form):
    for of in found("stored", "nf4", 2):
        assert of[form] <= ROUNDING
        assert of[f"{form} merged"]


def test_eight_bits_are_refused(found):
    for of in found("base", "fp32", 2):
        assert of["int8"] == "lora.base: int8 weights cannot be sharded over processes; use nf4 or bf16"


@BASES
def test_a_loop_in_which_the_adapter_is_sharded_too_steps_as_the_whole_one_does(found, base):
    ranks = found("adapter", base, 3)
    # Four rows of A over three processes: the third has none.
    assert [of["empty"] for of in ranks] == [0, 0, 12]
    for rank, of in enumerate(ranks):
        assert of["stepped"] < 1e-5
        assert of["proof"][0] == of["proof"][1]
        assert of["state bytes"][0] == of["state bytes"][1] > 0
        here = f"this process holds part {rank} of 3 of a sharded adapter"
        assert of["whole state"] == f"optimizer state: it belongs to a whole adapter, {here}"
        assert of["other part"] == f"optimizer state: it belongs to part 0 of 7 of a sharded adapter, {here}"
        assert of["inactive changed"].endswith("q_proj.lora_A.default.weight changed in process 0")


def test_every_architecture_with_a_list_of_blocks_is_sharded(found):
    for of in found("architectures", "fp32", 2):
        refused = {name for name, result in of.items() if isinstance(result, str)}
        assert refused == {"looped"}
        assert of["looped"] == "model.name: LoopedForCausalLM has no list of decoder blocks, and cannot be sharded"
        assert all(off <= ROUNDING for blocks, off in (of[name] for name in of.keys() - refused))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_multimodal", "gpt_neox"])
def test_the_decoder_blocks_are_found_by_their_class_or_by_their_list(name):
    model = make(name)
    blocks = sharding.decoder_blocks(model)
    assert len(blocks) == (3 if name == "gemma3_multimodal" else 2)
    model._no_split_modules = None
    assert sharding.decoder_blocks(model)[-2:] == blocks[-2:]


def test_one_process_holds_all():
    model = make("llama")
    sharding.shard(model, torch.device("cpu"))
    assert not sharding.is_sharded(model)
    with pytest.raises(InputError, match="model.name: Linear has no list of decoder blocks"):
        sharding.decoder_blocks(nn.Linear(2, 2))
