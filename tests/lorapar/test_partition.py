"""The partition against a naive sort; α, β; granularities; what System 1 costs; controls; its file."""

import math
from decimal import Decimal

import pytest
import torch

import lorapar
from lorapar.errors import InputError
from lorapar.scoring.scores import Scores

NAMES = [f"m.layers.{i}.{p}.lora_{f}.default.weight" for i in range(3) for p in ("q", "up") for f in "AB"]


def random_scores(seed, rank=4, n_in=70, n_out=90, metadata=None):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in NAMES:
        shape = (rank, n_in) if ".lora_A." in name else (n_out, rank)
        tensors[name] = torch.rand(shape, generator=generator).pow(8)
    return Scores(tensors, metadata or {})


def naive_keep(scores, theta):
    """Sort everything, walk down until θ of the total is held; the first of equals first."""
    names = sorted(scores)
    flat = torch.cat([scores[n].reshape(-1) for n in names]).double()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i].item(), i))
    total, held, kept = flat.sum().item(), 0.0, set()
    for i in order:
        if held >= theta * total:
            break
        kept.add(i)
        held += flat[i].item()
    mask = torch.tensor([i in kept for i in range(len(flat))])
    parts = mask.split([scores[n].numel() for n in names])
    return {n: part.view(scores[n].shape) for n, part in zip(names, parts)}


def count(masks):
    return sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9, 0.999])
def test_equals_a_naive_sort(theta):
    scores = random_scores(1), random_scores(2)
    made = lorapar.partition(*scores, theta=theta)
    for system in (1, 2):
        expected = naive_keep(scores[system - 1], theta)
        assert all(torch.equal(made.kept(system)[n], expected[n]) for n in NAMES)


