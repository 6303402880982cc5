"""Scale compression: the published positions, attention weights as judge, batches, every way to generate, chat, misuse."""

import copy
import json
import sys
import threading

import pytest
import torch
from conftest import FIXTURES, ROOT, random_tiles, root_class, synthetic_picture
from safetensors.torch import load_file
from test_model import IMAGE_TOKEN, tiny_model
from test_parity import load_published
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline


attention_inputs = root_class("attention_probe.attention_inputs")
attention_received = root_class("compression.attention_received")
CompressionSettings = root_class("compression.CompressionSettings")
find_images = root_class("compression.find_images")
kept_positions = root_class("compression.kept_positions")

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
GOLDENS = json.loads((FIXTURES / "scm" / "scm.json").read_text())["cases"]
TENSORS = load_file(FIXTURES / "scm" / "scm.safetensors")
LANGUAGE_MODELS = {
    "llama": {},
    "qwen2": {},
    "phi3": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 12},
    "mistral": {"head_dim": 16, "sliding_window": 12},
    "gpt_oss": {"head_dim": 16, "sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
}
IMAGE = (4, 2, 1)  # detailed, adaptive, thumbnail tiles
ROWS = [(3, IMAGE, 9), (5, IMAGE, 2, (2, 3, 1), 4), (2, (0, 0, 1), 6), (11,), (4, (6, 0, 1), 3)]


def batch(*rows, side: str = "left", seed: int = 3) -> dict[str, torch.Tensor]:
    """Padded prompts; a row lists how many text tokens come, and for an image its (detailed, adaptive, thumbnail) tiles."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for row in rows:
        parts = [
            torch.full((4 * sum(part),), IMAGE_TOKEN)
            if isinstance(part, tuple)
            else torch.randint(3, 50, (part,), generator=generator)
            for part in row
        ]
        sequences.append(torch.cat(parts))
    length = max(map(len, sequences))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[number, place], mask[number, place] = sequence, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    counts = [part for row in rows for part in row if isinstance(part, tuple)]
    if counts:
        tiles = sum(map(sum, counts))
        inputs |= {"pixel_values": random_tiles(seed, tiles, 3, 28, 28), "tile_counts": torch.tensor(counts)}
    return inputs


def alone(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of a batch by itself, without padding."""
    ids = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ends = ((inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1) // 4).cumsum(0).tolist()
    first, last = (ends[row - 1] if row else 0), ends[row]
    if first < last:
        image_ends = inputs["tile_counts"].sum(dim=1).cumsum(0)
        mine = (image_ends > first) & (image_ends <= last)
        one |= {"pixel_values": inputs["pixel_values"][first:last], "tile_counts": inputs["tile_counts"][mine]}
    return one


def without_padding(kept: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Positions in a padded row as positions in the row alone."""
    return (mask.cumsum(0) - 1)[kept].tolist()


def image_positions(one: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Positions of the detailed and of the other tokens of each image of one row, detailed tiles first."""
    left = (one["input_ids"][0] == IMAGE_TOKEN).nonzero().squeeze(1).tolist()
    positions = []
    for detailed, adaptive, thumbnail in one["tile_counts"].tolist():
        tokens, left = left[: 4 * (detailed + adaptive + thumbnail)], left[4 * (detailed + adaptive + thumbnail) :]
        positions.append((tokens[: 4 * detailed], tokens[4 * detailed :]))
    return positions


@torch.no_grad()
def eager_scores(model, one: dict[str, torch.Tensor], layer: int = 1) -> list[tuple[list[int], torch.Tensor]]:
    """For each image of one row its detailed positions and their scores, from the attention weights the model returns."""
    judge = copy.deepcopy(model)
    if not hasattr(model.config.text_config, "num_local_experts"):  # experts know no float64
        judge.double()
    judge.set_attn_implementation("eager")
    embeddings = judge.encode_images(one["input_ids"], one["pixel_values"].to(judge.dtype))
    weights = judge.model.language_model(inputs_embeds=embeddings, output_attentions=True, use_cache=False).attentions
    images = image_positions(one)
    scores = []
    for number, (detailed, _) in enumerate(images):
        others = {
            position for other, parts in enumerate(images) if other != number for part in parts for position in part
        }
        start = detailed[-1] + 1 if detailed else 0
        queries = [position for position in range(start, one["input_ids"].shape[1]) if position not in others]
        scores.append((detailed, weights[layer][0][:, queries][:, :, detailed].mean(dim=1).mean(dim=0)))
    return scores


def eager_kept(model, one: dict[str, torch.Tensor], layer: int = 1, ratio: float = 0.5) -> list[int]:
    lost = set()
    for detailed, scores in eager_scores(model, one, layer):
        order = scores.argsort(descending=True).tolist()
        lost |= {detailed[index] for index in order[int(len(detailed) * ratio) :]}
    return [position for position in range(one["input_ids"].shape[1]) if position not in lost]


@torch.no_grad()
def greedy_by_hand(model, one: dict[str, torch.Tensor], kept: list[int], steps: int = 6) -> list[int]:
    """Tokens after the embeddings at the kept positions, by whole passes without a cache."""
    embeddings, tokens = model.encode_images(one["input_ids"], one["pixel_values"])[:, kept], []
    for _ in range(steps):
        hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1)
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(token)[:, None]], dim=1)
        tokens.append(int(token))
    return tokens


def blocks_of(model, monkeypatch, elements: int) -> None:
    """Score in blocks of this many weights."""
    functions = (sys.modules[type(model).kept_positions.__module__].kept_positions, attention_received)
    for function in functions:
        monkeypatch.setattr(sys.modules[function.__module__], "BLOCK_ELEMENTS", elements)


