"""`lora.base`: a base in 4 or 8 bits through every stage; what it saves; what is refused."""

import copy
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lorapar
import lorapar_kernels as lk
from lorapar import InputError
from lorapar.adapter.attach import load_adapter
from lorapar.adapter.layers import lora_parameters
from lorapar.adapter.merging import merge_checkpoint, merged_parameters, merged_weight
from lorapar.adapter.proof import Snapshot, verify
from lorapar.doctor import doctor
from lorapar.memory.process import release_freed
from lorapar.model.load import load_model
from lorapar.model.quantised import quantisation, works_here
from lorapar.recipe.reading import parse
from lorapar.recipe.sections import ModelConfig
from tests.lorapar.driver import recipe_values, refused, succeeds, write_recipe
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_training import ROWS, grpo_config, letters, sft_config
from tests.tiny import tiny_tokenizer

needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'lorapar[bnb]')",
)
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])


def load(folder, base, **keys):
    return load_model(ModelConfig(str(folder), **({"dtype": "float32", "device": "cpu"} | keys)), base)


def random_layer(kind, out, inner, bias=False):
    import bitsandbytes as bnb

    if kind == "nf4":
        layer = bnb.nn.Linear4bit(inner, out, bias=bias, quant_type="nf4", compress_statistics=True)
    else:
        layer = bnb.nn.Linear8bitLt(inner, out, bias=bias, has_fp16_weights=False)
    torch.nn.init.normal_(layer.weight.data)
    return layer.to("cpu").requires_grad_(False)


@needs_bnb
@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_and_its_gradient_are_those_of_the_dequantised_weight(kind, bias):
    from lorapar_kernels.bnb_weights import FrozenProduct, dequantised

    layer = random_layer(kind, 96, 192, bias)
    weight = dequantised(layer, torch.float32).double().clone()
    x, dy = torch.randn(3, 5, 192, requires_grad=True), torch.randn(3, 5, 96)
    y = FrozenProduct.apply(x, layer)
    y.backward(dy)
    expected = x.detach().double() @ weight.t() + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=1e-5, atol=1e-5)
    # And as bitsandbytes' own product of the same layer in training.
    torch.testing.assert_close(y.detach(), layer.train()(x.detach()), rtol=1e-5, atol=1e-5)


