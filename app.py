"""The demo page as a Hugging Face Space runs it: `python app.py`; see docs/demo.md.

Its settings are environment variables: MINIMONKEY_DEMO holds options of scripts/demo.py, "--model OWNER/MODEL --preset docvqa"
for example. Address and port are gradio's own variables.
"""

import os
import shlex
import sys
from pathlib import Path


sys.path.insert(
    0, str(Path(__file__).resolve().parent / "scripts")
)  # where this repository is the package `minimonkey`

from minimonkey.scripts.demo import main  # noqa: E402


if __name__ == "__main__":
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(main(["--host", host, "--port", port, *shlex.split(os.environ.get("MINIMONKEY_DEMO", ""))]))
