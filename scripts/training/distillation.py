"""Losses by which the vision tower of one model learns from that of another, without answers.

- `relations` (MiniViT, arXiv 2204.07154): how every token's query, key and value relate to every other's, nine pairs a layer,
  and how its hidden states do. Neither needs equal widths. Towers of a classifier are taught its predictions besides; here
  there are none, and the cosine of the tower's output takes their place where the widths are equal.
- `cosine` (Mini-InternVL, arXiv 2410.16261): the negative cosine of hidden states; needs equal widths.

A layer of the student learns from the layer of the teacher at the same height. The teacher gets no gradient and is not saved.

Shapes: T tiles, N tokens of a tile, W width.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import nn

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.repository import readable
from minimonkey.scripts.training.encode import IGNORED
from minimonkey.scripts.training.recipe import Recipe


HIDDEN_WEIGHT = 0.1  # as published
READ = ("q_norm", "k_norm", "v_proj")  # of an attention block: its outputs are query, key and value


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of rows of scores (..., C) with the teacher's as targets."""
    return -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1).mean()


def relation_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the loss of the nine relations between queries, keys and values of one layer, three of (T, N, W) each."""
    pairs = [*product(range(len(READ)), repeat=2)]
    return sum(soft_cross_entropy(_relation(student, *p), _relation(teacher, *p)) for p in pairs) / len(pairs)


def _relation(states: Sequence[torch.Tensor], first: int, second: int) -> torch.Tensor:
    return states[first] @ states[second].transpose(1, 2) / states[first].shape[-1] ** 0.5


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of how alike tokens (T, N, W) are, times their number (published: a window's)."""
    alike = [
        states @ states.transpose(1, 2)
        for states in (nn.functional.normalize(s.float(), dim=-1) for s in (student, teacher))
    ]
    return (alike[0] - alike[1]).square().mean() * student.shape[1]


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return one less the mean cosine of the states (T, N, W) of two towers."""
    return 1 - nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def layer_pairs(student_layers: int, teacher_layers: int, last: int | None = None) -> list[tuple[int, int]]:
    """Return which layer of the teacher each of the student's last layers learns from: the one at the same height.

    Raises:
        ValueError: The student has more layers, or fewer than `last`.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"A tower of {student_layers} layers cannot learn from one of {teacher_layers}.")
    if last is not None and last > student_layers:
        raise ValueError(f"distilled_layers {last} is more than the {student_layers} layers of the vision tower.")
    first = 0 if last is None else student_layers - last
    return [(layer, (layer + 1) * teacher_layers // student_layers - 1) for layer in range(first, student_layers)]


class TowerRecorder:
    """Keeps queries, keys, values and hidden states of each layer in a tower's last pass.

    Layers that share a block (shared_vision_layers.py) run it one after the other, so calls come in the order of the layers.
    """

    def __init__(self, tower: nn.Module):
        self.attention: list[list[torch.Tensor]] = [[] for _ in READ]
        self.hidden: list[torch.Tensor] = []
        tower.register_forward_pre_hook(self._forget)
        for layer in tower.encoder.layer:
            layer.register_forward_hook(lambda module, args, output: self.hidden.append(output))
        for name, module in tower.named_modules():
            if (kind := name.rpartition(".")[2]) in READ:
                kept = self.attention[READ.index(kind)]
                module.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))

    def _forget(self, module, args) -> None:
        for kept in (*self.attention, self.hidden):
            kept.clear()

    def states(self, layer: int) -> list[torch.Tensor]:
        """Return query, key and value (T, N, W) of a layer."""
        return [kept[layer] for kept in self.attention]


def with_teacher(model_class: type, recipe: Recipe) -> type:
    """Return the model's class with a loss that compares its vision tower with the teacher's, in the place of answers.

    It keeps name and module of the model's class: weights are converted and code is saved by these.
    """
    with readable(recipe.teacher):
        teacher = MiniMonkeyForConditionalGeneration.from_pretrained(
            recipe.teacher, dtype=getattr(torch, recipe.dtype), attn_implementation="eager"
        )
    tower = teacher.model.vision_tower.eval().requires_grad_(False)

    class WithTeacher(model_class):
        def __init__(self, config):
            super().__init__(config)
            student, taught_by = config.vision_config, tower.config
            for name in ("image_size", "patch_size"):
                if getattr(student, name) != getattr(taught_by, name):
                    raise ValueError(
                        f"{name} is {getattr(student, name)} here, and {getattr(taught_by, name)} of the teacher."
                    )
            self.has_equal_width = student.hidden_size == taught_by.hidden_size
            if recipe.distillation == "cosine" and not self.has_equal_width:
                raise ValueError(
                    f"cosine compares equal widths, got {student.hidden_size} and {taught_by.hidden_size}; take relations."
                )
            layers = (student.num_hidden_layers, taught_by.num_hidden_layers, recipe.distilled_layers)
            self.pairs, self.teacher = layer_pairs(*layers), (tower,)  # in a tuple: neither trained nor saved
            self.losses: list[torch.Tensor] = []
            self.recorders = TowerRecorder(self.model.vision_tower), TowerRecorder(tower)
            self.model.vision_tower.register_forward_hook(self._compare, with_kwargs=True)

        def _compare(self, module, args, kwargs, output) -> None:
            pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            with torch.no_grad():
                taught = self.teacher[0].to(pixels.device)(pixels)
            student, teacher = self.recorders
            output_loss = (
                cosine_loss(output.last_hidden_state, taught.last_hidden_state) if self.has_equal_width else 0.0
            )
            if recipe.distillation == "cosine":
                parts = [cosine_loss(student.hidden[s], teacher.hidden[t]) for s, t in self.pairs]
            else:
                parts = [
                    relation_loss(student.states(s), teacher.states(t))
                    + HIDDEN_WEIGHT * hidden_loss(student.hidden[s], teacher.hidden[t])
                    for s, t in self.pairs
                ]
            self.losses.append(len(pixels) * (sum(parts) / len(parts) + output_loss))

        def forward(self, pixel_values=None, labels=None, num_items_in_batch=None, **inputs):
            """Return the loss of these tiles (T, 3, S, S), weighed by the batch's share of the step's answers.

            Raises:
                ValueError: A batch without images.
            """
            if pixel_values is None:
                raise ValueError("A vision tower learns from images; this batch has none.")
            self.losses.clear()
            self.encode_tiles(pixel_values)
            share = 1.0 if num_items_in_batch is None else (labels != IGNORED).sum() / num_items_in_batch
            return {"loss": share * sum(self.losses) / len(pixel_values)}

    WithTeacher.__name__ = WithTeacher.__qualname__ = model_class.__name__
    WithTeacher.__module__ = model_class.__module__
    return WithTeacher
