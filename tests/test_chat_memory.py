"""What a `chat` history remembers: later turns cost only what is new, and answer as if all were computed anew."""

import copy
import gc
import json
import pickle
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, synthetic_picture
from model_helpers import TINY_TEXT, TINY_VISION
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

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
SHORT = {"system_message": ""}


@pytest.fixture(scope="module")
def small(processor):
    """Nano's processor with tiles of four tokens."""
    small = copy.deepcopy(processor)
    small.image_processor.size = {"height": 28, "width": 28}
    return small


@pytest.fixture(scope="module")
def model():
    """A random language model that says letters."""
    return tiny(model_type="llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def pictures():
    return [synthetic_picture(300, 200, 1), synthetic_picture(150, 320, 2), synthetic_picture(90, 80, 3)]


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
        if kwargs.get("use_cache") is not False or kwargs.get("past_key_values") is not None:  # not SCM's probe
            work.read.append(kwargs["inputs_embeds"].shape[1])
        else:
            work.scored += 1

    def see_tiles(_, args, kwargs):
        work.tiles += len(args[0] if args else kwargs["pixel_values"])

    hooks = [
        model.model.language_model.register_forward_pre_hook(see_text, with_kwargs=True),
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


# --- the cost of a later turn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_later_turn_reads_only_what_is_new(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = work_of(model, small, pictures[0], QUESTION, **options)
    second = work_of(model, small, pictures[0], "And below?", first.answer.history, **options)
    third = work_of(model, small, pictures[0], "Why?", second.answer.history, **options)
    tiles = tile_numbers(small, pictures[0], **options.get("images_kwargs", {}))
    assert [first.tiles, second.tiles, third.tiles] == [*tiles, 0, 0]
    assert [first.scored, second.scored, third.scored] == [int("scm" in settings), 0, 0]
    for work, before, question in ((second, first, "And below?"), (third, second, "Why?")):
        ended = before.answer.token_ids[-1] == 375
        assert work.read[0] <= new_tokens(small, question) + (0 if ended else 1) + 2
        assert work.read[1:] == [1] * (len(work.answer.token_ids) - 1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_new_pictures_in_later_turns(model, small, pictures, settings):
    options = SETTINGS[settings]
    history, tiles = None, []
    for count in (1, 2, 3):
        work = work_of(model, small, pictures[:count], "Read.", history, **options)
        history = work.answer.history
        tiles.append(work.tiles)
    assert tiles == tile_numbers(small, pictures, **options.get("images_kwargs", {}))
    last = work_of(model, small, pictures, "And?", history, **options)
    assert last.tiles == 0
    assert last.read[0] < 40


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_first_turn_without_a_picture(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = work_of(model, small, None, "Hello", **options)
    second = work_of(model, small, pictures[1], "<image>\nAnd this?", first.answer.history, **options)
    third = work_of(model, small, pictures[1:], "Or <image> this?", second.answer.history, **options)
    fourth = work_of(model, small, pictures[1:], "Which?", third.answer.history, **options)
    assert first.tiles == fourth.tiles == 0
    assert min(second.tiles, third.tiles) > 0
    assert fourth.read[0] < 40


@pytest.mark.parametrize("use_scm", [False, True])
def test_text_alone(model, small, use_scm):
    first = work_of(model, small, None, "Hello", use_scm=use_scm)
    second = work_of(model, small, None, "Well?", first.answer.history, use_scm=use_scm)
    assert second.read[0] <= new_tokens(small, "Well?") + 3


def test_several_pictures_in_one_turn_and_the_same_picture_again(model, small, pictures):
    first = work_of(model, small, [pictures[0], pictures[0], pictures[1]], "Compare.", **SCM)
    second = work_of(
        model,
        small,
        [pictures[0], pictures[0], pictures[1], pictures[0]],
        "Again <image>?",
        first.answer.history,
        **SCM,
    )
    assert first.tiles == sum(tile_numbers(small, pictures[:2], **TILES))
    assert second.tiles == 0


@pytest.mark.parametrize("order", ["mini_monkey", "internvl", "keyword"])
@pytest.mark.parametrize("use_scm", [False, True])
@pytest.mark.parametrize("tile_order", ["detailed_first", "adaptive_first"])
def test_tiles_in_the_published_orders(model, small, pictures, order, use_scm, tile_order):
    cut = [small.image_processor(picture, return_tensors="pt", **TILES) for picture in pictures[:2]]
    grids = [tuple(one["tile_grids"][0, :2].tolist()) for one in cut]
    config, tokenizer = dict(CHAT), small.tokenizer

    def chat(count, question, history, **options):
        tiles = torch.cat([one["pixel_values"] for one in cut[:count]])
        options |= {"num_patches_list": [len(one["pixel_values"]) for one in cut[:count]], "history": history}
        options |= {"use_scm": use_scm, "tile_order": tile_order, "return_dict": True}
        if order == "mini_monkey":
            use = options.pop("use_scm")
            return model.chat(tokenizer, tiles, grids[:count], question, config, use, **options)
        if order == "internvl":
            return model.chat(tokenizer, tiles, question, config, target_aspect_ratio=grids[:count], **options)
        options |= {"pixel_values": tiles, "target_aspect_ratio": torch.tensor(grids[:count])}
        return model.chat(tokenizer=tokenizer, question=question, generation_config=config, **options)

    history = None
    for count, question in ((1, "Read."), (1, "And?"), (2, "This: <image>"), (2, "Why?")):
        with watch(model) as work:
            answer = chat(count, question, history)
        expected = chat(count, question, None if history is None else list(history), remember=False)
        assert_equal(answer, expected)
        history = answer.history
        if question in ("And?", "Why?"):
            assert work.tiles == 0
            assert work.read[0] < 40
    assert remembers(history)


def test_return_history_by_position(model, small, pictures):
    cut = small.image_processor(pictures[0], return_tensors="pt", **TILES)
    tiles, grid, config = cut["pixel_values"], cut["tile_grids"][0, :2], dict(CHAT)
    answer, history = model.chat(small.tokenizer, tiles, grid, QUESTION, config, True, None, True)
    with watch(model) as work:
        again, longer = model.chat(small.tokenizer, tiles, grid, "And?", config, True, history, True)
    assert (work.tiles, len(longer)) == (0, 2)
    expected = model.chat(small.tokenizer, tiles, grid, "And?", config, True, list(history), remember=False)
    assert again == expected
    answer, history = model.chat(small.tokenizer, tiles, QUESTION, config, None, True)
    with watch(model) as work:
        again, longer = model.chat(small.tokenizer, tiles, "And?", config, history, True)
    assert (work.tiles, len(longer)) == (0, 2)
    assert again == model.chat(small.tokenizer, tiles, "And?", config, list(history), remember=False)


# --- never stale -----------------------------------------------------------------------------------------------------


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


# --- branches, several conversations, memory -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_branches_of_one_history(model, small, pictures, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    before = list(first.history)
    left = work_of(model, small, pictures[0], "And left of it?", first.history, **options)
    right = work_of(model, small, pictures[0], "And right?", first.history, **options)
    assert right.tiles == 0
    assert right.read[0] <= new_tokens(small, "And right?") + 3
    assert first.history == before
    again = work_of(model, small, pictures[0], "Why?", left.answer.history, **options)
    ask(model, small, pictures[:2], "Then <image>?", right.answer.history, **options)
    assert again.tiles == 0


def test_a_question_asked_twice(model, small, pictures):
    """The whole prompt is in the cache; its last token is computed all the same."""
    first = ask(model, small, pictures[0], QUESTION, **SCM)
    second = work_of(model, small, pictures[0], "And?", first.history, **SCM)
    again = work_of(model, small, pictures[0], "And?", first.history, **SCM)
    assert again.read[0] == 1
    assert again.answer.token_ids == second.answer.token_ids


@pytest.fixture
def own_limit(model):
    yield model
    model.__dict__.pop("remembered_conversations", None)


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_conversations_by_turns(own_limit, small, pictures, limit):
    model = own_limit
    model.remembered_conversations = limit
    histories = [ask(model, small, picture, QUESTION).history for picture in pictures[:3]]
    for question in ("And?", "Why?"):
        for number, picture in enumerate(pictures[:3]):
            work = work_of(model, small, picture, question, histories[number])
            histories[number] = work.answer.history
            assert (work.tiles == 0) == (limit == 3)


@pytest.fixture
def few_objects():
    """Everything that exists so far is left out when garbage is collected and counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def caches() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "DynamicCache" for thing in gc.get_objects())


def test_how_many_conversations_are_kept(own_limit, small, pictures, few_objects):
    model, before = own_limit, caches()
    model.remembered_conversations = 2
    histories = [model.chat(small, None, f"Hello {i}", return_history=True, **CHAT)[1] for i in range(4)]
    assert caches() == before + 2
    model.chat(small, None, "And?", history=histories[0], return_history=True, **CHAT)
    assert caches() == before + 2
    model.remembered_conversations = 1
    histories.append(model.chat(small, None, "New", return_history=True, **CHAT)[1])
    assert caches() == before + 1
    model.remembered_conversations = 0
    histories.append(model.chat(small, None, "Newer", return_history=True, **CHAT)[1])
    assert histories[-1].memory is None
    assert caches() == before


def test_forget_and_garbage(model, small, pictures, few_objects):
    before = caches()
    history = model.chat(small, pictures[0], QUESTION, return_history=True, **CHAT, **SCM)[1]
    assert caches() == before + 1
    history.forget()
    assert caches() == before
    work = work_of(model, small, pictures[0], "And?", history, **SCM)
    assert work.tiles > 0
    history = work.answer.history
    assert caches() == before + 1
    features = [weakref.ref(tensor) for tensor in history.memory.features.values()]
    assert all(ref() is not None for ref in features)
    del history, work
    assert caches() == before
    assert all(ref() is None for ref in features)


def test_nothing_is_kept_without_a_history(model, small, pictures, few_objects):
    before = caches()
    model.chat(small, pictures[2], QUESTION, **CHAT)
    model.chat(small, pictures[2], QUESTION, return_dict=True, **CHAT)
    kept = model.chat(small, pictures[2], QUESTION, return_dict=True, remember=False, **CHAT)
    assert kept.history.memory is None
    kept.history.forget()
    assert caches() == before


def test_a_history_does_not_keep_its_model(model, small):
    own = copy.deepcopy(model)
    history, ref = own.chat(small, None, "Hello", return_history=True, **CHAT)[1], weakref.ref(own)
    del own
    gc.collect()
    assert ref() is None
    history.forget()
    assert model.chat(small, None, "And?", history=history, **CHAT)


def test_copies_are_plain_lists(model, small, pictures):
    history = model.chat(small, pictures[2], QUESTION, return_history=True, **CHAT)[1]
    assert remembers(history)
    plain = [tuple(turn) for turn in history]
    others = [copy.copy(history), copy.deepcopy(history), pickle.loads(pickle.dumps(history)), history[:], [*history]]
    others += [list(history), history + [], history.copy()]
    for other in others:
        assert type(other) is list
        assert other == plain
    assert json.loads(json.dumps(history)) == [list(turn) for turn in plain]
    answer = model.chat(small, pictures[2], QUESTION, return_dict=True, **CHAT)
    restored = pickle.loads(pickle.dumps(answer))
    assert type(restored.history) is list
    assert (restored.text, restored.confidence) == (answer.text, answer.confidence)
    work = work_of(model, small, pictures[2], "And?", copy.copy(history))
    assert work.tiles == 1


def test_a_model_with_memories_can_be_copied(model, small, pictures):
    own = copy.deepcopy(model)
    own.chat(small, pictures[2], QUESTION, remember=False, **CHAT)
    before = set(vars(own))
    history = own.chat(small, pictures[2], QUESTION, return_history=True, **CHAT)[1]
    assert set(vars(own)) == before
    other = copy.deepcopy(own)
    with watch(other) as work:
        answer = other.chat(small, pictures[2], "And?", history=history, **CHAT)
    assert work.tiles == 1
    assert answer == own.chat(small, pictures[2], "And?", history=history, **CHAT)


def test_turns_of_one_history_at_the_same_time(model, small, pictures):
    first = ask(model, small, pictures[0], QUESTION, **SCM)
    questions, answers = ["And left?", "Why?", "And right of it?", "So?"], {}

    def turn(question):
        options = {**CHAT, **SCM, "return_dict": True}
        answers[question] = model.chat(small, pictures[0], question, history=first.history, **options)

    threads = [threading.Thread(target=turn, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in questions:
        options = {**CHAT, **SCM, "return_dict": True, "remember": False}
        expected = model.chat(small, pictures[0], question, history=list(first.history), **options)
        assert_equal(answers[question], expected)
        ask(model, small, pictures[0], "Then?", answers[question].history, **SCM)


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


# --- other ways to generate ------------------------------------------------------------------------------------------


MODES = {
    "beams": {"num_beams": 3},
    "returned sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "beams and sequences": {"num_beams": 2, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "stop strings": {"stop_strings": ["e", "zz"]},
    "least length": {"min_new_tokens": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_other_decoding_in_a_middle_turn(model, small, pictures, mode, settings):
    options = SETTINGS[settings]
    first = ask(model, small, pictures[0], QUESTION, **options)
    second = ask(model, small, pictures[0], "And?", first.history, **options, **MODES[mode])
    third = ask(model, small, pictures[0], "Why?", second.history, **options)
    assert third.history.memory is not None
    work = work_of(model, small, pictures[0], "So?", third.history, **options)
    assert work.read[0] < 40
    start = ask(model, small, pictures[0], QUESTION, **options, **MODES[mode])
    ask(model, small, pictures[0], "Well?", start.history, **options, **MODES[mode])


def test_other_decoding_of_text_alone(model, small):
    history = None
    for mode in ({}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {}):
        options = {**CHAT, **mode}
        expected = model.chat(small, None, "Hello", history=history and list(history), remember=False, **options)
        answer, longer = model.chat(small, None, "Hello", history=history, return_history=True, **options)
        assert answer == expected
        history = longer


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_sampling_with_a_seed(model, small, pictures, settings):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 40, **SETTINGS[settings]}
    history = ask(model, small, pictures[0], QUESTION, **SETTINGS[settings]).history
    answers = []
    for given, remember in ((history, True), (list(history), False)):
        torch.manual_seed(3)
        answers.append(
            model.chat(
                small,
                pictures[0],
                "And?",
                history=given,
                remember=remember,
                return_dict=True,
                max_new_tokens=12,
                **options,
            )
        )
    assert_equal(*answers)


@pytest.mark.parametrize("settings", ["plain", "scm"])
def test_limits_of_the_whole_length(model, small, pictures, settings):
    options = {"max_new_tokens": None, **SETTINGS[settings]}
    first = ask(model, small, pictures[2], QUESTION, **{**options, "max_new_tokens": 5})
    ids = {}
    for name in ("max_length", "min_length"):
        prompt_length = len(model_prompt(model, small, pictures[2], "Why?", first.history, options))
        limit = {"max_length": prompt_length + 4}
        if name == "min_length":
            limit = {"max_length": prompt_length + 9, "min_length": prompt_length + 7}
        ids[name] = ask(model, small, pictures[2], "Why?", first.history, **options, **limit).token_ids
    assert len(ids["max_length"]) <= 4
    assert 7 <= len(ids["min_length"]) <= 9


def model_prompt(model, processor, images, question, history, options) -> list[int]:
    """The ids of a prompt, as the streamer sees them."""

    class Seen(Exception):  # noqa: N818
        pass

    class Streamer:
        def put(self, value):
            raise Seen(value)

        def end(self):
            pass

    with pytest.raises(Seen) as caught:
        model.chat(
            processor,
            images,
            question,
            history=list(history),
            remember=False,
            streamer=Streamer(),
            **{**CHAT, **options, "max_new_tokens": 1},
        )
    return caught.value.args[0][0].tolist()


def test_configurations_of_generation(model, small, pictures):
    history = None
    for question in (QUESTION, "And?", "Why?"):
        config = {"max_new_tokens": 4, "do_sample": False}
        answer = model.chat(small, pictures[2], question, history=history, generation_config=config, return_dict=True)
        plain = None if history is None else list(history)
        expected = model.chat(
            small, pictures[2], question, plain, generation_config=config, return_dict=True, remember=False
        )
        assert_equal(answer, expected)
        history = answer.history
        assert config == {"max_new_tokens": 4, "do_sample": False}


# --- answers whose text is not what was generated --------------------------------------------------------------------


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


# --- language models -------------------------------------------------------------------------------------------------


TINY_TILES = {"images_kwargs": TILES, **SHORT}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "phi3": {"model_type": "phi3"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mono": {"model_type": "llama", "visual_experts": True},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "yarn": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 16},
    "mistral_wide": {"model_type": "mistral", "head_dim": 16, "sliding_window": 200},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_scm", [False, True])
def test_families_of_language_models(small, pictures, family, use_scm):
    model, options = tiny(**FAMILIES[family]), {**TINY_TILES, "use_scm": use_scm, "max_new_tokens": 6}
    first = ask(model, small, pictures[0], QUESTION, **options)
    second = work_of(model, small, pictures[0], "And?", first.history, **options)
    third = ask(model, small, pictures[:2], "Or <image>?", second.answer.history, **options)
    fourth = work_of(model, small, pictures[:2], "Why?", third.history, **options)
    assert second.tiles == fourth.tiles == 0
    has_small_windows = FAMILIES[family].get("sliding_window") == 16
    assert (fourth.read[0] < 50) == (not has_small_windows)


def test_a_window_that_fills_up_in_the_course_of_a_conversation(small):
    model = tiny(model_type="mistral", head_dim=16, sliding_window=96)
    history, read = None, []
    for question in ("Hi", "And?", "Why?", "So?", "Hm?", "Well then?"):
        work = work_of(model, small, None, question, history, **SHORT)
        history = work.answer.history
        read.append(work.read[0])
    assert max(read[1:3]) < 50
    assert min(read[4:]) > 96


DYNAMIC = {
    "model_type": "llama",
    "max_position_embeddings": 100,
    "rope_parameters": {"rope_type": "dynamic", "factor": 9.0, "rope_theta": 1e4},
}
LONG = {
    "model_type": "phi3",
    "max_position_embeddings": 1000,
    "original_max_position_embeddings": 100,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 100,
    },
}


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
@pytest.mark.parametrize("new", [4, 40])
@pytest.mark.parametrize("with_picture", [False, True])
def test_ropes_that_change_with_the_length(small, pictures, rope, new, with_picture):
    """Dynamic ropes remember the longest sequence, so that what is computed anew has a model of its own."""
    remembering, history, read, lengths = tiny(**rope), None, [], []
    images = pictures[2] if with_picture else None
    options = {**SHORT, "max_new_tokens": new}
    for question in ("Hi", "And?", "Why?", "So?", "Hm?"):
        fresh = tiny(**rope)
        plain = None if history is None else list(history)
        chat = {**CHAT, **options, "return_dict": True}
        expected = fresh.chat(small, images, question, history=plain, remember=False, **chat)
        with watch(remembering) as work:
            answer = remembering.chat(small, images, question, history=history, **chat)
        assert_equal(answer, expected)
        history = answer.history
        read.append(work.read[0])
        lengths.append(len(model_prompt(fresh, small, images, question, history[:-1], options)))
    assert lengths[-1] > 100
    for one, length in zip(read[1:], lengths[1:]):
        assert one == length if length > 100 else one < length
    short = [length for length in lengths[1:] if length <= 100]
    assert short or new == 40


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["tiles", "scm"])
def test_bfloat16(nano, processor, pictures, settings):
    own, options = copy.deepcopy(nano).to(torch.bfloat16), {**CHAT, **SETTINGS[settings], "return_dict": True}
    first = own.chat(processor, pictures[0], QUESTION, **options)
    second = own.chat(processor, pictures[:2], "And <image>?", history=first.history, **options)
    expected = own.chat(processor, pictures[:2], "And <image>?", list(first.history), remember=False, **options)
    assert second.token_ids[0] == expected.token_ids[0]
    assert abs(second.log_probabilities[0] - expected.log_probabilities[0]) < 0.5


def test_the_example_picture(nano, processor):
    """What a user does first."""
    path = str(ROOT / "assets" / "example.png")
    first = work_of(nano, processor, path, QUESTION, max_new_tokens=60)
    second = work_of(nano, processor, path, "What is the last word?", first.answer.history, max_new_tokens=20)
    assert first.answer.text
    assert second.tiles == 0
    assert second.read[0] == new_tokens(processor, "What is the last word?")


def test_a_forgotten_conversation_takes_no_place(model, processor):
    model.remembered_conversations = 2
    try:
        histories = [model.chat(processor, None, text, return_history=True, max_new_tokens=2)[1] for text in "ab"]
        histories[1].forget()
        histories.append(model.chat(processor, None, "c", return_history=True, max_new_tokens=2)[1])
        assert [bool(history.memory.nbytes()) for history in histories] == [True, False, True]
    finally:
        del model.remembered_conversations
