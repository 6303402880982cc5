"""A tokenizer of transformers in the words of GGUF, for people who run llama.cpp by itself.

Two kinds are written: byte-level ones (GPT-2, Qwen2, Llama 3, Nano), whose way to split a text has to be one that
llama.cpp knows by name, and those made of sentencepiece (InternLM2, Phi-3), whose merges become scores.
"""

import json
from typing import Any


# How a byte-level tokenizer splits a text, and llama.cpp's name for it.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "llama-bpe"
    ),
}
SPACE_BYTE = "\u0120"  # how byte-level tokenizers write a space


def write_tokenizer(writer, tokenizer, chat_template: str, vocab_size: int, end_ids: list[int], adds_bos: bool) -> None:
    """Write a tokenizer, its special tokens and the chat template into a `gguf.GGUFWriter`.

    Args:
        tokenizer: A fast one.
        vocab_size: The model's, which may have more embeddings than the tokenizer has tokens.
        end_ids: Tokens that end an answer; the first is the one that llama.cpp is told.
        adds_bos: Whether prompts begin with `bos_token`.

    Raises:
        ValueError: A tokenizer of another kind.
    """
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = tokenizer_kind(state)
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {index: token for token, index in state["model"]["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    unknown = state["model"].get("unk_token")
    tokens, types = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            kind_of_token = gguf.TokenType.UNUSED
        elif token == unknown:
            kind_of_token = gguf.TokenType.UNKNOWN
        elif index in added:
            kind_of_token = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif kind == "llama" and _is_byte(token):
            kind_of_token = gguf.TokenType.BYTE
        else:
            kind_of_token = gguf.TokenType.NORMAL
        tokens.append((f"[PAD{index}]" if token is None else token).encode())
        types.append(kind_of_token)
    writer.add_tokenizer_model("llama" if kind == "llama" else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    if kind == "llama":
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(by_id.get(index, ""), len(merges))) for index in range(vocab_size)])
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for name, index in (("bos", tokenizer.bos_token_id), ("pad", tokenizer.pad_token_id)):
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if end_ids:
        writer.add_eos_token_id(end_ids[0])
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(chat_template)


def tokenizer_kind(state: dict[str, Any]) -> str:
    """Return "llama" for a tokenizer made of sentencepiece, or llama.cpp's name for the split of a byte-level one.

    Args:
        state: A `tokenizer.json`.

    Raises:
        ValueError: Another kind.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"A tokenizer of the kind {model['type']} is not written as GGUF, only BPE is.")
    if model.get("byte_fallback"):
        return "llama"
    steps = _steps(state.get("pre_tokenizer"))
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise ValueError("Of BPE tokenizers those that work on bytes are written as GGUF; this one does not.")
    patterns = [step["pattern"] for step in steps if step["type"] == "Split"]
    if not patterns:
        return "gpt-2"
    regex = patterns[0].get("Regex", "")
    if len(patterns) == 1 and regex in SPLITS:
        return SPLITS[regex]
    # Spaces by themselves, and then as GPT-2: the same, if no merge joins a space with anything.
    joined = ["".join(merge).replace(" ", "") for merge in model["merges"]]
    if patterns == [{"String": " "}] and not any(SPACE_BYTE in token for token in joined):
        return "gpt-2"
    raise ValueError(f"llama.cpp has no name for how this tokenizer splits a text: {patterns}.")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_space(state: dict[str, Any]) -> bool:
    """Tell whether a text gets a space in front."""
    steps = [*_steps(state.get("normalizer")), *_steps(state.get("pre_tokenizer"))]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)
