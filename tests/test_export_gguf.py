"""export_gguf.py: the language model in llama.cpp's files, and llama.cpp as the language model of a chat."""

import json

import pytest
import torch
from conftest import ROOT
from engine_helpers import SHAPES, assert_chat_answers_as_torch, embeddings, has_libllama, needs, saved
from model_helpers import tiny_model, tiny_mono
from PIL import Image

from minimonkey.scripts import export_gguf as command
from minimonkey.scripts.export_gguf import export_gguf
from minimonkey.scripts.exporting.gguf_language import for_llama_cpp, language_tensors, published_language_name
from minimonkey.scripts.exporting.gguf_tokenizer import tokenizer_kind
from minimonkey.scripts.repository import load_model, load_processor


pytestmark = needs("gguf")
llama_cpp = pytest.mark.skipif(bool(has_libllama()), reason=f"needs libllama: {has_libllama()}")
NANO_TOKENIZER = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))


def test_gguf_has_the_weights_in_llama_cpps_order(tmp_path):
    """Neighbouring rows of a head turn together there, the two halves of it here; everything else is as it was."""
    import gguf

    model = saved(tmp_path / "model", "llama")
    export_gguf(str(tmp_path / "model"), tmp_path / "out.gguf", "F32")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    layer = model.model.language_model.layers[1]
    heads, width = 2, 16
    query = layer.self_attn.q_proj.weight.view(heads, width, -1)
    theirs = tensors["blk.1.attn_q.weight"].view(heads, width, -1)
    assert torch.equal(theirs[:, 0::2], query[:, :8]) and torch.equal(theirs[:, 1::2], query[:, 8:])
    assert torch.equal(tensors["blk.1.attn_v.weight"], layer.self_attn.v_proj.weight)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)


