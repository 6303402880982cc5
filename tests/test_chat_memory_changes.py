"""A `chat` memory is never stale: edits, other pictures, settings and models, calls that fail, answers that read otherwise."""

import copy

import numpy as np
import pytest
import torch
from chat_helpers import CHAT, QUESTION, SCM, SETTINGS, TILES, ask, forced, new_tokens, remembers, spelled, work_of
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


# --- edits and changes -----------------------------------------------------------------------------------------------


EDITS = {
    "question": lambda history: history.__setitem__(0, ("<image>\nRead the words.", history[0][1])),
    "question of the same length": lambda history: history.__setitem__(0, ("<image>\nTake the cake.", history[0][1])),
    "answer": lambda history: history.__setitem__(0, (history[0][0], "Nothing at all")),
    "last answer": lambda history: history.__setitem__(-1, (history[-1][0], "Yes")),
    "pop": lambda history: history.pop(),
    "insert": lambda history: history.insert(0, ("Hello", "Hi")),
    "insert behind": lambda history: history.insert(1, ("Hello", "Hi")),
    "delete middle": lambda history: history.__delitem__(1),
    "append": lambda history: history.append(("So?", "So.")),
    "swap": lambda history: history.__setitem__(slice(1, 3), [history[2], history[1]]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_an_edited_history(model, small, pictures, edit, settings):
    options, history = SETTINGS[settings], None
    for question in (QUESTION, "And?", "Why?"):
        history = model.chat(small, pictures[0], question, history=history, return_history=True, **CHAT, **options)[1]
    EDITS[edit](history)
    assert remembers(history)
    answer = ask(model, small, pictures[0], "Then?", history, **options)
    ask(model, small, pictures[0], "And then?", answer.history, **options)


def changed_pixels(picture: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(picture))


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_another_picture_of_the_same_size(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    work = work_of(model, small, changed_pixels(pictures[0]), "And?", first.history, **options)
    assert work.tiles > 0
    back = work_of(model, small, pictures[0], "And?", work.answer.history, **options)
    assert back.tiles > 0


def test_two_pictures_that_change_places(model, small, pictures):
    two = [pictures[0], changed_pixels(pictures[0])]
    first = ask(model, small, two, "Compare.", **SCM)
    work = work_of(model, small, two[::-1], "And?", first.history, **SCM)
    assert work.tiles == 0
    one_changed = [two[0], changed_pixels(pictures[1]).resize((300, 200))]
    ask(model, small, one_changed, "And?", work.answer.history, **SCM)


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "tiles", "palette", "exif"])
def test_a_picture_that_is_changed_in_place(model, small, pictures, kind):
    picture = pictures[2].copy()
    if kind == "pil":
        source, change = picture, lambda: picture.paste((255, 0, 0), (0, 0, 40, 80))
    elif kind == "array":
        source = np.array(picture)
        change = lambda: source.__setitem__(slice(0, 30), 255)  # noqa: E731
    elif kind == "tensor":
        source = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        change = lambda: source[:, :30].fill_(255)  # noqa: E731
    elif kind == "tiles":
        source = small.image_processor(picture, return_tensors="pt")["pixel_values"]
        change = lambda: source[:, :, :40].mul_(-1)  # noqa: E731
    elif kind == "palette":
        source = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
        change = lambda: source.putpalette(source.getpalette()[::-1])  # noqa: E731
    else:
        source = picture
        change = lambda: source.getexif().__setitem__(0x0112, 6)  # noqa: E731
    first = ask(model, small, source, QUESTION)
    change()
    second = work_of(model, small, source, "And?", first.history)
    assert second.tiles == 1
    assert work_of(model, small, source, "Why?", second.answer.history).tiles == 0


@pytest.mark.parametrize("form", [str, lambda path: path, lambda path: path.as_uri()], ids=["str", "path", "uri"])
def test_a_picture_file_that_is_overwritten(model, small, pictures, tmp_path, form):
    path = tmp_path / "picture.png"
    pictures[2].save(path)
    first = ask(model, small, form(path), QUESTION)
    assert work_of(model, small, form(path), "And?", first.history).tiles == 0
    changed_pixels(pictures[2]).save(path)
    assert work_of(model, small, form(path), "And?", first.history).tiles == 1


CHANGES = {
    "images_kwargs": ({"images_kwargs": TILES}, {"images_kwargs": {**TILES, "max_tiles": 3}}),
    "same tiles, other kwargs": ({"images_kwargs": TILES}, {"images_kwargs": {**TILES, "image_mean": [0.1, 0.2, 0.3]}}),
    "tile size": ({}, {"images_kwargs": {"size": {"height": 56, "width": 56}}}),
    "tile budget": ({"images_kwargs": TILES}, {"images_kwargs": TILES, "tile_budget": 3}),
    "system_message": ({}, {"system_message": "Be brief."}),
    "compressed later": ({"images_kwargs": TILES}, SCM),
    "compressed first": (SCM, {"images_kwargs": TILES}),
    "keep ratio": (SCM, {**SCM, "scm_keep_ratio": 0.2}),
    "layer": (SCM, {**SCM, "scm_layer": 2}),
    "queries": (SCM, {**SCM, "scm_queries": "visual"}),
    "nothing left out": (SCM, {**SCM, "scm_keep_ratio": 1.0}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_change_between_turns(model, small, pictures, change):
    before, after = CHANGES[change]
    first = ask(model, small, pictures[0], QUESTION, **before)
    second = ask(model, small, pictures[0], "And?", first.history, **after)
    third = ask(model, small, pictures[0], "Why?", second.history, **before)
    ask(model, small, pictures[:2], "So <image>?", third.history, **after)


def test_settings_of_the_processor_that_change_between_turns(model, small, pictures):
    own = copy.deepcopy(small)
    first = ask(model, own, pictures[0], QUESTION)
    own.image_processor.min_tiles, own.image_processor.max_tiles = 2, 3
    assert work_of(model, own, pictures[0], "And?", first.history).tiles > 1


@pytest.mark.parametrize(
    "part", ["model.language_model.layers.1.mlp.up_proj.weight", "model.vision_tower.encoder.layer.0.mlp.fc1.weight"]
)
@pytest.mark.parametrize("how", ["add_", "data", "replaced", "load_state_dict", "optimizer"])
def test_a_weight_that_is_changed_in_place(model, small, pictures, part, how):
    own = copy.deepcopy(model)
    first = ask(own, small, pictures[2], QUESTION)
    weight = own.get_parameter(part)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    if how == "add_":
        with torch.no_grad():
            weight.add_(change)
    elif how == "data":
        weight.data = weight.data + change
    elif how == "replaced":
        owner, name = part.rsplit(".", 1)
        setattr(own.get_submodule(owner), name, torch.nn.Parameter(weight.detach() + change))
    elif how == "load_state_dict":
        own.load_state_dict({part: weight.detach() + change}, strict=False)
    else:
        weight.grad = change
        torch.optim.SGD([weight], lr=1.0).step()
    second = ask(own, small, pictures[2], "And?", first.history)
    assert second.history.memory is not first.history.memory


def test_a_model_that_is_rounded_between_turns(model, small, pictures):
    """To bfloat16 and back: the parameters are the same objects of the same type, their values are not."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1.01)
    first = ask(own, small, pictures[0], QUESTION, images_kwargs=TILES)
    own.to(torch.bfloat16).to(torch.float32)
    ask(own, small, pictures[0], "And?", first.history, images_kwargs=TILES)


def test_a_model_of_another_type(model, small, pictures):
    own = copy.deepcopy(model)
    first = ask(own, small, pictures[2], QUESTION)
    own.to(torch.float64)
    second = ask(own, small, pictures[2], "And?", first.history)
    own.to(torch.float32)
    ask(own, small, pictures[2], "Why?", second.history)


@pytest.mark.parametrize(("name", "value"), [("vision_feature_layer", 0), ("pixel_shuffle_version", "v1")])
def test_a_value_of_the_configuration_that_is_changed(model, small, pictures, name, value):
    own = copy.deepcopy(model)
    assert getattr(own.config, name) != value
    first = ask(own, small, pictures[2], QUESTION)
    setattr(own.config, name, value)
    second = ask(own, small, pictures[2], "And?", first.history)
    assert second.history.memory is not first.history.memory


def test_a_nested_value_of_the_configuration_that_is_changed(model, small, pictures):
    own = copy.deepcopy(model)
    first = ask(own, small, pictures[2], QUESTION)
    own.config.text_config.rms_norm_eps *= 2
    assert not first.history.memory.belongs_to(own)


@pytest.mark.parametrize("how", ["mul_", "replaced"])
def test_a_buffer_that_is_changed(model, small, pictures, how):
    own = copy.deepcopy(model)
    first = ask(own, small, pictures[2], QUESTION)
    rotary = own.model.language_model.rotary_emb
    if how == "mul_":
        rotary.inv_freq.mul_(0.5)
    else:
        rotary.inv_freq = rotary.inv_freq * 0.5
    second = ask(own, small, pictures[2], "And?", first.history)
    assert second.history.memory is not first.history.memory


def test_an_adapter_that_is_switched(model, small, pictures):
    peft = pytest.importorskip("peft")
    own = copy.deepcopy(model)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=4, lora_alpha=32)
    adapted = peft.get_peft_model(own, config).eval()  # in place
    first = ask(own, small, pictures[2], QUESTION)
    with adapted.disable_adapter():
        second = ask(own, small, pictures[2], "And?", first.history)
    ask(own, small, pictures[2], "Why?", second.history)


def test_a_history_of_another_model(model, small, pictures):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(0.7)
    first = ask(model, small, pictures[0], QUESTION, **SCM)
    second = ask(other, small, pictures[0], "And?", first.history, **SCM)
    ask(model, small, pictures[0], "Why?", second.history, **SCM)
    assert not second.history.memory.belongs_to(model)


def test_inference_mode_of_the_caller(model, small, pictures):
    with torch.inference_mode():
        first = ask(model, small, pictures[0], QUESTION, **SCM)
    second = ask(model, small, pictures[0], "And?", first.history, **SCM)
    with torch.inference_mode():
        third = ask(model, small, pictures[:2], "So <image>?", second.history, **SCM)
    ask(model, small, pictures[:2], "Why?", third.history, **SCM)


# --- generations that fail -------------------------------------------------------------------------------------------


class FailingProcessor(LogitsProcessor):
    def __init__(self, after: int):
        self.left = after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("stopped here")
        return scores


class FailingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("stopped here")


@pytest.mark.parametrize("settings", ["plain", "scm"])
@pytest.mark.parametrize(
    "failing",
    [
        lambda: {"logits_processor": LogitsProcessorList([FailingProcessor(0)])},
        lambda: {"logits_processor": LogitsProcessorList([FailingProcessor(2)])},
        lambda: {"stopping_criteria": StoppingCriteriaList([FailingCriterion()])},
    ],
    ids=["at once", "later", "criterion"],
)
def test_a_generation_that_fails_leaves_nothing_stale(model, small, pictures, failing, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    for images, question in ((pictures[0], "And?"), (pictures[:2], "And <image>?")):
        with pytest.raises(RuntimeError, match="stopped here"):
            model.chat(
                small,
                images,
                question,
                history=first.history,
                return_history=True,
                **CHAT,
                **options,
                **failing(),
            )
        assert len(first.history) == 1
        second = ask(model, small, pictures[0], "Why?", first.history, **options)
        ask(model, small, pictures[0], "So?", second.history, **options)


@pytest.mark.parametrize(
    ("images", "question", "options"),
    [
        ([0, 1], "And?", {"tile_budget": 1}),
        ([0, 1, 2], "<image> and?", {}),
        ([], "And?", {}),
        ([0], "<image>?", {}),
        ([0], "", {}),
        ([0], "And?", {"max_prompt_tokens": 20}),
        ([0], "And?", {"scm_keep_ratio": 2.0, "use_scm": True}),
        ([0], "And?", {"scm_keep_ratio": 0.3}),
        ([0], "And?", {"prompt_lookup_num_tokens": 3}),
        ([0], "And?", {"images_kwargs": {"preset": "none"}}),
    ],
)
def test_a_call_that_is_refused_leaves_the_memory_as_it_is(model, small, pictures, images, question, options):
    first = ask(model, small, pictures[0], QUESTION)
    before = list(first.history)
    with pytest.raises((ValueError, TypeError)):
        model.chat(small, [pictures[i] for i in images], question, history=first.history, **{**CHAT, **options})
    assert first.history == before
    work = work_of(model, small, pictures[0], "Why?", first.history)
    assert work.tiles == 0
    assert work.read[0] <= new_tokens(small, "Why?") + 3


# --- answers whose text is not what was generated --------------------------------------------------------------------


ANSWERS = {
    "empty": lambda tokenizer: [375],
    "cut": lambda tokenizer: spelled(tokenizer, "Tot"),
    "one token": lambda tokenizer: spelled(tokenizer, "T"),
    "other tokens": lambda tokenizer: [*spelled(tokenizer, "the receipt total is"), 375],
    "white space around": lambda tokenizer: [*spelled(tokenizer, " \n a b \n "), 375],
    "special tokens": lambda tokenizer: [*spelled(tokenizer, "a"), 376, 379, 379, *spelled(tokenizer, "b"), 375],
    "image tokens first": lambda tokenizer: [379, 379, 375],
    "spelled end": lambda tokenizer: [*spelled(tokenizer, "no <|im_end|> yes"), 375],
    "many bytes": lambda tokenizer: [*tokenizer("日本 é", add_special_tokens=False)["input_ids"], 375],
    "half a letter": lambda tokenizer: tokenizer("日", add_special_tokens=False)["input_ids"][:2],
}


@pytest.mark.parametrize("said", ANSWERS)
@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_answers_that_are_read_again_in_other_tokens(model, small, pictures, said, settings):
    ids, options = ANSWERS[said](small.tokenizer), SETTINGS[settings]
    chat = {"return_dict": True, "do_sample": False, **options}
    first = model.chat(small, pictures[2], QUESTION, **chat, **forced(ids))
    assert first.token_ids == ids
    second = ask(model, small, pictures[2], "And?", first.history, **options)
    ask(model, small, pictures[2:1:-1], "Why?", second.history, **options)
