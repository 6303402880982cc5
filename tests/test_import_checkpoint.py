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
from sentencepiece_helpers import write_internlm2_folder
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from minimonkey.scripts.import_checkpoint import import_checkpoint, main
from minimonkey.scripts.importing import weights
from minimonkey.scripts.importing.folder import new_folder


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


@pytest.mark.parametrize(
    ("name", "tiles"), [("Mini-InternVL2-2B-DA-Drivelm", (1, 12, 1, 1)), ("InternVL2-2B", (4, 12, 3, 7))]
)
def test_adapted_models_keep_the_tile_ranges_they_were_trained_with(published, tmp_path, name, tiles):
    import_checkpoint(str(published.rename(tmp_path / name)), tmp_path / "out", IMAGE_TOKEN)
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (loaded.min_tiles, loaded.max_tiles, loaded.adaptive_min_tiles, loaded.adaptive_max_tiles) == tiles


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


# --- what strangers write --------------------------------------------------------------------------------------------


def set_config(**values):
    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in values.items():
            *sections, last = name.split("__")
            part = config
            for section in sections:
                part = part[section]
            part[last] = value
        path.write_text(json.dumps(config))

    return damage


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def index_of(weight_map):
    return write(weights.INDEX_NAME, json.dumps({"weight_map": weight_map}))


def set_weight(value):
    """Fill one weight, which keeps its type where the value has none of its own."""

    def change(tensors):
        name = "mlp1.3.bias"
        given = torch.as_tensor(value)
        tensors[name] = given.expand(tensors[name].shape).contiguous()

    return lambda folder: change_weights(folder, change)


def put_a_tensor_twice(folder):
    split_into_shards(folder)
    second = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    save_file({**load_file(second), name: first[name]}, second)


def rewrite_header(change):
    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return damage


def name_a_tensor_twice(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entry = json.dumps(json.loads(content[8:end])["mlp1.3.bias"]).encode()
    text = content[8:end].rstrip()[:-1] + b', "mlp1.3.bias": ' + entry + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def shape_a_fused_key(shape):
    name = "language_model.model.layers.0.attention.wqkv.weight"
    return lambda folder: change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))


def set_tokenizer(**values):
    def damage(folder):
        (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(values))

    return damage


def claim_a_long_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("config.json", "[]"), "must hold a JSON object"),
        (write("config.json", "[" * 200_000), "not valid JSON"),
        (write("config.json", "\x00\x01"), "not valid JSON"),
        (set_config(vision_config=5), "vision_config must be an object"),
        (set_config(llm_config=[]), "llm_config must be an object"),
        (set_config(llm_config__num_hidden_layers=1e9), "num_hidden_layers must be a whole number"),
        (set_config(llm_config__num_hidden_layers=10**9), "num_hidden_layers must be a whole number"),
        (set_config(llm_config__num_hidden_layers="24"), "num_hidden_layers must be a whole number"),
        (set_config(vision_config__num_hidden_layers=1500), "1500 layers, but the checkpoint holds"),
        (set_config(llm_config__vocab_size=10**12), "vocab_size must be a whole number"),
        (set_config(llm_config__hidden_size=True), "hidden_size must be a whole number"),
        (set_config(llm_config__num_key_value_heads=0), "num_key_value_heads must be a whole number"),
        (set_config(llm_config__rope_theta={}), "config.json"),
        (set_config(torch_dtype=[1, 2]), "config.json"),
        (set_weight(torch.tensor(1j)), "mlp1.3.bias is of type C64"),
        (set_weight(torch.tensor(1)), "mlp1.3.bias is of type I64"),
        (set_weight(torch.tensor(True)), "mlp1.3.bias is of type BOOL"),
        (set_weight(torch.tensor(1.0).to(torch.float8_e4m3fn)), "mlp1.3.bias is of type F8_E4M3"),
        (set_weight(float("nan")), "mlp1.3.bias holds values that are not finite"),
        (set_weight(float("-inf")), "mlp1.3.bias holds values that are not finite"),
        (put_a_tensor_twice, "Several files hold the same tensors"),
        (write(weights.INDEX_NAME, "5"), "must hold a JSON object"),
        (index_of(5), "must have a weight_map"),
        (index_of({"a": 5}), "must have a weight_map"),
        (index_of({"a": "../published/model.safetensors"}), r"names the file '../published/model.safetensors'"),
        (index_of({"a": "/etc/passwd"}), "names the file '/etc/passwd'"),
        (index_of({"a": "model.bin"}), "names the file 'model.bin'"),
        (index_of({}), "must have a weight_map"),
        (
            write(weights.INDEX_NAME, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
            "'a' is there twice",
        ),
        (name_a_tensor_twice, "'mlp1.3.bias' is there twice"),
        (shape_a_fused_key(()), "without values"),
        (shape_a_fused_key((0, 64)), "without values"),
        (set_tokenizer(tokenizer_class=5), "tokenizer_class must be of type str"),
        (set_tokenizer(auto_map=[1]), "auto_map must be of type dict"),
        (set_tokenizer(bos_token=[]), "bos_token must be a token"),
        (set_tokenizer(pad_token={"content": 5}), "pad_token must be a token"),
        (set_tokenizer(model_max_length="8"), "model_max_length must be a number"),
        (set_tokenizer(added_tokens_decoder=[]), "added_tokens_decoder must be of type dict"),
        (write("vocab.json", "[]"), "must hold a JSON object"),
        (write("vocab.json", "{}"), "without merges.txt"),
        (set_config(llm_config__num_hidden_layers=3), "unexpected: language_model.model.layers.3"),
        (claim_a_long_header, "damaged or truncated"),
        (rewrite_header(lambda header: header["mlp1.3.bias"].update(data_offsets=[0, 8])), "damaged or truncated"),
        (rewrite_header(lambda header: header["mlp1.3.bias"].update(shape=[-1])), "damaged or truncated"),
    ],
)
def test_what_strangers_write_is_refused_in_one_line(published, tmp_path, damage, message, capsys, monkeypatch):
    damage(published)
    before = {path.name: path.read_bytes() for path in published.iterdir()}
    arguments = [str(published), str(tmp_path / "out"), "--image-token-id", str(IMAGE_TOKEN)]
    monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", *arguments])
    assert main() == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert message.replace("\\", "") in said
    assert said.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"published"}
    assert {path.name: path.read_bytes() for path in published.iterdir()} == before


