"""The OpenAI-style server as people start it: images as base64 and by address, streams, many at once, what it refuses."""

import base64
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from PIL import Image
from vllm_helpers import NEW_TOKENS, expected_answers, user

from minimonkey.scripts.repository import load_processor


pytestmark = pytest.mark.vllm
START_SECONDS, ANSWER_SECONDS = 1200, 600
DEFAULT = {"preset": "default"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def expected_texts(options: dict, **generation) -> dict[str, str]:
    """What transformers answers about each image of assets/."""
    tokenizer, texts = load_processor(ROOT).tokenizer, {}
    for name in ("example", "receipt"):
        image = Image.open(ROOT / "assets" / f"{name}.png").convert("RGB")
        ((_, ids),) = expected_answers(ROOT, [[user("Read the text.", image)]], options, **generation)
        texts[name] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The command of docs/serving.md for a CPU, on a free port."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    options = "--trust-remote-code --dtype float32 --enforce-eager --max-model-len 4096 --gpu-memory-utilization 0.3"
    options += " --kv-cache-memory-bytes 134217728 --allowed-media-domains 127.0.0.1 --trust-request-mm-kwargs"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT), *options.split()]
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, cwd=log.parent)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def assets():
    """The address of a server of assets/."""
    handler = type("Handler", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    served = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: handler(*given, directory=str(ROOT / "assets")))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def as_data(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((ROOT / "assets" / f"{name}.png").read_bytes()).decode()


def ask(server: str, url: str, options: dict = DEFAULT, **more):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the text."}]
    body = {"model": str(ROOT), "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": NEW_TOKENS, "mm_processor_kwargs": options} | more
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=ANSWER_SECONDS)


def answer(server: str, url: str, options: dict = DEFAULT) -> str:
    return json.load(ask(server, url, options))["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def expected():
    return expected_texts(DEFAULT)


def test_images_as_base64_and_by_address(server, assets, expected):
    for name, text in expected.items():
        assert answer(server, as_data(name)) == text
        assert answer(server, f"{assets}/{name}.png") == text


def test_a_stream_brings_the_same_text(server, expected):
    lines = [line.decode().removeprefix("data: ").strip() for line in ask(server, as_data("receipt"), stream=True)]
    events = [json.loads(line) for line in lines if line and line != "[DONE]"]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(pieces) == expected["receipt"]
    assert sum(map(bool, pieces)) > 2


def test_an_answer_that_repeats_itself_ends_as_the_page_says(server):
    """A letter that is always the likeliest: after four times 32 of it the answer ends, or after as many as are asked for."""
    (letter,) = load_processor(ROOT).tokenizer("a", add_special_tokens=False)["input_ids"]
    page = (ROOT / "docs" / "serving.md").read_text()
    detection = json.loads(re.search(r'"repetition_detection": ({.*?})', page)[1])
    for more, reason, tokens in (
        ({"repetition_detection": detection}, "repetition", 128),
        ({"repetition_detection": {**detection, "min_count": 5}}, "repetition", 160),
        ({}, "length", 200),
    ):
        asked = ask(server, as_data("example"), logit_bias={str(letter): 100}, max_tokens=200, **more)
        said = json.load(asked)
        assert (said["choices"][0]["finish_reason"], said["usage"]["completion_tokens"]) == (reason, tokens)


def test_thirty_two_at_once(server, expected):
    names = ["example", "receipt"] * 16
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda name: answer(server, as_data(name)), names))
    assert answers == [expected[name] for name in names]


def test_compression_is_an_option_of_a_request(server, expected):
    compressed = expected_texts(DEFAULT, use_scm=True, scm_queries="visual")
    for name, text in compressed.items():
        assert answer(server, as_data(name), {**DEFAULT, "use_scm": True}) == text
        assert answer(server, as_data(name)) == expected[name]


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("file:///etc/hostname", DEFAULT, "local"),
        ("http://localhost/picture.png", DEFAULT, "domain"),
        ("data:image/png;base64,AAAA", DEFAULT, "image"),
        (None, {"preset": "none"}, "Unknown preset|Failed to apply"),
        (None, {"use_scm": True, "scm_keep_ratio": 7}, "at most 1, got 7"),
    ],
    ids=["path", "domain", "no-image", "preset", "ratio"],
)
def test_what_cannot_be_is_refused_and_the_server_lives(server, expected, url, options, message):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, url or as_data("example"), options)
    said = error.value.read().decode()
    assert error.value.code >= 400 and re.search(message, said), (
        said
    )  # 500 for a path, which it calls an error of its own
    assert answer(server, as_data("example")) == expected["example"]
