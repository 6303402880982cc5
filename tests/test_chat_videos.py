"""Videos in `chat` and the processor: which frames, prompts, later turns, batches, chat templates."""

from functools import partial

import numpy as np
import pytest
import torch
from chat_helpers import (
    CHAT,
    QUESTION,
    SCM,
    TILES,
    assert_equal,
    prompt_of,
    remembers,
    shorten,
    tile_numbers,
    turn,
    watch,
)
from conftest import synthetic_picture
from PIL import Image

from minimonkey.video_frames import frame_indices


av = pytest.importorskip("av")
from clips import write_clip as write_any_clip  # noqa: E402


STEP = 20
write_clip = partial(write_any_clip, step=STEP, frames=12, rate=4)


@pytest.fixture(scope="module")
def picture():
    return synthetic_picture(90, 80, 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        str(write_clip(folder / "first.mp4")),
        str(write_clip(folder / "second.mp4", frames=5, rate=2, size=(48, 96))),
    ]


def frames_text(count: int) -> str:
    return "\n".join(f"Frame{i + 1}: [49]" for i in range(count))


def greys(processor, pixel_values) -> list[int]:
    """Which frame of a clip each tile is."""
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return [round(float(((tile * std + mean) * 255).mean()) / STEP) for tile in pixel_values.float()]


# --- videos in chat --------------------------------------------------------------------------------------------------


def test_a_video(nano, processor, clips, sent):
    _, history = nano.chat(processor, None, "What moves?", videos=clips[0], return_history=True)
    assert prompt_of(sent, processor) == turn(f"{frames_text(8)}\nWhat moves?")
    assert history == [("<video>\nWhat moves?", "")]
    assert sent["tile_counts"].tolist() == [[0, 0, 1]] * 8
    assert greys(processor, sent["pixel_values"]) == frame_indices(12, 4.0, 8)
    nano.chat(processor, None, "Before <video> and behind", videos=[clips[1]])
    assert prompt_of(sent, processor) == turn(f"Before {frames_text(5)} and behind")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_frames": 3}, [1, 5, 8]),
        ({"fps": 1}, [1, 5, 8]),
        ({"start": 1.0, "end": 1.9, "num_frames": 8}, [4, 5, 6, 7, 8]),
        ({"start": 2.0, "num_frames": 100}, [8, 9, 10, 11]),
        ({"num_frames": 2, "video_backend": "pyav"}, [2, 8]),
    ],
)
def test_which_frames(nano, processor, clips, sent, options, expected):
    nano.chat(processor, None, QUESTION, videos=clips[0], videos_kwargs=options)
    assert greys(processor, sent["pixel_values"]) == expected
    inputs = processor(text="<video>", videos=clips[0], **options)
    assert greys(processor, inputs["pixel_values"]) == expected
    inputs = processor(text="<video>", videos=[clips[0]], videos_kwargs=options)
    assert greys(processor, inputs["pixel_values"]) == expected


def test_tiles_of_frames(nano, processor, clips, sent):
    nano.chat(
        processor,
        None,
        QUESTION,
        videos=clips[1],
        images_kwargs={"preset": "docvqa"},
        videos_kwargs={"num_frames": 2, "frame_tiles": 4},
        return_history=True,
    )
    assert sent["tile_counts"][:, 1].sum() == 0
    assert (sent["tile_counts"][:, 0] > 1).all()
    assert sent["tile_counts"][:, 2].tolist() == [1, 1]
    assert f"Frame1: [{49 * int(sent['tile_counts'][0].sum())}]" in prompt_of(sent, processor)
    inputs = processor(text="<video>", videos=clips[1], num_frames=2, frame_tiles=4)
    assert torch.equal(inputs["tile_counts"], sent["tile_counts"])
    assert torch.equal(inputs["pixel_values"], sent["pixel_values"])


FRAMES = np.stack([np.full((40, 50, 3), STEP * i, np.uint8) for i in range(6)])


