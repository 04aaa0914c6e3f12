"""llama.cpp in a process of its own: `python llama_worker.py JOBS.json [FOLDER]`, where FOLDER holds llama_cpp.

A job has "model", "out", and "ids", a list of prompts' tokens, whose logits go to `out` (.npy, a row a token); "lora"
is an adapter's file. With "texts" in place of "ids" their tokens go to `out` as JSON.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = sys.argv[2:]

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402


def logits(job: dict) -> np.ndarray:
    # An fp32 cache and plain attention: what is left is the weights' own rounding, and that of what they are given.
    model = llama_cpp.Llama(job["model"], lora_path=job.get("lora"), n_ctx=256, n_threads=1, n_threads_batch=1,
                            type_k=0, type_v=0, flash_attn=False, logits_all=True, verbose=False)  # fmt: skip
    found = []
    for ids in job["ids"]:
        model.reset()
        model.eval(ids)
        found.append(model.scores[: len(ids)].copy())
    return np.concatenate(found)


def tokens(job: dict) -> list[list[int]]:
    model = llama_cpp.Llama(job["model"], vocab_only=True, verbose=False)
    vocabulary = model._model.vocab
    add = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary))
    return [model.tokenize(text.encode(), add_bos=add, special=True) for text in job["texts"]]


for one in json.loads(Path(sys.argv[1]).read_text()):
    if "texts" in one:
        Path(one["out"]).write_text(json.dumps(tokens(one)))
    else:
        np.save(one["out"], logits(one))