def test_regions_make_the_stages():
    made = lorapar.partition(random_scores(1), random_scores(2), theta=0.8)
    for name in NAMES:
        assert torch.equal(made.active("sft")[name], made.kept(1)[name])
        assert torch.equal(made.active("grpo")[name], made.kept(2)[name])


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (0.5, 0.25), (1, 0), (0.29, 1)])
def test_alpha_and_beta_take_the_highest_of_the_shared(alpha, beta):
    one, two = random_scores(1), random_scores(2)
    made = lorapar.partition(one, two, theta=0.9, alpha=alpha, beta=beta)
    shared = {n: made.kept(1)[n] & made.kept(2)[n] for n in NAMES}
    total = count(shared)
    for stage, scores, share, own in (("sft", one, alpha, 1), ("grpo", two, beta, 2)):
        taken = {n: made.active(stage)[n] & shared[n] for n in NAMES}
        assert count(taken) == int(round(share * 100) * total // 100)
        only = {n: made.kept(own)[n] & ~shared[n] for n in NAMES}
        assert all(torch.equal(made.active(stage)[n] & ~shared[n], only[n]) for n in NAMES)
        inside = [scores[n][taken[n]] for n in NAMES if taken[n].any()]
        left = [scores[n][shared[n] & ~taken[n]] for n in NAMES if (shared[n] & ~taken[n]).any()]
        if inside and left:
            assert torch.cat(inside).min() >= torch.cat(left).max()


def test_ties_are_broken_the_same_way_every_time():
    flat = Scores({n: torch.ones_like(t) for n, t in random_scores(1).items()}, {})
    first, second = (lorapar.partition(flat, flat, theta=0.5) for _ in range(2))
    assert first.hash == second.hash
    assert count(first.kept(1)) == -(-sum(t.numel() for t in flat.values()) // 2)
    # Of equals the first by name and place; of coarse scores, many of them equal, too.
    coarse = Scores({n: (4 * t).round() for n, t in random_scores(1).items()}, {})
    for scores in (flat, coarse):
        made, expected = lorapar.partition(scores, scores, theta=0.5).kept(1), naive_keep(scores, 0.5)
        assert all(torch.equal(made[n], expected[n]) for n in NAMES)


def test_theta_one_keeps_everything_that_scores():
    made = lorapar.partition(random_scores(1), random_scores(2), theta=1.0)
    assert made.summary()["fraction"]["active_sft"] == 1.0


def test_tile_granularity_keeps_whole_tiles():
    one, two = random_scores(1, rank=40), random_scores(2, rank=40)
    made = lorapar.partition(one, two, theta=0.7, granularity="tile")
    for name, mask in made.kept(1).items():
        height, width = (16, 64) if ".lora_A." in name else (64, 16)
        for rows in mask.split(height, 0):
            for tile in rows.split(width, 1):
                assert tile.all() or not tile.any()
    held = sum(float(one[n][m].double().sum()) for n, m in made.kept(1).items())
    assert held >= 0.7 * sum(float(t.double().sum()) for t in one.values())
    assert count(made.kept(1)) < sum(t.numel() for t in one.values())


def test_rank_granularity_keeps_row_i_of_a_with_column_i_of_b():
    made = lorapar.partition(random_scores(1), random_scores(2), theta=0.6, granularity="rank")
    for name in NAMES:
        if ".lora_A." in name:
            rows = made.kept(1)[name].any(1)
            assert torch.equal(made.kept(1)[name].all(1), rows)
            b = made.kept(1)[name.replace("lora_A", "lora_B")]
            assert torch.equal(b.all(0), rows)
            assert torch.equal(b.any(0), rows)
    assert 0 < count(made.kept(1)) < sum(t.numel() for t in random_scores(1).values())


@pytest.mark.parametrize("granularity", ["element", "tile", "rank"])
@pytest.mark.parametrize("selection", ["scores", "random", "all"])
def test_a_twin_is_never_active_and_not_counted(granularity, selection):
    scores = [random_scores(s, rank=8, metadata={"rank": 4}) for s in (1, 2)]
    for s in scores:
        for name, tensor in s.items():
            (tensor[4:] if ".lora_A." in name else tensor[:, 4:]).zero_()
    made = lorapar.partition(*scores, theta=1.0, granularity=granularity, selection=selection)
    for stage in ("sft", "grpo"):
        for name, mask in made.active(stage).items():
            assert not (mask[4:] if ".lora_A." in name else mask[:, 4:]).any()
    assert made.summary()["fraction"]["active_sft"] == 1.0
    assert made.trainable() == sum(t.numel() for t in scores[0].values()) // 2


def test_random_is_a_control_of_the_same_shares():
    scores = random_scores(1), random_scores(2)
    chosen = lorapar.partition(*scores, theta=0.8)
    random, other = (lorapar.partition(*scores, theta=0.8, selection="random", seed=s) for s in (0, 1))
    assert random.summary()["fraction"] == chosen.summary()["fraction"]
    assert random.summary()["jaccard"] == chosen.summary()["jaccard"]
    assert len({chosen.hash, random.hash, other.hash}) == 3


# What stage 2 pays for System 1


def units_of(scores, granularity):
    """[(summed score, [(name, row, column), ...])] of every unit, in plain Python; elements in the order of names."""
    units: dict[tuple, list] = {}
    for name in sorted(scores):
        height, width = (16, 64) if ".lora_A." in name else (64, 16)
        for i, row in enumerate(scores[name].tolist()):
            for j, value in enumerate(row):
                rank_of = (name.replace("lora_B", "lora_A"), i if ".lora_A." in name else j)
                key = {"element": (name, i, j), "tile": (name, i // height, j // width), "rank": rank_of}[granularity]
                units.setdefault(key, []).append((value, (name, i, j)))
    return [(math.fsum(v for v, _ in members), [place for _, place in members]) for members in units.values()]


def naive_worthiest(one, two, granularity, count, cost):
    """The places of the `count` units of highest worth; the first of equals first."""
    units_1, units_2 = units_of(one, granularity), units_of(two, granularity)
    total_1, total_2 = (math.fsum(score for score, _ in units) for units in (units_1, units_2))
    worth = [b / total_2 - cost * (a / total_1) for (a, _), (b, _) in zip(units_1, units_2)]
    best = sorted(range(len(worth)), key=lambda i: (-worth[i], i))[:count]
    return {place for i in best for place in units_2[i][1]}


def places_of(masks):
    return {(name, i, j) for name, mask in masks.items() for i, j in mask.nonzero().tolist()}


def units_in(masks, granularity):
    """How many units a set of whole ones holds."""
    places = places_of(masks)
    return sum(members[0] in places for _, members in units_of(masks, granularity))


@pytest.mark.parametrize("granularity", ["element", "tile", "rank"])
@pytest.mark.parametrize(("cost", "beta"), [(0.3, 1.0), (1.0, 0.5), (4.0, 1.0)])
def test_what_is_worth_most_equals_a_naive_sort(granularity, cost, beta):
    one, two = random_scores(1, n_in=150), random_scores(2, n_in=150)
    plain = lorapar.partition(one, two, theta=0.6, granularity=granularity)
    made = lorapar.partition(one, two, theta=0.6, beta=beta, granularity=granularity, system1_cost=cost)
    for same in ("s1", "s2", "sft"):
        assert all(torch.equal(made.masks[same][n], plain.masks[same][n]) for n in NAMES)
    both = units_in({n: plain.kept(1)[n] & plain.kept(2)[n] for n in NAMES}, granularity)
    number = units_in(plain.kept(2), granularity) - both + int(beta * both)
    assert units_in(made.active("grpo"), granularity) == number > 0
    assert places_of(made.active("grpo")) == naive_worthiest(one, two, granularity, number, cost)
    assert made.hash != plain.hash
    if granularity == "element":
        without = lorapar.partition(one, two, theta=0.6, beta=beta)
        assert count(made.active("grpo")) == count(without.active("grpo"))


@pytest.mark.parametrize("granularity", ["element", "tile", "rank"])
def test_a_cost_of_nothing_is_the_partition_of_the_paper_and_a_small_one_its_limit(granularity):
    # Of coarse scores, many are equal.
    one, two = (Scores({n: (8 * t).ceil() for n, t in random_scores(s).items()}, {}) for s in (1, 2))
    paper = lorapar.partition(one, two, theta=0.8, granularity=granularity)
    free = lorapar.partition(one, two, theta=0.8, granularity=granularity, system1_cost=0.0)
    assert (free.hash, free.metadata) == (paper.hash, paper.metadata)
    assert lorapar.partition(one, two, theta=0.8, granularity=granularity, system1_cost=1e-30).hash == paper.hash
    # Below β = 1 they part: by worth it is K₂'s lowest that go, shared or not.
    half = lorapar.partition(one, two, theta=0.8, beta=0.5, granularity=granularity, system1_cost=1e-30)
    assert all(not (half.active("grpo")[n] & ~paper.kept(2)[n]).any() for n in NAMES)


def test_what_costs_more_trains_less_of_what_system_1_relies_on():
    one, two = random_scores(1), random_scores(2)
    held = []
    for cost in (0.0, 0.5, 2.0):
        active = lorapar.partition(one, two, theta=0.8, system1_cost=cost).active("grpo")
        held.append([sum(float(scores[n][active[n]].sum()) for n in NAMES) for scores in (one, two)])
    assert held[0][0] > held[1][0] > held[2][0]
    assert held[0][1] > held[1][1] > held[2][1]


@pytest.mark.parametrize("granularity", ["element", "tile", "rank"])
def test_a_twin_is_worth_nothing_even_where_all_else_costs(granularity):
    scores = [random_scores(s, rank=8, metadata={"rank": 4}) for s in (1, 2)]
    made = lorapar.partition(*scores, theta=1.0, granularity=granularity, system1_cost=50.0)
    assert made.summary()["fraction"]["active_grpo"] == 1.0
    for name, mask in made.active("grpo").items():
        assert not (mask[4:] if ".lora_A." in name else mask[:, 4:]).any()


def test_the_random_control_pays_by_the_shuffled_scores():
    scores = random_scores(1), random_scores(2)
    chosen = lorapar.partition(*scores, theta=0.8, system1_cost=1.0)
    random = lorapar.partition(*scores, theta=0.8, system1_cost=1.0, selection="random")
    assert random.summary() == chosen.summary()
    assert random.hash != chosen.hash


def test_saved_and_loaded(tmp_path):
    made = lorapar.partition(random_scores(1), random_scores(2), theta=0.8)
    made.save(tmp_path / "p.safetensors")
    back = lorapar.Partition.load(tmp_path / "p.safetensors")
    assert back.hash == made.hash
    assert back.metadata == made.metadata
    assert back.summary() == made.summary()
    elements = 4 * sum(m.numel() for m in made.kept(1).values())
    assert (tmp_path / "p.safetensors").stat().st_size < elements / 8 + 20_000


def test_a_plain_mapping_serves():
    one, two = ({n: t for n, t in random_scores(s).items()} for s in (1, 2))
    assert lorapar.partition(one, two).hash == lorapar.partition(random_scores(1), random_scores(2)).hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(theta=0.0), r"theta: got 0.0, expected a share in \(0, 1\]"),
        (dict(theta=1.1), "theta: got 1.1"),
        (dict(alpha=-0.1), "alpha: got -0.1"),
        (dict(beta=2), "beta: got 2"),
        (dict(beta=torch.tensor(2.0)), "beta: got tensor"),
        (dict(alpha=Decimal("-1")), "alpha: got Decimal"),
        (dict(granularity="row"), "granularity: got 'row', expected element, tile or rank"),
        (dict(selection="best"), "selection: got 'best'"),
        (dict(system1_cost=-0.1), "system1_cost: got -0.1, expected at least 0"),
        (dict(system1_cost=math.inf), "system1_cost: got inf, expected a finite number"),
        (dict(system1_cost=math.nan), "system1_cost: got nan, expected at least 0"),
        (dict(system1_cost=0.5, selection="all"), "system1_cost: got 0.5, expected 0 with selection: all"),
    ],
)
def test_values_out_of_range_are_named(change, message):
    with pytest.raises(InputError, match=message):
        lorapar.partition(random_scores(1), random_scores(2), **change)


def test_scores_that_do_not_go_together_are_named():
    one, two = random_scores(1), random_scores(2)
    del two[NAMES[0]]
    with pytest.raises(InputError, match=NAMES[0]):
        lorapar.partition(one, two)
    two = random_scores(2, n_in=71)
    with pytest.raises(InputError, match=r"is \[4, 70\] in System 1's scores, \[4, 71\] in System 2's"):
        lorapar.partition(one, two)
    with pytest.raises(InputError, match="System 1"):
        lorapar.partition({n: torch.zeros_like(t) for n, t in one.items()}, random_scores(2))
