"""Another way from the vision tower to the language model, put into a model that has been trained without it.

    projector: resampler        learned queries in the place of pixel shuffle and its two layers; fresh, to be trained
    mining: true                the thumbnail asks the detailed tiles; begins as the thumbnail alone
    tiling: slices              images in slices of their own size, as MiniCPM-V cuts them

are options of a recipe. What the model has already stays: a run that goes on from a trained resampler trains that one.
"""

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.scripts.training.recipe import Recipe
from minimonkey.tiling import SLICES


def grafted_config(config: MiniMonkeyConfig, recipe: Recipe) -> MiniMonkeyConfig:
    """Return a configuration with what the recipe puts into the model; the same one if that is nothing.

    Raises:
        ValueError: Parts that do not go together.
    """
    wanted = {"projector": recipe.projector, "resampler_queries": recipe.resampler_queries}
    wanted = {name: value for name, value in wanted.items() if value is not None} | (
        {"mining": True} if recipe.mining else {}
    )
    if all(getattr(config, name) == value for name, value in wanted.items()):
        return config
    return type(config)(**{**config.to_dict(), **wanted})


def graft_processor(processor, config: MiniMonkeyConfig, recipe: Recipe) -> None:
    """Let a freshly loaded processor cut and count images as the model of this configuration sees them.

    Raises:
        ValueError: A tiling that the model cannot be trained with.
    """
    reader = processor.image_processor
    processor.image_seq_length, processor.projector, processor.mining = (
        config.image_seq_length,
        config.projector,
        config.mining,
    )
    reader.slice_multiple = config.view_multiple
    if recipe.tiling is not None:
        reader.tiling = recipe.tiling
    if config.mining and recipe.tiling is None and reader.tiling.startswith("msac"):
        reader.tiling = "internvl"
    if config.mining and (reader.tiling.startswith("msac") or reader.tiling == SLICES or not reader.use_thumbnail):
        raise ValueError(
            f"mining reads a detailed grid and a thumbnail: tiling is internvl, logscore or relaxed, got {reader.tiling!r} "
            f"(use_thumbnail {reader.use_thumbnail})."
        )
    reader.check_options({})
    if recipe.names_letters and (config.mining or reader.tiling == SLICES):
        raise ValueError(
            "letters are named on square tiles whose tokens are the prompt's; leave out mining and slices."
        )
