"""Scores of a whole model against one example at a time in float64; batch size, masking, methods, refusals, file."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

import lorapar
from lorapar.adapter.layers import ADAPTER, lora_parameters, masked_layers
from lorapar.adapter.proof import Snapshot
from lorapar.errors import InputError
from lorapar.scoring.batches import IGNORED
from lorapar.scoring.score import scoring
from tests.lorapar.test_adapter import config
from tests.tiny import tiny_model, tiny_tokenizer


def rows(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        ids = torch.randint(2, 258, (length,), generator=generator).tolist()
        n_prompt = 1 + i % (length - 1)
        made.append({"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]})
    return made


def naive_sums(model, examples):
    """The released script's way in float64: a forward and a backward an example, the mean loss of its answer tokens."""
    parameters = lora_parameters(model)
    sums = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()}
    model.eval()
    for row in examples:
        model.zero_grad()
        out = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        F.cross_entropy(out[:-1], torch.tensor(row["labels"])[1:], ignore_index=IGNORED).backward()
        for name, parameter in parameters.items():
            gphi = parameter.grad * parameter.detach()
            sums[name][0].add_(gphi)
            sums[name][1].add_(gphi * gphi)
    model.zero_grad()
    return sums


def sums_of(model, examples, **options):
    """(Σ Gφ, Σ (Gφ)²) by parameter, as `score` gathers them."""
    found = {}

    def keep(running):
        for name, sums in running.sums.items():
            found[f"{name}.lora_A.{ADAPTER}.weight"] = sums[:2]
            found[f"{name}.lora_B.{ADAPTER}.weight"] = sums[2:]

    lorapar.score(model, None, examples, on_batch=keep, **options)
    return found


def worst(got, expected):
    """The largest relative difference of any sum of any parameter, each of the two by itself."""
    assert got.keys() == expected.keys()
    return max(
        float((one.double() - other.double()).norm() / other.double().norm())
        for name in expected
        for one, other in zip(got[name], expected[name])
    )


