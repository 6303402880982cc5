"""Make a model's vision tower smaller, and let it learn from the one it came from.

    python scripts/distill_vision.py MODEL OUT --share-layers 2 --share-transform heads
    python scripts/distill_vision.py MODEL OUT --layers 12 --set distillation=cosine --set distilled_layers=4
    python scripts/distill_vision.py MODEL OUT --share-layers 2 --resume

--share-layers: so many consecutive layers share their weights (MiniViT), beginning with those of the first of them; what
is left of each is small, the work is the same. --layers: as many layers of the tower are left, evenly spread. Language
model and projector stay as they are. OUT/student is the model to begin with, OUT/model the result; losses and steps are
those of a recipe.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from minimonkey.configuration_minimonkey import VISION_SHARE_TRANSFORMS, MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts import finetune
from minimonkey.scripts.importing.folder import new_folder
from minimonkey.scripts.repository import load_processor, readable, reports_errors, whole_number


RECIPE = Path(__file__).parent / "training" / "recipes" / "nano-distill.yaml"
TOWER_LAYER = "model.vision_tower.encoder.layer."


def make_student(teacher: nn.Module, layers: int | None, group_size: int, transform: str) -> nn.Module:
    """Return the model with a smaller vision tower that begins with the teacher's weights.

    Args:
        layers: How many are left; all by default.
        group_size, transform: See `MiniMonkeyConfig.vision_share_layers` and `vision_share_transform`.

    Raises:
        ValueError: More layers than there are, a tower that shares weights already, or nothing to make smaller.
    """
    config, old = teacher.config, teacher.config.vision_config.num_hidden_layers
    layers = old if layers is None else layers
    if config.shares_vision_layers:
        raise ValueError("The model's vision tower shares its layers' weights already; begin with the plain one.")
    if not 1 <= layers <= old:
        raise ValueError(f"--layers {layers}: the vision tower has {old}.")
    if layers == old and group_size == 1 and transform == "none":
        raise ValueError("Nothing would be smaller; give --share-layers or --layers.")
    fields = config.to_dict()
    fields["vision_config"] = {**fields["vision_config"], "num_hidden_layers": layers}
    fields |= {"vision_share_layers": group_size, "vision_share_transform": transform}
    student = MiniMonkeyForConditionalGeneration(MiniMonkeyConfig(**fields)).to(teacher.dtype)
    origins = [(number + 1) * old // layers - 1 for number in range(layers)]
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(TOWER_LAYER)}
    for number, origin in enumerate(origins):
        layer = teacher.model.vision_tower.encoder.layer[origin].state_dict()
        weights |= {f"{TOWER_LAYER}{number}.{name}": tensor for name, tensor in layer.items()}
    known = student.state_dict()
    missing, _ = student.load_state_dict({name: weights[name] for name in known if name in weights}, strict=False)
    if left := [name for name in missing if not any(part in name for part in ("mixer", "convolution"))]:
        raise ValueError(f"The teacher has no {', '.join(left[:3])}.")
    student.generation_config = teacher.generation_config
    return student


def write_student(source: str, out: Path, layers: int | None, group_size: int, transform: str) -> None:
    """Write the model that the run begins with, unless an earlier start has."""
    if out.exists():
        return
    with readable(source):
        teacher = MiniMonkeyForConditionalGeneration.from_pretrained(source, dtype="auto")
    student = make_student(teacher, layers, group_size, transform)
    sizes = [sum(p.numel() for p in model.model.vision_tower.parameters()) for model in (teacher, student)]
    print(f"Vision tower: {sizes[0]:,} parameters, {sizes[1]:,} in the student.")
    with new_folder(out, f"{source}, {layers}, {group_size}, {transform}") as work:
        student.save_pretrained(work)
        load_processor(source).save_pretrained(work)


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a MiniMonkey, the teacher")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--share-layers", type=whole_number(1), default=1, metavar="K", help="layers of a group")
    parser.add_argument(
        "--share-transform", choices=VISION_SHARE_TRANSFORMS, default="none", help="what each has of its own"
    )
    parser.add_argument("--layers", type=whole_number(1), default=None, metavar="N", help="layers of the smaller tower")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="steps and images; default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change an option of the recipe"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    student = args.out / "student"
    write_student(args.model, student, args.layers, args.share_layers, args.share_transform)
    options = {"model": student, "teacher": args.model, "output_dir": args.out}
    changes = [*args.set, *(f"{name}={value}" for name, value in options.items())]
    resume = ["--resume"] if args.resume else []
    return finetune.main([str(args.recipe), *(word for change in changes for word in ("--set", change)), *resume])


if __name__ == "__main__":
    sys.exit(main())
