"""MiniCPM-V's slices: images in views of their own size, from the image processor to an answer and to training."""

import numpy as np
import pytest
import torch
from conftest import load_image_processor, synthetic_picture
from image_helpers import square
from model_helpers import tiny_model
from PIL import Image

from minimonkey.conversation import SlicedImage, expand_placeholders
from minimonkey.image_inputs import ImageInputs
from minimonkey.scripts.evaluation.runner import Answering
from minimonkey.scripts.evaluation.ways import tilings
from minimonkey.tiling import choose_grids, slice_sizes


# (width, height): overview, grid, and the size that the slices are cut from; of the published code at 448 px, patch 14.
PUBLISHED = {
    (448, 448): ((448, 448), (1, 1), (0, 0)),
    (449, 449): ((448, 448), (1, 2), (630, 644)),
    (640, 480): ((518, 392), (2, 1), (728, 546)),
    (1000, 1000): ((448, 448), (2, 2), (896, 896)),
    (1344, 1344): ((448, 448), (3, 3), (1344, 1344)),
    (1920, 1080): ((602, 336), (4, 2), (1680, 952)),
    (1080, 1920): ((336, 602), (2, 4), (952, 1680)),
    (2000, 200): ((1414, 140), (3, 1), (2436, 252)),
    (300, 100): ((770, 252), (1, 1), (0, 0)),
    (4000, 3000): ((518, 392), (3, 3), (1554, 1176)),
}
RANGES = (1, 9, 1, 1)
SLICES = {"preset": "minicpm_v", "tiling": "slices"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones(size):
    overview, grid, refined = PUBLISHED[size]
    assert choose_grids(*size, RANGES, 448, "slices")[0] == grid
    sizes = slice_sizes(*size, grid)
    assert sizes[0] == overview and (sizes[1][0] * grid[0], sizes[1][1] * grid[1]) == refined


def test_slices_have_about_the_area_of_a_tile_and_whole_patches():
    for width, height in np.random.RandomState(0).randint(100, 4000, (2000, 2)).tolist():
        grid, _ = choose_grids(width, height, RANGES, 448, "slices")
        _, (across, down) = slice_sizes(width, height, grid)
        assert grid == (1, 1) or (not across % 14 and not down % 14 and 0.93 < across * down / 448**2 < 1.05)


@pytest.mark.parametrize("size", [(61, 59), (300, 40), (90, 200)])
def test_what_is_cut_is_the_image_resized(either, size):
    image = synthetic_picture(*size, 1)
    options = {**SLICES, "size": square(28), "slice_multiple": 7, "do_rescale": False, "do_normalize": False}
    inputs = either(image, return_tensors="pt", **options)
    assert "pixel_values" not in inputs
    (columns, rows), _ = choose_grids(*size, RANGES, 28, "slices")
    overview, part = slice_sizes(*size, (columns, rows), 28, 7)
    views = ImageInputs(**inputs).views()
    assert len(views) == columns * rows + 1 == either.get_number_of_image_patches(size[1], size[0], options)
    assert either.slice_sizes(size[1], size[0], options) == [*overview, *part] == inputs["slice_sizes"][0].tolist()
    assert torch.equal(views[0], torch.from_numpy(np.array(image.resize(overview, 3))).permute(2, 0, 1))
    whole = torch.from_numpy(np.array(image.resize((part[0] * columns, part[1] * rows), 3))).permute(2, 0, 1)
    for number, view in enumerate(views[1:]):
        y, x = number // columns * part[1], number % columns * part[0]
        assert torch.equal(view, whole[:, y : y + part[1], x : x + part[0]])


def test_pixels_are_normalised_as_those_of_tiles(either):
    image = Image.new("RGB", (28, 28), (10, 100, 200))
    options = {"size": square(28), "min_tiles": 1, "max_tiles": 1, "return_tensors": "pt"}
    tile = either(image, tiling="internvl", **options)["pixel_values"]
    slices = either(image, tiling="slices", slice_multiple=7, **options)["slice_values"]
    assert torch.equal(slices, tile[0].flatten(1).T)


def test_the_schema_is_the_published_one():
    sliced = SlicedImage(columns=2, rows=2, overview_tokens=2, slice_tokens=2)
    view = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    (text,) = expand_placeholders(["<image>\nRead."], [sliced], tokens_per_tile=7)
    assert text == f"{view}<slice>{view}{view}\n{view}{view}</slice>\nRead." and sliced.tokens == 2 * (1 + 4)
    assert expand_placeholders(["<image>"], [SlicedImage(1, 1, 2, 0)], 7) == [view]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_thumbnail": False}, "use_thumbnail"),
        ({"drop_blank": True}, "drop_blank"),
        ({"slice_multiple": 0}, "slice_multiple"),
    ],
)
def test_options_that_do_not_go_with_slices_are_refused_before_an_image_is_opened(either, options, said):
    with pytest.raises(ValueError, match=said):
        either("no such file.png", **SLICES, **options)


