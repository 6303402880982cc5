"""What a run takes, before anything is loaded: memory of a card, tokens of a step, hours.

    estimate = Estimate.of(config, recipe, Cards(count=8, gib=24))
    print(estimate.describe())

The model is built on the meta device, where tensors have shapes and no memory. What the backward pass keeps is counted there,
by autograd itself, of one layer of each stack, with an attention that keeps what flash attention keeps. Tokens and tiles are
the most that the recipe allows; hours depend on a share of the card's speed that is assumed, and printed.
"""

import re
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from transformers import AttentionInterface

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import VISION_CHUNK_TILES, MiniMonkeyForConditionalGeneration
from minimonkey.quantized_weights import QuantizedWeightsConfig, QuantizedWeightsQuantizer, StoredLinear
from minimonkey.scripts.training.models import ADAPTED, freeze, freeze_by_name, whole_modules
from minimonkey.scripts.training.recipe import Recipe


GIB = 2**30
ADAM_BYTES = 8  # of its two moments in float32
LOGIT_BYTES = 14  # of a logit in bfloat16, its float32 copy, softmax and gradient
WASTE = 1.1  # allocator and communication, assumed
STAGES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP2")
ESTIMATE, FITS = "estimate", "fits"


@dataclass(frozen=True)
class Cards:
    """The GPUs of a run: how many, their memory, and how fast they multiply matrices.

    The defaults are those of the RTX 3090: 71 TFLOPS dense in bfloat16, of which training reaches about a third.
    """

    count: int = 8
    gib: float = 24.0
    tflops: float = 71.0
    utilisation: float = 0.35


class _KeptByFlash(torch.autograd.Function):
    """Keeps for the backward pass what flash attention keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("Memory is estimated by a forward pass alone.")


def _attend(module, query, key, value, attention_mask=None, **kwargs):
    return _KeptByFlash.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(ESTIMATE, _attend)


def kept_bytes(layer: torch.nn.Module, tokens: int, width: int, **inputs) -> float:
    """Return the bytes that one layer keeps for its backward pass, for each of `tokens`; parameters do not count.

    Args:
        layer: On the meta device.
        inputs: What the layer takes besides hidden states (1, tokens, width).
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no storage is freed and its number used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    dtype = next(layer.parameters()).dtype
    hidden = torch.empty(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, **inputs)
    return sum(kept.values()) / tokens