def large_start(model):
    """Elements far from zero, where the second-order term of I shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0, 0.1)


@pytest.mark.parametrize("start", ["paper", "twin", "pissa"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_each_sum_equals_one_example_at_a_time_in_float64(start, dtype, bound):
    exact = lorapar.attach(tiny_model().double(), config(), start=start)
    exact.double()
    large_start(exact)
    expected = naive_sums(exact, rows())
    model = lorapar.attach(tiny_model().to(dtype), config(), start=start).to(dtype)
    model.load_state_dict({n: t.to(dtype) for n, t in exact.state_dict().items()})
    assert worst(sums_of(model, rows(), batch_size=4), expected) < bound


def test_a_layer_with_a_bias_is_scored_with_it():
    """As Qwen2's q, k and v have one."""
    plain = tiny_model()
    plain.config.attention_bias = True
    model = lorapar.attach(type(plain)(plain.config).double(), config(), start="paper").double()
    large_start(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_()
    assert worst(sums_of(model, rows()), naive_sums(model, rows())) < 1e-10


def test_batch_of_eight_equals_batch_of_one_in_each_sum():
    model = lorapar.attach(tiny_model(), config(), start="twin")
    large_start(model)
    one, eight = (sums_of(model, rows(), batch_size=n) for n in (1, 8))
    assert worst(eight, one) < 2e-6


def test_order_of_rows_does_not_matter_in_either_sum():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    large_start(model)
    one, other = sums_of(model, rows(), batch_size=4), sums_of(model, rows()[::-1], batch_size=4)
    assert worst(other, one) < 1e-6


def test_prompt_tokens_carry_no_loss_and_what_they_predict_does_not_matter():
    """Two rows that differ in nothing but a label inside the prompt's −100 score the same; an answer label does not."""
    model = lorapar.attach(tiny_model(), config(), start="paper")
    base = rows(4)[3]
    n_prompt = base["labels"].count(IGNORED)
    unmasked = {"input_ids": base["input_ids"], "labels": list(base["input_ids"])}
    again = {"input_ids": base["input_ids"], "labels": [IGNORED] * n_prompt + base["input_ids"][n_prompt:]}
    scored, same, other = (lorapar.score(model, None, [r]) for r in (base, again, unmasked))
    name = next(iter(scored))
    assert torch.equal(scored[name], same[name])
    assert not torch.allclose(scored[name], other[name])


def test_scoring_leaves_the_model_as_it_was():
    model = lorapar.attach(tiny_model(), config(lora_dropout=0.5), start="twin")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    next(iter(lora_parameters(model).values())).requires_grad_(False)
    model.train()
    required = [p.requires_grad for p in model.parameters()]
    before = Snapshot.take(model)
    one, two = (lorapar.score(model, None, rows()) for _ in range(2))
    assert model.training
    after = Snapshot.take(model)
    assert after.others == before.others
    assert all(torch.equal(after.lora[n], before.lora[n]) for n in before.lora)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(layer.scoring is None for layer in masked_layers(model).values())
    assert all(torch.equal(one[n], two[n]) for n in one)  # dropout was off


def test_an_error_inside_leaves_scoring_mode():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with pytest.raises(RuntimeError, match="stop"), scoring(model):
        raise RuntimeError("stop")
    assert all(layer.scoring is None for layer in masked_layers(model).values())


def test_a_twin_scores_zero_and_the_trainable_rows_do_not():
    scores = lorapar.score(lorapar.attach(tiny_model(), config(), start="twin"), None, rows())
    for name, tensor in scores.items():
        twin, own = (tensor[4:], tensor[:4]) if ".lora_A." in name else (tensor[:, 4:], tensor[:, :4])
        assert not twin.any()
        assert own.all()
    assert scores.metadata == {"examples": 9, "method": "taylor", "rank": 4}


def test_first_order_and_random_differ_from_taylor_as_they_should():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    large_start(model)
    taylor, first, random = (lorapar.score(model, None, rows(), method=m) for m in ("taylor", "first_order", "random"))
    flat = [torch.cat([s[n].reshape(-1) for n in sorted(s)]) for s in (taylor, first, random)]
    assert not torch.allclose(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert torch.equal(flat[0].sort().values, flat[2].sort().values)


def test_text_rows_of_every_form():
    model, tokenizer = lorapar.attach(tiny_model(), config(), start="paper"), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    plain = lorapar.score(model, tokenizer, [{"prompt": "1 + 1 =", "completion": " 2"}])
    messages = lorapar.score(model, tokenizer, [{"messages": chat}])
    pair = lorapar.score(model, tokenizer, [{"prompt": chat[:1], "completion": chat[1:]}])
    name = next(iter(plain))
    assert torch.equal(messages[name], pair[name])
    assert not torch.equal(messages[name], plain[name])
    # What the model is asked carries no loss.
    n_prompt, ids = len(tokenizer("1 + 1 =").input_ids), [*tokenizer("1 + 1 = 2").input_ids, tokenizer.eos_token_id]
    as_ids = lorapar.score(model, None, [{"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]}])
    assert torch.equal(as_ids[name], plain[name])


def test_a_start_that_makes_all_scores_zero_is_refused_with_the_reason():
    model = lorapar.attach(tiny_model(), config(), start="peft")
    # B = 0: of B φ is zero, of A the gradient.
    with pytest.raises(InputError, match="every score is zero, because .* B = 0 .* use start: twin, pissa"):
        lorapar.score(model, None, rows())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "r1", "input_ids": [3, 4], "labels": [IGNORED, IGNORED]}, "row r1: no answer tokens"),
        ({"id": "r2", "input_ids": [3, 4], "labels": [3, IGNORED]}, "row r2: no answer tokens"),
        ({"id": "r3", "input_ids": [3, 4, 5], "labels": [3]}, "row r3: 3 input_ids but 1 labels"),
        ({"id": "r5", "input_ids": [3, 4, 5], "labels": [IGNORED, -1, 5]}, "row r5: label -1, expected a token or"),
        ({"id": "r6", "input_ids": [3, 4, 5]}, "row r6: no labels; a row holds prompt and completion, messages, or"),
        ({"id": "r7", "prompt": "1 + 1 ="}, "row r7: no completion; a row holds"),
        ({"text": "1 + 1 = 2"}, "row 0: no prompt; a row holds"),
        ({"prompt": "1 + 1 =", "completion": ""}, "row 0: the completion has no tokens to learn from"),
        ({"id": "r4", "input_ids": list(range(2, 42)), "labels": list(range(2, 42))}, "40 tokens, more than"),
    ],
)
def test_bad_rows_are_named(row, message):
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with pytest.raises(InputError, match=message):
        lorapar.score(model, tiny_tokenizer(), [row], max_length=30)


def test_no_rows_and_bad_options_are_refused():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with pytest.raises(InputError, match="dataset: got 'no rows'"):
        lorapar.score(model, None, [])
    with pytest.raises(InputError, match="batch_size: got 0"):
        lorapar.score(model, None, rows(), batch_size=0)
    with pytest.raises(InputError, match="method: got 'best'"):
        lorapar.score(model, None, rows(), method="best")


def test_saved_and_loaded(tmp_path):
    model = lorapar.attach(tiny_model(), config(), start="twin")
    both = lorapar.score(model, None, rows(seed=1)), lorapar.score(model, None, rows(seed=2))
    lorapar.save_scores(tmp_path / "s.safetensors", *both)
    for got, want in zip(lorapar.load_scores(tmp_path / "s.safetensors"), both):
        assert got.metadata == want.metadata
        assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_packed_row_gives_what_padded_rows_give():
    """Eight examples in one row, kept apart by their positions, against one example at a time in float64."""
    from lorapar.scoring.batches import keeps_apart, read_examples, score_batch

    model = lorapar.attach(tiny_model().double(), config(), start="paper").double()
    large_start(model)
    expected = naive_sums(model, rows(8))
    assert keeps_apart(model)
    with scoring(model) as layers:
        score_batch(model, layers, read_examples(rows(8), None, None), packed=True)
        for name, layer in layers.items():
            for factor, pair in (("lora_A", layer.scoring[:2]), ("lora_B", layer.scoring[2:])):
                for got, want in zip(pair, expected[f"{name}.{factor}.{ADAPTER}.weight"]):
                    assert (got - want).norm() / want.norm() < 1e-10


def test_a_model_whose_packed_examples_see_one_another_is_not_packed(monkeypatch):
    from lorapar.scoring import batches as score_batches

    model = lorapar.attach(tiny_model(), config(), start="paper")
    assert not score_batches.packs_examples(model)  # sdpa: padded
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    monkeypatch.setattr(score_batches, "keeps_apart", lambda model: True)
    assert score_batches.packs_examples(model)
    monkeypatch.setattr(score_batches, "keeps_apart", lambda model: False)
    assert not score_batches.packs_examples(model)
    monkeypatch.undo()
    inputs = score_batches._inputs
    # Positions that run on through the row, as a model has them that takes no notice of ours.
    monkeypatch.setattr(score_batches, "_inputs", lambda *a, **kw: {"input_ids": inputs(*a, **kw)["input_ids"]})
    assert not score_batches.keeps_apart(model)


@pytest.mark.parametrize("lengths", [[1], [5] * 20, [10, 9], [20, 19, 19, 18, 17, 3, 3, 2, 1], list(range(50, 450))])
def test_padding_is_less_than_a_twentieth_and_marks_are_kept(lengths):
    from lorapar.scoring.batches import plan_batches

    for marks in ([], [n for n in (1, 4, 16) if n < len(lengths)]):
        plan = plan_batches(lengths, 8, marks, padded=True)
        assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
        done = 0
        ends = set()
        for batch in plan:
            assert 1 <= len(batch) <= 8
            width = max(lengths[i] for i in batch)
            assert 20 * sum(width - lengths[i] for i in batch) < len(batch) * width
            done += len(batch)
            ends.add(done)
        assert set(marks) <= ends
    packed = plan_batches(lengths, 8, [], padded=False)
    assert len(packed) == -(-len(lengths) // 8)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    model = lorapar.attach(tiny_model(), config(lora_dropout=0.5), start="paper")
    plain = lorapar.score(model, None, rows())
    calls = []
    model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    lorapar.score(model, None, rows(1))
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    model.train()
    calls.clear()
    lorapar.score(model, None, rows(1))
    assert len(calls) == 2
    assert all(module.training for module in model.modules())
    again = lorapar.score(model, None, rows())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_block_that_drops_out_by_itself_does_not_under_checkpointing():
    sizes = dict(vocab_size=258, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, dropout=0.5)
    model = lorapar.attach(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64)), LoraConfig(r=4))
    plain = lorapar.score(model, None, rows())
    model.gradient_checkpointing_enable()
    model.train()
    again = lorapar.score(model, None, rows())
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(module.training for module in model.modules())


