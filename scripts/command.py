"""The command `minimonkey`: one sub-command for each script, which does what running the script as a file does.

minimonkey chat picture.png "Read the text."
minimonkey train --help
"""

import importlib
import sys


# sub-command: (module of scripts/, what it does)
COMMANDS = {
    "quickstart": ("quickstart", "let Nano answer questions about the images in assets/"),
    "chat": ("chat", "ask a model about images and videos"),
    "import": ("import_checkpoint", "turn a published checkpoint into a folder that loads with AutoModel"),
    "export": ("export_checkpoint", "write a model under the published names, for LMDeploy, llama.cpp and others"),
    "quantize": ("quantize", "write a model with its weights in 8 or 4 bits"),
    "export-gguf": ("export_gguf", "write the language model for llama.cpp"),
    "export-onnx": ("export_onnx", "write a model as ONNX files, for onnxruntime and others"),
    "assemble": ("assemble", "join a vision tower and a language model into a new MiniMonkey"),
    "prepare": ("prepare", "turn a published data set into conversations to train on, or a benchmark"),
    "train": ("finetune", "train a model on data of your own, or by a recipe"),
    "self-train": ("self_train", "train a model on its own right answers, round after round"),
    "distill-vision": ("distill_vision", "make a model's vision tower smaller, taught by the one it came from"),
    "average": ("average", "average the last checkpoints of a training run"),
    "read": ("read", "read documents to text or fields, one line of JSON a page"),
    "evaluate": ("evaluate", "measure how well a model reads, or compare two such measurements"),
    "crop": ("crop_documents", "cut lines out of PDF documents into a benchmark of real typesetting"),
    "score": ("score", "score predictions as a benchmark's authors do, or write what its server takes"),
    "ablate": ("ablate", "measure what ways to cut images and to compress their tokens are worth"),
    "visualize": ("visualize", "draw the grids of an image and the tokens that scale compression keeps"),
    "benchmark": ("benchmark", "measure speed and memory"),
    "demo": ("demo", "show a model in the browser"),
    "documents": ("synthetic.documents", "draw a sheet of the rendered documents that training reads"),
}


def usage() -> str:
    """List the sub-commands, one a line."""
    lines = [f"    {name:<16}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: minimonkey COMMAND ...", "", *lines, "", "minimonkey COMMAND --help says more."])


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command and return its exit status; 2 if there is no such sub-command."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"minimonkey: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv[:] = [f"minimonkey {name}", *rest]  # argparse takes the program's name from it
    # Only the script that runs is imported, so that the list appears at once and optional packages are not required.
    return importlib.import_module(f"minimonkey.scripts.{module}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