@needs_bnb
@KINDS
def test_nothing_of_x_s_or_w_s_size_is_kept_for_the_backward(kind):
    from lorapar_kernels.bnb_weights import FrozenProduct

    layer, saved = random_layer(kind, 64, 64), []
    x = torch.randn(16, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = FrozenProduct.apply(x, layer)
    assert saved == []
    y.sum().backward()
    assert x.grad is not None


@needs_bnb
@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_weight_stands_in_for_a_layer_s_own(kind, bias):
    from lorapar_kernels.bnb_weights import dequantised, frozen_weight

    layer, x = random_layer(kind, 96, 192, bias), torch.randn(2, 192, requires_grad=True)
    weight = frozen_weight(layer, x)
    assert (weight.shape, weight.device) == (torch.Size((96, 192)), torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.dense(dtype), dequantised(layer, dtype))
        assert weight.dense(dtype).dtype == dtype


@needs_bnb
@KINDS
def test_a_layer_that_does_more_than_its_product_is_called(kind):
    from lorapar_kernels.bnb_weights import frozen_weight, take_over

    layer, x = random_layer(kind, 64, 64, bias=True), torch.randn(2, 64, requires_grad=True)
    assert frozen_weight(layer, x) is not None
    take_over(layer)
    assert frozen_weight(layer, x) is not None
    # Where no gradient goes through, a 4-bit layer's own kernel is quicker; 8 bits have none that computes the same.
    with torch.no_grad():
        assert (frozen_weight(layer, x) is None) == (kind == "nf4")
    assert (frozen_weight(layer, x.detach()) is None) == (kind == "nf4")
    layer.bias.requires_grad_()
    assert frozen_weight(layer, x) is None
    layer.bias.requires_grad_(False)
    if kind == "nf4":
        layer.compute_dtype = torch.bfloat16
        assert frozen_weight(layer, x) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen_weight(layer, x) is not None
        layer.compute_dtype = None
    layer.forward = lambda given: given
    assert frozen_weight(layer, x) is None


def fast_layer(kind, out, inner, bias=False, **keys):
    """PEFT's LoRA layer of such a base, accelerated; B is random too."""
    model = nn.ModuleDict({"layer": random_layer(kind, out, inner, bias)})
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    config = LoraConfig(target_modules=["layer"], init_lora_weights=False, **keys)
    return lk.accelerate(inject_adapter_in_model(config, model))["layer"].train()


@needs_bnb
@KINDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_layer_is_one_op_with_the_dequantised_weight(kind, bias, p, monkeypatch):
    """Bit for bit `lora_linear` of that weight, made twice a step and kept by nobody; the forward is as `lora_add` on
    the base's own product, the gradient to rounding."""
    from lorapar_kernels import bnb_weights

    layer = fast_layer(kind, 96, 192, bias, r=5, lora_dropout=p)
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, dy = torch.randn(2, 7, 192, requires_grad=True), torch.randn(2, 7, 96)
    weight = bnb_weights.dequantised(base, torch.float32).clone()

    def gradients(y):
        return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)

    made, saved, seed = [], [], torch.manual_seed(4).initial_seed()
    inner = bnb_weights.dequantised
    monkeypatch.setattr(bnb_weights, "dequantised", lambda *given: (made.append(given[1]), inner(*given))[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert max(tensor.numel() for tensor in saved) < weight.numel()
    ours = gradients(y)
    assert made == [torch.float32, torch.float32]
    torch.manual_seed(seed)
    drawn = (p, torch.randint(2**62, (1,))) if p else (0.0, None)
    whole = gradients(lk.lora_linear(x, weight, a, b, layer.scaling["default"], base.bias, None, None, *drawn))
    assert all(torch.equal(one, other) for one, other in zip(ours, whole))
    y = bnb_weights.FrozenProduct.apply(x, base)
    apart = gradients(lk.lora_add(y, x, a, b, layer.scaling["default"], None, None, *drawn))
    assert torch.equal(ours[0], apart[0])
    for one, other in zip(ours, apart):
        assert float((one - other).norm() / other.norm()) < 2e-6


@needs_bnb
@KINDS
def test_no_output_is_copied_and_no_gradient_is_summed_by_autograd(kind):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape in ((29, 96), (29, 192)):
                seen.append(func.overloadpacket.__name__)
            return out

    layer, seen = fast_layer(kind, 96, 192, r=5), []
    x, dy = torch.randn(29, 192, requires_grad=True), torch.randn(29, 96)
    with Seen():
        layer(x).backward(dy)
    # x Wᵀ and S Bᵀ into one y, dY W and dS A into one dX; x's gradient is detached as it is kept.
    assert [name for name in seen if name not in ("detach", "view", "_unsafe_view")] == ["mm", "addmm_"] * 2


@needs_bnb
@KINDS
def test_a_second_derivative_through_the_layer(kind):
    from lorapar_kernels.bnb_weights import dequantised

    layer = fast_layer(kind, 64, 64, r=4)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64, requires_grad=True)

    def second(y):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, b))

    dense = dequantised(layer.base_layer, torch.float32).clone() + layer.scaling["default"] * b @ a
    for one, other in zip(second(layer(x)), second(x @ dense.t())):
        assert float((one - other).norm() / other.norm()) < 1e-5


@needs_bnb
def test_weights_of_several_shapes_share_one_buffer():
    from lorapar_kernels.bnb_weights import dequantised

    large, small = random_layer("int8", 128, 128), random_layer("int8", 64, 64)
    first = dequantised(large, torch.float32)
    kept = first.clone()
    assert dequantised(small, torch.float32).data_ptr() == first.data_ptr()
    assert torch.equal(dequantised(large, torch.float32), kept)


