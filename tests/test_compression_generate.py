"""Generation with scale compression: modes, lengths, batches and padding, and what it leaves as it was."""

import copy
import threading

import pytest
import torch
from compression_helpers import GREEDY, IMAGE, LANGUAGE_MODELS, ROWS, alone, batch, eager_kept, without_padding
from model_helpers import GENERATION_MODES, tiny_model
from transformers import GenerationConfig


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


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 5.0},
        {"repetition_penalty": 5.0, "num_beams": 2},
        {"generation_config": GenerationConfig(repetition_penalty=5.0)},
        {"guidance_scale": 3.0},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("use_scm", [False, True], ids=["whole", "compressed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_reads_the_prompt_gives_a_row_what_it_gives_alone(side, use_scm, options):
    model, inputs = tiny_model(), batch(*ROWS[:4], side=side)
    length, settings = inputs["input_ids"].shape[1], {**GREEDY, **options, "use_scm": use_scm}
    output = model.generate(**inputs, **settings)
    assert torch.equal(output[:, :length], inputs["input_ids"])
    for row in range(4):
        one = alone(inputs, row)
        assert torch.equal(output[row, length:], model.generate(**one, **settings)[0, one["input_ids"].shape[1] :])


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


def test_text_padded_on_the_right_gives_what_it_gives_alone():
    model, inputs = tiny_model(), batch((5,), (12,), (8,), side="right")
    new = model.generate(**inputs, **GREEDY, use_scm=True)[:, 12:]
    for row in range(3):
        ids = alone(inputs, row)["input_ids"]
        assert torch.equal(new[row], model.generate(ids, **GREEDY)[0, ids.shape[1] :])


def test_images_without_detailed_tiles_are_answered_as_without_compression():
    model, inputs = tiny_model(), batch((3, (0, 0, 1), 4), (2, (0, 2, 1), 0))
    plain = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_scm=True), plain)


# --- ratio 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:3]], ids=["one", "left_padded"])
def test_ratio_one_is_bit_equal_to_no_compression(rows):
    model, inputs = tiny_model(), batch(*rows)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_scm=True, scm_keep_ratio=1.0)
    assert torch.equal(plain.sequences, whole.sequences)
    assert all(torch.equal(*pair) for pair in zip(plain.logits, whole.logits))


# --- modes -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("row", ROWS[:2])
def test_greedy_tokens_are_those_of_the_kept_embeddings(row):
    model, one = tiny_model(), batch(row)
    kept = eager_kept(model, one)
    output = model.generate(**one, **GREEDY, use_scm=True)
    assert torch.equal(output[:, : one["input_ids"].shape[1]], one["input_ids"])
    assert output[0, one["input_ids"].shape[1] :].tolist() == greedy_by_hand(model, one, kept)


@pytest.mark.parametrize(
    "options", [*GENERATION_MODES, {"use_cache": False}, {"return_dict_in_generate": True}], ids="-".join
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


def test_vision_and_the_scoring_pass_run_once():
    model, inputs, vision, rotations = tiny_model(num_hidden_layers=4), batch(ROWS[0]), [], []
    model.model.vision_tower.register_forward_hook(lambda *args: vision.append(1))
    model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: rotations.append(1))
    model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}, use_scm=True)
    assert len(vision) == 1
    assert len(rotations) == 4  # one to score, three to generate


# --- lengths ---------------------------------------------------------------------------------------------------------


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


# --- accelerate and peft ---------------------------------------------------------------------------------------------


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


@torch.no_grad()
def test_dynamic_rope_forgets_the_scored_prompt():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=16)
    short = torch.arange(3, 23)[None]  # longer than 16: its own frequencies, not those of what came before
    before = model(input_ids=short).logits
    model.kept_positions(**batch(ROWS[1]))
    assert torch.equal(model(input_ids=short).logits, before)


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS[:1], ((3, IMAGE, 9), (60,))], ids=["alone", "beside_longer_text"])
def test_the_cache_of_a_compressed_prompt_is_refused_later(rows):
    model, one = tiny_model(), batch(*rows)
    first = model.generate(**one, **GREEDY, use_scm=True, return_dict_in_generate=True)
    for later in ({}, {"pixel_values": one["pixel_values"]}):
        with pytest.raises(ValueError, match="scale compression"):
            model.generate(first.sequences, **later, **GREEDY, past_key_values=first.past_key_values)


def test_embeddings_are_not_compressed():
    model, one = tiny_model(), batch((9,))
    embeddings = model.get_input_embeddings()(one["input_ids"])
    for given in ({}, one):
        with pytest.raises(ValueError, match="instead of inputs_embeds"):
            model.generate(inputs_embeds=embeddings, **given, **GREEDY, use_scm=True)


@pytest.mark.gpu
def test_flash_attention_keeps_what_sdpa_keeps():
    """Head sizes of the published models; flash attention hands out no weights, and the published code crashes with it."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = tiny_model("llama", **sizes).to("cuda", torch.bfloat16)
    one = {name: value.to("cuda") for name, value in batch((3, IMAGE, 9)).items()}
    one["pixel_values"] = one["pixel_values"].to(torch.bfloat16)
    kept = {}
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        kept[implementation] = model.kept_positions(**one)[0].tolist()
        assert model.generate(**one, use_scm=True, **GREEDY).shape[1] > one["input_ids"].shape[1]
    together = set(kept["sdpa"]) & set(kept["flash_attention_2"])
    assert len(together) >= len(kept["sdpa"]) - 2  # in bfloat16 neighbours in the order may change places
