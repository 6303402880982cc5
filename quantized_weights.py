"""Weights in 4, 8 or 16 bits, computed with in the type of what they are multiplied with, a few rows at a time.

    config = QuantizedWeightsConfig("int4")
    model = MiniMonkeyForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    model.save_pretrained("smaller")         loads with AutoModel as any other folder, with nothing else installed

Numbers are what is stored; activations stay as they are. On a CPU the rows of a weight that are needed next are turned into
floating point where they fit the processor's cache, so that memory is read once in the small form and holds no large copy. LoRA
trains on top: for the backward pass only the small form is kept.

Every stored tensor holds whole numbers (of scales and 16-bit weights the bits), which no conversion of a model's type touches.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from .packed_weights import can_pack, copy_from_file, multiply
from .transformers_bridge import HfQuantizer, QuantizationConfigMixin


METHOD = "minimonkey"
FORMATS = ("int4", "int8", "bfloat16")
TOWER = r"model\.(vision_tower|multi_modal_projector)\..*"
LANGUAGE_MODEL = r"model\.language_model\..*"
PRESETS = {
    "int8": {f"{TOWER}|{LANGUAGE_MODEL}": "int8"},
    "int4": {f"{TOWER}|{LANGUAGE_MODEL}": "int4"},
    "bluelm": {TOWER: "int8", LANGUAGE_MODEL: "int4"},
    "bfloat16": {f"{TOWER}|{LANGUAGE_MODEL}|lm_head": "bfloat16"},
}
"""Which linear layers are stored how, by regular expressions of their names. Norms, embeddings and, but for "bfloat16", the
head stay as they are. "bluelm" is BlueLM-V-3B's (arXiv 2411.10640); keys and values are 8-bit besides, by `kv_cache_dtype`."""

GROUP = 32  # columns of a 4-bit weight that share a scale
SCRATCH_NUMBERS = 2**18  # that are turned into floating point at a time on a CPU, for few rows of activations
MANY_ROWS = 64  # from which on larger products pay
FEW_ROWS = 16  # up to which torch's kernels for weights of few bits pay, in bfloat16
KERNEL_COLUMNS = 64  # that divide a row which these kernels can read
KERNEL_ROWS = 16  # of a 4-bit weight that they read together


def _as_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).view(torch.int16)


def quantize_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a weight (O, I) as whole numbers from -127 to 127 (O, I) and each row's scale (O, 1), the bits of float16."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=2**-24).half()  # the least that float16 knows
    return {
        "weight": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8),
        "scale": scale.view(torch.int16),
    }


