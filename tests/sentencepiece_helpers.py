"""Published tokenizers of a small vocabulary; what imports this is skipped where there is no sentencepiece."""

import json
from pathlib import Path

import pytest


sentencepiece = pytest.importorskip("sentencepiece")


CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Read the all text in the image.",
    "pack my box with five dozen liquor jugs",
    "numbers 0123456789 and prices $5.00, 12,50 or 100%",
    "你是由上海人工智能实验室开发的模型",
] * 20
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def train_model(folder: Path, **options) -> Path:
    """A small sentencepiece BPE, with the settings of InternLM2 and Llama unless `options` say otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), **settings
    )
    return folder / "tokenizer.model"


def write_internlm2_folder(folder: Path) -> dict[str, int]:
    """A checkpoint's tokenizer files in InternLM2 style; two chat tokens take the places of pieces of the model."""
    path = train_model(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    tokens = {"<|im_end|>": pieces - 2, "<|im_start|>": pieces - 1}
    tokens |= {token: pieces + i for i, token in enumerate(IMAGE_TOKENS)}
    decoder = {
        str(index): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for token, index in tokens.items()
    }
    for index, token in enumerate(("<unk>", "<s>", "</s>")):
        decoder[str(index)] = {"content": token, "normalized": False, "special": True}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokens
