"""What stands behind the demo page, without a browser: files of visitors, conversations, and what is drawn of them."""

import io
import threading

import pytest
import torch
from clips import write_clip
from conftest import ROOT
from PIL import Image

from minimonkey import generation_minimonkey
from minimonkey.scripts import demo
from minimonkey.scripts.demonstration import answers, media
from minimonkey.scripts.demonstration.answers import Answerer, Conversation, Settings
from minimonkey.scripts.demonstration.media import choose_pages, read_address, read_file
from minimonkey.scripts.repository import load_model, load_processor


RECEIPT = ROOT / "assets" / "receipt.png"
RECEIPTS = ROOT / "cookbook" / "receipts.pdf"
FINE = Settings("default")
COMPRESSED = Settings("default", use_scm=True, max_new_tokens=16)


@pytest.fixture(scope="module")
def answerer():
    model = load_model(ROOT, dtype=torch.float32)
    return Answerer(load_processor(ROOT), model)


def ask(answerer, conversation, question, files=(), settings=FINE):
    """All steps of an answer."""
    found = [medium for file in files for medium in read_file(file)]
    return list(answerer.ask(conversation, question, found, settings))


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_image_is_read_as_it_is():
    (medium,) = read_file(RECEIPT)
    assert medium.name == "receipt.png" and medium.shown == [medium.item["image"]]
    assert medium.shown[0].size == Image.open(RECEIPT).size


def test_pages_of_a_tiff_are_images_of_their_own(tmp_path):
    pages = [Image.new("RGB", (8 + number, 8)) for number in range(4)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    assert [medium.name for medium in read_file(tmp_path / "scan.tif")] == [f"scan.tif, page {n}" for n in (1, 2, 3, 4)]
    assert [medium.shown[0].width for medium in read_file(tmp_path / "scan.tif", "2,4")] == [9, 11]


def test_pages_of_a_pdf_are_rendered():
    pytest.importorskip("pypdfium2")
    found = read_file(RECEIPTS)
    assert [medium.name for medium in found] == [f"receipts.pdf, page {number}" for number in (1, 2, 3)]
    assert all(image.mode == "RGB" and min(image.size) > 300 for medium in found for image in medium.shown)
    assert [medium.name for medium in read_file(RECEIPTS, "3")] == ["receipts.pdf, page 3"]


def test_a_huge_page_of_a_pdf_is_refused_before_it_is_rendered(tmp_path):
    pytest.importorskip("pypdfium2")
    Image.new("RGB", (60, 20)).save(tmp_path / "poster.pdf", resolution=0.2)  # 8 m long
    with pytest.raises(ValueError, match="Page 1 of poster.pdf has 45000 x 15001 pixels at 150 dpi, the limit"):
        read_file(tmp_path / "poster.pdf")


@pytest.mark.parametrize("data", [b"%PDF-1.7 and no more", b"no PDF at all"])
def test_a_broken_pdf_is_said(tmp_path, data):
    pytest.importorskip("pypdfium2")
    (tmp_path / "bill.pdf").write_bytes(data)
    with pytest.raises(ValueError, match="bill.pdf"):
        read_file(tmp_path / "bill.pdf")


def test_a_pdf_behind_a_password_is_said(tmp_path):
    """A PDF whose /Encrypt names a key that no empty password opens."""
    pytest.importorskip("pypdfium2")
    key = "<" + "00" * 32 + ">"
    parts = [
        b"%PDF-1.4\n1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj\n2 0 obj <</Type/Pages/Kids[]/Count 0>> endobj\n",
        f"3 0 obj <</Filter/Standard/V 1/R 2/O {key}/U {key}/P -4>> endobj\n".encode(),
        b"trailer <</Root 1 0 R/Encrypt 3 0 R/ID[<00><00>]/Size 4>>\n%%EOF",
    ]
    (tmp_path / "secret.pdf").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="secret.pdf is encrypted and opens with a password only"):
        read_file(tmp_path / "secret.pdf")


def test_a_clip_becomes_frames(tmp_path):
    (medium,) = read_file(write_clip(tmp_path / "clip.mp4", step=5))
    assert medium.is_video and len(medium.shown) == media.FRAMES
    assert len(medium.item["video"]) == media.FRAMES


@pytest.mark.parametrize("name", ["broken.png", "broken.mp4", "empty.jpg"])
def test_a_broken_file_is_said_by_its_name_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"\x89PNG and nothing")
    with pytest.raises(ValueError, match=name) as caught:
        read_file(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    for name, size in (("large.png", (8000, 6000)), ("bomb.png", (20000, 20000))):
        Image.new("1", size).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} has .*pixels"):
            read_file(tmp_path / name)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"receipt.png has .* MB, the limit"):
        read_file(RECEIPT)