def test_a_gradient_of_nan_is_named_by_row_and_layer():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    # The second block's down_proj is where the backward meets it first; the row is the one that holds token 77.
    ids = torch.randint(80, 258, (5, 9), generator=torch.Generator().manual_seed(0)).tolist()
    ids[3][0] = 77  # of one batch, not its first row
    some = [{"id": f"r{i}", "input_ids": row, "labels": row} for i, row in enumerate(ids)]
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[77, 0] = float("nan")
    with pytest.raises(InputError, match=r"row r3: NaN or Inf in the gradient of \S*layers.1.mlp.down_proj.lora_"):
        lorapar.score(model, None, some)
    assert all(layer.scoring is None for layer in masked_layers(model).values())


def test_a_square_beyond_fp32_is_named():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(1e25)
    with pytest.raises(
        InputError, match=r"row \d: the square of gradient times value leaves fp32's range at \S*layers.1"
    ):
        lorapar.score(model, None, rows(3))


def test_squares_are_taken_up_to_fp32_s_range():
    """Sums of squares near 1e22, whose own squares would leave it."""
    model, exact = (lorapar.attach(tiny_model().to(d), config(), start="paper") for d in (torch.float32, torch.float64))
    for one in (model, exact.double()):
        with torch.no_grad():
            one.get_base_model().lm_head.weight.mul_(2.0**47)
    got = sums_of(model, rows(3))
    assert max(float(squares.max()) for _, squares in got.values()) > 2e19
    assert worst(got, naive_sums(exact, rows(3))) < 1e-4


