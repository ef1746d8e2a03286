"""Bytes of a file, on a local disk or in a bucket: read by range, written in order.

A local file is mapped into memory, so that its bytes are pages which the system reads
when they are used and drops when it likes. An object in a bucket is asked for ranges.
"""

import errno
import functools
import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath
from fsspec.spec import AbstractBufferedFile

from llama_jax.checkpoint.params import filesystem, is_remote
from llama_jax.errors import CheckpointError

# Small enough to be in the processor's cache when the system copies it.
_WRITE_BYTES = 2**20
# What is sent to a bucket in one request; each file being written holds as much.
_UPLOAD_BYTES = 2**24


class RemoteBytes:
    """An object in a bucket; every range is a request of its own."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self.size = path.stat().length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self.size)
        assert step == 1, part
        with self._path.open("rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(max(0, stop - start)), np.uint8)


class RemoteTensor:
    """Contiguous rows in a bucket's object, read when they are indexed."""

    def __init__(
        self,
        memory: RemoteBytes,
        start: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._memory = memory
        self._start = start
        self.shape = shape
        self.dtype = dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        first = self._start + start * row_bytes
        content = self._memory[first : first + shape[0] * row_bytes]
        return content.view(self.dtype).reshape(shape)


# The bytes of a file, and a tensor in one: mapped, or asked for when indexed. What both
# kinds of tensor have is a shape, a type, and rows: `tensor[start:stop]`.
Bytes = np.ndarray | RemoteBytes
Tensor = np.ndarray | RemoteTensor


def tensor_at(
    memory: Bytes, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Tensor:
    """Contiguous rows that begin at a byte of a file."""
    if isinstance(memory, np.ndarray):
        return np.ndarray(shape, dtype, buffer=memory, offset=start)
    return RemoteTensor(memory, start, shape, dtype)


def open_bytes(path: epath.PathLike) -> Bytes:
    """The bytes of a file; a local one must not be empty.

    Raises:
      OSError: it cannot be opened.
    """
    if is_remote(path):
        return RemoteBytes(epath.Path(path))
    return np.memmap(path, np.uint8, mode="r")


class OutputFile:
    """A file of known size, being written.

    On a disk any part at any time, and what is there can be read; in a bucket from the
    beginning to the end, and it is there with its last byte. An object that is there
    already is not written again, only compared with.

    Attributes:
      path: where it is.
      in_order: whether it has to be written from its beginning to its end.
      is_whole: whether it is an object that is there.
    """

    def __init__(self, path: epath.Path, size: int) -> None:
        self.path = path
        self.in_order = is_remote(path)
        self.is_whole = False
        self._size = size
        self._stream: IO[bytes] | None = None
        self._upload: AbstractBufferedFile | None = None
        self._held = b""
        self._position = 0
        if self.in_order:
            self.is_whole = path.exists() and path.stat().length == size
        else:
            # Opened without being cut: a rerun goes on with what is there.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(descriptor, size)
            self._stream = os.fdopen(descriptor, "r+b", buffering=0)

    def write(self, at: int, content: bytes | memoryview) -> None:
        """Put bytes where they belong; from several threads, on a disk."""
        if self.in_order:
            self._append(at, content)
            return
        assert self._stream is not None
        view = memoryview(content)
        for start in range(0, len(view), _WRITE_BYTES):
            block = view[start : start + _WRITE_BYTES]
            written = os.pwrite(self._stream.fileno(), block, at + start)
            if written != len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def tensors(
        self,
        offsets: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype[Any],
    ) -> dict[str, Tensor]:
        """Tensors at known places, whether or not they are written yet.

        None of a file in a bucket that is not finished.
        """
        if self.in_order and not self.is_whole:
            return {}
        memory = open_bytes(self.path)
        return {
            name: tensor_at(memory, offsets[name], shape, dtype)
            for name, shape in shapes.items()
        }

    def finish(self) -> None:
        """See to it that what was written is there to stay."""
        if self.in_order:
            assert self.is_whole, (self.path, self._position, self._size)
        else:
            assert self._stream is not None
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Let go of it; an object that is not whole does not appear."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._upload is not None:
            # Closing would make an object of what there is. What nobody finishes is
            # forgotten, by Google after a week.
            self._upload.closed = True
            self._upload = None

    def _append(self, at: int, content: bytes | memoryview) -> None:
        if self.is_whole:
            self._require_same(at, content)
            return
        if self._upload is None:
            # The first bytes describe what follows: held back until something does,
            # so that a conversion which is stopped before has begun nothing.
            if at == 0:
                self._held = bytes(content)
                return
            self._upload = _begin_upload(self.path)
            self._upload.write(self._held)
            self._position = len(self._held)
        assert at == self._position, (self.path, at, self._position)
        self._upload.write(content)
        self._position += len(content)
        if self._position == self._size:
            self._upload.close()
            self._upload = None
            self.is_whole = True

    def _require_same(self, at: int, content: bytes | memoryview) -> None:
        there = self._there[at : at + len(content)]
        if there.tobytes() != bytes(content):
            raise CheckpointError(
                f"{self.path} was there already, and is not what is to be written: "
                "remove it, and run the conversion again."
            )

    @functools.cached_property
    def _there(self) -> RemoteBytes:
        return RemoteBytes(self.path)


def _begin_upload(path: epath.Path) -> AbstractBufferedFile:
    """A file that can be given up, which one of epath's cannot."""
    upload = filesystem(path).open(str(path), "wb", block_size=_UPLOAD_BYTES)
    assert isinstance(upload, AbstractBufferedFile), upload
    return upload
