"""The digests beside a converted checkpoint, and `inspect`."""

import json

import numpy as np
import pytest

import llama_jax
from llama_jax.cli import main
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.manifest import MANIFEST, Manifest
from llama_jax.errors import CheckpointError
from tests.reference import meta_checkpoint


@pytest.fixture
def converted(tmp_path):
    source = meta_checkpoint.write_checkpoint(
        tmp_path / "source", [meta_checkpoint.random_tensors()]
    )
    for to in ("meta", "hf", "orbax"):
        llama_jax.convert(source, tmp_path / to, to=to)
    return tmp_path


def flip(file, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_one_fingerprint_for_all(converted, capsys):
    found = {
        Manifest.of(open_checkpoint(converted / to, max_length=1)).fingerprint
        for to in ("meta", "hf", "orbax")
    }
    assert len(found) == 1
    assert Manifest.of(open_checkpoint(converted / "source", max_length=1)) is None
    for to in ("meta", "hf", "orbax"):
        assert main(["inspect", str(converted / to), "--verify"]) == 0
        printed = capsys.readouterr().out
        assert "every weight is as it was converted" in printed
        assert next(iter(found))[:32] in printed


def test_a_checkpoint_without_digests_is_read_through(converted, capsys):
    assert main(["inspect", str(converted / "source"), "--verify"]) == 0
    assert "files are as checklist.chk says" in capsys.readouterr().out
    (converted / "hf" / MANIFEST).unlink()
    assert main(["inspect", str(converted / "hf"), "--verify"]) == 0
    assert "no digests of them are recorded" in capsys.readouterr().out


def test_a_flipped_bit_is_named(converted, capsys):
    flip(converted / "hf" / "model.safetensors", -1)
    assert main(["inspect", str(converted / "hf")]) == 0  # which reads no weight
    assert main(["inspect", str(converted / "hf"), "--verify"]) == 1
    assert "damaged: lm_head.weight differ" in capsys.readouterr().err
    (converted / "meta" / "checklist.chk").unlink()
    file = converted / "meta" / "consolidated.00.pth"
    shard = open_checkpoint(converted / "meta", max_length=1).shards[0]
    tensor = shard["layers.1.feed_forward.w2.weight"]
    flip(file, file.read_bytes().index(np.asarray(tensor).tobytes()) + 77)
    assert main(["inspect", str(converted / "meta"), "--verify"]) == 1
    assert "layers.1.feed_forward.w2.weight differ" in capsys.readouterr().err
    for file in (converted / "orbax" / "params" / "d").iterdir():
        if file.stat().st_size > 10_000:
            flip(file, file.stat().st_size // 2)
    assert main(["inspect", str(converted / "orbax"), "--verify"]) == 1
    printed = capsys.readouterr().err
    assert "differ from what was converted" in printed or "damaged" in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=2),
        lambda content: content.pop("digests"),
        lambda content: content["digests"].popitem(),
        lambda content: content.update(more=1),
        lambda content: content.update(digests=[]),
    ],
)
def test_a_damaged_manifest_is_said(converted, change):
    file = converted / "hf" / MANIFEST
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"conversion\.json is damaged"):
        Manifest.of(open_checkpoint(converted / "hf", max_length=1))
