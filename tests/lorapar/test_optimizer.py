"""PartitionedAdamW: equal to torch's AdamW where active, absent elsewhere; its state; resuming."""

import copy

import pytest
import torch

import lorapar
from lorapar.adapter.layers import lora_parameters
from lorapar.adapter.proof import Snapshot, verify
from lorapar.errors import InputError
from tests.lorapar.test_adapter import TOKENS, config, random_partition
from tests.tiny import tiny_model


def activated(seed=0, start="paper", share=0.4):
    model = lorapar.attach(tiny_model(), config(), start=start)
    made = random_partition(model, share, seed)
    lorapar.activate(model, made, "sft")
    return model, made


def step(model, optimizer):
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_active_elements_follow_torch_adamw_and_the_rest_stays():
    keys = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    model, made = activated()
    other = copy.deepcopy(model)
    before = Snapshot.take(model)
    ours = lorapar.PartitionedAdamW(model, **keys)
    theirs = torch.optim.AdamW(list(lora_parameters(other).values()), **keys)
    for _ in range(20):
        for parameter, twin in zip(lora_parameters(model).values(), lora_parameters(other).values()):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for (name, parameter), twin in zip(lora_parameters(model).items(), lora_parameters(other).values()):
        mask = made.active("sft")[name]
        torch.testing.assert_close(parameter[mask], twin[mask], rtol=1e-6, atol=1e-7)
        assert not torch.equal(twin[~mask], before.lora[name][~mask])  # what decay does to "frozen" elements
    counted = verify(model, before, made, "sft")
    assert counted["moved"] == counted["active"]


def test_state_is_eight_bytes_an_active_element():
    model, made = activated()
    optimizer = lorapar.PartitionedAdamW(model)
    step(model, optimizer)
    active = sum(int(m.sum()) for m in made.active("sft").values())
    assert optimizer.state_bytes() == 8 * active
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert held == 8 * active


def test_resumed_equals_uninterrupted(tmp_path):
    model, _ = activated()
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2)
    for _ in range(3):
        step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        step(model, optimizer)
    again, _ = activated()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed = lorapar.PartitionedAdamW(again, lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(3):
        step(again, resumed)
    for one, two in zip(lora_parameters(model).values(), lora_parameters(again).values()):
        assert torch.equal(one, two)


def test_moments_of_bf16_parameters_stay_fp32_through_a_resume():
    model, _ = activated()
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    model = model.bfloat16()
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2)
    step(model, optimizer)
    resumed = lorapar.PartitionedAdamW(model, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for parameter, state in optimizer.state.items():
        assert resumed.state[parameter]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[parameter]["exp_avg_sq"], state["exp_avg_sq"])


def test_a_state_of_another_partition_is_refused():
    one, _ = activated(seed=0)
    two, _ = activated(seed=1)
    optimizer = lorapar.PartitionedAdamW(one)
    step(one, optimizer)
    with pytest.raises(InputError, match="optimizer state: it belongs to partition"):
        lorapar.PartitionedAdamW(two).load_state_dict(optimizer.state_dict())


def test_a_model_without_an_active_stage_is_refused():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with pytest.raises(InputError, match="no stage is active"):
        lorapar.PartitionedAdamW(model)
    activated_model, _ = activated()
    with pytest.raises(InputError, match="lr: got -1"):
        lorapar.PartitionedAdamW(activated_model, lr=-1)


def test_gradients_clipped_are_those_of_active_elements_only():
    model, made = activated()
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    parts = [p.grad[made.active("sft")[n]] for n, p in lora_parameters(model).items()]
    torch.testing.assert_close(total, torch.cat(parts).norm())


ALL_FORMS = [
    {},
    {"moments": "8bit"},
    {"rounding": "compensated"},
    {"rounding": "stochastic"},
    {"moments": "8bit", "rounding": "stochastic", "maximize": True},
]


@pytest.mark.parametrize("keys", ALL_FORMS, ids=str)
def test_a_saved_state_goes_on_under_another_backend(monkeypatch, tmp_path, keys):
    dtype = torch.bfloat16 if "rounding" in keys else torch.float32

    def trained(backends, folder):
        """Six steps, the first three under one backend, saved, loaded, the rest under the other."""
        model, _ = activated()
        model = model.to(dtype)
        optimizer = lorapar.PartitionedAdamW(model, lr=1e-2, **keys)
        generator = torch.Generator().manual_seed(0)
        for number, backend in enumerate(backends):
            monkeypatch.setenv("LORAPAR_BACKEND", backend)
            if number == 3:
                torch.save(optimizer.state_dict(), folder / "state.pt")
                optimizer = lorapar.PartitionedAdamW(model, lr=1e-2, **keys)
                optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
            for parameter in lora_parameters(model).values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
        return list(lora_parameters(model).values())

    whole = trained(["reference"] * 6, tmp_path)
    for backends in (["reference"] * 3 + [""] * 3, [""] * 3 + ["reference"] * 3):
        for one, two in zip(whole, trained(backends, tmp_path)):
            assert torch.equal(one, two)


def test_eight_bit_moments_are_two_bytes_an_active_element():
    model, made = activated()
    optimizer = lorapar.PartitionedAdamW(model, moments="8bit")
    step(model, optimizer)
    active = sum(int(mask.sum()) for mask in made.active("sft").values())
    tiles = sum(-(-parameter.numel() // 512) for parameter in lora_parameters(model).values())
    assert optimizer.state_bytes() == 2 * active + 8 * tiles


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out():
    model, made = activated()
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2, skip_nonfinite=True)
    step(model, optimizer)
    before = [parameter.clone() for parameter in lora_parameters(model).values()]
    name, parameter = next(iter(lora_parameters(model).items()))
    for other in lora_parameters(model).values():
        other.grad = torch.ones_like(other)
    parameter.grad[made.active("sft")[name]] = float("nan")
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, lora_parameters(model).values()))
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
    parameter.grad.fill_(1.0)
    optimizer.step()
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())
    assert not torch.equal(before[0], parameter)


def test_grad_scale_is_the_scaled_gradient():
    models = [activated()[0] for _ in range(2)]
    optimizers = [lorapar.PartitionedAdamW(model, lr=1e-2, eps=1e-3) for model in models]
    for number, model in enumerate(models):
        for parameter in lora_parameters(model).values():
            parameter.grad = torch.full_like(parameter, 0.5 if number else 1.0)
    optimizers[0].step(grad_scale=torch.tensor(0.5))
    optimizers[1].step()
    for one, two in zip(*(lora_parameters(model).values() for model in models)):
        assert torch.equal(one, two)


def test_a_state_without_the_newer_settings_loads():
    model, _ = activated()
    optimizer = lorapar.PartitionedAdamW(model, lr=1e-2)
    step(model, optimizer)
    state = optimizer.state_dict()
    for key in ("maximize", "moments", "rounding", "skip_nonfinite", "seed"):
        del state["param_groups"][0][key]
    resumed = lorapar.PartitionedAdamW(model, lr=1e-2)
    resumed.load_state_dict(state)
    step(model, resumed)


def test_settings_that_do_not_fit_are_refused():
    model, _ = activated()
    with pytest.raises(InputError, match="moments: got '4bit', allowed: fp32, 8bit"):
        lorapar.PartitionedAdamW(model, moments="4bit")
    with pytest.raises(InputError, match="rounding: got 'up', allowed: nearest, stochastic, compensated"):
        lorapar.PartitionedAdamW(model, rounding="up")
    with pytest.raises(InputError, match=r"rounding: stochastic is for bfloat16 parameters, got torch\.float32"):
        lorapar.PartitionedAdamW(model, rounding="stochastic")
