"""Published tokenizers become fast ones that give the ids of sentencepiece itself."""

import json

import pytest
from sentencepiece_helpers import IMAGE_TOKENS, sentencepiece, train_model, write_internlm2_folder
from tokenizers import AddedToken, pre_tokenizers, processors

from minimonkey.scripts.importing.tokenizer import build_from_sentencepiece, convert_tokenizer


TEXTS = [
    "the quick brown fox",
    " leading space",
    "two  spaces   three",
    "trailing space ",
    "line\nbreak\n\nand\ttab",
    "你是 a model",
    "unseen: żółw 🙂 ∑",
    "a",
    "Read the all text in the image.",
    "<s> is not a token here",
    "",
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"split_digits": True},
        {"user_defined_symbols": ["<sep>"]},
    ],
    ids=["internlm2", "no_dummy_prefix", "nfkc", "split_digits", "user_defined"],
)
def test_ids_and_text_are_those_of_sentencepiece(tmp_path, options):
    path = train_model(tmp_path, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer, _ = build_from_sentencepiece(path, {})
    for text in TEXTS:
        if text.startswith("<s>"):
            continue  # an added token in transformers, plain text in sentencepiece
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids), text


def test_internlm2_folder_keeps_every_special_id(tmp_path):
    tokens = write_internlm2_folder(tmp_path)
    tokenizer, with_bos = convert_tokenizer(tmp_path)
    assert with_bos
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    for token, index in tokens.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [index]
        assert token in tokenizer.all_special_tokens
    assert tokenizer.pad_token == "</s>"


def test_text_between_control_tokens_is_encoded_as_sentencepiece_encodes_it_alone(tmp_path):
    tokens = write_internlm2_folder(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer, _ = convert_tokenizer(tmp_path)
    prompt = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nRead the text.<|im_end|>"
    expected = [
        tokens["<|im_start|>"],
        *reference.encode("user\n"),
        tokens["<img>"],
        tokens["<IMG_CONTEXT>"],
        tokens["</img>"],
        *reference.encode("\nRead the text."),
        tokens["<|im_end|>"],
    ]
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == expected


def test_nothing_is_put_in_front_of_a_prompt(tmp_path):
    write_internlm2_folder(tmp_path)
    tokenizer, _ = convert_tokenizer(tmp_path)
    assert tokenizer("the")["input_ids"] == tokenizer("the", add_special_tokens=False)["input_ids"]


def test_llama_tokenizer_that_is_not_legacy_has_one_leading_space_only(tmp_path):
    path = train_model(tmp_path)
    added = {420: AddedToken("<|end|>", special=True, normalized=False, rstrip=True)}
    tokenizer, _ = build_from_sentencepiece(path, added, legacy=False)
    tokens = tokenizer.encode("the<|end|>\nthe", add_special_tokens=False).tokens
    assert tokens[0].startswith("▁")
    assert not any(token.startswith("▁") for token in tokens[1:])
    assert "<0x0A>" not in tokens  # the token takes the line break behind it along


def test_unigram_model_is_refused(tmp_path):
    path = train_model(tmp_path, model_type="unigram", byte_fallback=False, vocab_size=80)
    with pytest.raises(ValueError, match="not a BPE model"):
        build_from_sentencepiece(path, {})


def test_damaged_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(ValueError, match="damaged"):
        convert_tokenizer(tmp_path)


def test_gap_in_added_ids_is_refused(tmp_path):
    path = train_model(tmp_path)
    with pytest.raises(ValueError, match="added tokens behind them"):
        build_from_sentencepiece(path, {425: AddedToken("<img>", special=True)})


def test_qwen2_files_keep_their_ids(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "th", "the"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    size = len(vocabulary)
    tokens = {"<|endoftext|>": size, "<|im_start|>": size + 1, "<|im_end|>": size + 2}
    tokens |= {token: size + 3 + i for i, token in enumerate(IMAGE_TOKENS)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in tokens.items()},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, with_bos = convert_tokenizer(tmp_path)
    assert not with_bos
    assert tokenizer("the", add_special_tokens=False)["input_ids"] == [vocabulary["the"]]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in tokens} == tokens


def test_tokenizer_json_keeps_its_ids_and_loses_its_bos(tmp_path):
    tokens = write_internlm2_folder(tmp_path)
    converted, _ = convert_tokenizer(tmp_path)
    backend = converted.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "tokenizer.model").unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, with_bos = convert_tokenizer(tmp_path)
    assert with_bos
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in tokens} == tokens
    assert tokenizer("the")["input_ids"][0] != 1
