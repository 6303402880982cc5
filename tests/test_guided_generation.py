"""The prompt for an image generator in an answer."""

import pytest

from minimonkey.guided_generation import generation_prompt


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("A cat.", None),
        ("Gladly. <h> a cat on\na mat </h>", "a cat on\na mat"),
        ("<h>a dog</h> or rather <h>a cat</h>, I think", "a cat"),
        ("<h>a dog</h> or <h>a cat", "a dog"),
        ("<h>never closed <h>a cat</h>", "a cat"),
        ("<h>never closed", None),
        ("closed</h> only", None),
        ("<h>  </h>", None),
    ],
)
def test_the_last_whole_span_counts(processor, answer, prompt):
    assert generation_prompt(answer) == processor.generation_prompt(answer) == prompt


def test_only_text_has_a_prompt():
    with pytest.raises(ValueError, match="got list"):
        generation_prompt(["<h>a cat</h>"])
