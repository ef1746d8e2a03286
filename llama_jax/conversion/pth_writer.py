"""PyTorch's `.pth` files, planned so that they are written from start to end.

Such a file is a zip archive of uncompressed records, each as PyTorch lays it out: a
header padded so that the bytes start at a multiple of 64, the bytes, and behind them
their CRC. Only that has to wait for the bytes, so all else is known before the first.
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}
_ROOT = "archive/"
_ALIGNMENT = 64
# A field of a zip archive with this value, or of 32 bits, is told by a zip64 record.
_MAX_UINT16 = 2**16 - 1
_MAX_UINT32 = 2**32 - 1
_VERSION, _VERSION_ZIP64 = 20, 45
_FLAGS = 0x0808  # the CRC follows the bytes; the name is UTF-8
# The date of every record: the same tensors make the same file.
_JANUARY_1980 = 0x21
_LARGE = struct.pack("<HHQQ", 1, 16, 0, 0)  # sizes of 64 bits, which come behind too
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record of the archive."""

    name: str
    start: int  # of its header
    size: int

    @property
    def is_large(self) -> bool:
        return self.size >= _MAX_UINT32

    @property
    def header(self) -> bytes:
        """All before its bytes. Its CRC and sizes are not there: they come behind."""
        name = self.name.encode()
        extra, version, size = b"", _VERSION, 0
        if self.is_large:
            extra, version, size = _LARGE, _VERSION_ZIP64, _MAX_UINT32
        length = _LOCAL.size + len(name) + len(extra) + 4
        padding = -(self.start + length) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        times, crc = (0, _JANUARY_1980), 0
        fields = (version, _FLAGS, 0, *times, crc, size, size, len(name), len(extra))
        return _LOCAL.pack(b"PK\x03\x04", *fields) + name + extra

    @property
    def offset(self) -> int:
        """Where its bytes start."""
        return self.start + len(self.header)

    def footer(self, crc: int) -> bytes:
        """All behind its bytes."""
        sizes = "QQ" if self.is_large else "II"
        return struct.pack(f"<4sI{sizes}", b"PK\x07\x08", crc, self.size, self.size)

    @property
    def stop(self) -> int:
        """Where the next record starts."""
        return self.offset + self.size + len(self.footer(0))

    def entry(self, crc: int) -> bytes:
        """Its entry of the directory."""
        name = self.name.encode()
        extra, version = b"", _VERSION
        if large := [n for n in (self.size, self.size, self.start) if n >= _MAX_UINT32]:
            extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large)
            version = _VERSION_ZIP64
        size, start = min(self.size, _MAX_UINT32), min(self.start, _MAX_UINT32)
        fields = (version, version, _FLAGS, 0, 0, _JANUARY_1980, crc, size, size)
        lengths, attributes = (len(name), len(extra), 0), (0, 0, 0)
        return (
            _CENTRAL.pack(b"PK\x01\x02", *fields, *lengths, *attributes, start)
            + name
            + extra
        )


class PthLayout:
    """Where everything goes in a `.pth` file of tensors of one type.

    Written are `head`; for each tensor, in order, what is `before` it, its bytes and
    what comes `after` them; then the `tail`.

    Attributes:
      head: all before the first tensor.
      offsets: where in the file the bytes of each tensor start.
      size: of the whole file, in bytes.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]
    ) -> None:
        self.head = b""
        self._head_crcs: dict[_Record, int] = {}
        described = _program(shapes, _STORAGES[dtype])
        contents = {"data.pkl": described, "byteorder": b"little", "version": b"3\n"}
        for name, content in contents.items():
            record = _Record(_ROOT + name, len(self.head), len(content))
            crc = zlib.crc32(content)
            self.head += record.header + content + record.footer(crc)
            self._head_crcs[record] = crc
        self._records: dict[str, _Record] = {}
        self._directory = len(self.head)
        for key, (name, shape) in enumerate(shapes.items()):
            num_bytes = math.prod(shape) * dtype.itemsize
            record = _Record(f"{_ROOT}data/{key}", self._directory, num_bytes)
            self._records[name] = record
            self._directory = record.stop
        self.offsets = {name: record.offset for name, record in self._records.items()}
        self.size = self._directory + len(self.tail(dict.fromkeys(shapes, 0)))

    def before(self, name: str) -> bytes:
        """What is written before the bytes of a tensor."""
        return self._records[name].header

    def after(self, name: str, crc: int) -> bytes:
        """What is written behind the bytes of a tensor, of which this is the CRC32."""
        return self._records[name].footer(crc)

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        """What is written behind all tensors: the directory.

        Args:
          crcs: the CRC32 of the bytes of each tensor.
        """
        entries = [record.entry(crc) for record, crc in self._head_crcs.items()]
        entries += [record.entry(crcs[name]) for name, record in self._records.items()]
        directory = b"".join(entries)
        return directory + _end(len(entries), self._directory, len(directory))


def _end(num_records: int, start: int, size: int) -> bytes:
    """The end of an archive, behind its directory."""
    zip64 = b""
    if num_records >= _MAX_UINT16 or start >= _MAX_UINT32:
        versions, disks = (_VERSION_ZIP64,) * 2, (0, 0)
        counts = (num_records, num_records)
        zip64 = struct.pack(
            "<4sQ2H2I4Q", b"PK\x06\x06", 44, *versions, *disks, *counts, size, start
        ) + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    count, start = min(num_records, _MAX_UINT16), min(start, _MAX_UINT32)
    return zip64 + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, start, 0
    )


def _program(shapes: Mapping[str, tuple[int, ...]], storage: str) -> bytes:
    """The pickle, of protocol 2, that describes a dict of tensors."""
    items = b"".join(
        _text(name) + _tensor(str(key), shape, storage)
        for key, (name, shape) in enumerate(shapes.items())
    )
    return b"\x80\x02}(" + items + b"u."


def _tensor(key: str, shape: tuple[int, ...], storage: str) -> bytes:
    """The call that makes a tensor of all of a storage."""
    num_elements = math.prod(shape)
    identifier = _tuple(
        _text("storage"),
        _global("torch", storage),
        _text(key),
        _text("cpu"),
        _integer(num_elements),
    )
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    requires_grad = b"\x89"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(
        identifier + b"Q",
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        requires_grad,
        hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