@needs_bnb
def test_each_stream_has_a_buffer_of_its_own_and_a_graph_its_own_memory(monkeypatch):
    from lorapar_kernels import bnb_weights

    current = 7
    monkeypatch.setattr(bnb_weights, "_buffers", {})
    monkeypatch.setattr(bnb_weights, "_stream", lambda device: current)
    layer, other = random_layer("int8", 64, 48), random_layer("int8", 64, 48)
    one = bnb_weights.dequantised(layer, torch.float32)
    kept = one.clone()
    current = 8
    two = bnb_weights.dequantised(other, torch.float32)
    assert two.data_ptr() != one.data_ptr()
    assert torch.equal(one, kept)
    current = 7
    assert bnb_weights.dequantised(layer, torch.float32).data_ptr() == one.data_ptr()
    assert len(bnb_weights._buffers) == 2
    # Captured: none of the buffers, and none for a later call.
    current = None
    three = bnb_weights.dequantised(other, torch.float32)
    assert three.data_ptr() not in (one.data_ptr(), two.data_ptr())
    assert torch.equal(one, kept)
    assert len(bnb_weights._buffers) == 2
    release_freed()
    assert not bnb_weights._buffers


@needs_bnb
def test_the_stream_is_the_current_one_of_the_device(monkeypatch):
    from lorapar_kernels.bnb_weights import _stream

    capturing, device = False, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: SimpleNamespace(cuda_stream=40 + of.index))
    assert _stream(device) == 41
    assert _stream(torch.device("cpu")) == 0
    capturing = True
    assert _stream(device) is None


@needs_bnb
@KINDS
def test_an_evaluation_between_changes_neither_the_weights_nor_the_gradient(tiny_folder, kind):
    """bitsandbytes repacks 4-bit weights in evaluation on an AVX512-BF16 CPU, and then computes without autograd."""
    model = lorapar.attach(load(tiny_folder, kind), config(), start="paper")
    tokens = torch.randint(2, 258, (2, 9))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def gradient():
        model.zero_grad()
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        return {n: p.grad.clone() for n, p in lora_parameters(model).items()}

    gradient()  # in which siblings are learned; from the next on they are one op
    first = gradient()
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    for name, grad in gradient().items():
        assert torch.equal(grad, first[name])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@needs_bnb
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_base_is_in_the_form_asked_for(tiny_folder, kind, dtype):
    model, plain = load(tiny_folder, kind, dtype=dtype), load(tiny_folder, None, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    if kind == "nf4":
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == getattr(torch, dtype)
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)
    assert model.training
    from lorapar_kernels.bnb_weights import dequantised

    weight = plain.model.layers[0].self_attn.q_proj.weight.float()
    error = relative_error(dequantised(layer, torch.float32), weight)
    # Of normal weights NF4 in blocks of 64 loses about 0.09, eight bits about 0.01.
    assert 0 < error < (0.12 if kind == "nf4" else 0.02)


def relative_error(made, weight):
    return float((made.float() - weight.float()).norm() / weight.float().norm())


@pytest.fixture
def faulty(monkeypatch):
    """bitsandbytes as 0.50.2 is on a CPU with AVX-512 where rows are not whole blocks, but at every width and anywhere:
    a block has its neighbour's scale, and a row of 8 bits too large a one."""
    from lorapar.adapter import layers_bnb

    functional = layers_bnb.bnb_functional
    dequantize_4bit, int8_vectorwise_quant = functional.dequantize_4bit, functional.int8_vectorwise_quant

    def of_neighbour(A, state, *rest):
        state = copy.copy(state)
        state.absmax = state.absmax.roll(1)
        return dequantize_4bit(A, state, *rest)

    def too_large(A, *rest):
        codes, scales, outliers = int8_vectorwise_quant(A, *rest)
        return codes, 1.02 * scales, outliers

    def start():
        monkeypatch.setattr(functional, "dequantize_4bit", of_neighbour)
        monkeypatch.setattr(functional, "int8_vectorwise_quant", too_large)
        layers_bnb._probe.cache_clear()

    yield start
    layers_bnb._probe.cache_clear()


@needs_bnb
@KINDS
def test_a_layer_that_is_not_its_weight_quantised_is_refused_on_load(tiny_folder, faulty, kind):
    from lorapar.adapter.layers_bnb import bnb_functional

    faulty()
    before = bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant
    says = (
        rf"^lora.base: bitsandbytes [\d.]+ dequantises {kind} weights of \d+ columns wrongly on cpu: off by [\d.]+ of"
    )
    with pytest.raises(InputError, match=says):
        load(tiny_folder, kind)
    assert (bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant) == before


