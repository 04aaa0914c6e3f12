"""GRPO that one card bears: what vLLM is handed, what is held twice, rollouts in parts, the longest samples first."""

import importlib.util
import json
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
import trl.generation.vllm_generation as engine
from transformers import AutoModelForCausalLM

import lorapar
from lorapar import InputError
from lorapar.adapter import Snapshot, lora_parameters
from lorapar.answer_head import AnswerLogProbs, score_answers_alone
from lorapar.grpo import PartitionedGRPOTrainer, check_engine
from lorapar.merging import merged_parameters
from lorapar.rehearsal import longest
from tests.lorapar.driver import refused, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_bases import load, needs_bnb
from tests.lorapar.test_training import ROWS, fresh, grpo_config, letters, losses, sft_config
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
    for name, layer in lorapar.adapter.masked_layers(model).items():
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
    assert lorapar.adapter.checksums(model).items() >= before.others.items()


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_of_a_quantised_base_vllm_gets_the_dequantised_sum_in_the_model_s_dtype(vllm, tiny_folder, tmp_path, kind):
    from lorapar.layers_bnb import dequantised

    model = moved(lorapar.attach(load(tiny_folder, kind, dtype="bfloat16"), config(), start="twin"))
    handed = {name: tensor.clone() for name, tensor in merged_parameters(model)}
    for name, layer in lorapar.adapter.masked_layers(model).items():
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


