"""The demo page in a real Chromium, as its visitors use it: `make test-demo`.

The browser is the system's (CHROMIUM names it, or one is looked for); playwright drives it. The server is `app.py`.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from clips import write_clip
from conftest import ROOT
from PIL import Image


pytestmark = pytest.mark.browser
RECEIPT = ROOT / "assets" / "receipt.png"
RECEIPTS = ROOT / "cookbook" / "receipts"
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the page, served by app.py with Nano in float32."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "MINIMONKEY_DEMO": "--dtype float32",
    }
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, ROOT / "app.py"], env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}/"
            for _ in range(240):
                with contextlib.suppress(URLError):
                    urlopen(address).close()
                    break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)
    log = (folder / "log").read_text()
    assert log.count("Traceback") == log.count("InvalidPathError: "), (
        log
    )  # gradio's word for a path that was not uploaded


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("There is no Chromium here: apt-get install chromium, or say in CHROMIUM where it is.")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=SWITCHES)
        yield chromium
        chromium.close()


class Visitor:
    """Someone who uses the page."""

    def __init__(self, browser, address: str, **options):
        self.elsewhere: list[str] = []
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#box textarea")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def upload(self, *paths: Path) -> None:
        self.page.set_input_files("#box input[type=file]", [str(path) for path in paths])
        self.page.wait_for_function(
            "count => document.querySelectorAll('#box .thumbnail-item').length >= count", arg=len(paths)
        )

    def send(self, question: str) -> None:
        self.page.fill("#box textarea", question)
        self.page.press("#box textarea", "Enter")

    def ask(self, question: str, *paths: Path) -> str:
        """Upload, ask, wait for the answer and return it."""
        if paths:
            self.upload(*paths)
        before = len(self.answers())
        self.send(question)
        self.page.wait_for_function(
            """before => {
                const answers = [...document.querySelectorAll("#chat .bot.message")];
                const isReady = document.querySelector("#box .submit-button") && !document.querySelector("#box .stop-button");
                return isReady && answers.length > before && answers.at(-1).innerText.trim() != "…";
            }""",
            arg=before,
        )
        return self.answers()[-1]

    def answers(self) -> list[str]:
        return [text.strip() for text in self.page.locator("#chat .bot.message").all_inner_texts()]

    def figures(self) -> dict[str, str]:
        cells = self.page.locator("#figures .figures > div").all_inner_texts()
        return {name: value for value, name in (cell.split("\n", 1) for cell in cells)}

    def caption(self) -> str:
        return self.page.inner_text("#gallery .caption")

    def warning(self) -> str:
        return self.page.locator(".toast-body").last.inner_text()


@pytest.fixture
def visitor(browser, server):
    visitor = Visitor(browser, server)
    yield visitor
    visitor.page.context.close()
    assert visitor.elsewhere == []  # neither fonts nor analytics


def test_upload_ask_and_ask_again(visitor):
    assert visitor.ask("What is the total?", RECEIPT) == "$2.38"
    assert visitor.caption() == "receipt.png: 3×3 + 2×2 + 1 tiles"
    figures = visitor.figures()
    assert figures["tiles"] == "14" and figures["confidence"].endswith("%") and figures["in all"].endswith(" s")
    assert visitor.page.inner_text("#figures .words") == "$2.38"
    assert visitor.ask("What is the date?") == "1991-09-18"
    assert visitor.answers() == ["$2.38", "1991-09-18"]
    assert int(visitor.figures()["prompt tokens read"].replace(",", "")) > 750


def test_compression_on_and_off(visitor):
    visitor.ask("What is the total?", RECEIPT)
    plain = visitor.page.get_attribute("#gallery .preview img", "src")
    visitor.page.check("#scm input")
    visitor.ask("What is the total?")
    assert visitor.caption().endswith("220 of 441 kept")
    assert " of " in visitor.figures()["prompt tokens read"]
    assert visitor.page.get_attribute("#gallery .preview img", "src") != plain
    visitor.page.uncheck("#scm input")
    visitor.ask("What is the total?")
    assert "kept" not in visitor.caption() and " of " not in visitor.figures()["prompt tokens read"]


def test_a_broken_file_is_said_and_nothing_is_lost(visitor, tmp_path):
    visitor.ask("What is the total?", RECEIPT)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing")
    visitor.upload(tmp_path / "broken.png")
    visitor.send("And here?")
    assert visitor.warning().endswith("broken.png is empty or not a picture that Pillow can read.")
    assert visitor.page.input_value("#box textarea") == "And here?"
    assert visitor.answers() == ["$2.38"]
    visitor.page.locator("#box .delete-button").first.click()
    assert visitor.ask("What is the date?") == "1991-09-18"


def test_two_visitors_at_once_have_their_own_conversations(browser, server):
    visitors = [Visitor(browser, server), Visitor(browser, server)]
    for visitor, file in zip(visitors, (RECEIPT, RECEIPTS / "receipt-2.jpg")):
        visitor.upload(file)
    for visitor in visitors:
        visitor.send("Which shop is this from?")
    for visitor in visitors:
        visitor.page.wait_for_selector("#figures .figures")
    assert [visitor.answers() for visitor in visitors] == [["Mcintosh"], ["SLOWING"]]
    assert [visitor.ask("What is the total?") for visitor in visitors] == ["$2.38", "189.20"]
    captions = [visitor.caption().partition(":")[0] for visitor in visitors]
    assert captions == ["receipt.png", "receipt-2.jpg"]
    for visitor in visitors:
        visitor.page.context.close()


def test_pages_of_a_pdf(visitor):
    visitor.page.click("#more button")
    visitor.page.fill("#pages textarea, #pages input", "7")
    visitor.upload(ROOT / "cookbook" / "receipts.pdf")
    visitor.send("Which shop is this from?")
    assert "receipts.pdf has pages 1 to 3" in visitor.warning()
    visitor.page.fill("#pages textarea, #pages input", "2")
    assert visitor.ask("Which shop is this from?") == "LYCAON SAFETY"
    assert visitor.caption().startswith("receipts.pdf, page 2: ")


def test_a_clip(visitor, tmp_path):
    visitor.ask("Read the text.", write_clip(tmp_path / "clip.mp4", step=5))
    assert visitor.caption() == "clip.mp4, frame 8: 1 tile" and visitor.figures()["tiles"] == "8"


def test_an_image_is_pasted(visitor):
    data = list(RECEIPT.read_bytes())
    visitor.page.evaluate(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "pasted.png", {type: "image/png"}));
            const event = new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
            document.querySelector("#box textarea").dispatchEvent(event);
        }""",
        data,
    )
    visitor.page.wait_for_selector("#box .thumbnail-item")
    assert visitor.ask("What is the total?") == "$2.38"


