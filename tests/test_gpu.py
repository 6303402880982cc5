"""What needs a GPU: flash attention, and whether the 2B model fits on a 24 GB card. Run with `pytest -m gpu`."""

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoModel

from minimonkey.scripts.benchmarking.models import random_config, random_model, random_tiles


@pytest.mark.gpu
def test_flash_attention_on_a_gpu(processor):
    model = AutoModel.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.bfloat16, attn_implementation="flash_attention_2"
    ).to("cuda")
    image = Image.open(ROOT / "assets" / "example.png")
    assert isinstance(model.chat(processor, image, "Read the text.", max_new_tokens=8), str)


def answer_to_tiles(size: str, device: str, tiles: int, new_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt about tiles, and of what a model of random weights returns for it."""
    model = random_model(random_config(size), torch.device(device), torch.bfloat16)
    prompt = [1, *[model.config.image_token_id] * (tiles * model.config.image_seq_length), 2]
    ids = torch.tensor([prompt], device=device)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, pixel_values=random_tiles(tiles, model), **options)
    return ids.shape[1], output.shape[1]


def test_answer_to_tiles():
    before, after = answer_to_tiles("Nano", "cpu", tiles=2, new_tokens=3)
    assert after == before + 3


@pytest.mark.gpu
def test_a_24_gb_card_is_enough():
    """34 tiles and 512 new tokens with 2B parameters in bf16, on a larger card within the memory of a smaller one."""
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / memory))
    try:
        before, after = answer_to_tiles("2B", "cuda", tiles=34, new_tokens=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert after == before + 512
