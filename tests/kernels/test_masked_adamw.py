"""masked_adamw: torch.optim.AdamW on the active elements, and not one bit of the others."""

import pytest
import torch

from lorapar_kernels import PreparedAdamW, masked_adamw


@pytest.fixture(autouse=True, params=["reference", ""])
def backend(request, monkeypatch):
    """Each test under the reference, and under whatever is installed."""
    monkeypatch.setenv("LORAPAR_BACKEND", request.param)


def case(dtype, shapes=((8, 37), (53, 8), (5,), (1, 1)), share=0.4):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    masks = [torch.rand(shape, generator=generator) < share for shape in shapes]
    masks[-1][::2] = True
    state = torch.float64 if dtype == torch.float64 else torch.float32
    moments = [[torch.zeros(int(mask.sum()), dtype=state) for mask in masks] for _ in range(2)]
    return params, masks, moments[0], moments[1], generator


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_torch_adamw_on_gathered_elements(dtype, tolerance, maximize):
    params, masks, exp_avgs, exp_avg_sqs, generator = case(dtype)
    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    gathered = [param[mask].clone().requires_grad_() for param, mask in zip(params, masks)]
    optimizer = torch.optim.AdamW(gathered, foreach=False, **settings)
    for step in range(1, 51):
        grads = [torch.randn(param.shape, generator=generator, dtype=dtype) for param in params]
        for theirs, grad, mask in zip(gathered, grads, masks):
            theirs.grad = grad[mask].clone()
        optimizer.step()
        masked_adamw(params, grads, masks, exp_avgs, exp_avg_sqs, step, **settings)
    for i, (param, mask, theirs) in enumerate(zip(params, masks, gathered)):
        torch.testing.assert_close(param[mask], theirs.detach(), rtol=tolerance, atol=tolerance)
        state = optimizer.state[theirs]
        torch.testing.assert_close(exp_avgs[i], state["exp_avg"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(exp_avg_sqs[i], state["exp_avg_sq"], rtol=tolerance, atol=tolerance)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inactive_elements_keep_every_bit(dtype):
    params, masks, exp_avgs, exp_avg_sqs, generator = case(dtype, shapes=((8, 37), (33, 8)))
    # What arithmetic would change: signalling and payload NaNs, -0.0, infinities, denormals.
    hostile = {8: 0x7FF0000000000BAD, 4: 0x7F800BAD, 2: 0x7C01 if dtype == torch.float16 else 0x7F81}
    for param, mask in zip(params, masks):
        values = bits(param)[~mask].clone()
        values[0::5] = hostile[param.element_size()]
        values[1::5] = torch.tensor([-0.0], dtype=dtype).view(values.dtype)
        values[2::5] = 1
        bits(param)[~mask] = values
    before = [bits(param).clone() for param in params]
    for step in range(1, 1001):
        grads = [torch.randn(param.shape, generator=generator).to(dtype) for param in params]
        for grad, mask in zip(grads, masks):
            grad[~mask] = float("nan")
        masked_adamw(params, grads, masks, exp_avgs, exp_avg_sqs, step, lr=1e-2, weight_decay=0.1)
    for param, mask, old in zip(params, masks, before):
        assert torch.equal(bits(param)[~mask], old[~mask])
        assert param[mask].isfinite().all()
        assert (bits(param)[mask] != old[mask]).float().mean() > 0.9


def test_half_precision_is_computed_in_fp32_and_rounded_once():
    param = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    wide = param.float()
    mask = torch.ones(2, dtype=torch.bool)
    state = [[torch.zeros(2)] for _ in range(4)]
    grad = torch.tensor([0.3, -0.7], dtype=torch.bfloat16)
    masked_adamw([param], [grad], [mask], state[0], state[1], 1, lr=0.01)
    masked_adamw([wide], [grad.float()], [mask], state[2], state[3], 1, lr=0.01)
    assert torch.equal(param, wide.to(torch.bfloat16))
    assert torch.equal(state[0][0], state[2][0])


def test_strided_parameters_and_row_major_state():
    wide = torch.zeros(6, 8)
    param = wide.t()  # [8, 6], column-major
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[1, 2] = mask[0, 5] = mask[7, 0] = True
    grad = torch.arange(48.0).view(8, 6)
    exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
    masked_adamw([param], [grad], [mask], [exp_avg], [exp_avg_sq], 1, lr=0.1, betas=(0.0, 0.0), weight_decay=0.0)
    assert exp_avg.tolist() == [5.0, 8.0, 42.0]
    assert exp_avg_sq.tolist() == [25.0, 64.0, 1764.0]
    assert (wide.t() != 0).nonzero().tolist() == [[0, 5], [1, 2], [7, 0]]


def test_nothing_active_and_no_parameters():
    param = torch.ones(2, 2)
    empty = torch.zeros(0)
    masked_adamw([param], [torch.ones(2, 2)], [torch.zeros(2, 2, dtype=torch.bool)], [empty], [empty], 1, lr=1.0)
    assert torch.equal(param, torch.ones(2, 2))
    masked_adamw([], [], [], [], [], 1, lr=1.0)


def test_takes_a_leaf_that_requires_a_gradient():
    param = torch.nn.Parameter(torch.ones(3))
    mask = torch.tensor([True, False, True])
    masked_adamw([param], [torch.ones(3)], [mask], [torch.zeros(2)], [torch.zeros(2)], 1, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(param.detach(), torch.tensor([0.9, 1.0, 0.9]))
    assert param.requires_grad
    assert param.is_leaf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": [torch.ones(2, 3)]}, r"masks\[0\] must be torch.bool \[2, 3\], got torch.float32"),
        (
            {"masks": [torch.ones(3, 2, dtype=torch.bool)]},
            r"masks\[0\] must be torch.bool \[2, 3\], got torch.bool \[3, 2\]",
        ),
        ({"grads": [torch.ones(6)]}, r"grads\[0\] must be \[2, 3\], as its parameter, got \[6\]"),
        ({"grads": [torch.ones(2, 3).long()]}, r"grads\[0\] must be of a floating-point dtype, got torch.int64"),
        ({"grads": [torch.ones(2, 3, device="meta")]}, r"grads\[0\] must be on its parameter's device cpu, got meta"),
        (
            {"exp_avgs": [torch.zeros(5)]},
            r"exp_avgs\[0\] must be \[6\], one entry an active element, got \[5\]",
        ),
        (
            {"exp_avg_sqs": [torch.zeros(6, dtype=torch.float64)]},
            r"exp_avg_sqs\[0\] must be torch.float32 beside torch.float32 parameters, got torch.float64",
        ),
        ({"exp_avgs": [torch.zeros(6, dtype=torch.int8)]}, "scales must be given for 8-bit moments and for no others"),
        ({"scales": [torch.zeros(2, 1)]}, "scales must be given for 8-bit moments and for no others"),
        ({"compensations": [torch.zeros(6)]}, r"compensations are for bf16 and fp16 parameters, params\[0\] is"),
        ({"compensations": [torch.zeros(5)]}, r"compensations\[0\] must be \[6\], one entry an active element"),
        ({"params": [torch.ones(2, 3, dtype=torch.int64)]}, r"params\[0\] must be of a floating-point dtype"),
        ({"grads": []}, "grads must hold 1 tensors, one a parameter, got 0"),
        ({"step": 0}, "step must be an int of at least 1, got 0"),
        ({"step": 1.0}, "step must be an int of at least 1, got 1.0"),
        ({"step": torch.tensor(0)}, "step must hold a whole number of at least 1, got 0"),
        ({"step": torch.tensor(1.5)}, "step must hold a whole number of at least 1, got 1.5"),
        ({"step": torch.tensor(float("inf"))}, "step must hold a whole number of at least 1, got inf"),
        ({"step": torch.tensor([1, 2])}, "step must be one int64 or float32 element, got 2 of torch.int64"),
        (
            {"step": torch.tensor(1, dtype=torch.int32)},
            "step must be one int64 or float32 element, got 1 of torch.int32",
        ),
        ({"step": torch.ones((), device="meta")}, "step must be on the parameters' device, got meta beside cpu at 0"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, "lr must be one float32 element, got 1 of torch.float64"),
        ({"lr": torch.tensor(-1.0)}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": torch.ones((), device="meta")}, "lr must be on the parameters' device, got meta beside cpu at 0"),
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be finite"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas must be two floats, got \(0.9,\)"),
        ({"betas": (0.9, None)}, "betas must be a float, got NoneType"),
        ({"lr": "0.1"}, "lr must be a float, got str"),
        ({"step": 1 << 63}, "step must be below 2⁶³"),
        ({"step": torch.tensor(1e30)}, "step must be below 2⁶³"),
        ({"seed": 1.5}, r"seed must be an int in \[0, 2⁶³\), got 1.5"),
        ({"grads": [None]}, r"grads\[0\] must be a tensor, got None"),
        ({"grad_scale": 0.5}, "grad_scale must be a tensor, got float"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale must be on the parameters' device, got meta"),
    ],
)
def test_refusals_leave_everything_as_it_was(change, message):
    param = torch.ones(2, 3)
    arguments = {
        "params": [param],
        "grads": [torch.ones(2, 3)],
        "masks": [torch.ones(2, 3, dtype=torch.bool)],
        "exp_avgs": [torch.zeros(6)],
        "exp_avg_sqs": [torch.zeros(6)],
        "step": 1,
        "lr": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        masked_adamw(**arguments)
    assert torch.equal(param, torch.ones(2, 3))


def test_prepared_once_steps_as_checked_each_time():
    params, masks, exp_avgs, exp_avg_sqs, generator = case(torch.float32)
    theirs = [tensor.clone() for tensor in params]
    moments = [[tensor.clone() for tensor in column] for column in (exp_avgs, exp_avg_sqs)]
    prepared = PreparedAdamW(params, masks, exp_avgs, exp_avg_sqs)
    for step in range(1, 5):
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        assert prepared.step(grads, step, lr=1e-2)
        assert masked_adamw(theirs, grads, masks, *moments, step, lr=1e-2)
        if step == 2:
            # Another storage under the same tensor, as when a model is moved, must be seen.
            old = params[0].clone()
            params[0].data = params[0].data.clone()
    assert not torch.equal(params[0], old)
    for mine, other in zip((*params, *exp_avgs, *exp_avg_sqs), (*theirs, *moments[0], *moments[1]), strict=True):
        assert torch.equal(mine, other)


def test_prepared_refuses_what_no_longer_fits():
    param, mask = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)
    prepared = PreparedAdamW([param], [mask], [torch.zeros(12)], [torch.zeros(12)])
    param.data = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"masks\[0\] must be \[4, 4\], as its parameter, got \[4, 3\]"):
        prepared.step([torch.ones(4, 4)], 1, lr=0.1)
    assert torch.equal(param, torch.ones(4, 4))


def test_compiles_whole_and_once_for_all_steps():
    params, masks, exp_avgs, exp_avg_sqs, generator = case(torch.float32, shapes=((8, 37), (5,)))
    theirs, moments = [p.clone() for p in params], [[t.clone() for t in ts] for ts in (exp_avgs, exp_avg_sqs)]
    prepared = PreparedAdamW(params, masks, exp_avgs, exp_avg_sqs)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step_of = torch.compile(lambda grads, step, lr: prepared.step(grads, step, lr=lr), backend=count, fullgraph=True)
    for step in range(1, 5):
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        step_of(grads, torch.tensor(step), torch.tensor(2.0**-7))
        masked_adamw(theirs, grads, masks, *moments, step, lr=2.0**-7)
    assert len(graphs) == 1
    for mine, other in zip((*params, *exp_avgs, *exp_avg_sqs), (*theirs, *moments[0], *moments[1]), strict=True):
        assert torch.equal(mine, other)
