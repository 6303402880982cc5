"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer."""

import torch
from torch import nn

from minimonkey.scripts.precision import fast_dtype


# Occur in the names of matrices inside vision tower, projector and language model; not in embeddings and output layer.
LAYERS = ("encoder", "projector", "layers")


class Muon(torch.optim.Muon):
    """torch's Muon, which orthogonalises in bfloat16 only, in float32 where that is faster. Steps are scaled to AdamW's."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step, from the gradients as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(momentum, group["momentum"]), group["ns_coefficients"], group["ns_steps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Return a matrix (m, n) with all singular values drawn near 1, by Newton-Schulz iteration.

    Source: https://kellerjordan.github.io/posts/muon, as torch.optim.Muon has it.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.to(fast_dtype(matrix.device), copy=True)
    wide = wide.T if is_tall else wide
    wide.div_(wide.norm().clamp(min=1e-7))
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW behind one interface: one schedule, one state that is saved and restored.

    Args:
        matrices: Parameters of two dimensions for Muon.
        rest: All others, for AdamW.
        matrix_learning_rate, learning_rate: Rates of Muon and AdamW; Muon's steps are scaled to the size of AdamW's.
        weight_decay: Weight decay of the matrices.
        betas: AdamW's betas.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[nn.Parameter],
        matrix_learning_rate: float,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        muon = Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay)
        adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=0.0)
        self.parts = [muon, adamw]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make both parts work on the groups and the state of the whole."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters that are trained into matrices inside layers, and all others.

    Raises:
        ValueError: One of the two is empty, so two optimizers make no sense.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_matrix = [parameter.ndim == 2 and any(part in name for part in LAYERS) for name, parameter in trained]
    matrices = [parameter for (_, parameter), matrix in zip(trained, is_matrix) if matrix]
    rest = [parameter for (_, parameter), matrix in zip(trained, is_matrix) if not matrix]
    if not matrices or not rest:
        raise ValueError("muon_learning_rate needs matrices of layers and other parameters to train; leave it out.")
    return matrices, rest