@needs_bnb
def test_a_checkpoint_quantised_already_is_refused_by_a_probe_of_its_widths(tiny_folder, tmp_path, faulty):
    load(tiny_folder, "nf4").save_pretrained(tmp_path)
    model = load(tmp_path, None)
    faulty()
    with pytest.raises(InputError, match="dequantises nf4 weights of 64 columns wrongly"):
        lorapar.attach(model, config(), start="paper")
    with pytest.raises(InputError, match="dequantises nf4 weights of 64 columns wrongly"):
        load(tmp_path, None)


@needs_bnb
def test_a_weight_that_an_evaluation_repacked_is_refused(tiny_folder, tmp_path):
    """As an evaluation by bitsandbytes itself does on a CPU with AVX512-BF16; ours then read other bytes."""
    from lorapar.adapter.layers_bnb import bnb

    load(tiny_folder, "nf4").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    with torch.no_grad():
        model(input_ids=torch.arange(9)[None])
    for module in model.modules():
        if isinstance(module, bnb.Linear4bit):
            module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="q_proj: bitsandbytes repacked its 4-bit weight in an evaluation on this CPU"):
        lorapar.attach(model, config(), start="paper")


@needs_bnb
@pytest.mark.parametrize("columns", [16, 32, 48, 64, 66, 80, 96, 128, 400, 576])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_width_is_refused_exactly_where_it_is_dequantised_wrongly(kind, columns):
    """Which widths those are depends on the processor (with AVX-512: 16, 32, 48, 80, 96 and 400), this does not."""
    from lorapar.adapter.layers_bnb import _probe, bnb_functional

    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(1))
    codes, state = bnb_functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    error = relative_error(bnb_functional.dequantize_4bit(codes, state), weight)
    refused = _probe(kind, columns, 64, True, torch.float32, torch.device("cpu")) is not None
    # Of normal weights NF4 loses about 0.09, FP4 0.13.
    assert refused == (error > 0.15)


@needs_bnb
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_explains_is_not_refused(dtype):
    from lorapar.adapter.layers_bnb import bnb_functional, unexplained

    normal = torch.randn(96, 576, generator=torch.Generator().manual_seed(2))
    sizes = 10 ** torch.randn(96, 1, generator=torch.Generator().manual_seed(3))
    for weight in (normal, normal**5, normal.sigmoid(), normal * sizes, torch.eye(128), torch.zeros(64, 64)):
        weight = weight.to(dtype)
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                codes, state = bnb_functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
                assert unexplained(weight, bnb_functional.dequantize_4bit(codes, state), kind, 64) is None
        codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight.half())
        assert unexplained(weight, codes * (scales.unsqueeze(1) / 127.0), "int8", weight.shape[1]) is None


def test_bf16_and_unset(tiny_folder):
    assert load(tiny_folder, "bf16", dtype="auto").dtype == torch.bfloat16
    assert load(tiny_folder, None).dtype == torch.float32
    with pytest.raises(InputError, match="lora.base: got bf16 beside model.dtype: float32"):
        load(tiny_folder, "bf16")


@needs_bnb
@KINDS
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_trainers_keep_the_adapter_s_dtype_and_small_steps_move_it(tiny_folder, tmp_path, kind, stage):
    """At lr 1e-5 a step rounds away in bf16 for most elements; TRL casts them so beside a quantised base."""
    model = lorapar.attach(load(tiny_folder, kind), config(), start="twin")
    made = random_partition(model)
    before = Snapshot.take(model)
    keys = dict(learning_rate=1e-5, weight_decay=0.0, max_steps=2, gradient_checkpointing=True)
    if stage == "sft":
        trainer, trained = lorapar.sft(model, tiny_tokenizer(), ROWS, made, sft_config(tmp_path, **keys))
    else:
        settings = grpo_config(tmp_path, beta=0.04, **keys)
        trainer, trained = lorapar.grpo(model, tiny_tokenizer(), ROWS, made, settings, [letters])
        assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if ".ref." in n)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    assert trained.verified["moved"] > 0.9 * trained.verified["active"]
    assert verify(model, before, made, stage) == trained.verified


@needs_bnb
@KINDS
def test_gradient_checkpointing_changes_nothing(tiny_folder, tmp_path, kind):
    found = []
    for on in (False, True):
        model = lorapar.attach(load(tiny_folder, kind), config(lora_dropout=0.1), start="twin")
        made = random_partition(model)
        settings = sft_config(tmp_path, gradient_checkpointing=on, max_steps=3)
        lorapar.sft(model, tiny_tokenizer(), ROWS, made, settings)
        found.append(dict(lora_parameters(model)))
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=1e-5, atol=1e-6)


