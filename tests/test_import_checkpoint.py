"""import_checkpoint.py as a user runs it: the command, a whole folder, and every way a checkpoint can be broken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor


sys.path.insert(0, str(ROOT / "scripts"))
from import_checkpoint import import_checkpoint  # noqa: E402
from test_import_tokenizer import write_internlm2_folder  # noqa: E402

from importing import weights  # noqa: E402


IMAGE_TOKEN = 500


@pytest.fixture
def published(tmp_path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "models" / "internlm2" / name, folder)
    return folder


def split_into_shards(folder: Path, shards: int = 2) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / weights.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_command(published, tmp_path):
    command = [sys.executable, "scripts/import_checkpoint.py", str(published), str(tmp_path / "out")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--image-token-id" in refused.stderr
    assert not (tmp_path / "out").exists()
    subprocess.run([*command, "--image-token-id", str(IMAGE_TOKEN)], cwd=ROOT, check=True, capture_output=True)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.image_token_id == IMAGE_TOKEN
    assert not (tmp_path / "out.partial").exists()


def test_shards_give_the_same_model_as_one_file(published, tmp_path):
    import_checkpoint(str(published), tmp_path / "one", IMAGE_TOKEN)
    split_into_shards(published)
    import_checkpoint(str(published), tmp_path / "two", IMAGE_TOKEN)
    one, two = (AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True) for name in ("one", "two"))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_checkpoint_with_its_tokenizer_chats(published, tmp_path):
    pytest.importorskip("sentencepiece")
    tokens = write_internlm2_folder(published)
    import_checkpoint(str(published), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.image_token_id == tokens["<IMG_CONTEXT>"] == processor.image_token_id
    assert model.generation_config.eos_token_id == tokens["<|im_end|>"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.startswith("<s><|im_start|>system\n你是由上海人工智能实验室")
    picture = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert isinstance(model.chat(processor, picture, "Read.", max_new_tokens=3), str)


def test_interrupted_import_goes_on(published, tmp_path, monkeypatch):
    split_into_shards(published)
    out, written = tmp_path / "out", []
    convert_shard = weights._convert_shard

    def stop_at_the_second(shard, target, *args):
        if written:
            raise KeyboardInterrupt
        written.append(target.name)
        convert_shard(shard, target, *args)

    monkeypatch.setattr(weights, "_convert_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(published), out, IMAGE_TOKEN)
    assert not out.exists()
    again = []
    monkeypatch.setattr(
        weights,
        "_convert_shard",
        lambda shard, target, *args: (again.append(target.name), convert_shard(shard, target, *args)),
    )
    import_checkpoint(str(published), out, IMAGE_TOKEN)
    assert len(again) == 1
    assert again != written
    AutoModel.from_pretrained(out, trust_remote_code=True)


def remove_a_key(folder):
    change_weights(folder, lambda tensors: tensors.pop("mlp1.1.weight"))


def add_a_key(folder):
    change_weights(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))


def misshape_a_key(folder):
    change_weights(folder, lambda tensors: tensors.update({"language_model.output.weight": torch.zeros(511, 64)}))


def misshape_a_fused_key(folder):
    name = "language_model.model.layers.0.attention.wqkv.weight"
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(127, 64)}))


def truncate_a_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_a_shard(folder):
    split_into_shards(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_a_shard(folder):
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def falsify_the_index(folder):
    split_into_shards(folder)
    path = folder / weights.INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"]["mlp1.9.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def remove_the_weights(folder):
    (folder / "model.safetensors").unlink()


def remove_the_config(folder):
    (folder / "config.json").unlink()


def break_the_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_key, r"missing: model.multi_modal_projector.linear_1.weight \(64, 256\)"),
        (add_a_key, "unexpected: extra.weight"),
        (misshape_a_key, r"language_model.output.weight gives lm_head.weight \(511, 64\).* wants \(512, 64\)"),
        (misshape_a_fused_key, "layers.0.attention.wqkv.weight: .*127 rows does not fit 4 heads"),
        (truncate_a_file, "model.safetensors is damaged or truncated"),
        (truncate_a_shard, "model-00002-of-00002.safetensors is damaged or truncated"),
        (remove_a_shard, "lacks model-00002-of-00002.safetensors"),
        (falsify_the_index, "missing mlp1.9.weight"),
        (remove_the_weights, "holds neither"),
        (remove_the_config, "no config.json"),
        (break_the_config, "not valid JSON"),
    ],
)
def test_broken_checkpoints_are_refused_before_anything_is_written(published, tmp_path, damage, message):
    damage(published)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_image_token_of_tokenizer_and_argument_may_not_differ(published, tmp_path):
    pytest.importorskip("sentencepiece")
    write_internlm2_folder(published)
    with pytest.raises(ValueError, match="contradict"):
        import_checkpoint(str(published), tmp_path / "out", 7)


def test_folder_that_exists_is_left_alone(published, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_missing_source(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        import_checkpoint(str(tmp_path / "nowhere"), tmp_path / "out", IMAGE_TOKEN)
