"""Checkpoints in buckets: as source and as target, stopped and gone on with."""

import collections
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

import llama_jax
from llama_jax.conversion import files, layout, open_checkpoint, targets
from llama_jax.conversion.journal import JOURNAL
from llama_jax.conversion.manifest import MANIFEST
from llama_jax.errors import CheckpointError
from sharding import MeshConfig, make_mesh
from tests.buckets import Buckets
from tests.conversion.checkpoints import MAX_LENGTH, write_hf
from tests.reference import meta_checkpoint

FORMATS = ("meta", "hf", "orbax")
# Without these nobody takes the rest for a checkpoint.
LAST = {
    "meta": ("params.json", "checklist.chk"),
    "hf": ("model.safetensors.index.json", "config.json"),
    "orbax": ("params/commit_success.txt", "architecture.json"),
}
TARGET = "gs://bucket/a/target"


@pytest.fixture(scope="session")
def server():
    with Buckets().serving() as server:
        yield server


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """No objects yet; and a disk on which nothing may appear."""
    server.clear()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(scratch)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    # Files of Hugging Face's: five of this model.
    monkeypatch.setattr(targets, "_HF_FILE_BYTES", 10_000)
    monkeypatch.setattr(layout, "WIDTH_CHUNKS", 2)  # and fewer requests
    with server.clients():
        yield server
    assert os.listdir(scratch) == []


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The same model in each format, on a disk."""
    place = tmp_path_factory.mktemp("here")
    tensors = meta_checkpoint.random_tensors()
    wide = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    meta_checkpoint.write_checkpoint(place / "meta", meta_checkpoint.split(wide, 2))
    write_hf(place / "hf", wide, num_files=3)
    llama_jax.load(place / "hf").save(place / "orbax")
    return place


def convert(source, target, to, **settings):
    shards = {"model_parallel": 2} if to == "meta" else {}
    return llama_jax.convert(
        source, target, to=to, max_length=MAX_LENGTH, **shards, **settings
    )


def upload(bucket, directory, name):
    """Put a directory into the bucket; returns where."""
    for file in directory.rglob("*"):
        if file.is_file():
            key = f"bucket/{name}/{file.relative_to(directory).as_posix()}"
            bucket.put(key, file.read_bytes())
    if (directory / "params" / "manifest.ocdbt").exists():
        bucket.put(f"bucket/{name}/params/commit_success.txt", b"")
    return f"gs://bucket/{name}"


def below(bucket, name):
    """What is below a name in the bucket."""
    prefix = f"bucket/{name}/"
    return {key: bucket.objects[prefix + key] for key in bucket.names(prefix)}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_direction(here, bucket, tmp_path, source, to):
    expected = convert(here / source, tmp_path / "local", to)
    there = upload(bucket, here / source, "source")
    for number, (start, end) in enumerate(
        [(here / source, TARGET), (there, tmp_path / "back"), (there, TARGET + " 2")]
    ):
        done = convert(start, end, to)
        assert done.manifest == expected.manifest, number
        assert done.logits_apart < 1e-5 and done.num_resumed == 0
    if to != "orbax":  # whose files have random names
        local = {f.name: f.read_bytes() for f in (tmp_path / "local").iterdir()}
        for name in ("a/target", "a/target 2"):
            assert below(bucket, name) == local
    assert all(JOURNAL not in name for name in bucket.objects)


@pytest.mark.parametrize("source", FORMATS)
def test_load_is_that_of_a_disk(here, bucket, source):
    there = upload(bucket, here / source, "deep/down")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    ours = llama_jax.load(there, mesh=mesh, max_length=MAX_LENGTH)
    theirs = llama_jax.load(here / source, max_length=MAX_LENGTH)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    ours.save("gs://bucket/saved")
    again = llama_jax.load("gs://bucket/saved")
    jax.tree.map(np.testing.assert_array_equal, again.params, theirs.params)


@pytest.mark.parametrize("source", ["meta", "hf"])
def test_only_what_is_needed_is_read(here, bucket, source):
    there = upload(bucket, here / source, "x")
    opened = open_checkpoint(there, max_length=MAX_LENGTH)
    bucket.log.clear()
    leaf = opened.read("blocks/attention/query", (slice(1, 2),))
    num_bytes = sum(request.num_bytes for request in bucket.log)
    headers = 2 * 30 if source == "meta" else 0  # of the records of both shards
    assert num_bytes == leaf.nbytes + headers


def test_the_tokenizer_is_one_level_up(here, bucket):
    upload(bucket, here / "meta", "llama/7b")
    bucket.put("bucket/llama/tokenizer.model", b"")
    opened = open_checkpoint("gs://bucket/llama/7b", max_length=MAX_LENGTH)
    assert str(opened.tokenizer_path) == "gs://bucket/llama/tokenizer.model"


@pytest.mark.parametrize("to", FORMATS)
def test_the_order_in_which_objects_appear(here, bucket, to):
    """The journal comes first and goes last, what makes it a checkpoint comes late."""
    upload(bucket, here / "hf", "a/target")
    bucket.log.clear()
    convert(here / "meta", TARGET, to, overwrite=True)
    changes = [
        (request.method, request.name.removeprefix("bucket/a/target/"))
        for request in bucket.log
        if request.method != "GET"
    ]
    assert changes[0] == ("PUT", JOURNAL)
    assert changes[-1] == ("DELETE", JOURNAL)
    names = [name for method, name in changes if method == "PUT"]
    late = (*LAST[to], MANIFEST)
    first_late = min(map(names.index, late))
    others = set(names[first_late:]) - {*late, "generation_config.json", JOURNAL}
    assert others == set()
    found = set(below(bucket, "a/target"))
    assert found.isdisjoint({"model-00001-of-00003.safetensors"})


class Stop(Exception):
    """What a test stops a conversion with."""


def stop_after(share, phase="convert"):
    """A watch that stops a conversion when this share of a phase is done."""

    def watch(now, done, total):
        if now == phase and done > share * total:
            raise Stop

    return watch


def require_unfinished(bucket, to, expected):
    """Nobody takes for a checkpoint what is there; and none of it is cut short."""
    there = below(bucket, "a/target")
    assert JOURNAL in there
    assert not there.keys() & {*LAST[to], MANIFEST}
    for name, content in there.items():
        if name.endswith((".pth", ".safetensors")):
            assert content == expected[name]
    with pytest.raises(CheckpointError, match="being written by a conversion"):
        llama_jax.load(TARGET)


def require_gone_on(bucket, here, to, expected, manifest, *, least):
    """A rerun completes it and writes nothing again that was there."""
    before = dict(bucket.objects)
    bucket.log.clear()
    done = convert(here / "hf", TARGET, to)
    assert done.manifest == manifest
    assert done.num_resumed >= least
    written = collections.Counter(r.name for r in bucket.log if r.method == "PUT")
    for name in before:
        if name.endswith((".pth", ".safetensors")) or "/d/" in name:
            assert written[name] == 0
    if to != "orbax":
        assert below(bucket, "a/target") == expected
    llama_jax.load(TARGET, max_length=MAX_LENGTH)


@pytest.fixture
def expected(here, bucket, request):
    """What a conversion that nothing stops leaves: the objects, and the manifest."""
    to = request.getfixturevalue("to")
    manifest = convert(here / "hf", "gs://bucket/whole", to).manifest
    return below(bucket, "whole"), manifest


# Of 21 weights. Meta's shards are whole only at the end, all at once.
RESUMED = {"meta": 0, "hf": 5, "orbax": 9}


@pytest.mark.parametrize("to", FORMATS)
def test_a_stopped_conversion_goes_on(here, bucket, to, expected):
    objects, manifest = expected
    with pytest.raises(Stop):
        convert(here / "hf", TARGET, to, watch=stop_after(0.6))
    require_unfinished(bucket, to, objects)
    require_gone_on(bucket, here, to, objects, manifest, least=RESUMED[to])


@pytest.mark.parametrize("to", FORMATS)
def test_one_stopped_in_its_proof_writes_nothing_again(here, bucket, to, expected):
    objects, manifest = expected
    with pytest.raises(Stop):
        convert(here / "hf", TARGET, to, watch=stop_after(0.5, "verify"))
    assert JOURNAL in below(bucket, "a/target")
    require_gone_on(bucket, here, to, objects, manifest, least=21)


@pytest.mark.parametrize("to", FORMATS)
def test_a_bucket_that_takes_no_more(here, bucket, to, expected):
    """As if this machine were gone: not even the journal is written any more."""
    objects, manifest = expected

    def watch(phase, done, total):
        if done > total * 0.6:
            bucket.refuses = lambda method: method != "GET"

    with pytest.raises(CheckpointError, match="target cannot be written"):
        convert(here / "hf", TARGET, to, watch=watch)
    bucket.refuses = lambda method: False
    require_unfinished(bucket, to, objects)
    require_gone_on(bucket, here, to, objects, manifest, least=0)


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_an_object_that_changed_meanwhile(here, bucket, to, expected):
    with pytest.raises(Stop):
        convert(here / "hf", TARGET, to, watch=stop_after(0.5, "verify"))
    name = next(n for n in bucket.names("bucket/a/target/") if "00" in n)
    whole = bucket.objects[f"bucket/a/target/{name}"]
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    bucket.put(f"bucket/a/target/{name}", bytes(damaged))
    with pytest.raises(CheckpointError, match=f"{name} was there already.*: remove it"):
        convert(here / "hf", TARGET, to)
    del bucket.objects[f"bucket/a/target/{name}"]
    objects, manifest = expected
    require_gone_on(bucket, here, to, objects, manifest, least=0)


def test_another_task_begins_anew(here, bucket):
    with pytest.raises(Stop):
        convert(here / "hf", TARGET, "hf", watch=stop_after(0.9))
    assert any(name.endswith(".safetensors") for name in bucket.objects)
    done = convert(here / "hf", TARGET, "meta")
    assert done.num_resumed == 0
    assert not any(name.endswith(".safetensors") for name in bucket.objects)


def test_what_others_do_is_seen(here, bucket):
    """A bucket that was looked at before is looked at again."""
    there = upload(bucket, here / "hf", "x")
    bucket.put(f"bucket/x/{JOURNAL}", b"")
    with pytest.raises(CheckpointError, match="being written"):
        llama_jax.load(there)
    del bucket.objects[f"bucket/x/{JOURNAL}"]
    llama_jax.load(there)
    with pytest.raises(CheckpointError, match="x is not empty"):
        convert(here / "hf", there, "hf")
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        llama_jax.load("gs://bucket/nothing")


def test_a_bucket_that_may_not_be_read(bucket):
    bucket.refuses = lambda method: True
    with pytest.raises(CheckpointError, match=r"x cannot be looked at: .*gcloud auth"):
        llama_jax.load("gs://bucket/x")
    with pytest.raises(CheckpointError, match="ftp://x cannot be looked at"):
        llama_jax.load("ftp://x")


def test_an_upload_of_several_requests(bucket, monkeypatch):
    monkeypatch.setattr(files, "_UPLOAD_BYTES", 2**18)
    content = np.random.default_rng(0).bytes(2**20 + 1000)
    name = "gs://bucket/x"
    for stop in (len(content) // 2, len(content)):
        file = files.OutputFile(epath.Path(name), len(content))
        for start in range(0, stop, 1000):
            file.write(start, content[start : min(start + 1000, stop)])
        assert file.is_whole == (stop == len(content))
        file.close()
        assert list(bucket.objects) == ["bucket/x"] * file.is_whole
    assert bucket.objects["bucket/x"] == content
    assert len(bucket.uploads) == 2 and len(bucket.log) == 1
    again = files.OutputFile(epath.Path(name), len(content))
    again.write(0, content[:5000])
    with pytest.raises(CheckpointError, match="remove it"):
        again.write(1, content[:5000])
