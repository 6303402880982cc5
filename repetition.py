"""A guard against loops: when the end of an answer repeats a period too often, the answer ends.

    model.chat(processor, "page.png", "Read the text.", stop_repetition=True, return_dict=True).finish_reason   "repetition"
    model.generate(**inputs, stop_repetition=True, tokenizer=tokenizer)      or with it in generation_config.json
    guard = RepetitionGuard(prompt_length, decode=tokenizer.decode)          for any model.generate(stopping_criteria=[guard])

Small models that read long texts fall into loops: a line, or a few words, again and again until the limit of tokens. Documents
repeat too: rules of dashes, dots that lead to a page number, columns of 0.00 or N/A, rows of "[ ] Yes [ ] No". So a run must be
long in tokens, which allows short periods more repeats than long ones, and one whose period has fewer than six different
letters must be `patience` times as long. Only exact repetition counts, not "Item 1, Item 2, ...".

Looks at token ids alone and keeps no state, so that it is the same for one row, batches and beams.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import StoppingCriteria


DEFAULTS = {"max_period": 128, "min_repeats": 4, "min_tokens": 128, "patience": 8}
FEW_LETTERS = 6


class RepetitionGuard(StoppingCriteria):
    """Ends the rows of a generation that repeat themselves.

    Args:
        prompt_length: Tokens of the prompt, which are not looked at.
        max_period: Longest period in tokens.
        min_repeats: So many times in a row a period must stand at the end (2 or more).
        min_tokens: So many tokens these must have together.
        patience: By how much both are multiplied for a period with fewer than six different letters.
        decode: Turns token ids into text, to see letters; None: patience is not used.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        prompt_length: int,
        max_period: int = DEFAULTS["max_period"],
        min_repeats: int = DEFAULTS["min_repeats"],
        min_tokens: int = DEFAULTS["min_tokens"],
        patience: int = DEFAULTS["patience"],
        decode: Callable[[list[int]], str] | None = None,
    ):
        for name, value, least in (
            ("prompt_length", prompt_length, 0),
            ("max_period", max_period, 1),
            ("min_repeats", min_repeats, 2),
            ("min_tokens", min_tokens, 1),
            ("patience", patience, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        self.prompt_length, self.max_period = prompt_length, max_period
        self.min_repeats, self.min_tokens, self.patience, self.decode = min_repeats, min_tokens, patience, decode
        # No run is looked at farther back than the longest that is asked for.
        self.window = patience * max(min_tokens, (min_repeats + 1) * max_period)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Tell for each row (B,) of prompts and answers (B, N) whether its answer ends in a loop."""
        start = max(self.prompt_length, input_ids.shape[1] - self.window)
        rows = input_ids[:, start:].tolist()
        return torch.tensor([self.is_loop(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def is_loop(self, ids: Sequence[int]) -> bool:
        """Tell whether the ids of an answer, without its prompt, end in a loop."""
        length = len(ids)
        for period in range(1, min(self.max_period, length // 2) + 1):
            if ids[-1] != ids[-1 - period]:
                continue
            run = period
            while run < length and ids[-1 - run] == ids[-1 - run + period]:
                run += 1
            asked = max(self.min_tokens, self.min_repeats * period)
            if run >= asked and (run >= self.patience * asked or self._has_letters(ids[-period:])):
                return True
        return False

    def _has_letters(self, ids: Sequence[int]) -> bool:
        return self.decode is None or len({*filter(str.isalpha, self.decode(list(ids)))}) >= FEW_LETTERS

    def find(self, ids: Sequence[int]) -> int | None:
        """Return after how many of an answer's ids the guard ends it; None: it does not."""
        return next((end for end in range(2, len(ids) + 1) if self.is_loop(ids[max(0, end - self.window) : end])), None)


def read_guard(
    stop_repetition: bool | dict[str, int] | None, prompt_length: int, decode: Callable[[list[int]], str] | None
) -> RepetitionGuard | None:
    """Return the guard that an argument `stop_repetition` asks for: None for False, a dict for other settings than the default.

    Raises:
        ValueError: It is something else, or its settings cannot be.
    """
    if stop_repetition is False or stop_repetition is None:
        return None
    if stop_repetition is not True and not isinstance(stop_repetition, dict):
        raise ValueError(f"stop_repetition is True, False or a dict of settings, got {stop_repetition!r}.")
    settings = {} if stop_repetition is True else stop_repetition
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ValueError(f"stop_repetition takes {', '.join(DEFAULTS)}, got {', '.join(map(str, unknown))}.")
    return RepetitionGuard(prompt_length, **settings, decode=decode)


__all__ = ["RepetitionGuard", "read_guard"]
