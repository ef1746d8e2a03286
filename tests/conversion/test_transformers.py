"""What transformers makes of the checkpoints that we write, and we of what it writes.

The weights are Meta's, so that the logits are those of Meta's own code.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from tests.parity.tolerances import META_LOGITS
from tests.reference import meta_checkpoint

pytestmark = pytest.mark.torch

ORACLE = ("s1_mha_mp1_bf16", "s2_gqa_mp2_fp16", "s3_gqa_mp4_bf16_flat")
# What a mistake in a weight has to move the logits by, for them to be a test of it.
MISTAKE = 1e-2
TOKENIZERS = {
    "Meta's": "tokenizer/tokenizer.model",
    "stories": "stories260K/tok512.rebuilt.model",
}
TEXTS = (
    ["Once upon a time, there was a little girl named Lily.", "tail  ", "a \t\r\n b"]
    + ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]", "<0x0A>", "\u2581a", "\0"]
    + [" " * number + "x" * (number % 3) for number in range(40)]
)


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def transformers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        yield transformers


@pytest.fixture(scope="module")
def read(torch, transformers):
    """A model of transformers, in float32, from a directory."""

    def read(directory):
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )

    return read


@pytest.fixture(scope="module")
def logits(torch):
    """The logits of a model of transformers."""

    def logits(model, tokens):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()

    return logits


@pytest.fixture(scope="module")
def expected(reference):
    """Tokens, and the logits of Meta's code."""
    with np.load(reference / "oracle" / "s2_gqa_mp2_fp16" / "reference.npz") as arrays:
        return {name: arrays[name] for name in ("tokens", "logits")}


@pytest.fixture(scope="module")
def converted(reference, tmp_path_factory):
    """Meta's model as we write it for transformers."""
    directory = tmp_path_factory.mktemp("converted") / "hf"
    llama_jax.convert(reference / "oracle" / "s2_gqa_mp2_fp16", directory, to="hf")
    return directory


@pytest.fixture(scope="module")
def stories(reference, tmp_path_factory):
    """Stories260K with its tokenizer, for transformers."""
    directory = tmp_path_factory.mktemp("stories") / "hf"
    folder = reference / "stories260K"
    llama_jax.convert(
        folder / "meta_mp1_fp32",
        directory,
        to="hf",
        tokenizer=folder / "tok512.rebuilt.model",
    )
    return directory


@pytest.fixture(scope="module")
def story(reference):
    greedy = json.loads((reference / "stories260K" / "greedy.json").read_text())
    return greedy["bos_only"]


def far(found, expected) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max())


def ours(directory, tokens):
    return llama_jax.load(directory, dtype="float32").logits(tokens)


def test_transformers_computes_metas_logits(
    reference, converted, expected, read, logits, agree
):
    found = logits(read(converted), expected["tokens"])
    agree("logits", far(found, expected["logits"]), within=META_LOGITS)
    agree("ours", far(found, ours(converted, expected["tokens"])), within=META_LOGITS)
    twin = reference / "oracle" / "s2_gqa_hf_fp16"
    found = logits(read(twin), expected["tokens"])
    off = far(found, ours(twin, expected["tokens"]))
    agree("ours, of its twin", off, within=META_LOGITS)


