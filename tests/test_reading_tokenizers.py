"""Answers held to a schema, and the confidence of their values, with a tokenizer of InternLM2's kind (byte fallback)."""

import json

import pytest
import torch
from sentencepiece_helpers import write_internlm2_folder

from minimonkey.scripts.importing.tokenizer import convert_tokenizer
from minimonkey.scripts.reading.confidence import token_spans, value_confidences, word_confidences
from minimonkey.scripts.reading.fields import Schema, fields_schema


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internlm2")
    write_internlm2_folder(folder)
    return convert_tokenizer(folder)[0]


def test_random_scores_become_json_that_fulfils_the_schema(internlm2):
    pytest.importorskip("llguidance", reason="llguidance, which holds answers to a schema, is not installed")
    end, quote = internlm2.convert_tokens_to_ids(["<|im_end|>", '"'])
    vocabulary, rows = len(internlm2) + 37, 3  # models have more logits than their tokenizers have tokens
    processor = Schema(fields_schema(["total", "date"])).processor(internlm2, vocabulary, end, rows)
    scores = torch.randn(400, rows, vocabulary, generator=torch.Generator().manual_seed(0))
    scores[:, :, quote] += 4  # so that texts end
    ids = torch.zeros(rows, 2, dtype=torch.long)
    for step in scores:
        ids = torch.cat([ids, processor(ids, step).argmax(dim=1, keepdim=True)], dim=1)
    for row in ids[:, 2:].tolist():
        row = row[: row.index(end) + 1]
        text, spans = token_spans(internlm2, row)
        assert [*json.loads(text)] == ["total", "date"]
        assert [*value_confidences(text, spans, [-0.1] * len(row))] == ["total", "date"]


@pytest.mark.parametrize("text", ["Read the text.", "你是 $5.00 ✓ or", " a  b", ""])
def test_tokens_are_told_apart_in_the_text_that_they_spell(internlm2, processor, text):
    for tokenizer in (internlm2, processor.tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled, spans = token_spans(tokenizer, ids)
        assert spelled == tokenizer.decode(ids) and len(spans) == len(ids)
        assert "".join(spelled[start:end] for start, end in sorted({*spans})) == spelled
        words = word_confidences(spelled, spans, [0.0] * len(ids))
        assert [word for word, _ in words] == text.split() and all(value == 1 for _, value in words)


def test_a_word_is_as_likely_as_its_tokens_together(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("ab zz", add_special_tokens=False)["input_ids"]
    text, spans = token_spans(tokenizer, ids)
    doubtful = next(index for index, (start, end) in enumerate(spans) if text[start:end].strip().startswith("z"))
    log_probabilities = [-1.0 if index == doubtful else 0.0 for index in range(len(ids))]
    assert word_confidences(text, spans, log_probabilities) == [("ab", 1.0), ("zz", pytest.approx(0.3679))]
