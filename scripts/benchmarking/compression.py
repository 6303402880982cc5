"""Scale compression: what scoring costs compared with the published method, and what prefill gains.

Measured with random weights, on the language model alone; the memory is also that of a whole `generate` with vision.
"""

import argparse
import re
from functools import partial

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from minimonkey.attention_probe import attention_inputs
from minimonkey.compression import CompressionSettings, find_images, kept_positions, pack
from minimonkey.scripts.benchmarking.measure import free_bytes, median_seconds, megabytes, peak_extra_bytes, report
from minimonkey.scripts.benchmarking.models import SIZES, random_config, random_model, random_tiles
from minimonkey.scripts.precision import DTYPES, add_dtype_argument
from minimonkey.scripts.repository import add_device_argument, whole_number


TEXT_BEFORE, TEXT_AFTER = 40, 30  # tokens of a prompt around its image
PARTS = ("scoring", "prefill", "generate")
# heads x N x N matrices in float32 that the published method holds at a time.
EAGER_MATRICES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2B", choices=(*SIZES, "Nano"), help="dimensions (default: 2B)")
    parser.add_argument(
        "--tiles", nargs="+", type=tile_counts, default=["4+3+1", "9+6+1", "12+6+1", "24+9+1"], metavar="D+A+T"
    )
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--scoring-dtype",
        default="float32",
        choices=DTYPES[1:],
        help="float32 (default) makes the order of scores definite",
    )
    add_dtype_argument(parser, "of prefill and generate; ")
    parser.add_argument(
        "--layers", type=whole_number(1), default=None, help="fewer layers of the language model for prefill"
    )
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    add_device_argument(parser)


def tile_counts(text: str) -> str:
    """Check the numbers of detailed, adaptive and thumbnail tiles, written as 12+6+1, and return them unchanged."""
    if not re.fullmatch(r"\d+\+\d+\+\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 12+6+1 (detailed, adaptive and thumbnail tiles)")
    return text


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    parts = {"scoring": scoring, "prefill": prefill, "generate": generate}
    for part in args.parts:
        rows = parts[part](args, device)
        report(f"compression/{part}", rows, device, args)


def published_scores(language_model: nn.Module, embeddings: torch.Tensor, block: slice) -> torch.Tensor:
    """Compute the scores as published: two whole layers in eager attention, every weight of every head.

    Only for models of Llama's structure, which InternLM2 has; (n, D) embeddings give (keys of the block,) scores.
    """
    hidden = embeddings[None]
    length = hidden.shape[1]
    cos, sin = language_model.rotary_emb(hidden, torch.arange(length, device=hidden.device)[None])
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(1)
    for layer in language_model.layers[:2]:
        attention, residual = layer.self_attn, hidden
        hidden = layer.input_layernorm(hidden)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key, value = (repeat_kv(states, attention.num_key_value_groups) for states in (key, value))
        weights = query @ key.transpose(2, 3) / attention.head_dim**0.5
        weights = weights + mask
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(hidden.dtype)
        hidden = residual + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return weights[0, :, block.stop :, block].mean(dim=1).mean(dim=0)


class Prompt:
    """One row with one image: random embeddings (1, N, D) and what scale compression makes of them."""

    def __init__(self, model: nn.Module, tiles: str, keep_ratio: float):
        config, language_model = model.config, model.model.language_model
        tile_counts = torch.tensor([[int(count) for count in tiles.split("+")]])
        detailed, image_tokens = (
            config.image_seq_length * int(count) for count in (tile_counts[0, 0], tile_counts.sum())
        )
        self.tokens = TEXT_BEFORE + image_tokens + TEXT_AFTER
        self.block = slice(TEXT_BEFORE, TEXT_BEFORE + detailed)
        self.tiles = random_tiles(int(tile_counts.sum()), model)
        self.input_ids = torch.full((1, self.tokens), 5, device=model.device)
        self.input_ids[0, TEXT_BEFORE : TEXT_BEFORE + image_tokens] = config.image_token_id
        self.mask = torch.ones_like(self.input_ids)
        generator = torch.Generator(model.device).manual_seed(1)
        shape = (1, self.tokens, config.text_config.hidden_size)
        self.embeddings = torch.empty(shape, device=model.device, dtype=model.dtype).normal_(generator=generator)
        self.settings = CompressionSettings(keep_ratio, 1, len(language_model.layers))
        self.images = find_images(
            self.input_ids, self.mask, tile_counts, config.image_token_id, config.image_seq_length, self.settings
        )
        self.probe = lambda sequence, is_image: attention_inputs(language_model, sequence, layer=1)
        self.tile_counts = tile_counts

    def kept_positions(self) -> torch.Tensor:
        """Return the positions that are kept, found as `generate` finds them."""
        return kept_positions(self.embeddings, self.mask, self.images, self.settings, self.probe)[0][0]

    def compressed(self) -> torch.Tensor:
        """Return the shorter prompt (1, M, D), scoring included."""
        return pack((self.embeddings,), [self.kept_positions()])[0][0]


