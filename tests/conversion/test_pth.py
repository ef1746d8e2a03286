"""Our reader of `.pth` files: what it maps, and all that it refuses."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath
from hypothesis import strategies as st

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


@pytest.fixture
def remote(file):
    """The file by a name in a bucket."""
    with mock_epath(
        open=lambda original, path, mode: open(file, mode),
        stat=lambda original, path: original(file),
    ):
        yield epath.Path("gs://bucket") / file.name


def _write_view(file, offset, shape, strides):
    view = tensor_of(storage_of(STORAGE, 0), offset, shape, strides)
    write_archive(file, pickle_of({"view": view}), [STORAGE.tobytes()])


VIEWS = {
    "transposed": (1, (4, 2), (1, 6), STORAGE.reshape(2, 6)[:, 1:5].T),
    "columns": (2, (3, 2), (4, 1), STORAGE.reshape(3, 4)[:, 2:]),
    "overlapping": (0, (10, 3), (1, 1), np.arange(10)[:, None] + np.arange(3)),
    "expanded": (5, (3, 2), (0, 0), np.full((3, 2), 5)),
    "a part": (4, (2, 4), (4, 1), STORAGE.reshape(3, 4)[1:]),
    "one row, its stride unused": (4, (1, 4), (99, 1), STORAGE.reshape(3, 4)[1:2]),
    "empty": (3, (0, 4), (4, 1), np.zeros((0, 4))),
    "empty at the end": (12, (0,), (1,), np.zeros(0)),
}


@pytest.mark.parametrize("case", VIEWS)
def test_offsets_and_strides_are_kept(file, case):
    *place, expected = VIEWS[case]
    _write_view(file, *place)
    assert np.array_equal(read_pth(file)["view"], expected)


@pytest.mark.parametrize("case", VIEWS)
def test_a_bucket_is_read_by_rows(file, remote, case):
    *place, expected = VIEWS[case]
    _write_view(file, *place)
    view = read_pth(remote)["view"]
    assert not isinstance(view, np.ndarray)
    assert view.shape == expected.shape and view.dtype == STORAGE.dtype
    for rows in (slice(None), slice(1, 2), slice(1, None), slice(2, 1)):
        assert np.array_equal(view[rows], expected[rows])


def test_a_tensor_without_dimensions_is_read(file):
    _write_view(file, 7, (), ())
    view = read_pth(file)["view"]
    assert view.shape == () and view == 7


def test_an_empty_storage_is_read(file):
    write_pth(file, {"empty": np.zeros((0, 3), np.float32), "w": STORAGE})
    found = read_pth(file)
    assert found["empty"].shape == (0, 3)
    assert np.array_equal(found["w"], STORAGE)


STORAGES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "ComplexDouble": np.complex128,
    "ComplexFloat": np.complex64,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize("name", STORAGES)
def test_every_type_of_storage_is_read(file, name):
    values = (np.arange(12) % 5).astype(STORAGES[name])
    tensor = tensor_of(storage_of(STORAGE, 0), 3, (3, 3), (3, 1))
    tensor = tensor.replace(b"FloatStorage", f"{name}Storage".encode())
    write_archive(file, pickle_of({"w": tensor}), [values.tobytes()])
    found = read_pth(file)["w"]
    assert found.dtype == values.dtype
    assert np.array_equal(found, values[3:].reshape(3, 3))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("uint16", np.uint16),
        ("uint32", np.uint32),
        ("uint64", np.uint64),
        ("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_a_type_without_a_storage_is_read(file, name, dtype):
    values = np.arange(12).astype(dtype)
    num_bytes = np.empty(values.nbytes, np.float32)  # a storage of so many elements
    tensor = tensor_of(storage_of(num_bytes, 0), 3, (3, 3), (3, 1))
    tensor = tensor.replace(b"torch\nFloat", b"torch.storage\nUntyped", 1)
    tensor = tensor.replace(b"_v2", b"_v3")[:-2] + f"ctorch\n{name}\ntR".encode()
    write_archive(file, pickle_of({"w": tensor}), [values.tobytes()])
    found = read_pth(file)["w"]
    assert found.dtype == dtype
    assert found.tobytes() == values[3:].tobytes()


@pytest.mark.parametrize("state", [b"", b"}"])
def test_a_parameter_is_its_tensor(file, state):
    tensor = tensor_of(storage_of(STORAGE, 0), 0, (12,), (1,))
    function = b"_rebuild_parameter_with_state" if state else b"_rebuild_parameter"
    hooks = b"\x88ccollections\nOrderedDict\n)R"
    parameter = b"ctorch._utils\n" + function + b"\n(" + tensor + hooks + state + b"tR"
    write_archive(file, pickle_of({"w": parameter}), [STORAGE.tobytes()])
    assert np.array_equal(read_pth(file)["w"], STORAGE)


def _rewritten(file, content_of):
    """The archive again, without the records of which `content_of` says None."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            if (content := content_of(name, content)) is not None:
                archive.writestr(name, content)


