"""Fields of a page as JSON that a schema holds: which tokens may come next is decided by llguidance.

    schema = fields_schema(["invoice_number", "total"])
    held = Schema(schema)                      ValueError for a schema that nothing, or nothing here, can fulfil
    model.batch_chat(..., logits_processor=LogitsProcessorList([held.processor(tokenizer, vocabulary, end, rows=4)]))

llguidance (extra `fields`) has no dependencies, takes any tokenizer of the tokenizers library (byte level, byte fallback,
SentencePiece as converted), covers most of JSON Schema, and refuses what it does not cover instead of ignoring it.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor


# As models write JSON, and without freedom in white space, in which they can go on for ever.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def fields_schema(names: list[str]) -> dict:
    """Return the schema of an object in which each of these fields is a text, or null where the page has none.

    Raises:
        ValueError: No names, an empty one, or one twice.
    """
    if not names or not all(name.strip() for name in names) or len({*names}) < len(names):
        raise ValueError(f"Fields are different names with commas between, invoice_number,total,date; got {names}.")
    properties = {name: {"type": ["string", "null"]} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def read_schema(path: Path) -> dict:
    """Read a JSON schema, of an object, from a file.

    Raises:
        ValueError: It is not there, no JSON, or no schema of an object.
    """
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The schema {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"The schema {path} is no JSON: {error}.") from error
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ValueError(f'The schema {path} must be of an object: {{"type": "object", "properties": {{...}}}}.')
    return schema


class Schema:
    """A schema that was found possible.

    Raises:
        ValueError: llguidance is not installed, nothing can fulfil the schema, or it has a keyword that is not supported.
    """

    def __init__(self, schema: dict):
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError("Fields need llguidance, which holds answers to a schema: pip install llguidance")
        from llguidance import LLMatcher

        self.schema = schema
        try:
            self.grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=FORM)
        except ValueError as error:
            raise ValueError(f"The schema cannot be used: {error}") from error
        if message := LLMatcher.validate_grammar(self.grammar):
            raise ValueError(f"The schema cannot be used: {' '.join(message.split())}")

    def processor(self, tokenizer, vocabulary: int, end: int, rows: int) -> "SchemaProcessor":
        """Return what holds the answers of a batch of `rows` to the schema.

        Args:
            vocabulary: Number of logits of the model.
            end: The id of the token that ends an answer.
        """
        key = (id(tokenizer), vocabulary, end)
        if getattr(self, "_tokenizer_key", None) != key:
            import llguidance.hf

            self._tokenizer_key = key
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=end)
        return SchemaProcessor(self.grammar, self._tokenizer, vocabulary, end, rows)


class SchemaProcessor(LogitsProcessor):
    """Gives every token that would leave the schema a score of minus infinity; for one generation, one sequence a row."""

    def __init__(self, grammar: str, tokenizer, vocabulary: int, end: int, rows: int):
        import llguidance.numpy
        from llguidance import LLMatcher

        self._fill = llguidance.numpy.fill_next_token_bitmask
        self._matchers = [LLMatcher(tokenizer, grammar) for _ in range(rows)]
        self._mask = llguidance.numpy.allocate_token_bitmask(rows, vocabulary)
        self._end, self._has_begun = end, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, vocabulary) with those of tokens that cannot come next at minus infinity."""
        if self._has_begun:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist()):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self._has_begun = True
        for row, matcher in enumerate(self._matchers):
            if matcher.is_error():
                raise ValueError(f"An answer cannot be held to the schema: {matcher.get_error()}")
            if matcher.is_stopped():
                self._mask[row] = 0
                self._mask[row, self._end // 32] = np.uint32(1 << self._end % 32).view(np.int32)
            else:
                self._fill(matcher, self._mask, row)
        bits = np.unpackbits(self._mask.view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]]
        allowed = torch.from_numpy(bits.astype(bool)).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)
