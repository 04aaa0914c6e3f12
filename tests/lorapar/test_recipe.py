"""A recipe is checked by key and type before anything happens."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

from lorapar import InputError, load_recipe
from lorapar.recipe.__main__ import reference
from lorapar.recipe.checks import REFUSED_LORA_KEYS, check_trainer_keys, check_value
from lorapar.recipe.reading import dump_yaml, parse, parse_yaml
from lorapar.recipe.sections import PartitionConfig, Recipe, changes_result
from lorapar.recipe.values import nested_class

from .driver import recipe_values, write_recipe

ROOT = Path(__file__).parents[2]


def values(**changes: object) -> dict:
    return {"model": "m", "data": {"sources": ["x.jsonl"]}, **changes}


def fault(**changes: object) -> str:
    with pytest.raises(InputError) as caught:
        parse(values(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "key", "nearest"),
    [
        ({"partitoin": {}}, "partitoin", "partition"),
        ({"partition": {"tetha": 1}}, "partition.tetha", "theta"),
        ({"model": {"name": "m", "dtpye": "float32"}}, "model.dtpye", "dtype"),
        ({"data": {"sources": [{"name": "x", "sise": 3}]}}, "data.sources[0].sise", "size"),
        ({"data": {"sources": ["x"], "prmpt": "{q}"}}, "data.prmpt", "prompt"),
        ({"label": {"tie": "drop"}}, "label.tie", "ties"),
        ({"score": {"example": 5}}, "score.example", "examples"),
        ({"lora": {"rank": 8}}, "lora.rank", "r"),
        ({"lora": {"alpha": 8}}, "lora.alpha", "lora_alpha"),
        ({"grpo": {"max_prompt_length": 8}}, "grpo.max_prompt_length", "data.max_prompt_length"),
        (
            {"sft": {"group_by_length": True}},
            "sft.group_by_length",
            "train_sampling_strategy: group_by_length",
        ),
        ({"lora": {"lora_aplha": 8}}, "lora.lora_aplha", "lora_alpha"),
        ({"sft": {"learning_rte": 1}}, "sft.learning_rte", "learning_rate"),
        ({"sft": {"max_step": 1}}, "sft.max_step", "max_steps"),
        ({"grpo": {"num_generation": 4}}, "grpo.num_generation", "num_generations"),
        ({"grpo": {"reward": ["accuracy"]}}, "grpo.reward", "rewards"),
        ({"evaluate": {"max_new_token": 4}}, "evaluate.max_new_token", "max_new_tokens"),
        ({"export": {"merge": True}}, "export.merge", "merged"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(given, key, nearest):
    assert fault(**given) == f"{key}: unknown key; did you mean '{nearest}'?"


def test_a_key_like_no_other_lists_what_is_allowed():
    assert fault(export={"zzz": 1}) == "export.zzz: unknown key; allowed: dtype, gguf, merged"
    assert fault(training={}).startswith("training: unknown key; allowed: data, evaluate, export, grpo, label, lora")
    # GRPO's own keys are not SFT's, and ours in grpo are not in sft.
    assert fault(sft={"num_generations": 4}).startswith("sft.num_generations: unknown key")
    assert fault(sft={"rewards": ["accuracy"]}).startswith("sft.rewards: unknown key")
    assert fault(sft={"trainer": {}}).startswith("sft.trainer: unknown key")
    assert fault(**{"1": 2}).startswith("1: unknown key")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sft": {"learning_rate": "fast"}}, "sft.learning_rate: got 'fast', expected float"),
        ({"sft": {"max_steps": 1.5}}, "sft.max_steps: got 1.5, expected int"),
        ({"sft": {"max_steps": "many"}}, "sft.max_steps: got 'many', expected int"),
        ({"sft": {"bf16": "yes please"}}, "sft.bf16: got 'yes please', expected bool"),
        ({"sft": {"learning_rate": [1e-4]}}, "sft.learning_rate: got [0.0001], expected float"),
        ({"sft": {"learning_rate": float("nan")}}, "sft.learning_rate: got nan"),
        ({"grpo": {"beta": {}}}, "grpo.beta: got {}, expected float"),
        ({"grpo": {"rewards": "accuracy"}}, "grpo.rewards: got 'accuracy', expected list[str]"),
        ({"grpo": "quick"}, "grpo: expected a mapping of keys, got 'quick'"),
        ({"partition": {"theta": [0.9]}}, "partition.theta: got [0.9], expected float"),
        ({"partition": {"theta": True}}, "partition.theta: got True, expected float"),
        ({"partition": {"granularity": "row"}}, "partition.granularity: got 'row', allowed: element, tile, rank"),
        ({"partition": {"selection": "best"}}, "partition.selection: got 'best', allowed: scores, random, all"),
        ({"partition": {"system1_cost": -1}}, "partition.system1_cost: got -1.0, expected at least 0"),
        ({"partition": {"system1_cost": float("inf")}}, "partition.system1_cost: got inf, expected a finite number"),
        (
            {"partition": {"system1_cost": 1, "selection": "all"}},
            "partition.system1_cost: got 1.0, expected 0 with selection: all",
        ),
        ({"label": {"teachers": {}}}, "label.teachers: got {}, expected list of mappings of keys"),
        ({"score": {"renew": 1}}, "score.renew: got 1, expected bool"),
        (
            {"score": {"renew": True}, "stages": ["sft"]},
            "score.renew: got True, expected false with one training stage",
        ),
        (
            {"score": {"renew": True}, "partition": {"selection": "all"}},
            "score.renew: got True, expected false with partition.selection: all",
        ),
        (
            {"score": {"renew": True, "method": "random"}},
            "score.renew: got True, expected false with score.method: random",
        ),
        ({"start": "zero"}, "start: got 'zero', allowed: paper, twin, pissa, olora, peft"),
        ({"stages": "sft"}, "stages: got 'sft', expected list of sft, grpo"),
        ({"stages": ["sft", "dpo"]}, "stages[1]: got 'dpo', allowed: sft, grpo"),
        ({"stages": ["sft", "sft"]}, "stages: got ['sft', 'sft'], expected sft and grpo, once each"),
        ({"stages": []}, "stages: got [], expected"),
        ({"seed": 1.0}, "seed: got 1.0, expected int"),
        ({"seed": -1}, "seed: got -1, expected 0 to"),
        ({"lora": {"r": "8"}}, "lora.r: got '8', expected int"),
        ({"lora": {"r": 0}}, "lora.r: got 0, expected an integer of at least 1"),
        ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha: got 0, expected more than 0"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout: got 1.0, expected a share in [0, 1)"),
        ({"lora": {"target_modules": 5}}, "lora.target_modules: got 5"),
        ({"lora": {"target_modules": []}}, "lora.target_modules: got []"),
        ({"lora": [1]}, "lora: got [1], expected"),
        ({"model": ["m"]}, "model: expected a mapping of keys, got ['m']"),
        ({"model": {"dtype": "float32"}}, "model.name: missing"),
        ({"model": {"name": 5}}, "model.name: got 5, expected str"),
        ({"model": {"name": "m", "dtype": "int8"}}, "model.dtype: got 'int8', allowed: auto, float32"),
        ({"data": {}}, "data.sources: missing"),
        (
            {"data": {"sources": "x.jsonl"}},
            "data.sources: got 'x.jsonl', expected list of names, or of mappings of keys",
        ),
        ({"data": {"sources": []}}, "data.sources: got [], expected at least one source"),
        ({"data": {"sources": [{"split": "train"}]}}, "data.sources[0].name: missing"),
        ({"data": {"sources": [{"name": "x", "size": 1.5}]}}, "data.sources[0].size: got 1.5, expected int"),
        ({"data": {"sources": ["x"], "columns": {"prompt": ["q"]}}}, "data.columns.prompt: got ['q'], expected str"),
        ({"data": {"sources": ["x"], "held_out": "some"}}, "data.held_out: got 'some', expected int or float"),
        ({"data": {"sources": ["x"], "max_prompt_length": 0}}, "data.max_prompt_length: got 0, expected at least 1"),
        ({"score": {"batch_size": 0}}, "score.batch_size: got 0, expected at least 1"),
        ({"evaluate": {"limit": 0}}, "evaluate.limit: got 0, expected at least 1"),
        ({"sft": {"systems": [3]}}, "sft.systems: got [3], expected [1], [2] or [1, 2]"),
        ({"sft": {"systems": 1}}, "sft.systems: got 1, expected list[int]"),
        ({"sft": {"output_dir": "x"}}, "sft.output_dir: set by the run itself"),
        ({"grpo": {"seed": 3}}, "grpo.seed: set by the run itself"),
    ],
)
def test_a_wrong_type_or_value_names_the_key_what_was_given_and_what_is_allowed(given, says):
    assert fault(**given).startswith(says), fault(**given)


@pytest.mark.parametrize("theta", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_theta_outside_its_interval(theta):
    assert fault(partition={"theta": theta}).startswith(f"partition.theta: got {float(theta)}, expected")
    assert parse(values(partition={"theta": 1})).partition.theta == 1.0


@pytest.mark.parametrize("key", ["alpha", "beta"])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_alpha_and_beta_outside_their_interval(key, share):
    assert fault(partition={key: share}) == f"partition.{key}: got {share}, expected a share in [0, 1]"
    assert getattr(parse(values(partition={key: 0})).partition, key) == 0.0


@pytest.mark.parametrize("key", REFUSED_LORA_KEYS)
def test_a_lora_option_that_our_layers_do_not_have_is_refused_by_name(key):
    assert fault(lora={key: ["something"]}).startswith(f"lora.{key}: not supported by the masked LoRA layers")


def test_every_lora_option_of_peft_is_either_known_here_or_refused():
    """A variant that a later PEFT adds must not be passed over."""
    known = {"auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern",
             "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
             "peft_version", "r", "qalora_group_size", "revision", "target_modules", "task_type",
             "use_rslora"}  # fmt: skip
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    assert fields - set(REFUSED_LORA_KEYS) <= known


def test_a_refused_lora_option_may_be_given_as_its_default():
    lora = {"use_dora": False, "lora_bias": False, "modules_to_save": None, "rank_pattern": {}, "bias": "none"}
    assert parse(values(lora=lora)).lora == lora


def test_lora_options_that_would_be_overruled_or_change_the_task_are_refused():
    assert fault(lora={"bias": "all"}).startswith("lora.bias: got 'all', expected none")
    assert fault(lora={"task_type": "SEQ_CLS"}).startswith("lora.task_type: got 'SEQ_CLS', expected CAUSAL_LM")
    said = "lora.init_lora_weights: got 'gaussian', expected nothing, since start: twin"
    assert fault(lora={"init_lora_weights": "gaussian"}).startswith(said)
    assert parse(values(start="peft", lora={"init_lora_weights": "gaussian"})).start == "peft"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", ".1e-3", "1.e-4", "0.1e-3"])
def test_numbers_that_yaml_reads_as_text_are_numbers(text: str, tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndata: {{sources: [x]}}\nsft: {{learning_rate: {text}, "
                    f"lr_scheduler_kwargs: {{min_lr: {text}}}}}\n")  # fmt: skip
    recipe = load_recipe(path)
    assert recipe.sft.trainer == {"learning_rate": 1e-4, "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    assert load_recipe(path, [("sft.learning_rate", text)]).sft.trainer["learning_rate"] == 1e-4


def test_text_that_looks_like_a_number_stays_text_where_it_is_quoted():
    for value in ("1e-4", "5", "true", "no", 1e-4, 1e-05, 5, True):
        assert parse_yaml(dump_yaml({"key": value})) == {"key": value}
        assert type(parse_yaml(dump_yaml({"key": value}))["key"]) is type(value)


def test_a_recipe_without_a_thing_but_model_and_data_has_the_paper_defaults():
    recipe = parse(values())
    assert (recipe.partition.theta, recipe.partition.alpha, recipe.partition.beta) == (0.9, 1.0, 1.0)
    assert (recipe.sft.systems, recipe.grpo.systems, recipe.stages) == ([1], [2], ["sft", "grpo"])
    assert recipe.model.name == "m"
    assert recipe.data.sources[0].name == "x.jsonl"
    assert parse(values(sft=None, lora=None, partition=None)) == recipe


def test_a_resolved_recipe_reads_back_as_itself(tiny_folder: Path, tmp_path: Path):
    recipe = parse(recipe_values(tiny_folder))
    assert parse(recipe.as_dict()) == recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(recipe.as_dict()))
    assert load_recipe(path) == recipe
    assert parse(yaml.safe_load(path.read_text())) == recipe


def test_overrides_win_over_the_file_and_the_file_over_what_it_extends(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write_recipe(tmp_path / "base.yaml", values(partition={"theta": 0.5, "alpha": 0.1}, seed=3, sft={"max_steps": 7}))
    over = write_recipe(tmp_path / "sub" / "over.yaml", {"extends": "../base.yaml", "partition": {"theta": 0.6}})
    recipe = load_recipe(over, [("partition.beta", "0.2"), ("sft.max_steps", "9"), ("model.dtype", "float32")])
    assert dataclasses.astuple(recipe.partition)[:3] == (0.6, 0.1, 0.2)
    assert (recipe.seed, recipe.sft.trainer, recipe.model.name) == (3, {"max_steps": 9}, "m")
    assert recipe.model.dtype == "float32"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (("partition.theta", "["), "--partition.theta: '[' is not a YAML value"),
        (("partition.theta", ""), "partition.theta: got None, expected float"),
        (("partition.tetha", "0.5"), "partition.tetha: unknown key; did you mean 'theta'?"),
        (("seed.x", "1"), "--seed.x: 'seed' is not a section"),
        (("theta", "0.5"), "theta: unknown key"),
    ],
)
def test_an_override_that_does_not_fit(override, says, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        load_recipe(write_recipe(tmp_path / "r.yaml", values(seed=1)), [override])
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "a recipe must be a mapping of sections, got list"),
        ("", "a recipe must be a mapping of sections, got NoneType"),
        ("model: m\nseed: 1\nseed: 2\n", "seed: given twice (again in line 3)"),
        ("model: m\n? [a]\n: b\n", "line 2: a key must be a word"),
        ("model: m\nextends: [a.yaml]\n", "extends: got ['a.yaml'], expected the path"),
        ("extends: gone.yaml\n", "gone.yaml: no such file"),
        ("extends: r.yaml\n", "extends itself"),
        ("extends: .\n", "cannot be read (Is a directory)"),
        ("model: !!python/object:os.system {}\n", "not valid YAML"),
        ("model: \udcff", "not a UTF-8 text file"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, says: str, tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["1e-4_run", "5e3fab2", "5e3", "1234567", "0012", "1_0", "0x1F", "12:30", "2024-01-01", "1.50", ".5", "on",
             "yes", "No", "true", ".inf", "1e4 {prompt}", "06", "-1"],
)  # fmt: skip
def test_a_key_of_texts_gets_the_text_as_it_was_written(text: str, tmp_path: Path):
    """YAML reads these as numbers, days and truths, or did in part: a commit can be 5e3fab2, a branch 1.50."""
    path = tmp_path / "r.yaml"
    path.write_text(f"model:\n  name: m\n  revision: {text}\noutput_dir: {text}\ndata:\n  sources:\n  - {text}\n"
                    f"  columns: {{prompt: {text if '{' not in text else 'x'}}}\n  prompt: {text}\n"
                    f"sft: {{run_name: {text if '{' not in text else 'x'}}}\n")  # fmt: skip
    recipe = load_recipe(path)
    assert [recipe.model.revision, recipe.output_dir, recipe.data.sources[0].name, recipe.data.prompt] == [text] * 4
    given = load_recipe(path, [("model.revision", text), ("data.system_prompt", text), ("model.eos_token", text)])
    assert [given.model.revision, given.data.system_prompt, given.model.eos_token] == [text] * 3
    # What is written into the output folder reads back as the same.
    path.write_text(dump_yaml(given.as_dict()))
    assert load_recipe(path) == given
    if "{" not in text:
        assert recipe.data.columns == {"prompt": text}
        assert recipe.sft.trainer == {"run_name": text}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("partition.theta", "5e-1", 0.5), ("partition.theta", ".5", 0.5), ("sft.max_steps", "06", 6),
        ("data.held_out", "010", 10), ("sft.max_steps", "1_000", 1000), ("sft.bf16", "no", False),
        ("sft.learning_rate", "1e-4", 1e-4), ("sft.learning_rate", "'1e-4'", 1e-4), ("model.revision", "null", None),
        ("model.revision", '"5"', "5"), ("sft.save_strategy", "no", "no"),
        ("sft.eval_strategy", "off", "no"), ("sft.save_strategy", "NO", "no"), ("sft.logging_strategy", "false", "no"),
        ("sft.report_to", "[5, a]", ["5", "a"]), ("sft.lr_scheduler_kwargs", "{min_lr: 1}", {"min_lr": 1}),
        ("sft.eval_on_start", "off", False), ("sft.save_strategy", "epoch", "epoch"),
        ("sft.logging_steps", "5", 5),
        ("model.chat_template_kwargs", "{a: off, b: 1e3, c: [2]}", {"a": False, "b": 1000.0, "c": [2]}),
    ],
)  # fmt: skip
def test_a_key_of_numbers_gets_a_number(key, text, value, tmp_path: Path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", values()), [(key, text)])
    section, name = key.split(".")
    held = getattr(recipe, section)
    assert (held.trainer if section == "sft" else vars(held))[name] == value


@pytest.mark.parametrize(
    "prompt",
    ["{prompt}", "{prompt} =", "Q: {prompt}", "[INST] {prompt} [/INST]", "- {prompt}", "# {prompt}", "@{prompt}"],
)
def test_a_template_on_the_command_line_needs_no_yaml_quotes(prompt: str, tmp_path: Path):
    path = write_recipe(tmp_path / "r.yaml", values())
    assert load_recipe(path, [("data.prompt", prompt)]).data.prompt == prompt


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sft: {learning_rate: 1e-3x}", "sft.learning_rate: got '1e-3x', expected float"),
        ('sft: {learning_rate: "0,001"}', "sft.learning_rate: got '0,001', expected float"),
        ("partition: {theta: 12:30}", "partition.theta: got '12:30', expected float"),
        ("partition: {theta: yes}", "partition.theta: got True, expected float"),
        ("sft: {max_steps: 2.0}", "sft.max_steps: got 2.0, expected int"),
        ("seed: 2024-01-01", "seed: got '2024-01-01', expected int"),
        ("grpo: {chat_template_kwargs: {a: 1}}", "grpo.chat_template_kwargs: got {'a': 1}, which one stage"),
        ("sft: {deepspeed: {zero: {stage: 2}}}", "sft.deepspeed: got {'zero': {'stage': 2}}: masks"),
        ("sft: {eval_strategy: on}", "sft.eval_strategy: got 'on', expected no, steps or epoch"),
        ("start: 5e3", "start: got 5000.0, allowed: paper"),
    ],
)
def test_what_is_no_number_is_named_with_its_key(line: str, says: str, tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndata: {{sources: [x]}}\n{line}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(says), caught.value


def test_a_template_without_its_quotes_is_told_of_them(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {sources: [x], prompt: {prompt}}\n")
    with pytest.raises(
        InputError, match=r"data.prompt: got \{'prompt': None\}, expected str; put text that begins with"
    ):
        load_recipe(path)


def test_anchors_and_merge_keys_are_yamls_own(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {sources: [x]}\nsft: &t {max_steps: 5, weight_decay: 0.1}\n"
                    "grpo:\n  <<: *t\n  max_steps: 6\n")  # fmt: skip
    assert load_recipe(path).grpo.trainer == {"max_steps": 6, "weight_decay": 0.1}


# What is declared

# Keys that change how a result is computed, but not the result, before each key declared it of itself. A folder made
# then must resume now.
ONLY_HOW = re.compile(
    r"output_dir|model\.fsdp|label\.(budget|store|set_aside|enough)\b.*|(score|evaluate)\.batch_size"
    r"|(sft|grpo)\.(longest_first|activation_offloading|gradient_checkpointing)"
    r"|evaluate\.(task.*|run_code)|export\.gguf"
    r"|sft\.micro_batch_tokens|grpo\.(rollout_batch_size|logprob_tokens)"
    r"|label\.teachers\[\d+\]\.(api_key_env|price|in_flight|per_minute|timeout|attempts|backoff|check_model)\b.*"
)


def declared(section: type, at: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key of a section and of those within it, those of a list under its third item."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        yield f"{at}{field.name}", field
        inner = nested_class(hints[field.name])
        if inner is not None:
            yield from declared(inner, f"{at}{field.name}{'[2]' if 'list' in str(hints[field.name]) else ''}.")


def test_which_keys_leave_the_result_as_it_is():
    import trl

    keys = [key for key, _ in declared(Recipe)]
    assert {"label.teachers[2].price.input", "data.sources[2].seed", "grpo.rewards"} <= set(keys)
    for stage, config in (("sft", trl.SFTConfig), ("grpo", trl.GRPOConfig)):
        keys += [f"{stage}.{field.name}" for field in dataclasses.fields(config)]
    keys += [
        "lora.r",
        "lora.base",
        "label.weights.a",
        "label.teachers[10].parameters.seed",
        "data.columns.prompt",
        "new",
    ]
    assert {key for key in keys if not changes_result(key)} == {key for key in keys if ONLY_HOW.fullmatch(key)}


def test_every_key_says_what_it_is_for():
    for key, field in declared(Recipe):
        about = field.metadata
        assert key.endswith(".trainer") or about["help"], key
        assert "\n" not in about["help"]


TEACHER = {"model": "m"}


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ({"weights": {"a": 1.0, "b": 0.0}}, "label.weights.b: got 0.0, expected more than 0"),
        ({"teachers": [TEACHER, {"model": ""}]}, "label.teachers[1].model: got '', expected the name of a model"),
        ({"teachers": [TEACHER | {"price": {"input": 1, "output": -1}}]}, "label.teachers[0].price.output: got -1.0"),
        ({"reask": -1}, "label.reask: got -1, expected at least 0"),
    ],
)
def test_ranges_hold_in_mappings_and_lists(label, says):
    assert fault(label=label).startswith(says)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("theta", 0.0, "theta: got 0.0, expected a share in (0, 1]"),
        ("alpha", 1.5, "alpha: got 1.5, expected a share in [0, 1]"),
        ("selection", "best", "selection: got 'best', expected scores, random or all"),
    ],
)
def test_an_argument_of_a_public_function_has_its_keys_range(name, value, says):
    with pytest.raises(InputError) as caught:
        check_value(PartitionConfig, name, value)
    assert str(caught.value) == says


def test_the_reference_is_what_is_declared():
    """`python -m lorapar.recipe > docs/recipe.md` after a change."""
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference()


BEYOND = {
    "sft": {
        "learning_rate": [0.0, math.inf], "dataloader_num_workers": [-1], "pad_to_multiple_of": [0, -8],
        "neftune_noise_alpha": [-1.0], "per_device_eval_batch_size": [0], "eval_accumulation_steps": [0],
        "num_train_epochs": [-1.0, math.inf], "eval_steps": [-1.0, 1.5], "save_steps": [0.0, -1.0],
        "logging_steps": [0.0, math.inf], "label_smoothing_factor": [1.0], "dataloader_prefetch_factor": [2],
        "log_level": ["foo"], "train_sampling_strategy": ["foo"], "packing_strategy": ["foo"],
    },
    "grpo": {
        "num_generations": [0, 1], "top_k": [-5], "min_p": [2.0], "repetition_penalty": [0.0], "beta": [-1.0, math.inf],
        "epsilon": [-1.0, math.inf], "epsilon_high": [-1.0], "delta": [-3.0], "top_entropy_quantile": [2.0],
        "off_policy_mask_threshold": [-1.0], "train_sampling_strategy": ["foo"], "save_steps": [0.0],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("sft", "push_to_hub", True, "got True: a run uploads nothing"),
        ("grpo", "hub_token", "hf_secret", "got a value: a run uploads nothing"),
        (
            "sft",
            "deepspeed",
            "ds.json",
            "got 'ds.json': masks, the proof and the optimizer know whole parameters by name",
        ),
        ("sft", "fsdp", "full_shard", "got 'full_shard': masks"),
        ("grpo", "ddp_timeout", 5, "nothing is wrapped in DDP"),
        ("sft", "ddp_backend", "gloo", "nothing is wrapped in DDP"),
        ("sft", "assistant_only_loss", True, "set data.loss: assistant"),
        ("sft", "auto_find_batch_size", True, "`lorapar plan` says what fits"),
        ("sft", "loss_type", "bogus", "got 'bogus', expected nll or dft"),
        ("grpo", "loss_type", "ppo", "got 'ppo', expected grpo, dapo"),
        ("grpo", "label_smoothing_factor", 0.1, "got 0.1, expected 0.0"),
        ("sft", "save_only_model", True, "could not be resumed"),
        ("sft", "ignore_data_skip", True, "would train on its first rows again"),
        ("sft", "enable_jit_checkpoint", True, "resumes from its last checkpoint"),
        ("sft", "fp16_full_eval", True, "would round the model"),
        ("sft", "optim_target_modules", ["q_proj"], "the optimizer is PartitionedAdamW"),
        ("grpo", "sync_ref_model", True, "the reference is the adapter as the stage received it"),
        ("grpo", "reward_weights", [1.0, 2.0], "got [1.0, 2.0], expected as many as grpo.rewards: 1"),
        ("grpo", "scale_rewards", "std", "got 'std', expected group, batch or none"),
        ("grpo", "temperature", 0, "got 0.0, expected a finite number above 0"),
        ("grpo", "reward_weights", [0.0], "got [0.0], expected finite numbers that are not all 0"),
        ("grpo", "reward_weights", [math.inf], "got [inf], expected finite numbers that are not all 0"),
        *(
            (section, key, value, f"got {value}, expected")
            for section, keys in BEYOND.items()
            for key, given in keys.items()
            for value in given
        ),
        ("sft", "weight_decay", -1, "got -1.0, expected a finite number of at least 0"),
        ("sft", "adam_beta1", 2, "got 2.0, expected a number in [0, 1)"),
        ("sft", "gradient_accumulation_steps", 0, "got 0, expected at least 1"),
        ("sft", "per_device_train_batch_size", 0, "got 0, expected at least 1"),
        ("sft", "max_steps", 0, "got 0, expected at least 1, or -1"),
        ("sft", "dataloader_persistent_workers", True, "expected false where dataloader_num_workers is 0"),
        ("sft", "eval_strategy", "often", "got 'often', expected no, steps or epoch"),
        ("sft", "save_strategy", "never", "got 'never', expected no, steps, epoch or best"),
        ("grpo", "lr_scheduler_type", "foo", "got 'foo', expected linear, cosine, "),
        ("sft", "accelerator_config", {"use_seedable_sampler": False}, "set by the run itself"),
        ("sft", "logging_nan_inf_filter", False, "set by the run itself"),
        ("sft", "activation_checkpointing", True, "gradient_checkpointing is TRL's name"),
    ],
)
def test_a_trainers_key_that_cannot_work_is_refused_with_the_recipe(section, key, value, says):
    said = fault(**{section: {key: value}})
    assert said.startswith(f"{section}.{key}: ")
    assert says.replace("got foo", "got 'foo'") in said
    assert "hf_secret" not in said


@pytest.mark.parametrize(
    "sft",
    [{"save_steps": 0, "save_strategy": "no"}, {"save_steps": 0.5}, {"eval_steps": 2.0, "eval_strategy": "steps"},
     {"num_train_epochs": 0, "max_steps": 3}, {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
     {"pad_to_multiple_of": "auto"}],
)  # fmt: skip
def test_a_trainers_key_that_works_beside_another_is_taken(sft):
    assert parse(values(sft=sft)).sft.trainer == sft


def test_the_trainers_own_defaults_are_none_of_those_that_are_refused(tmp_path: Path):
    """`lorapar.sft` and `lorapar.grpo` take a configuration with every field filled in."""
    import trl

    for stage, config in (("sft", trl.SFTConfig), ("grpo", trl.GRPOConfig)):
        check_trainer_keys(stage, vars(config(output_dir=str(tmp_path), use_cpu=True, bf16=False)))
