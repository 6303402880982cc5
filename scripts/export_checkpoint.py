"""Write a MiniMonkey in the published layout, which LMDeploy, llama.cpp's converter and vLLM's InternVL class load.

    python scripts/export_checkpoint.py runs/my-model/model OUT
    python scripts/export_checkpoint.py MiniMonkey-2B OUT --internlm2       as the published Mini-Monkey is stored

Weights get the published names (vision_model, mlp1, language_model), config.json has llm_config and vision_config, and older
releases of transformers can read the tokenizer too. import_checkpoint.py makes the same model of it again, bit for bit. A
language model of the Llama family is written as Llama, which every program knows; --internlm2 writes InternLM2's names with
fused q, k, v instead. What others compute is one grid of tiles: MSAC and SCM are this package's.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from minimonkey.checkpoint import published_name, published_tensor
from minimonkey.configuration_minimonkey import MiniMonkeyConfig
from minimonkey.conversation import chat_template_jinja, get_template
from minimonkey.scripts.exporting.config import CONFIG_CODE, published_config
from minimonkey.scripts.exporting.tokenizer import save_tokenizer
from minimonkey.scripts.import_checkpoint import expected_shapes, fingerprint, make_config, read_config, resolve_source
from minimonkey.scripts.importing.folder import check_free, new_folder
from minimonkey.scripts.importing.weights import INDEX_NAME, Shard, check_against_model, read_shards
from minimonkey.scripts.repository import ROOT, reports_errors


LAYOUTS = ("published",)
MOST_SHARD_BYTES = 5 * 10**9


def export_checkpoint(source: str, out: Path, as_internlm2: bool = False) -> None:
    """Check, convert and write a checkpoint; see the module's docstring.

    Raises:
        ValueError: A source that is no MiniMonkey or does not fit the layout, before OUT exists.
    """
    check_free(out)
    folder = resolve_source(source)
    config_dict = read_config(folder)
    if config_dict.get("model_type") != MiniMonkeyConfig.model_type or "text_config" not in config_dict:
        raise ValueError(f"{folder} holds no MiniMonkey in its own format; only such a model is exported.")
    config = make_config(config_dict)
    if config.own_parts:
        raise ValueError(
            f"The published layout has no place for {', '.join(config.own_parts)}; such a MiniMonkey stays in its own format."
        )
    settings = published_config(config, as_internlm2)
    shards = read_shards(folder)
    check_against_model(shards, expected_shapes(config), lambda *named: dict([named]), config.tie_word_embeddings)
    with new_folder(out, fingerprint(config, shards) + str(as_internlm2)) as work:
        write_weights(shards, work, config.text_config, as_internlm2)
        write_json(work / "config.json", settings)
        shutil.copy(ROOT / "scripts" / "exporting" / f"{CONFIG_CODE}.py", work)
        if (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            save_tokenizer(tokenizer, read_chat_template(folder, config), work)
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder).save_pretrained(work)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_chat_template(folder: Path, config: MiniMonkeyConfig) -> str:
    """Return the chat template beside a model, or that of its configuration."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return chat_template_jinja(get_template(config.template), config.system_message)


def write_weights(shards: list[Shard], work: Path, text_config, as_internlm2: bool) -> None:
    """Write the weights of `shards` under their published names, one file after the other."""
    sources: dict[str, list[tuple[Path, str]]] = {}  # published name: our tensors, q before k before v
    order = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
    ours = [(name, shard) for shard in shards for name in shard.shapes]
    for name, shard in sorted(ours, key=lambda one: order.get(one[0].split(".")[-2], 0)):
        sources.setdefault(published_name(name, as_internlm2), []).append((shard.path, name))

    def read(name: str) -> torch.Tensor:
        parts = []
        for path, own_name in sources[name]:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor(own_name))
        return published_tensor(name, parts, text_config).contiguous()

    planned = {name: torch.empty_like(read(name), device="meta") for name in sorted(sources)}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=MOST_SHARD_BYTES)
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, work / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(work / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hub id or folder of a MiniMonkey")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="whose names (published)")
    parser.add_argument("--internlm2", action="store_true", help="write a Llama as InternLM2, with fused q, k, v")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    export_checkpoint(args.source, args.out, args.internlm2)
    print(f"Wrote {args.out} in the {args.layout} layout.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
