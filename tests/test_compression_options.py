"""Scale compression by other choices than the published one: what stays, what the model reads, batches, turns, misuse."""

import json
import threading

import pytest
import torch
from compression_helpers import GREEDY, IMAGE, ROWS, alone, batch, eager_weights, image_positions, without_padding
from conftest import FIXTURES, synthetic_picture
from model_helpers import tiny_model
from PIL import Image
from transformers import TextIteratorStreamer

from minimonkey.attention_probe import rotary_means
from minimonkey.compression import AttentionInputs, attention_received
from minimonkey.token_selection import SELECTIONS, TileMap, coordinate_tokens, read_selection


BY_NAME = [name for name in SELECTIONS if name != "mass"]
GRIDS = {(4, 2, 1): (2, 2, 2, 1), (2, 3, 1): (1, 2, 3, 1), (6, 0, 1): (3, 2, 1, 1), (0, 0, 1): (1, 1, 1, 1)}
QUERIES = ("all", "visual", "balanced", "question", "last")


def with_grids(inputs: dict) -> dict:
    """Prompts of `batch` with the grids of their images."""
    counts = [tuple(count) for count in inputs.get("tile_counts", torch.empty(0, 3)).tolist()]
    return {**inputs, "tile_grids": torch.tensor([GRIDS[count] for count in counts])} if counts else inputs


