"""What the tests of vLLM share: prompts, what transformers answers to them, and an engine.

vLLM changes transformers' classes in the process that it runs in, so expected answers are computed before an engine starts,
and each file of tests runs in a process of its own (`make test-vllm`).
"""

import os

import pytest


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: it starts in half the time
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm.engine.llm_engine", reason="vLLM is not installed; make test-vllm makes its environment")

import torch  # noqa: E402
from conftest import ROOT, synthetic_picture  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402


NEW_TOKENS = 16
SHAPES = [(100, 800), (800, 100), (320, 240), (240, 320), (112, 112), (60, 720), (500, 300)]
SHAPES += [(720, 60), (30, 20), (900, 640)]


# Of small language models: heads of 32, the least that vLLM's attention for CPUs has.
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}


def user(text: str, *images) -> dict:
    """A user's message, images first."""
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def nano_prompts() -> list[list[dict]]:
    """Twenty: one and several images, shapes from 1:12 to 12:1, text alone, other languages, later turns, a system message."""
    example, receipt = (Image.open(ROOT / "assets" / f"{name}.png").convert("RGB") for name in ("example", "receipt"))
    shapes = [synthetic_picture(*size, seed) for seed, size in enumerate(SHAPES)]
    return [
        *([user("Read the text.", image)] for image in (example, receipt, *shapes)),
        [user("Read Image-2.", receipt, example)],
        [user("What is the total? 多少钱?", shapes[0], receipt, shapes[1])],
        [user("Which word is in both?", shapes[2], shapes[2], example, shapes[4])],
        [user("Hello, who are you?")],
        [
            user("Write the numbers from one to ten."),
            {"role": "assistant", "content": "1 2 3"},
            user("Go on: 你好 é ß"),
        ],
        [{"role": "system", "content": "Say little."}, user("Read the text.", example)],
        [user("Read the text.", example), {"role": "assistant", "content": "Mini Monkey"}, user("And this?", receipt)],
        [
            user("What is the total?", receipt),
            {"role": "assistant", "content": "$2.38"},
            user("And the date?"),
            {"role": "assistant", "content": "none"},
            user("Compare it with this.", shapes[5]),
        ],
    ]


def expected_answers(
    folder, prompts: list[list[dict]], images_kwargs: dict, **generation
) -> list[tuple[int, list[int]]]:
    """What transformers answers in float32, greedily and one prompt at a time: (tokens of the prompt, ids of the answer)."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    answers = []
    for messages in prompts:
        inputs = processor.apply_chat_template(messages, **options, processor_kwargs={"images_kwargs": images_kwargs})
        with_image = "pixel_values" in inputs
        settings = generation if with_image else {}
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
        length = inputs["input_ids"].shape[1]
        if settings:
            kept = {name: value for name, value in settings.items() if name != "use_scm"}
            length = sum(map(len, model.kept_positions(**inputs, **kept)))
        answers.append((length, ids[0, inputs["input_ids"].shape[1] :].tolist()))
    return answers


def start_engine(folder, **options):
    """vLLM's offline engine in float32, as small as it gets."""
    from vllm import LLM

    settings = {"max_model_len": 4096, "limit_mm_per_prompt": {"image": 4}, **options}
    return LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2**27,
        gpu_memory_utilization=0.3,
        **settings,
    )


def in_vllm(message: dict) -> dict:
    """A message whose images are objects, as vLLM takes them."""
    if isinstance(message["content"], str):
        return message
    content = [
        {"type": "image_pil", "image_pil": item["image"]} if item["type"] == "image" else item
        for item in message["content"]
    ]
    return {**message, "content": content}


def answers_of(engine, prompts: list[list[dict]], images_kwargs: dict) -> list[tuple[int, list[int]]]:
    """What vLLM answers, all prompts at once: (tokens of the prompt, ids of the answer)."""
    from vllm import SamplingParams

    outputs = engine.chat(
        [[in_vllm(message) for message in messages] for messages in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        mm_processor_kwargs=images_kwargs,
        use_tqdm=False,
    )
    return [(len(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
