"""Every format to every other: the same bits, proven, or nothing at all."""

import copy
import errno
import hashlib
import itertools
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax.conversion import open_checkpoint, rope, stored
from llama_jax.conversion.journal import JOURNAL
from llama_jax.conversion.manifest import Manifest
from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.safetensors import read_safetensors
from llama_jax.errors import CheckpointError, ConfigError
from tests.conversion.checkpoints import MAX_LENGTH, hf_tensors, write_hf
from tests.reference import meta_checkpoint

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TENSORS = meta_checkpoint.random_tensors()
WIDE = {name: tensor.astype(BFLOAT16) for name, tensor in TENSORS.items()}


def convert(source, target, **settings):
    return llama_jax.convert(source, target, max_length=MAX_LENGTH, **settings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same model in each format; Orbax's as `save` writes it."""
    place = tmp_path_factory.mktemp("sources")
    shards = meta_checkpoint.split(WIDE, 2)
    meta_checkpoint.write_checkpoint(place / "meta", shards)
    write_hf(place / "hf", WIDE, num_files=3)
    llama_jax.load(place / "hf").save(place / "orbax")
    return place


def whole(directory) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint of Meta's, whole."""
    files = sorted(directory.glob("*.pth"))
    return meta_checkpoint.merge([read_pth(file) for file in files])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert np.asarray(found[name]).tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("source", ["meta", "hf", "orbax"])
def test_to_meta_in_any_number_of_shards(sources, tmp_path, source):
    for num_shards in (1, 2, 4):
        target = tmp_path / str(num_shards)
        done = convert(sources / source, target, to="meta", model_parallel=num_shards)
        assert done.source == source
        assert len(list(target.glob("*.pth"))) == num_shards
        assert_same(whole(target), WIDE)
        lines = (target / "checklist.chk").read_text().splitlines()
        listed = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
        assert "params.json" in listed and len(listed) == num_shards + 1
        for name, digest in listed.items():
            assert hashlib.md5((target / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("source", ["meta", "hf", "orbax"])
def test_to_hugging_face(sources, tmp_path, source):
    convert(sources / source, tmp_path / "hf", to="hf")
    found = read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert_same(found, hf_tensors(WIDE))
    assert open_checkpoint(tmp_path / "hf", max_length=1).config.max_length == 64


@pytest.mark.parametrize("source", ["meta", "hf", "orbax"])
def test_to_orbax_which_plain_orbax_restores(sources, tmp_path, source):
    import orbax.checkpoint as ocp

    convert(sources / source, tmp_path / "orbax", to="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "orbax" / "params")
        expected = checkpointer.restore(sources / "orbax" / "params")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
        lambda x: x.dtype, expected
    )
    llm = llama_jax.load(tmp_path / "orbax")
    assert llm.config == llama_jax.load(sources / "orbax").config


def test_digests_stay_on_every_way(sources, tmp_path):
    """They are those of the bytes in a safetensors file."""
    expected = {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()
        for name, tensor in hf_tensors(WIDE).items()
    }
    for source, to in itertools.product(("meta", "hf", "orbax"), repeat=2):
        target = tmp_path / f"{source}-{to}"
        done = convert(sources / source, target, to=to)
        assert done.manifest.digests == expected
        assert done.logits_apart < 1e-5
        written = Manifest.of(open_checkpoint(target, max_length=MAX_LENGTH))
        assert written == done.manifest


def test_a_file_is_the_same_after_all_formats(sources, tmp_path):
    """Bit for bit: Meta, Orbax, Hugging Face, other shards, and Meta as at first."""
    first = tmp_path / "first"
    convert(sources / "meta", first, to="meta")
    place = first
    for number, settings in enumerate(
        [{"to": "orbax"}, {"to": "hf"}, {"to": "meta", "model_parallel": 4}]
    ):
        convert(place, tmp_path / str(number), **settings)
        place = tmp_path / str(number)
    convert(place, tmp_path / "last", to="meta")
    for name in ("consolidated.00.pth", "params.json", "checklist.chk"):
        assert (tmp_path / "last" / name).read_bytes() == (first / name).read_bytes()


def test_slabs_and_chunks_do_not_show(sources, tmp_path, monkeypatch):
    """Weights in many slabs, of rows that do not divide, are the same weights."""
    whole_at_once = convert(sources / "meta", tmp_path / "a", to="orbax")
    monkeypatch.setattr("llama_jax.conversion.layout.SLAB_BYTES", 500)
    for source, to in itertools.product(("meta", "hf", "orbax"), repeat=2):
        in_slabs = convert(sources / source, tmp_path / f"{source}-{to}", to=to)
        assert in_slabs.manifest.digests == whole_at_once.manifest.digests
        settings = {"max_length": MAX_LENGTH}
        again = open_checkpoint(tmp_path / f"{source}-{to}", **settings)
        first = open_checkpoint(sources / "meta", **settings)
        for path in first.shapes:
            assert np.array_equal(again.read(path), first.read(path)), path


def test_eight_key_value_heads_in_any_shards(tmp_path):
    params = meta_checkpoint.PARAMS | {"n_kv_heads": 8}
    tensors = dict(WIDE)
    for layer in range(params["n_layers"]):
        for name in ("wk", "wv"):
            query = f"layers.{layer}.attention.wq.weight"
            tensors[f"layers.{layer}.attention.{name}.weight"] = WIDE[query][
                ::-1
            ].copy()
    meta_checkpoint.write_checkpoint(tmp_path / "1", [tensors], params)
    for before, after in itertools.pairwise((1, 2, 4, 8, 1)):
        target = tmp_path / f"{after} of {before}"
        source = tmp_path / (f"{before} of {before // 2}" if before > 1 else "1")
        convert(source, target, to="meta", model_parallel=after)
        assert_same(whole(target), tensors)
    with pytest.raises(CheckpointError, match=r"16 shards, .* into \[1, 2, 4, 8\]"):
        convert(tmp_path / "1", tmp_path / "x", to="meta", model_parallel=16)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_rounds_to_nearest(tmp_path, dtype):
    meta_checkpoint.write_checkpoint(tmp_path / "fp32", [TENSORS])
    expected = {n: t.astype(np.dtype(dtype)) for n, t in TENSORS.items()}
    for to in ("meta", "hf", "orbax"):
        done = convert(tmp_path / "fp32", tmp_path / to, to=to, dtype=dtype)
        assert done.manifest.dtype == dtype
        convert(tmp_path / to, tmp_path / f"{to} back", to="meta")
        assert_same(whole(tmp_path / f"{to} back"), expected)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)])
