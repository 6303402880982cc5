"""What the tests share: the model as a user loads it, published-format checkpoints, pictures with known pixels.

Reference figures in fixtures/ were recorded from the published Mini-Monkey code (transformers 4.37.2, float32, eager
attention) with seeded random weights; fixtures/README.md says what is in them.
"""

import copy
import os
import tempfile
from pathlib import Path


# A module cache of this run's own: what is tested is the code of this checkout, loaded from nothing.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="minimonkey-modules-")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="minimonkey-datasets-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that run tests beside each other share the processors; the process that starts them must not decide for them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModel, AutoProcessor  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = [FIXTURES]
pytest.register_assert_rewrite("chat_helpers", "image_helpers")
# What a release of transformers would break, in a few minutes: loading, numbers, processing, chat, generate, compression.
CORE = (
    *("test_hub", "test_configuration", "test_parity", "test_model", "test_processing", "test_chat"),
    *("test_chat_stream", "test_compression", "test_compression_generate", "test_transformers_internvl"),
)


def pytest_addoption(parser):
    parser.addoption("--goldens", type=Path, help="folder with the recorded cases that are too large for fixtures/")


def pytest_configure(config):
    if config.getoption("--goldens"):
        RECORDED.append(config.getoption("--goldens").resolve())


def pytest_collection_modifyitems(items):
    """Mark the tests of CORE, and of nothing that is slow."""
    for item in items:
        if item.path.stem in CORE and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            item.add_marker("core")


def recorded(path: str) -> Path:
    """A recorded file or folder, of the fixtures or of --goldens; the test is skipped where there is none."""
    found = [folder / path for folder in RECORDED if (folder / path).exists()]
    return found[0] if found else pytest.skip(f"{path} is not in the fixtures; pass --goldens FOLDER")


def synthetic_picture(width: int, height: int, seed: int) -> Image.Image:
    """The picture of this size and seed that the recorded pixels were made from."""
    y, x, c = np.mgrid[:height, :width, :3]
    noise = np.random.RandomState(seed).randint(0, 64, (height, width, 3))
    return Image.fromarray(((x * (3 + c) + y * (5 + 2 * c) + (x * y) // (7 + c) + noise) % 256).astype(np.uint8))


def random_tiles(seed: int, *shape: int) -> torch.Tensor:
    """Random pixel values that are the same on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def one_tile(image_processor):
    """The image processor set to show an image as one tile, unless a test asks for more: all of them are cheap."""
    image_processor.min_tiles = image_processor.max_tiles = 1
    image_processor.adaptive_min_tiles = image_processor.adaptive_max_tiles = 1
    image_processor.max_scale = None
    return image_processor


def load_image_processor(backend: str, source=ROOT):
    return one_tile(AutoImageProcessor.from_pretrained(source, trust_remote_code=True, backend=backend))


def enable_activation_checkpointing(model) -> None:
    """Called so since transformers 5.23, which warns of the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@pytest.fixture(scope="session")
def shipped_processor():
    """As a user loads it, with the tiles that Nano reads best."""
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="session")
def processor(shipped_processor):
    """With one tile for an image."""
    processor = copy.deepcopy(shipped_processor)
    one_tile(processor.image_processor)
    return processor


@pytest.fixture(scope="session")
def nano():
    """MiniMonkey-Nano in float32."""
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pil():
    """The image processor that needs Pillow alone."""
    return load_image_processor("pil")


@pytest.fixture(scope="module")
def torchvision():
    return load_image_processor("torchvision")


@pytest.fixture(scope="module", params=["pil", "torchvision"])
def either(request):
    """The image processor of each back end."""
    return load_image_processor(request.param)


@pytest.fixture(scope="module")
def small(processor):
    """Nano's processor with tiles of four tokens."""
    small = copy.deepcopy(processor)
    small.image_processor.size = {"height": 28, "width": 28}
    return small


@pytest.fixture(scope="module")
def model():
    """A random language model that says letters."""
    from chat_helpers import tiny  # which imports this module

    return tiny(model_type="llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def pictures():
    return [synthetic_picture(300, 200, 1), synthetic_picture(150, 320, 2), synthetic_picture(90, 80, 3)]


@pytest.fixture
def sent(nano, monkeypatch):
    """The arguments of the last `generate`, which answers with `<|im_end|>` at once."""
    last = {}

    def generate(**options):
        last.clear()
        last.update(options)
        ids = options["input_ids"]
        return torch.cat([ids, torch.full((len(ids), 1), options["eos_token_id"])], dim=1)

    monkeypatch.setattr(nano, "generate", generate)
    return last