# --- published -------------------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """Inputs, kept positions of row 0 (with the token that the published code loses) and scores of row 0."""
    case = GOLDENS[name]
    inputs = {"input_ids": TENSORS[f"{name}.input_ids"], "attention_mask": TENSORS[f"{name}.attention_mask"]}
    inputs["tile_counts"] = torch.tensor(case["tile_counts"])
    if f"{name}.visual_features" not in TENSORS:
        tiles = random_tiles(case["seed"], case["tiles"], 3, 112, 112)
        inputs["pixel_values"] = tiles if case["tile_permutation"] is None else tiles[case["tile_permutation"]]
    kept = sorted(TENSORS[f"{name}.kept_positions"].tolist() + case["wrongly_dropped"])
    return inputs, kept, TENSORS[f"{name}.scores"][0]


def golden_embeddings(model, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = inputs["input_ids"]
    if "pixel_values" in inputs:
        return model.encode_images(ids, inputs["pixel_values"])
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == 500] = TENSORS[f"{name}.visual_features"].flatten(0, 1)
    return embeddings


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GOLDENS)
def test_published_scores_and_positions(name, implementation, tmp_path):
    model = load_published(GOLDENS[name]["model"], tmp_path)
    model.set_attn_implementation(implementation)
    inputs, expected, scores = golden(name)
    embeddings = golden_embeddings(model, name, inputs)
    block = (inputs["input_ids"][0] == 500).nonzero()[0, 0].item()
    block = slice(block, block + len(scores))
    ours = attention_received(
        attention_inputs(model.model.language_model, embeddings[0], 1),
        block,
        torch.arange(block.stop, len(embeddings[0])),
    )
    assert torch.allclose(ours, scores, atol=1e-6, rtol=0)

    settings = CompressionSettings(keep_ratio=0.5, layer=1, num_layers=4)
    mask, tokens = inputs["attention_mask"], GOLDENS[name]["tokens_per_tile"]
    images = find_images(inputs["input_ids"], mask, inputs["tile_counts"], 500, tokens, settings)

    def probe(sequence, is_image):
        return attention_inputs(model.model.language_model, sequence, 1)

    kept = kept_positions(embeddings, mask, images, settings, probe)
    assert kept[0].tolist() == expected
    if "pixel_values" in inputs:
        assert model.kept_positions(**inputs)[0].tolist() == expected


def test_second_row_of_the_published_batch_keeps_what_it_keeps_alone(tmp_path):
    model = load_published("internlm2", tmp_path)
    inputs, _, _ = golden("batch2_leftpad")
    mask = inputs["attention_mask"][1]
    assert not mask.all()
    kept = model.kept_positions(**inputs)[1]
    ids = inputs["input_ids"][1:, mask.bool()]
    half = len(inputs["pixel_values"]) // 2
    by_itself = model.kept_positions(
        input_ids=ids, pixel_values=inputs["pixel_values"][half:], tile_counts=inputs["tile_counts"][1:]
    )
    assert without_padding(kept, mask) == by_itself[0].tolist()


# --- attention weights as the judge ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_scores_are_the_attention_weights_of_the_model(model_type, layer, monkeypatch):
    model = tiny_model(model_type, num_hidden_layers=3, **LANGUAGE_MODELS[model_type])
    one = batch((3, IMAGE, 9))
    ((detailed, expected),) = eager_scores(model, one, layer)
    embeddings = model.encode_images(one["input_ids"], one["pixel_values"])[0]
    block, queries = slice(detailed[0], detailed[-1] + 1), torch.arange(detailed[-1] + 1, len(embeddings))
    inputs = attention_inputs(model.model.language_model, embeddings, layer)
    whole = attention_received(inputs, block, queries)
    assert torch.allclose(whole, expected.float(), atol=1e-6, rtol=0)
    for elements in (1, 200):
        blocks_of(model, monkeypatch, elements)
        assert torch.allclose(attention_received(inputs, block, queries), whole, atol=1e-7, rtol=0)
        kept = model.kept_positions(**one, scm_layer=layer)
        assert kept[0].tolist() == eager_kept(model, one, layer)


@pytest.mark.parametrize(
    "row", [(3, IMAGE, 2, (5, 2, 1), 6), (2, IMAGE, (3, 1, 1), 4), (1, IMAGE, 3, (0, 0, 1), 2, IMAGE, 1)]
)
def test_each_image_is_scored_without_the_tokens_of_the_others(row):
    model, one = tiny_model(), batch(row)
    assert model.kept_positions(**one)[0].tolist() == eager_kept(model, one)


def test_detailed_tiles_after_the_adaptive_ones():
    """The queries of a detailed block are the tokens after it: thumbnail and text."""
    model, one = tiny_model(), batch((3, IMAGE, 5))
    detailed_second = {**one, "tile_counts": torch.tensor([[0, 2, 0], [4, 0, 1]])}  # the same tokens said otherwise
    kept = model.kept_positions(**one, tile_order="adaptive_first")
    assert torch.equal(kept[0], model.kept_positions(**detailed_second)[0])
    assert set(range(3, 3 + 8)) <= set(kept[0].tolist())
    assert len(kept[0]) == one["input_ids"].shape[1] - 8


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_back_ends_keep_and_answer_the_same(implementation):
    eager, other = tiny_model(head_dim=16), tiny_model(head_dim=16)
    eager.set_attn_implementation("eager")
    other.set_attn_implementation(implementation)
    rows = ROWS[:2] if implementation == "sdpa" else ROWS[:1]  # torch 2.15 compiles no padded rows for flex on a CPU
    inputs = batch(*rows)
    for ours, theirs in zip(eager.kept_positions(**inputs), other.kept_positions(**inputs)):
        assert torch.equal(ours, theirs)
    answers = [model.generate(**inputs, **GREEDY, use_scm=True) for model in (eager, other)]
    assert torch.equal(*answers)