def test_fp16_is_scaled_so_that_small_gradients_are_not_lost():
    exact = lorapar.attach(tiny_model().double(), config(), start="paper").double()
    expected = lorapar.score(exact, None, rows())
    model = lorapar.attach(tiny_model().half(), config(), start="paper")
    got = lorapar.score(model, None, rows())
    flat = [torch.cat([scores[name].double().reshape(-1) for name in sorted(scores)]) for scores in (got, expected)]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < 1e-2


def test_the_loss_s_gradient_is_computed_in_fp32_whatever_the_logits():
    from lorapar.scoring.batches import SOFTMAX_ROWS, cross_entropy_gradient

    n = SOFTMAX_ROWS + 1
    logits, targets, weights = (4 * torch.randn(n, 97)).bfloat16(), torch.randint(97, (n,)), torch.rand(n)
    exact = logits.double().requires_grad_()
    (F.cross_entropy(exact, targets, reduction="none") * weights.double()).sum().backward()
    got = cross_entropy_gradient(logits, targets, weights)
    assert got.dtype == torch.bfloat16
    # One rounding of each entry, the answers' too, where the softmax is near 1.
    torch.testing.assert_close(got.double(), exact.grad, rtol=2**-8, atol=1e-8)


def test_an_fp16_overflow_is_refused_with_the_remedy():
    model = lorapar.attach(tiny_model().half(), config(), start="paper")
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(3e4)
    with pytest.raises(
        InputError, match=r"row \d: NaN or Inf in the gradient of .*fp16 ends at 65504: score in bfloat16"
    ):
        lorapar.score(model, None, rows())


@pytest.mark.parametrize("which", [".lora_A.", ".lora_B.", ".lora_"])
def test_factors_of_zeros_are_refused_before_anything_runs(which, monkeypatch):
    model = lorapar.attach(tiny_model(), config(), start="paper")
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if which in name:
                parameter.zero_()
    model.get_base_model().register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(InputError, match="every score is zero"):
        lorapar.score(model, None, rows())


