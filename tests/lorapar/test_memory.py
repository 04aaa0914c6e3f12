"""The plan: what it counts and says, what is refused before weights load, and how running out of memory ends."""

import copy
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl

from lorapar import stage
from lorapar.errors import InputError
from lorapar.files import read_jsonl
from lorapar.memory import advice as remedies
from lorapar.memory import needs as plan
from lorapar.memory.advice import changes, out_of_memory, parse_bytes
from lorapar.memory.needs import Lengths, describe, need
from lorapar.memory.process import (
    available_bytes,
    is_out_of_memory,
    peak_memory_bytes,
    reset_peak_memory,
    resident_bytes,
)
from lorapar.memory.step import Simulation, TrainingStep, step_bytes
from lorapar.memory.switches import checkpointing
from lorapar.model.load import load_model
from lorapar.recipe.reading import load_recipe, parse
from tests.architectures import LoopedConfig, LoopedForCausalLM, LoopedModel, make, save
from tests.tiny import TARGETS, tiny_tokenizer

from .driver import lorapar, recipe_values, refused, succeeds, write_recipe


@pytest.fixture
def steady(monkeypatch):
    """A process that does not grow between two plans."""
    monkeypatch.setattr(plan, "resident_bytes", lambda: 10**9)


LENGTHS = Lengths(200, 400, "a test")
KEYS = re.compile(r"(score|sft|grpo|evaluate|lora)\.")


def recipe_of(folder, **sections):
    values = recipe_values(folder)
    for section, keys in sections.items():
        values[section] = {**values[section], **keys} if isinstance(keys, dict) else keys
    return parse(values)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 15 * 10**8), ("1000", 1000)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 lemons", "-1GB", "0GB", "8GB and more"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=f"--vram: got {text!r}, expected a size such as 8GB"):
        parse_bytes(text)


@pytest.mark.parametrize(("start", "rank"), [("paper", 4), ("twin", 8)])
def test_weights_and_elements_are_counted_exactly(tiny_folder, start, rank):
    recipe = recipe_of(tiny_folder, start=start)
    model = load_model(recipe.model)
    layers = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
    assert layers
    found = describe(recipe)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.elements == rank * sum(m.in_features + m.out_features for m in layers)


def test_a_sharded_base_is_planned_for_by_the_processes_that_there_are_to_be(tmp_path, monkeypatch):
    shape = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=12, vocab_size=258,
                                     num_attention_heads=4)  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    model.save_pretrained(tmp_path)
    sharded = recipe_of(tmp_path, model={"name": str(tmp_path), "dtype": "float32", "fsdp": True})
    whole = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    for count in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        # A process's part of the blocks, and two that are whole.
        held = whole if count == 1 else whole - 12 * block + 12 * block // count + 2 * block
        assert abs(describe(sharded).weights - held) <= 1
        assert describe(recipe_of(tmp_path, model={"name": str(tmp_path), "dtype": "float32"})).weights == whole


def test_quantised_forms_weigh_what_they_hold(tiny_folder):
    plain, four, eight = (describe(recipe_of(tiny_folder, lora={"r": 4, "base": base} if base else {}))
                          for base in (None, "nf4", "int8"))  # fmt: skip
    model = load_model(recipe_of(tiny_folder).model)
    linear = sum(m.weight.numel() for n, m in model.named_modules()
                 if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings())  # fmt: skip
    assert plain.weights - four.weights == pytest.approx(linear * (4 - 0.516), rel=2e-3)
    assert plain.weights - eight.weights == pytest.approx(linear * 3, rel=5e-2)


