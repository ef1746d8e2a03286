"""Our reader of `.safetensors` files: what it maps, and all that it refuses."""

import json
import math
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath
from hypothesis import strategies as st

from llama_jax.conversion.safetensors import header_of, read_safetensors
from llama_jax.errors import CheckpointError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
VALUES = np.arange(12) % 5
DATA = VALUES.astype(np.float32).tobytes()
WHOLE = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def _write(file, header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_is_read(file, name):
    values = VALUES.astype(DTYPES[name])
    place = {"dtype": name, "shape": [3, 4], "data_offsets": [0, values.nbytes]}
    _write(file, {"w": place}, values.tobytes())
    found = read_safetensors(file)["w"]
    assert found.dtype == values.dtype
    assert np.array_equal(found, values.reshape(3, 4))


def test_tensors_are_read_only_views_of_the_mapped_file(file):
    _write(file, {"w": WHOLE})
    found = read_safetensors(str(file))["w"]
    assert not found.flags.writeable and not found.flags.owndata
    base = found
    while not isinstance(base, np.memmap):
        base = base.base


def test_order_is_the_headers_and_ranges_are_kept(file):
    header = {
        "__metadata__": {"format": "pt"},
        "last": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]},
        "none": {"dtype": "F64", "shape": [0, 7], "data_offsets": [24, 24]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [20, 24]},
        "first": {"dtype": "I32", "shape": [5], "data_offsets": [0, 20]},
        "end": {"dtype": "BF16", "shape": [2, 0], "data_offsets": [48, 48]},
    }
    _write(file, header)
    found = read_safetensors(file)
    assert list(found) == ["last", "none", "one", "first", "end"]
    assert np.array_equal(found["last"], VALUES[6:].reshape(2, 3))
    assert found["none"].shape == (0, 7) and found["end"].shape == (2, 0)
    assert found["one"] == VALUES[5] and found["one"].shape == ()
    assert found["first"].tobytes() == DATA[:20]


def test_a_bucket_is_read_by_rows(file):
    _write(file, {"w": WHOLE})
    with mock_epath(
        open=lambda original, path, mode: open(file, mode),
        stat=lambda original, path: original(file),
    ):
        found = read_safetensors(epath.Path("gs://bucket/model.safetensors"))["w"]
        assert not isinstance(found, np.ndarray)
        assert found.shape == (3, 4) and found.dtype == np.float32
        assert np.array_equal(found[1:], VALUES.reshape(3, 4)[1:])