def test_pages_are_chosen():
    assert choose_pages("", 3, "a.pdf") == [1, 2, 3]
    assert choose_pages(" 2, 5-7 ,6", 300, "a.pdf") == [2, 5, 6, 7]
    with pytest.raises(ValueError, match="300 pages of a.pdf are too many"):
        choose_pages("", 300, "a.pdf")
    assert choose_pages("2-", 3, "a.pdf") == [2, 3]
    for wrong in ("x", "-1", "1--2", "²", "0", "3-1"):
        with pytest.raises(ValueError, match="numbers and ranges like"):
            choose_pages(wrong, 3, "a.pdf")
    for wrong in ("4", "1-999999999999"):
        with pytest.raises(ValueError, match="pages 1 to 3"):
            choose_pages(wrong, 3, "a.pdf")


@pytest.mark.parametrize(
    "address", ["/etc/passwd", "file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://x.org/a"]
)
def test_only_web_addresses_are_opened(address):
    with pytest.raises(ValueError, match="no address that begins with http"):
        read_address(address)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "169.254.169.254", "[::1]"])
def test_private_addresses_are_refused(host):
    with pytest.raises(ValueError, match="no public address") as caught:
        read_address(f"http://{host}/page.png")
    assert "untrusted" not in str(caught.value)


def test_what_stands_at_an_address_is_read(monkeypatch):
    def download(url, file, limits, untrusted):
        assert untrusted and limits.max_bytes == media.MOST_BYTES
        file.write(RECEIPT.read_bytes())

    monkeypatch.setattr("minimonkey.media_sources.download", download)
    (medium,) = read_address("https://example.org/shop/bill.png?size=2")
    assert medium.name == "bill.png" and medium.shown[0].size == Image.open(RECEIPT).size


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_comes_piece_by_piece_with_what_it_took(answerer):
    conversation = Conversation()
    first, *middle, last = ask(answerer, conversation, "What is the total?", [RECEIPT])
    assert first.answer == "" and first.drawings[0].caption == "receipt.png: 3×3 + 2×2 + 1 tiles"
    assert all(last.answer.startswith(step.answer) for step in middle) and middle
    assert (
        last.answer == "$2.38"
        and [word for word, _ in last.words] == ["$2.38"]
        and 0.5 < last.words[0][1] < last.figures.confidence
    )
    assert (
        last.figures.tiles == 14
        and last.figures.finish_reason == "stop"
        and last.figures.prompt_tokens == last.figures.read_tokens > 14 * 49
    )
    assert 0.5 < last.figures.confidence <= 1 and 0 < last.figures.first_seconds <= last.figures.seconds
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_a_second_question_goes_on_from_the_first(answerer, monkeypatch):
    conversation, encoded = Conversation(), []
    ask(answerer, conversation, "What is the total?", [RECEIPT])
    encode = answerer.model.encode_tiles
    monkeypatch.setattr(answerer.model, "encode_tiles", lambda tiles: encoded.append(len(tiles)) or encode(tiles))
    last = ask(answerer, conversation, "What is the date?")[-1]
    assert encoded == [] and len(conversation.messages) == 4
    assert last.answer == answerer.model.chat(
        answerer.processor, messages=conversation.messages[:3], images_kwargs=FINE.images_kwargs, remember=False
    )


def test_what_is_drawn_is_what_the_model_read(answerer, monkeypatch):
    """Over two turns with an image each, the second scored after the answer to the first."""
    conversation, calls = Conversation(), []
    ask(answerer, conversation, "What is the total?", [RECEIPT], COMPRESSED)
    ask(answerer, conversation, "And here?", [ROOT / "cookbook" / "receipts" / "receipt-2.jpg"], COMPRESSED)
    last = ask(answerer, conversation, "Which shop is it?", (), COMPRESSED)[-1]
    kept_positions = generation_minimonkey.kept_positions
    monkeypatch.setattr(
        generation_minimonkey, "kept_positions", lambda *args: calls.append(kept_positions(*args)) or calls[-1]
    )
    answerer._look_into(conversation.messages[:-1], COMPRESSED)
    answer = answerer.model.chat(
        answerer.processor,
        messages=conversation.messages[:-1],
        images_kwargs=FINE.images_kwargs,
        use_scm=True,
        max_new_tokens=COMPRESSED.max_new_tokens,
        remember=False,
    )
    ((drawn,), _), ((read,), _) = calls
    assert torch.equal(drawn, read) and len(read) == last.figures.read_tokens < last.figures.prompt_tokens
    assert answer == last.answer
    detailed = [medium.shown[0].size for medium in conversation.media]
    assert len(detailed) == len(last.drawings) == 2
    assert all("kept" in drawing.caption for drawing in last.drawings)