def test_half_precision_on_a_cpu_attends_by_plain_products_while_rows_are_short(monkeypatch):
    from lorapar.scoring import batches as score_batches

    half, full = (lorapar.attach(tiny_model().to(d), config(), start="paper") for d in (torch.bfloat16, torch.float32))
    ran = []
    for model, longest in ((half, 512), (half, 513), (full, 9)):
        with score_batches.short_attention(model, longest):
            ran.append(model.config._attn_implementation)
        assert model.config._attn_implementation == "sdpa"
    assert ran == ["eager", "sdpa", "sdpa"]
    by_kernel = []
    for short in (512, 1):
        monkeypatch.setattr(score_batches, "SHORT", short)
        scores = lorapar.score(half, None, rows())
        by_kernel.append(torch.cat([scores[name].reshape(-1) for name in sorted(scores)]))
    assert not torch.equal(*by_kernel)
    assert (by_kernel[0] - by_kernel[1]).norm() / by_kernel[1].norm() < 3e-2


def classifier():
    """A BERT that names the class of a sequence: attention in both directions, and layers that see [1, hidden]."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=258)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).double()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    attached = lorapar.attach(model, settings).double()
    large_start(attached)
    return attached


def class_loss(model, row):
    return F.cross_entropy(model(input_ids=torch.tensor([row["ids"]])).logits, torch.tensor([row["class"]]))


class Twice(torch.nn.Module):
    """No configuration, no batch dimension, a block that runs twice, and a layer that only some rows reach."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
        self.out, self.seldom = torch.nn.Linear(6, 2), torch.nn.Linear(6, 6)

    def forward(self, x):
        x = self.block(self.block(x))
        return self.out(self.seldom(x) if x[0] > 0 else x)


def layers_alone():
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["block.0", "out", "seldom"])
    attached = lorapar.attach(Twice().double(), settings).double()
    large_start(attached)
    return attached


def vector_loss(model, row):
    return (model(row[0]) - row[1]).square().sum()


def autograd_sums(model, examples, loss):
    parameters = lora_parameters(model)
    sums = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()}
    model.eval()
    for row in examples:
        gradients = torch.autograd.grad(loss(model, row), list(parameters.values()), materialize_grads=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients):
            sums[name][0].add_(gradient * parameter.detach())
            sums[name][1].add_((gradient * parameter.detach()) ** 2)
    return sums


@pytest.mark.parametrize("kind", ["classifier", "layers alone"])
def test_a_loss_of_one_s_own_scores_a_model_that_is_no_language_model(kind):
    if kind == "classifier":
        model, loss = classifier(), class_loss
        some = [{"ids": row["input_ids"], "class": i % 3} for i, row in enumerate(rows(5))]
    else:
        model, loss = layers_alone(), vector_loss
        some = [(torch.randn(6).double(), torch.randn(2).double()) for _ in range(5)]
    assert worst(sums_of(model, some, loss=loss), autograd_sums(model, some, loss)) < 1e-12
    assert lorapar.score(model, None, some, loss=loss).metadata["examples"] == 5


def test_a_loss_stops_when_stable_and_names_its_faults():
    model, some = layers_alone(), [(torch.randn(6).double(), torch.randn(2).double()) for _ in range(64)]
    stable = lorapar.score(model, None, some, loss=vector_loss, until_stable=0.1)
    assert stable.metadata["examples"] == 32
    assert stable.metadata["stable"]
    for loss, message in (
        (lambda model, row: model(row[0]), r"loss: returned \[2\] for a row, expected a tensor of one element"),
        (lambda model, row: float(vector_loss(model, row)), "loss: returned float for a row"),
        (lambda model, row: vector_loss(model, row).detach(), "loss: what it returned has no gradient"),
        (lambda model, row: vector_loss(model, row) * float("nan"), "row 0: NaN or Inf in the gradient of"),
    ):
        with pytest.raises(InputError, match=message):
            lorapar.score(model, None, some, loss=loss)
    with pytest.raises(InputError, match="max_length: got 9, expected None beside a loss"):
        lorapar.score(model, None, some, loss=vector_loss, max_length=9)
    with pytest.raises(InputError, match="dataset: got 'no rows'"):
        lorapar.score(model, None, [], loss=vector_loss)
