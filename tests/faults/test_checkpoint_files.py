"""Every damaged, incomplete or foreign Meta checkpoint ends in an error that helps."""

import json
import logging
import shutil

import numpy as np
import pytest

from llama_jax.conversion.meta import read_meta
from llama_jax.conversion.proof import require_files
from llama_jax.errors import CheckpointError, ConfigError
from tests.reference.meta_checkpoint import (
    PARAMS,
    random_tensors,
    split,
    write_checklist,
    write_checkpoint,
)

WQ = "layers.0.attention.wq.weight"
WO = "layers.1.attention.wo.weight"


@pytest.fixture
def shards():
    return split(random_tensors(), 2)


@pytest.fixture
def directory(tmp_path, shards):
    """A good checkpoint of two shards, to be damaged."""
    return write_checkpoint(tmp_path / "a model", shards)


def _open(directory):
    """As `load` does."""
    checkpoint = read_meta(directory, max_length=64)
    require_files(checkpoint)
    return checkpoint


def _refused(directory, match, kind=CheckpointError):
    with pytest.raises(kind, match=match) as caught:
        _open(directory)
    return str(caught.value)


def test_the_undamaged_checkpoint_loads(directory):
    assert read_meta(directory, max_length=64).config.num_layers == 2


# The files.


def test_a_directory_that_is_none(tmp_path):
    _refused(tmp_path / "absent", "absent is not a directory")
    _refused(tmp_path, r"has no consolidated\.00\.pth")


def test_a_flipped_bit(directory):
    file = directory / "consolidated.01.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    _refused(directory, r"consolidated\.01\.pth is damaged: its MD5 is")


def test_no_checklist(directory, caplog):
    (directory / "checklist.chk").unlink()
    read_meta(directory, max_length=64)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "no checklist.chk" in record.getMessage()


@pytest.mark.parametrize("line", ["<!doctype html>", "0123  params.json", "\x00\xff"])
def test_a_malformed_checklist(directory, line):
    with (directory / "checklist.chk").open("a") as file:
        file.write(line)
    _refused(directory, r"checklist\.chk: the line .* is not an MD5 and a file name")


def test_an_empty_checklist(directory):
    (directory / "checklist.chk").write_text("\n")
    _refused(directory, r"checklist\.chk does not list consolidated\.00\.pth")


@pytest.mark.parametrize("name", ["consolidated.01.pth", "params.json"])
def test_a_listed_file_is_missing(directory, name):
    (directory / name).unlink()
    _refused(directory, f"{name} is missing, but checklist.chk lists it")


@pytest.mark.parametrize("listed", [False, True])
def test_an_extra_shard(directory, listed):
    shutil.copy(directory / "consolidated.01.pth", directory / "consolidated.02.pth")
    if listed:
        write_checklist(directory)
        _refused(directory, "3 shards, which do not divide num_heads 8")
    else:
        _refused(directory, r"checklist\.chk does not list consolidated\.02\.pth")


def test_a_gap_in_the_numbers(directory):
    (directory / "consolidated.01.pth").rename(directory / "consolidated.02.pth")
    _refused(directory, r"but no consolidated\.01\.pth")


def test_the_last_shard_is_missing_and_nothing_lists_it(directory):
    (directory / "consolidated.01.pth").unlink()
    (directory / "checklist.chk").unlink()
    _refused(directory, r"has shape \(48, 16\), but .* one of 1 shards has \(48, 32\)")


def test_more_shards_than_key_value_heads(tmp_path):
    # Eight shards of eight query heads, but there are four key/value heads.
    write_checkpoint(tmp_path, split(random_tensors(), 8))
    _refused(tmp_path, "8 shards, which do not divide num_kv_heads 4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M",
            "is a pickle outside a zip",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no PyTorch file"),
        (None, "is truncated or damaged"),
    ],
    ids=["empty", "legacy", "pointer", "truncated"],
)
def test_a_shard_that_is_no_pth_file(directory, content, message):
    file = directory / "consolidated.01.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    write_checklist(directory)
    _refused(directory, rf"consolidated\.01\.pth {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        (PARAMS | {"n_experts": 8}, "unknown key 'n_experts'"),
        (PARAMS | {"n_layers": 0}, "n_layers must be a positive integer, not 0"),
        (PARAMS | {"n_heads": -8}, "n_heads must be a positive integer, not -8"),
        (PARAMS | {"dim": 33}, "dim 33 does not divide into num_heads 8"),
        (PARAMS | {"n_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 8"),
        (PARAMS | {"use_scaled_rope": True}, "use_scaled_rope is true"),
    ],
)
def test_unusable_params(directory, content, message):
    file = directory / "params.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    write_checklist(directory)
    _refused(directory, rf"params\.json.*{message}", ConfigError)