@pytest.mark.parametrize("kind, most", [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_0", 0.15)])
def test_numbers_are_as_near_as_their_format(kind, most, tmp_path):
    import gguf

    saved(tmp_path / "model", "qwen2")
    for name in ("F32", kind):
        export_gguf(str(tmp_path / "model"), tmp_path / f"{name}.gguf", name)
    exact, rounded = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("F32", kind)
    )
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        values = torch.tensor(gguf.dequantize(rounded[name].data, rounded[name].tensor_type)).view(tensor.data.shape)
        assert (values - torch.tensor(tensor.data)).abs().max() <= most * abs(tensor.data).max()
    assert (tmp_path / f"{kind}.gguf").stat().st_size < (tmp_path / "F32.gguf").stat().st_size


def test_what_cannot_be_written_is_refused_before_anything_is_written(tmp_path):
    for name, model in (("gemma", tiny_model("gemma2", head_dim=16)), ("mono", tiny_mono())):
        model.save_pretrained(tmp_path / name)
    saved(tmp_path / "llama", "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    before = sorted(tmp_path.iterdir())
    for source, out, kind, message in (
        ("gemma", "out.gguf", "F16", "'gemma2' is not written as GGUF; llama, qwen2, phi3"),
        ("mono", "out.gguf", "F16", "no visual experts"),
        ("quantised", "out.gguf", "F16", "is quantised; export the checkpoint that it was made of"),
        ("llama", "taken.gguf", "F16", "exists already"),
        ("llama", "nowhere/out.gguf", "F16", "no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gguf(str(tmp_path / source), tmp_path / out, kind)
    with pytest.raises(ValueError, match="Q8_0 packs 32 numbers of a row together.* rows of 48; take F16"):
        tiny_model("llama").save_pretrained(tmp_path / "narrow")
        export_gguf(str(tmp_path / "narrow"), tmp_path / "out.gguf", "Q8_0")
    assert sorted({*tmp_path.iterdir()} - {tmp_path / "narrow"}) == before and taken.read_text() == "mine"


def test_a_file_that_another_program_cannot_read_text_with_says_so(tmp_path, capsys):
    saved(tmp_path / "model", "phi3")
    assert command.main([str(tmp_path / "model"), str(tmp_path / "out.gguf"), "--type", "F16"]) == 0
    assert "No tokenizer is written" in capsys.readouterr().err
    assert command.main([str(tmp_path / "model"), str(tmp_path / "2.gguf"), "--mmproj", str(tmp_path / "m.gguf")]) == 1
    assert not (tmp_path / "2.gguf").exists() and not (tmp_path / "m.gguf").exists()


def test_tokenizers_are_told_apart():
    assert tokenizer_kind(NANO_TOKENIZER) == "gpt-2"
    joined = {**NANO_TOKENIZER, "model": {**NANO_TOKENIZER["model"], "merges": [["\u0120", "t"]]}}
    with pytest.raises(ValueError, match="no name for how this tokenizer splits"):
        tokenizer_kind(joined)
    assert tokenizer_kind({"model": {"type": "BPE", "byte_fallback": True, "merges": []}}) == "llama"
    with pytest.raises(ValueError, match="Unigram"):
        tokenizer_kind({"model": {"type": "Unigram"}})


# --- with llama.cpp's library ----------------------------------------------------------------------------------------


def engine(folder, gguf, **options):
    from minimonkey.scripts.engines.llama_cpp import load_llama_cpp

    return load_llama_cpp(folder, gguf, torch.float32, threads=1, **options)


def _with_fewer_layers(folder):
    """Nano without its last layer: another model than the one that was exported."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((ROOT / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_weights_of(model, path):
    """Put the rounded weights of a GGUF file into a model."""
    import gguf

    text = model.config.text_config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == text.model_type)
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, parameter in model.named_parameters():
        published = published_language_name(ours)
        if published is None:
            continue
        tensor = tensors[names.get_name(published, try_suffixes=(".weight", ".bias"))]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).view(parameter.shape)
        if for_llama_cpp(ours, parameter, text) is not parameter:
            count = text.num_attention_heads if "q_proj" in ours else text.num_key_value_heads
            values = values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        parameter.data = values
    return model


@llama_cpp
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same_logits(shape, tmp_path):
    """In 32 bits almost to the bit (its cache has 16), in 8 as torch does with the same rounded weights."""
    model = saved(tmp_path / "model", shape)
    given = embeddings(32)
    for kind, most in (("F32", 0.005), ("Q8_0", 0.1)):
        export_gguf(str(tmp_path / "model"), tmp_path / f"{kind}.gguf", kind)
        theirs = engine(tmp_path / "model", tmp_path / f"{kind}.gguf")
        with torch.no_grad():
            expected = with_weights_of(model, tmp_path / f"{kind}.gguf")(inputs_embeds=given).logits
        got = theirs(inputs_embeds=given).logits
        assert (got - expected).abs().max() <= most * expected.std(), kind
        theirs.engine.close()
    if shape in ("llama 3", "llama, linear", "phi3, longrope"):
        assert language_tensors(model.config)  # without which the positions would be others


@llama_cpp
def test_q4_k_m_where_rows_divide_by_256(tmp_path):
    with pytest.raises(ValueError, match="Q4_K_M packs 256 numbers of a row together.* rows of 192; take Q8_0 or Q4_0"):
        export_gguf(str(ROOT), tmp_path / "nano.gguf", "Q4_K_M")
    model = tiny_model("llama", hidden_size=256, intermediate_size=256)
    for parameter in model.parameters():
        parameter.data *= 0.1
    model.save_pretrained(tmp_path / "model")
    export_gguf(str(tmp_path / "model"), tmp_path / "out.gguf", "Q4_K_M")
    given = embeddings(256)
    with torch.no_grad():
        expected = with_weights_of(model, tmp_path / "out.gguf")(inputs_embeds=given).logits
    got = engine(tmp_path / "model", tmp_path / "out.gguf")(inputs_embeds=given).logits
    assert (got - expected).abs().max() <= 0.1 * expected.std()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.fixture(scope="module")
def nano_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("nano") / "nano.gguf"
    export_gguf(str(ROOT), path, "F16")
    return path


@llama_cpp
@pytest.mark.parametrize("use_scm", [False, True])
def test_a_conversation_is_the_same_through_llama_cpp(use_scm, nano_gguf):
    processor, ours = load_processor(ROOT), load_model(ROOT, dtype=torch.float32)
    theirs = engine(ROOT, nano_gguf, use_scm=use_scm)
    image, answers = str(ROOT / "assets" / "example.png"), []
    for model in (ours, theirs):
        options = {
            "use_scm": use_scm,
            "max_new_tokens": 30,
            "return_history": True,
            "images_kwargs": {"preset": "default"},
        }
        first, history = model.chat(processor, image, "Read the text.", **options)
        second, _ = model.chat(processor, image, "Read the text.", history=history, **options)
        other, _ = model.chat(processor, Image.open(image).resize((200, 150)), "Read the text.", **options)
        again, _ = model.chat(processor, image, "Read the text.", history=history, **options)  # its cache gave way
        answers.append([first, second, other, again])
    assert answers[0] == answers[1] and answers[0][0] and answers[0][1] == answers[0][3]


@llama_cpp
def test_what_was_read_is_not_read_again(nano_gguf, monkeypatch):
    processor, model = load_processor(ROOT), engine(ROOT, nano_gguf)
    read, counts = model.engine.read, []
    monkeypatch.setattr(model.engine, "read", lambda given, every: counts.append(len(given)) or read(given, every))
    image = str(ROOT / "assets" / "example.png")
    _, history = model.chat(processor, image, "Read the text.", return_history=True, max_new_tokens=5)
    model.chat(processor, image, "Again?", history=history, max_new_tokens=5)
    assert counts[1] < counts[0] / 4


@llama_cpp
def test_an_engine_refuses_what_it_cannot_do(nano_gguf, tmp_path):
    processor, model = load_processor(ROOT), engine(ROOT, nano_gguf, context_length=64)
    image = str(ROOT / "assets" / "example.png")
    with pytest.raises(ValueError, match="follows one answer, got num_beams=2"):
        model.chat(processor, image, "Read.", num_beams=2)
    with pytest.raises(ValueError, match="do not fit into llama.cpp's context of 64"):
        model.chat(processor, image, "Read.")
    with pytest.raises(ValueError, match="scores by layer 1, but torch has 0 layers"):
        model.chat(processor, image, "Read.", use_scm=True)
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.batch_chat(processor, [image, image], ["Read.", "Read."])
    with pytest.raises(ValueError, match="right up to 4096 tokens, not 5000"):
        engine(ROOT, nano_gguf, context_length=5000)
    with pytest.raises(ValueError, match="was not exported from"):
        engine(_with_fewer_layers(tmp_path / "other"), nano_gguf)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match="is no GGUF file, or is damaged"):
        engine(ROOT, tmp_path / "broken.gguf")


@llama_cpp
def test_chat_with_the_engine(nano_gguf, capsys):
    assert_chat_answers_as_torch(capsys, "--engine", "llama.cpp", "--gguf", str(nano_gguf))


@llama_cpp
def test_llama_cpp_by_itself_sees_the_same_tile(nano_gguf, tmp_path):
    """Of an image in one tile; of larger ones it cuts other tiles. Its tokenizer reads the prompt as ours does."""
    from minimonkey.scripts.engines.libllama import LibLlama
    from minimonkey.scripts.engines.mtmd import PlainLlamaCpp

    export_gguf(str(ROOT), tmp_path / "nano.gguf", "F16", tmp_path / "mmproj.gguf")
    language = LibLlama(tmp_path / "nano.gguf", 1024, 1)
    alone = PlainLlamaCpp(language, tmp_path / "mmproj.gguf", 1)
    image = Image.open(ROOT / "assets" / "example.png").convert("RGB").resize((112, 112))
    before, seen, after = alone.chunks(image, "<|im_start|>user\n<__media__>\nThe total, 5.00 \u20ac?<|im_end|>")
    processor, model = load_processor(ROOT), load_model(ROOT, dtype=torch.float32)
    tiles = processor.image_processor(image, tiling="internvl", min_tiles=1, max_tiles=1)["pixel_values"]
    with torch.no_grad():
        features = model.encode_tiles(torch.as_tensor(tiles))[-1]
    assert (torch.from_numpy(seen) - features).abs().max() <= 0.01 * features.std()
    text = "<|im_start|>user\n<img></img>\nThe total, 5.00 \u20ac?<|im_end|>"
    assert [*before, *after][1:] == processor.tokenizer(text, add_special_tokens=False).input_ids
