"""Train a MiniMonkey on data of your own, or by a recipe: whole, its language model, or LoRA adapters.

    python scripts/finetune.py --model . --data photos                   a folder of images with a CSV or JSONL file
    python scripts/finetune.py --model MiniMonkey-2B --data my.jsonl --output runs/mine --lora
    python scripts/finetune.py scripts/training/recipes/nano-smoke.yaml
    python scripts/finetune.py RECIPE.yaml --set output_dir=runs/other --set learning_rate=1e-5
    python scripts/finetune.py RECIPE.yaml --dry-run                     memory, tokens and hours for 8 cards of 24 GB
    python scripts/finetune.py RECIPE.yaml --resume                      continues from the last checkpoint, if there is one

On several GPUs, with the same recipe (its batch_size is that of all of them together):

    torchrun --nproc_per_node 4 scripts/finetune.py RECIPE.yaml                                              DDP
    accelerate launch --config_file scripts/training/launch/fsdp2.yaml --num_processes 4 scripts/finetune.py RECIPE.yaml
    accelerate launch --config_file scripts/training/launch/zero2.yaml --num_processes 4 scripts/finetune.py RECIPE.yaml

zero3.yaml likewise; the last two need `pip install deepspeed`. Muon needs DDP or one GPU.

Without a recipe the machine and the model decide, see training/own_options.py; what data may be, training/own_data.py. --model,
--data, --output and --lora also change a recipe's.

A recipe's options are those of transformers' TrainingArguments and ours, see training/recipe.py. Writes to its output_dir:
model/ (the trained model, as any other MiniMonkey folder), adapter/ with LoRA, metrics.json, logs/ for TensorBoard,
checkpoint-N/ for --resume. Needs the `training` extra.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from minimonkey.scripts.benchmarking.models import published_config
from minimonkey.scripts.importing.config import read_json
from minimonkey.scripts.repository import ROOT, load_processor, number_within, preparing, readable, whole_number
from minimonkey.scripts.synthetic.materials import materials
from minimonkey.scripts.training.collator import Collator
from minimonkey.scripts.training.data import SyntheticSource, read_sources
from minimonkey.scripts.training.encode import Encoder
from minimonkey.scripts.training.estimate import Cards, Estimate
from minimonkey.scripts.training.grafting import graft_processor
from minimonkey.scripts.training.models import load_model, model_folder, run_config, save, trained_config
from minimonkey.scripts.training.own_data import count_examples, own_data
from minimonkey.scripts.training.own_options import LEARNING_RATES, own_options
from minimonkey.scripts.training.recipe import Recipe, changed_options, make_recipe, read_options, read_overrides
from minimonkey.scripts.training.samples import Samples
from minimonkey.scripts.training.trainer import FineTuner, last_checkpoint


def begin(recipe: Recipe, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, after checking that this is the same run.

    Raises:
        ValueError: The output folder holds a run that is not to be resumed, or a different one.
    """
    folder = Path(recipe.output_dir)
    record = folder / "run.json"
    if not record.exists():
        return None
    if not resume:
        raise ValueError(f"{folder} holds a run; go on with it (--resume) or choose another output_dir.")
    recorded = read_json(record)
    if not isinstance(recorded.get("recipe"), dict) or "world_size" not in recorded:
        raise ValueError(f"{record} is no record of a run; choose another output_dir.")
    changed = changed_options(recipe, recorded["recipe"])
    if changed:
        raise ValueError(f"The run in {folder} had another {', '.join(changed)}; see its run.json.")
    if recorded["world_size"] != recipe.world_size:
        raise ValueError(
            f"The run in {folder} had {recorded['world_size']} processes, now there are {recipe.world_size}."
        )
    return last_checkpoint(folder)


def check_materials(recorded: dict) -> None:
    """Raise `ValueError` if the documents of the run to resume have other words or fonts than are here."""
    before, here = recorded.get("materials"), materials()
    if before is not None and before["digest"] != here["digest"]:
        raise ValueError(f"The run began with other words and fonts: {before}, here there are {here}.")


def prepare(recipe: Recipe, resume: bool) -> tuple[FineTuner, str, Path | None]:
    """Prepare everything before the first step: trainer, folder of the first model, checkpoint to resume from."""
    checkpoint = begin(recipe, resume)
    output = Path(recipe.output_dir)
    record = output / "run.json"
    recorded = read_json(record) if record.exists() else {}
    recipe.distributed_state.wait_for_everyone()  # nothing looks for the record after it is written
    if recipe.should_save:
        output.mkdir(parents=True, exist_ok=True)
        run = recorded | {"recipe": recipe.to_dict(), "world_size": recipe.world_size}
        record.write_text(json.dumps(run, indent=2))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")

    with recipe.main_process_first():
        folder = model_folder(recipe)
    processor = load_processor(folder)
    with readable(folder):
        config = run_config(folder, recipe)
    graft_processor(processor, config, recipe)
    encoder = Encoder(processor, config, recipe.grounding_tokens)
    with recipe.main_process_first():  # the other processes find the checked lines in the cache
        sources = read_sources(recipe.data, Path(), recipe.tile_ranges, encoder)
        evaluation = recipe.eval_data and read_sources(recipe.eval_data, Path(), recipe.tile_ranges, encoder)
    if any(isinstance(source, SyntheticSource) for source in (*sources, *(evaluation or ()))):
        check_materials(recorded)
        if recipe.should_save:
            record.write_text(json.dumps(run | {"materials": materials()}, indent=2))
    samples = Samples(sources, encoder, recipe)
    recipe.set_steps(samples.steps)
    collator = Collator(
        processor.tokenizer.pad_token_id,
        config.image_token_id,
        processor.image_seq_length,
        config.tile_size,
        always_with_tile=recipe.world_size > 1,
        pad_to_multiple_of=recipe.pad_to_multiple_of,
        loss_reduction=recipe.loss_reduction,
        is_mined=config.mining,
    )
    trainer = FineTuner(
        processor,
        model=load_model(folder, recipe),
        args=recipe,
        data_collator=collator,
        train_dataset=samples,
        eval_dataset=Samples(evaluation, encoder, recipe, is_evaluation=True) if evaluation else None,
    )
    return trainer, folder, checkpoint


