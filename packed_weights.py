"""Weights in the order in which the processor reads them fastest: sorted once, where torch sorts them anew for every product.

    model.prepare_for_cpu()         after loading, on an x86 CPU; chat, generate and forward as before

oneDNN, which comes with torch, chooses the order for the processor at hand. Numbers and type stay the same.
"""

import platform

import torch
from torch import nn


@torch.compiler.disable  # which takes a packed weight as a constant of its own alone
def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return inputs (..., I) times a weight (O, I), packed or not, plus the bias, computed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed: for answers, not for training. Its bias is an ordinary parameter.

    `weight` unpacks a copy (out_features, in_features), which `state_dict` contains too.

    Args:
        linear: The layer, whose bias is shared.
        is_tied: The weight is another module's as well, which keeps it; `state_dict` leaves it to that one.
    """

    def __init__(self, linear: nn.Linear, is_tied: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_tied = is_tied
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """An unpacked copy."""
        return self._packed.to_dense()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) of inputs (..., in_features) of the weight's type.

        Raises:
            ValueError: The inputs want gradients, which cannot be had through packed weights.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise ValueError(
                "Packed weights give no gradients; to train, load the model and leave out prepare_for_cpu()."
            )
        return multiply(inputs, self._packed, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_tied:
            destination[f"{prefix}weight"] = self.weight


def pack_weights(model: nn.Module, is_head_tied: bool = False, skipped: tuple[str, ...] = ()) -> int:
    """Put a `PackedLinear` in the place of every plain linear layer of a model, in place.

    Args:
        is_head_tied: `lm_head` has the embeddings' weight: it gets a packed copy.
        skipped: Beginnings of names that stay as they are.

    Returns:
        The bytes that were packed.

    Raises:
        ValueError: See `check_packable`; or no layer is left to pack.
    """
    names = _plain_layers(model, skipped)
    if not names:
        raise ValueError(
            "There is no plain linear layer to pack; it is done once, and quantised weights stay as they are."
        )
    for name in names:
        check_packable(model.get_submodule(name).weight)
    packed = 0
    for name in names:
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        packed += module.weight.nbytes
        setattr(model.get_submodule(parent), child, PackedLinear(module, is_head_tied and name == "lm_head"))
    for name, parameter in model.named_parameters():
        if not name.startswith(skipped):
            parameter.data = parameter.data.clone()  # a loaded one keeps the whole file mapped
    return packed


def is_packed(model: nn.Module) -> bool:
    """Tell whether a model has packed weights."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def has_plain_layers(model: nn.Module) -> bool:
    """Tell whether `pack_weights` has anything to pack."""
    return bool(_plain_layers(model))


def _plain_layers(model: nn.Module, skipped: tuple[str, ...] = ()) -> list[str]:
    return [
        name for name, module in model.named_modules() if type(module) is nn.Linear and not name.startswith(skipped)
    ]


def check_packable(weight: torch.Tensor) -> None:
    """Raise `ValueError` if oneDNN cannot pack this weight on this machine, saying why."""
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        raise ValueError(
            f"Weights are packed on an x86 CPU whose torch has oneDNN, in float32, or in 16 bits where the processor has units "
            f"for them; these are on {weight.device} in {weight.dtype}. Take pack=False, or dtype=torch.float32."
        )


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether this machine's CPU can pack weights of a type."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and supported[dtype]()