@torch.no_grad()
def scoring(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure our and the published way of finding the kept positions, from the same embeddings."""
    config = random_config(args.size, layers=2)
    model = random_model(config, device, getattr(torch, args.scoring_dtype))
    rows = []
    for tiles in args.tiles:
        prompt = Prompt(model, tiles, args.keep_ratio)
        row = {"tiles": tiles, "tokens": prompt.tokens}
        needed = EAGER_MATRICES * config.text_config.num_attention_heads * prompt.tokens**2 * 4
        functions = {"ours": prompt.kept_positions}
        if needed < free_bytes(device):
            functions["eager"] = partial(published_kept, model.model.language_model, prompt)
        seconds = median_seconds(functions, device, args.repeats)
        extra = {name: peak_extra_bytes(function, device) for name, function in functions.items()}
        kept = {name: function() for name, function in functions.items()}
        row |= {f"{name} s": seconds.get(name) for name in ("eager", "ours")}
        row["time ratio"] = seconds["ours"] / seconds["eager"] if "eager" in seconds else None
        row |= {f"{name} MB": megabytes(extra.get(name)) for name in ("eager", "ours")}
        known = extra["ours"] is not None and extra.get("eager")
        row["memory ratio"] = extra["ours"] / extra["eager"] if known else None
        row["same kept"] = bool(torch.equal(kept["ours"], kept["eager"])) if "eager" in kept else None
        rows.append(row)
    return rows


def published_kept(language_model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """Return the positions that the published scores keep, without the token that the published code also loses."""
    scores = published_scores(language_model, prompt.embeddings[0], prompt.block)
    kept = scores.topk(int(len(scores) * prompt.settings.keep_ratio)).indices.sort().values + prompt.block.start
    positions = torch.arange(prompt.tokens, device=scores.device)
    return torch.cat([positions[: prompt.block.start], kept, positions[prompt.block.stop :]])


@torch.no_grad()
def prefill(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure the language model reading the prompt up to its first new token, with and without compression."""
    model = random_model(random_config(args.size, args.layers), device, getattr(torch, args.dtype))
    rows = []
    for tiles in args.tiles:
        prompt = Prompt(model, tiles, args.keep_ratio)

        def read(embeddings):
            return model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)

        functions = {
            "plain": lambda prompt=prompt: read(prompt.embeddings),
            "SCM": lambda prompt=prompt: read(prompt.compressed()),
            "scoring": prompt.kept_positions,
        }
        seconds = median_seconds(functions, device, args.repeats)
        row = {"tiles": tiles, "tokens": prompt.tokens, "kept": len(prompt.kept_positions())}
        row |= {f"{name} s": value for name, value in seconds.items()}
        rows.append({**row, "time ratio": seconds["SCM"] / seconds["plain"]})
    return rows


def generate(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure the peak memory of a whole `generate` of 8 tokens, vision included, beyond the weights."""
    model = random_model(random_config(args.size, args.layers), device, getattr(torch, args.dtype))
    rows = []
    for tiles in args.tiles:
        prompt = Prompt(model, tiles, args.keep_ratio)
        inputs = {"input_ids": prompt.input_ids, "attention_mask": prompt.mask, "pixel_values": prompt.tiles}
        options = {"tile_counts": prompt.tile_counts, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        extra = {
            use_scm: peak_extra_bytes(
                partial(model.generate, **inputs, **options, pad_token_id=0, use_scm=use_scm), device
            )
            for use_scm in (False, True)
        }
        ratio = extra[True] / extra[False] if extra[False] else None
        row = {"tiles": tiles, "tokens": prompt.tokens, "plain MB": megabytes(extra[False])}
        rows.append({**row, "SCM MB": megabytes(extra[True]), "memory ratio": ratio})
    return rows
