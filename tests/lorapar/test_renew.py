"""System 2 scored again between the two training stages: the function, and runs of the tiny model."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorapar
from lorapar import InputError, Partition, load_recipe, load_scores
from lorapar.adapter.attach import load_adapter
from lorapar.files import read_json
from lorapar.memory.advice import changes
from lorapar.memory.needs import Lengths, needs
from lorapar.model.load import load_model, load_tokenizer
from lorapar.pipeline import records as pipeline_records
from lorapar.pipeline.order import stages_of
from lorapar.reporting.artefacts import read_artefacts
from lorapar.reporting.report import _header
from lorapar.scoring.scores import Scores
from lorapar.stage import Run

from . import driver
from .driver import in_child, records, refused, skipped, succeeds
from .test_partition import NAMES, count, random_scores

Change = Callable[..., Path]
RENEW = "--score.renew", "true"
FILES = "scores_renewed.safetensors", "partition_renewed.safetensors"


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def jaccard(one: dict, two: dict) -> float:
    shared, union = ({n: op(one[n], two[n]) for n in one} for op in (torch.logical_and, torch.logical_or))
    return count(shared) / count(union)


# The function


@pytest.mark.parametrize("granularity", ["element", "tile", "rank"])
@pytest.mark.parametrize("keys", [{}, {"alpha": 0.5, "beta": 0.3}, {"system1_cost": 1.0}, {"selection": "random"}])
def test_the_first_stage_s_sets_stay_and_the_second_s_are_of_the_renewed_scores(granularity, keys):
    one, two, again = (random_scores(seed) for seed in (1, 2, 3))
    first = lorapar.partition(one, two, theta=0.7, granularity=granularity, seed=4, **keys)
    made, anew = lorapar.renew(first, one, again), lorapar.partition(
        one, again, theta=0.7, granularity=granularity, seed=4, **keys
    )  # fmt: skip
    assert same(made.kept(1), first.kept(1))
    assert same(made.active("sft"), first.active("sft"))
    assert same(made.kept(2), anew.kept(2))
    assert same(made.active("grpo"), anew.active("grpo"))
    assert made.hash != first.hash
    facts = made.summary()["renewed"]
    assert facts == {"system": 2, "jaccard": pytest.approx(jaccard(first.kept(2), made.kept(2)), abs=1e-12)}
    assert 0 < facts["jaccard"] < 1
    assert "renewed" not in first.summary()


def test_what_the_second_stage_shares_is_of_the_first_s_set_and_the_renewed_one():
    one, two, again = (random_scores(seed) for seed in (1, 2, 3))
    first = lorapar.partition(one, two, theta=0.8, beta=0.5)
    made = lorapar.renew(first, one, again)
    shared = {n: first.kept(1)[n] & made.kept(2)[n] for n in NAMES}
    taken = {n: made.active("grpo")[n] & shared[n] for n in NAMES}
    assert count(taken) == count(shared) // 2
    least = min(float(again[n][taken[n]].min()) for n in NAMES if taken[n].any())
    assert all(not (again[n][shared[n] & ~taken[n]] > least).any() for n in NAMES)


def test_the_same_scores_again_are_the_same_partition_and_its_file_says_it_was_renewed(tmp_path):
    one, two = random_scores(1), Scores(random_scores(2), {"examples": 7})
    first = lorapar.partition(one, two, theta=0.8)
    made = lorapar.renew(first, one, two)
    assert made.hash == first.hash
    made.save(tmp_path / "p.safetensors")
    back = Partition.load(tmp_path / "p.safetensors")
    told = {"stage": "grpo", "system": 2, "jaccard": 1.0, "partition": first.hash, "scores": {"examples": 7}}
    assert back.metadata == {**first.metadata, "renewed": told}
    # Of what was loaded it can be renewed again.
    assert lorapar.renew(back, one, random_scores(3)).metadata["renewed"]["partition"] == first.hash


def test_where_grpo_came_first_system_1_is_renewed():
    one, two, again = (random_scores(seed) for seed in (1, 2, 3))
    first = lorapar.partition(one, two, theta=0.8, alpha=0.5)
    made, anew = lorapar.renew(first, again, two, "sft"), lorapar.partition(again, two, theta=0.8, alpha=0.5)
    assert same(made.kept(2), first.kept(2))
    assert same(made.active("grpo"), first.active("grpo"))
    assert same(made.kept(1), anew.kept(1))
    assert same(made.active("sft"), anew.active("sft"))


def test_what_cannot_be_renewed_is_named():
    one, two, again = (random_scores(seed) for seed in (1, 2, 3))
    first = lorapar.partition(one, two)
    with pytest.raises(InputError, match="scores_1: they give another kept set of System 1 than the partition has"):
        lorapar.renew(first, again, two)
    with pytest.raises(InputError, match="scores_2: they give another kept set of System 2"):
        lorapar.renew(first, one, again, "sft")
    for names in (NAMES[:2], [*NAMES, "more.lora_A.default.weight"]):
        both = [{name: scores.get(name, torch.ones(2, 2)) for name in names} for scores in (one, two)]
        with pytest.raises(InputError, match="scores_1: they give another"):
            lorapar.renew(first, both[0], both[1])
    with pytest.raises(InputError, match="stage: got 'dpo', expected sft or grpo"):
        lorapar.renew(first, one, again, "dpo")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="partition: got 'selection: all', expected one made of scores"):
        lorapar.renew(lorapar.partition(one, two, selection="all"), one, again)
    with pytest.raises(InputError, match="partition: got 'metadata without theta, alpha"):
        lorapar.renew(Partition(first.masks, {}), one, again)


# In a run


def rerun(finished: Path, recipe: Path, *words: str) -> list[str]:
    """The stages that were done again."""
    log = succeeds("run", recipe, "--output_dir", finished, "--update", *words)
    return [line.split(": ")[1] for line in log.splitlines() if line.endswith(": started")]


def test_switched_on_in_a_finished_folder_it_redoes_stage_2_by_the_renewed_partition(
    finished: Path, finished_run: Path, recipe_file: Path
):
    assert not any((finished / name).exists() for name in FILES)
    assert rerun(finished, recipe_file, *RENEW) == ["renew", "grpo", "evaluate", "export", "report"]
    assert rerun(finished, recipe_file, *RENEW) == []
    before, after = (load_scores(finished / name) for name in ("scores.safetensors", FILES[0]))
    assert same(before[0], after[0])
    assert not same(before[1], after[1])
    # What the library scores of the adapter that stage 1 left.
    recipe = load_recipe(recipe_file)
    model, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
    labels = lorapar.data.labels.load_labels(finished / "labels.jsonl")
    rows = lorapar.data.labels.rows_of(labels, [2]).shuffle(seed=0).select(range(8))
    assert same(lorapar.score(load_adapter(model, finished / "sft"), tokenizer, rows), after[1])
    # The sets: stage 1's as they were, stage 2's of the renewed scores.
    first, renewed = (Partition.load(finished / name) for name in ("partition.safetensors", FILES[1]))
    assert same(first.kept(1), renewed.kept(1))
    assert same(first.active("sft"), renewed.active("sft"))
    assert renewed.hash == lorapar.renew(first, *after).hash != first.hash
    # Which of the two each stage trained by, and that nothing else moved.
    for stage, partition in (("sft", first), ("grpo", renewed)):
        assert Partition.load(finished / stage / "lorapar_partition.safetensors").hash == partition.hash
        assert read_json(finished / stage / "lorapar.json")["partition"] == partition.hash
    stayed = [(f / "sft" / "adapter_model.safetensors").read_bytes() for f in (finished, finished_run)]
    assert stayed[0] == stayed[1]
    one, two = (load_file(finished / stage / "adapter_model.safetensors") for stage in ("sft", "grpo"))
    moved = {name.replace(".weight", ".default.weight"): one[name] != two[name] for name in one}
    active = renewed.active("grpo")
    assert moved.keys() == active.keys()
    assert not any((moved[name] & ~active[name]).any() for name in moved)
    assert any((moved[name] & ~first.active("grpo")[name]).any() for name in moved)
    # What is said of it.
    kept = pytest.approx(jaccard(first.kept(2), renewed.kept(2)), abs=1e-12)
    metrics, made = read_json(finished / "metrics.json"), records(finished)
    assert metrics["partition"] == renewed.summary()
    assert metrics["partition"]["renewed"] == {"system": 2, "jaccard": kept}
    assert (made["renew"]["jaccard_renewed"], made["renew"]["examples_system2"]) == (kept, 8)
    assert made["grpo"]["active"] == count(active)
    assert {"renew"} < set(metrics["seconds"]) == set(metrics["peak_memory_bytes"])
    page = (finished / "report.html").read_text()
    assert "System 2 scored again before GRPO" in page
    assert f"Jaccard index of <b>{made['renew']['jaccard_renewed']:.3f}</b>" in page


@pytest.mark.slow
def test_switched_off_again_the_first_partition_holds(
    finished: Path, finished_run: Path, recipe_file: Path, no_pictures
):
    rerun(finished, recipe_file, *RENEW)
    assert rerun(finished, recipe_file) == ["grpo", "evaluate", "export", "report"]
    for stage in ("sft", "grpo"):
        files = [load_file(f / stage / "adapter_model.safetensors") for f in (finished, finished_run)]
        assert same(*files)
    run = read_artefacts(finished)
    assert run.partition is not None
    assert run.partition.hash == Partition.load(finished / "partition.safetensors").hash


def test_kill_9_while_scoring_and_before_the_partition(finished: Path, recipe_file: Path):
    words = "renew", recipe_file, "--output_dir", finished, "--update", *RENEW, "--score.batch_size", "2"
    succeeds(*words)
    whole = [(finished / name).read_bytes() for name in FILES]
    for name in FILES:
        (finished / name).unlink()
    code, log = in_child(driver.kill_while_scoring, (2,), *words)
    assert code == -signal.SIGKILL, log
    code, log = in_child(driver.kill_before_rename, (FILES[1],), *words)
    assert code == -signal.SIGKILL, log
    assert "score: going on after" in log
    assert "score: going on after 8 examples" in succeeds(*words)
    assert [(finished / name).read_bytes() for name in FILES] == whole
    assert not list(finished.glob("scoring-*"))
    assert skipped(succeeds(*words)) == ["renew"]


def test_sums_of_other_inputs_are_removed(finished: Path, recipe_file: Path):
    words = "renew", recipe_file, "--output_dir", finished, "--update", *RENEW, "--score.batch_size", "2"
    assert in_child(driver.kill_while_scoring, (1,), *words)[0] == -signal.SIGKILL
    log = succeeds(*words, "--score.max_length", "500")
    assert "scoring-renewed.safetensors: made from other inputs, removed" in log
    assert "going on after" not in log


def test_where_grpo_comes_first_sft_goes_by_system_1_renewed(changed_recipe: Change, tmp_path: Path):
    folder = tmp_path / "run"
    recipe = changed_recipe(stages=["grpo", "sft"], score={"renew": True, "until_stable": 1.0})
    for verb in ("label", "score", "partition", "grpo", "renew", "sft"):
        succeeds(verb, recipe, "--output_dir", folder)
    before, after = (load_scores(folder / name) for name in ("scores.safetensors", FILES[0]))
    assert same(before[1], after[1])
    assert not same(before[0], after[0])
    first, renewed = (Partition.load(folder / name) for name in ("partition.safetensors", FILES[1]))
    assert same(first.active("grpo"), renewed.active("grpo"))
    assert renewed.metadata["renewed"]["stage"] == "sft"
    for stage, partition in (("grpo", first), ("sft", renewed)):
        assert Partition.load(folder / stage / "lorapar_partition.safetensors").hash == partition.hash
    facts = records(folder)["renew"]
    assert {"examples_system1", "stable_system1", "looks_system1"} <= set(facts)


def test_the_verb_needs_the_key_and_stage_1(recipe_file: Path, finished: Path, tmp_path: Path):
    says = "stages: renew is not one of this recipe's stages (label, score, partition, sft, grpo, evaluate, "
    refused("renew", recipe_file, "--output_dir", finished, says=(says, "score.renew: true adds it"))
    succeeds("label", recipe_file, "--output_dir", tmp_path / "new", *RENEW)
    refused("renew", recipe_file, "--output_dir", tmp_path / "new", *RENEW, says=("no such file; run the stage that",))
    (finished / "scores.safetensors").write_bytes((finished / "scores.safetensors").read_bytes()[:-9])
    refused(
        "renew", recipe_file, "--output_dir", finished, "--update", *RENEW, says=("scores.safetensors: ", "corrupt")
    )


def test_the_plan_counts_it_as_scoring_and_advises_score_s_keys(recipe_file: Path, finished: Path, monkeypatch):
    recipe = load_recipe(recipe_file, [("score.renew", "true")])
    planned = needs(recipe, Lengths(20, 40, "a test"))
    assert [need.stage for need in planned] == ["score", "sft", "renew", "grpo", "evaluate"]
    assert (planned[2].activations, planned[2].logits) == (planned[0].activations, planned[0].logits)
    assert next(changes(recipe, "renew"))[0] == "score.batch_size: 4 (same result)"
    monkeypatch.setattr("lorapar.memory.advice.available_bytes", lambda device: 1)
    refused("renew", recipe_file, "--output_dir", finished, "--update", *RENEW, says=("renew needs ",))


def test_a_folder_made_before_these_keys_still_holds(finished: Path, recipe_file: Path, monkeypatch):
    """Nor does a fingerprint know of them where they are not set; then those of the stages before do not."""
    taken: list[dict] = []
    monkeypatch.setattr(pipeline_records, "sha256_json", lambda inputs: taken.append(inputs) or "x")

    def inputs(*words: tuple[str, str]) -> dict[str, dict]:
        recipe, made = load_recipe(recipe_file, list(words)), {}
        for stage in stages_of(recipe):
            if all((finished / name).is_file() for name in stage.reads):
                pipeline_records.fingerprint(stage, Run(recipe, finished))
                made[stage.name] = taken.pop()
        return made

    plain = inputs()
    assert set(plain["score"]["score"]) == {"examples", "method", "max_length", "until_stable"}
    assert set(plain["partition"]["partition"]) == {"theta", "alpha", "beta", "granularity", "selection"}
    assert set(plain["grpo"]["files"]) == {"labels.jsonl", "partition.safetensors", "sft/adapter_model.safetensors"}
    renewed = inputs(("score.renew", "true"))
    assert {name: renewed[name] for name in ("label", "score", "partition", "sft")} == {
        name: plain[name] for name in ("label", "score", "partition", "sft")
    }
    costly = inputs(("partition.system1_cost", "0.5"))
    assert costly["score"] == plain["score"]
    assert costly["partition"]["partition"] == {**plain["partition"]["partition"], "system1_cost": 0.5}


def test_a_run_with_a_cost_says_so(finished: Path, recipe_file: Path):
    words = "--output_dir", finished, "--update", "--partition.system1_cost", "0.5"
    before = Partition.load(finished / "partition.safetensors")
    succeeds("partition", recipe_file, *words)
    made = Partition.load(finished / "partition.safetensors")
    assert (made.summary()["system1_cost"], made.metadata["system1_cost"]) == (0.5, 0.5)
    assert count(made.active("grpo")) == count(before.active("grpo"))
    assert same(made.active("sft"), before.active("sft"))
    assert not same(made.active("grpo"), before.active("grpo"))
    # What is renewed pays it too.
    succeeds("renew", recipe_file, *words, *RENEW)
    renewed = Partition.load(finished / FILES[1])
    both = load_scores(finished / FILES[0])
    assert renewed.summary()["system1_cost"] == 0.5
    assert same(renewed.active("grpo"), lorapar.partition(*both, system1_cost=0.5).active("grpo"))
    assert "GRPO&#x27;s elements by their worth at a System-1 cost of 0.5" in _header(read_artefacts(finished))