def quantize_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a weight (O, I) as numbers from 0 to 15 with scale and least value (O, groups) of every `group_size` columns.

    The first half of a row's numbers are the low four bits of its bytes (O, I / 2), the second half the high ones.
    """
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group_size(columns))
    least, most = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    scale, least = ((most - least) / 15).clamp(min=2**-24).half(), least.half()
    numbers = ((groups - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8).view(rows, columns)
    low, high = numbers.chunk(2, dim=1)
    return {
        "weight": low | (high << 4),
        "scale": scale.squeeze(2).view(torch.int16),
        "least": least.squeeze(2).view(torch.int16),
    }


def group_size(columns: int) -> int:
    """Return how many columns of a 4-bit weight share a scale: 32, or the largest divisor of 32 that divides the columns.

    Raises:
        ValueError: They do not divide by 8.
    """
    size = math.gcd(columns, GROUP)
    if size < 8:
        raise ValueError(f"4-bit weights need a number of columns that 8 divides, got {columns}; take int8.")
    return size


def _is_run_on_cpu(flat: torch.Tensor) -> bool:
    """Tell whether a CPU computes with these rows now, and no compiler reads along."""
    return flat.device.type == "cpu" and not torch.compiler.is_compiling()


class _Product(torch.autograd.Function):
    """The product with a stored weight; keeps nothing but the stored form for the way back."""

    @staticmethod
    def forward(ctx, inputs, layer):
        ctx.layer = layer
        return layer.multiply(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.layer.multiply_transposed(gradient), None


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in `format`, one of FORMATS; its bias is an ordinary parameter.

    It is an `nn.Linear` so that LoRA finds it, but its weight is not of floating point: `dequantized` gives that.
    """

    def __init__(self, in_features: int, out_features: int, has_bias: bool, format: str, device=None, dtype=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        shapes = {
            "bfloat16": {"weight": (in_features, torch.int16)},
            "int8": {"weight": (in_features, torch.int8), "scale": (1, torch.int16)},
        }
        if format == "int4":
            groups = in_features // group_size(in_features)
            shapes["int4"] = {
                "weight": (in_features // 2, torch.uint8),
                "scale": (groups, torch.int16),
                "least": (groups, torch.int16),
            }
        for name, (width, kind) in shapes[format].items():
            value = torch.empty(out_features, width, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        bias = torch.empty(out_features, device=device, dtype=dtype) if has_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("_packed", None, persistent=False)
        self.register_buffer("_packed_scales", None, persistent=False)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, format: str) -> "StoredLinear":
        """Store the weight of a linear layer in this format; its bias is shared."""
        weight = linear.weight
        stored = cls(linear.in_features, linear.out_features, linear.bias is not None, format, device="meta")
        parts = {"weight": _as_bits(weight, torch.bfloat16)}
        if format != "bfloat16":
            parts = quantize_int8(weight) if format == "int8" else quantize_int4(weight)
        for name, value in parts.items():
            setattr(stored, name, nn.Parameter(value.contiguous(), requires_grad=False))
        stored.bias = linear.bias
        return stored.train(linear.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out_features, in_features) in floating point."""
        target = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        self._fill(target, 0)
        if self.format == "int8":
            target *= self.scale.view(torch.float16).to(dtype)
        return target

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) of inputs (..., in_features), in their type."""
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        is_trained = torch.is_grad_enabled() and inputs.requires_grad
        outputs = _Product.apply(inputs, self) if is_trained else self.multiply(inputs)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    @torch.no_grad()
    def pack(self) -> None:
        """Hold a 4-bit weight a second time, as torch's kernel for few rows of bfloat16 reads it; nothing for other weights."""
        if self._packed is not None:
            return
        groups = self.in_features // group_size(self.in_features) if self.format == "int4" else 0
        if groups * GROUP != self.in_features or self.out_features % KERNEL_ROWS or not self._has_kernel_size():
            return
        numbers = torch.cat([self.weight & 15, self.weight >> 4], dim=1)
        scale, least = (part.view(torch.float16).float() for part in (self.scale, self.least))
        # The kernel takes 8 off each number first.
        scales = torch.stack([scale, least + 8 * scale], dim=2).transpose(0, 1)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        self._packed_scales = scales.to(torch.bfloat16).contiguous()

    def _has_kernel_size(self) -> bool:
        return self.in_features % KERNEL_COLUMNS == 0

    def _has_kernel(self, flat: torch.Tensor) -> bool:
        """Tell whether torch has a kernel that multiplies with the stored weight itself."""
        if flat.dtype != torch.bfloat16 or not 0 < len(flat) <= FEW_ROWS or not _is_run_on_cpu(flat):
            return False
        return self._has_kernel_size() and (self.format == "int8" or self._packed is not None)

    def _multiply_few(self, flat: torch.Tensor) -> torch.Tensor:
        if self.format == "int8":
            scale = self.scale.view(torch.float16).flatten().to(flat.dtype)
            return torch._weight_int8pack_mm(flat.contiguous(), self.weight, scale)
        return torch._weight_int4pack_mm_for_cpu(flat.contiguous(), self._packed, GROUP, self._packed_scales)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs (..., in_features) times the weight, without the bias."""
        flat = inputs.reshape(-1, self.in_features)
        if self._has_kernel(flat):
            return self._multiply_few(flat).view(*inputs.shape[:-1], self.out_features)
        outputs = flat.new_empty(len(flat), self.out_features)
        times = self._times(flat)
        for start, rows in self._blocks(flat):
            outputs[:, start : start + len(rows)] = times(flat, rows)
        if self.format == "int8":
            outputs *= self.scale.view(torch.float16).to(outputs.dtype).t()
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def multiply_transposed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return a gradient (..., out_features) times the weight transposed: (..., in_features)."""
        flat = gradient.reshape(-1, self.out_features)
        if self.format == "int8":
            flat = flat * self.scale.view(torch.float16).to(flat.dtype).t()
        inputs = flat.new_zeros(len(flat), self.in_features)
        for start, rows in self._blocks(flat):
            inputs.addmm_(flat[:, start : start + len(rows)], rows)
        return inputs.view(*gradient.shape[:-1], self.in_features)

    def _times(self, flat: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return what multiplies with a block: oneDNN for many rows of float32, where MKL is slow on AMD's processors."""
        has_many = flat.dtype == torch.float32 and len(flat) >= MANY_ROWS
        return multiply if has_many and _is_run_on_cpu(flat) and can_pack(flat.dtype) else nn.functional.linear

    def _blocks(self, flat: torch.Tensor):
        """Give the first row and the values of one block of rows after the other, int8 without its scale.

        All have the same storage, since fresh memory costs a CPU more than the product.
        """
        count = self.out_features
        if _is_run_on_cpu(flat):
            scratch_numbers = SCRATCH_NUMBERS * (1 if len(flat) < MANY_ROWS else 8)
            count = min(count, max(1, scratch_numbers // self.in_features))
        scratch = torch.empty(count, self.in_features, dtype=flat.dtype, device=flat.device)
        for start in range(0, self.out_features, count):
            rows = scratch[: self.out_features - start]
            self._fill(rows, start)
            yield start, rows

    def _fill(self, rows: torch.Tensor, start: int) -> None:
        """Write the weight's rows from `start` on into `rows` (n, in_features); int8 without its scale."""
        stored = self.weight[start : start + len(rows)]
        if self.format == "bfloat16":
            rows.copy_(stored.view(torch.bfloat16))
        elif self.format == "int8":
            rows.copy_(stored)
        else:
            half = self.in_features // 2
            rows[:, :half].copy_(stored & 15)
            rows[:, half:].copy_(stored >> 4)
            groups = rows.view(len(rows), self.scale.shape[1], -1)
            scale, least = (
                part[start : start + len(rows), :, None].view(torch.float16).to(rows.dtype)
                for part in (self.scale, self.least)
            )
            groups.mul_(scale).add_(least)


def pack_stored(*modules: nn.Module) -> None:
    """Pack the `StoredLinear` layers of some modules, see `StoredLinear.pack`."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, StoredLinear):
                layer.pack()


class QuantizedWeightsConfig(QuantizationConfigMixin):
    """Say how a model's weights are stored.

    Args:
        preset: A name of PRESETS.
        formats: Instead of it a format for each regular expression of layers' whole names; the first that matches counts.

    Raises:
        ValueError: An unknown preset or format, or not exactly one of the two arguments.
    """

    def __init__(self, preset: str | None = None, formats: dict[str, str] | None = None, **kwargs):
        self.quant_method = METHOD
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        is_read = preset is not None and formats == PRESETS[preset]  # from a config.json, which says both
        if (preset is None) == (formats is None) and not is_read:
            raise ValueError(f"Give one of preset and formats, got preset={preset!r}, formats={formats!r}.")
        self.preset = preset
        self.formats = dict(PRESETS[preset]) if formats is None else dict(formats)
        unknown = [name for name in self.formats.values() if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"A format must be one of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}.")

    def format_of(self, name: str) -> str | None:
        """Return the format of the layer of this name, None for one that stays as it is."""
        return next((kind for pattern, kind in self.formats.items() if re.fullmatch(pattern, name)), None)


class QuantizedWeightsQuantizer(HfQuantizer):
    """Puts `StoredLinear` in the place of linear layers: transformers calls it when a model is loaded."""

    requires_calibration = False
    is_trainable = True  # adapters are, on top

    def is_serializable(self, *args, **kwargs) -> bool:
        """Tell that such a model can be saved."""
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            for parent, child, linear, kind in self._layers(model):
                size = (linear.in_features, linear.out_features, linear.bias is not None)
                setattr(parent, child, StoredLinear(*size, kind, device="meta", dtype=linear.weight.dtype))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            store_weights(model, self.quantization_config)
        return model

    def _layers(self, model):
        return _layers(model, self.quantization_config)


def _layers(
    model: nn.Module, config: QuantizedWeightsConfig, skipped: tuple[str, ...] = ()
) -> list[tuple[nn.Module, str, nn.Linear, str]]:
    """Return parent, name in it, layer and format of all linear layers that are to be stored."""
    found = []
    for name, module in model.named_modules():
        kind = None if f"{name}.".startswith(skipped) else config.format_of(name)
        if type(module) is nn.Linear and kind is not None:
            if name == "lm_head" and model.config.tie_word_embeddings:
                continue  # the embeddings are the same tensor
            parent, _, child = name.rpartition(".")
            found.append((model.get_submodule(parent), child, module, kind))
    return found


def store_weights(model: nn.Module, config: QuantizedWeightsConfig, skipped: list[str] = ()) -> None:
    """Store the weights of a loaded model as `config` says, layer by layer, in place.

    Args:
        skipped: Names of modules that stay as they are, with all that is in them.

    Raises:
        ValueError: No layer has a name that `config` knows, or a weight does not fit its format.
    """
    layers = _layers(model, config, tuple(f"{name}." for name in skipped))
    if not layers:
        raise ValueError(f"No linear layer has a name that fits {', '.join(config.formats)}.")
    for parent, child, linear, kind in layers:
        setattr(parent, child, StoredLinear.of(linear, kind))
    copy_from_file(parameter for parameter in model.parameters() if parameter.is_floating_point())
