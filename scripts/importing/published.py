"""Published checkpoints that were trained for tile ranges of their own.

Mini-InternVL's adapted models saw grids of up to twelve tiles and no adaptive ones; for driving, six stitched cameras, whose
tiles must not mix. What they are asked with `preset=` still decides.

Source: the model table of OpenGVLab/InternVL, internvl_chat/shell/mini_internvl.
"""

SIZES = ("1B", "2B", "4B")
DOMAIN_PRESETS = {"Drivelm": "multi_view", "BDD": "internvl", "RS": "internvl", "Medical": "internvl"}
PUBLISHED_PRESETS = {
    f"Mini-InternVL2-{size}-DA-{domain}": preset for size in SIZES for domain, preset in DOMAIN_PRESETS.items()
}
"""The preset of tiling.py, by the repository's name without its owner."""


def published_preset(source: str) -> str | None:
    """Return the preset of a published checkpoint by its Hub id or the name of its folder, None for any other."""
    return PUBLISHED_PRESETS.get(source.rstrip("/").rpartition("/")[2])
