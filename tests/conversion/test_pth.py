"""Our reader of `.pth` files: what it maps, and all that it refuses."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from llama_jax.conversion.pth import read_pth
from llama_jax.errors import CheckpointError
from tests.reference.meta_checkpoint import (
    pickle_of,
    storage_of,
    tensor_of,
    write_archive,
    write_pth,
)

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4) - 5,
    "vector": np.array([0.5, -2.0, np.nan], np.float32),
}
STORAGE = np.arange(12, dtype=np.float32)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "consolidated.00.pth"


@pytest.mark.parametrize("shared_storage", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(file, dtype, shared_storage):
    tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    write_pth(file, tensors, shared_storage=shared_storage)
    found = read_pth(file)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].tobytes() == tensor.tobytes()


def test_tensors_are_read_only_views_of_the_mapped_file(file):
    write_pth(file, TENSORS)
    matrix = read_pth(file)["matrix"]
    assert not matrix.flags.writeable and not matrix.flags.owndata
    base = matrix
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == file


def _write_view(file, offset, shape, strides):
    view = tensor_of(storage_of(STORAGE, 0), offset, shape, strides)
    write_archive(file, pickle_of({"view": view}), [STORAGE.tobytes()])


def test_offsets_and_strides_are_kept(file):
    _write_view(file, 1, (4, 2), (1, 6))
    expected = STORAGE.reshape(2, 6)[:, 1:5].T
    assert np.array_equal(read_pth(file)["view"], expected)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (0, (3, 4), (5, 1)),
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (0, (3,), (1, 1)),
        (2**31 - 1, (1,), (1,)),
        (0, (2**31 - 1,), (2**31 - 1,)),
    ],
)
def test_a_view_beyond_its_storage_is_refused(file, offset, shape, strides):
    _write_view(file, offset, shape, strides)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is truncated or"):
        read_pth(file)


class _Described:
    """Pickles as a tensor does: a call of PyTorch's function."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_pythons_own_pickler_writes_is_read(file, monkeypatch, protocol):
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def rebuild():
        raise AssertionError("only named, never called")

    utils._rebuild_tensor_v2 = rebuild
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    storage = ("storage", torch.FloatStorage, "0", "cpu", STORAGE.size)

    def view(offset, *shape):
        strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
        hooks = collections.OrderedDict()
        return _Described(rebuild, storage, offset, shape, strides, False, hooks)

    tensors = collections.OrderedDict(a=view(0), b=view(2, 3), c=view(0, 3, 4))
    tensors |= {f"d{number}": view(4, 2, 2, 2) for number in range(300)}
    tensors._metadata = collections.OrderedDict({"": {"version": 2**40}})
    program = io.BytesIO()
    _Pickler(program, protocol).dump(tensors)
    write_archive(file, program.getvalue(), [STORAGE.tobytes()])

    found = read_pth(file)
    assert list(found) == list(tensors)
    assert found["a"] == STORAGE[0]
    assert np.array_equal(found["b"], STORAGE[2:5])
    assert np.array_equal(found["c"], STORAGE.reshape(3, 4))
    assert np.array_equal(found["d299"], STORAGE[4:].reshape(2, 2, 2))


