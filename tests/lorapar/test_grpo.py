"""GRPO that one card bears: what vLLM is handed, what is held twice, rollouts in parts, the longest samples first."""

import importlib.util
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import trl.generation.vllm_generation as engine
from transformers import AutoModelForCausalLM

import lorapar
from lorapar import InputError
from lorapar.adapter.layers import lora_parameters, masked_layers
from lorapar.adapter.merging import merged_parameters
from lorapar.adapter.proof import Snapshot, checksums
from lorapar.errors import NothingLearned
from lorapar.training.grpo import PartitionedGRPOTrainer, check_engine
from tests.lorapar.driver import refused, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_quantised import load, needs_bnb
from tests.lorapar.test_training import ROWS, fresh, grpo_config, letters
from tests.tiny import tiny_model, tiny_tokenizer


def moved(model, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


class Engine:
    """Stands in for vLLM's engine and its client: holds a plain model, loads what it is handed, samples from it."""

    def __init__(self, **_):
        self.model = tiny_model(seed=9)
        self.received, self.held, self.resets = [], 0, 0
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def load_weights(self, pairs):
        """As vLLM's models do: by the checkpoint's names, refusing what they do not know."""
        there = dict(self.model.named_parameters())
        for name, tensor in pairs:
            assert there[name].shape == tensor.shape
            there[name].data.copy_(tensor)
            self.received.append((name, tensor.dtype, weakref.ref(tensor)))
        # A temporary is given up before the next one is made.
        last = self.received[-8:]
        self.held = max(self.held, sum(ref() is not None for name, _, ref in last if "_proj" in name))

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        made = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            out = self.model.generate(ids, max_new_tokens=sampling_params["max_tokens"], do_sample=True, pad_token_id=0)
            tokens = out[0, ids.shape[1] :]
            logps = self.model(input_ids=out).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
            picked = logps.gather(-1, tokens[:, None])[:, 0].tolist()
            entries = [{int(t): SimpleNamespace(rank=1, logprob=p)} for t, p in zip(tokens, picked)]
            made.append(
                SimpleNamespace(
                    prompt_token_ids=prompt["prompt_token_ids"],
                    outputs=[SimpleNamespace(token_ids=tokens.tolist(), logprobs=entries)],
                )
            )
        return made

    # The server's client.
    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named):
        for (name, dtype, shape), (streamed, tensor) in zip(metadata, named, strict=True):
            assert (streamed, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)
            self.load_weights([(streamed, tensor)])


@pytest.fixture
def vllm(monkeypatch):
    # TRL sets these for an engine in the trainer's process; they are to be gone afterwards.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(engine, "is_vllm_available", lambda: True)
    monkeypatch.setattr(engine, "LLM", Engine, raising=False)
    monkeypatch.setattr(engine, "VLLMClient", Engine)
    monkeypatch.setattr(engine, "SamplingParams", lambda **keys: keys, raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else real(name, *a))


def trainer_of(model, folder, **keys):
    settings = grpo_config(folder, **({"use_vllm": True, "vllm_mode": "colocate"} | keys))
    return PartitionedGRPOTrainer(
        model=model, reward_funcs=[letters], args=settings, train_dataset=ROWS, processing_class=tiny_tokenizer()
    )


