"""Other ways from vision tower to language model: the resampler and patch mining, alone, in a model, and trained by recipes."""

import json

import pytest
import torch
from checkpoint_helpers import language_folder
from conftest import FIXTURES, ROOT, random_tiles
from image_helpers import square
from model_helpers import IMAGE_TOKEN, TINY_TEXT, TINY_VISION
from training_helpers import write_recipe
from transformers import AutoModel, AutoProcessor

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.image_inputs import ImageInputs
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.projectors import PatchMining, Resampler, plane_sinusoids
from minimonkey.scripts import assemble, export_checkpoint, finetune
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.encode import Conversation, Encoder
from minimonkey.scripts.training.grafting import graft_processor, grafted_config
from minimonkey.scripts.training.recipe import read_recipe


RECIPES = ROOT / "scripts" / "training" / "recipes"


def tiny(**options):
    torch.manual_seed(0)
    config = MiniMonkeyConfig(
        vision_config=dict(TINY_VISION),
        text_config={"model_type": "llama", **TINY_TEXT},
        image_token_id=IMAGE_TOKEN,
        **options,
    )
    return MiniMonkeyForConditionalGeneration(config).eval()


# --- the resampler ---------------------------------------------------------------------------------------------------


def test_places_by_hand():
    table = plane_sinusoids(2, 3, 8)
    for row in range(2):
        for column in range(3):
            angles = [(column, 1.0), (column, 0.01), (row, 1.0), (row, 0.01)]
            sines, cosines = ([f(torch.tensor(p * w)) for p, w in angles] for f in (torch.sin, torch.cos))
            expected = [*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]
            assert torch.allclose(table[row, column], torch.stack(expected), atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        plane_sinusoids(2, 2, 6)


def make_resampler(kv_width=24, width=256, queries=6) -> Resampler:
    torch.manual_seed(1)
    resampler = Resampler(kv_width, width, queries).eval()
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return resampler


@torch.no_grad()
def test_a_resampler_is_one_attention_written_out():
    resampler, patches = make_resampler(), torch.randn(2, 3, 4, 24)
    x = resampler.ln_kv(resampler.kv_proj(patches)).flatten(1, 2)
    q, k, v = (
        part @ weight.T + bias
        for part, weight, bias in zip(
            (resampler.ln_q(resampler.query), x + plane_sinusoids(3, 4, 256).flatten(0, 1), x),
            resampler.attn.in_proj_weight.chunk(3),
            resampler.attn.in_proj_bias.chunk(3),
        )
    )
    heads = [
        (q[:, part] @ k[..., part].transpose(1, 2) / 128**0.5).softmax(dim=-1) @ v[..., part]
        for part in (slice(0, 128), slice(128, 256))
    ]
    read = torch.cat(heads, dim=-1) @ resampler.attn.out_proj.weight.T + resampler.attn.out_proj.bias
    assert torch.allclose(resampler(patches), resampler.ln_post(read) @ resampler.proj, atol=1e-4)


@torch.no_grad()
def test_a_resampler_knows_places_not_the_order_of_patches():
    resampler, patches = make_resampler(), torch.randn(1, 3, 4, 24)
    assert resampler(patches).shape == (1, 6, 256)
    assert not torch.allclose(resampler(patches), resampler(patches.flip(2)), atol=1e-3)
    assert resampler(torch.randn(2, 5, 2, 24)).shape == (2, 6, 256)


def test_weights_have_the_published_names():
    names = {"query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"}
    names |= {f"{part}.{kind}" for part in ("attn.out_proj", "ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")}
    assert set(make_resampler().state_dict()) == names
    assert "kv_proj.weight" not in make_resampler(kv_width=256).state_dict()
    assert make_resampler(width=2304, queries=2).attn.num_heads == 18 and make_resampler(width=60).attn.num_heads == 1


@torch.no_grad()
def test_a_model_with_a_resampler_is_saved_and_loaded(tmp_path):
    model = tiny(projector="resampler", resampler_queries=5)
    assert model.config.image_seq_length == 5
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.config.projector == "resampler" and type(again.model.multi_modal_projector).__name__ == "Resampler"
    tiles = random_tiles(1, 3, 3, 28, 28)
    assert torch.equal(model.encode_tiles(tiles), again.encode_tiles(tiles)) and model.encode_tiles(tiles).shape[1] == 5
    with pytest.raises(ValueError, match="has a resampler"):
        _ = again.mlp1


@torch.no_grad()
def test_padded_rows_with_a_resampler_give_what_they_give_alone():
    model = tiny(projector="resampler", resampler_queries=4)
    rows = torch.randint(3, 50, (2, 16))
    rows[0, 3:11], rows[1, 6:10] = IMAGE_TOKEN, IMAGE_TOKEN
    mask = torch.ones_like(rows)
    rows[1, :3], mask[1, :3] = 0, 0
    tiles = random_tiles(2, 3, 3, 28, 28)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    both = model.generate(input_ids=rows, attention_mask=mask, pixel_values=tiles, **options)[:, 16:]
    for row, own in enumerate((tiles[:2], tiles[2:])):
        ids = rows[row : row + 1, mask[row].bool()]
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=own, **options)
        assert torch.equal(alone[0, ids.shape[1] :], both[row])