def test_what_overflows_float16_is_refused(tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = 1e5
    meta_checkpoint.write_checkpoint(tmp_path / "meta", [tensors])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.* 1 values"):
        convert(tmp_path / "meta", tmp_path / "hf", to="hf", dtype="float16")
    assert os.listdir(tmp_path) == ["meta"]


def test_values_that_are_not_finite_are_said_or_refused(tmp_path, caplog):
    tensors = {name: tensor.copy() for name, tensor in WIDE.items()}
    tensors["layers.0.attention.wo.weight"][1, 2] = np.nan
    meta_checkpoint.write_checkpoint(tmp_path / "meta", [tensors])
    with pytest.raises(CheckpointError, match="NaN or infinity in .*o_proj.*strict"):
        convert(tmp_path / "meta", tmp_path / "strict", to="hf", strict=True)
    assert not (tmp_path / "strict").exists()
    caplog.clear()
    convert(tmp_path / "meta", tmp_path / "orbax", to="orbax")
    assert "NaN or infinity in layers.0.attention.wo.weight" in caplog.text
    caplog.clear()
    convert(tmp_path / "orbax", tmp_path / "again", to="meta")
    assert "NaN or infinity in blocks/attention/out" in caplog.text
    assert_same(whole(tmp_path / "again"), tensors)


# What must not pass.


def test_a_forgotten_permutation_is_caught(sources, tmp_path, monkeypatch):
    """Both ways forget it, so that every digest is right."""
    for name in ("half_split_order", "interleaved_order"):
        monkeypatch.setattr(rope, name, np.arange)
    with pytest.raises(CheckpointError, match=r"logits of .* differ by .*wrong order"):
        convert(sources / "meta", tmp_path / "orbax", to="orbax")
    with pytest.raises(CheckpointError, match=r"logits of .* differ by .*wrong order"):
        convert(sources / "hf", tmp_path / "meta", to="meta")
    assert os.listdir(tmp_path) == []


def test_shards_in_another_order_are_caught(sources, tmp_path, monkeypatch):
    reading = stored.TensorCheckpoint._gather

    def backwards(self, *arguments):
        mixed_up = copy.copy(self)
        mixed_up.shards = self.shards[::-1]
        return reading(mixed_up, *arguments)

    monkeypatch.setattr(stored.TensorCheckpoint, "_gather", backwards)
    with pytest.raises(CheckpointError, match=r"logits of .* differ by .*wrong order"):
        convert(sources / "meta", tmp_path / "orbax", to="orbax")


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_bit_flipped_on_the_way_to_the_disk_is_caught(
    sources, tmp_path, monkeypatch, to
):
    really, seen = os.pwrite, []

    def flip_once(descriptor, content, at):
        if len(content) > 1000:  # a slab of a matrix
            seen.append(content)
        if len(seen) == 5:
            content = bytearray(content)
            content[len(content) // 2] ^= 4
        return really(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", flip_once)
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(sources / "orbax", tmp_path / to, to=to)
    assert not (tmp_path / to).exists()


# Where it goes.


def test_what_is_there_stays_unless_it_is_to_be_replaced(sources, tmp_path):
    target = tmp_path / "a target"
    target.mkdir()
    convert(sources / "hf", target, to="meta")  # an empty directory is room
    before = sorted(os.listdir(target))
    with pytest.raises(CheckpointError, match="is not empty: .*--overwrite"):
        convert(sources / "hf", target, to="hf")
    assert sorted(os.listdir(target)) == before
    convert(sources / "hf", target, to="hf", overwrite=True)
    assert "model.safetensors" in os.listdir(target)
    assert "consolidated.00.pth" not in os.listdir(target)
    assert os.listdir(tmp_path) == ["a target"]


def test_a_failed_replacement_leaves_what_was_there(sources, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert(sources / "hf", target, to="meta")
    before = (target / "checklist.chk").read_text()
    monkeypatch.setattr(rope, "interleaved_order", np.arange)
    with pytest.raises(CheckpointError, match=r"damaged|wrong order"):
        convert(sources / "hf", target, to="meta", overwrite=True)
    assert (target / "checklist.chk").read_text() == before


@pytest.mark.parametrize("inside", ["", "below"])
def test_the_source_is_no_target(sources, tmp_path, inside):
    shutil.copytree(sources / "hf", tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is the source, or one is inside"):
        convert(tmp_path / "hf", tmp_path / "hf" / inside, to="hf", overwrite=True)
    assert read_safetensors(next((tmp_path / "hf").glob("*.safetensors")))


def test_a_target_that_cannot_be(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file"):
        convert(sources / "hf", tmp_path / "file", to="meta")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(sources / "hf", tmp_path / "file" / "below", to="meta")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "gguf"}, "to 'gguf': give one of orbax, meta, hf"),
        ({"to": "hf", "model_parallel": 2}, "model_parallel 2 is of Meta's format"),
        ({"to": "meta", "model_parallel": 0}, "model_parallel 0: give 1 or more"),
        ({"to": "hf", "dtype": "int8"}, "dtype 'int8': give one of float32"),
    ],
)
def test_options_that_cannot_be(sources, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        convert(sources / "hf", tmp_path / "x", **settings)
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_refused_at_once(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="0.0 GB free"):
        convert(sources / "hf", tmp_path / "x", to="meta")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["meta", "hf", "orbax"])
def test_a_disk_that_fills_up_leaves_nothing(sources, tmp_path, monkeypatch, to):
    import tensorstore

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Written:
        """What TensorStore gives back at once."""

        def result(self):
            raise ValueError('Error writing "/a/d/b": No space left on device')

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(tensorstore.TensorStore, "write", lambda *_: Written())
    with pytest.raises(CheckpointError, match=r"No space left.*Nothing was left"):
        convert(sources / "hf", tmp_path / to, to=to)
    assert os.listdir(tmp_path) == []


# Stopped and gone on with.


class Stop(Exception):
    """What a test stops a conversion with."""


@pytest.mark.parametrize("to", ["meta", "hf", "orbax"])
def test_a_stopped_conversion_goes_on(sources, tmp_path, to):
    expected = convert(sources / "hf", tmp_path / "whole", to=to)

    def stop(phase, done, total):
        if done > total / 2:
            raise Stop

    target = tmp_path / "target"
    with pytest.raises(Stop):
        convert(sources / "hf", target, to=to, watch=stop)
    assert not target.exists()
    with pytest.raises(CheckpointError, match=r"being written by a conversion"):
        open_checkpoint(tmp_path / ".target.partial", max_length=MAX_LENGTH)
    done = convert(sources / "hf", target, to=to)
    assert 5 < done.num_resumed < 21
    assert done.manifest == expected.manifest
    assert sorted(os.listdir(tmp_path)) == ["target", "whole"]
    if to != "orbax":  # whose files have random names
        for file in (tmp_path / "whole").iterdir():
            assert (target / file.name).read_bytes() == file.read_bytes()


def test_what_was_damaged_meanwhile_is_written_again(sources, tmp_path):
    def stop(phase, done, total):
        if done > total * 0.9:
            raise Stop

    target, work = tmp_path / "target", tmp_path / ".target.partial"
    with pytest.raises(Stop):
        convert(sources / "hf", target, to="hf", watch=stop)
    _, *lines = (work / JOURNAL).read_text().splitlines()
    written = [json.loads(line)[0] for line in lines]
    assert len(written) > 5
    file = work / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[content.index(hf_tensors(WIDE)[written[2]].tobytes())] ^= 1
    file.write_bytes(content)
    done = convert(sources / "hf", target, to="hf")
    assert done.num_resumed == len(written) - 1
    assert_same(read_safetensors(target / file.name), hf_tensors(WIDE))


def test_another_task_begins_anew(sources, tmp_path):
    def stop(phase, done, total):
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        convert(sources / "hf", tmp_path / "x", to="hf", watch=stop)
    done = convert(sources / "hf", tmp_path / "x", to="meta", model_parallel=2)
    assert done.num_resumed == 0
    assert not list((tmp_path / "x").glob("*.safetensors"))


def test_two_at_once_are_refused(sources, tmp_path):
    refused = []

    def meanwhile(phase, done, total):
        if not refused:
            with pytest.raises(CheckpointError, match="by another conversion") as told:
                convert(sources / "hf", tmp_path / "x", to="hf")
            refused.append(told)

    convert(sources / "hf", tmp_path / "x", to="hf", watch=meanwhile)
    assert refused


def test_a_source_that_was_damaged_after_its_conversion(sources, tmp_path):
    convert(sources / "meta", tmp_path / "hf", to="hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: lm_head\.weight differ"):
        convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    assert not (tmp_path / "orbax").exists()


def test_a_damaged_shard_is_refused_before_anything_appears(sources, tmp_path):
    shutil.copytree(sources / "meta", tmp_path / "meta")
    file = tmp_path / "meta" / "consolidated.01.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is damaged: its"):
        convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