def test_params_that_are_known_and_change_no_shape(tmp_path, shards):
    known = PARAMS | {"rope_theta": 1e6, "use_scaled_rope": False, "vocab_size": 48}
    write_checkpoint(tmp_path, shards, known)
    config = read_meta(tmp_path, max_length=64).config
    assert (config.rope_theta, config.vocab_size) == (1e6, 48)


# The tensors.


def test_missing_tensors_are_listed(tmp_path, shards):
    del shards[1][WQ], shards[1][WO]
    write_checkpoint(tmp_path, shards)
    _refused(tmp_path, rf"consolidated\.01\.pth lacks {WQ}, {WO}:")
    del shards[0]["tok_embeddings.weight"]
    write_checkpoint(tmp_path, shards)
    _refused(tmp_path, r"consolidated\.00\.pth has no matrix tok_embeddings\.weight")


def test_many_missing_tensors_are_counted(tmp_path, shards):
    write_checkpoint(tmp_path, shards, PARAMS | {"n_layers": 4})
    message = _refused(
        tmp_path, r"lacks layers\.2\.attention\.wk\.weight.* and 10 more"
    )
    assert "larger model" in message


def test_extra_tensors_are_listed(tmp_path, shards):
    shards[0]["layers.0.attention.wq.bias"] = np.zeros(16, np.float32)
    write_checkpoint(tmp_path, shards)
    _refused(tmp_path, r"00\.pth has layers\.0\.attention\.wq\.bias, which no Llama")


def test_a_transposed_tensor(tmp_path, shards):
    shards[1][WQ] = np.ascontiguousarray(shards[1][WQ].T)
    write_checkpoint(tmp_path, shards)
    _refused(
        tmp_path,
        rf"consolidated\.01\.pth: {WQ} has shape \(32, 16\), .* has \(16, 32\)",
    )


def test_a_vocabulary_of_another_size(tmp_path, shards):
    write_checkpoint(tmp_path, shards, PARAMS | {"vocab_size": 50})
    _refused(tmp_path, r"tok_embeddings\.weight has shape \(48, 16\), .* \(50, 16\)")


def test_mixed_dtypes_are_read_as_the_widest(tmp_path, shards, caplog):
    half = {
        name: tensor.astype(np.float16) if tensor.ndim == 2 else tensor
        for name, tensor in shards[1].items()
    }
    checkpoint = _open(write_checkpoint(tmp_path, [shards[0], half]))
    assert "mixes float16, float32; read as float32" in caplog.text
    table = checkpoint.read("embed/table")
    assert table.dtype == np.float32
    assert np.array_equal(table[:, :16], shards[0]["tok_embeddings.weight"])
    assert np.array_equal(table[:, 16:], half["tok_embeddings.weight"])


def test_a_dtype_that_no_weights_have(tmp_path, shards):
    shards[0]["norm.weight"] = shards[0]["norm.weight"].astype(np.int64)
    write_checkpoint(tmp_path, shards)
    _refused(tmp_path, r"00\.pth: norm\.weight is int64; weights are float32, float16")


def test_copies_that_differ(tmp_path, shards):
    shards[1]["norm.weight"] = shards[1]["norm.weight"] + 1
    write_checkpoint(tmp_path, shards)
    _refused(tmp_path, r"01\.pth: norm\.weight differs from that of consolidated\.00")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_once(tmp_path, shards, value, caplog):
    shards[1][WO][3, 4] = value
    write_checkpoint(tmp_path, shards)
    checkpoint = read_meta(tmp_path, max_length=64)
    for path in checkpoint.shapes:
        checkpoint.read(path)
        checkpoint.read(path)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"NaN or infinity in {WO} of consolidated.01.pth" in record.getMessage()


def test_a_value_that_is_not_finite_in_every_copy(tmp_path, shards, caplog):
    for shard in shards:
        shard["norm.weight"] = np.full_like(shard["norm.weight"], np.nan)
    write_checkpoint(tmp_path, shards)
    read_meta(tmp_path, max_length=64).read("final_norm/scale")
    assert "NaN or infinity in norm.weight" in caplog.text