def test_an_example(visitor):
    visitor.page.click("text=Which shop is this from?")
    visitor.page.wait_for_selector("#box .thumbnail-item")
    visitor.page.press("#box textarea", "Enter")
    visitor.page.wait_for_selector("#figures .figures")
    assert visitor.answers() == ["SHOEHORN FREEWAY"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/page.png", "http://localhost/", "/etc/passwd"])
def test_what_is_private_is_not_reached(visitor, address):
    visitor.page.click("#more button")
    visitor.page.fill("#address textarea, #address input", address)
    visitor.send("Read the text.")
    warning = visitor.warning()
    assert "no public address" in warning or "no address that begins with http" in warning
    assert visitor.answers() == []


def test_an_answer_is_stopped_and_a_new_conversation_begun(visitor):
    visitor.upload(RECEIPTS / "receipt-6.jpg")
    visitor.send("Read the text.")
    visitor.page.click("#box .stop-button")
    visitor.page.wait_for_selector("#box .submit-button")
    visitor.page.wait_for_selector("#figures .figures")
    assert len(visitor.answers()) == 1 and len(visitor.answers()[0]) < 100
    visitor.page.click("#fresh")
    visitor.page.wait_for_function("document.querySelectorAll('#chat .message').length == 0")
    assert visitor.page.locator("#gallery .caption").count() == 0
    assert visitor.ask("What is the total?", RECEIPT) == "$2.38"


def test_too_long_a_prompt_is_said(visitor):
    files = sorted(RECEIPTS.glob("*.jpg"))
    visitor.upload(*files)
    visitor.send("What is the total?")
    assert "the limit is 4096" in visitor.warning()
    assert visitor.answers() == [] and visitor.page.input_value("#box textarea") == "What is the total?"


def test_answers_are_shown_as_text(visitor, tmp_path):
    """Whatever a file is called."""
    Image.open(RECEIPT).save(tmp_path / "<img src=x onerror=document.title=1>.png")
    visitor.ask("What is <b>the</b> total?", tmp_path / "<img src=x onerror=document.title=1>.png")
    assert visitor.page.title() == "MiniMonkey"
    assert "What is <b>the</b> total?" in visitor.page.inner_text("#chat")


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md", "model.safetensors"])
def test_files_of_the_machine_are_not_served(server, path):
    with pytest.raises(HTTPError) as caught:
        urlopen(f"{server}gradio_api/file={path}")
    assert caught.value.code in (403, 404)


def test_a_path_in_the_place_of_an_upload_is_refused(server):
    """As somebody would send it who writes their own requests."""
    asked = {
        "text": "Read the text.",
        "files": [{"path": str(ROOT / "assets" / "example.png"), "meta": {"_type": "gradio.FileData"}}],
    }
    config = json.load(urlopen(f"{server}config"))
    number = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 8)
    body = {"data": [asked, "", "", "default", False, 0.5, 16, None], "fn_index": number, "session_hash": "stranger"}
    request = Request(
        f"{server}gradio_api/queue/join?", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urlopen(request).close()
    with urlopen(f"{server}gradio_api/queue/data?session_hash=stranger", timeout=60) as events:
        text = events.read().decode()
    assert '"success":false' in text and "Mini" not in text