def test_files_that_are_none_are_refused(file):
    with pytest.raises(CheckpointError, match="cannot be read .No such file"):
        read_safetensors(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is empty"):
        read_safetensors(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(CheckpointError, match="pointer of Git LFS.*`git lfs pull`"):
        read_safetensors(file)
    file.write_text("<!doctype html><html>")
    with pytest.raises(CheckpointError, match="starts with b'<!doctype html>.*page"):
        read_safetensors(file)
    file.write_bytes(struct.pack("<Q", 2**24 + 1) + b"{" + b" " * 2**24)
    with pytest.raises(CheckpointError, match="header of 16777217 bytes.*publisher"):
        read_safetensors(file)


def _entry(**changes):
    return {"w": WHOLE | changes}


def _two(*ranges):
    return {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in zip("ab", ranges, strict=True)
    }


DAMAGED = {
    "no UTF-8": (b'{"\xff": 1}', "can't decode byte"),
    "no JSON": (b'{"w": ', "Expecting value"),
    "depth": (b'{"w": ' + b"[" * 200_000, "recursion"),
    "number of many digits": (b'{"w": ' + b"1" * 5000 + b"}", "integer string"),
    "two objects": (b"{}{}", "Extra data"),
    "name twice": (b'{"w": {}, "w": {}}', "in the header twice"),
    "key twice": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "in the header twice"),
    "metadata of a number": ({"__metadata__": {"format": 1}, "w": WHOLE}, "of texts"),
    "metadata that is a list": ({"__metadata__": [], "w": WHOLE}, "of texts"),
    "no entry": ({"w": 3}, "described by no object"),
    "name that cannot be printed": ({"\x1b": WHOLE}, "'.x1b' is no name"),
    "half a character": ({"\ud800": WHOLE}, "'.ud800' is no name"),
    "no type": ({"w": {"shape": [12], "data_offsets": [0, 48]}}, "none of the types"),
    "unknown type": (_entry(dtype="F4"), "none of the types"),
    "type that is a list": (_entry(dtype=["F32"]), "none of the types"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 48]}}, "no list of sizes"),
    "negative sizes": (_entry(shape=[-3, -4]), "no list of sizes"),
    "size that is true": (_entry(shape=[12, True]), "no list of sizes"),
    "size that is no integer": (_entry(shape=[12.0]), "no list of sizes"),
    "huge size": (_entry(shape=[2**63, 0]), "no list of sizes"),
    "many sizes": (_entry(shape=[12] + [1] * 64), "no list of sizes"),
    "huge sizes": (_entry(shape=[2**62] * 64), "does not fill its bytes"),
    "huge and empty": (
        {
            "w": {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [0, 0]},
            "x": WHOLE,
        },
        "",
    ),
    "no offsets": ({"w": {"dtype": "F32", "shape": [3, 4]}}, "are not two"),
    "three offsets": (_entry(data_offsets=[0, 48, 48]), "are not two"),
    "offset that is true": (_entry(data_offsets=[False, 48]), "are not two"),
    "negative offset": (_entry(data_offsets=[-48, 0]), "are not two"),
    "offsets of another size": (_entry(data_offsets=[0, 44]), "does not fill its byte"),
    "offsets the wrong way": (_entry(data_offsets=[48, 0]), "does not fill its bytes"),
    "beyond the data": (_entry(shape=[13], data_offsets=[0, 52]), "and they take 52"),
    "data left over": (_entry(shape=[11], data_offsets=[0, 44]), "and they take 44"),
    "data before": (_entry(shape=[11], data_offsets=[4, 48]), "starts at 4, the last"),
    "hole": (_two((0, 20), (21, 48)), "starts at 21, the last ended at 20"),
    "overlap": (_two((0, 20), (19, 48)), "starts at 19, the last ended at 20"),
    "twice the same": (_two((0, 48), (0, 48)), "starts at 0, the last ended at 48"),
    "nothing described": ({}, "48 bytes of tensors, and they take 0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_the_format_forbids_is_damage(file, case):
    header, message = DAMAGED[case]
    _write(file, header)
    with pytest.raises(CheckpointError, match=f"truncated or damaged .*{message}"):
        read_safetensors(file)


def test_long_names_are_cut_in_messages(file):
    for name in ("w" * 100_000, "\x1b" * 100_000):
        _write(file, {name: 3})
        with pytest.raises(CheckpointError) as caught:
            read_safetensors(file)
        assert len(str(caught.value)) < 500 + len(str(file))


def test_a_file_cut_anywhere_is_refused(file):
    _write(file, {"w": WHOLE})
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_safetensors(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="49 bytes of tensors, and they take 48"):
        read_safetensors(file)


def test_no_byte_flipped_in_the_file_escapes_as_another_error(file):
    _write(file, {"w": WHOLE, "__metadata__": {"format": "pt"}})
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bits in (0x41, 0x80):
            flipped = bytearray(whole)
            flipped[place] ^= bits
            file.write_bytes(flipped)
            try:
                found = read_safetensors(file)
                assert all(isinstance(t, np.ndarray) for t in found.values())
            except CheckpointError as error:
                assert str(file) in str(error)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_a_header_describes_is_read(file, dtype):
    shapes = {"matrix": (3, 4), "vecteur é": (5,), "one": (), "none": (0, 2)}
    tensors = {
        name: np.arange(math.prod(shape)).astype(dtype).reshape(shape)
        for name, shape in shapes.items()
    }
    header, offsets = header_of(shapes, np.dtype(dtype))
    assert len(header) % 8 == 0
    assert list(offsets.items())[0] == ("matrix", len(header))
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    content = bytearray(size)
    content[: len(header)] = header
    for name, tensor in tensors.items():
        content[offsets[name] : offsets[name] + tensor.nbytes] = tensor.tobytes()
    file.write_bytes(content)
    found = read_safetensors(file)
    assert list(found) == list(shapes)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


def test_transformers_is_told_whose_tensors_these_are():
    header, _ = header_of({"w": (2,)}, np.dtype(np.float32))
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


# What a header may be made of, near to the real thing and far from it.
NUMBERS = st.sampled_from([0, 1, 3, 4, 12, 24, 48, -1, 2**63, 10**30, True, 0.5, None])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", None, []]),
        "shape": st.lists(NUMBERS, max_size=3) | st.sampled_from([[3, 4], 12, {}]),
        "data_offsets": st.lists(NUMBERS, max_size=3) | st.just([0, 48]),
    },
)
NAMES = st.sampled_from(["w", "", "__metadata__"]) | st.text(max_size=3)


@hypothesis.settings(
    max_examples=200,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    header=st.dictionaries(NAMES, ENTRY | NUMBERS | st.just(WHOLE), max_size=3)
    | st.lists(NUMBERS)
    | st.binary()
    | st.binary().map(lambda content: b"{" + content)
)
def test_any_header_describes_tensors_or_is_refused(file, header):
    _write(file, header)
    try:
        found = read_safetensors(file)
    except CheckpointError as error:
        assert str(file) in str(error) and len(str(error)) < 500
    else:
        assert all(isinstance(tensor, np.ndarray) for tensor in found.values())
