"""Checks what a generation is asked for before anything is computed for it.

transformers looks at its settings after the prompt was embedded, which for a page of tiles is a minute's work on a small
machine. The same checks run here first.
"""

import copy
import inspect
from numbers import Integral
from typing import Any

from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length")
# Each refuses the values that it cannot work with; 0 turns some of them off.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
OFF_AT_ZERO = ("no_repeat_ngram_size", "top_k")
# Taken by `generate` without standing in its signature.
ALSO_TAKEN = ("tokenizer", "assistant_tokenizer", "trust_remote_code")


def check_generation_options(model, generation_config: GenerationConfig | None, options: dict[str, Any]) -> None:
    """Raise `ValueError` for settings that cannot work and for arguments that nothing takes.

    Args:
        model: Whose `generate` is called.
        generation_config: As `generate` takes it.
        options: The other arguments of `generate`; they are not changed.
    """
    if options.get("custom_generate") is not None:
        return  # which may take whatever it likes
    taken = {*inspect.signature(type(model).generate).parameters, *ALSO_TAKEN} - vars(GenerationConfig()).keys()
    settings = {name: value for name, value in options.items() if name not in taken}
    for name in COUNTS:
        value = settings.get(name, getattr(generation_config, name, None))
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    try:
        unused = config.update(**settings)
        config.validate()
    except TypeError as error:
        raise ValueError(f"A setting of the generation has the wrong type: {error}") from error
    for name, processor in {**PROCESSORS, **(WARPERS if config.do_sample else {})}.items():
        value = getattr(config, name, None)
        if value is not None and not (value == 0 and name in OFF_AT_ZERO):
            processor(value)
    model._validate_model_kwargs(unused)
