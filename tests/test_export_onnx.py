"""export_onnx.py: a model as ONNX files, and a chat whose every number onnxruntime computes."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, random_tiles
from engine_helpers import assert_chat_answers_as_torch, embeddings, needs, saved
from model_helpers import tiny_model, tiny_mono
from PIL import Image

from minimonkey.scripts.export_onnx import export_onnx, write_part
from minimonkey.scripts.exporting.onnx_parts import DECODER, Decoder, Scorer, parts, with_fixed_positions
from minimonkey.scripts.repository import load_model, load_processor


pytestmark = needs("onnx", "onnxscript", "onnxruntime")


def opened(folder):
    from minimonkey.scripts.engines.onnx_runtime import load_onnx

    return load_onnx(folder, threads=1)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "nano"
    export_onnx(str(ROOT), folder)
    return folder


def test_onnxruntime_computes_the_same(nano):
    """Tiles, and the language model in pieces of any length, going back in between."""
    ours, theirs = load_model(ROOT, dtype=torch.float32), opened(nano)
    given, tiles = embeddings(192), random_tiles(4, 3, 3, 112, 112)
    with torch.no_grad():
        logits = ours(inputs_embeds=given).logits[0].numpy()
        for some in (tiles, tiles[:1]):
            assert (ours.encode_tiles(some) - theirs.encode_tiles(some)).abs().max() < 1e-3
    engine, rows = theirs.engine, given[0].numpy()
    np.testing.assert_allclose(engine.read(rows[:50], every=True), logits[:50], atol=1e-3)
    np.testing.assert_allclose(engine.read(rows[50:]), logits[-1:], atol=1e-3)
    engine.cut(60)
    for place in range(60, 64):
        np.testing.assert_allclose(engine.read(rows[place : place + 1]), logits[place : place + 1], atol=1e-3)
    assert engine.length == 64


@pytest.mark.parametrize("use_scm", [False, True])
def test_a_conversation_is_the_same_through_onnxruntime(use_scm, nano):
    answers = []
    for model, processor in (
        (load_model(ROOT, dtype=torch.float32), load_processor(ROOT)),
        (opened(nano), load_processor(nano)),
    ):
        image = str(ROOT / "assets" / "example.png")
        options = {
            "use_scm": use_scm,
            "max_new_tokens": 30,
            "return_history": True,
            "images_kwargs": {"preset": "default"},
        }
        first, history = model.chat(processor, image, "Read the text.", **options)
        second, _ = model.chat(processor, image, "Read the text.", history=history, **options)
        other, _ = model.chat(processor, Image.open(image).resize((200, 150)), "Read the text.", **options)
        again, _ = model.chat(processor, image, "Read the text.", history=history, **options)
        answers.append([first, second, other, again])
    assert answers[0] == answers[1] and answers[0][0] and answers[0][1] == answers[0][3]


def test_scale_compression_keeps_the_same_tokens(nano):
    ours, theirs, processor = load_model(ROOT, dtype=torch.float32), opened(nano), load_processor(ROOT)
    content = [{"type": "image", "path": str(ROOT / "assets" / "receipt.png")}, {"type": "text", "text": "The total?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": {"preset": "default"}},
    )
    for queries in ("all", "visual"):
        (expected,), (kept,) = (model.kept_positions(**inputs, scm_queries=queries) for model in (ours, theirs))
        assert torch.equal(kept, expected) and len(kept) < inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="scores by layer 1, not 0"):
        theirs.kept_positions(**inputs, scm_layer=0)


def test_chat_with_the_engine(nano, capsys):
    assert_chat_answers_as_torch(capsys, "--engine", "onnx", "--model", str(nano))


def test_what_cannot_be_written_or_read_is_said(nano, tmp_path):
    tiny_mono().save_pretrained(tmp_path / "mono")
    tiny_model("gemma2", head_dim=16).save_pretrained(tmp_path / "gemma")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((ROOT / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    for source, out, message in (
        (tmp_path / "mono", tmp_path / "out", "with visual experts is not written as ONNX"),
        (tmp_path / "gemma", tmp_path / "out", "'gemma2' is not written as ONNX; llama, qwen2, phi3 are"),
        (quantised, tmp_path / "out", "is quantised"),
        (ROOT, nano, "exists already"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(str(source), out)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds no ONNX files of a MiniMonkey"):
        opened(ROOT)
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("config.json", "onnx_settings.json", "vision_encoder.onnx"):
        (partial / name).write_bytes((nano / name).read_bytes())
    with pytest.raises(ValueError, match=r"lacks embed_tokens\.onnx"):
        opened(partial)
    (partial / "vision_encoder.onnx").write_bytes(b"\x00broken")
    with pytest.raises(ValueError, match=r"vision_encoder\.onnx is damaged"):
        opened(partial)


# --- language models of every shape ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "qwen2", "phi3"])
def test_the_exported_modules_are_the_model(shape, tmp_path):
    model = saved(tmp_path / "model", shape)
    given = embeddings(32, 30)
    with torch.no_grad():
        expected = model(inputs_embeds=given).logits
        decoder = Decoder(model)
        past = [torch.zeros(1, 1, 0, 16) for _ in range(2 * model.config.text_config.num_hidden_layers)]
        _, past = decoder(given[:, :20], torch.arange(20)[None], torch.tensor([19]), past)
        logits, _ = decoder(given[:, 20:], torch.arange(20, 30)[None], torch.arange(10), past)
        torch.testing.assert_close(logits, expected[:, 20:], atol=1e-4, rtol=1e-4)
        query, key = Scorer(model)(given)
    probe = model._probe(1, given[0], torch.zeros(30, dtype=torch.bool))
    torch.testing.assert_close(query, probe.query)
    torch.testing.assert_close(key, probe.key)
    assert Scorer(model).scaling == pytest.approx(probe.scaling)


@pytest.mark.parametrize("shape", ["llama, dynamic", "qwen2", "phi3, longrope"])
def test_onnxruntime_computes_every_shape(shape, tmp_path):
    import onnxruntime

    from minimonkey.scripts.engines.onnx_runtime import OnnxDecoder

    model = saved(tmp_path / "model", shape)
    given = embeddings(32, 60)
    with torch.no_grad():
        expected = model(inputs_embeds=given).logits[0].numpy()
    write_part(tmp_path / "decoder.onnx", *parts(with_fixed_positions(model))[DECODER])
    decoder = OnnxDecoder(onnxruntime.InferenceSession(tmp_path / "decoder.onnx"), None, model.config)
    rows = given[0].numpy()
    np.testing.assert_allclose(decoder.read(rows[:40], every=True), expected[:40], atol=1e-2)
    for place in range(40, 43):
        np.testing.assert_allclose(decoder.read(rows[place : place + 1]), expected[place : place + 1], atol=1e-2)


@needs("openvino")
def test_openvino_computes_the_same_from_the_same_files(nano):
    """In float32, which has to be asked for where the processor has bfloat16."""
    import onnxruntime
    import openvino

    random = np.random.default_rng(0)
    prompt = random.standard_normal((1, 40, 192), dtype=np.float32)
    past = {
        f"past_key_values.{layer}.{kind}": np.zeros((1, 3, 7, 64), "f4")
        for layer in range(3)
        for kind in ("key", "value")
    }
    given = {
        "vision_encoder": {"pixel_values": random.standard_normal((2, 3, 112, 112), dtype=np.float32)},
        "embed_tokens": {"input_ids": np.arange(9)[None]},
        "decoder_model": {
            "inputs_embeds": prompt,
            "position_ids": np.arange(7, 47)[None],
            "logits_of": np.array([39]),
            **past,
        },
        "scorer": {"inputs_embeds": prompt},
    }
    for name, inputs in given.items():
        path = nano / f"{name}.onnx"
        compiled = openvino.Core().compile_model(
            openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        expected = onnxruntime.InferenceSession(path).run(None, inputs)
        for index, values in enumerate(expected):
            np.testing.assert_allclose(compiled(inputs)[index], values, atol=1e-3)
