"""Write a MiniMonkey as ONNX files: vision tower with projector, token embeddings, language model with cache, and the scorer.

    python scripts/export_onnx.py . nano-onnx
    python scripts/chat.py receipt.png "What is the total?" --model nano-onnx --engine onnx --use-scm

OUT also gets configuration and processor, so that it is all that a chat needs. Numbers are float32, which every back end
computes. scorer.onnx gives the queries and keys by which scale compression chooses tokens. Needs
`pip install onnx onnxscript onnxruntime`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from minimonkey.scripts.export_gguf import read_plain_config
from minimonkey.scripts.exporting.onnx_parts import Scorer, check_onnx, parts, with_fixed_positions
from minimonkey.scripts.import_checkpoint import resolve_source
from minimonkey.scripts.importing.folder import check_free
from minimonkey.scripts.repository import load_model, load_processor, reports_errors


SETTINGS = "onnx_settings.json"
MOST_IN_ONE_FILE = 2**30  # protobuf holds no more than 2 GiB; larger parts keep their weights beside them


def export_onnx(source: str, out: Path, subfolder: str = "") -> None:
    """Check a model and write its parts; see the module's docstring.

    Raises:
        ValueError: A package that is missing, a source that is no MiniMonkey or is quantised, a language model of another
            shape, an OUT that exists: all before anything is written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'ONNX files are written with onnx and onnxscript: pip install "minimonkey[onnx]" ({error})'
        ) from error
    check_free(out)
    home = resolve_source(source)
    config = read_plain_config(home / subfolder)
    check_onnx(config)
    processor = load_processor(home)
    model = with_fixed_positions(load_model(home, subfolder=subfolder, dtype=torch.float32))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=out.name + ".", suffix=".partial", dir=out.parent))
    try:
        for name, part in parts(model).items():
            write_part(work / f"{name}.onnx", *part)
        processor.save_pretrained(work)
        for code in work.glob("*.py"):
            code.unlink()
        config.save_pretrained(work)
        model.generation_config.save_pretrained(work)
        settings = {"scm_layer": config.scm_layer, "scorer_scaling": Scorer(model).scaling}
        (work / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        check_free(out)
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@torch.no_grad()
def write_part(
    path: Path, module: torch.nn.Module, example: tuple, names: tuple[list[str], list[str]], dynamic: tuple
) -> None:
    """Write one part of a model as an ONNX file."""
    nbytes = sum(tensor.nbytes for tensor in module.parameters())
    torch.onnx.export(
        module.eval(),
        example,
        path,
        input_names=names[0],
        output_names=names[1],
        dynamic_shapes=dynamic,
        dynamo=True,
        external_data=nbytes > MOST_IN_ONE_FILE,
        verbose=False,
    )


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="Hub id or folder of a MiniMonkey")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--subfolder", default="", help="of SRC, where the weights are")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    export_onnx(args.source, args.out, args.subfolder)
    for path in sorted(args.out.glob("*.onnx*")):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
