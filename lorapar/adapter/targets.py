"""Which modules of a model get an adapter, and what is left out and why: decided here for `attach` and for the plan.

Where `lora.target_modules` is silent, the paper's six projections are adapted if every layer of the language model has
them all as linear layers; otherwise every linear layer of the language model but its head, routers and expert gates. So
a fused qkv_proj or a hybrid's linear attention is not passed over in silence. `all-linear` is that second set. A vision
or audio tower and its projector are adapted where the recipe names them, and never because a name such as q_proj
happens to be there too.
"""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from ..errors import InputError, nearest, suggestion

SIX = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")  # the paper's, section 4.1
# What PEFT trains whole beside the adapter for these tasks.
HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
CLASSIFIERS = ("classifier", "score", "qa_outputs")
# Linear layers that a model of this type multiplies with by their weights, so that an adapter on one does nothing.
READ_DIRECTLY = {
    "falcon_mamba": ("dt_proj",),
    "jamba": ("dt_proj",),
    "mamba": ("dt_proj",),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
SENSES = re.compile("vision|image|video|audio|speech")
TAKES = "only nn.Linear and bitsandbytes' 4-bit and 8-bit layers can be partitioned"


@dataclass(frozen=True)
class Targets:
    """The linear layers that get an adapter, by name; PEFT's configuration that selects exactly these; and one line
    that says how many they are, their share of the matrix weights, and what was left out and why.

    met: the language model's matrix weights that a token is multiplied with: no embedding, not the head, of experts the
    active ones. all_experts: they are all counted, as the configuration does not say how many are active."""

    modules: dict[str, nn.Linear]
    config: LoraConfig
    line: str
    met: int
    all_experts: bool


def resolve(model: nn.Module, config: LoraConfig) -> Targets:
    """The layers of `model` that `config` asks for; neither is changed, and the model may be on the meta device.

    Raises InputError for a name, pattern or layer that matches nothing, with the nearest that exists, and for a module
    that takes no adapter.
    """
    parts = _Parts(model)
    asked = _asked(parts, config)
    kept = _without_excluded(parts, asked, config)
    chosen = _in_layers(parts, kept, config)
    if not asked:
        raise InputError(f"lora.target_modules: {type(model).__name__} has no layer to adapt{parts.why_nothing()}")
    if not chosen:
        given = f"lora.exclude_modules: got {config.exclude_modules}"
        raise InputError(f"{given}, which leaves none of the {len(asked)} target modules")
    modules = {name: cast(nn.Linear, parts.modules[name]) for name in chosen}
    line, (met, all_experts) = _line(parts, asked, kept, chosen, config), _met(parts)
    return Targets(modules, _exactly(parts, chosen, config), line, met, all_experts)


# What a model is made of


class _Parts:
    """A model's modules by name, and which of them are linear layers, outside the language model, heads or routers."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(_modules(model))
        self.linear = dict.fromkeys(name for name, module in self.modules.items() if _takes_adapter(module))
        self.obstacles: dict[str, str | None] = {}
        self.outputs, self.outside = set(_outputs(model)), list(_outside(model))
        self.heads = self.outputs | set(_classifiers(model))

    def is_head(self, name: str) -> bool:
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def tower(self, name: str) -> str | None:
        """The part outside the language model that a module lies in, None for the language model's own."""
        return next((part for part in self.outside if name == part or name.startswith(f"{part}.")), None)

    def is_router(self, name: str) -> bool:
        """Whether a module chooses among experts. `gate` is also what some MLPs call a projection."""
        steps = name.split(".")
        for i, step in enumerate(steps):
            beside_experts = hasattr(self.modules.get(".".join(steps[:i]), self.model), "experts")
            if re.search(r"(^|_)router$|experts?_gate$", step) or (step == "gate" and beside_experts):
                return True
        return False

    def is_expert(self, name: str) -> bool:
        """Whether a module is, or lies in, experts that hold their weights as fused parameters."""
        steps = name.split(".")
        above = [".".join(steps[: i + 1]) for i in range(len(steps))]
        within = any(
            step == "experts" or "Experts" in type(self.modules[path]).__name__ for step, path in zip(steps, above)
        )
        return within and name not in self.linear and bool(_matrices(self.modules[name]))

    def obstacle(self, name: str) -> str | None:
        """Why PEFT gives a module of this name no adapter, asked once a name."""
        last = leaf(name)
        if last not in self.obstacles:
            self.obstacles[last] = _obstacle(self.model, last)
        return self.obstacles[last]

    def every_linear(self) -> list[str]:
        """Every linear layer of the language model but its head, its routers and what PEFT itself refuses."""
        return [name for name in self.linear if not (self.is_head(name) or self.tower(name) or self.is_router(name)
                                                     or self.obstacle(name))]  # fmt: skip

    def has_the_six(self) -> bool:
        """Whether every layer of the language model has the paper's six, and none hides them in fused experts."""
        names = [name for name in self.linear if leaf(name) in SIX and not self.tower(name)]
        stacks = {match[1] for name in names if (match := re.match(r"(.*?)\.\d+\.", name))}
        layers = [f"{stack}.{child}." for stack in stacks for child, _ in self.modules[stack].named_children()]
        there = (
            {leaf(name) for name in names if name.startswith(layer)}
            for layer in layers or [""]  # without a list of layers the model is one
        )
        fused = any(self.is_expert(name) and not self.tower(name) for name in self.modules)
        return not fused and all(found.issuperset(SIX) for found in there)

    def why_nothing(self) -> str:
        """What holds the weights instead (GPT-2's Conv1D), for the error where there is nothing to adapt."""
        others = {name: module for name, module in self.modules.items()
                  if _matrices(module) and not isinstance(module, nn.Linear | nn.Embedding)}  # fmt: skip
        kinds = Counter(type(module).__name__ for name, module in others.items() if self.tower(name) is None)
        held = f", whose weights are in {kinds.most_common(1)[0][0]} modules" if kinds else ""
        return f"{held}; {TAKES}"


def leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, without what is in an adapter that the model has already."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")


