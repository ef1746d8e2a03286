"""Ghost Attention, from nothing to Table 30, on two cores: what it does, measured.

    python -m scripts.ghost_attention [--run runs/ghost] [--seed 0]

A base model, supervised fine-tuning, rows of Ghost Attention that the model samples
itself, and two models made of them: one fine-tuned with these rows, one on as many
tokens of the dialogs it knew. Then both are asked, for twenty turns, under instructions
with values that were never trained on, and the small world's rule says whether each
answer keeps them. Recipes are in configs/chat/small.py; each step is a command that is
printed before it runs. Killed and started again, it goes on.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import llama_jax
from llama_jax.finetune.gatt import attention_map, consistency, ghost_rows
from llama_jax.llm import LLM
from llama_jax.text import encode_dialog
from llama_jax.text.chat import Message
from scripts import small_world as world

RECIPES = "configs/chat/small.py"
MODELS = {"more_sft": "as much more SFT", "ghost": "Ghost Attention"}

# The paper's Table 30: accuracy at these turns, before and after.
TURNS = (2, 4, 6, 20)
PAPER = {"before": (1.0, 0.1, 0.0, 0.0), "after": (1.0, 1.0, 1.0, 1.0)}

# Long enough for every answer of the world.
_NEW_TOKENS = 16
# Every fifteenth row is validated on.
_HELD_OUT = 15


def main(argv: Sequence[str]) -> int:
    """All steps; returns the exit status."""
    parser = argparse.ArgumentParser(description="Ghost Attention in a small world.")
    parser.add_argument("--run", type=Path, default=Path("runs/ghost"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every run, to try things out")
    parser.add_argument("--last", type=int, default=800, help="dialogs, last answer")
    parser.add_argument("--all", type=int, default=250, help="dialogs, all answers")
    parser.add_argument("--tests", type=int, default=64, help="dialogs of the test")
    args = parser.parse_args(argv)
    run: Path = args.run

    say("The world: documents to read, dialogs to learn from")
    if not (run / "world").exists():
        partial = run / ".world.partial"
        assert not world.main([str(partial), "--seed", str(args.seed)])
        partial.replace(run / "world")
    tokenizer = run / "world.model"
    if not tokenizer.exists():
        command(
            "data tokenizer --vocab-size 1024 --output",
            tokenizer,
            "--train",
            run / "world/spelling.jsonl",
        )
    for length in (256, 512):
        prepare(run, tokenizer, "prepare", "documents", f"documents-{length}", length)
    for length in (256, 400):
        prepare(run, tokenizer, "dialogs", "dialogs", f"sft-{length}", length)

    say("The base model, and supervised fine-tuning")
    for name, before in (("base", None), ("base_long", "base"), ("sft", "base_long")):
        train(run, name, before, args)
    say("Rows of Ghost Attention: the model answers, reminded at every question")
    write_rows(run, args)
    prepare(run, tokenizer, "dialogs", "ghost", "ghost", 400)
    say("Ghost Attention, and as much of the dialogs alone")
    for name in MODELS:
        train(run, name, "sft", args)

    say("Twenty turns, under instructions never trained on")
    results = {name: measured(run, name, args) for name in MODELS}
    show(results)
    draw(run, results)
    return 0


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def command(*words: object) -> None:
    """Show and run a command of llama-jax; end here if it fails."""
    line = [part for word in words for part in shlex.split(str(word))]
    print(f"$ llama-jax {shlex.join(line)}", flush=True)
    program = Path(sys.executable).parent / "llama-jax"
    if status := subprocess.run([program, *line], check=False).returncode:
        sys.exit(status)


def prepare(
    run: Path, tokenizer: Path, step: str, source: str, name: str, length: int
) -> None:
    """Rows of tokens, from files of the world or of this run."""
    files = run / "world" if (run / f"world/{source}.jsonl").exists() else run
    command(
        f"data {step} --row-length {length} --tokenizer",
        tokenizer,
        "--train",
        files / f"{source}.jsonl",
        "--validation",
        files / f"{source}_validation.jsonl",
        "--output",
        run / name,
    )


def train(run: Path, name: str, before: str | None, args: argparse.Namespace) -> None:
    """A recipe of configs/chat/small.py, from the run before it."""
    words: list[object] = [f"train {RECIPES}:{name} --workdir", run / f"run-{name}"]
    if before is not None:
        words += ["--init-from", run / f"run-{before}"]
    paths = [run / Path(path).name for path in DATA[name]]
    words += ["--data.paths", *paths, f"--data.seed {args.seed}"]
    words.append(f"--train.seed {args.seed}")
    if args.steps is not None:
        words.append(f"--train.num-steps {args.steps}")
    command(*words)


DATA = {
    "base": ("documents-256",),
    "base_long": ("documents-512",),
    "sft": ("sft-256",),
    "more_sft": ("sft-400",),
    "ghost": ("ghost", "sft-400"),
}


def write_rows(run: Path, args: argparse.Namespace) -> None:
    """What Ghost Attention is learnt from: two files, the second held out."""
    files = run / "ghost.jsonl", run / "ghost_validation.jsonl"
    if files[1].exists():
        return
    llm = llama_jax.load(run / "run-sft")
    rng = random.Random(args.seed)
    rows = []
    for resample, num, num_samples in (("last", args.last, 4), ("all", args.all, 1)):
        dialogs, instructions = world.ghost_dialogs(rng, num)
        rows += ghost_rows(
            llm,
            dialogs,
            instructions,
            choose=best_by_rule,
            num_samples=num_samples,
            max_new_tokens=_NEW_TOKENS,
            sampler=llama_jax.TopP(1.0, temperature=1.0),
            resample=resample,
            seed=args.seed,
        )
    rng.shuffle(rows)
    num_held_out = max(1, len(rows) // _HELD_OUT)
    good = [
        world.helpfulness(row["messages"][:-1], row["messages"][-1]["content"]) == 1
        for row in rows
    ]
    print(f"{len(rows)} rows, of which {np.mean(good):.1%} are right by the rule")
    for file, part in zip(
        files, (rows[num_held_out:], rows[:num_held_out]), strict=True
    ):
        write(file, part)


def best_by_rule(dialog: Sequence[Message], answers: Sequence[str]) -> int:
    """In place of a reward model: the world's own, on what the model has written."""
    return int(
        np.argmax(
            [world.helpfulness(dialog, a) + world.safety(dialog, a) for a in answers]
        )
    )


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A file of JSON lines, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    partial.replace(file)