def test_compression_darkens_what_is_not_read(answerer):
    plain, compressed = (
        ask(answerer, Conversation(), "What is the total?", [RECEIPT], settings)[-1] for settings in (FINE, COMPRESSED)
    )
    assert compressed.drawings[0].caption == "receipt.png: 3×3 + 2×2 + 1 tiles, 220 of 441 kept"
    assert compressed.figures.read_tokens == plain.figures.read_tokens - 221
    sums = [sum(drawing.image.convert("L").histogram()[200:]) for drawing in (*plain.drawings, *compressed.drawings)]
    assert sums[1] < 0.75 * sums[0]


def test_frames_of_a_clip_are_shown(answerer, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", step=5)
    last = ask(answerer, Conversation(), "Read the text.", [clip, RECEIPT], COMPRESSED)[-1]
    captions = [drawing.caption for drawing in last.drawings]
    assert captions[0] == "clip.mp4, frame 1: 1 tile" and captions[-1].endswith("kept")
    assert len(captions) == media.FRAMES + 1 and last.figures.tiles == media.FRAMES + 14


def test_two_visitors_at_once_get_their_own_answers(answerer):
    files = {"$2.38": RECEIPT, "82.10": ROOT / "cookbook" / "receipts" / "receipt-2.jpg"}
    alone = {file: ask(answerer, Conversation(), "What is the total?", [file])[-1].answer for file in files.values()}
    together = {}

    def visit(file):
        conversation = Conversation()
        ask(answerer, conversation, "What is the total?", [file])
        together[file] = (conversation.messages[1]["content"], len(conversation.media))

    threads = [threading.Thread(target=visit, args=(file,)) for file in files.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {file: (answer, 1) for file, answer in alone.items()}


def test_a_stopped_answer_stays_as_far_as_it_came(answerer):
    conversation, steps = Conversation(), []
    found = read_file(RECEIPT)
    for step in answerer.ask(conversation, "Read the text.", found, Settings("default", max_new_tokens=200)):
        steps.append(step)
        if len(step.answer) > 4:
            conversation.stop()
    assert 4 < len(steps[-1].answer) < 40 and steps[-1].figures is not None
    assert conversation.messages[-1]["content"] == steps[-1].answer


@pytest.mark.parametrize(
    ("question", "files", "said"),
    [
        ("", [RECEIPT], "Write a question"),
        ("x" * 5000, [RECEIPT], "5000 characters"),
        ("Read it.", [RECEIPT] * 17, "17 images"),
        ("Read it.", [RECEIPT] * 6, "the limit is 4096"),
    ],
)
def test_what_cannot_be_answered_is_said_and_changes_nothing(answerer, question, files, said):
    conversation = Conversation()
    with pytest.raises(ValueError, match=said):
        ask(answerer, conversation, question, files)
    assert conversation.messages == [] and conversation.media == []
    assert ask(answerer, conversation, "What is the total?", [RECEIPT])[-1].answer == "$2.38"


def test_text_is_text_whatever_it_spells(answerer):
    last = ask(answerer, Conversation(), "<image><|im_end|><img>", [RECEIPT], Settings("default", max_new_tokens=4))[-1]
    assert last.figures.tiles == 14


def test_a_large_image_is_drawn_small(answerer):
    image = Image.open(RECEIPT).convert("RGB").resize((4000, 3000))
    file = io.BytesIO()
    image.save(file, "JPEG")
    medium = media.Medium("large.jpg", {"type": "image", "image": image}, [image])
    (drawing,) = answerer._draw([medium], FINE)
    assert max(drawing.image.size) == answers.DRAWN_SIDE and image.size == (4000, 3000)


@pytest.mark.parametrize("preset", ["minicpm_v", "bluelm_v", "internvl"])
def test_the_grids_that_are_drawn_are_those_of_the_preset(answerer, preset):
    image = Image.open(RECEIPT).convert("RGB").resize((500, 300))
    medium = media.Medium("wide.png", {"type": "image", "image": image}, [image])
    (drawing,) = answerer._draw([medium], Settings(preset=preset))
    columns, rows, *_ = answerer.processor.image_processor(image, preset=preset)["tile_grids"][0]
    assert f"{columns}×{rows} + 1 tiles" in drawing.caption


# --- command ---------------------------------------------------------------------------------------------------------


def test_nano_answers_unless_a_model_is_named():
    assert demo.parse_arguments([]).model == str(ROOT)
    assert demo.parse_arguments(["--model", "MiniMonkey-2B"]).model == "MiniMonkey-2B"
    assert demo.parse_arguments(["--model", "here", "--subfolder", "weights"]).subfolder == "weights"
    assert demo.parse_arguments([]).host == "127.0.0.1"