@pytest.mark.parametrize(
    "video",
    [
        FRAMES,
        torch.from_numpy(FRAMES),
        torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
        list(FRAMES),
        [Image.fromarray(frame) for frame in FRAMES],
        tuple(Image.fromarray(frame) for frame in FRAMES),
        [FRAMES],
        [[Image.fromarray(frame) for frame in FRAMES]],
        FRAMES[None],
    ],
    ids=["array", "tensor", "channels first", "arrays", "pil", "tuple", "in a list", "list in a list", "five"],
)
def test_frames_as_a_video(nano, processor, sent, video):
    nano.chat(processor, None, QUESTION, videos=video)
    assert greys(processor, sent["pixel_values"]) == [0, 1, 2, 3, 4, 5]
    nano.chat(processor, None, QUESTION, videos=video, videos_kwargs={"num_frames": 3})
    assert greys(processor, sent["pixel_values"]) == [0, 2, 3]
    assert len(processor(text="<video>", videos=video)["pixel_values"]) == 6


def test_a_path_object(nano, processor, clips, sent, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=3)
    for video in (path, [path], path.as_uri()):
        nano.chat(processor, None, QUESTION, videos=video)
        assert greys(processor, sent["pixel_values"]) == [0, 1, 2]


def test_pictures_and_videos_in_one_question(nano, processor, picture, clips, sent):
    options = {"videos_kwargs": {"num_frames": 2}, "return_history": True}
    _, history = nano.chat(processor, picture, "Compare.", videos=clips[0], **options)
    assert prompt_of(sent, processor) == turn(f"{frames_text(2)}\n[49]\nCompare.")
    assert history == [("<video>\n<image>\nCompare.", "")]
    question = "First <image>, then <video>, <video> and <image>."
    nano.chat(processor, [picture, picture], question, videos=clips, images_kwargs=TILES, **options)
    text, tiles = prompt_of(sent, processor), sum(tile_numbers(processor, picture, **TILES))
    assert text == turn(f"First [{49 * tiles}], then {frames_text(2)}, {frames_text(2)} and [{49 * tiles}].")
    assert len(sent["pixel_values"]) == tiles + 4  # the same picture twice
    options["return_history"] = False
    nano.chat(processor, [picture, picture], question, videos=clips, images_kwargs=TILES, **options)
    assert len(sent["pixel_values"]) == 2 * tiles + 4
    assert greys(processor, sent["pixel_values"][tiles : tiles + 4]) == [2, 8, 1, 3]
    assert torch.equal(sent["pixel_values"][:tiles], sent["pixel_values"][-tiles:])


def test_videos_in_later_turns(nano, processor, picture, clips, sent):
    options = {"videos_kwargs": {"num_frames": 2}, "return_history": True}
    _, history = nano.chat(processor, None, "What?", videos=clips[0], **options)
    _, history = nano.chat(processor, picture, "And this?", history=history, videos=clips[0], **options)
    _, history = nano.chat(processor, [picture], "So?", history=history, videos=clips, **options)
    assert history == [("<video>\nWhat?", ""), ("<image>\nAnd this?", ""), ("<video>\nSo?", "")]
    end = "<|im_end|>"
    assert prompt_of(sent, processor) == "".join(
        [turn(f"{frames_text(2)}\nWhat?"), end, turn("[49]\nAnd this?"), end, turn(f"{frames_text(2)}\nSo?")]
    )
    nano.chat(processor, [picture], "Last?", history=history, videos=clips, **options)
    assert prompt_of(sent, processor).endswith(end + turn("Last?"))


@pytest.mark.parametrize("options", [{}, SCM])
def test_a_conversation_about_a_video_remembers(nano, processor, picture, clips, options):
    options = {**CHAT, **options, "videos_kwargs": {"num_frames": 3}, "return_dict": True}
    turns = [(None, clips[0], "What?", 3), (None, clips[0], "Why?", 0), ([picture], clips[0], "This?", None)]
    turns += [([picture], clips, "<video> and?", 3), ([picture], clips, "Last?", 0)]
    history = None
    for images, videos, question, new_tiles in turns:
        arguments = {"images": images, "videos": videos, "question": question, "processor": processor, **options}
        plain = None if history is None else list(history)
        expected = nano.chat(history=plain, remember=False, **arguments)
        with watch(nano) as work:
            answer = nano.chat(history=history, **arguments)
        assert_equal(answer, expected)
        if new_tiles is None:
            new_tiles = sum(tile_numbers(processor, picture, **options.get("images_kwargs", {})))
        assert work.tiles == new_tiles
        if new_tiles == 0:
            assert work.read[0] < 40
        history = answer.history
        assert remembers(history)
    stream = nano.chat(
        processor, [picture], "So?", history=history, videos=clips, stream=True, **{**options, "return_dict": False}
    )
    assert "".join(stream) == stream.answer