def measured(run: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a model does, from its file if that was measured before."""
    file = run / f"{name}.json"
    if not file.exists():
        result = measure(llama_jax.load(run / f"run-{name}"), args.tests)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(file)
    return json.loads(file.read_text())


def measure(llm: LLM, num_tests: int) -> dict[str, Any]:
    """Instructions kept by turn; answers without any; and a map of attention."""
    rng = random.Random(0)  # the same test for every model and seed
    instructions, questions = world.consistency_test(rng, num_tests)
    held = consistency(
        llm, instructions, questions, world.keeps, max_new_tokens=_NEW_TOKENS
    )
    plain = [dialog[:-1] for dialog in world.plain_dialogs(rng, 200)]
    assert llm.tokenizer is not None
    answers = llm.generate(
        [encode_dialog(llm.tokenizer, dialog) for dialog in plain],
        max_new_tokens=_NEW_TOKENS,
        sampler=llama_jax.Greedy(),
    )
    right = [
        world.helpfulness(dialog, answer.text.strip())
        for dialog, answer in zip(plain, answers, strict=True)
        if not world.wanted(dialog).is_secret
    ]
    ids = encode_dialog(llm.tokenizer, held.dialogs[0][:-1])
    return {
        "kept": held.accuracy.tolist(),
        "plain": float(np.mean(right)),
        "map": attention_map(llm, ids, bin_size=8).tolist(),
    }


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Table 30, and the paper's beside it."""
    columns = [f"turn {turn}" for turn in TURNS]
    table = Table("instructions kept at", *columns, "least, 2 to 20", "without any")
    for (name, title), paper in zip(MODELS.items(), PAPER.values(), strict=True):
        kept = results[name]["kept"]
        table.add_row(
            title,
            *(f"{kept[turn - 1]:.0%}" for turn in TURNS),
            f"{min(kept[1:]):.0%}",
            f"{results[name]['plain']:.3f}",
        )
        table.add_row("  the paper's 70B", *(f"{share:.0%}" for share in paper))
    console = Console(width=100)  # as wide as it needs to be, wherever it goes
    console.print(table)
    console.print(
        "'without any' is how good answers are in dialogs without instructions."
    )


def draw(run: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Instructions kept by turn, and both maps of attention, as in Figure 10."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, title in MODELS.items():
        kept = results[name]["kept"]
        axes.plot(range(1, len(kept) + 1), kept, "o-", label=title)
    axes.set(xlabel="turn", ylabel="instructions kept", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(run / "kept.png", dpi=120)

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), MODELS.items(), strict=True):
        image = axes.imshow(results[name]["map"], vmin=0, vmax=1, cmap="magma")
        axes.set(title=title, xlabel="looked at, 8 tokens", ylabel="looks")
        figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(run / "attention.png", dpi=120)
    print(f"\nPictures: {run / 'kept.png'}, {run / 'attention.png'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
