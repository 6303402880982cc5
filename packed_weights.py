"""Weights in the order in which the processor reads them fastest: sorted once, where torch sorts them anew for every product.

    model.prepare_for_cpu()         after loading, on an x86 CPU; chat, generate and forward as before

oneDNN, which comes with torch, chooses the order for the processor at hand. Numbers and type stay the same.
"""

import platform
from collections.abc import Callable, Iterable

import torch
from torch import nn


@torch.compiler.disable  # which takes a packed weight as a constant of its own alone
def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return inputs (..., I) times a weight (O, I) plus the bias, computed by oneDNN.

    Args:
        weight: Packed, or plain with rows that lie together: it takes a hundred times as long where they are far apart.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, "none", [], "")


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed: for answers, not for training. Its bias is an ordinary parameter.

    It is no `nn.Linear`, so that nothing takes its weight for one that can be changed; `state_dict` has it unpacked.

    Args:
        linear: The layer, whose bias is shared.
        is_tied: Its weight is another module's too, and stays here beside the packed one.
    """

    def __init__(self, linear: nn.Linear, is_tied: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if is_tied:
            self.weight = linear.weight
        self._packed = _pack(linear.weight.detach())
        self.train(linear.training)

    def unpacked(self) -> torch.Tensor:
        """Return a copy of the weight (out_features, in_features)."""
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
        if torch.is_autocast_enabled("cpu"):
            outputs = multiply(inputs.to(self._packed.dtype), self._packed, self.bias)
            return outputs.to(torch.get_autocast_dtype("cpu"))
        return multiply(inputs, self._packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __getattr__(self, name):
        if name == "weight" and "weight" not in self._parameters:
            raise AttributeError("Packed weights cannot be read or changed in place; unpacked() copies one.")
        return super().__getattr__(name)

    def __getstate__(self):
        return {**self.__dict__, "_packed": self.unpacked()}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._packed = _pack(self._packed)

    def _apply(self, fn, recurse=True):
        check_stays(fn, self._packed.dtype)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "weight" not in self._parameters:
            destination[f"{prefix}weight"] = self.unpacked()

    def _load_from_state_dict(self, *args, **kwargs):
        raise ValueError("Packed weights cannot be changed: load a state dict before prepare_for_cpu().")


def pack_weights(model: nn.Module, is_head_tied: bool = False, skipped: tuple[str, ...] = ()) -> None:
    """Put a `PackedLinear` in the place of every plain linear layer of a model, in place.

    If nothing large is left, the rest is copied out of the file that loading may have mapped into memory, so that it can go.

    Args:
        is_head_tied: `lm_head` has the embeddings' weight: it gets a packed copy.
        skipped: Beginnings of names that stay as they are.

    Raises:
        ValueError: oneDNN cannot pack one of the weights on this machine.
    """
    names = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and not name.startswith(skipped)
    ]
    for name in names:
        _check_packable(model.get_submodule(name).weight)
    for name in names:
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(module, is_head_tied and name == "lm_head"))
    left = [parameter for name, parameter in model.named_parameters() if not name.startswith(skipped)]
    if names and all(parameter.is_floating_point() for parameter in left):  # else there are quantised weights
        copy_from_file(left)


def copy_from_file(parameters: Iterable[nn.Parameter]) -> None:
    """Copy parameters into memory of their own: each keeps the whole file mapped that it was loaded from."""
    for parameter in parameters:
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def is_packed(model: nn.Module) -> bool:
    """Tell whether a model has packed weights."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def check_stays(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    """Raise `ValueError` if what `nn.Module.to` and its like do would move weights of a type from the CPU, or convert them."""
    there = fn(torch.empty(0, dtype=dtype, device="cpu"))
    if (there.device.type, there.dtype) != ("cpu", dtype):
        raise ValueError(
            f"Packed weights stay on the CPU in {dtype}; load the model anew for {there.device}, {there.dtype}."
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


def _check_packable(weight: torch.Tensor) -> None:
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        raise ValueError(
            f"Weights are packed on an x86 CPU whose torch has oneDNN, in float32, or in 16 bits where the processor has units "
            f"for them; these are on {weight.device} in {weight.dtype}. Take pack=False, or dtype=torch.float32."
        )


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)