def test_the_longest_are_found():
    assert longest([3, 9, 1, 9, 4], 3) == [1, 3, 4]
    assert longest([2], 4) == [0]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_longest_go_first_and_leave_no_trace(tmp_path, stage, caplog):
    found = []
    for first in (False, True):
        torch.manual_seed(3)
        model = lorapar.attach(tiny_model(), config(lora_dropout=0.2), start="twin")
        made = random_partition(model)
        with caplog.at_level(logging.INFO, "lorapar"):
            if stage == "sft":
                _, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path), longest_first=first)
            else:
                settings = grpo_config(tmp_path, beta=0.04)
                _, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters], longest_first=first)
        found.append((losses(trained), trained.history, {n: p for n, p in lora_parameters(model).items()}))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1]):
        assert {k: v for k, v in one.items() if "time" not in k and "per_second" not in k} == {
            k: v for k, v in other.items() if "time" not in k and "per_second" not in k
        }
    assert all(torch.equal(p, found[1][2][n]) for n, p in found[0][2].items())
    said = [r.getMessage() for r in caplog.records if "went first" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(
        "sft: 4 rows of up to 7 tokens went first" if stage == "sft"
        else "grpo: prompts of up to 4 tokens with completions of 4 went first"
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_what_cannot_fit_fails_before_the_first_step(tmp_path, stage):
    """Only the very longest batch is too large, here by the number of its positions."""
    rows = ROWS.select_columns(["prompt", "completion", "answer"]).to_list()
    rows.append({"prompt": "1+1=" * 6, "completion": "2", "answer": "2"})
    rows = ROWS.from_list(rows)
    model, made = fresh()
    inner = model.get_base_model().model
    steps = []

    def refuse(module, args, given):
        width = (given.get("input_ids") if given.get("input_ids") is not None else args[0]).shape[1]
        if width > 24:
            raise torch.OutOfMemoryError(f"{width} positions")

    inner.register_forward_pre_hook(refuse, with_kwargs=True)

    def run():
        if stage == "sft":
            lorapar.sft(model, tiny_tokenizer(), rows, made, sft_config(tmp_path, seed=1))
        else:
            settings = grpo_config(tmp_path, max_completion_length=2, seed=1)
            lorapar.grpo(model, tiny_tokenizer(), rows, made, settings, [lambda prompts, **_: steps.append(1)])

    before = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    with pytest.raises(torch.OutOfMemoryError, match="positions"):
        run()
    assert steps == []
    assert all(torch.equal(p, before[n]) for n, p in lora_parameters(model).items())


@pytest.mark.parametrize("tokens", [1, 7, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("needs_trl", [False, True])
def test_the_answer_head_gives_trl_s_log_probabilities_entropy_and_gradients(tokens, temperature, needs_trl):
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :11] = -100
    labels[1, 15:] = -100
    weights = torch.randn(3, 19, generator=torch.Generator().manual_seed(2))
    found = []
    for ours in (False, True):
        model = tiny_model()
        for parameter in model.get_output_embeddings().parameters():
            parameter.requires_grad_(False)
        add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            score_answers_alone(model, tokens, temperature, needs_trl)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        # The entropy has a gradient where TRL's own function serves.
        (out.log_probs * weights).sum().add(needs_trl * (out.entropy * weights.flip(0)).sum()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((out, grads))
    (theirs, their_grads), (ours, our_grads) = found
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-5)
    # And the definition of both.
    logits = tiny_model()(input_ids=ids).logits[:, :-1] / temperature
    exact = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    torch.testing.assert_close(ours.log_probs, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_two_products_are_exact(dtype, bound):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((37, 24), (61, 24)))
    bias, given = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (61, 37))
    targets = torch.randint(0, 61, (37,), generator=generator)
    hidden, weight, bias = (t.to(dtype).double() for t in (hidden, weight, bias))
    exact = hidden.clone().requires_grad_()
    wanted = (exact @ weight.T + bias).log_softmax(-1)
    wanted[torch.arange(37), targets].backward(given)
    h = hidden.to(dtype).requires_grad_()
    log_probs, entropy, is_top = AnswerLogProbs.apply(h, weight.to(dtype), bias.to(dtype), targets, 10)
    log_probs.backward(given.to(log_probs.dtype))

    def off(mine, theirs):
        return float((mine.double() - theirs).norm() / theirs.norm())

    assert off(log_probs.detach(), wanted[torch.arange(37), targets].detach()) < bound
    assert off(entropy, -(wanted.exp() * wanted).sum(-1).detach()) < bound
    assert off(h.grad, exact.grad) < bound
    assert not entropy.requires_grad
    if dtype == torch.float64:
        assert torch.equal(is_top, wanted.argmax(-1) == targets)


def test_the_answer_head_scores_no_prompt_and_survives_a_batch_without_answers():
    from trl.trainer.utils import add_fused_lm_head

    model = tiny_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    seen = []
    fused = model.forward.__func__

    def watched(self, *args, **given):
        if given.get("shift_labels") is not None:
            seen.append(given["shift_labels"].numel())
        return fused(self, *args, **given)

    model.forward = watched.__get__(model)
    score_answers_alone(model, 4, needs_trl=True)
    ids = torch.randint(2, 258, (2, 12))
    labels = ids.clone()
    labels[:, :7] = -100
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == [4, 4, 2]
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert not out.log_probs.any()
    out.log_probs.sum().backward()
    # Without `fused_lm_head` it is the model's own forward.
    assert model(input_ids=ids).logits.shape == (2, 12, 258)
    assert model.generate(ids[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_how_much_is_held_at_once_may_change_between_two_commands(finished, changed_recipe):
    """A run that ran out of memory goes on with smaller parts; what was made stays made."""
    recipe = changed_recipe(grpo={"rollout_batch_size": 2, "logprob_tokens": 64}, sft={"longest_first": False})
    said = succeeds("run", recipe, "--output_dir", finished)
    assert "grpo: done before, skipped" in said
    assert "sft: done before, skipped" in said
    refused("run", changed_recipe(grpo={"rollout_batch_size": 0}), "--output_dir", finished,
            says=("grpo.rollout_batch_size: got 0, expected at least 1",))  # fmt: skip


def test_the_rollout_s_share_is_in_the_metrics_and_on_the_page(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert 0 < metrics["rollout_seconds"]["grpo"] < metrics["seconds"]["grpo"]
    assert "Rollouts, the completions that GRPO learns from, took" in (finished_run / "report.html").read_text()
    log = (finished_run / "run.log").read_text()
    assert "sft: 4 rows of up to" in log
    assert "with completions of 6 went first, forward and backward" in log
