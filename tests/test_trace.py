"""What a reader follows: which functions and files one call runs through, printed. `pytest tests/test_trace.py -s`

Counts what is executed in the remote-code files, not in transformers, in the thread that calls.
"""

import sys
from pathlib import Path

import pytest
from conftest import ROOT


IMAGE, QUESTION = ROOT / "assets" / "example.png", "Read the text."
CHAT = {"max_new_tokens": 8, "do_sample": False}


class Trace:
    """The functions of a call in the order in which they are first reached, and how often it goes on in another file."""

    def __init__(self):
        self.functions, self.files, self.changes, self.last = [], [], 0, None

    def __call__(self, frame, event, _):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event != "call" or "transformers_modules" not in path.parts or name.startswith("<"):
            return
        self.changes, self.last = self.changes + (path.stem != self.last), path.stem
        function = f"{path.stem}.{getattr(frame.f_code, 'co_qualname', name)}"  # the whole name since Python 3.11
        for seen, item in ((self.functions, function), (self.files, path.stem)):
            if item not in seen:
                seen.append(item)


@pytest.fixture
def trace():
    def run(title, call):
        path = Trace()
        before = sys.getprofile()
        sys.setprofile(path)
        try:
            result = call()
        finally:
            sys.setprofile(before)
        counts = f"{len(path.functions)} functions, {len(path.files)} files, {path.changes} changes of file"
        print(f"\n{title}: {counts}\n   " + "\n   ".join(path.functions))  # noqa: T201 - what this is for
        return path, result

    return run


def test_chat(nano, processor, trace):
    path, _ = trace("chat", lambda: nano.chat(processor, IMAGE, QUESTION, **CHAT))
    assert path.files[0] == "chat_minimonkey"
    assert not {"compression", "repetition", "prompt_memory", "image_inputs"} & {*path.files}  # what nobody asked for


def test_a_remembered_turn(nano, processor, trace):
    _, history = nano.chat(processor, IMAGE, QUESTION, return_history=True, **CHAT)
    path, _ = trace("turn", lambda: nano.chat(processor, IMAGE, "And?", history, return_history=True, **CHAT))
    assert "prompt_memory" in path.files


def test_chat_with_compression(nano, processor, trace):
    options = {"use_scm": True, "images_kwargs": {"preset": "default"}, **CHAT}
    path, _ = trace("chat with use_scm", lambda: nano.chat(processor, IMAGE, QUESTION, **options))
    assert "attention_probe" in path.files


def test_generate(nano, processor, trace):
    content = [{"type": "image", "path": str(IMAGE)}, {"type": "text", "text": QUESTION}]

    def answer():
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return nano.generate(**inputs, **CHAT)

    path, _ = trace("apply_chat_template and generate", answer)
    assert "chat_minimonkey" not in path.files
