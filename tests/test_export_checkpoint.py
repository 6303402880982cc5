"""export_checkpoint.py: the published layout, read by import_checkpoint.py as the same model again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import language_folder
from conftest import FIXTURES, ROOT
from model_helpers import tiny_mono
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from minimonkey.scripts import export_checkpoint as command
from minimonkey.scripts.assemble import assemble
from minimonkey.scripts.export_checkpoint import export_checkpoint
from minimonkey.scripts.import_checkpoint import import_checkpoint


def nano(folder: Path) -> Path:
    return ROOT


def assembled(model_type: str, template: str):
    def make(folder: Path) -> Path:
        options = {"pad_token_id": 0, "eos_token_id": 1} if model_type == "phi3" else {}
        language = language_folder(folder / "language", model_type, **options)
        vision = FIXTURES / "models" / "internlm2"
        assemble(str(vision), str(language), folder / "model", template, torch.float32)
        return folder / "model"

    return make


# What tells where a part came from, and what other language models than Qwen2 and Phi-3 have.
ORIGIN = {"dtype", "architectures", "_name_or_path", "head_dim"}
KINDS = {
    "nano": (nano, False),
    "nano-internlm2": (nano, True),
    "qwen2": (assembled("qwen2", "Hermes-2"), False),
    "phi3": (assembled("phi3", "phi3-chat"), False),
}


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_import_of_an_export_is_the_same_model(kind, tmp_path):
    make, as_internlm2 = KINDS[kind]
    folder = make(tmp_path)
    export_checkpoint(str(folder), tmp_path / "published", as_internlm2)
    import_checkpoint(str(tmp_path / "published"), tmp_path / "again")
    assert_same_weights(folder, tmp_path / "again")
    before, after = (AutoConfig.from_pretrained(path, trust_remote_code=True) for path in (folder, tmp_path / "again"))
    for part in ("text_config", "vision_config"):
        one, other = (getattr(config, part).to_dict() for config in (before, after))
        assert {name: value for name, value in one.items() if other.get(name) != value}.keys() <= ORIGIN
    for name in (
        "image_token_id",
        "tile_size",
        "template",
        "pixel_shuffle_version",
        "scm_keep_ratio",
        "downsample_ratio",
    ):
        assert getattr(before, name) == getattr(after, name)
    before, after = (
        AutoProcessor.from_pretrained(path, trust_remote_code=True) for path in (folder, tmp_path / "again")
    )
    messages = [{"role": "user", "content": "Read the all text, 5.00 <|im_end|>"}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ids = [torch.as_tensor(one.apply_chat_template(messages, **options)["input_ids"]) for one in (before, after)]
    assert torch.equal(*ids)


def test_what_was_published_comes_out_again(tmp_path):
    """Names, fused q, k, v and values of a checkpoint in the published format, after an import and an export."""
    published = FIXTURES / "models" / "internlm2"
    import_checkpoint(str(published), tmp_path / "ours", image_token_id=500)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", as_internlm2=True)
    assert_same_weights(published, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "out"))
    for part in ("llm_config", "vision_config"):
        ignored = {"attn_implementation", "eos_token_id", "pad_token_id"}
        assert {name: value for name, value in before[part].items() if name not in ignored} == {
            name: after[part].get(name) for name in before[part] if name not in ignored
        }


def test_other_programs_find_the_parts_by_transformers(tmp_path):
    """As LMDeploy and vLLM read it: the configuration by its code, the tokenizer by its class, in a Llama's names."""
    export_checkpoint(str(ROOT), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.model_type == "internvl_chat"
    assert config.llm_config.architectures == ["LlamaForCausalLM"]
    assert config.llm_config.hidden_size == 192
    assert config.vision_config.image_size == 112
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = AutoTokenizer.from_pretrained(ROOT)
    assert tokenizer("Read.")["input_ids"] == [own.bos_token_id, *own("Read.", add_special_tokens=False)["input_ids"]]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked.startswith("<s><|im_start|>system\n")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["added_tokens_decoder"]["379"]["content"] == "<IMG_CONTEXT>"
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in names


def test_visual_experts_are_written_as_internlm2(tmp_path):
    mono = tiny_mono()
    mono.save_pretrained(tmp_path / "mono")
    with pytest.raises(ValueError, match="add --internlm2"):
        export_checkpoint(str(tmp_path / "mono"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_checkpoint(str(tmp_path / "mono"), tmp_path / "out", as_internlm2=True)
    import_checkpoint(str(tmp_path / "out"), tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config.visual_experts
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in mono.state_dict().items())


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("minimonkey.scripts.export_checkpoint.MOST_SHARD_BYTES", 2 * 10**6)
    export_checkpoint(str(ROOT), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    import_checkpoint(str(tmp_path / "out"), tmp_path / "again")
    tensors = {}
    for path in (tmp_path / "again").glob("*.safetensors"):
        tensors |= load_file(path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(ROOT / "model.safetensors").items())


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    def run(*arguments) -> tuple[int, str]:
        status = command.main([*map(str, arguments)])
        return status, "".join(capsys.readouterr())

    status, said = run(ROOT, tmp_path / "out", "--layout", "published")
    assert status == 0 and "published layout" in said
    status, said = run(ROOT, tmp_path / "out")
    assert status == 1 and "exists already" in said
    status, said = run(tmp_path / "out", tmp_path / "twice")
    assert status == 1 and "no MiniMonkey in its own format" in said
    (tmp_path / "broken").mkdir()
    shutil.copy(ROOT / "config.json", tmp_path / "broken")
    status, said = run(tmp_path / "broken", tmp_path / "none")
    assert status == 1 and "holds neither" in said
    language = language_folder(tmp_path / "language", "mistral")
    assemble(str(FIXTURES / "models" / "internlm2"), str(language), tmp_path / "mistral", "chatml", torch.float32)
    status, said = run(tmp_path / "mistral", tmp_path / "none")
    assert status == 1 and "has no language model 'mistral'" in said
    assert not (tmp_path / "none").exists()