def test_a_step_needs_more_with_more_rows_tokens_and_layers_and_less_when_it_recomputes(tiny_folder):
    config = load_model(recipe_of(tiny_folder).model).config

    def size(layers=8, **keys):
        changed = copy.deepcopy(config)
        changed.num_hidden_layers = layers
        return step_bytes(changed, TrainingStep(**({"rows": 2, "tokens": 64} | keys)), torch.float32, "cpu")

    assert size(rows=4) == pytest.approx(2 * size(), rel=0.02)
    assert size(tokens=128) > 1.9 * size()
    assert size(layers=16) > 1.8 * size()
    assert size(checkpointing=True) < 0.5 * size()
    # Off-loaded, no layer adds to the peak: what is left is what one layer makes on its way.
    assert size(offloading=True) < 0.3 * size()
    assert size(layers=16, offloading=True) == pytest.approx(size(offloading=True), rel=0.02)
    assert size(checkpointing=True, offloading=True) < size(checkpointing=True)


def test_what_a_step_keeps_is_what_autograd_saves(tiny_folder):
    """The bytes that a real forward saves for its backward, parameters aside, are the simulated step's but for what is
    made on the way."""
    import lorapar as package
    from tests.lorapar.test_adapter import config as lora

    model = package.attach(load_model(recipe_of(tiny_folder).model), lora(), start="paper")
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.get_base_model().base_model(input_ids=torch.ones(4, 64, dtype=torch.long), use_cache=False)
    kept = sum(saved.values())
    assert out.last_hidden_state.requires_grad
    simulated = step_bytes(model.config, TrainingStep(4, 64), torch.float32, "cpu")
    assert kept <= simulated * 1.02
    assert simulated < 1.5 * kept


@pytest.mark.parametrize(
    ("name", "layers", "keys"),
    [
        ("gemma3", 12, {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2}),
        ("qwen3_5", 4, {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
        ("gpt_oss", 4, {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3_moe", 5, {"mlp_only_layers": [0, 3]}),
        ("llama", 1, {}),
    ],
)
def test_a_few_layers_of_each_kind_stand_for_all(name, layers, keys):
    """Experts in fp32 too, which torch does not multiply without data."""
    model_config = make(name).config
    model_config.num_hidden_layers = layers
    for key, value in keys.items():
        setattr(model_config, key, value)
    for dtype in (torch.float32, torch.bfloat16):
        taken = step_bytes(model_config, TrainingStep(2, 64), dtype, "cpu")
        whole = Simulation(model_config, dtype, "cpu")
        assert taken == pytest.approx(whole.peak(list(range(layers)), TrainingStep(2, 64)), rel=0.01)


def test_a_view_of_experts_weights_is_no_activation():
    """transformers transposes them, a layer's whole experts; they stay where they are."""
    few = make("mixtral").config
    many = make("mixtral").config
    many.num_local_experts = 64
    sizes = [step_bytes(c, TrainingStep(1, 16), torch.bfloat16, "cpu") for c in (few, many)]
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("name", ["gemma3_multimodal", "mixtral"])
def test_the_verb_plans_for_people_s_own_models(name, tmp_path):
    save(name, tmp_path / name)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path / name))
    code, out, err = lorapar("plan", recipe, "--vram", "100GB")
    assert code == 0, err
    assert out.splitlines()[1].startswith("lora: ")
    assert "% of the matrix weights" in out.splitlines()[1]
    assert out.splitlines()[-1] == "fits"


class AskingConfig(LoopedConfig):
    model_type = "tests_asking"

    def __init__(self, **keys):
        super().__init__(**keys)


class AskingInner(LoopedModel):
    """Looks at the tokens to know what to do, which no simulation without data can."""

    config_class = AskingConfig

    def forward(self, input_ids, *rest, **unused):
        assert int(input_ids.max()) < self.config.vocab_size
        return super().forward(input_ids, *rest, **unused)


class AskingModel(LoopedForCausalLM, transformers.GenerationMixin):
    config_class, inner = AskingConfig, AskingInner


transformers.AutoConfig.register("tests_asking", AskingConfig)
transformers.AutoModelForCausalLM.register(AskingConfig, AskingModel)


def test_a_model_that_cannot_be_simulated_is_run_all_the_same(tmp_path, monkeypatch):
    AskingModel(AskingConfig()).save_pretrained(tmp_path / "asking")
    tiny_tokenizer().save_pretrained(tmp_path / "asking")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path / "asking"))
    code, out, err = lorapar("plan", recipe, "--vram", "100GB")
    assert code == 1, err
    assert "Traceback" not in err
    lines = out.splitlines()
    assert lines[-1] == "not known to fit"
    assert "score, sft, grpo: activations not counted, the model does not run without data (DataDep" in lines[-2]
    assert re.search(r"^sft .* \? .* > \d", out, re.MULTILINE)
    code, out, err = lorapar("plan", recipe, "--vram", "1MB")
    assert code == 1, err
    assert out.splitlines()[-1] == "does not fit"
    # A run near its limit.
    monkeypatch.setattr(remedies, "_at_most", lambda *_: 10**15)
    said = out_of_memory("sft", load_recipe(recipe), Lengths(20, 40, "a test"))
    assert said.startswith("sft: out of memory")
    succeeds("label", recipe, "--output_dir", tmp_path / "run")
    log = succeeds("score", recipe, "--output_dir", tmp_path / "run")
    assert log.count("score: not known to fit in memory, as the model does not run without data (DataDependent") == 1
    assert "score: done" in log


