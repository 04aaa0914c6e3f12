"""A tokenizer in llama.cpp's terms: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama").

llama.cpp cannot be given a pattern by which text is split before merging; it has those of known models by name
(src/llama-vocab.cpp). Its converter recognises a model by the tokens of one test text. Here the tokenizer's own pattern
is compared, so a vocabulary of any size or training is recognised; another pattern is refused, since llama.cpp would
split text otherwise than in training.
"""

import json
import logging
import re
from typing import Any

from tokenizers import Tokenizer, normalizers

from ..data.tokens import turn_end_token
from ..errors import InputError

log = logging.getLogger("lorapar")

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN_2 = rf"{WORDS}|\p{{N}}|{REST}"
BYTES, BYTES_OF_WORDS = ("ByteLevel", False), ("ByteLevel", True)
# How text is split, and whether a whole word that is a token is taken without its merges → llama.cpp's name.
PATTERNS = {
    ((BYTES_OF_WORDS,), False): "gpt-2",
    ((("Digits",), BYTES_OF_WORDS), False): "smollm",
    ((("Split", LLAMA_3), BYTES), True): "llama-bpe",
    ((("Split", LLAMA_3), BYTES), False): "smaug-bpe",
    ((("Split", QWEN_2), BYTES), False): "qwen2",
}
SPACE = "▁"


def check_tokenizer(tokenizer: Any) -> None:
    """InputError, in one line, for a tokenizer that llama.cpp does not have."""
    _kind(_parts(tokenizer))


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as a tokenizer.json holds it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} is none of the library tokenizers")
    return json.loads(backend.to_str())


def _refused(why: str) -> InputError:
    return InputError(
        f"export.gguf: the tokenizer is not converted here: {why}; convert merged/ (export.merged: true) with "
        "llama.cpp's convert_hf_to_gguf.py"
    )


def _kind(parts: dict[str, Any]) -> tuple[str, str]:
    """(llama.cpp's tokenizer, its name of the pattern)"""
    model = parts["model"]
    if model["type"] != "BPE":
        raise _refused(f"it is {model['type']}, and BPE is")
    if not model["merges"]:
        raise _refused("it has no merges")
    if model.get("byte_fallback"):
        _prepends(parts)
        return "llama", "default"
    steps = tuple(map(_step, _sequence(parts["pre_tokenizer"], "pretokenizers")))
    normalizers = _sequence(parts["normalizer"], "normalizers")
    pattern = PATTERNS.get((steps, bool(model.get("ignore_merges"))))
    # llama.cpp leaves composing accents (NFC) to whoever writes the text.
    if pattern is None or any(one["type"] != "NFC" for one in normalizers):
        raise _refused(f"it splits text as none of {', '.join(PATTERNS.values())} of llama.cpp does")
    return "gpt2", pattern


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What one step of splitting does, as `PATTERNS` writes it; others as they are, which match none there."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ("ByteLevel", step["use_regex"])
    if step["type"] == "Digits" and step["individual_digits"]:
        return ("Digits",)
    # What lies between matches is a part of its own; removing all but the matches is the same where all text matches.
    isolated = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] == "Split" and isolated and "Regex" in step["pattern"]:
        return ("Split", step["pattern"]["Regex"])
    return (json.dumps(step),)


