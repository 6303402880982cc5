"""Train a model on its own right answers, round after round (M-STaR).

    python scripts/self_train.py scripts/selftraining/recipes/nano-bills.yaml
    python scripts/self_train.py RECIPE.yaml --set mode=restart --set output_dir=runs/star          plain STaR
    python scripts/self_train.py RECIPE.yaml --set mode=supervised                                  worked answers instead
    python scripts/self_train.py RECIPE.yaml --resume

Writes to the recipe's output_dir: model/, metrics.json with the monitors of each round and the accuracy on the test questions
before and after, monitors.png, pairs-NNN.jsonl with what each round learned from, and predictions before.jsonl and after.jsonl,
which `evaluate compare` compares item by item.
Options of a recipe are in selftraining/recipe.py.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

from minimonkey.scripts.importing.folder import new_folder
from minimonkey.scripts.precision import choose_dtype
from minimonkey.scripts.repository import load_model, load_processor, preparing
from minimonkey.scripts.selftraining.loop import SelfTraining
from minimonkey.scripts.selftraining.recipe import SelfRecipe, read_self_recipe


MONITORS = ("greedy", "pass_at_k", "reward_pass_at_2")


def start(recipe: SelfRecipe, resume: bool) -> SelfTraining:
    """Return the run, with its model loaded, or taken up where it was."""
    output = Path(recipe.output_dir)
    if not resume and (output / "run.json").exists():
        raise ValueError(f"{output} holds a run; go on with it (--resume) or choose another output_dir.")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if recipe.device == "auto" else recipe.device
    model = load_model(recipe.model, dtype=choose_dtype(recipe.dtype, device)).to(device)
    training = SelfTraining(model, load_processor(recipe.model), recipe)
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.json").write_text(json.dumps(vars(recipe), indent=1))
    if training.resume(output):
        print(f"Going on after round {training.round}.")
    elif not (output / "before.json").exists():
        write_test(training, output, "before")
    if recipe.process == "learned":
        learned = training.learn_process(output / "process.pt")
        if learned:
            print(f"Process reward: {json.dumps(learned)}", flush=True)
    return training


def write_test(training: SelfTraining, output: Path, name: str) -> dict:
    """Measure on the test questions and write the predictions; return the accuracy."""
    result, lines = training.measure()
    (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (output / f"{name}.json").write_text(json.dumps(result))
    print(f"{name}: {result['accuracy']:.1%} ({result['low']:.1%} to {result['high']:.1%}) of {result['items']}")
    return result


def draw(monitors: list[dict], path: Path) -> None:
    """Write the monitors of all rounds as a figure."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in MONITORS:
        axes.plot(
            [entry["round"] + 1 for entry in monitors], [entry[name] for entry in monitors], marker="o", label=name
        )
    axes.set_xlabel("round")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, see scripts/selftraining/recipes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option in place of the recipe's"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the recipe's output_dir")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with preparing():
        recipe = read_self_recipe(args.recipe, args.set)
        training = start(recipe, args.resume)
    output = Path(recipe.output_dir)
    while training.round < recipe.rounds:
        figures = training.run_round()
        training.save(output)
        shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
        print(json.dumps(shown), flush=True)
    after = write_test(training, output, "after")
    draw(training.monitors, output / "monitors.png")
    before = json.loads((output / "before.json").read_text())
    metrics = {"before": before, "after": after, "rounds": training.monitors}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    if not (output / "model").exists():
        with new_folder(output / "model", "the last round") as work:
            training.model.save_pretrained(work)
            training.processor.save_pretrained(work)
    print(f"Wrote {output / 'model'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