def options_of(name: str) -> dict:
    return {"scm_select": name} if name == "mass" else {"scm_select": name, "scm_keep_ratio": 0.5}


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("queries", ["balanced", "question", "last"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_query_sets_are_groups_of_the_models_attention_weights(queries, implementation):
    model, one = tiny_model(), batch((3, IMAGE, 9))
    model.set_attn_implementation(implementation)
    one["input_ids"][0, -3] = 2  # ends the message
    ((detailed, other),) = image_positions(one)
    weights = eager_weights(model, one)[1]  # (heads, queries, keys)
    end = one["input_ids"].shape[1]
    groups = {
        "last": [[end - 1]],
        "question": [list(range(other[-1] + 2, end - 3))],
        "balanced": [other[:8], other[8:], list(range(other[-1] + 2, end - 3))],
    }[queries]
    scores = []
    for group in groups:
        rows = weights[:, group][:, :, detailed]
        rows = rows if queries == "last" else rows / rows.sum(dim=-1, keepdim=True)
        scores.append(rows.mean(dim=(0, 1)))
    expected = torch.stack(scores).mean(dim=0).argsort(descending=True)[:8].sort().values + detailed[0]
    kept = model.kept_positions(**one, scm_queries=queries)[0].tolist()
    assert [k for k in kept if detailed[0] <= k <= detailed[-1]] == expected.tolist()
    assert len(kept) == end - 8


def test_mixed_groups_are_those_of_the_reference():
    """Attention weights given as logits of one head: each query has one vote, each group weighs alike."""
    for case in json.loads((FIXTURES / "selection" / "selection.json").read_text())["cases"]:
        per_query = torch.tensor(case["per_query"])
        groups, expected = torch.tensor(case["groups"]), torch.tensor(case["mixed"])
        tokens, queries = per_query.shape[1], len(per_query)
        key = torch.eye(tokens + queries)[None]
        query = torch.zeros(1, tokens + queries, tokens + queries)
        query[0, tokens:, :tokens] = per_query.clamp(min=1e-30).log()
        query[0, tokens:, tokens:] = 3.0  # what the queries see besides changes nothing
        inputs = AttentionInputs(query, key, 1.0)
        rows = [(groups == group).nonzero().squeeze(1) + tokens for group in groups.unique()]
        received = [attention_received(inputs, slice(0, tokens), row, has_one_vote=True) for row in rows]
        assert torch.allclose(torch.stack(received).mean(dim=0), expected.float(), atol=1e-6)


def test_scores_of_features_need_no_pass_of_the_language_model():
    model, one, passes = tiny_model(), batch((3, IMAGE, 9)), []
    model.model.language_model.layers[0].register_forward_hook(lambda *args: passes.append(1))
    kept = model.kept_positions(**one, scm_select="features", scm_keep_ratio=0.25)[0].tolist()
    features = model.encode_images(one["input_ids"], one["pixel_values"])[0]
    ((detailed, _),) = image_positions(one)
    expected = {detailed[i] for i in features[detailed].norm(dim=-1).argsort(descending=True)[:4]}
    assert passes == []
    assert set(kept) & set(detailed) == expected
    other_text = {**batch((5, IMAGE, 2), seed=9), "pixel_values": one["pixel_values"]}
    again = model.kept_positions(**other_text, scm_select="features", scm_keep_ratio=0.25)[0].tolist()
    assert [k - 5 for k in again if 5 <= k < 21] == [k - 3 for k in kept if 3 <= k < 19]


# --- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_choice_keeps_exactly_as_many(name, ratio):
    model, inputs = tiny_model(), with_grids(batch(*ROWS))
    plain = model.kept_positions(**inputs, scm_keep_ratio=ratio)
    kept = model.kept_positions(**inputs, scm_select=name, scm_keep_ratio=ratio)
    assert [len(row) for row in kept] == [len(row) for row in plain]
    assert all(row.dtype == torch.int64 and row.tolist() == sorted(set(row.tolist())) for row in kept)


@torch.no_grad()
@pytest.mark.parametrize("name", ["smooth", "dilated", "block", "tile"])
def test_a_choice_is_made_by_the_scores_and_the_grid_of_the_image(name):
    model, one = tiny_model(), with_grids(batch((3, IMAGE, 9)))
    ((detailed, _),) = image_positions(one)
    weights = eager_weights(model, one)[1]
    scores = weights[:, detailed[-1] + 1 :, detailed[0] : detailed[-1] + 1].mean(dim=(0, 1)).float()
    expected, _ = read_selection(name).choose(scores, TileMap(2, 2, 2), 8)
    kept = model.kept_positions(**one, scm_select=name)[0].tolist()
    assert [k - detailed[0] for k in kept if k in detailed] == expected.tolist()
    flat = {**one, "tile_grids": torch.tensor([[4, 1, 2, 1]])}
    expected, _ = read_selection(name).choose(scores, TileMap(4, 1, 2), 8)
    kept = model.kept_positions(**flat, scm_select=name)[0].tolist()
    assert [k - detailed[0] for k in kept if k in detailed] == expected.tolist()


def test_mass_keeps_less_of_an_image_that_needs_less():
    model, one = tiny_model(), batch((3, IMAGE, 9))
    lengths = [
        len(model.kept_positions(**one, scm_select={"name": "mass", "mass": mass, "least": 0.0})[0])
        for mass in (0.05, 0.5, 0.9, 1.0)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2] <= lengths[-1]
    bounded = model.kept_positions(**one, scm_select={"name": "mass", "mass": 1.0, "most": 0.25})[0]
    assert len(bounded) == one["input_ids"].shape[1] - 12


def test_coordinates_stay_whatever_their_score():
    model, one = tiny_model(), batch((3, IMAGE, 9))
    choice = {"name": "coordinates", "coordinates": 0.25}
    angles = rotary_means(model.model.language_model, one["input_ids"].shape[1], torch.zeros(1, 32))
    chosen = coordinate_tokens(*(mean[3:19] for mean in angles), 4, 0.25)
    kept = set(model.kept_positions(**one, scm_select=choice, scm_keep_ratio=0.5)[0].tolist())
    assert chosen.any() and {3 + int(i) for i in chosen.nonzero().squeeze(1)} <= kept


# --- what the model reads --------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle(model, one: dict, kept: list[int], steps: int = 6) -> torch.Tensor:
    """Logits (steps, vocabulary) of a model that reads all of a prompt, with what is not kept masked in every layer."""
    embeddings, logits = model.encode_images(one["input_ids"], one["pixel_values"]), []
    prompt = embeddings.shape[1]
    seen = torch.zeros(prompt + steps, dtype=torch.bool)
    seen[kept], seen[prompt:] = True, True
    for _ in range(steps):
        length = embeddings.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & seen[:length]
        mask |= torch.eye(length, dtype=torch.bool)  # a row without any key has no softmax; nobody reads these
        bias = torch.zeros(length, length).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=bias, use_cache=False)
        logits.append(model.lm_head(hidden.last_hidden_state[0, -1]))
        token = logits[-1].argmax()[None, None]
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(token)], dim=1)
    return torch.stack(logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("row", ROWS[:2])
def test_original_positions_are_all_tokens_with_the_dropped_ones_masked_in_every_layer(row, implementation):
    model, one = tiny_model(num_hidden_layers=3), batch(row)
    model.set_attn_implementation(implementation)
    kept = model.kept_positions(**one, scm_select="original", scm_keep_ratio=0.3)[0].tolist()
    expected = oracle(model, one, kept)
    asked = {"output_logits": True, "return_dict_in_generate": True, "use_scm": True, "scm_keep_ratio": 0.3}
    options = {**GREEDY, **asked, "scm_select": "original"}
    for mode in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        logits = torch.cat(model.generate(**one, **options, **mode).logits)
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
    renumbered = torch.cat(model.generate(**one, **{**options, "scm_select": "token"}).logits)
    assert (renumbered - expected).abs().max() > 0.02


@torch.no_grad()
def by_hand(model, one: dict, kept: list[int], layer: int, read: int, steps: int = 6) -> torch.Tensor:
    """Logits of a model whose first `read` tokens see everything before `layer`; all others, and later layers, what is kept."""
    language_model = model.model.language_model
    embeddings, logits = model.encode_images(one["input_ids"], one["pixel_values"]), []
    prompt = embeddings.shape[1]
    seen = torch.zeros(prompt + steps, dtype=torch.bool)
    seen[kept], seen[prompt:] = True, True
    for _ in range(steps):
        length = embeddings.shape[1]
        causal, own = torch.ones(length, length, dtype=torch.bool).tril(), torch.eye(length, dtype=torch.bool)
        late = causal & seen[:length] | own
        early = torch.where(torch.arange(length)[:, None] < read, causal, late)
        angles = language_model.rotary_emb(embeddings, position_ids=torch.arange(length)[None])
        hidden = embeddings
        for number, one_layer in enumerate(language_model.layers):
            mask = early if number < layer else late
            bias = torch.zeros(length, length).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
            hidden = one_layer(hidden, attention_mask=bias, position_embeddings=angles)
        logits.append(model.lm_head(language_model.norm(hidden)[0, -1]))
        token = logits[-1].argmax()[None, None]
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(token)], dim=1)
    return torch.stack(logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("row", ROWS[:2])
def test_lower_layers_read_all_and_the_others_what_stays(row, layer, implementation):
    model, one = tiny_model(num_hidden_layers=4), batch(row)
    model.set_attn_implementation(implementation)
    asked = {"output_logits": True, "return_dict_in_generate": True, "use_scm": True}
    options = {"scm_select": "layer", "scm_layer": layer, "scm_keep_ratio": 0.3}
    kept = model.kept_positions(**one, **options)[0].tolist()
    assert kept == model.kept_positions(**one, **{**options, "scm_select": "token"})[0].tolist()
    expected = by_hand(model, one, kept, layer, one["input_ids"].shape[1] - 1)
    logits = torch.cat(model.generate(**one, **GREEDY, **asked, **options).logits)
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - oracle(model, one, kept)).abs().max() > 0.02