@needs_bnb
@KINDS
def test_a_whole_run(tiny_folder, tmp_path, kind):
    values = recipe_values(tiny_folder)
    values["lora"] |= {"base": kind}
    values["export"] = {"merged": True}
    for stage in ("sft", "grpo"):
        values[stage] |= {"gradient_checkpointing": True}
    folder = tmp_path / "run"
    said = succeeds("run", write_recipe(tmp_path / "r.yaml", values), "--output_dir", folder)
    assert f"merged from the original weights in bfloat16 (0 MB), not into the {kind} base" in said
    records = json.loads((folder / "stages.json").read_text())
    assert records["sft"]["moved"] > 0
    assert records["grpo"]["moved"] > 0
    assert records["export"]["merged_from_trained_logit_difference"] > records["export"]["merged_logit_difference"]
    assert json.loads((folder / "metrics.json").read_text())["accuracy"]["grpo"]["all"] is not None
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert getattr(merged.config, "quantization_config", None) is None
    # Another form of the base is another run.
    values["lora"] |= {"base": "bf16"}
    values["model"].pop("dtype")
    refused("run", write_recipe(tmp_path / "s.yaml", values), "--output_dir", folder, says=("another recipe",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_merged_weight_is_summed_wide_and_rounded_once(dtype):
    weight, a, b = torch.randn(24, 40).to(dtype), torch.randn(4, 40) * 0.1, torch.randn(24, 4) * 0.1
    exact = weight.double() + 1.5 * b.double() @ a.double()
    made = merged_weight(weight, a, b, 1.5)
    assert made.dtype == dtype
    bound = torch.finfo(dtype).eps * 0.51 + (0 if dtype == torch.float64 else torch.finfo(torch.float32).eps * 4)
    assert float(((made.double() - exact).abs() / exact.abs().clamp(min=1e-2)).max()) <= max(bound, 1e-13)


@needs_bnb
def test_a_merged_checkpoint_is_the_original_with_the_delta(tiny_folder, tmp_path):
    model = lorapar.attach(load(tiny_folder, "nf4"), config(), start="twin")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lorapar.export(model, tiny_tokenizer(), tmp_path)
    original = load_adapter(load(tiny_folder, None), tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    merge_checkpoint(str(tiny_folder), tmp_path / "adapter", out, torch.float32)
    written = load_file(out / "model.safetensors")
    for name, tensor in merged_parameters(original):
        if name in written:
            torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-6)
    assert "model.layers.1.mlp.down_proj.weight" in written
    load(tiny_folder, "nf4").save_pretrained(tmp_path / "quantised")
    with pytest.raises(InputError, match="holds quantised weights alone"):
        merge_checkpoint(str(tmp_path / "quantised"), tmp_path / "adapter", out, torch.float32)


@needs_bnb
def test_a_checkpoint_that_is_quantised_already(tiny_folder, tmp_path):
    load(tiny_folder, "nf4").save_pretrained(tmp_path)
    for base in (None, "nf4"):
        model = load(tmp_path, base)
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    with pytest.raises(InputError, match="lora.base: got int8, but .* holds its weights as nf4"):
        load(tmp_path, "int8")


def test_what_is_refused(tiny_folder, tmp_path, monkeypatch):
    values = recipe_values(tiny_folder)
    values["lora"] |= {"base": "nf5"}
    with pytest.raises(InputError, match="lora.base: got 'nf5', expected nf4, int8, bf16, or nothing"):
        parse(values)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name))
    with pytest.raises(InputError, match=r"lora.base: nf4 needs bitsandbytes.*pip install 'lorapar\[bnb\]'"):
        quantisation("nf4", torch.float32)
    values["lora"] |= {"base": "int8"}
    refused("run", write_recipe(tmp_path / "r.yaml", values), "--output_dir", tmp_path / "run", says=("lorapar[bnb]",))
    assert works_here("nf4", torch.device("cpu")).startswith("no: bitsandbytes is not installed")


@needs_bnb
def test_doctor_says_which_bases_work_here():
    said = doctor()
    assert "lora.base: nf4       yes" in said
    assert "lora.base: int8      yes" in said