def engine_of(trainer):
    generation = trainer.vllm_generation
    return generation.llm if generation.mode == "colocate" else generation.vllm_client


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("start", ["paper", "twin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_gets_base_plus_delta_under_its_own_names(vllm, tmp_path, mode, start, dtype):
    model = moved(lorapar.attach(tiny_model().to(dtype), config(), start=start))
    expected = {n: p.detach().double() for n, p in tiny_model().to(dtype).named_parameters()}
    for name, layer in masked_layers(model).items():
        a, b, scaling = layer.factors("default")
        expected[f"{name}.weight".removeprefix("base_model.model.")] += scaling * b.detach().double() @ a.double()
    trainer = trainer_of(model, tmp_path, vllm_mode=mode)
    trainer.vllm_generation.sync_weights()
    inside = engine_of(trainer)
    assert [name for name, _, _ in inside.received] == [n for n, _ in merged_parameters(model)]
    assert {name for name, _, _ in inside.received} == set(expected)
    for name, tensor in inside.model.named_parameters():
        # Summed in fp32, rounded once.
        exact = expected[name].to(dtype).float()
        spacing = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor.detach(), exact, rtol=1.01 * spacing, atol=2e-6)
    assert {given for _, given, _ in inside.received} == {dtype}
    assert inside.held <= 1
    assert inside.resets == 1


def test_a_tied_head_is_handed_over_once():
    tied = tiny_model().config
    tied.tie_word_embeddings = True
    model = lorapar.attach(AutoModelForCausalLM.from_config(tied), config(), start="twin")
    names = [name for name, _ in merged_parameters(model)]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("start", ["paper", "twin"])
def test_after_a_thousand_syncs_base_and_adapter_are_bit_for_bit_what_they_were(vllm, tmp_path, start):
    model = moved(lorapar.attach(tiny_model().to(torch.bfloat16), config(), start=start))
    trainer = trainer_of(model, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    versions = {n: p._version for n, p in model.named_parameters()}
    for _ in range(1000):
        trainer.vllm_generation.sync_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name
        assert parameter._version == versions[name]
    assert engine_of(trainer).resets == 1000


@pytest.mark.parametrize("start", ["paper", "twin"])
def test_training_on_what_the_engine_samples_is_on_policy(vllm, tmp_path, start):
    """The engine's log-probabilities are the trainer's, step after step: it has the weights of the model as it is."""
    model = moved(lorapar.attach(tiny_model(), config(), start=start))
    made, before = random_partition(model), Snapshot.take(model)
    settings = grpo_config(tmp_path, use_vllm=True, vllm_mode="colocate", beta=0.04)
    _, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters])
    key = "sampling/importance_sampling_ratio/"
    for bound in ("min", "max"):
        assert [e[key + bound] for e in trained.history if key + bound in e] == pytest.approx([1.0] * 3, abs=2e-3)
    assert checksums(model).items() >= before.others.items()


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_of_a_quantised_base_vllm_gets_the_dequantised_sum_in_the_model_s_dtype(vllm, tiny_folder, tmp_path, kind):
    from lorapar_kernels.bnb_weights import dequantised

    model = moved(lorapar.attach(load(tiny_folder, kind, dtype="bfloat16"), config(), start="twin"))
    handed = {name: tensor.clone() for name, tensor in merged_parameters(model)}
    for name, layer in masked_layers(model).items():
        a, b, scaling = layer.factors("default")
        wide = dequantised(layer.get_base_layer(), torch.float32).double() + scaling * b.double() @ a.double()
        given = handed[f"{name}.weight".removeprefix("base_model.model.")]
        assert given.dtype == torch.bfloat16
        torch.testing.assert_close(given.double(), wide, rtol=2**-8, atol=1e-6)
    # o_proj has no adapter and is dequantised all the same.
    assert handed["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    trainer = trainer_of(model, tmp_path, vllm_mode="server")
    trainer.vllm_generation.sync_weights()
    assert len(engine_of(trainer).received) == len(handed)
    with pytest.raises(InputError, match=f"grpo.vllm_mode: got colocate with a base in {kind}.*vllm_mode: server"):
        check_engine(grpo_config(tmp_path, use_vllm=True, vllm_mode="colocate"), kind)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_names_the_extra(tmp_path):
    with pytest.raises(InputError, match=r"grpo.use_vllm: vLLM is not installed; pip install 'lorapar\[vllm\]'"):
        check_engine(grpo_config(tmp_path, use_vllm=True), None)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_reference_is_no_second_copy_of_the_base(tmp_path, beta):
    model, made = fresh()
    held = sum(p.nbytes for p in model.parameters())
    adapter = sum(p.nbytes for p in lora_parameters(model).values())
    trainer, _ = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, beta=beta), [letters])
    assert trainer.ref_model is None
    assert sum(p.nbytes for p in trainer.model.parameters()) == held + (adapter if beta else 0)


