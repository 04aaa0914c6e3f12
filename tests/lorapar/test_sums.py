"""Running sums of a scoring pass: read after every batch, gone on from after a stop, stopped when stable."""

import pytest
import torch

import lorapar
import lorapar_kernels as lk
from lorapar.adapter.layers import lora_parameters, masked_layers
from lorapar.errors import InputError
from lorapar.files import load_tensors, save_tensors
from lorapar.memory.step import LiveBytes
from lorapar.scoring import sums as score_sums
from lorapar.scoring.batches import read_examples, score_batch
from lorapar.scoring.score import scoring
from tests.lorapar.test_adapter import config
from tests.lorapar.test_scoring import rows
from tests.tiny import tiny_model


def test_the_mean_so_far_can_be_read_after_every_batch():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    seen = []
    lorapar.score(model, None, rows(), 4, on_batch=lambda r: seen.append((r.examples, r.importance())))
    order = [n for n, _ in seen]
    assert order == sorted(order)
    assert order[-1] == 9
    whole = lorapar.score(model, None, rows())
    assert all(torch.allclose(seen[-1][1][name], whole[name], rtol=1e-5) for name in whole)
    assert any(not torch.equal(seen[0][1][name], whole[name]) for name in whole)


class Stopped(Exception):
    pass


def stop_after(batches):
    def on_batch(running):
        if running.batches == batches:
            raise Stopped

    return on_batch