def _root(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _takes_adapter(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads its out_proj's weight and never calls it.
    return isinstance(_root(module), nn.Linear) and not isinstance(_root(module), NonDynamicallyQuantizableLinear)


def _transformers_models(model: nn.Module, at: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost transformers models: the model itself, or those that a module of the user's own holds."""
    if isinstance(model, PreTrainedModel):
        yield at, model
        return
    for name, child in model.named_children():
        yield from _transformers_models(child, f"{at}{name}.")


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() >= 2]


def _outputs(model: nn.Module) -> Iterator[str]:
    """The layer that makes logits of words, which may be the embedding again."""
    yield from (name for name, _ in model.named_modules() if leaf(name) in ("lm_head", "embed_out"))
    for at, top in _transformers_models(model):
        # Some wrappers (BLIP) leave the question to a model within.
        heads = [model.get_output_embeddings() for model in top.modules() if isinstance(model, PreTrainedModel)]
        yield from (f"{at}{name}" for name, module in top.named_modules()
                    if name and any(module is head for head in heads))  # fmt: skip


def _classifiers(model: nn.Module) -> Iterator[str]:
    """What a classifier, or a model that marks spans, ends with."""
    for at, top in _transformers_models(model):
        yield from (f"{at}{name}" for name, _ in top.named_children() if name in CLASSIFIERS)


def _outside(model: nn.Module) -> Iterator[str]:
    """The parts of a multimodal model that are not its language model: towers and projectors, by name."""
    for at, top in _transformers_models(model):
        inner = {name: module for name, module in top.named_modules() if name and isinstance(module, PreTrainedModel)}
        text = _text_config(top)
        language = [name for name, module in inner.items() if text is not None and type(module.config) is type(text)]
        if language:
            yield from (f"{at}{name}" for name in _beside(top, language))
        elif top.main_input_name == "input_ids":
            # The models in it that read no text, by what they say or (Phi-4's) by the name of their configuration.
            senses = tuple(kind for key, kind in cast(Any, top.config).sub_configs.items() if SENSES.search(key))
            towers = [name for name, module in inner.items()
                      if module.main_input_name != "input_ids" or isinstance(module.config, senses)]  # fmt: skip
            yield from (f"{at}{name}" for name in _with_projectors(top, towers))


def _text_config(top: PreTrainedModel) -> Any:
    """The configuration of the language model in a multimodal one, None where the model is all text."""
    try:
        text = top.config.get_text_config()
    except ValueError:  # a text encoder and a decoder
        return None
    return None if text is top.config else text


def _beside(module: nn.Module, language: Collection[str], at: str = "") -> Iterator[str]:
    """The outermost modules that neither are in, nor hold, a language model."""
    for name, child in module.named_children():
        path = f"{at}{name}"
        if path in language:
            continue
        if any(inside.startswith(f"{path}.") for inside in language):
            yield from _beside(child, language, f"{path}.")
        else:
            yield path


def _with_projectors(top: PreTrainedModel, towers: Collection[str]) -> Iterator[str]:
    """For each tower the outermost module around it that holds no embedding of text and no layers beside towers."""
    inside = tuple(f"{tower}." for tower in towers)
    of_text = [name for name, module in top.named_modules() if isinstance(module, nn.Embedding | nn.ModuleList)
               and not name.startswith(inside)]  # fmt: skip
    for tower in towers:
        steps = tower.split(".")
        around = (".".join(steps[: i + 1]) for i in range(len(steps)))
        yield next(name for name in around if name == tower or not any(one.startswith(f"{name}.") for one in of_text))


def _obstacle(model: nn.Module, name: str) -> str | None:
    """Why PEFT gives modules of this name no adapter, here or when it loads one: None where it does."""
    trial = LoraConfig(target_modules=[name])
    if any(name in READ_DIRECTLY.get(top.config.model_type, ()) for _, top in _transformers_models(model)):
        return "this architecture reads the weight directly, so that an adapter on it does nothing"
    try:
        _check_lora_target_modules_mamba(trial, model, name)
    except ValueError:
        return "PEFT allows no adapter on it in this architecture, whose kernels read the weight directly"
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:
        pass
    else:
        if name in cast(set[str], trial.target_modules):
            return None
    return "PEFT takes the name for fused expert weights, which cannot be adapted yet"


# What is asked for


def _asked(parts: _Parts, config: LoraConfig) -> list[str]:
    """The names that `target_modules` selects, before anything is excluded; InputError for what takes no adapter."""
    given = config.target_modules
    if given is None:
        every = parts.every_linear()
        return [name for name in every if leaf(name) in SIX] if parts.has_the_six() else every
    if isinstance(given, str) and given.lower() == "all-linear":
        return parts.every_linear()
    if isinstance(given, str):
        found = set(_by_pattern(parts, given))
    else:
        found = {name for one in sorted(given) for name in _by_name(parts, one)}
    names = [name for name in parts.modules if name in found]
    for name in names:
        kind = type(parts.modules[name]).__name__
        if name in parts.outputs:
            raise InputError(f"lora.target_modules: {name} is the output head, which takes no adapter; leave it out")
        if not _takes_adapter(parts.modules[name]):
            raise InputError(f"lora.target_modules: {name} is a {kind}; {TAKES}")
        if why := parts.obstacle(name):
            raise InputError(f"lora.target_modules: {leaf(name)}: {why}; leave it out")
    return names


def _by_name(parts: _Parts, given: str) -> list[str]:
    """A whole name, else the modules whose names end so: the language model's, and others where it has none."""
    if given in parts.modules:
        return [name for name in parts.modules if name == given or _in_text(parts, name, given)]
    found = [name for name in parts.modules if name.endswith(f".{given}")]
    if not found:
        # A list takes neither the word nor patterns.
        meant = given.lower() == "all-linear" or re.search(r"[*|^$\\]", given)
        hint = f"for that give it alone, without a list: target_modules: {given}" if meant else _meant(parts, given)
        raise InputError(f"lora.target_modules: got {given!r}, which matches no module of the model; {hint}")
    return [name for name in found if parts.tower(name) is None] or found


def _in_text(parts: _Parts, name: str, given: str) -> bool:
    return name.endswith(f".{given}") and parts.tower(name) is None


def _by_pattern(parts: _Parts, given: str) -> list[str]:
    """What a regular expression matches whole, as in PEFT; outside the language model only a part that it names."""
    try:
        found = [name for name in parts.modules if re.fullmatch(given, name)]
    except re.error as error:
        raise InputError(f"lora.target_modules: got {given!r}, which is no regular expression ({error})") from None
    if not found:
        meant = _meant(parts, given, ["all-linear"])
        raise InputError(f"lora.target_modules: got {given!r}, a regular expression that no whole name matches "
                         f"(a list takes the ends of names: [{given}]); {meant}")  # fmt: skip
    text = [name for name in found if parts.tower(name) is None]
    named = [name for name in found if (tower := parts.tower(name)) and leaf(tower) in given]
    return [*text, *named] if text else found


def _meant(parts: _Parts, given: str, words: Sequence[str] = ()) -> str:
    """How a refused name's error ends: the nearest of the linear layers' names."""
    fused = [name for name in parts.modules if parts.is_expert(name)]
    held = {name for expert in fused for name in _matrices(parts.modules[expert])}
    if given in held | {*SIX[3:], "w1", "w2", "w3"} and fused:
        return "the experts hold their weights as fused parameters, which cannot be adapted yet; leave it out"
    return _near(given, [name for name in parts.linear if not parts.is_head(name)], words)


def _near(given: str, names: Collection[str], words: Sequence[str] = ()) -> str:
    """The nearest of the names, else their ends, which are few however deep the model is."""
    ends = sorted({leaf(name) for name in names})
    near = nearest(given, names if "." in given else [*ends, *words])
    return f"nearest: {near[0]}" if near else f"allowed: {', '.join(ends)}"


def _without_excluded(parts: _Parts, asked: list[str], config: LoraConfig) -> list[str]:
    """Those left by `exclude_modules`, in which each name must exclude something, and by the heads that PEFT trains
    whole."""
    given = config.exclude_modules or ()
    for one in [given] if isinstance(given, str) else sorted(given):
        rule = given if isinstance(given, str) else [one]
        try:
            excluded = [name for name in parts.modules if _excludes(rule, name)]
        except re.error as error:
            raise InputError(f"lora.exclude_modules: got {one!r}, which is no regular expression ({error})") from None
        if excluded and not set(excluded).intersection(asked):
            holds = any(name.startswith(f"{excluded[0]}.") for name in asked)
            hint = f"use the regular expression '.*{leaf(excluded[0])}[.].*'" if holds else "leave it out"
            raise InputError(f"lora.exclude_modules: got {one!r}, which excludes none of the target modules: "
                             f"{excluded[0]} {'only holds some' if holds else 'is none of them'}; {hint}")  # fmt: skip
        if not excluded:
            kind = "a regular expression that no whole name matches (a list takes the ends of names: "
            what = f"{kind}[{one}])" if isinstance(given, str) else "which excludes none of the target modules"
            raise InputError(f"lora.exclude_modules: got {one!r}, {what}; {_near(one, asked)}")
    return [name for name in asked if not (_excludes(given, name) or _is_whole(name, config))]


def _excludes(given: str | Collection[str], name: str) -> bool:
    """PEFT's rule for `exclude_modules`."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return name in given or any(name.endswith(f".{one}") for one in given)


def _is_whole(name: str, config: LoraConfig) -> bool:
    """Whether PEFT trains a module whole, which it does where a name ends so: DistilBERT's pre_classifier too."""
    heads = (*HEADS_BY_TASK.get(cast(str, config.task_type), ()), *(config.modules_to_save or ()))
    return any(step.endswith(heads) for step in name.split("."))


def _in_layers(parts: _Parts, names: list[str], config: LoraConfig) -> list[str]:
    """Those in `layers_to_transform`, as numbered below `layers_pattern`; a layer or pattern that is not there is
    refused."""
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted or []
    if not wanted:
        return names
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    try:
        number = {name: _layer_of(name, patterns or [r"[^.]*"]) for name in names}
    except re.error as error:
        raise InputError(f"lora.layers_pattern: got {config.layers_pattern!r}, which is no regular expression "
                         f"({error})") from None  # fmt: skip
    for pattern in patterns:
        if all(_layer_of(name, [pattern]) is None for name in names):
            lists = sorted({name.split(".")[i - 1] for name in names for i, step in enumerate(name.split("."))
                            if i and step.isdigit()})  # fmt: skip
            raise InputError(f"lora.layers_pattern: got {pattern!r}, which no target module lies under; "
                             + suggestion(pattern, lists))  # fmt: skip
    there = sorted({n for n in number.values() if n is not None})
    for one in wanted:
        if one not in there:
            where = f"the target modules lie in layers {there[0]} to {there[-1]}" if there else "none is in a layer"
            raise InputError(f"lora.layers_to_transform: got {one}, but {where}")
    # As in PEFT, a whole name is taken wherever it is.
    whole = () if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    return [name for name in names if number[name] in wanted or name in whole]


def _layer_of(name: str, patterns: list[str]) -> int | None:
    for pattern in patterns:
        if match := re.match(rf"(?:|.*?\.){pattern}\.(\d+)\.", name):
            return int(match[1])
    return None


# What is handed to PEFT


def _exactly(parts: _Parts, chosen: list[str], config: LoraConfig) -> LoraConfig:
    """A copy of `config` with which PEFT selects exactly `chosen`, now and when it loads the saved adapter: as given
    where that does, else by the ends of the names, else by whole names."""
    exact = copy.deepcopy(config)
    for targets in (config.target_modules, {leaf(name) for name in chosen}):
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            continue
        exact.target_modules = cast(Any, copy.copy(targets))
        if set(_selected(parts, exact)) == set(chosen):
            return exact
    exact.target_modules = cast(Any, set(chosen))  # PEFT unites such sets
    # Settled by the names; PEFT counts layers otherwise where a model's own list stands first in a name.
    exact.layers_to_transform = exact.layers_pattern = None
    return exact


def _selected(parts: _Parts, config: LoraConfig) -> list[str]:
    """What PEFT would adapt. In some architectures of experts it puts the ends of names in a pattern's place first, and
    so takes them in every layer; or refuses."""
    trial = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(trial, parts.model, None)
    except ValueError:
        return []
    return [name for name in parts.modules if check_target_module_exists(trial, name) and not _is_whole(name, config)]


# What is said of it


def _line(parts: _Parts, asked: list[str], kept: list[str], chosen: list[str], config: LoraConfig) -> str:
    """Layers adapted, their share of the matrix weights (no embedding, no head), what was left out and why."""
    adapted, before, within = set(chosen), set(asked), set(kept)
    missing: dict[str, Counter[str]] = {}
    total = at_work = 0
    for name, weight in _matrix_weights(parts):
        total += weight
        if name in adapted:
            at_work += weight
            continue
        reason, what = _reason(parts, name, before, within, config)
        missing.setdefault(reason, Counter())[what] += weight

    def share(weight: int) -> str:
        return f"{weight / max(total, 1):.1%}"

    kinds = ", ".join(sorted({leaf(name) for name in chosen}))
    towers = sorted({tower for name in chosen if (tower := parts.tower(name))})
    said = f"{len(chosen)} layers adapted ({kinds}), {share(at_work)} of the matrix weights"
    if towers:
        said += f", some in {', '.join(towers)} as asked"
    rest = [
        f"{', '.join(what for what, _ in counts.most_common())} {share(counts.total())}{reason}"
        for reason, counts in sorted(missing.items(), key=lambda item: -item[1].total())
    ]
    return said + (f"; left out: {'; '.join(rest)}" if rest else "")


def _matrix_weights(parts: _Parts) -> Iterator[tuple[str, int]]:
    """(module, its weights with two or more dimensions), without embeddings and output heads, each weight once."""
    seen: set[int] = set()
    for name, outer in [("", parts.model), *parts.modules.items()]:
        module = _root(outer)
        if isinstance(module, nn.Embedding) or parts.is_head(name):
            continue
        for own in _matrices(module):
            parameter = module.get_parameter(own)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                if isinstance(module, nn.Linear) and own == "weight":
                    yield name, module.in_features * module.out_features  # a 4-bit weight is packed
                else:
                    yield name, parameter.numel()


def _met(parts: _Parts) -> tuple[int, bool]:
    """What `Targets` says of `met` and `all_experts`."""
    fixed = of_experts = 0
    for name, weight in _matrix_weights(parts):
        if parts.tower(name) is not None:
            continue
        if "experts" in name.split(".") or (name in parts.modules and parts.is_expert(name)):
            of_experts += weight
        else:
            fixed += weight
    share = _active_share(parts.model) if of_experts else 1.0
    return fixed + round(of_experts * (share or 1.0)), share is None


def _active_share(model: nn.Module) -> float | None:
    """The share of a layer's routed experts that a token meets, None where the configuration does not say."""
    for _, top in _transformers_models(model):
        text = cast(Any, top.config).get_text_config()
        names = ("num_local_experts", "n_routed_experts", "num_experts")
        there = next((count for name in names if (count := getattr(text, name, None))), None)
        active = getattr(text, "num_experts_per_tok", None)
        if there and active:
            return active / there
    return None


def _reason(parts: _Parts, name: str, asked: set[str], kept: set[str], config: LoraConfig) -> tuple[str, str]:
    """(why a module has no adapter and what to do, what to call it)."""
    module, last = parts.modules.get(name, parts.model), leaf(name)
    if name in asked and name not in kept:
        return " (lora.exclude_modules)" if config.exclude_modules else " (trained whole)", last
    if name in kept:
        return " (lora.layers_to_transform)", "other layers"
    if tower := parts.tower(name):
        return " (modules there are adapted where lora.target_modules names them by their paths)", tower
    if name in parts.modules and parts.is_expert(name):
        return " (fused parameters, which lora.target_modules cannot reach yet)", "experts"
    if parts.is_router(name):
        return " (they choose experts)", "routers"
    if not _takes_adapter(module):
        return f" ({type(module).__name__}, not a linear layer)", last or "the model's own"
    if why := parts.obstacle(name):
        return f" ({why})", last
    return " (can be added to lora.target_modules)", last