def test_a_group_may_be_larger_than_what_fits_at_once(tmp_path):
    """One prompt's eight completions, two at a time through the model and two at a time through the backward."""
    model, made = fresh()
    widths = []
    generate = type(model).generate
    keys = dict(num_generations=8, per_device_train_batch_size=2, gradient_accumulation_steps=4)

    def watched(self, **given):
        widths.append(given["input_ids"].shape[0])
        return generate(self, **given)

    type(model).generate = watched
    try:
        _, trained = lorapar.grpo(
            model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, **keys), [letters], rollout_batch_size=2,
            longest_first=False,
        )  # fmt: skip
    finally:
        type(model).generate = generate
    assert widths == [2] * 4 * 3
    assert trained.verified["moved"] > 0
    assert trained.rollout_seconds > 0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"per_device_train_batch_size": 400}, r"grpo: \d+ prompts do not fill a generation batch of 400 completions"),
        ({"generation_kwargs": {"top_k": 0.5}}, "grpo.generation_kwargs: got {'top_k': 0.5}: `top_k` has to be"),
    ],
)
def test_what_makes_no_step_is_refused(tmp_path, keys, says):
    model, made = fresh()
    with pytest.raises(InputError, match=says):
        lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, **keys), [letters])


def test_completions_that_are_all_masked_are_named(tmp_path):
    model, made = fresh()
    keys = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 1, "weight_decay": 0.0}
    says = r"0 of \d+ completions ended, .* raise grpo.max_completion_length \(now 2\), or set grpo.mask_truncated"
    with pytest.raises(NothingLearned, match=says):
        lorapar.grpo(model, tiny_tokenizer(), ROWS, made, grpo_config(tmp_path, **keys), [letters])


def rollouts(model, folder, at_once, count, **keys):
    trainer = PartitionedGRPOTrainer(
        model=model, reward_funcs=[letters], args=grpo_config(folder, **keys), train_dataset=ROWS,
        processing_class=tiny_tokenizer(), rollout_batch_size=at_once,
    )  # fmt: skip
    prompts = [[5, 6, 7, 8], [9, 10]] * (count // 2)
    return trainer._generate_single_turn(prompts, None, {}, 2)[0]


def test_rollouts_in_parts_are_the_same_completions_and_the_same_distribution(tmp_path):
    model = moved(lorapar.attach(tiny_model(), config(), start="twin"), scale=0.3)
    greedy = [rollouts(model, tmp_path, at_once, 10, top_k=1) for at_once in (None, 3)]
    assert greedy[0] == greedy[1]
    assert len(greedy[0]) == 10
    # Sampled: the share of each first token against the model's own probability, 2,000 draws a prompt.
    sampled = rollouts(model, tmp_path, 700, 4000, max_completion_length=1)
    for turn, prompt in enumerate(([5, 6, 7, 8], [9, 10])):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        share = torch.bincount(torch.tensor([ids[0] for ids in sampled[turn::2]]), minlength=258) / 2000
        # Five standard deviations of a share, for 258 tokens.
        assert float(((share - p).abs() - 5 * (p * (1 - p) / 2000).sqrt()).max()) < 1 / 2000


def test_how_much_is_held_at_once_may_change_between_two_commands(finished, changed_recipe):
    """A run that ran out of memory goes on with smaller parts; what was made stays made."""
    recipe = changed_recipe(
        grpo={"rollout_batch_size": 2, "logprob_tokens": 64, "gradient_checkpointing": True},
        sft={"longest_first": False, "micro_batch_tokens": 64},
        score={"batch_size": 1},
        evaluate={"batch_size": 1},
    )
    said = succeeds("run", recipe, "--output_dir", finished)
    for stage in ("score", "sft", "grpo", "evaluate"):
        assert f"{stage}: done before, skipped" in said
    refused("run", changed_recipe(grpo={"rollout_batch_size": 0}), "--output_dir", finished,
            says=("grpo.rollout_batch_size: got 0, expected at least 1",))  # fmt: skip


def test_the_rollout_s_share_is_in_the_metrics_and_on_the_page(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert 0 < metrics["rollout_seconds"]["grpo"] < metrics["seconds"]["grpo"]
    assert "Rollouts, the completions that GRPO learns from, took" in (finished_run / "report.html").read_text()
    log = (finished_run / "run.log").read_text()
    assert "sft: 4 rows of up to" in log
    assert "with completions of 6 went first, forward and backward" in log