@dataclass(frozen=True)
class Estimate:
    """What a run of a recipe takes.

    Attributes:
        weight_bytes: The bytes of a weight that is trained, and of one that is not, without sharding.
        activations, logits: Bytes that a card keeps for the backward pass.
        row: Tokens and tiles, at most, that go through the model at once.
        step_samples: Samples or packed rows of an optimizer step, and how many go through the model at once.
    """

    cards: Cards
    parameters: int
    trained: int
    weight_bytes: tuple[float, float]
    activations: int
    logits: int
    row: tuple[int, int]
    step_samples: tuple[int, int]
    steps: int | None
    step_flops: float

    @classmethod
    def of(cls, config: MiniMonkeyConfig, recipe: Recipe, cards: Cards, bf16: bool = True) -> "Estimate":
        """Estimate a run of `recipe` with a model of this configuration."""
        with init_empty_weights():
            model = MiniMonkeyForConditionalGeneration(config)
        model.set_attn_implementation(ESTIMATE)
        freeze(model, recipe.train if recipe.lora_r is None else [])
        freeze_by_name(model, recipe)
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapters = _adapter_parameters(model, recipe.lora_r) if recipe.lora_r is not None else 0
        for name in whole_modules(model, recipe.lora_also) if recipe.lora_also else ():
            adapters += sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        copies = 2 if bf16 and recipe.dtype == "float32" else 0  # autocast keeps weights in bfloat16 besides
        frozen_bytes = (2 if recipe.dtype in ("bfloat16", "auto") else 4) + copies
        if recipe.frozen_weights is not None:
            frozen_bytes = _stored_bytes(config, recipe.frozen_weights, frozen_bytes) / parameters
        tokens, tiles = _row(recipe, config)
        # Packed rows have logits where answers are, at most all of the text; others everywhere.
        predicted = max(1, tokens - tiles * config.image_seq_length) if recipe.pack_tokens else tokens
        at_once = recipe.per_device_train_batch_size
        return cls(
            cards,
            parameters + adapters,
            trained + adapters,
            weight_bytes=((2 if recipe.dtype == "bfloat16" else 4) + copies, frozen_bytes),
            activations=_activations(model, recipe, tokens, tiles, bf16),
            logits=predicted * config.text_config.vocab_size * LOGIT_BYTES,
            row=(tokens, tiles),
            step_samples=(recipe.batch_size, at_once),
            steps=recipe.max_steps if recipe.max_steps > 0 else None,
            step_flops=_flops(model, config, recipe, tokens, tiles) * recipe.batch_size / at_once,
        )

    def card_gib(self, stage: int) -> float:
        """Return the memory of a card in GiB, the allocator's waste included.

        Args:
            stage: 0: DDP, weights and AdamW's moments in float32. 1 to 3: ZeRO, weights and gradients in bfloat16, and over all
                cards moments and weights in float32, from 2 on gradients, from 3 on weights. FSDP2 splits as much as 3.
        """
        count, frozen = self.cards.count, self.parameters - self.trained
        if stage == 0:
            state = self.trained * (self.weight_bytes[0] + 4 + ADAM_BYTES) + frozen * self.weight_bytes[1]
        else:
            weights = (2 * self.trained + min(2, self.weight_bytes[1]) * frozen) / (count if stage == 3 else 1)
            gradients = 2 * self.trained / (count if stage >= 2 else 1)
            state = weights + gradients + self.trained * (4 + ADAM_BYTES) / count
        return (state + self.activations + self.logits) * WASTE / GIB

    def verdict(self, stage: int) -> str:
        """Say whether a card holds it with this stage."""
        if stage == 3 and self.row[1] > VISION_CHUNK_TILES:
            return f"takes at most {VISION_CHUNK_TILES} tiles at once, here are {self.row[1]}"
        return FITS if self.card_gib(stage) <= self.cards.gib else "does not fit"

    @property
    def fits(self) -> bool:
        """Whether a card holds it with one of the stages."""
        return any(self.verdict(stage) == FITS for stage in range(len(STAGES)))

    @property
    def hours(self) -> float | None:
        """The hours of the run, if its number of steps is known."""
        speed = self.cards.count * self.cards.tflops * 1e12 * self.cards.utilisation
        return None if self.steps is None else self.steps * self.step_flops / speed / 3600

    def describe(self) -> str:
        """Say all of it in a few lines."""
        cards, (samples, at_once), (tokens, tiles) = self.cards, self.step_samples, self.row
        lines = [
            f"{self.parameters / 1e6:.0f} million parameters, {self.trained / 1e6:.0f} million of them trained.",
            f"At once at most {tokens} tokens, {tiles} tiles; a step at most {samples // at_once * tokens} tokens.",
            f"For the backward pass: activations {self.activations / GIB:.1f} GiB, logits {self.logits / GIB:.1f} GiB.",
        ]
        lines += [
            f"  {name:<14} {self.card_gib(stage):6.1f} of {cards.gib:g} GiB a card: {self.verdict(stage)}"
            for stage, name in enumerate(STAGES)
        ]
        if self.hours is None:
            lines.append("The number of steps follows from the data; give max_steps for an estimate of the hours.")
        else:
            speed = f"{cards.tflops:g} TFLOPS at {cards.utilisation:.0%}"
            lines.append(
                f"{self.steps} steps: about {self.hours:.1f} hours on {cards.count} cards of {speed} (assumed)."
            )
        return "\n".join(lines)


