"""Checkpoints in the formats that are imported: the recorded ones as published, and language models with a tokenizer."""

from pathlib import Path

import torch
from conftest import recorded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration


IMAGE_TOKEN = 500
CASES = {
    "internlm2": "internlm2",
    "internlm2_dyn": "internlm2",
    "internlm2_dyn_active": "internlm2",
    "phi3": "phi3",
    "phi3_su_long": "phi3",
    # too large to ship, run with --goldens:
    "qwen2": "qwen2",
    "mono": "mono",
    "mono_dyn_active": "mono",
}
TINY_LANGUAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 270,
}


def published_folder(name: str, tmp_path: Path) -> Path:
    """A folder in the published format: the configuration of one case with the weights of its base."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").symlink_to(recorded(f"models/{name}/config.json"))
    (folder / "model.safetensors").symlink_to(recorded(f"models/{CASES[name]}/model.safetensors"))
    return folder


def load_published(name: str, tmp_path: Path):
    """On the fly, as `MiniMonkeyForConditionalGeneration.from_pretrained(published folder)`."""
    return MiniMonkeyForConditionalGeneration.from_pretrained(
        published_folder(name, tmp_path), image_token_id=IMAGE_TOKEN
    ).eval()


def language_folder(folder: Path, model_type: str, **options) -> Path:
    """A language model of this family with random weights and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY_LANGUAGE, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(folder)
    return folder
