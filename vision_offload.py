"""The vision tower out of the way while nothing is encoded: BlueLM-V-3B (arXiv 2411.10640) frees it before it decodes.

    model.offload_vision()          from then on; chat, generate and forward bring it back for each new image

On a GPU the weights of tower and projector live in the CPU's memory and are copied over while tiles are encoded. On a CPU they
live in a temporary file that is mapped into memory: after use the system is told that their pages are not needed, and the next
image reads them again, from its cache of files if there is room.
"""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


ALIGNMENT = 64


class OffloadedModules:
    """Some modules whose weights are elsewhere unless `present` is entered; their parameters stay the same objects.

    Args:
        modules: Of one device. Trained no more: their weights must not change from now on.
        device: Where they compute.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.device = device
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self._file, self._map = None, None
        if device.type == "cpu":
            self._map_to_file()
        else:
            for parameter in self.parameters:
                parameter.data = parameter.data.to("cpu")
        self._away = [parameter.data for parameter in self.parameters]

    def nbytes(self) -> int:
        """Count the bytes of their weights."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the weights where they compute, inside the `with` block."""
        if self.device.type != "cpu":
            for parameter, away in zip(self.parameters, self._away):
                parameter.data = away.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, away in zip(self.parameters, self._away):
                parameter.data = away
            self._drop_pages()

    def _map_to_file(self) -> None:
        """Write the weights into a file without a name, and let the parameters be views of its mapping."""
        offsets, size = [], 0
        for parameter in self.parameters:
            offsets.append(size)
            size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self._file = tempfile.TemporaryFile(prefix="minimonkey-vision-")  # noqa: SIM115 - open as long as it is mapped
        for offset, parameter in zip(offsets, self.parameters):
            self._file.seek(offset)
            self._file.write(parameter.data.contiguous().flatten().view(torch.uint8).numpy())
        self._file.truncate(max(size, 1))
        self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        for offset, parameter in zip(offsets, self.parameters):
            data = torch.frombuffer(self._map, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
            parameter.data = data.view(parameter.shape)
        self._drop_pages()

    def _drop_pages(self) -> None:
        """Tell the system that the mapped pages are not needed now; where it cannot be told, it frees them itself."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
