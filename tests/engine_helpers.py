"""Small models as folders, for the programs that run a language model in torch's place."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from model_helpers import IMAGE_TOKEN, TINY_TEXT, TINY_VISION

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts import chat
from minimonkey.scripts.engines.libllama import require_libllama


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {"intermediate_size": 64, "num_hidden_layers": 3}
SHAPES = {
    "llama": ("llama", SIZES),
    "llama with biases": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {**SIZES, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, dynamic": (
        "llama",
        {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("qwen2", SIZES),
    "qwen2, tied": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen2, linear": ("qwen2", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "phi3": ("phi3", SIZES),
    "phi3, longrope": ("phi3", {**SIZES, "rope_parameters": LONGROPE, "max_position_embeddings": 1024}),
}


def needs(*modules: str):
    """Return a mark that skips tests where a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, which the lock does not have")


def has_libllama() -> str:
    """Return why llama.cpp's library cannot be used; nothing where it can."""
    try:
        require_libllama()
    except ValueError as error:
        return str(error)
    return ""


def saved(folder: Path, shape: str):
    """Save a small model of this shape with random weights; return it."""
    kind, options = SHAPES[shape]
    torch.manual_seed(0)
    config = MiniMonkeyConfig(
        vision_config=dict(TINY_VISION),
        text_config={"model_type": kind, **TINY_TEXT, **options},
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=options.get("tie_word_embeddings", False),
    )
    model = MiniMonkeyForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return model


def embeddings(width: int, count: int = 90) -> torch.Tensor:
    """Return embeddings (1, count, width)."""
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(3))


def assert_chat_answers_as_torch(capsys, *engine: str) -> None:
    """Run chat.py with SCM in torch, and with the options of an engine; both print the same."""
    image, options = str(ROOT / "assets" / "example.png"), ("--use-scm", "--dtype", "float32", "--device", "cpu")
    arguments = [image, "Read the text.", *options]
    assert chat.main(arguments) == 0
    expected = capsys.readouterr().out
    assert chat.main([*arguments, *engine]) == 0
    assert capsys.readouterr().out == expected
