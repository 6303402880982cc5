"""Let a torchvision that was built for CUDA be imported beside a torch that was built for CPUs.

Its operators cannot be loaded there, and its import ends with "operator torchvision::nms does not exist". Their schemas are
all that it needs, since nobody calls them here. `make test-vllm` puts this file and a .pth file that imports it into the
environment: then it comes before every import of torchvision, and costs nothing where there is none.
"""

import sys
from importlib.abc import MetaPathFinder


SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class BeforeTorchvision(MetaPathFinder):
    """Defines the schemas when torchvision is about to be imported, and finds nothing itself."""

    def __init__(self):
        self.library = None

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in SCHEMAS:
                    self.library.define(schema)
                sys.modules[__name__].kept = self  # the schemas go when the library does


sys.meta_path.insert(0, BeforeTorchvision())