def test_half_precision_keeps_as_many():
    model, inputs = tiny_model().to(torch.bfloat16), batch(*ROWS[:2])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    in_float32 = tiny_model().kept_positions(**batch(*ROWS[:2]))
    assert [len(kept) for kept in model.kept_positions(**inputs)] == [len(kept) for kept in in_float32]
    assert model.generate(**inputs, **GREEDY, use_scm=True).shape[1] == inputs["input_ids"].shape[1] + 6


# --- ratios ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.9, 1, 1.0])
def test_a_ratio_keeps_that_many_detailed_tokens_and_all_others(ratio):
    model, inputs = tiny_model(), batch(*ROWS)
    for row, kept in enumerate(model.kept_positions(**inputs, scm_keep_ratio=ratio)):
        one = alone(inputs, row)
        images = image_positions(one) if "tile_counts" in one else []
        found = without_padding(kept, inputs["attention_mask"][row])
        assert kept.dtype == torch.int64
        assert found == sorted(set(found))
        detailed = [position for image, _ in images for position in image]
        assert not set(range(one["input_ids"].shape[1])) - set(found) - set(detailed)
        for image, _ in images:
            assert len(set(image) & set(found)) == int(len(image) * ratio)


def test_smaller_ratios_keep_a_subset():
    model, one = tiny_model(), batch(ROWS[1])
    kept = [set(model.kept_positions(**one, scm_keep_ratio=ratio)[0].tolist()) for ratio in (0.2, 0.4, 0.7, 1)]
    assert kept[0] < kept[1] < kept[2] < kept[3]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:3]], ids=["one", "left_padded"])
def test_ratio_one_is_bit_equal_to_no_compression(rows):
    model, inputs = tiny_model(), batch(*rows)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_scm=True, scm_keep_ratio=1.0)
    assert torch.equal(plain.sequences, whole.sequences)
    assert all(torch.equal(*pair) for pair in zip(plain.logits, whole.logits))


def test_settings_come_from_the_configuration():
    model, one = tiny_model(num_hidden_layers=3), batch(ROWS[0])
    explicit = {"scm_keep_ratio": 0.3, "scm_layer": 2, "scm_queries": "visual"}
    expected = model.kept_positions(**one, **explicit)[0]
    for name, value in explicit.items():
        setattr(model.config, name, value)
    assert torch.equal(model.kept_positions(**one)[0], expected)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scm_queries": "visual"}], ids=["all", "visual"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_keeps_and_answers_as_alone(side, options):
    model, inputs = tiny_model(), batch(*ROWS, side=side)
    length = inputs["input_ids"].shape[1]
    kept = model.kept_positions(**inputs, **options)
    output = model.generate(**inputs, **GREEDY, **options, use_scm=True)
    assert torch.equal(output[:, :length], inputs["input_ids"])
    for row in range(len(ROWS)):
        one = alone(inputs, row)
        assert (
            without_padding(kept[row], inputs["attention_mask"][row])
            == model.kept_positions(**one, **options)[0].tolist()
        )
        answer = model.generate(**one, **GREEDY, **options, use_scm=True)[0, one["input_ids"].shape[1] :]
        assert torch.equal(output[row, length:], answer)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_right_padding_without_compression_answers_as_the_row_alone(dtype):
    model, inputs = tiny_model(), batch(*ROWS, side="right")
    mask = inputs["attention_mask"].to(dtype)
    output = model.generate(**{**inputs, "attention_mask": mask}, **GREEDY)
    length = inputs["input_ids"].shape[1]
    for row in range(len(ROWS)):
        one = alone(inputs, row)
        answer = model.generate(**one, **GREEDY)[0, one["input_ids"].shape[1] :]
        assert torch.equal(output[row, length:], answer)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(dtype):
    model, inputs = tiny_model(), batch(*ROWS[:3])
    typed = {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}
    for expected, kept in zip(model.kept_positions(**inputs), model.kept_positions(**typed)):
        assert kept.dtype == torch.int64
        assert torch.equal(expected, kept)
    assert torch.equal(*(model.generate(**one, **GREEDY, use_scm=True) for one in (inputs, typed)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_images_all_but_the_padding_stays(side):
    model, inputs = tiny_model(), batch((4,), (9,), side=side)
    for mask, kept in zip(inputs["attention_mask"], model.kept_positions(**inputs)):
        assert kept.dtype == torch.int64
        assert torch.equal(kept, mask.nonzero().squeeze(1))
    assert model.kept_positions(inputs["input_ids"])[0].tolist() == list(range(9))


def test_text_alone_is_answered_as_without_compression():
    model, inputs = tiny_model(), batch((4,), (9,))
    plain = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_scm=True), plain)
    assert torch.equal(model.generate(inputs["input_ids"][1:], use_scm=True, **GREEDY), plain[1:])