def test_an_image_processor_alone_must_be_told_the_multiple():
    with pytest.raises(ValueError, match="28 for the published models"):
        type(load_image_processor("pil"))()(Image.new("RGB", (20, 20)), **SLICES)


# --- the model -------------------------------------------------------------------------------------------------------


def inputs_of(processor, *images, question="Read."):
    texts = [f"<image>\n{question}" for _ in images]
    return processor([[image] for image in images], texts, images_kwargs=SLICES)


def test_slices_of_a_tile_are_seen_as_a_tile():
    """The vision tower's positions are interpolated, but not where the size is its own."""
    model = tiny_model()
    views = torch.randn(3, 3, 28, 28)
    pixels = views.permute(0, 2, 3, 1).reshape(-1, 3)
    known = {"tile_counts": torch.tensor([[2, 0, 1]]), "tile_grids": torch.tensor([[2, 1, 1, 1]])}
    images = ImageInputs(None, **known, slice_values=pixels, slice_sizes=torch.tensor([[28, 28, 28, 28]]))
    with torch.no_grad():
        assert torch.equal(model.image_features(images), model.encode_tiles(views).flatten(0, 1))


def test_features_of_an_oblong_view_lie_row_by_row():
    """A patch that changes reaches its own token alone where the vision tower has no layers."""
    model = tiny_model()
    model.model.vision_tower.encoder.layer = torch.nn.ModuleList()
    before = torch.zeros(1, 3, 28, 42)
    after = before.clone()
    after[:, :, 14:21, 28:35] = 1  # the patch in row 2, column 4: token row 1, column 2
    with torch.no_grad():
        features = [model.model.project(model.model.patch_features(pixels))[0] for pixels in (before, after)]
    changed = (features[0] != features[1]).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1 * 3 + 2] and features[0].shape == (2 * 3, 32)


def test_a_batch_is_read_as_its_rows_alone(nano, processor, pictures):
    whole = inputs_of(processor, *pictures[:2])
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = nano.generate(**whole, **options)[:, whole["input_ids"].shape[1] :]
    for row, image in enumerate(pictures[:2]):
        one = inputs_of(processor, image)
        alone = nano.generate(**one, **options)[:, one["input_ids"].shape[1] :]
        assert processor.decode(alone[0], True) == processor.decode(answers[row], True)
        logits = nano(**one).logits
        masked = nano(**whole).logits[row, whole["attention_mask"][row].bool()]
        assert torch.allclose(logits[0], masked, atol=1e-4)


def test_chat_asks_what_generate_asks_and_remembers(nano, processor, pictures, monkeypatch):
    options = {"images_kwargs": SLICES, "max_new_tokens": 5, "do_sample": False, "return_history": True}
    first, history = nano.chat(processor, pictures[0], "Read.", **options)
    assert history.memory.features
    monkeypatch.setattr(nano, "_encode_slices", lambda views: pytest.fail("the image is known"))
    second, _ = nano.chat(processor, pictures[0], "And?", history, **options)
    monkeypatch.undo()
    again, _ = nano.chat(processor, pictures[0], "And?", list(history), **options)
    assert second == again
    messages = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Read."}]}
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images_kwargs": SLICES},
    )
    new = nano.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(new, True).strip() == first


