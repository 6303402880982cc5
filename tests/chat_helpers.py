"""What the tests of `chat` share: settings, a small model that says letters, and how to see what an answer costs."""

import re
from contextlib import contextmanager

import torch
from model_helpers import TINY_TEXT, TINY_VISION
from transformers import LogitsProcessor, LogitsProcessorList

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration


TOLERANCE = 1e-4
CHAT = {"max_new_tokens": 5, "do_sample": False}
TILES = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 2, "adaptive_max_tiles": 3}
SCM = {"use_scm": True, "images_kwargs": TILES}
SETTINGS = {
    "plain": {},
    "tiles": {"images_kwargs": TILES},
    "scm": SCM,
    "scm_visual": {**SCM, "scm_queries": "visual", "scm_keep_ratio": 0.3},
}
QUESTION = "Read the text."
LETTERS = range(67, 93)  # the ids of a to z


def tiny(visual_experts: bool = False, **text):
    """A random model of a family that says letters, with Nano's tokenizer."""
    torch.manual_seed(0)
    vision = {**TINY_VISION, "num_hidden_layers": 0 if visual_experts else 2}
    config = MiniMonkeyConfig(
        vision_config=vision,
        text_config={**TINY_TEXT, "vocab_size": 386, "max_position_embeddings": 2048, **text},
        image_token_id=379,
        visual_experts=visual_experts,
    )
    model = MiniMonkeyForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[: LETTERS.start] = model.lm_head.weight[LETTERS.stop :] = 0
    return model


def tile_numbers(processor, pictures, **options) -> list[int]:
    """How many tiles each picture is cut in."""
    counts = processor.image_processor(pictures, return_tensors="pt", **options)["tile_counts"]
    return counts.sum(dim=1).tolist()


def remembers(history) -> bool:
    return type(history).__name__ == "ChatHistory" and history.memory is not None


def assert_equal(answer, expected):
    """The same tokens with the same probabilities."""
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.history == expected.history
    difference = torch.tensor(answer.log_probabilities) - torch.tensor(expected.log_probabilities)
    assert difference.abs().max() < TOLERANCE


def ask(model, processor, images, question, history=None, **options):
    """An answer with memory, which must be that of computing everything anew."""
    options = {**CHAT, "return_dict": True, **options}
    plain = None if history is None else list(history)
    expected = model.chat(processor, images, question, history=plain, remember=False, **options)
    answer = model.chat(processor, images, question, history=history, **options)
    assert expected.history.memory is None
    assert_equal(answer, expected)
    return answer


class Work:
    """What a model did: tokens that the language model read in each step, and tiles that went through the vision tower."""

    def __init__(self):
        self.read, self.tiles, self.scored = [], 0, 0


@contextmanager
def watch(model):
    work = Work()

    def see_text(_, args, kwargs):
        work.read.append(kwargs["inputs_embeds"].shape[1])

    def see_first_layer(_, args, kwargs):
        work.scored += kwargs.get("past_key_values", kwargs.get("cache")) is None  # SCM's probe

    def see_tiles(_, args, kwargs):
        work.tiles += len(args[0] if args else kwargs["pixel_values"])

    hooks = [
        model.model.language_model.register_forward_pre_hook(see_text, with_kwargs=True),
        model.model.language_model.layers[0].register_forward_pre_hook(see_first_layer, with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(see_tiles, with_kwargs=True),
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def work_of(model, processor, images, question, history=None, **options) -> Work:
    """The work of a turn with memory; the turn itself must be right."""
    with watch(model) as work:
        answer = model.chat(processor, images, question, history=history, **{**CHAT, "return_dict": True, **options})
    plain = None if history is None else list(history)
    options = {**CHAT, "return_dict": True, **options}
    assert_equal(answer, model.chat(processor, images, question, history=plain, remember=False, **options))
    work.answer = answer
    return work


def new_tokens(processor, question: str) -> int:
    """Tokens that a question adds to a conversation whose last answer ended by itself."""
    turn = f"<|im_end|><|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
    return len(processor.tokenizer(turn, add_special_tokens=False)["input_ids"])


class Forced(LogitsProcessor):
    """Makes the model say these tokens."""

    def __init__(self, ids):
        self.ids, self.step = ids, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[min(self.step, len(self.ids) - 1)]] = 0
        self.step += 1
        return forced


def forced(ids):
    return {"logits_processor": LogitsProcessorList([Forced(ids)]), "max_new_tokens": len(ids)}


def spelled(tokenizer, text: str) -> list[int]:
    """Text as single characters, which the tokenizer would join."""
    return [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def shorten(text: str) -> str:
    """A prompt without its system turn, [n] for n image tokens."""
    text = re.sub(r"<img>((?:<IMG_CONTEXT>)*)</img>", lambda match: f"[{match[1].count('<IMG_CONTEXT>')}]", text)
    return text.replace("<pad>", "").partition("<|im_end|>")[2]


def prompt_of(sent, processor, row: int = 0) -> str:
    return shorten(processor.tokenizer.decode(sent["input_ids"][row]))


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