def test_compression_by_places_is_refused_where_tokens_have_none():
    model = tiny(projector="resampler", resampler_queries=4)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 28, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": random_tiles(2, 7, 3, 28, 28), "tile_counts": torch.tensor([[4, 2, 1]])}
    inputs["tile_grids"] = torch.tensor([[2, 2, 2, 1]])
    (kept,) = model.kept_positions(**inputs)
    assert len(kept) == 31 - 8
    for select in ("smooth", "block", "tile", "coordinates"):
        with pytest.raises(ValueError, match="no place in the image"):
            model.kept_positions(**inputs, scm_select=select)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"projector": "qformer"}, "projector is one of"),
        ({"projector": "resampler", "resampler_queries": 0}, "at least 1"),
    ],
)
def test_configurations_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        tiny(**options)


# --- patch mining ----------------------------------------------------------------------------------------------------


def make_mining(width=8) -> PatchMining:
    torch.manual_seed(2)
    mining = PatchMining(width).eval()
    for parameter in mining.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mining


@torch.no_grad()
def test_a_patch_hears_its_own_region_alone():
    mining, thumbnail = make_mining(), torch.randn(4, 4, 8)
    tiles = torch.randn(2, 3, 4, 4, 8)  # 2 rows of 3 tiles: each patch owns 2 x 3 of the 8 x 12
    before = mining(thumbnail, tiles)
    for y, x in ((0, 0), (5, 7), (7, 11)):
        changed = tiles.clone()
        changed[y // 4, x // 4, y % 4, x % 4] = torch.randn(8)
        differs = (mining(thumbnail, changed) != before).any(dim=-1).nonzero().tolist()
        assert differs == [[y // 2, x // 3]]


@torch.no_grad()
def test_equal_keys_give_the_mean_and_a_loud_one_its_value():
    mining, thumbnail, tiles = make_mining(), torch.randn(2, 2, 8), torch.randn(1, 2, 2, 2, 8)
    for parameter in mining.key.parameters():
        parameter.zero_()
    stitched = tiles.permute(0, 2, 1, 3, 4).reshape(2, 4, 8)
    expected = mining.value(stitched.unflatten(1, (2, 2))).mean(dim=2)
    assert torch.allclose(mining(thumbnail, tiles) - thumbnail, expected, atol=1e-5)


@torch.no_grad()
def test_a_grafted_model_begins_with_the_thumbnail_alone():
    plain, mined = tiny(), tiny(mining=True)
    mined.load_state_dict(plain.state_dict(), strict=False)
    assert not mined.model.mining.value[1].weight.any() and mined.model.mining.key[1].weight.any()
    tiles = random_tiles(1, 7 + 1, 3, 28, 28)
    counts, grids = torch.tensor([[6, 0, 1], [0, 0, 1]]), torch.tensor([[3, 2, 1, 1], [1, 1, 1, 1]])
    features = mined.image_features(ImageInputs(tiles, counts, grids))
    assert torch.equal(features, plain.encode_tiles(tiles[[6, 7]]))
    torch.nn.init.normal_(mined.model.mining.value[1].weight)
    other = mined.image_features(ImageInputs(tiles, counts, grids))
    assert not torch.allclose(other[0], features[0]) and torch.equal(other[1], features[1])


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """Nano with patch mining whose answers are not zero, and its processor, as they are loaded."""
    folder = tmp_path_factory.mktemp("mined")
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    config = MiniMonkeyConfig.from_pretrained(ROOT)
    config = MiniMonkeyConfig(**{**config.to_dict(), "mining": True})
    model = MiniMonkeyForConditionalGeneration.from_pretrained(ROOT, config=config, dtype=torch.float32)
    assert not model.model.mining.value[1].weight.any()
    torch.nn.init.normal_(model.model.mining.value[1].weight, std=0.5)
    model.save_pretrained(folder)
    processor.mining, processor.image_processor.tiling = True, "internvl"
    processor.save_pretrained(folder)
    return (
        AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    )


RANGES = {"min_tiles": 4, "max_tiles": 9}


def test_an_image_has_the_tokens_of_one_tile(mined, pictures):
    model, processor = mined
    inputs = processor(pictures[0], "<image>\nRead.", images_kwargs=RANGES)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 49 < 49 * len(inputs["pixel_values"])
    sizes = [(image.height, image.width) for image in pictures]
    assert processor._get_num_multimodal_tokens(sizes, **RANGES).num_image_tokens == [51] * 3


def test_chat_and_batches_and_later_turns_of_a_mined_model(mined, pictures):
    model, processor = mined
    options = {"images_kwargs": RANGES, "max_new_tokens": 6, "do_sample": False}
    answer, history = model.chat(processor, pictures[0], "Read.", return_history=True, **options)
    later = model.chat(processor, pictures[0], "And?", history, **options)
    assert later == model.chat(processor, pictures[0], "And?", list(history), remember=False, **options)
    assert model.batch_chat(processor, pictures[:2], ["Read."] * 2, **options)[0] == answer
    tiles = processor.image_processor(pictures[0], return_tensors="pt", **RANGES)
    grid = tuple(tiles["tile_grids"][0, :2].tolist())
    options.pop("images_kwargs")
    by_hand = model.chat(processor, tiles["pixel_values"], "Read.", target_aspect_ratio=grid, **options)
    assert by_hand == answer


def test_what_mining_cannot_read_is_refused_by_name(mined, pictures):
    model, processor = mined
    for options, said in (
        ({"preset": "default", "tiling": "msac"}, "adaptive"),
        ({"tiling": "slices"}, "square tiles"),
        ({"use_thumbnail": False, **RANGES}, "thumbnail"),
    ):
        with pytest.raises(ValueError, match=said):
            model.chat(processor, pictures[0], "Read.", images_kwargs=options, max_new_tokens=1)
    with pytest.raises(ValueError, match="nothing to leave out"):
        model.chat(processor, pictures[0], "Read.", use_scm=True, max_new_tokens=1)
    with pytest.raises(ValueError, match="target_aspect_ratio"):
        model.chat(processor, random_tiles(1, 5, 3, 112, 112), "Read.", max_new_tokens=1)
    inputs = dict(processor(pictures[0], "<image>\nRead.", images_kwargs=RANGES))
    with pytest.raises(ValueError, match="tile_counts"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano-resampler", "nano-mining"])
def test_a_recipe_runs_and_what_it_trains_loads(name, tmp_path, pictures):
    words = {"words": {"synthetic": "word", "length": 8}, "receipts": {"synthetic": "receipt", "length": 4}}
    few = {"max_steps": 3, "batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}
    options = {"data": words, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "dataloader_num_workers": 0}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in {**few, **options, "model": str(ROOT)}.items()]
    assert finetune.main([str(RECIPES / f"{name}.yaml"), *sets]) == 0
    model = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    recipe = read_recipe(RECIPES / f"{name}.yaml", ["use_cpu=true", "bf16=false"])
    assert processor.image_processor.tiling == recipe.tiling and model.config.mining == recipe.mining
    if recipe.mining:
        assert model.model.mining.value[1].weight.any()  # it has learned
    else:
        assert model.config.projector == "resampler" and processor.image_seq_length == 64
    answer = model.chat(processor, pictures[0], "Read.", images_kwargs={"max_tiles": 4}, max_new_tokens=3)
    assert isinstance(answer, str)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resampler_queries": 8}, "belong to projector: resampler"),
        ({"projector": "resampler"}, "name the projector in train"),
        ({"mining": True, "lora_r": 4}, "without LoRA"),
        ({"tiling": "spiral"}, "tiling is one of"),
        ({"tiling": "slices", "mining": True, "train": ["projector"]}, "square tiles"),
    ],
)
def test_grafts_that_do_not_go_together_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(write_recipe(tmp_path, **options))


def test_mining_wants_a_grid_without_adaptive_tiles(tmp_path, capsys):
    recipe = write_recipe(tmp_path, train=["projector"], mining=True, tiling="msac-relaxed", depth=None)
    with pytest.raises(SystemExit):
        finetune.main([str(recipe)])
    assert "tiling is internvl, logscore or relaxed" in capsys.readouterr().err


# --- assembling and exporting ----------------------------------------------------------------------------------------


def test_parts_are_joined_by_a_resampler_for_slices(tmp_path, pictures):
    language = language_folder(tmp_path / "language", "qwen3", tie_word_embeddings=True)
    arguments = [FIXTURES / "models" / "internlm2", language, tmp_path / "out", "--dtype", "float32"]
    arguments += ["--projector", "resampler", "--queries", "6", "--tiling", "slices"]
    assert assemble.main([*map(str, arguments)]) == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    side = model.config.tile_size
    assert processor.image_processor.size == square(side) and processor.image_seq_length == 6
    inputs = processor(pictures[0], "<image>\nRead.", images_kwargs={"max_tiles": 4})
    views = int(inputs["tile_counts"].sum())
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 6 * views > 6
    start = processor.tokenizer.convert_tokens_to_ids("<slice>")
    assert int((inputs["input_ids"] == start).sum()) == 1
    assert isinstance(model.chat(processor, pictures[0], "Hi", images_kwargs={"max_tiles": 4}, max_new_tokens=2), str)
    with pytest.raises(SystemExit):
        assemble.main([*map(str, arguments[:2]), str(tmp_path / "other"), "--queries", "6"])


@pytest.mark.parametrize("options", [{"projector": "resampler"}, {"mining": True}])
def test_what_the_published_layout_has_no_place_for_is_not_exported(tmp_path, options, capsys):
    tiny(**options).save_pretrained(tmp_path / "model")
    assert export_checkpoint.main([str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "no place for" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- training data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["slices", "internvl"])
def test_lengths_are_known_from_sizes_and_batches_join(tiling, pictures, tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    config = MiniMonkeyConfig.from_pretrained(ROOT)
    is_mined = tiling == "internvl"
    recipe = read_recipe(write_recipe(tmp_path, train=["projector"], tiling=tiling, mining=is_mined, depth=None))
    config = grafted_config(config, recipe)
    graft_processor(processor, config, recipe)
    encoder, samples = Encoder(processor, config), []
    for image in pictures:
        talk = Conversation((("<image>\nRead.", "A word"), ("Again.", "A word")))
        sample = encoder(talk, [image], (1, 6, 1, 1))
        tokens, tiles = encoder.image_size([(image.height, image.width)], (1, 6, 1, 1))
        assert encoder.text_length(talk, 1) + tokens == len(sample["input_ids"])
        assert tiles == int(sample["tile_counts"].sum())
        samples.append(sample)
    collator = Collator(0, config.image_token_id, 49, 112, True, is_mined=is_mined)
    batch = collator(samples)
    names = {"pixel_values"} if is_mined else {"slice_values", "slice_sizes"}
    assert names | {"tile_counts", "tile_grids", "input_ids", "labels", "redrawn"} == set(batch)
    batch.pop("redrawn")
    model = MiniMonkeyForConditionalGeneration.from_pretrained(ROOT, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        together = model(**batch).logits
        collated = collator(samples[1:2])
        collated.pop("redrawn")
        alone = model(**collated).logits
    assert torch.allclose(together[1, : alone.shape[1]], alone[0], atol=1e-4)
    text = {"input_ids": torch.tensor([1, 5, 6]), "labels": torch.tensor([-100, 5, 6])}
    only_text = collator([text])
    only_text.pop("redrawn")
    assert model(**only_text).loss.isfinite()  # with a black tile behind its end, for sharded runs