def test_a_file_older_than_the_byteorder_record_is_read(file):
    write_pth(file, TENSORS)
    _rewritten(file, lambda name, content: content if "byteorder" not in name else None)
    assert np.array_equal(read_pth(file)["matrix"], TENSORS["matrix"])


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
        (11, (2,), (-1,)),
        (13, (0,), (1,)),
        (0, (1,) * 65, (1,) * 65),
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


REFUSED = {
    "storage of quantised numbers": (b"ctorch\nQInt8Storage\n", r"torch\.QInt8Storage"),
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
    "name that cannot be printed": (b"}X\x01\x00\x00\x00\x1bNs", "keys that are no"),
    "half a character": (b"}X\x03\x00\x00\x00\xed\xa0\x80Ns", "keys that are no names"),
    "text for a function": (
        b"X\x17\x00\x00\x00collections OrderedDict)R",
        "a call of what makes no",
    ),
    "conjugate view": (
        tensor_of(storage_of(STORAGE, 0), 0, (1,), (1,))[:-2] + b"}tR",
        "the conjugate or negative of its bytes",
    ),
    "a key that is no text": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
        + b"\x85" * 100_000
        + b"X\x03\x00\x00\x00cpuK\x01tQ",
        "no storage",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tensors_do_not_need_is_refused(file, case):
    opcodes, message = REFUSED[case]
    write_archive(file, pickle_of({"w": opcodes}), [STORAGE.tobytes()])
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
    "tuple of more than there is": b"\x80\x02K\x01\x86.",
    "values without a name": b"\x80\x02}(X\x01\x00\x00\x00au.",
    "item of a tuple": b"\x80\x02)X\x01\x00\x00\x00aNs.",
    "parameter of no tensor": pickle_of(
        {"w": b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR"}
    ),
    "type of no tensor": pickle_of(
        {
            "w": tensor_of(storage_of(STORAGE, 0), 0, (1,), (1,)).replace(b"v2", b"v3")[
                :-2
            ]
            + b"ctorch\nFloatStorage\ntR"
        }
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_pickle_is_damage(file, case):
    write_archive(file, MALFORMED[case], [STORAGE.tobytes()])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_pth(file)


# (((), ()), ((), ())) and so on: two bytes a level, and 2**200 leaves to walk through.
NESTED = b")" + b"q\x00h\x00\x86" * 200
TENSOR = tensor_of(storage_of(STORAGE, 0), 0, (12,), (1,))
PLACES = {
    "storage": storage_of(STORAGE, 0),
    "kind of a storage": b"X\x07\x00\x00\x00storage",
    "type of a storage": b"ctorch\nFloatStorage\n",
    "key of a storage": b"X\x01\x00\x00\x000",
    "device": b"X\x03\x00\x00\x00cpu",
    "elements or shape": b"J\x0c\x00\x00\x00",
    "offset": b"J\x00\x00\x00\x00",
    "stride": b"J\x01\x00\x00\x00",
    "shape": b"(J\x0c\x00\x00\x00t",
    "strides": b"(J\x01\x00\x00\x00t",
    "gradient": b"\x89",
    "hooks": b"ccollections\nOrderedDict\n)R",
    "function": REBUILD,
    "tensor": TENSOR,
    "name": b"X\x01\x00\x00\x00w",
    "dict": b"}",
}


@pytest.mark.parametrize("place", PLACES)
def test_what_takes_forever_to_print_is_not_printed(file, place):
    program = pickle_of({"w": TENSOR})
    assert PLACES[place] in program
    program = program.replace(PLACES[place], NESTED)
    write_archive(file, program, [STORAGE.tobytes()])
    try:
        assert place in {"gradient", "hooks"}, read_pth(file)
    except CheckpointError as error:
        assert len(str(error)) < 500


def test_a_call_with_arguments_that_are_no_tuple_is_refused(file):
    write_archive(file, pickle_of({"w": REBUILD + b"}R"}))
    with pytest.raises(CheckpointError, match="a call of what makes no tensor"):
        read_pth(file)


def test_long_names_are_cut_in_messages(file):
    name = "w" * 100_000
    for described in ({name: b"N"}, {"w": b"c" + name.encode() + b"\n\x1b\n"}):
        write_archive(file, pickle_of(described))
        with pytest.raises(CheckpointError) as caught:
            read_pth(file)
        assert len(str(caught.value)) < 500 and "\x1b" not in str(caught.value)


def test_a_pickle_or_directory_larger_than_any_is_refused(file):
    write_archive(file, b"\x80\x02" + b"N" * 2**22)
    with pytest.raises(CheckpointError, match=r"a record data\.pkl of 4194306 bytes"):
        read_pth(file)
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(65):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            entry.comment = b"c" * (2**16 - 1)
            archive.writestr(entry, b"")
    with pytest.raises(CheckpointError, match="a directory of 42"):
        read_pth(file)


def test_a_record_that_is_there_twice_is_refused(file):
    write_pth(file, TENSORS)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(match="Duplicate name"):
        archive.writestr("archive/data/0", b"another")
    with pytest.raises(CheckpointError, match="two records have one name"):
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
    # A kilobyte that unpacks to a megabyte, were it read before it is looked at.
    write_archive(file, program, [STORAGE.tobytes()])
    _rewritten(file, lambda name, content: None if "byteorder" in name else content)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/byteorder", b" " * 2**20)
    with pytest.raises(CheckpointError, match="record byteorder is compressed"):
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


def test_a_storage_in_a_bucket_is_looked_for_when_it_is_read(file, remote):
    write_pth(file, TENSORS)
    content = bytearray(file.read_bytes())
    content[content.index(b"archive/data/1") - 30] ^= 1
    file.write_bytes(content)
    found = read_pth(remote)
    assert np.array_equal(found["matrix"][1:], TENSORS["matrix"][1:])
    with pytest.raises(CheckpointError, match="1 is not where the archive says"):
        found["vector"][:]


# Instructions, whole and cut, in any order: more of what a program may be.
INSTRUCTIONS = st.sampled_from(
    [*PLACES.values(), TENSOR, TENSOR[:-1], TENSOR[:-2], NESTED]
    + [b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"\x94", b"r\xff\xff\xff\xff"]
    + [b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"b", b"s", b"u", b"."]
    + [b"N", b"\x88", b"K\x00", b"K\x02", b"\x8a\xff" + b"\x7f" * 255, b"\x8c\x01b"]
    + [b"\x93", b"\x80\x04", b"ctorch\nuint16\n", b"ctorch\nLongStorage\n"]
    + [REBUILD.replace(b"v2", b"v3"), b"ctorch._utils\n_rebuild_parameter\n"]
)


@hypothesis.settings(
    max_examples=300,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    program=st.lists(INSTRUCTIONS | st.binary(max_size=3), max_size=12).map(b"".join)
)
def test_any_program_makes_tensors_or_is_refused(file, program):
    write_archive(file, b"\x80\x02}" + program + b".", [STORAGE.tobytes()])
    try:
        found = read_pth(file)
    except CheckpointError as error:
        assert str(file) in str(error) and len(str(error)) < 500
    else:
        assert all(isinstance(tensor, np.ndarray) for tensor in found.values())
