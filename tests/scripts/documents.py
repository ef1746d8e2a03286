"""What documents tell people to type, and a place where it can be typed.

A ```python block is a program: those of one document run in order, in one namespace.
A ```bash block is a list of commands, each run dry; one that ends with `# refused` has
to be. Paths that documents name exist in the place that `make_place` prepares:
`runs/demo`, as `make demo` leaves it; `llama-2-7b`, as Meta releases it; `corpus`, with
text; `dialogs`, with conversations; `comparisons`, with pairs of answers; `prompts`,
with questions; and `configs`.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import load_recipe
from llama_jax.data import JsonLines, prepare
from llama_jax.model import Llama
from llama_jax.text import train_tokenizer
from tests.architecture.tree import ROOT
from tests.data import comparisons, dialogs, prompts
from tests.reference import meta_checkpoint

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Every document whose blocks are for readers to run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def program(text: str) -> str:
    """The python blocks of a document, each on the lines where it stands."""
    lines = [""] * text.count("\n")
    for fence in _FENCE.finditer(text):
        if fence[1] == "python":
            first = text.count("\n", 0, fence.start(2))
            block = fence[2].splitlines()
            lines[first : first + len(block)] = block
    return "\n".join(lines)


def commands(text: str) -> Iterator[tuple[list[str], str]]:
    """Each command of the bash blocks, as words, and the comment behind it."""
    for fence in _FENCE.finditer(text):
        if fence[1] == "bash":
            for line in fence[2].replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words, line.partition(" # ")[2].strip()


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [
        "".join(cell["source"])
        for cell in content["cells"]
        if cell["cell_type"] == "code"
    ]


def make_place(directory: Path) -> Path:
    """The paths that documents name, with tiny models behind them."""
    (directory / "configs").symlink_to(ROOT / "configs")
    corpus = directory / "corpus"
    corpus.mkdir()
    sentences = [f"The people of {n} States went on in peace." for n in range(400)]
    for split in ("train", "validation"):
        lines = [json.dumps({"text": sentence}) for sentence in sentences]
        (corpus / f"{split}.jsonl").write_text("\n".join(lines))
    for kind in ("dialogs", "comparisons", "prompts"):
        (directory / kind).mkdir()
    for split in ("train", "validation"):
        dialogs.write(directory / f"dialogs/{split}.jsonl", dialogs.dialogs(20))
        comparisons.write(
            directory / f"comparisons/{split}.jsonl", comparisons.comparisons(20)
        )
        prompts.write(directory / f"prompts/{split}.jsonl", prompts.prompts(20))
    run = directory / "runs/demo"
    run.mkdir(parents=True)
    tokenizer = train_tokenizer(sentences, run / "tokenizer.model", vocab_size=380)
    tokenizer.save(run / "vocabulary.model")
    recipe = load_recipe(str(ROOT / "configs/demo.py:small"))
    prepare(
        {
            split: [JsonLines(corpus / f"{split}.jsonl")]
            for split in ("train", "validation")
        },
        tokenizer,
        run / "data",
        row_length=recipe.data.sequence_length,
    )
    config = dataclasses.replace(LlamaConfig.tiny(), vocab_size=tokenizer.vocab_size)
    tokens = np.zeros((1, 1), np.int32)
    params = jax.jit(Llama(config).init)(jax.random.key(0), tokens)["params"]
    with RunCheckpoints(run, keep_latest=1, keep_period=0) as checkpoints:
        checkpoints.save(
            recipe.train.num_steps,
            {"params": params, "optimizer": {"step": np.int32(recipe.train.num_steps)}},
            0,
            dataclasses.replace(recipe, model=config),
        )
    tokenizer.save(directory / "llama-2-7b/tokenizer.model")
    tensors = meta_checkpoint.random_tensors()
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = np.resize(tensors[name], (tokenizer.vocab_size, 32))
    meta_checkpoint.write_checkpoint(
        directory / "llama-2-7b", meta_checkpoint.split(tensors, 2)
    )
    return directory