def test_a_model_that_cannot_be_made_without_weights_is_run_all_the_same(tiny_folder, monkeypatch, caplog):
    recipe = recipe_of(tiny_folder)

    def fails(*_):
        raise NotImplementedError("no meta here\nand more")

    monkeypatch.setattr(plan, "_describe", fails)
    monkeypatch.setattr(plan, "_MODELS", {})
    text, fits = remedies.table(recipe)
    assert not fits
    assert text.endswith("(NotImplementedError: no meta here), so its memory is not known")
    remedies.check_memory("sft", recipe, LENGTHS)
    assert caplog.messages == ["sft: not known to fit in memory, as the model does not run without data "
                               "(NotImplementedError: no meta here)"]  # fmt: skip
    assert out_of_memory("sft", recipe, LENGTHS).startswith("sft: out of memory")


def test_the_verb_says_what_fits_and_loads_no_weights(recipe_file, monkeypatch):
    def loads(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(stage, "load_model", loads)
    code, out, err = lorapar("plan", recipe_file, "--vram", "100GB")
    assert code == 0, err
    assert out.splitlines()[-1] == "fits"
    memory, _ = out.split("Work of each stage")
    rows = {line.split()[0]: line.split()[1:] for line in memory.splitlines() if line.split()[:1] in
            (["score"], ["sft"], ["grpo"], ["evaluate"])}  # fmt: skip
    for values in rows.values():
        assert sum(map(float, values[:-1])) == pytest.approx(float(values[-1]), abs=0.004)
    assert re.search(r"sft: up to [\d,]+ rows of \d+ tokens at once, or one row of [\d,]+ tokens", out)
    code, out, _ = lorapar("plan", recipe_file, "--vram", "1MB")
    assert code == 1
    assert out.splitlines()[-1] == "does not fit"
    refused(
        "plan", recipe_file, "--lora.target_modules", "[nope]", says=("lora.target_modules: got", "nope"), alone=True
    )
    refused("plan", recipe_file, "--vram", "much", says=("--vram: got 'much'",), alone=True)


@pytest.mark.parametrize("stage", ["score", "sft", "grpo", "evaluate"])
def test_each_remedy_makes_the_stage_fit(tiny_folder, steady, stage):
    recipe = recipe_of(
        tiny_folder,
        score={"batch_size": 64},
        sft={"per_device_train_batch_size": 64, "micro_batch_tokens": None},
        grpo={"per_device_train_batch_size": 64, "num_generations": 4},
        evaluate={"batch_size": 512},
    )
    before = need(recipe, LENGTHS, stage)
    room = before.total - (before.activations + before.logits) // 3
    found = remedies.remedies(recipe, LENGTHS, stage, room)
    assert 1 <= len(found) <= 3
    assert len({line.split(":")[0] for line in found}) == len(found)
    offered = dict(changes(recipe, stage))
    for line in found:
        changed = copy.deepcopy(recipe)
        offered[line](changed)
        assert need(changed, LENGTHS, stage).total <= room < before.total


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_off_loading_is_offered_where_there_is_somewhere_to_go(tiny_folder, steady, monkeypatch, stage):
    recipe = recipe_of(tiny_folder)
    assert not [text for text, _ in changes(recipe, stage) if "activation_offloading" in text]
    monkeypatch.setattr(remedies, "describe", lambda recipe: dataclasses.replace(describe(recipe), device="cuda"))
    (change,) = [change for text, change in changes(recipe, stage) if "activation_offloading" in text]
    before = need(recipe, LENGTHS, stage)
    change(recipe)
    assert parse(recipe.as_dict()) == recipe
    assert recipe.as_dict()[stage]["activation_offloading"] is True
    assert need(recipe, LENGTHS, stage).activations < before.activations


def test_several_changes_together_where_none_is_enough(tiny_folder, steady):
    recipe = recipe_of(tiny_folder, sft={"per_device_train_batch_size": 64, "micro_batch_tokens": None})
    least = copy.deepcopy(recipe)
    for _, change in changes(recipe, "sft"):
        change(least)
    room = int(need(least, LENGTHS, "sft").total * 1.0001)
    (line,) = remedies.remedies(recipe, LENGTHS, "sft", room)
    assert " and " in line
    assert remedies.remedies(recipe, LENGTHS, "sft", room // 2) == []


def test_a_recipe_that_cannot_fit_is_refused_before_weights_load(changed_recipe, tmp_path, monkeypatch):
    recipe = changed_recipe(score={"examples": 8, "batch_size": 4096, "max_length": 512})
    monkeypatch.setattr(remedies, "available_bytes", lambda device: resident_bytes() + 10**8)
    monkeypatch.setattr(stage, "load_model", lambda *_: pytest.fail("weights were loaded"))
    said = refused("run", recipe, "--output_dir", tmp_path / "run", says=("score needs", "1. score.batch_size:"))
    assert KEYS.search(said)
    assert not (tmp_path / "run" / "scores.safetensors").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_running_out_of_memory_ends_with_advice_and_keeps_the_checkpoint(recipe_file, tmp_path, monkeypatch, error):
    from lorapar.progress import TrainingProgress

    def fails(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "on_step_end", fails)
        code, _, err = lorapar("run", recipe_file, "--output_dir", tmp_path / "run")
    assert code == 1
    lines = err.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("lorapar: error: sft: out of memory"))
    assert lines[at + 1].startswith("sft needs ")
    assert "to make it fit" in lines[at + 1]
    assert (tmp_path / "run" / "sft" / "checkpoint-2" / "trainer_state.json").is_file()
    log = succeeds("run", recipe_file, "--output_dir", tmp_path / "run")
    assert "checkpoint-2" in log


def test_other_failures_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_process_s_memory_is_what_the_system_says():
    before = resident_bytes()
    held = torch.ones(1 << 26)
    grown = resident_bytes() - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes
    assert available_bytes("cpu") > resident_bytes() > 1 << 26


def test_a_recipe_far_from_the_limit_is_not_simulated(finished, recipe_file, monkeypatch):
    recipe = parse(recipe_values_of(recipe_file))
    monkeypatch.setattr(plan, "step_bytes", lambda *_: pytest.fail("simulated"))
    rows = read_jsonl(finished / "labels.jsonl")
    remedies.check_memory("score", recipe, plan.lengths_of(recipe, rows))
    monkeypatch.setattr(remedies, "available_bytes", lambda device: 10**6)
    monkeypatch.setattr(plan, "_STEPS", {})
    with pytest.raises(pytest.fail.Exception, match="simulated"):
        remedies.check_memory("score", recipe, plan.lengths_of(recipe, rows))


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sft", "per_device_train_batch_size", 32),
        ("sft", "max_length", 100),
        ("grpo", "per_device_train_batch_size", 32),
        ("grpo", "max_completion_length", 2048),
        ("grpo", "gradient_accumulation_steps", 64),
        ("grpo", "beta", 0.5),
    ],
)
def test_what_the_recipe_does_not_set_is_trls_default(tiny_folder, steady, monkeypatch, stage, key, value):
    """Whatever that is in the TRL installed."""
    values = recipe_values(tiny_folder)
    values[stage].pop(key, None)
    values["sft"]["micro_batch_tokens"] = None
    recipe = parse(values)
    before = need(recipe, LENGTHS, stage)
    config = trl.SFTConfig if stage == "sft" else trl.GRPOConfig
    monkeypatch.setattr(config.__dataclass_fields__[key], "default", value)
    after = need(recipe, LENGTHS, stage)
    assert after != before
    values[stage][key] = value
    assert after == need(parse(values), LENGTHS, stage)