def test_names_that_lead_out_are_refused_before_a_file_is_opened(published, tmp_path, monkeypatch):
    index_of({"a": "../secret.safetensors"})(published)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    monkeypatch.setattr(weights, "safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match="names the file"):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)


def test_weights_that_lie_elsewhere_may_be_linked(published, tmp_path):
    (tmp_path / "links").mkdir()
    for path in published.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    import_checkpoint(str(tmp_path / "links"), tmp_path / "out", IMAGE_TOKEN)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_cache_of_the_hub_with_its_links_is_imported(published, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(published.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    import_checkpoint(str(snapshot), tmp_path / "out", IMAGE_TOKEN)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


# --- the folder where it is made -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.tex", "import.json", "unfinished-minimonkey.json"])
def test_a_partial_folder_that_is_not_ours_is_left_alone(published, tmp_path, name):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / name).write_text("{}")
    with pytest.raises(ValueError, match="out.partial exists and is not an unfinished import; move it away"):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert [path.name for path in partial.iterdir()] == [name]


def test_two_imports_to_one_folder(published, tmp_path):
    with new_folder(tmp_path / "out", "another source"):
        with pytest.raises(ValueError, match="Another run is writing"):
            import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
        (tmp_path / "out.partial" / "config.json").write_text("{}")
        (tmp_path / "out.partial" / weights.SINGLE_NAME).write_bytes(b"")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_an_unfinished_import_of_another_source_is_replaced(published, tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", "another source") as work:
        (work / "rest").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "out.partial" / "rest").exists()
    import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert not (tmp_path / "out" / "rest").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if "unfinished" in path.name]


def test_a_run_that_is_killed_at_its_end_does_not_stand_in_the_way(published, tmp_path, monkeypatch):
    replace = Path.replace

    def killed(path, target):
        if path.name == "out.partial":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    monkeypatch.setattr(Path, "replace", replace)
    import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert not [path for path in (tmp_path / "out").iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("taken", ["model.safetensors", "config.json"])
def test_a_folder_without_its_weights_is_no_success(published, tmp_path, monkeypatch, taken):
    write_settings = sys.modules[import_checkpoint.__module__].write_settings

    def take_away(work, *args):
        write_settings(work, *args)
        (work / taken).unlink()

    monkeypatch.setattr(sys.modules[import_checkpoint.__module__], "write_settings", take_away)
    with pytest.raises(ValueError, match=f"lacks {taken}"):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_is_said_and_costs_the_rest_alone(published, tmp_path, monkeypatch, room):
    split_into_shards(published)
    save_file, written = weights.save_file, []

    def save(tensors, path, **options):
        if len(written) == room:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights, "save_file", save)
    with pytest.raises(OSError, match="could not be written: .*No space left"):
        import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)
    left = [path.name for path in (tmp_path / "out.partial").glob("*.safetensors")] if room else []
    assert len(left) == room
    assert (tmp_path / "out.partial").exists() == bool(room)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(weights, "save_file", save_file)
    import_checkpoint(str(published), tmp_path / "out", IMAGE_TOKEN)


def test_a_file_in_the_place_of_the_folder_above(published, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        import_checkpoint(str(published), tmp_path / "file" / "out", IMAGE_TOKEN)