# After the first look (16 examples) and after the second (32).
@pytest.mark.parametrize(("until_stable", "examples"), [(None, 20), (1.0, 20), (1.0, 34)])
def test_a_pass_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, until_stable, examples):
    monkeypatch.setattr(score_sums, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(score_sums, "SAVE_SHARE", float("inf"))
    model = lorapar.attach(tiny_model(), config(), start="paper")
    options = {"batch_size": 2, "until_stable": until_stable}
    total = []
    whole = lorapar.score(model, None, rows(40), on_batch=lambda r: total.append(r.examples), **options)
    saved = next(i for i, done in enumerate(total, start=1) if done >= examples)
    assert saved < len(total) - 1
    path, counted = tmp_path / "sums.safetensors", []
    with pytest.raises(Stopped):
        lorapar.score(model, None, rows(40), checkpoint=path, on_batch=stop_after(saved + 1), **options)
    again = lorapar.score(model, None, rows(40), checkpoint=path, on_batch=lambda r: counted.append(1), **options)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert whole.metadata == again.metadata
    # All batches but the one that stopped it were in the file.
    assert len(counted) == len(total) - saved
    counted.clear()
    lorapar.score(model, None, rows(40), checkpoint=path, on_batch=lambda r: counted.append(1), **options)
    assert counted == []


def test_sums_of_other_rows_settings_or_factors_are_not_gone_on_from(tmp_path):
    model = lorapar.attach(tiny_model(), config(), start="paper")
    path, counted = tmp_path / "sums.safetensors", []

    def batches(some, **options):
        counted.clear()
        lorapar.score(model, None, some, checkpoint=path, on_batch=lambda r: counted.append(1), **options)
        return len(counted)

    assert batches(rows()) > 0
    assert batches(rows()) == 0
    assert batches(rows(seed=1)) > 0
    assert batches(rows(seed=1), batch_size=1) == 9
    # As long as those, so in the same batches: another token, and another token that counts.
    other_token, other_label = rows(seed=1), rows(seed=1)
    for some in (other_token, other_label):
        some[0]["input_ids"][0] ^= 1
    other_label[3]["labels"] = other_label[3]["input_ids"]
    for other in (other_token, other_label):
        assert batches(other, batch_size=1) == 9
    assert batches(rows(20), until_stable=1.0, theta=0.9) > 0
    assert batches(rows(20), until_stable=1.0, theta=0.8) > 0
    assert batches(rows(20), until_stable=1.0, theta=0.8) == 0
    assert batches(rows(seed=1), batch_size=1) == 9
    with torch.no_grad():
        next(iter(lora_parameters(model).values())).mul_(2)
    assert batches(rows(seed=1), batch_size=1) == 9


def test_a_finished_pass_in_fp16_is_read_back_with_its_loss_scale(tmp_path):
    model = lorapar.attach(tiny_model().half(), config(), start="paper")
    whole, again = (lorapar.score(model, None, rows(), checkpoint=tmp_path / "sums.safetensors") for _ in range(2))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_fault_of_either_factor_is_seen():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    for which in ("a_gphi_sq", "b_gphi_sq"):
        for fault in ("nan", "inf"):
            with scoring(model) as layers:
                running = score_sums.RunningSums(layers)
                assert running.finite()
                getattr(list(layers.values())[3].scoring, which)[1, 2] = float(fault)
                assert not running.finite()


def test_a_damaged_file_of_sums_is_refused(tmp_path):
    model = lorapar.attach(tiny_model(), config(), start="paper")
    path = tmp_path / "sums.safetensors"
    lorapar.score(model, None, rows(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="sums.safetensors: corrupt or truncated"):
        lorapar.score(model, None, rows(), checkpoint=path)


def test_files_of_other_processes_are_known_by_their_rank_alone(tmp_path):
    path = tmp_path / "sums[1].safetensors"
    assert score_sums.file_of(path, 0) == path
    ours = [score_sums.file_of(path, rank) for rank in range(3)]
    others = [tmp_path / name for name in ("sums[1].old.safetensors", "sums[1].1.json", "sums1.1.safetensors",
                                           "sums[1].1.2.safetensors", ".sums[1].1.safetensors.x.tmp")]  # fmt: skip
    for file in (*ours[1:], *others):
        file.touch()
    assert score_sums.files_of(path) == ours[1:]
    ours[0].touch()
    assert score_sums.files_of(path) == ours
    score_sums.remove(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_sums_of_several_processes_are_one_pass(tmp_path):
    """Two files of half of the plan each go on as one, in which every batch is once."""
    model = lorapar.attach(tiny_model(), config(), start="paper")
    path, files = tmp_path / "sums.safetensors", []
    whole = lorapar.score(model, None, rows(), 2, on_batch=lambda running: files.append(list(running.done)))
    places = files[-1]
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorapar.distributed.processes.rounds", lambda left, rank=rank: left[rank::2])
            patch.setattr("lorapar.distributed.processes.rank", lambda rank=rank: rank)
            patch.setattr(score_sums.RunningSums, "restore", lambda *_: [])
            lorapar.score(model, None, rows(), 2, checkpoint=path)
    assert [load_tensors(file)[1]["done"] for file in score_sums.files_of(path)] == [places[::2], places[1::2]]
    counted = []
    both = lorapar.score(model, None, rows(), 2, checkpoint=path, on_batch=lambda running: counted.append(1))
    assert (counted, both.metadata) == ([], whole.metadata)
    assert all(torch.allclose(both[name], whole[name], rtol=1e-6, atol=0.0) for name in whole)
    # One file is left, of all of it.
    assert score_sums.files_of(path) == [path]
    assert sorted(load_tensors(path)[1]["done"]) == places


def test_until_stable_stops_at_the_first_look_that_reaches_the_level():
    model = lorapar.attach(tiny_model(), config(), start="paper")
    every = lorapar.score(model, None, rows(128), until_stable=1.0).metadata
    assert [n for n, _ in every["looks"]] == [32, 64, 128]
    assert (every["stable"], every["examples"]) == (False, 128)
    jaccards = [j for _, j in every["looks"]]
    assert all(0 < j < 1 for j in jaccards)
    # Each look is compared with the one before it; the rows are taken in their own order.
    first = {n: lorapar.score(model, None, rows(128)[:n]) for n in (16, 32, 64, 128)}
    kept = [torch.cat([mask.reshape(-1) for mask in lk.top_mass(list(s.values()), 0.9)]) for s in first.values()]
    for jaccard, one, other in zip(jaccards, kept, kept[1:]):
        assert abs(jaccard - float((one & other).sum() / (one | other).sum())) < 1e-3
    for at in (0, jaccards.index(max(jaccards))):
        stopped = lorapar.score(model, None, rows(128), until_stable=jaccards[at])
        n = [32, 64, 128][at]
        assert stopped.metadata["examples"] == n
        assert (stopped.metadata["stable"], stopped.metadata["looks"]) == (True, every["looks"][: at + 1])
        assert all(torch.allclose(first[n][name], stopped[name], rtol=1e-4) for name in stopped)
    with pytest.raises(InputError, match="until_stable: got 1.5, expected a Jaccard index"):
        lorapar.score(model, None, rows(), until_stable=1.5)


def test_a_pass_holds_sixteen_bytes_an_element_beyond_what_training_on_its_batch_keeps():
    """Every storage that lives is counted; the training step's gradients are given up as they come."""
    model = lorapar.attach(tiny_model(), config(r=8), start="paper")
    model.eval()
    parameters = lora_parameters(model)
    elements = sum(p.numel() for p in parameters.values())
    largest = max(p.numel() for p in parameters.values())
    batch = read_examples(rows(8), None, None)
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as training:
        score_batch(model, masked_layers(model), batch, packed=False)
    with LiveBytes() as with_sums, scoring(model) as layers:
        score_batch(model, layers, batch, packed=False)
    sums = 16 * elements
    assert with_sums.peak > sums
    # One example's products in float64 are there for one factor at a time.
    assert with_sums.peak <= training.peak + sums + 5 * 8 * largest
    assert 5 * 8 * largest < sums / 4


def test_a_look_that_was_reached_with_sums_that_are_lost_is_not_taken_for_all_of_it(tmp_path):
    """As where another process's file was never written, or lies on another machine."""
    path, level = tmp_path / "sums.safetensors", 1e-3
    stable = {"batch_size": 4, "until_stable": level, "checkpoint": path}
    whole = lorapar.score(lorapar.attach(tiny_model(), config(), start="paper"), None, rows(70), **stable)
    assert whole.metadata["stable"]
    assert whole.metadata["examples"] < 70
    tensors, facts = load_tensors(path)
    save_tensors(path, {name: 0 * tensor if name != "kept" else tensor for name, tensor in tensors.items()},
                 facts | {"done": [], "examples": 0})  # fmt: skip
    again = lorapar.score(lorapar.attach(tiny_model(), config(), start="paper"), None, rows(70), **stable)
    assert again.metadata == whole.metadata
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)
