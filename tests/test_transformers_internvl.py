"""InternVL in transformers' own format (InternVL3-1B-hf and the like) becomes a MiniMonkey, with MSAC and SCM."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import language_folder
from conftest import random_tiles, synthetic_picture
from model_helpers import TINY_TEXT, TINY_VISION
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, InternVLConfig, InternVLForConditionalGeneration

from minimonkey.conversation import get_template
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.assemble import extend_tokenizer
from minimonkey.scripts.import_checkpoint import import_checkpoint
from minimonkey.scripts.importing.tokenizer import convert_tokenizer


IMAGE_TOKEN = 262
# How transformers renders a conversation for these checkpoints.
PROMPT = "<|im_start|>user\n<img>{}</img>\nHello<|im_end|>\n<|im_start|>assistant\n"


def hub_names(folder: Path) -> None:
    """The names under which these checkpoints are stored on the Hub, from before transformers nested the model."""
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.")
        if name.startswith(("language_model.layers.", "language_model.norm.", "language_model.embed_tokens.")):
            name = name.replace("language_model.", "language_model.model.", 1)
        renamed["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=["qwen2", "qwen3"])
def original(request, tmp_path):
    """A small model of transformers' class, with a tokenizer that has the tokens of these checkpoints."""
    folder = language_folder(tmp_path / "hf", request.param)
    (folder / "model.safetensors").unlink()
    tokenizer, _ = convert_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    extend_tokenizer(tokenizer, get_template("chatml"))
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == IMAGE_TOKEN
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    text = {**TINY_TEXT, "model_type": request.param, "vocab_size": 280, "head_dim": 16}
    config = InternVLConfig(
        vision_config=TINY_VISION,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model, folder


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    ids[0, 5:13] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": random_tiles(0, 2, 3, 28, 28)}


@torch.no_grad()
@pytest.mark.parametrize("rename", [lambda folder: None, hub_names], ids=["saved", "hub"])
@pytest.mark.parametrize("way", ["direct", "imported"])
def test_logits_are_those_of_transformers(original, rename, way, tmp_path):
    model, folder = original
    rename(folder)
    if way == "direct":
        ours, info = MiniMonkeyForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    else:
        import_checkpoint(str(folder), tmp_path / "out")
        ours = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(ours.eval()(**inputs()).logits, model(**inputs()).logits)


def test_msac_scm_and_prompts_come_with_the_import(original, tmp_path):
    _, folder = original
    import_checkpoint(str(folder), tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["template"] == "chatml"
    picture = synthetic_picture(200, 100, seed=3)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Hello"}]
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    tiles = int(encoded["tile_counts"].sum())
    assert tiles > 8
    assert processor.decode(encoded["input_ids"][0]) == PROMPT.format("<IMG_CONTEXT>" * 4 * tiles)
    options = {"max_new_tokens": 4, "do_sample": False}
    chatted = model.chat(processor, picture, "Hello", use_scm=True, **options)
    output = model.generate(**encoded, use_scm=True, **options)
    new_tokens = output[0, encoded["input_ids"].shape[1] :]
    assert chatted == processor.decode(new_tokens, skip_special_tokens=True).strip()
    (kept,) = model.kept_positions(**encoded)
    assert len(kept) == encoded["input_ids"].shape[1] - int(encoded["tile_counts"][0, 0]) * 2