class _Payload:
    """What an attacker writes: an object that is made by calling a function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_the_pickle_is_refused_by_name(file, tmp_path, protocol):
    marker = tmp_path / "marker"
    program = pickle.dumps(_Payload(os.mkdir, str(marker)), protocol)
    pickle.loads(program)
    assert marker.exists()  # the payload works, on whoever unpickles it
    marker.rmdir()

    write_archive(file, program)
    with pytest.raises(CheckpointError, match=rf"asks for .* {os.name}\.mkdir, which"):
        read_pth(file)
    assert not marker.exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
REFUSED = {
    "integer storage": (b"ctorch\nLongStorage\n", r"torch\.LongStorage"),
    "attribute of an allowed module": (b"ctorch._utils\nos\n", r"torch\._utils\.os"),
    "dotted name": (b"ccollections\nOrderedDict.fromkeys\n", "OrderedDict.fromkeys"),
    "state of a function": (REBUILD + b"}b", "an object with a state"),
    "call of a storage type": (b"ctorch\nFloatStorage\n)R", "a call of what makes no"),
    "call of a dict with arguments": (
        b"ccollections\nOrderedDict\n(X\x01\x00\x00\x00atR",
        "a call of what makes no tensor",
    ),
    "protocol 0 object": (b"(ios\nsystem\n", r"INST \(os system\)"),
    "extension registry": (b"\x82\x01", "EXT1"),
    "persistent object": (
        b"(X\x06\x00\x00\x00moduleX\x01\x00\x00\x00aX\x01\x00\x00\x000X\x03\x00\x00\x00"
        b"cpuK\x01tQ",
        "no storage",
    ),
    "key that is no name": (b"})K\x01s", "keys that are no names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tensors_do_not_need_is_refused(file, case):
    opcodes, message = REFUSED[case]
    write_archive(file, pickle_of({"w": opcodes}))
    with pytest.raises(CheckpointError, match=f"asks for .*{message}"):
        read_pth(file)


MALFORMED = {
    "no instruction": b"",
    "no end": b"\x80\x02}",
    "nothing to pop": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x07.",
    "string beyond the end": b"\x80\x02X\xff\xff\xff\x7fa.",
    "tensor of nothing": pickle_of({"w": REBUILD + b")R"}),
    "tensor without a storage": pickle_of({"w": tensor_of(b"}", 0, (1,), (1,))}),
    "storage that is absent": pickle_of(
        {"w": tensor_of(storage_of(STORAGE, 7), 0, (1,), (1,))}
    ),
    "storage of another size": pickle_of(
        {"w": tensor_of(storage_of(STORAGE[:3], 0), 0, (1,), (1,))}
    ),
    # A key whose text takes more depth than Python has.
    "depth": pickle_of(
        {
            "w": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
            + b"\x85" * 100_000
            + b"NK\x01tQ"
        }
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_pickle_is_damage(file, case):
    write_archive(file, MALFORMED[case], [STORAGE.tobytes()])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_pth(file)


def test_a_huge_memo_index_costs_no_memory(file):
    tensor = tensor_of(storage_of(STORAGE, 0), 0, (12,), (1,))
    program = pickle_of({"w": tensor + b"r" + struct.pack("<I", 2**32 - 1)})
    write_archive(file, program, [STORAGE.tobytes()])
    assert np.array_equal(read_pth(file)["w"], STORAGE)


def test_other_contents_are_refused(file):
    write_archive(file, b"\x80\x02K\x01.")
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        read_pth(file)
    write_archive(file, pickle_of({"epoch": b"K\x01"}))
    with pytest.raises(CheckpointError, match="the entry 'epoch' is no tensor"):
        read_pth(file)


def test_files_that_cannot_be_mapped_are_refused(file):
    program = pickle_of({"w": tensor_of(storage_of(STORAGE, 0), 0, (12,), (1,))})
    write_archive(file, program, [STORAGE.tobytes()], byteorder=b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pth(file)
    write_archive(file, program, [STORAGE.tobytes()], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"record data\.pkl is compressed"):
        read_pth(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "no pickle")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_pth(file)


def test_a_damaged_header_of_a_storage_is_refused(file):
    write_pth(file, TENSORS)
    content = bytearray(file.read_bytes())
    content[content.index(b"archive/data/1") - 30] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="1 is not where the archive says"):
        read_pth(file)


def test_no_byte_flipped_in_the_file_escapes_as_another_error(file):
    write_pth(file, TENSORS)
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 0x41
        file.write_bytes(flipped)
        try:
            assert all(isinstance(t, np.ndarray) for t in read_pth(file).values())
        except CheckpointError as error:
            assert str(file) in str(error)