def test_a_video_that_changes(nano, processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=4)
    options = {**CHAT, "return_dict": True}
    first = nano.chat(processor, None, QUESTION, videos=path, **options)
    write_clip(path, frames=4, size=(48, 64))
    for videos_kwargs in ({}, {"num_frames": 2}, {"frame_tiles": 2}):
        arguments = {"videos": path, "videos_kwargs": videos_kwargs, **options}
        answer = nano.chat(processor, None, "And?", history=first.history, **arguments)
        expected = nano.chat(processor, None, "And?", history=list(first.history), remember=False, **arguments)
        assert_equal(answer, expected)


def test_videos_in_a_batch(nano, processor, picture, clips, sent):
    images, videos = [picture, None, [picture], None], [None, clips[0], clips[1:], None]
    questions = ["A?", "B?", "C <image> or <video>?", "D?"]
    _, histories = nano.batch_chat(
        processor, images, questions, videos=videos, videos_kwargs={"num_frames": 2}, return_history=True
    )
    prompts = [prompt_of(sent, processor, row) for row in range(4)]
    assert prompts == [
        turn("[49]\nA?"),
        turn(f"{frames_text(2)}\nB?"),
        turn(f"C [49] or {frames_text(2)}?"),
        turn("D?"),
    ]
    assert greys(processor, sent["pixel_values"][1:3]) == [2, 8]
    assert histories[1] == [("<video>\nB?", "")]


def test_a_batch_answers_as_its_rows_do_alone(nano, processor, picture, clips):
    images, videos, questions = [picture, None], [clips[0], clips[1]], ["A?", "B?"]
    options = {**CHAT, "videos_kwargs": {"num_frames": 2}}
    answers, histories = nano.batch_chat(processor, images, questions, videos=videos, return_history=True, **options)
    again = nano.batch_chat(processor, images, ["And?", "Or?"], history=histories, videos=videos, **options)
    for row in range(2):
        alone = nano.chat(processor, images[row], questions[row], videos=videos[row], **options)
        assert answers[row] == alone
        later = nano.chat(
            processor, images[row], ["And?", "Or?"][row], history=histories[row], videos=videos[row], **options
        )
        assert again[row] == later


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, "<video> and <video>?"), {"videos": "clip"}, "2 <video> placeholders, but 1 videos"),
        ((None, "<video>?"), {}, "1 <video> placeholders, but 0 videos"),
        ((None, "Hello"), {"videos": "clip", "history": [("<video> or <video>", "Hi")]}, "but 1 videos"),
        ((None, "Hello"), {"history": [("<video>\nHi", "Hi")]}, "1 <video> placeholders, but 0 videos"),
        ((None, "Hello"), {"videos": "clip", "history": [("<image>\nHi", "Hi")]}, "<image> placeholders, but 0"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"frames": 3}}, "Unknown options of videos: frames"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"num_frames": 0}}, "num_frames"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"num_frames": 3, "fps": 1}}, "not both"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"start": 3, "end": 1}}, "end must come after"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"start": 1000}}, "ends before start"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"frame_tiles": 0}}, "0"),
        ((None, "Hello"), {"videos": "clip", "videos_kwargs": {"video_backend": "eyes"}}, "Unknown video backend"),
        ((None, "Hello"), {"videos": "missing.mp4"}, "no video file missing.mp4"),
        ((None, "Hello"), {"videos": "broken"}, "No frames could be taken"),
        ((None, "Hello"), {"videos": np.zeros((0, 9, 9, 3), np.uint8)}, "shows nothing"),
        ((None, "Hello"), {"videos": 7}, "A video is"),
        (("tiles", "Hello"), {"videos": "clip"}, "not with tiles"),
        ((None, "Hello"), {"videos": "clip", "tile_budget": 4}, "tile_budget"),
    ],
)
def test_videos_that_cannot_work(nano, processor, clips, tmp_path, arguments, options, message):
    (tmp_path / "broken.mp4").write_bytes(b"no video " * 50)
    named = {"clip": clips[0], "broken": str(tmp_path / "broken.mp4")}
    video = options.get("videos")
    if isinstance(video, str):
        options = {**options, "videos": named.get(video, video)}
    images = torch.zeros(1, 3, 112, 112) if arguments[0] == "tiles" else arguments[0]
    with pytest.raises(ValueError, match=message):
        nano.chat(processor, images, arguments[1], **options, **CHAT)