def test_images_without_detailed_tiles_are_answered_as_without_compression():
    model, inputs = tiny_model(), batch((3, (0, 0, 1), 4), (2, (0, 2, 1), 0))
    plain = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_scm=True), plain)


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS[:2])
def test_greedy_tokens_are_those_of_the_kept_embeddings(row):
    model, one = tiny_model(), batch(row)
    kept = eager_kept(model, one)
    output = model.generate(**one, **GREEDY, use_scm=True)
    assert torch.equal(output[:, : one["input_ids"].shape[1]], one["input_ids"])
    assert output[0, one["input_ids"].shape[1] :].tolist() == greedy_by_hand(model, one, kept)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
    ],
    ids="-".join,
)
def test_generation_modes_start_from_the_kept_embeddings(options):
    """Every mode gives what it gives on embeddings packed by hand; those without a choice give the greedy tokens."""
    model, inputs = tiny_model(), batch(*ROWS[:2])
    length, options = inputs["input_ids"].shape[1], {**GREEDY, **options}
    output = model.generate(**inputs, **options, use_scm=True)
    output = getattr(output, "sequences", output)
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(output[:, :length], inputs["input_ids"].repeat_interleave(copies, dim=0))
    for row in range(2):
        one = alone(inputs, row)
        kept = eager_kept(model, one)
        with torch.no_grad():
            embeddings = model.encode_images(one["input_ids"], one["pixel_values"])[:, kept]
        by_hand = model.generate(inputs_embeds=embeddings, **options)
        by_hand = getattr(by_hand, "sequences", by_hand)
        assert torch.equal(output[row * copies : (row + 1) * copies, length:], by_hand)
        if "num_beams" not in options:
            assert output[row * copies, length:].tolist() == greedy_by_hand(model, one, kept)


