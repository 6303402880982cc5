"""The prompt for an image generator, taken from an answer: guided generation as in Mini-Gemini.

    prompt = generation_prompt(answer)
    if prompt is not None:
        picture = draw(prompt)                    # any text-to-image model of yours

A model that was trained for it is asked with `<GEN>` in the question and writes the prompt between `<h>` and `</h>`. No image
is made here, and nothing is needed for it.

Source: Mini-Gemini (arXiv 2403.18814), section 3.4, and its published code.
"""

import re


GENERATION_TRIGGER = "<GEN>"
_SPAN = re.compile(r"<h>((?:(?!<h>).)*?)</h>", re.DOTALL)


def generation_prompt(answer: str) -> str | None:
    """Return the last prompt for an image generator in an answer, without spaces around it; None if there is none.

    Raises:
        ValueError: The answer is not text.
    """
    if not isinstance(answer, str):
        raise ValueError(f"The prompt is taken from the text of an answer, got {type(answer).__name__}.")
    prompts = [found.strip() for found in _SPAN.findall(answer)]
    return prompts[-1] if prompts and prompts[-1] else None