def test_recomputing_is_off_on_a_cpu_and_as_trl_has_it_elsewhere(tiny_folder, monkeypatch):
    recipe = recipe_of(tiny_folder)
    for section, config in ((recipe.sft, trl.SFTConfig), (recipe.grpo, trl.GRPOConfig)):
        del section.trainer["gradient_checkpointing"]
        for default in (True, False):
            monkeypatch.setattr(config.__dataclass_fields__["gradient_checkpointing"], "default", default)
            assert (checkpointing(section, "cpu"), checkpointing(section, "cuda")) == (False, default)
        section.trainer["gradient_checkpointing"] = True
        assert (checkpointing(section, "cpu"), checkpointing(section, "cuda")) == (True, True)


def test_a_row_that_stage_1_leaves_out_does_not_count(tiny_folder, steady):
    long = Lengths(200, 5000, "a test")
    recipe = recipe_of(tiny_folder, sft={"max_length": 100, "micro_batch_tokens": None})
    assert need(recipe, long, "sft") == need(recipe, dataclasses.replace(long, whole=100), "sft")
    # Scoring takes it.
    recipe.score.max_length = 10_000
    assert need(recipe, long, "score") != need(recipe, dataclasses.replace(long, whole=100), "score")


def test_the_gpu_that_the_model_is_on_is_asked(tiny_folder, monkeypatch):
    memory = [10**6, 10**12]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=memory[torch.device(device).index]))  # fmt: skip
    monkeypatch.setattr(plan, "step_bytes", lambda *_: pytest.fail("simulated"))
    recipe = recipe_of(tiny_folder, model={"device": "cuda:1"})
    remedies.check_memory("score", recipe, LENGTHS)