class Collector:
    """A streamer that remembers what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, ids):
        self.parts.append(ids.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_the_new_tokens():
    model, one, streamer = tiny_model(), batch(ROWS[0]), Collector()
    output = model.generate(**one, **GREEDY, use_scm=True, streamer=streamer)
    assert streamer.ended
    assert streamer.parts[0] == one["input_ids"][0].tolist()
    assert sum(streamer.parts, []) == output[0].tolist()


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_max_length_counts_the_whole_prompt(where, side):
    model, inputs = tiny_model(), batch(*ROWS[:2], side=side)
    length = inputs["input_ids"].shape[1]
    limits = {"max_length": length + 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    config = GenerationConfig(**limits)
    before = config.to_dict()
    if where == "model":
        model.generation_config = config
    given = {"argument": limits, "generation_config": {"generation_config": config}, "model": {}}[where]
    output = model.generate(**inputs, **given, use_scm=True)
    expected = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 4}, use_scm=True)
    assert output.shape == (2, length + 4)
    assert torch.equal(output, expected)
    assert config.to_dict() == before
    assert model.generate(**inputs, **given).shape == (2, length + 4)


@pytest.mark.parametrize("in_config", [False, True])
def test_max_length_within_the_prompt_is_refused(in_config):
    model, one = tiny_model(), batch(ROWS[0])
    length = one["input_ids"].shape[1]
    for limit in (length, length - 3):
        given = {"generation_config": GenerationConfig(max_length=limit)} if in_config else {"max_length": limit}
        with pytest.raises(ValueError, match=f"{length} tokens, but max_length is {limit}"):
            model.generate(**one, **given, use_scm=True)


def test_new_tokens_win_over_max_length():
    model, one = tiny_model(), batch(ROWS[0])
    length = one["input_ids"].shape[1]
    config = GenerationConfig(max_length=length + 9, do_sample=False, eos_token_id=None)
    assert model.generate(**one, generation_config=config, max_new_tokens=2, use_scm=True).shape[1] == length + 2


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_min_length_counts_the_whole_prompt(where):
    model, one = tiny_model(), batch(ROWS[0])
    length = one["input_ids"].shape[1]
    first = int(model.generate(**one, **GREEDY, use_scm=True)[0, length])
    limits = {
        "max_new_tokens": 6,
        "min_length": length + 3,
        "do_sample": False,
        "eos_token_id": first,
        "pad_token_id": 0,
    }
    config = GenerationConfig(**limits)
    if where == "model":
        model.generation_config = config
    given = {"argument": limits, "generation_config": {"generation_config": config}, "model": {}}[where]
    new = model.generate(**one, **given, use_scm=True)[0, length:].tolist()
    assert len(new) >= 3
    assert first not in new[:3]
    limits["min_length"] = length  # a minimum that the prompt reaches
    assert model.generate(**one, **limits, use_scm=True)[0, length:].tolist() == [first]


def test_the_end_token_stops():
    model, one = tiny_model(), batch(ROWS[0])
    length = one["input_ids"].shape[1]
    tokens = model.generate(**one, **GREEDY, use_scm=True)[0, length:].tolist()
    end = tokens[3]
    output = model.generate(**one, **{**GREEDY, "eos_token_id": end}, use_scm=True)
    assert output[0, length:].tolist() == tokens[: tokens.index(end) + 1]


def test_vision_and_the_scoring_pass_run_once():
    model, inputs, vision, rotations = tiny_model(num_hidden_layers=4), batch(ROWS[0]), [], []
    model.model.vision_tower.register_forward_hook(lambda *args: vision.append(1))
    model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: rotations.append(1))
    model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}, use_scm=True)
    assert len(vision) == 1
    assert len(rotations) == 4  # one to score, three to generate


# --- queries ---------------------------------------------------------------------------------------------------------


def kept_of_images(one: dict[str, torch.Tensor], kept: list[int]) -> list[list[int]]:
    """For each image of a row which of its detailed tokens stay, counted from its first."""
    return [[p - detailed[0] for p in detailed if p in set(kept)] for detailed, _ in image_positions(one)]


def test_visual_queries_depend_on_nothing_but_the_image():
    model = tiny_model()
    first = batch((3, IMAGE, 9), seed=3)
    (expected,) = kept_of_images(first, model.kept_positions(**first, scm_queries="visual")[0].tolist())
    tiles = first["pixel_values"]
    for row in ((0, IMAGE, 1), (17, IMAGE, 2), (1, IMAGE, 0)):
        other_text = {**batch(row, seed=8), "pixel_values": tiles}
        kept = model.kept_positions(**other_text, scm_queries="visual")[0].tolist()
        assert kept_of_images(other_text, kept) == [expected]
    together = batch((12,), (4, (3, 1, 1), 2, IMAGE, 5), seed=9)
    together["pixel_values"][5:] = tiles
    kept = without_padding(model.kept_positions(**together, scm_queries="visual")[1], together["attention_mask"][1])
    assert kept_of_images(alone(together, 1), kept)[1] == expected


def test_visual_queries_are_the_image_as_a_sequence_of_its_own():
    model, one = tiny_model(), batch((3, (6, 2, 1), 9))
    image = {**batch(((6, 2, 1),)), "pixel_values": one["pixel_values"]}
    visual = kept_of_images(one, model.kept_positions(**one, scm_queries="visual")[0].tolist())
    assert visual == kept_of_images(image, eager_kept(model, image))
    assert visual != kept_of_images(one, model.kept_positions(**one, scm_queries="all")[0].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_after_the_query_end_does_not_count(side):
    model, inputs = tiny_model(), batch((3, IMAGE, 12), (5, IMAGE, 30), side=side)
    ends = [int(mask.nonzero()[0]) + start + 28 + 4 for mask, start in zip(inputs["attention_mask"], (3, 5))]
    kept = model.kept_positions(**inputs, scm_query_ends=ends)
    assert any(not torch.equal(*pair) for pair in zip(kept, model.kept_positions(**inputs)))
    for row, start in enumerate((3, 5)):
        one = alone(inputs, row)
        shorter = {**one, **{name: one[name][:, : start + 28 + 4] for name in ("input_ids", "attention_mask")}}
        expected = kept_of_images(shorter, eager_kept(model, shorter))
        assert kept_of_images(one, without_padding(kept[row], inputs["attention_mask"][row])) == expected


def test_each_image_has_its_own_query_end():
    model, one = tiny_model(), batch((3, IMAGE, 5, (5, 2, 1), 20))
    ends = [3 + 28 + 5, one["input_ids"].shape[1]]
    kept = kept_of_images(one, model.kept_positions(**one, scm_query_ends=ends)[0].tolist())
    names = ("input_ids", "attention_mask")
    first = {**one, **{name: one[name][:, : ends[0]] for name in names}}
    first |= {"pixel_values": one["pixel_values"][:7], "tile_counts": one["tile_counts"][:1]}
    assert kept[0] == kept_of_images(first, eager_kept(model, first))[0]
    assert kept[1] == kept_of_images(one, eager_kept(model, one))[1]


# --- chat ------------------------------------------------------------------------------------------------------------


TILES = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 2, "adaptive_max_tiles": 3}
CHAT = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "Read the text."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def pictures():
    return [synthetic_picture(300, 200, 1), synthetic_picture(150, 320, 2)]


@pytest.fixture(scope="module")
def cut(processor, pictures):
    """Tiles of each picture: pixel_values, tile_counts and tile_grids."""
    return [processor.image_processor(picture, return_tensors="pt", **TILES) for picture in pictures]


@pytest.fixture
def sent(nano, monkeypatch):
    """The arguments of each `generate`, and under "kept" the detailed tokens of each picture that stay."""
    generate, calls = nano.generate, []
    names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "tile_counts",
        "tile_order",
        "scm_query_ends",
        "scm_queries",
    )

    def record(**options):
        kept = nano.kept_positions(**{name: options[name] for name in names if options.get(name) is not None})
        calls.append({**options, "kept": [k for row in zip(options["input_ids"], kept) for k in kept_by_picture(*row)]})
        return generate(**options)

    monkeypatch.setattr(nano, "generate", record)
    return calls


def kept_by_picture(ids: torch.Tensor, kept: torch.Tensor) -> list[list[int]]:
    """For each picture of a prompt which of its image tokens stay, counted from its first."""
    stays, runs = set(kept.tolist()), []
    for position, index in enumerate(ids.tolist()):
        if index == 379:
            if not runs or runs[-1][1] != position - 1:
                runs.append([position, position])
            runs[-1][1] = position
    return [[p - start for p in range(start, stop + 1) if p in stays] for start, stop in runs]


def test_tiles_of_the_chat_tests(cut):
    assert all(counts.min() > 0 for one in cut for counts in one["tile_counts"])


def test_chat_compresses(nano, processor, pictures, cut, sent):
    nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, use_scm=True, **CHAT)
    detailed, adaptive, thumbnail = cut[0]["tile_counts"][0].tolist()
    (kept,) = sent[0]["kept"]
    assert len([k for k in kept if k < 49 * detailed]) == int(49 * detailed * 0.5)
    assert [k for k in kept if k >= 49 * detailed] == list(range(49 * detailed, 49 * (detailed + adaptive + thumbnail)))


def test_chat_passes_the_settings_of_compression(nano, processor, pictures, cut, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "scm_queries": "visual", **CHAT}
    nano.chat(processor, pictures[0], QUESTION, scm_keep_ratio=0.2, scm_layer=2, **options)
    assert (sent[0]["scm_keep_ratio"], sent[0]["scm_layer"], sent[0]["scm_queries"]) == (0.2, 2, "visual")


def test_chat_without_pictures_compresses_nothing(nano, processor):
    assert nano.chat(processor, None, "Hello", use_scm=True, **CHAT) == nano.chat(processor, None, "Hello", **CHAT)
    questions = ["Hello", "And you?"]
    assert nano.batch_chat(processor, None, questions, use_scm=True, **CHAT) == nano.batch_chat(
        processor, None, questions, **CHAT
    )


def test_a_later_turn_keeps_what_the_first_kept(nano, processor, pictures, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "return_history": True, **CHAT}
    _, history = nano.chat(processor, pictures[0], QUESTION, **options)
    later = "What is the total, in which currency is it, and who wrote the words above it?"
    nano.chat(processor, pictures[0], later, history=history, **options)
    assert sent[1]["kept"] == sent[0]["kept"]
    _, history = nano.chat(processor, pictures, f"<image>\n{later}", history=history, **options)
    nano.chat(processor, pictures, "And?", history=history, **options)
    assert sent[2]["kept"][0] == sent[0]["kept"][0]
    assert sent[3]["kept"] == sent[2]["kept"]
    del sent[3]["scm_query_ends"]
    names = ("input_ids", "attention_mask", "pixel_values", "tile_counts")
    to_the_end = nano.kept_positions(**{name: sent[3][name] for name in names})
    assert kept_by_picture(sent[3]["input_ids"][0], to_the_end[0]) != sent[3]["kept"]


def test_later_turns_of_a_batch_keep_what_they_kept_alone(nano, processor, pictures, sent):
    options = {"images_kwargs": TILES, "use_scm": True, "return_history": True, **CHAT}
    answers, histories = nano.batch_chat(
        processor, [pictures[0], None, pictures[1]], [QUESTION, "Hello", "Say."], **options
    )
    questions = ["And what is below it?", "Well?", "Is it so? Say it in one word, or in two."]
    again, _ = nano.batch_chat(processor, [pictures[0], None, pictures[1]], questions, history=histories, **options)
    assert sent[1]["kept"] == sent[0]["kept"]
    for row, picture in ((0, pictures[0]), (2, pictures[1])):
        alone_answer, _ = nano.chat(processor, picture, questions[row], history=histories[row], **options)
        assert alone_answer == again[row]
    assert [sent[2]["kept"][0], sent[3]["kept"][0]] == sent[0]["kept"]


def test_all_orders_of_tiles_compress_as_the_processor_does(nano, processor, tokenizer, pictures, cut, sent):
    tiles, grid = cut[0]["pixel_values"], cut[0]["tile_grids"][0, :2]
    ratio, config = tuple(grid.tolist()), dict(CHAT)
    answers = {
        nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, use_scm=True, **CHAT),
        nano.chat(tokenizer, tiles, ratio, QUESTION, config, True),
        nano.chat(tokenizer, tiles, list(ratio), QUESTION, config, use_scm=True),
        nano.chat(tokenizer, tiles, grid, QUESTION, config, True, None, False, [len(tiles)]),
        nano.chat(tokenizer, tiles, QUESTION, config, use_scm=True, target_aspect_ratio=ratio),
        nano.chat(processor, tiles, QUESTION, config, use_scm=True, target_aspect_ratio=[ratio]),
        nano.chat(
            tokenizer, pixel_values=tiles, target_aspect_ratio=grid[None], question=QUESTION, use_scm=True, **CHAT
        ),
        nano.batch_chat(tokenizer, tiles, [QUESTION], config, [len(tiles)], use_scm=True, target_aspect_ratio=[ratio])[
            0
        ],
    }
    assert len(answers) == 1
    assert config == CHAT
    assert all(call["kept"] == sent[0]["kept"] for call in sent)


def test_several_pictures_as_tiles(nano, processor, tokenizer, pictures, cut, sent):
    tiles = torch.cat([one["pixel_values"] for one in cut])
    grids = [tuple(one["tile_grids"][0, :2].tolist()) for one in cut]
    question, counts = "Image-1: <image>\nImage-2: <image>\nCompare.", [len(one["pixel_values"]) for one in cut]
    nano.chat(processor, pictures, "Compare.", images_kwargs=TILES, use_scm=True, **CHAT)
    nano.chat(tokenizer, tiles, grids, question, dict(CHAT), True, num_patches_list=counts)
    assert torch.equal(sent[0]["input_ids"], sent[1]["input_ids"])
    assert torch.equal(sent[0]["tile_counts"], sent[1]["tile_counts"])
    assert sent[0]["kept"] == sent[1]["kept"]


def test_adaptive_tiles_first(nano, tokenizer, cut, sent):
    detailed, adaptive, thumbnail = cut[0]["tile_counts"][0].tolist()
    tiles = cut[0]["pixel_values"]
    swapped = torch.cat([tiles[detailed : detailed + adaptive], tiles[:detailed], tiles[detailed + adaptive :]])
    ratio = tuple(cut[0]["tile_grids"][0, :2].tolist())
    nano.chat(tokenizer, swapped, ratio, QUESTION, dict(CHAT), True, tile_order="adaptive_first")
    (kept,) = sent[0]["kept"]
    lost = sorted(set(range(49 * len(tiles))) - set(kept))
    assert len(lost) == 49 * detailed - int(49 * detailed * 0.5)
    assert 49 * adaptive <= lost[0]
    assert lost[-1] < 49 * (adaptive + detailed)


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_grid_of_one_tile_means_no_detailed_tiles(nano, tokenizer, cut, tiles, sent, monkeypatch):
    some = cut[0]["pixel_values"][-tiles:]
    compressed = nano.chat(tokenizer, some, (1, 1), QUESTION, dict(CHAT), True)
    assert sent[0]["tile_counts"].tolist() == [[0, tiles - 1, 1]]
    assert sent[0]["kept"] == [list(range(49 * tiles))]
    monkeypatch.undo()
    assert compressed == nano.chat(tokenizer, some, (1, 1), QUESTION, dict(CHAT), False)


def test_chat_streams_with_compression(nano, processor, pictures):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {"images_kwargs": TILES, "use_scm": True, **CHAT}
    call = {"target": nano.chat, "args": (processor, pictures[0], QUESTION)}
    thread = threading.Thread(**call, kwargs={**options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == nano.chat(processor, pictures[0], QUESTION, **options)


def test_the_pipeline_answers_as_generate(nano, processor, pictures):
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    fine = copy.deepcopy(processor)
    for name, value in TILES.items():
        setattr(fine.image_processor, name, value)
    inputs = fine.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["tile_counts"][0, 0] > 0
    output = nano.generate(**inputs, use_scm=True, scm_keep_ratio=0.3, **CHAT)
    expected = fine.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    reader = pipeline("image-text-to-text", model=nano, processor=fine)
    settings = {"use_scm": True, "scm_keep_ratio": 0.3, **CHAT}
    answers = reader(text=messages, return_full_text=False, generate_kwargs=settings)
    assert answers[0]["generated_text"].strip() == expected.strip()


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"scm_keep_ratio": ratio}, "scm_keep_ratio must be above 0") for ratio in (0, 1.5, -0.1, True, "x")),
        ({"scm_keep_ratio": float("nan")}, "scm_keep_ratio must be above 0"),
        *(({"scm_layer": layer}, "scm_layer .* does not exist") for layer in (2, -1, 1.0, True, "1")),
        ({"scm_queries": "text"}, "'all' or 'visual'"),
        ({"tile_order": "sideways"}, "'detailed_first' or 'adaptive_first'"),
        ({"tile_counts": None}, "pass tile_counts"),
        ({"tile_counts": torch.tensor([[4, 2]])}, r"shape \(images, 3\)"),
        ({"tile_counts": torch.tensor([4, 2, 1])}, r"shape \(images, 3\)"),
        ({"tile_counts": torch.tensor([[4.0, 2.0, 1.0]])}, "integers"),
        ({"tile_counts": torch.tensor([[4, 4, -1]])}, "integers"),
        ({"tile_counts": torch.tensor([[4, 2, 2]])}, "28 image tokens .* 32"),
        ({"tile_counts": torch.tensor([[4, 2, 1], [4, 2, 1]])}, "28 image tokens .* 56"),
        ({"tile_counts": torch.zeros(0, 3, dtype=torch.long)}, "28 image tokens .* 0"),
        ({"scm_query_ends": []}, "0 entries for 1 images"),
        ({"scm_query_ends": [40, 40]}, "2 entries for 1 images"),
        ({"scm_query_ends": [30]}, "must lie after the image"),
        ({"scm_query_ends": [41]}, "of at most"),
        ({"scm_query_ends": [-1]}, "must lie after the image"),
        ({"attention_mask": torch.ones(1, 39)}, "shape of input_ids"),
    ],
)
def test_settings_that_cannot_work(options, message):
    model, inputs = tiny_model(), {**batch((3, IMAGE, 9)), **options}
    for call in (model.kept_positions, lambda **given: model.generate(**given, **GREEDY, use_scm=True)):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_hidden_image_tokens_are_refused():
    model, one = tiny_model(), batch((3, IMAGE, 9))
    one["attention_mask"][0, 5] = 0
    for call in (model.kept_positions, lambda **given: model.generate(**given, use_scm=True)):
        with pytest.raises(ValueError, match="hides tokens of image 0"):
            call(**one)


def test_images_in_pieces_are_refused():
    model = tiny_model()
    for row in ((3, (2, 0, 0), 2, (2, 2, 1), 9), (3, (3, 0, 0), 1, (4, 0, 0), 2)):
        one = {**batch(row), "tile_counts": torch.tensor([[4, 2, 1]])}
        with pytest.raises(ValueError, match="do not stand together"):
            model.kept_positions(**one)
    two_rows = {**batch((3, (2, 0, 0)), (2, (2, 2, 1), 5)), "tile_counts": torch.tensor([[4, 2, 1]])}
    with pytest.raises(ValueError, match="do not stand together"):
        model.kept_positions(**two_rows)


@pytest.mark.parametrize(
    "option",
    [{"scm_keep_ratio": 0.5}, {"scm_layer": 1}, {"scm_queries": "all"}, {"scm_query_ends": [40]}],
    ids="-".join,
)
def test_settings_without_compression_are_refused(option):
    with pytest.raises(ValueError, match="works only with use_scm=True"):
        tiny_model().generate(**batch((3, IMAGE, 9)), **option)


@pytest.mark.parametrize(
    "option",
    [
        {"position_ids": torch.arange(40)[None]},
        {"past_key_values": ()},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"assistant_model": "model"},
    ],
    ids="-".join,
)
def test_what_counts_the_whole_prompt_is_refused(option):
    model, one = tiny_model(), batch((3, IMAGE, 9))
    if "assistant_model" in option:
        option = {"assistant_model": model}
    with pytest.raises(
        ValueError, match=f"{next(iter(option))} (does not work with images|counts tokens).*leave it out"
    ):
        model.generate(**one, **option, **GREEDY, use_scm=True)


@pytest.mark.parametrize("queries", ["all", "visual"])
def test_an_image_that_nothing_comes_after(queries):
    model, one = tiny_model(), batch((3, (4, 0, 0)))
    with pytest.raises(ValueError, match="needs a thumbnail, or the prompt text after it"):
        model.kept_positions(**one, scm_queries=queries)
    assert len(model.kept_positions(**one, scm_keep_ratio=1)[0]) == 19


def test_visual_queries_need_other_tiles():
    model, one = tiny_model(), batch((3, (4, 0, 0), 5))
    with pytest.raises(ValueError, match="needs a thumbnail"):
        model.kept_positions(**one, scm_queries="visual")
    assert len(model.kept_positions(**one)[0]) == 3 + 8 + 5


def test_images_without_pixels_are_refused():
    one = batch((3, IMAGE, 9))
    with pytest.raises(ValueError, match="28 image tokens, but no pixel_values"):
        tiny_model().kept_positions(input_ids=one["input_ids"], tile_counts=one["tile_counts"])


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_language_models_of_another_build_say_so(model_type, options):
    model, one = tiny_model(model_type, **options), batch((3, IMAGE, 9))
    with pytest.raises(ValueError, match=r"layers\[1\].self_attn.*use_scm=False"):
        model.generate(**one, **GREEDY, use_scm=True)
    assert model.generate(**one, **GREEDY).shape[1] == 46


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        (
            "llama4_text",
            {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 32},
        ),
        ("doge", {}),
        ("xglm", {}),
        ("minimax", {}),
    ],
)
def test_attention_that_queries_and_keys_do_not_tell_is_right_or_refused(model_type, options):
    model, one = tiny_model(model_type, **options), batch((3, IMAGE, 9))
    try:
        kept = model.kept_positions(**one)[0].tolist()
    except ValueError as error:
        assert "use_scm=False" in str(error)
    else:
        assert kept == eager_kept(model, one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pass target_aspect_ratio=\(columns, rows\)"),
        ({"target_aspect_ratio": (2,)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (2, 1, 1)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (0, 2)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": (1.5, 2.0)}, r"must be \(columns, rows\)"),
        ({"target_aspect_ratio": [(1, 2), (1, 2)]}, "for each of 1 pictures"),
        ({"target_aspect_ratio": (9, 9)}, "81 detailed tiles, but the picture has"),
        ({"target_aspect_ratio": (2, 1), "tile_order": "sideways"}, "'detailed_first' or 'adaptive_first'"),
    ],
)
def test_tiles_whose_detailed_grid_is_unclear(nano, tokenizer, cut, options, message):
    with pytest.raises(ValueError, match=message):
        nano.chat(tokenizer, cut[0]["pixel_values"], QUESTION, dict(CHAT), use_scm=True, **options)


def test_chat_refuses_settings_without_compression(nano, processor, pictures):
    with pytest.raises(ValueError, match="scm_keep_ratio works only with use_scm=True"):
        nano.chat(processor, pictures[0], QUESTION, images_kwargs=TILES, scm_keep_ratio=0.5)
    with pytest.raises(ValueError, match="belongs to tiles that you cut yourself"):
        nano.chat(processor, pictures[0], QUESTION, use_scm=True, tile_order="adaptive_first")


# --- nothing is changed ----------------------------------------------------------------------------------------------


def attributes(model) -> dict[str, object]:
    """What every module holds besides its weights."""
    held = {}
    for name, module in model.named_modules():
        held |= {
            f"{name}.{key}": value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")
        }
        held[f"{name}._modules"] = dict(module._modules)
    return held


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_inputs_and_model_are_not_changed(implementation):
    model, inputs = tiny_model(), batch(*ROWS[:3])
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(**inputs).logits  # first, since a first pass of transformers leaves marks of its own
    before, held = copy.deepcopy(inputs), attributes(model)
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    for queries in ("all", "visual"):
        model.kept_positions(**inputs, scm_queries=queries)
        model.generate(**inputs, **GREEDY, use_scm=True, scm_queries=queries)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    now = attributes(model)
    assert not [name for name in held | now if name not in held or name not in now or held[name] != now[name]]
    assert model.config.to_dict() == config
    assert model.config.text_config._attn_implementation == implementation
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_training_mode_and_gradients_stay_as_they_are():
    model, one = tiny_model().train(), batch(ROWS[0])
    model.kept_positions(**one)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_threads_with_and_without_compression_share_a_model():
    model, inputs = tiny_model(), batch(*ROWS[:2])
    options = [{}, {"use_scm": True}, {"use_scm": True, "scm_queries": "visual"}]
    expected = [model.generate(**inputs, **GREEDY, **option) for option in options]
    answers = [[] for _ in options]

    def work(number):
        for _ in range(6):
            answers[number].append(model.generate(**inputs, **GREEDY, **options[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, right in zip(answers, expected):
        assert len(given) == 6
        assert all(torch.equal(answer, right) for answer in given)


# --- memory and devices ----------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_memory_does_not_grow_with_heads_times_length_squared(monkeypatch):
    model, one = tiny_model(num_attention_heads=8, head_dim=4), batch((8, (200, 100, 1), 290))
    blocks_of(model, monkeypatch, 2**16)
    length = one["input_ids"].shape[1]
    assert length > 1500
    for queries in ("all", "visual"):
        with LargestTensor() as largest:
            model.kept_positions(**one, scm_queries=queries)
        assert largest.elements < 8 * length**2 / 16
        assert largest.elements <= max(one["pixel_values"].numel(), 2**17)


@pytest.mark.parametrize("how", ["hooks", "offload"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_models_with_hooks_of_accelerate_keep_the_same(model_type, how):
    from accelerate import cpu_offload, dispatch_model

    model = tiny_model(model_type, num_hidden_layers=3, **LANGUAGE_MODELS[model_type])
    inputs = batch(*ROWS[:2])
    expected = model.kept_positions(**inputs, scm_layer=2)
    answer = model.generate(**inputs, **GREEDY, use_scm=True, scm_layer=2)
    if how == "hooks":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
        model.hf_device_map = {"": "cpu"}
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(model.kept_positions(**inputs, scm_layer=2), expected))
        assert torch.equal(model.generate(**inputs, **GREEDY, use_scm=True, scm_layer=2), answer)


def test_adapters_change_the_scores():
    peft = pytest.importorskip("peft")
    model, one = tiny_model(), batch(ROWS[0])
    before = model.kept_positions(**one)[0]
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    kept = adapted.base_model.model.kept_positions(**one)[0]
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(kept, merged.kept_positions(**one)[0])
    assert not torch.equal(kept, before)
    assert adapted.generate(**one, **GREEDY, use_scm=True).shape[1] == one["input_ids"].shape[1] + 6
