"""The model of a run: how it is loaded, what is trained, and how it is saved for AutoModel to load."""

import copy
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.quantized_weights import QuantizedWeightsConfig, store_weights
from minimonkey.scripts.importing.folder import new_folder
from minimonkey.scripts.repository import readable
from minimonkey.scripts.training.distillation import with_teacher
from minimonkey.scripts.training.dropping import with_dropping
from minimonkey.scripts.training.grafting import grafted_config
from minimonkey.scripts.training.letters import with_letters
from minimonkey.scripts.training.nano import write_untrained
from minimonkey.scripts.training.recipe import UNTRAINED_NANO, Recipe


ADAPTED = r".*language_model\.layers\..*_proj"
"""Every projection of attention and MLP, in Llama, Qwen, Phi and models built like them."""
OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


def model_folder(recipe: Recipe) -> str:
    """Return the folder or Hub id to load, writing an untrained Nano first. In a distributed run, one process goes ahead."""
    if recipe.model != UNTRAINED_NANO:
        return recipe.model
    if is_deepspeed_zero3_enabled():
        raise ValueError("ZeRO-3 builds a model in all processes at once; start untrained-nano without it (torchrun).")
    folder = Path(recipe.output_dir) / UNTRAINED_NANO
    if not folder.exists():
        torch.manual_seed(recipe.seed)
        with new_folder(folder, f"{UNTRAINED_NANO}, seed {recipe.seed}") as work:
            write_untrained(work, **(recipe.dimensions if isinstance(recipe.dimensions, dict) else {}))
    return str(folder)


def load_model(folder: str, recipe: Recipe) -> nn.Module:
    """Load the model with the recipe's weights type and depth, freeze what is not trained, and put in LoRA's adapters.

    Raises:
        ValueError: The model has fewer layers than the depth asked for, or more language layers than asked for.
    """
    model_class = MiniMonkeyForConditionalGeneration
    if recipe.dropping is not None:
        model_class = with_dropping(model_class)
    if recipe.names_letters:
        model_class = with_letters(model_class, recipe.letters_weight)
    if recipe.teacher is not None:
        model_class = with_teacher(model_class, recipe)
    options = {}
    with readable(folder):
        config = run_config(folder, recipe)
    if recipe.depth is not None or recipe.projector is not None or recipe.mining:
        options["config"] = config
    if recipe.language_layers is not None:
        _check_language_layers(folder, recipe.language_layers)
    if recipe.attn_implementation is not None:
        options["attn_implementation"] = recipe.attn_implementation
    _check_stored(folder, recipe)
    with readable(folder):
        model = model_class.from_pretrained(folder, dtype=getattr(torch, recipe.dtype), **options)
    if recipe.frozen_weights is not None:
        trained = whole_modules(model, recipe.lora_also) if recipe.lora_also else []
        store_weights(model, QuantizedWeightsConfig(recipe.frozen_weights), trained)
    if recipe.fresh_projector:
        torch.manual_seed(recipe.seed)
        for module in model.model.multi_modal_projector.modules():
            getattr(module, "reset_parameters", lambda: None)()
    if recipe.language_layers is not None:
        deepen(model, recipe.language_layers)
    model.config.text_config.use_cache = False  # useless in training
    freeze(model, recipe.train if recipe.lora_r is None else [])
    freeze_by_name(model, recipe)
    if recipe.compile_layers:
        for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
            layer.compile(dynamic=True)  # in place: weights keep their names
    return model if recipe.lora_r is None else _with_adapters(model, recipe)


def run_config(folder: str, recipe: Recipe) -> MiniMonkeyConfig:
    """Return the configuration of the model that is trained: the folder's, as deep and with what the recipe says."""
    return trained_config(MiniMonkeyConfig.from_pretrained(folder), recipe)


def trained_config(config: MiniMonkeyConfig, recipe: Recipe) -> MiniMonkeyConfig:
    """Return a configuration as deep and with what the recipe says."""
    return grafted_config(config if recipe.depth is None else config_of_depth(config, recipe.depth), recipe)


def config_of_depth(config: MiniMonkeyConfig, depth: int) -> MiniMonkeyConfig:
    """Return the configuration with the first `depth` layers of vision tower and language model.

    Raises:
        ValueError: One of them has fewer.
    """
    fields = {**config.to_dict(), "scm_layer": None}
    for name in ("vision_config", "text_config"):
        part = getattr(config, name).to_dict()
        if depth > part["num_hidden_layers"]:
            raise ValueError(f"depth {depth} is more than the {part['num_hidden_layers']} layers of {name}.")
        part.pop("layer_types", None)
        fields[name] = {**part, "num_hidden_layers": depth}
    return type(config)(**fields)


def _check_stored(folder: str, recipe: Recipe) -> None:
    """Raise `ValueError` if the model's weights are stored in few bits and the recipe wants them otherwise."""
    config = MiniMonkeyConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        return
    if recipe.lora_r is None or recipe.lora_merge or recipe.frozen_weights is not None:
        raise ValueError(
            f"{folder} is quantised: only adapters can be trained on it, and not be merged with it. Take lora_r with "
            "lora_merge: false and without frozen_weights, or the model that it was made from."
        )


def _check_language_layers(folder: str, layers: int) -> None:
    """Raise `ValueError` if the model already has more layers."""
    text_config = MiniMonkeyConfig.from_pretrained(folder).text_config
    if layers < text_config.num_hidden_layers:
        raise ValueError(
            f"language_layers {layers} is less than the {text_config.num_hidden_layers} layers that the model has."
        )