def test_videos_of_a_batch_that_cannot_work(nano, processor, clips):
    for videos, message in (
        (clips[0], "one entry for each of the 2"),
        (clips[:1], "one entry for each of the 2"),
        ([None, clips], "Row 1 has 1 <video> placeholders, but 2 videos"),
    ):
        with pytest.raises(ValueError, match=message):
            nano.batch_chat(processor, None, ["A?", "<video> B?"], videos=videos, **CHAT)


def test_a_bare_tokenizer_reads_no_videos(nano, processor, clips):
    for call in (
        lambda: nano.chat(processor.tokenizer, None, "Hello", {}, videos=clips[0]),
        lambda: nano.batch_chat(processor.tokenizer, None, ["Hello"], {}, videos=[clips[0]]),
    ):
        with pytest.raises(ValueError, match="bare tokenizer cannot read videos"):
            call()


def test_no_videos_at_all(nano, processor, picture, sent):
    for videos in (None, []):
        nano.chat(processor, picture, "Hello", videos=videos)
        assert prompt_of(sent, processor) == turn("[49]\nHello")
    nano.batch_chat(processor, None, ["a", "b"], videos=[None, []])
    assert sent["pixel_values"] is None


def test_options_of_videos_without_a_video(nano, processor, picture, sent):
    nano.chat(processor, picture, "Hello", videos_kwargs={"num_frames": 4})
    assert prompt_of(sent, processor) == turn("[49]\nHello")


def test_no_advice_that_cannot_work(nano, processor, picture, clips):
    """Videos and tiles have no budget, and every picture needs a tile."""
    tiles = torch.zeros(4, 3, 112, 112)
    for arguments, options in (
        ((processor, tiles, QUESTION), {"max_prompt_tokens": 180}),
        ((processor, None, QUESTION), {"videos": clips[0], "max_prompt_tokens": 300}),
        ((processor, [picture] * 4, QUESTION), {"max_prompt_tokens": 200}),
        ((processor, picture, QUESTION), {"videos": clips[0], "max_prompt_tokens": 300}),
    ):
        with pytest.raises(ValueError, match="The prompt has") as caught:
            nano.chat(*arguments, **options, **CHAT)
        assert "tile_budget" not in str(caught.value)


# --- videos in the processor -----------------------------------------------------------------------------------------


def test_the_processor_takes_videos(processor, picture, clips):
    text = ["<image> a <video>", "b <video><image> <video>"]
    images, videos = [[picture], [picture]], [[clips[0]], clips]
    inputs = processor(text=text, images=images, videos=videos, num_frames=2, **TILES)
    (tiles,) = tile_numbers(processor, picture, **TILES)
    texts = [row.replace("<pad>", "") for row in processor.tokenizer.batch_decode(inputs["input_ids"])]
    texts = [shorten("<|im_end|>" + row) for row in texts]
    frames = frames_text(2)
    assert texts == [f"[{49 * tiles}] a {frames}", f"b {frames}[{49 * tiles}] {frames}"]
    assert inputs["pixel_values"].shape[0] == 2 * tiles + 6
    assert len(inputs["tile_counts"]) == len(inputs["tile_grids"]) == 8
    frame_tiles = [*range(tiles, tiles + 4), *range(2 * tiles + 4, 2 * tiles + 6)]
    assert greys(processor, inputs["pixel_values"][frame_tiles]) == [2, 8, 2, 8, 1, 3]
    flat = processor(text=text, images=[picture] * 2, videos=[clips[0], *clips], num_frames=2, **TILES)
    for name, value in inputs.items():
        assert torch.equal(flat[name], value)


def test_the_processor_without_tensors(processor, picture, clips):
    plain = processor(text="<image>", images=picture, return_tensors=None)
    inputs = processor(text="<image> <video>", images=picture, videos=clips[0], num_frames=2, return_tensors=None)
    assert isinstance(inputs["input_ids"], list)
    assert {name: type(value) for name, value in inputs.items()} == {name: type(value) for name, value in plain.items()}
    arrays = processor(text="<video>", videos=clips[0], num_frames=2, return_tensors="np")
    assert {type(value) for value in arrays.values()} == {np.ndarray}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no place", {}, "0 <video> placeholders, but 1 videos"),
        ("<video><video>", {}, "2 <video> placeholders, but 1 videos"),
        ("<video> <image>", {}, "1 <image> placeholders, but 0 images"),
        ("<video>", {"num_frames": -1}, "num_frames"),
        ("<video>", {"start": 9, "end": 3}, "end must come after"),
        ("<video>", {"video_backend": "eyes"}, "Unknown video backend"),
    ],
)
def test_what_the_processor_refuses(processor, clips, text, options, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=clips[0], **options)


