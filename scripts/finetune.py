"""Train a MiniMonkey by a recipe: Nano from scratch, the language model of the 2B model, or LoRA adapters of it.

    python scripts/finetune.py scripts/training/recipes/nano-smoke.yaml
    python scripts/finetune.py RECIPE.yaml --set output=runs/other --set learning_rate=1e-5
    python scripts/finetune.py RECIPE.yaml --resume                      goes on after the last checkpoint, if there is one

On several GPUs, with the same recipe (its batch_size is that of all of them together):

    torchrun --nproc_per_node 4 scripts/finetune.py RECIPE.yaml                                              DDP
    accelerate launch --config_file scripts/training/launch/fsdp2.yaml --num_processes 4 scripts/finetune.py RECIPE.yaml
    accelerate launch --config_file scripts/training/launch/zero2.yaml --num_processes 4 scripts/finetune.py RECIPE.yaml

zero3.yaml likewise; the last two need `pip install deepspeed`. Muon needs DDP or one GPU.

Writes to the recipe's `output`: model/ (the trained model, as any other MiniMonkey folder), adapter/ with LoRA, metrics.json,
logs/ for TensorBoard, checkpoint-N/ for --resume. Needs the `training` extra.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from repository import load_processor, preparing, readable, root_class

from importing.config import read_json
from synthetic.materials import materials
from training.collator import Collator
from training.data import SyntheticSource, read_sources
from training.encode import Encoder
from training.models import load_model, model_folder, save
from training.recipe import Recipe, changed_keys, read_recipe, with_fast_types
from training.samples import Samples
from training.trainer import FineTuner, last_checkpoint, set_steps, training_arguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="YAML file, see scripts/training/recipes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's output folder")
    return parser.parse_args()


def begin(recipe: Recipe, world_size: int, resume: bool) -> Path | None:
    """The checkpoint to go on from, after a check that this is the same run.

    Raises:
        ValueError: The output folder holds a run that is not to be resumed, or another one.
    """
    record = Path(recipe.output) / "run.json"
    if not record.exists():
        return None
    if not resume:
        raise ValueError(f"{recipe.output} holds a run; go on with it (--resume) or choose another output.")
    recorded = read_json(record)
    if not isinstance(recorded.get("recipe"), dict) or "world_size" not in recorded:
        raise ValueError(f"{record} is no record of a run; choose another output.")
    changed = changed_keys(recipe, recorded["recipe"])
    if changed:
        raise ValueError(f"The run in {recipe.output} had another {', '.join(changed)}; see its run.json.")
    if recorded["world_size"] != world_size:
        raise ValueError(
            f"The run in {recipe.output} had {recorded['world_size']} processes, now there are {world_size}."
        )
    return last_checkpoint(Path(recipe.output))


def check_materials(recorded: dict) -> None:
    """Raise `ValueError` if the documents of the run to go on with have other words or fonts than there are here."""
    before, here = recorded.get("materials"), materials()
    if before is not None and before["digest"] != here["digest"]:
        raise ValueError(f"The run began with other words and fonts: {before}, here there are {here}.")


def prepare(args: argparse.Namespace) -> tuple[FineTuner, Recipe, str, Path | None]:
    """Everything up to the first step: trainer, recipe, the folder of the first model, the checkpoint to go on from."""
    recipe = with_fast_types(read_recipe(args.recipe, args.set))
    arguments = training_arguments(recipe)
    checkpoint = begin(recipe, arguments.world_size, args.resume)
    record = Path(recipe.output) / "run.json"
    recorded = read_json(record) if record.exists() else {}
    arguments.distributed_state.wait_for_everyone()  # nobody looks for the record after it is written
    if arguments.should_save:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
        run = recorded | {"recipe": dataclasses.asdict(recipe), "world_size": arguments.world_size}
        record.write_text(json.dumps(run, indent=2))

    with arguments.main_process_first():
        folder = model_folder(recipe)
    processor = load_processor(folder)
    with readable(folder):
        config = root_class("configuration_minimonkey.MiniMonkeyConfig").from_pretrained(folder)
    encoder = Encoder(processor, config, recipe.grounding_tokens)
    with arguments.main_process_first():  # the others find the checked lines in the cache
        sources = read_sources(recipe.data, Path(), recipe.tile_ranges, encoder)
        evaluation = recipe.eval_data and read_sources(recipe.eval_data, Path(), recipe.tile_ranges, encoder)
    if any(isinstance(source, SyntheticSource) for source in (*sources, *(evaluation or ()))):
        check_materials(recorded)
        if arguments.should_save:
            record.write_text(json.dumps(run | {"materials": materials()}, indent=2))
    samples = Samples(sources, encoder, recipe)
    set_steps(arguments, recipe, samples.steps)
    collator = Collator(
        processor.tokenizer.pad_token_id,
        config.image_token_id,
        processor.image_seq_length,
        config.tile_size,
        always_with_tile=arguments.world_size > 1,
    )
    trainer = FineTuner(
        recipe,
        processor,
        model=load_model(folder, recipe),
        args=arguments,
        data_collator=collator,
        train_dataset=samples,
        eval_dataset=Samples(evaluation, encoder, recipe, is_evaluation=True) if evaluation else None,
    )
    return trainer, recipe, folder, checkpoint


def train(trainer: FineTuner, checkpoint: Path | None) -> dict:
    """Train and measure; what metrics.json will say."""
    samples = trainer.train_dataset
    if trainer.args.should_save:
        print(f"{samples.epoch_size} examples ({samples.skipped} too long, skipped), {samples.steps} steps.")
        print(f"Going on from {checkpoint}." if checkpoint else "Starting from the beginning.")
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    measured = trainer.evaluate() if trainer.eval_dataset is not None else {}
    return {
        **result.metrics,
        **measured,
        "steps": result.global_step,
        "epochs": len(samples) / samples.epoch_size,
        "examples": samples.epoch_size,
        "skipped_too_long": samples.skipped,
        "redrawn_too_long": trainer.redrawn_everywhere(),
        "trained_parameters": trainer.get_num_trainable_parameters(),
        "world_size": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
    }


def main() -> None:
    args = parse_arguments()
    with preparing():
        trainer, recipe, folder, checkpoint = prepare(args)
    metrics = train(trainer, checkpoint)
    written = save(trainer, recipe, folder)
    if trainer.args.should_save:
        (Path(recipe.output) / "metrics.json").write_text(json.dumps(metrics, indent=2))
        print(f"Wrote {written}.")


if __name__ == "__main__":
    main()
