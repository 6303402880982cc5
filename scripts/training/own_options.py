"""The options of a run without a recipe, by the model and the machine.

A model below SMALL parameters is trained whole; a larger one gets LoRA adapters, which fit one GPU of 24 GB with 2 billion.
Images are cut as the model's own processor cuts them, so that training sees what `chat` shows.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.repository import load_processor, readable
from minimonkey.tiling import RANGE_NAMES


SMALL = 100e6  # parameters
LORA_RANK = 16
LEARNING_RATES = {"whole": 3e-4, "lora": 1e-4}
SEEN_EXAMPLES = 500  # fewer examples are seen again and again until they are so many
MOST_EPOCHS = 50
LONGEST = 8192  # tokens; as the published fine-tuning


def count_parameters(config: MiniMonkeyConfig) -> int:
    """Count the parameters of a model of this configuration without building it in memory."""
    with init_empty_weights():
        model = MiniMonkeyForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


def own_options(model: str, data: str | dict, examples: int, output: Path) -> dict[str, Any]:
    """Return the options of a recipe for a model and data of one's own.

    Args:
        data: As a recipe's.
        examples: How many examples it holds, which decides how often each is seen.

    Raises:
        ValueError: The folder holds no MiniMonkey model.
    """
    processor = load_processor(model)
    with readable(model):
        config = MiniMonkeyConfig.from_pretrained(model)
    is_small = count_parameters(config) < SMALL
    reader = processor.image_processor
    options = {
        "model": model,
        "data": data,
        "output_dir": str(output),
        "use_cpu": not torch.accelerator.is_available(),
        "tile_ranges": [[getattr(reader, name) for name in RANGE_NAMES]],
        "max_seq_length": min(LONGEST, config.text_config.max_position_embeddings),
        "num_train_epochs": min(MOST_EPOCHS, max(1, SEEN_EXAMPLES // examples)),
        "learning_rate": LEARNING_RATES["whole" if is_small else "lora"],
        "batch_size": min(8, examples) if is_small else 16,
        "per_device_train_batch_size": min(8, examples) if is_small else 1,
        "dataloader_num_workers": 0 if is_small else 4,
        "logging_steps": 10,
    }
    if is_small:
        return options | {"train": ["language_model", "projector", "vision"]}
    adapters = {"lora_r": LORA_RANK, "lora_dropout": 0.05, "dtype": "auto"}
    return options | adapters | {"gradient_checkpointing": True, "order": "grouped"}