def _prepends(parts: dict[str, Any]) -> str:
    """Where a SentencePiece tokenizer puts a space before text; InputError where it does anything else to it.

    "all": before every text between special tokens, as llama.cpp does where it is told to; "never". What transformers 5
    makes of such tokenizers is neither: "first", before the whole text alone, or "always", before all texts that do not
    begin with a space.
    """
    prepends = "never"
    for step in _sequence(parts["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": SPACE}:
            prepends = "all"
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            raise _refused(f"it normalizes text by {step['type']}")
    for step in _sequence(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] != "Metaspace" or step["replacement"] != SPACE or step["split"]:
            raise _refused(f"it splits text by {step['type']}, unlike SentencePiece")
        if step["prepend_scheme"] != "never":
            prepends = step["prepend_scheme"]
    return prepends


def _space_prefix(tokenizer: Any, parts: dict[str, Any], chat: bool) -> tuple[bool, bool]:
    """(whether llama.cpp is told to put a space before every text between special tokens, whether it then writes
    prompts as training did)

    Where the tokenizer does neither that nor nothing, what makes the prompts' tokens those of training.
    """
    prepends = _prepends(parts)
    if prepends in ("all", "never"):
        return prepends == "all", True
    prompts = _prompts(tokenizer, chat)
    wanted = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    for told in (True, False):
        if _encoded_by_llama_cpp(parts, prompts, told) == wanted:
            return told, True
    return True, False


def _encoded_by_llama_cpp(parts: dict[str, Any], texts: list[str], told: bool) -> list[list[int]]:
    steps = [normalizers.Prepend(SPACE)] * told + [normalizers.Replace(" ", SPACE)]
    made = Tokenizer.from_str(json.dumps({**parts, "normalizer": None, "pre_tokenizer": None}))
    made.normalizer = normalizers.Sequence(steps)
    return [made.encode(text, add_special_tokens=False).ids for text in texts]


def _prompts(tokenizer: Any, chat: bool) -> list[str]:
    """Made-up prompts of one question and of two, as training put them: by the chat template, or in plain text."""
    if not chat or tokenizer.chat_template is None:
        return ["What is 2 + 3?"]
    turns = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(("user", "assistant", "user"))]
    return [
        tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=True) for count in (1, 3)
    ]


def say_other_tokens(tokenizer: Any, chat: bool) -> None:
    """A line in the log for each thing by which llama.cpp makes other tokens of a prompt than training did."""
    parts = _parts(tokenizer)
    if _kind(parts)[0] == "llama" and not _space_prefix(tokenizer, parts, chat)[1]:
        log.warning(
            "export: gguf: llama.cpp puts a space before the text behind each special token or behind none, and the "
            "tokenizer does neither: prompts have other tokens there than in training"
        )
    odd = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if _is_odd(tokenizer, token)]
    if odd:
        log.warning(
            "export: gguf: llama.cpp takes %s wherever the text holds it, with the space around it left: the tokenizer "
            "tells them otherwise (lstrip, rstrip, single_word or normalized)", ", ".join(odd),
        )  # fmt: skip


def _is_odd(tokenizer: Any, token: Any) -> bool:
    """Whether an added token takes in the space around it, is none within a word, or is looked for in other text."""
    text, normalizer = str(token.content), tokenizer.backend_tokenizer.normalizer
    changed = token.normalized and normalizer is not None and normalizer.normalize_str(text) != text
    return token.lstrip or token.rstrip or token.single_word or changed


def adds(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text, and its EOS behind."""
    ids = tokenizer.encode("a")
    return ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, chat: bool = True) -> None:
    """The keys that hold the tokenizer and its chat template, into a `gguf.GGUFWriter`.

    vocabulary: the rows of the embedding; the ids that are no token's are filled. chat: whether training asked by the
    chat template, where there is one.
    Raises InputError for a tokenizer that llama.cpp does not have.
    """
    import gguf

    parts = _parts(tokenizer)
    kind, pattern = _kind(parts)
    added = tokenizer.added_tokens_decoder
    names = {index: token for token, index in parts["model"]["vocab"].items()}
    tokens, types = [], []
    for index in range(vocabulary):
        if index in added:
            token, special = str(added[index].content), added[index].special
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
            if kind == "llama" and token == tokenizer.unk_token:
                types[-1] = gguf.TokenType.UNKNOWN
            tokens.append(token if special else token.replace(SPACE, " "))
        elif index in names:
            tokens.append(names[index])
            byte = kind == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", names[index])
            types.append(gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in parts["model"]["merges"]]
    if kind == "llama":
        # SentencePiece merges the pair whose result has the highest score, where BPE takes the first of its merges.
        first = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([float(-first.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_space_prefix(tokenizer, parts, chat)[0])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    before, behind = adds(tokenizer)
    writer.add_add_bos_token(before)
    if behind:
        writer.add_add_eos_token(True)
    for role in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None and index < vocabulary:
            getattr(writer, f"add_{role}_token_id")(index)
    # A base model's EOS often ends no turn of a chat.
    turn = turn_end_token(tokenizer)
    if turn not in (None, tokenizer.eos_token_id):
        writer.add_eot_token_id(turn)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        writer.add_chat_template(template)