def train(trainer: FineTuner, checkpoint: Path | None) -> dict:
    """Train and measure; return the contents of metrics.json."""
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
        "epochs": samples.shown / samples.epoch_size,
        "examples": samples.epoch_size,
        "skipped_too_long": samples.skipped,
        "redrawn_too_long": trainer.redrawn_everywhere(),
        "trained_parameters": trainer.get_num_trainable_parameters(),
        "world_size": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
    }


LORA = {"lora_dropout": 0.05, "train": ["language_model"], "dtype": "auto"}


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe of the command line: that of a file with what was given in its place, or one made for the data."""
    options = {} if args.recipe is None else read_options(args.recipe)
    if args.output is not None:
        options["output_dir"] = str(args.output)
    if args.model is not None:
        options["model"] = args.model
    if args.data is not None:
        output = Path(options.get("output_dir") or Path("runs", args.data.stem))
        options["data"] = own_data(args.data, output, args.question)
        if args.recipe is None:
            options = own_options(args.model or str(ROOT), options["data"], count_examples(options["data"]), output)
    if args.lora is not None:
        options |= LORA | {"lora_r": args.lora, "learning_rate": LEARNING_RATES["lora"]}
    options |= read_overrides(args.set)
    if args.dry_run:  # on a machine that need not be the one that trains
        options |= {"use_cpu": True, "bf16": False}
        options["dtype"] = {"auto": "bfloat16"}.get(options.get("dtype"), options.get("dtype"))
    return make_recipe(options, str(args.recipe or "The command line"))


def dry_run(recipe: Recipe, args: argparse.Namespace) -> int:
    """Print what the run takes; return 1 if no way to shard it fits the cards."""
    cards = Cards(args.cards, args.card_gib, args.card_tflops)
    if Path(recipe.model).is_dir():
        with readable(recipe.model):
            config = run_config(recipe.model, recipe)
    else:
        config = trained_config(published_config(recipe.model), recipe)
        print(f"{recipe.model} is not here; estimated for a model of the published size.")
    estimate = Estimate.of(config, recipe, cards)
    print(estimate.describe())
    if not estimate.fits:
        print(
            "It does not fit: take --lora, less at once (pack_tiles=16, pack_tokens=6144; max_seq_length), or larger cards."
        )
    return 0 if estimate.fits else 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipe", type=Path, nargs="?", help="YAML file, see scripts/training/recipes; needed without --data"
    )
    parser.add_argument("--model", default=None, help="folder or Hub id (default: the recipe's, or this repository)")
    parser.add_argument(
        "--data", type=Path, default=None, help="folder of images with a CSV or JSONL file, or such a file"
    )
    parser.add_argument("--question", default=None, help="asked about every image of a table without questions")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of the run (default: runs/ and the data's name)"
    )
    parser.add_argument(
        "--lora", type=int, nargs="?", const=16, default=None, metavar="RANK", help="train adapters of this rank (16)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option in place of the recipe's"
    )
    parser.add_argument("--dry-run", action="store_true", help="print memory, tokens of a step and hours; load nothing")
    parser.add_argument("--cards", type=whole_number(1), default=8, help="for --dry-run: GPUs (8)")
    parser.add_argument(
        "--card-gib", type=number_within(1, 10_000), default=24, help="for --dry-run: memory of each (24)"
    )
    parser.add_argument(
        "--card-tflops", type=number_within(0.1, 100_000), default=71, help="for --dry-run: bfloat16 of each (71)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's output_dir")
    args = parser.parse_args(arguments)
    if args.recipe is None and args.data is None:
        parser.error("give a recipe, or --data (and --model) to do without")
    if args.question is not None and args.data is None:
        parser.error("--question belongs to --data")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says, or `arguments` in its place."""
    args = parse_arguments(arguments)
    with preparing():
        recipe = choose_recipe(args)
        if args.dry_run:
            return dry_run(recipe, args)
        trainer, folder, checkpoint = prepare(recipe, args.resume)
    metrics = train(trainer, checkpoint)
    written = save(trainer, folder)
    if recipe.should_save:
        (Path(recipe.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2))
        print(f"Wrote {written}. Try it: minimonkey chat IMAGE QUESTION --model {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