def _row(recipe: Recipe, config: MiniMonkeyConfig) -> tuple[int, int]:
    """Return the most tokens and tiles of what goes through the model at once."""
    if recipe.pack_tokens is not None:
        return recipe.pack_tokens, min(recipe.pack_tiles, recipe.pack_tokens // config.image_seq_length)
    most = max(ranges[1] + ranges[3] + 1 for ranges in recipe.tile_ranges)
    most = min(most, recipe.max_seq_length // config.image_seq_length)
    at_once = recipe.per_device_train_batch_size
    return recipe.max_seq_length * at_once, most * at_once


def _vision_tokens(config: MiniMonkeyConfig) -> int:
    """Count the patches of a tile, and its class token."""
    return (config.tile_size // config.vision_config.patch_size[0]) ** 2 + 1


def _recomputes(recipe: Recipe) -> bool:
    """Tell whether the backward pass computes a layer again, under either name that transformers has for it."""
    return bool(recipe.gradient_checkpointing or getattr(recipe, "activation_checkpointing", False))


def _stored_bytes(config: MiniMonkeyConfig, preset: str, number_bytes: float) -> float:
    """Return the bytes of all weights where `preset` stores some of them in fewer bits, the others at `number_bytes`."""
    with init_empty_weights():
        model = MiniMonkeyForConditionalGeneration(config)
        QuantizedWeightsQuantizer(QuantizedWeightsConfig(preset))._process_model_before_weight_loading(model)
    stored = {id(p) for m in model.modules() if isinstance(m, StoredLinear) for p in m.parameters() if p is not m.bias}
    return sum(p.nbytes if id(p) in stored else p.numel() * number_bytes for p in model.parameters())


def _adapter_parameters(model: torch.nn.Module, rank: int) -> int:
    linears = [module for name, module in model.named_modules() if re.fullmatch(ADAPTED, name)]
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def _activations(model: torch.nn.Module, recipe: Recipe, tokens: int, tiles: int, bf16: bool) -> int:
    """Return the bytes that the layers keep for the backward pass, at most `tokens` and `tiles` of them at once."""
    language, tower = model.model.language_model, model.model.vision_tower
    width, seen = model.config.text_config.hidden_size, min(tokens, 1024)
    number_bytes = 2 if bf16 else 4
    layer = language.layers[0].to(torch.bfloat16 if bf16 else torch.float32)
    positions = torch.arange(seen, device="meta")[None]
    angles = _meta_angles(model, seen, number_bytes)
    kept = kept_bytes(layer, seen, width, position_embeddings=angles, attention_mask=None, position_ids=positions)
    total = _stack(kept, width * number_bytes, len(language.layers), tokens, recipe)
    is_seen = "vision" in recipe.train and recipe.lora_r is None
    if not is_seen or not len(tower.encoder.layer):
        return round(total)
    patches = _vision_tokens(model.config)
    layer = tower.encoder.layer[0].to(torch.bfloat16 if bf16 else torch.float32)
    width = model.config.vision_config.hidden_size
    kept = kept_bytes(layer, patches, width)
    return round(total + _stack(kept, width * number_bytes, len(tower.encoder.layer), patches * tiles, recipe))


def _meta_angles(model: torch.nn.Module, tokens: int, number_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = model.config.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = torch.bfloat16 if number_bytes == 2 else torch.float32
    return tuple(torch.empty(1, tokens, size, device="meta", dtype=dtype) for _ in range(2))


def _stack(kept: float, input_bytes: int, layers: int, tokens: int, recipe: Recipe) -> float:
    """Return the bytes of a stack of layers; recomputed, it keeps the inputs of all and the inside of one."""
    return tokens * (layers * input_bytes + kept if _recomputes(recipe) else layers * kept)


def _flops(model: torch.nn.Module, config: MiniMonkeyConfig, recipe: Recipe, tokens: int, tiles: int) -> float:
    """Return the operations of one row, forward and backward: 2 a weight and token forward, 2 back, 2 for a trained weight."""
    recomputes = _recomputes(recipe)
    tower, language = model.model.vision_tower, model.model.language_model
    is_vision_trained = any(parameter.requires_grad for parameter in tower.parameters())
    patches = _vision_tokens(config)

    def passes(module: torch.nn.Module, goes_back: bool) -> float:
        weights = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
        trained = sum(p.numel() for p in module.parameters() if p.ndim > 1 and p.requires_grad)
        return 2 * weights * (1 + goes_back * (1 + recomputes)) + 2 * trained

    vision = passes(tower, is_vision_trained) * patches * tiles
    layers = passes(language.layers, goes_back=True) * tokens
    experts = 0.5 if config.visual_experts else 1.0  # a token goes through one of two blocks, most of a layer
    return vision + layers * experts + passes(model.lm_head, goes_back=True) * tokens