def messages(*content, later=()) -> list[dict]:
    return [{"role": "user", "content": list(content)}, *later]


def test_chat_templates_take_videos(nano, processor, picture, clips, sent):
    typed = "Is <video> or <image> HTML? <|im_end|>"
    content = [
        {"type": "video", "path": clips[0]},
        {"type": "image", "image": picture},
        {"type": "text", "text": typed},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "num_frames": 2}
    inputs = processor.apply_chat_template(messages(*content), **options)
    text = shorten(processor.tokenizer.decode(inputs["input_ids"][0]))
    assert text == turn(f"{frames_text(2)}\n[49]\n{typed}")
    assert greys(processor, inputs["pixel_values"][:2]) == [2, 8]
    assert inputs["input_ids"][0].tolist().count(375) == 2
    nano.chat(processor, picture, "Go.", videos=clips[0], videos_kwargs={"num_frames": 2})
    content[-1] = {"type": "text", "text": "Go."}
    assert torch.equal(processor.apply_chat_template(messages(*content), **options)["input_ids"], sent["input_ids"])
    assert torch.equal(
        processor.apply_chat_template(messages(*content), **options)["pixel_values"], sent["pixel_values"]
    )


def test_chat_templates_of_several_videos_and_conversations(processor, clips):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "num_frames": 2}
    first = messages({"type": "video", "path": clips[0]}, {"type": "video", "path": clips[1]})
    second = messages({"type": "text", "text": "Hello"}, {"type": "video", "video": clips[1]})
    inputs = processor.apply_chat_template([first, second], **options)
    assert greys(processor, inputs["pixel_values"]) == [2, 8, 1, 3, 1, 3]
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [196, 98]
    later = [
        {"role": "assistant", "content": [{"type": "text", "text": "A <video>."}]},
        {"role": "user", "content": [{"type": "video", "url": clips[1]}, {"type": "text", "text": "And?"}]},
    ]
    inputs = processor.apply_chat_template(messages({"type": "video", "path": clips[0]}, later=later), **options)
    text = shorten(processor.tokenizer.decode(inputs["input_ids"][0]))
    assert text == turn(f"{frames_text(2)}\n") + "A <video>.<|im_end|>" + turn(f"{frames_text(2)}\nAnd?")


def test_chat_templates_choose_frames(processor, clips):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    content = [{"type": "video", "path": clips[0]}, {"type": "text", "text": "Go."}]
    for kwargs, expected in (
        ({}, 8),
        ({"fps": 1}, 3),
        ({"start": 2.0, "num_frames": 100}, 4),
        ({"processor_kwargs": {"videos_kwargs": {"num_frames": 3}}}, 3),
    ):
        try:
            inputs = processor.apply_chat_template(messages(*content), **options, **kwargs)
        except TypeError:
            assert "processor_kwargs" in kwargs  # newer than the oldest release
            continue
        assert len(inputs["pixel_values"]) == expected, kwargs
    frames = [{"type": "video", "video": FRAMES}, {"type": "text", "text": "Go."}]
    inputs = processor.apply_chat_template(messages(*frames), **options)
    assert greys(processor, inputs["pixel_values"]) == [0, 1, 2, 3, 4, 5]


def test_generate_takes_what_the_processor_gives_for_videos(nano, processor, clips):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "num_frames": 2}
    content = [{"type": "video", "path": clips[0]}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(messages(*content), **options)
    output = nano.generate(**inputs, **CHAT)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer == nano.chat(processor, None, QUESTION, videos=clips[0], videos_kwargs={"num_frames": 2}, **CHAT)


def test_a_model_may_speak_of_video_tags(nano, processor, clips, sent):
    history = [("How is a clip shown on a page?", "With <video>.")]
    nano.chat(processor, None, "Thanks.", history=history)
    assert "With <video>." in processor.tokenizer.decode(sent["input_ids"][0])
    nano.chat(processor, None, "And this?", history=history, videos=clips[0], videos_kwargs={"num_frames": 2})
    text = processor.tokenizer.decode(sent["input_ids"][0])
    assert "With <video>." in text
    assert text.count("Frame2: <img>") == 1