def test_the_peak_is_of_the_gpu_that_was_used(monkeypatch):
    reset, peaks = [], [10, 10**9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(peaks[1] > 10))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: peaks[device])
    reset_peak_memory()
    assert reset == [0, 1]
    assert peak_memory_bytes() == 10**9
    # Before CUDA is used there is nothing to reset, and resetting fails.
    peaks[1] = 0
    reset_peak_memory()
    assert reset == [0, 1]


def test_the_tokenizer_is_loaded_once(tiny_folder, monkeypatch):
    loaded = []
    load_tokenizer = plan.load_tokenizer
    monkeypatch.setattr(plan, "load_tokenizer", lambda model: loaded.append(model) or load_tokenizer(model))
    assert plan.lengths_of(recipe_of(tiny_folder)).of == "its data"
    assert len(loaded) == 1


def recipe_values_of(path):
    from lorapar.recipe.reading import read_recipe

    return read_recipe(path)


def test_a_plan_says_where_longer_rows_do_not_run(tmp_path):
    """MPT adds a table that ends at max_seq_len, which is shorter here than the rows that the limits are drawn from."""
    settings = transformers.MptConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=258, max_seq_len=512)
    transformers.MptForCausalLM(settings).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text, fits = remedies.table(parse(recipe_values(tmp_path / "model")), 1 << 40)
    assert "sft: the most rows and tokens are not known, as longer rows do not run (RuntimeError: " in text
    assert fits
