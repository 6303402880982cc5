"""How sure a model was of each word of an answer, or of each value of a JSON answer, from the probabilities of its tokens.

The confidence of a part is the product of the probabilities of the tokens that spell it: how likely the model was to write just
that. Tokens that reach over a border count for both sides.

    text, spans = token_spans(tokenizer, answer.token_ids)
    words = word_confidences(text, spans, answer.log_probabilities)
"""

import json
import math
import re
from collections.abc import Iterator

from tokenizers.decoders import DecodeStream


Span = tuple[int, int]


def token_spans(tokenizer, token_ids: list[int]) -> tuple[str, list[Span]]:
    """Return the text of tokens and for each its span (start, end) in it; special tokens are left out and have empty spans.

    Tokens that spell one character together all have the span of that character.
    """
    stream, text, spans, waiting = DecodeStream(skip_special_tokens=True), "", [], 0
    for token in token_ids:
        piece = stream.step(tokenizer.backend_tokenizer, token)
        waiting += 1
        if piece:
            spans += [(len(text), len(text) + len(piece))] * waiting
            text, waiting = text + piece, 0
    return text, spans + [(len(text), len(text))] * waiting


def part_confidence(part: Span, spans: list[Span], log_probabilities: list[float]) -> float:
    """Return the product of the probabilities, 0 to 1, of the tokens that overlap a part of the text."""
    start, end = part
    total = sum(value for (left, right), value in zip(spans, log_probabilities) if left < end and right > start)
    return math.exp(total)


def word_confidences(text: str, spans: list[Span], log_probabilities: list[float]) -> list[tuple[str, float]]:
    """Return the words of a text, parted by white space, with the confidence of each."""
    return [
        (match[0], round(part_confidence(match.span(), spans, log_probabilities), 4))
        for match in re.finditer(r"\S+", text)
    ]


def value_confidences(text: str, spans: list[Span], log_probabilities: list[float]) -> dict[str, float]:
    """Return the confidence of each value of a JSON object by its path, `total` or `items[0].price`.

    Raises:
        ValueError: The text is no JSON object.
    """
    start = text.index("{")
    found = _values(text, start, "")
    return {path: round(part_confidence(span, spans, log_probabilities), 4) for path, span in found}


SPACE = re.compile(r"\s*")
DECODER = json.JSONDecoder()


def _values(text: str, start: int, path: str) -> Iterator[tuple[str, Span]]:
    """Yield the path and span of each value that is not an object or array, of the JSON value that begins at `start`."""
    _, end = DECODER.raw_decode(text, start)
    if text[start] not in "{[":
        yield path, (start, end)
        return
    is_object, number = text[start] == "{", 0
    position = SPACE.match(text, start + 1).end()
    while text[position] not in "}]":
        inner = f"{path}[{number}]"
        if is_object:
            key, position = DECODER.raw_decode(text, position)
            inner = f"{path}.{key}" if path else key
            position = SPACE.match(text, SPACE.match(text, position).end() + 1).end()  # beyond the colon
        yield from _values(text, position, inner)
        _, position = DECODER.raw_decode(text, position)
        position = SPACE.match(text, position).end()
        if text[position] == ",":
            position, number = SPACE.match(text, position + 1).end(), number + 1