@torch.no_grad()
def test_a_marker_is_the_mean_of_its_run_where_the_run_ends():
    model, one = tiny_model(), batch((3, (6, 0, 1), 9))
    options = {"scm_select": {"name": "markers", "markers": 0.5}, "scm_keep_ratio": 0.5}
    kept = model.kept_positions(**one, **options)[0].tolist()
    plain = model.kept_positions(**one, scm_keep_ratio=0.25)[0].tolist()
    assert set(plain) <= set(kept)
    embeddings = model.encode_images(one["input_ids"], one["pixel_values"])
    for place in sorted(set(kept) - set(plain)):
        if place - 1 in kept:  # a run of one token is that token
            continue
        first = max(k for k in kept if k < place) + 1
        embeddings[0, place] = embeddings[0, first : place + 1].mean(dim=0)
    position_ids = torch.tensor([kept])
    mask = torch.ones_like(position_ids)
    expected = model.generate(
        inputs_embeds=embeddings[:, kept], attention_mask=mask, position_ids=position_ids, **GREEDY
    )
    output = model.generate(**one, **GREEDY, **options, use_scm=True)
    assert torch.equal(output[:, one["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize(("side", "implementation"), [("left", "sdpa"), ("right", "eager")])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_row_of_a_batch_keeps_and_answers_as_alone(name, side, implementation):
    model, inputs, options = tiny_model(), with_grids(batch(*ROWS, side=side)), options_of(name)
    model.set_attn_implementation(implementation)
    length = inputs["input_ids"].shape[1]
    kept = model.kept_positions(**inputs, **options)
    output = model.generate(**inputs, **GREEDY, **options, use_scm=True)
    assert torch.equal(output[:, :length], inputs["input_ids"])
    for row in range(len(ROWS)):
        one = with_grids(alone(inputs, row))
        own = model.kept_positions(**one, **options)[0].tolist()
        assert without_padding(kept[row], inputs["attention_mask"][row]) == own
        answer = model.generate(**one, **GREEDY, **options, use_scm=True)[0, one["input_ids"].shape[1] :]
        assert torch.equal(output[row, length:], answer)


@pytest.mark.parametrize("queries", QUERIES)
def test_a_row_of_a_batch_keeps_as_alone_whoever_asks(queries):
    model, inputs = tiny_model(), batch(*ROWS)
    kept = model.kept_positions(**inputs, scm_queries=queries)
    for row in range(len(ROWS)):
        own = model.kept_positions(**alone(inputs, row), scm_queries=queries)[0].tolist()
        assert without_padding(kept[row], inputs["attention_mask"][row]) == own


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("name", ["smooth", "markers", "original", "layer"])
def test_beams_and_samples_go_on_from_what_stays(name, mode):
    model, inputs = tiny_model(), with_grids(batch(*ROWS[:2]))
    options = {**GREEDY, **options_of(name), **mode, "use_scm": True}
    output, length = model.generate(**inputs, **options), inputs["input_ids"].shape[1]
    copies = mode.get("num_return_sequences", 1)
    for row in range(2):
        one = with_grids(alone(inputs, row))
        own = model.generate(**one, **options)[:, one["input_ids"].shape[1] :]
        assert torch.equal(output[row * copies : (row + 1) * copies, length:], own)


@pytest.mark.parametrize("name", BY_NAME)
def test_ratio_one_is_bit_equal_to_no_compression(name):
    model, inputs = tiny_model(), with_grids(batch(*ROWS[:3]))
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_scm=True, scm_keep_ratio=1.0, scm_select=name)
    assert torch.equal(plain.sequences, whole.sequences)
    assert all(torch.equal(*pair) for pair in zip(plain.logits, whole.logits))


# --- chat ------------------------------------------------------------------------------------------------------------


CHAT = {"max_new_tokens": 6, "do_sample": False, "use_scm": True}
TILES = {"min_tiles": 2, "max_tiles": 4, "adaptive_min_tiles": 2, "adaptive_max_tiles": 3}


@pytest.mark.parametrize("name", [*SELECTIONS, {"shape": "block", "window": [2, 2], "positions": "original"}], ids=str)
def test_a_remembered_turn_answers_as_one_from_the_start(nano, processor, name):
    pictures = [synthetic_picture(300, 200, 1), synthetic_picture(150, 320, 2)]
    options = {**CHAT, "images_kwargs": TILES, "scm_select": name, "return_history": True}
    _, history = nano.chat(processor, pictures[0], "Read.", **options)
    again, longer = nano.chat(processor, pictures[0], "Again.", history=history, **options)
    fresh, _ = nano.chat(processor, pictures[0], "Again.", history=list(history), **{**options, "remember": False})
    assert again == fresh
    more, _ = nano.chat(processor, pictures, "<image>\nBoth?", history=longer, **options)
    fresh, _ = nano.chat(processor, pictures, "<image>\nBoth?", history=list(longer), **{**options, "remember": False})
    assert more == fresh


@pytest.mark.parametrize("name", ["smooth", "markers"])
def test_chat_streams(nano, processor, name):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {**CHAT, "images_kwargs": TILES, "scm_select": name}
    call = {"target": nano.chat, "args": (processor, synthetic_picture(300, 200, 1), "Read.")}
    thread = threading.Thread(**call, kwargs={**options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == nano.chat(processor, synthetic_picture(300, 200, 1), "Read.", **options)


def test_the_question_ends_with_its_message(nano, processor):
    """What the template puts after a question has no vote."""
    inputs = processor(
        synthetic_picture(300, 200, 1), "<image>\nWhat?<|im_end|><|im_start|>assistant\n", images_kwargs=TILES
    )
    other = processor(synthetic_picture(300, 200, 1), "<image>\nWhat?<|im_end|>xx", images_kwargs=TILES)
    kept, same = (nano.kept_positions(**one, scm_queries="question")[0] for one in (inputs, other))
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert kept[: tokens // 3].tolist() == same[: tokens // 3].tolist()
    ends = [int((inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero()[0])]
    shorter = nano.kept_positions(**inputs, scm_queries="question", scm_query_ends=ends)[0]
    assert torch.equal(kept, shorter)


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scm_select": "best"}, "no 'best'; known are"),
        ({"scm_select": {"shape": "block", "markers": 0.1}}, "blocks are whole"),
        ({"scm_select": "mass", "scm_keep_ratio": 0.5}, "leave out scm_keep_ratio"),
        ({"scm_select": "smooth", "tile_grids": None}, "pass tile_grids"),
        (
            {"scm_select": "block", "tile_grids": torch.tensor([[3, 2, 1, 1]])},
            "4 detailed tiles, but its grid has 3 x 2",
        ),
        ({"scm_queries": "nobody"}, "one of all, visual, balanced, question, last"),
    ],
)
def test_choices_that_cannot_work(options, message):
    model, inputs = tiny_model(), {**with_grids(batch((3, IMAGE, 9))), **options}
    for call in (model.kept_positions, lambda **given: model.generate(**given, **GREEDY, use_scm=True)):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_what_does_not_go_with_a_cache_of_its_own_is_refused(option):
    with pytest.raises(ValueError, match="makes a cache of its own"):
        tiny_model().generate(**batch((3, IMAGE, 9)), **GREEDY, use_scm=True, scm_select="layer", **option)


def test_a_question_that_asks_nothing_is_refused():
    model, one = tiny_model(), batch((3, IMAGE, 1))
    with pytest.raises(ValueError, match="scm_queries='question' counts"):
        model.kept_positions(**one, scm_queries="question")


def test_tiles_that_were_left_out_have_no_map(nano, processor):
    page = Image.new("RGB", (800, 1000), "white")
    page.paste(synthetic_picture(200, 100, 1), (20, 20))
    options = {**CHAT, "images_kwargs": {"preset": "ocrbench", "drop_blank": True}}
    with pytest.raises(ValueError, match="needs all tiles of a grid"):
        nano.chat(processor, page, "Read.", scm_select="smooth", **options)
    assert isinstance(nano.chat(processor, page, "Read.", scm_select="tile", **options), str)


def test_angles_of_several_kinds_are_refused():
    model, one = tiny_model("gpt_oss", head_dim=16, num_local_experts=2, num_experts_per_tok=1), batch((3, IMAGE, 9))
    assert len(model.kept_positions(**one, scm_select="coordinates")[0])  # one kind of angles
    with pytest.raises(ValueError, match="has no rotary angles"):
        rotary_means(torch.nn.Linear(2, 2), 4, torch.zeros(1, 2))