def test_a_forgotten_permutation_would_show(
    torch, converted, expected, read, logits, tmp_path
):
    import safetensors.torch

    mutant = shutil.copytree(converted, tmp_path / "mutant")
    file = mutant / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    heads = json.loads((mutant / "config.json").read_text())["num_attention_heads"]
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            width = tensor.shape[1] // heads
            halves = tensor.reshape(-1, 2, width // 2, tensor.shape[1])
            tensors[name] = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    found = logits(read(mutant), expected["tokens"])
    assert far(found, expected["logits"]) > MISTAKE


def test_transformers_writes_the_same_story(torch, transformers, read, stories, story):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    prompt = tokenizer("", return_tensors="pt")
    # PyTorch takes an empty list for one of floats, but here is BOS.
    assert prompt["input_ids"].tolist() == [story["prompt_tokens"]]
    [found] = read(stories).generate(**prompt, do_sample=False, max_new_tokens=200)
    assert found[1:].tolist() == story["out_tokens"]
    assert tokenizer.decode(found, skip_special_tokens=True) == story["text"]


def test_there_and_back_the_story_is_the_same(stories, story, tmp_path):
    llama_jax.convert(stories, tmp_path / "meta", to="meta", model_parallel=2)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["vocab_size"] == -1
    llm = llama_jax.load(tmp_path / "meta")
    [found] = llm.generate([""], max_new_tokens=200, sampler=llama_jax.Greedy())
    assert found.tokens == story["out_tokens"] and found.text == story["text"]


@pytest.mark.parametrize("name", ORACLE)
def test_pytorch_reads_the_bits_of_metas_shards(torch, reference, name, tmp_path):
    source = reference / "oracle" / name
    shards = sorted(file.name for file in source.glob("*.pth"))
    llama_jax.convert(source, tmp_path / "hf", to="hf")
    llama_jax.convert(
        tmp_path / "hf", tmp_path / "meta", to="meta", model_parallel=len(shards)
    )
    assert sorted(file.name for file in (tmp_path / "meta").glob("*.pth")) == shards
    for shard in shards:
        found, written = (
            torch.load(directory / shard, weights_only=True, mmap=True)
            for directory in (tmp_path / "meta", source)
        )
        assert found.keys() == written.keys() - {"rope.freqs"}
        for key, tensor in found.items():
            assert tensor.dtype == written[key].dtype and tensor.is_contiguous()
            assert torch.equal(tensor.view(torch.int16), written[key].view(torch.int16))


def test_what_save_pretrained_writes_is_read(
    converted, expected, read, tmp_path, agree
):
    read(converted).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    found = ours(tmp_path, expected["tokens"])
    agree("logits", far(found, expected["logits"]), within=META_LOGITS)


@pytest.mark.parametrize("num_files", [1, 3], ids="{}_bin".format)
def test_pytorchs_files_are_read(
    torch, converted, expected, read, num_files, tmp_path, agree
):
    """As earlier versions of `save_pretrained` wrote them."""
    model = read(converted)
    model.config.save_pretrained(tmp_path)
    named = list(model.state_dict().items())
    names = [f"pytorch_model-{n + 1:05}-of-00003.bin" for n in range(3)]
    names = ["pytorch_model.bin"] if num_files == 1 else names
    parts = [dict(named[n::num_files]) for n in range(num_files)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    if num_files > 1:
        where = {key: n for n, part in zip(names, parts, strict=True) for key in part}
        index = json.dumps({"metadata": {}, "weight_map": where})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    found = ours(tmp_path, expected["tokens"])
    agree("logits", far(found, expected["logits"]), within=META_LOGITS)


def test_an_embedding_resized_past_the_tokenizer_is_read(
    torch, transformers, read, logits, stories, tmp_path, agree
):
    model = read(stories)
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    shutil.copy(stories / "tokenizer.model", tmp_path / "resized")
    tokens = [[1, 403, 407, 261, 519, 512]]
    expected = logits(model, tokens)
    assert expected.shape[-1] == 520
    found = ours(tmp_path / "resized", tokens)
    agree("logits", far(found, expected), within=META_LOGITS)
    # What the tokenizer does not say, params.json does.
    llama_jax.convert(tmp_path / "resized", tmp_path / "meta", to="meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["vocab_size"] == 520
    found = ours(tmp_path / "meta", tokens)
    agree("logits by way of Meta's", far(found, expected), within=META_LOGITS)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request, transformers, reference, tmp_path_factory):
    """Ours, and transformers' of the same model."""
    place = tmp_path_factory.mktemp("tokenizers")
    mine = llama_jax.Tokenizer(reference / TOKENIZERS[request.param])
    tensors = meta_checkpoint.random_tensors()
    for name in ("tok_embeddings.weight", "output.weight"):
        shape = (mine.vocab_size, meta_checkpoint.PARAMS["dim"])
        tensors[name] = np.resize(tensors[name], shape)
    meta_checkpoint.write_checkpoint(place / "meta", [tensors])
    mine.save(place / "meta" / "tokenizer.model")
    llama_jax.convert(place / "meta", place / "hf", to="hf", verify=False)
    return mine, transformers.AutoTokenizer.from_pretrained(place / "hf")


@pytest.fixture(scope="module")
def texts(reference):
    vectors = (reference / "tokenizer" / "llama_cpp_vectors.json").read_text()
    return [vector["text"] for vector in json.loads(vectors)["vectors"]] + TEXTS


def test_transformers_tokenizes_as_we_do(tokenizers, texts):
    mine, theirs = tokenizers
    assert len(theirs) == mine.vocab_size
    for text in texts:
        ids = mine.encode(text, bos=True, eos=False)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == mine.decode(ids), text


def test_random_texts_are_tokenized_as_we_do(tokenizers):
    mine, theirs = tokenizers
    draw = random.Random(0)
    pieces = [mine.piece(id).replace("\u2581", " ") for id in range(259, len(theirs))]
    runs = [character * n for character in " =-_#*0\n" for n in (1, 2, 3, 5, 9, 17)]
    rare = [chr(code) for code in (*range(32), 0x2581, *range(0x4E00, 0x4E40))]
    for kinds in (pieces, runs, rare + pieces[:30]):
        for _ in range(1500):
            text = "".join(draw.choices(kinds, k=draw.randint(1, 9)))
            ids = mine.encode(text, bos=True, eos=False)
            assert theirs(text)["input_ids"] == ids, text
            assert theirs.decode(ids[1:]) == mine.decode(ids[1:]), text


def test_a_turn_after_a_special_token_is_tokenized_as_metas_chat_is(tokenizers):
    """Meta encodes each turn by itself: a space before it, even after `</s>`."""
    mine, theirs = tokenizers
    turns = ["[INST] Why? [/INST] So.", "[INST] Oh? [/INST] Yes."]
    ids = [id for turn in turns for id in mine.encode(turn, bos=True, eos=True)]
    text = "</s><s>".join(turns) + "</s>"
    assert theirs(text)["input_ids"] == ids


def test_what_the_tokenizers_say_of_themselves(tokenizers):
    _, theirs = tokenizers
    special = (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id)
    assert special == (0, 1, 2) and theirs.pad_token is None
    assert theirs.padding_side == "left"  # generation continues the right end
    assert theirs("a", "b")["input_ids"].count(1) == 2
    inputs = ["input_ids", "attention_mask"]
    assert list(theirs("a")) == inputs
    said = Path(theirs.name_or_path) / "tokenizer_config.json"
    assert json.loads(said.read_text())["model_input_names"] == inputs
