"""What test_vllm.py has another Python do, one that has vLLM and nothing of ours: `python with_vllm.py request.json`.

The request: base, adapters {name: folder}, rank, prompts (lists of ids), stops, new_tokens, table {class: {...}} as
exporting/serving.py has it, out. Written to `out`: answers {name: [[ids, log-probabilities], ...]}, the base's under
"base"; classes {class: what vLLM's says, or why it cannot be imported}; version.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def answers(request: dict[str, Any]) -> dict[str, list[Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(
        model=request["base"], dtype="float32", enable_lora=True, max_lora_rank=request["rank"], max_loras=1,
        max_model_len=256, enforce_eager=True, max_num_seqs=8,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["new_tokens"], stop_token_ids=request["stops"], logprobs=1, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    loras = {"base": None}
    for number, (name, folder) in enumerate(request["adapters"].items(), start=1):
        loras[name] = LoRARequest(name, number, folder)
    found = {}
    for name, lora in loras.items():
        outputs = [output.outputs[0] for output in model.generate(prompts, sampling, lora_request=lora)]
        found[name] = [
            [list(one.token_ids), [step[token].logprob for token, step in zip(one.token_ids, one.logprobs)]]
            for one in outputs
        ]
    return found


def classes(table: dict[str, Any]) -> dict[str, Any]:
    """Of each class: whether it takes LoRA, what it packs, and what its renaming makes of the name of a layer."""
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.interfaces import supports_lora

    places = {**registry._TEXT_GENERATION_MODELS, **registry._MULTIMODAL_MODELS}
    places |= getattr(registry, "_TRANSFORMERS_SUPPORTED_MODELS", {})
    found: dict[str, Any] = {}
    for name, served in table.items():
        if name not in places:
            found[name] = "not in vLLM's registry"
            continue
        module, class_name = places[name]
        try:
            model = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), class_name)
        except ImportError as error:  # a wrapper's image reader needs torchvision
            found[name] = str(error)
            continue
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        layer = f"{served['within']}0.self_attn.q_proj.weight"
        # The transformers backend makes its mapper when it has the model.
        renamed = mapper.get_rename_mapper()._map_name(layer) if mapper is not None else layer
        found[name] = {
            "lora": bool(supports_lora(model)),
            "packed": getattr(model, "packed_modules_mapping", None) or {},
            "layer": renamed,
        }
    return found


if __name__ == "__main__":
    import vllm

    request = json.loads(Path(sys.argv[1]).read_text())
    done = {"version": vllm.__version__, "classes": classes(request["table"]), "answers": answers(request)}
    Path(request["out"]).write_text(json.dumps(done))
