"""How many floating-point operations an image costs, counted from a model's configuration.

Matrix products and attention are counted, two for each multiplication and addition, nothing else. What text costs is left out:
it is the same in every way to show an image.
"""

from minimonkey.scripts.evaluation.ways import SMALLER, Way
from minimonkey.token_selection import SELECTIONS


def encoder_flops(config, tiles: float) -> float:
    """Count what the vision tower and the projector take for so many tiles."""
    vision, text = config.vision_config, config.text_config
    patch, width, inner = vision.patch_size[0], vision.hidden_size, vision.intermediate_size
    patches = (config.tile_size // patch) ** 2
    tokens = patches + 1
    layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * inner
    embedding = 2 * patches * vision.num_channels * patch**2 * width
    wide = round(width / config.downsample_ratio**2)
    projector = 2 * config.image_seq_length * text.hidden_size * (wide + text.hidden_size)
    return tiles * (embedding + vision.num_hidden_layers * layer + projector)


def prefill_flops(config, tokens: float, layers: float | None = None) -> float:
    """Count what the layers of the language model take to read so many tokens; by default all layers."""
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    products = 2 * tokens * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return (text.num_hidden_layers if layers is None else layers) * (products + 2 * tokens**2 * queries)


def way_flops(config, way: Way, tokens: float, read: float, scm_layer: int) -> tuple[float, float]:
    """Return what an image takes in the encoder, and in the language model until the first new token.

    Args:
        tokens: Image tokens of the prompt.
        read: Those that the language model reads.
        scm_layer: The layer whose attention decides, where attention does.
    """
    choice = (way.compressor or "").partition("@")[0]
    encoder, prefill = encoder_flops(config, tokens / config.image_seq_length), prefill_flops(config, read)
    if choice not in SELECTIONS or choice.startswith(SMALLER):
        return encoder, prefill
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = (text.num_attention_heads + text.num_key_value_heads) * head
    scored = prefill_flops(config, tokens, scm_layer) + 2 * tokens * text.hidden_size * width
    if SELECTIONS[choice].stage == "layer":  # which reads all tokens up to there once more
        prefill += prefill_flops(config, tokens, scm_layer) - prefill_flops(config, read, scm_layer)
    return encoder, prefill + (scored if SELECTIONS[choice].score == "attention" else 0)
