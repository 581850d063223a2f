"""Gradient rows: the gradients of every layer, a row for each batch, in main memory up to a limit and then on disk."""

from __future__ import annotations

import errno
import mmap
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

MEMORY_LIMIT = 2 << 30  # bytes


class Rows:
    """A store of gradient rows (n, p) of layers, n batches of p weights, to which one row is added at a time.

    Rows leave the device they were made on, which may have no room for those of all layers, and come back to it a layer
    at a time.

    Once they are larger than the limit, all rows go to files, one a layer, so that a layer's rows lie together, and are
    read through memory maps. The files have no name: they go when this object does, or its process, however it ends.

    Args:
        directory: where the files go; made where it is missing. None: the system's directory for temporary files.
        memory_limit: bytes of rows that stay in main memory.
    """

    def __init__(self, directory: Path | None = None, memory_limit: int = MEMORY_LIMIT) -> None:
        self.directory = directory
        self.memory_limit = memory_limit
        self._memory: dict[str, list[Tensor]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._widths: dict[str, int] = {}
        self._device = torch.device("cpu")
        self._n_bytes = 0
        weakref.finalize(self, _close, self._files)

    def append(self, layer: str, gradient: Tensor) -> None:
        """Adds a row: a float32 gradient of any shape, always the same for a layer; on a CPU it is kept, not copied.

        Raises:
            OSError: the disk is full; says how much there is and which settings help.
        """
        self._device = gradient.device
        row = gradient.detach().reshape(1, -1).cpu()
        self._widths[layer] = row.shape[1]
        self._n_bytes += row.nbytes
        self._memory.setdefault(layer, []).append(row)
        if self.spilled:
            for name, rows in self._memory.items():
                for kept in rows:
                    self._write(name, kept)
            self._memory.clear()

    @property
    def spilled(self) -> bool:
        """Whether the rows are on disk."""
        return self._n_bytes > self.memory_limit

    def __getitem__(self, layer: str) -> Tensor:
        """Rows (n, p) of a layer, float32, on the device of the gradients.

        From disk or for another device than the CPU they are made anew each time: drop them to give memory back.
        """
        if not self.spilled:
            if len(self._memory[layer]) > 1:
                self._memory[layer] = [torch.cat(self._memory[layer])]
            return self._memory[layer][0].to(self._device)
        file = self._files[layer]
        file.flush()
        # Private pages: PyTorch has no read-only tensors, and nothing written to them may reach the file.
        pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.from_numpy(np.frombuffer(pages, np.float32)).view(-1, self._widths[layer]).to(self._device)

    def _write(self, layer: str, row: Tensor) -> None:
        try:
            if layer not in self._files:
                if self.directory is not None:
                    self.directory.mkdir(parents=True, exist_ok=True)
                self._files[layer] = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115
            self._files[layer].write(row.contiguous().numpy().data)
            self._files[layer].flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = self.directory or tempfile.gettempdir()
            raise OSError(
                errno.ENOSPC,
                f"no space for {self._n_bytes / 2**30:.2f} GiB of gradient rows in {where}: "
                "name another directory, allow more memory, or calibrate on fewer batches",
            ) from error


def _close(files: Mapping[str, BinaryIO]) -> None:
    for file in files.values():
        file.close()


class WithRows(Mapping[str, Tensor]):
    """The statistics of a layer, of which `grad_rows` is read from its store at every access."""

    def __init__(self, others: Mapping[str, Tensor], rows: Rows, layer: str) -> None:
        self._others, self._rows, self._layer = others, rows, layer

    def __getitem__(self, statistic: str) -> Tensor:
        return self._rows[self._layer] if statistic == "grad_rows" else self._others[statistic]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._others, "grad_rows")

    def __len__(self) -> int:
        return len(self._others) + 1