def test_frames_of_a_video_are_slices_too(nano, processor, pictures):
    frames = [np.asarray(pictures[0])] * 2
    answer = nano.chat(processor, None, "Read.", videos=[np.stack(frames)], images_kwargs=SLICES, max_new_tokens=2)
    assert isinstance(answer, str)


def test_bytes_are_normalised_by_the_model(nano, processor, pictures):
    plain = inputs_of(processor, pictures[0])
    as_bytes = {**SLICES, "do_rescale": False, "do_normalize": False}
    raw = processor(pictures[0], "<image>\nRead.", images_kwargs=as_bytes)
    assert raw["slice_values"].dtype == torch.uint8
    assert torch.allclose(nano(**plain).logits, nano(**raw).logits, atol=1e-3)


def test_compression_and_engines_are_refused_with_a_reason(nano, processor, pictures):
    inputs = inputs_of(processor, pictures[0])
    for call in (nano.generate, nano.kept_positions):
        options = {"use_scm": True} if call == nano.generate else {}
        with pytest.raises(ValueError, match="slices of their own size"):
            call(**inputs, **options)
    with pytest.raises(ValueError, match="slices of their own size"):
        nano.chat(processor, pictures[0], "Read.", images_kwargs=SLICES, use_scm=True)
    with pytest.raises(ValueError, match="engines cannot count"):
        processor._get_num_multimodal_tokens([(200, 300)], **SLICES)
    with pytest.raises(ValueError, match="token_budget counts square tiles"):
        nano.chat(processor, pictures[0], "Read.", images_kwargs=SLICES, token_budget=500)


def test_tensors_that_do_not_fit_are_refused(nano, processor, pictures):
    inputs = dict(inputs_of(processor, pictures[0]))
    with pytest.raises(ValueError, match="not both"):
        nano(**inputs, pixel_values=torch.zeros(1, 3, 112, 112))
    with pytest.raises(ValueError, match="need slice_sizes"):
        nano(**{name: value for name, value in inputs.items() if name != "slice_sizes"})
    with pytest.raises(ValueError, match="pixels, but views of"):
        nano(**{**inputs, "slice_values": inputs["slice_values"][:-5]})
    with pytest.raises(ValueError, match="image tokens"):
        nano(**{**inputs, "input_ids": inputs["input_ids"][:, :-20].clone().fill_(5)})


def test_counts_are_known_without_pixels(processor):
    for width, height in ((300, 200), (90, 80), (40, 400)):
        layout = processor.image_layout(height, width, SLICES)
        inputs = processor(Image.new("RGB", (width, height)), "<image>", images_kwargs=SLICES)
        assert layout.tokens == int((inputs["input_ids"] == processor.image_token_id).sum())


def test_where_an_image_stands_is_told(processor, pictures):
    text = "a<image>b"
    inputs = processor(pictures[0], text, images_kwargs=SLICES, return_text_replacement_offsets=True)
    ((span,),) = inputs["text_replacement_offsets"]
    assert text[slice(*span["span"])] == "<image>" and span["replacement"].endswith("</slice>")
    assert span["new_span"] == (1, 1 + len(span["replacement"]))


def test_the_square_path_carries_nothing_more(processor, pictures):
    inputs = processor(pictures[0], "<image>\nRead.")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "tile_counts", "tile_grids"}


def test_an_ablation_counts_the_tokens_of_slices(nano, processor, pictures):
    (way,) = tilings((1, 9, 1, 1), ["slices"])
    answering = Answering(nano, processor, 4, way.images_kwargs, None, None, None)
    inputs = processor(pictures[0], "<image>", images_kwargs=way.images_kwargs)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert answering.count_tokens([pictures[0]]) == (tokens, tokens)