@torch.no_grad()
def deepen(model: nn.Module, layers: int) -> None:
    """Add layers to the language model, evenly spread, until it has `layers`.

    A new layer is a copy of the one below with output projections set to zero, so that at first the model answers as before.
    Source: LLaMA Pro (arXiv 2401.02415), section 3.2.

    Raises:
        ValueError: Layers without the usual output projections (a mixture of experts, say).
    """
    language_model, text_config = model.model.language_model, model.config.text_config
    old = len(language_model.layers)
    copies = [(number + 1) * layers // old - number * layers // old for number in range(old)]
    origins = [number for number, count in enumerate(copies) for _ in range(count)]
    deeper: list[nn.Module] = []
    for number, origin in enumerate(origins):
        layer = language_model.layers[origin]
        if origin in origins[:number]:
            layer = copy.deepcopy(layer)
            _silence(layer)
        layer.self_attn.layer_idx = number
        deeper.append(layer)
    language_model.layers = nn.ModuleList(deeper)
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = [text_config.layer_types[origin] for origin in origins]


def _silence(layer: nn.Module) -> None:
    """Zero what a layer adds to its input."""
    outputs = {name: module for name, module in layer.named_modules() if name.rpartition(".")[2] in OUTPUT_PROJECTIONS}
    if {name.rpartition(".")[2] for name in outputs} != set(OUTPUT_PROJECTIONS):
        raise ValueError(
            f"language_layers needs layers with {' and '.join(OUTPUT_PROJECTIONS)}, got {type(layer).__name__}."
        )
    for module in outputs.values():
        for parameter in module.parameters():
            parameter.zero_()


def freeze(model: nn.Module, train: list[str]) -> None:
    """Freeze all but these parts."""
    modules = {
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector, *([model.model.mining] if model.config.mining else [])],
        "language_model": [model.model.language_model, model.lm_head],
    }
    for part, members in modules.items():
        for module in members:
            module.requires_grad_(part in train)


def freeze_by_name(model: nn.Module, recipe: Recipe) -> None:
    """Freeze parameters by a part of their name: all but `train_only` of the parts that are trained, and those in `frozen`.

    Raises:
        ValueError: A name that no trained parameter has in it, or nothing is left to train.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in (*(recipe.train_only or ()), *(recipe.frozen or ())):
        if not any(part in name for name in trained):
            raise ValueError(
                f"No trained parameter has {part!r} in its name; they are like {', '.join([*trained][:3])}."
            )
    for name, parameter in trained.items():
        is_left_out = recipe.train_only is not None and not any(part in name for part in recipe.train_only)
        if is_left_out or any(part in name for part in recipe.frozen or ()):
            parameter.requires_grad_(False)
    if trained and not any(parameter.requires_grad for parameter in trained.values()):
        raise ValueError(f"train_only {recipe.train_only} and frozen {recipe.frozen} leave nothing to train.")


def _with_adapters(model: nn.Module, recipe: Recipe) -> PeftModel:
    alpha = 2 * recipe.lora_r if recipe.lora_alpha is None else recipe.lora_alpha
    adapters = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=ADAPTED,
        modules_to_save=whole_modules(model, recipe.lora_also) if recipe.lora_also else None,
    )
    adapted = get_peft_model(model, adapters)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def whole_modules(model: nn.Module, texts: list[str]) -> list[str]:
    """Return the names of the modules of projector and language model that `lora_also` means, the outermost of each.

    Raises:
        ValueError: A text is in no name.
    """
    names = [name for name, _ in model.named_modules() if "language_model" in name or "multi_modal_projector" in name]
    found: list[str] = []
    for text in texts:
        mine = [name for name in names if text in name.removeprefix("model.language_model").removeprefix("model.")]
        if not mine:
            raise ValueError(f"lora_also: no module of projector or language model has {text!r} in its name.")
        found += mine
    return [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]


def save(trainer, base: str) -> Path:
    """Write OUT/model (with LoRA OUT/adapter, and OUT/model if it is to be merged); return the folder written last.

    The weights are read back in the type to save, however the run had them split.
    """
    recipe, output = trainer.args, Path(trainer.args.output_dir)
    trained = output / ("model.trained" if recipe.lora_r is None else "adapter")
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(trained))  # all processes: shards are gathered
    is_wanted = recipe.lora_r is None or recipe.lora_merge
    unset_hf_deepspeed_config()  # from here on one process builds whole models
    if is_wanted and recipe.should_save:
        model = _whole_model(trained, recipe, base).to(getattr(torch, recipe.save_dtype))
        model.config.text_config.use_cache = True
        target = output / "model"
        if target.exists():
            shutil.rmtree(target)
        with new_folder(target, f"step {trainer.state.global_step}") as work:
            model.save_pretrained(work)
            trainer.processor.save_pretrained(work)
        if recipe.lora_r is None:
            shutil.rmtree(trained)
    return output / "model" if is_wanted else trained


def _whole_model(trained: Path, recipe: Recipe, base: str) -> nn.Module:
    """Return the trained model; LoRA's adapters are added to the weights in float32, where little is lost."""
    model_class = MiniMonkeyForConditionalGeneration
    if recipe.lora_r is None:
        return model_class.from_pretrained(trained, dtype=getattr(torch, recipe.save_dtype))
    options = {}
    if recipe.depth is not None:
        options["config"] = config_of_depth(MiniMonkeyConfig.from_pretrained(base), recipe.depth)
    model = model_class.from_pretrained(base, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(model, trained).merge_and_unload()
