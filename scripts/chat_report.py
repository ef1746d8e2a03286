"""What each stage of scripts/chat.sh has made of the model, by the rule of the world.

    python -m scripts.chat_report runs/chat/seed-0 [runs/chat/seed-1 ...] --output DIR

Every version answers the same prompts, with instructions whose values were never
trained on, and holds the same dialogs of twenty turns. Tables and pictures go to DIR.
What was measured is kept in RUN/measured, and not measured again.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import llama_jax
from llama_jax.finetune.consistency import attention_map, consistency
from llama_jax.generate import score
from llama_jax.llm import LLM
from llama_jax.text import encode_dialog
from llama_jax.train.metrics import METRICS, read_metrics
from scripts import raters
from scripts import small_world as world

# What is measured of the directories that scripts/chat.sh writes.
STAGES = {
    "sft": "SFT",
    "distilled": "SFT, distilled",
    "v1": "V1",
    "v2": "V2",
    "v3": "V3",
    "v4": "V4, with GAtt",
    "v5": "V5",
    "ppo": "PPO",
}
# Of prompts, by their number: see `world.prompts`.
KINDS = ("plain", "instructed", "adversarial")

# The paper's Table 30: accuracy at these turns before and after Ghost Attention.
TURNS = (2, 4, 6, 20)
PAPER = {"before": (1.0, 0.1, 0.0, 0.0), "after": (1.0, 1.0, 1.0, 1.0)}
BEFORE, AFTER = "v3", "v4"

# Long enough for every answer of the world.
_NEW_TOKENS = 24
# Prompts at a time.
_BATCH = 64

Measured = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    """Measure, show and draw; returns the exit status."""
    parser = argparse.ArgumentParser(description="The stages of a chat model.")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--dialogs", type=int, default=48, help="of twenty turns")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    results = [measured(run, args.prompts, args.dialogs) for run in args.runs]
    console = Console(width=120, record=True)  # as wide as it needs to be, anywhere
    console.print(stage_table(results))
    console.print(turn_table(results))
    console.print(rating_table(args.runs))
    console.save_text(str(args.output / "table.txt"))
    draw(args.output, results)
    return 0


def measured(run: Path, num_prompts: int, num_dialogs: int) -> dict[str, Measured]:
    """Every stage of a run, from its file if that was measured before."""
    results = {}
    for stage in STAGES:
        file = run / "measured" / f"{stage}-{num_prompts}-{num_dialogs}.json"
        if not file.exists():
            print(f"measuring {run / stage}", flush=True)
            llm, sft = (llama_jax.load(run / name) for name in (stage, "sft"))
            result = measure(llm, sft, num_prompts, num_dialogs)
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(result))
            partial.replace(file)
        results[stage] = json.loads(file.read_text())
    return results


def measure(llm: LLM, sft: LLM, num_prompts: int, num_dialogs: int) -> dict[str, Any]:
    """One model: rewards, violations, divergence from SFT, instructions kept, a map."""
    rng = random.Random(0)  # the same test for every model and seed
    told = answers_worth(llm, sft, rng, num_prompts)
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    instructions, questions = world.consistency_test(rng, num_dialogs)
    held = consistency(
        llm, instructions, questions, world.keeps, max_new_tokens=_NEW_TOKENS
    )
    ids = encode_dialog(tokenizer, held.dialogs[0][:-1])
    return {
        **told,
        "kept": held.accuracy.tolist(),
        "map": attention_map(llm, ids, bin_size=8).tolist(),
    }


def answers_worth(
    llm: LLM, reference: LLM, rng: random.Random, num_prompts: int
) -> dict[str, float]:
    """Of answers at temperature 1: rewards by the rule, violations, divergence."""
    prompts = list(world.prompts(rng, num_prompts, held_out=True))
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    encoded = [encode_dialog(tokenizer, prompt.messages) for prompt in prompts]
    order = sorted(range(num_prompts), key=lambda i: len(encoded[i]))
    worth, told, kl = (np.zeros(num_prompts) for _ in range(3))
    for start in range(0, num_prompts, _BATCH):
        numbers = order[start : start + _BATCH]
        answers = llm.generate(
            [encoded[i] for i in numbers],
            max_new_tokens=_NEW_TOKENS,
            sampler=llama_jax.TopP(1.0, temperature=1.0),
            seed=numbers,
        )
        rows = [
            [*encoded[i], *answer.tokens]
            + [tokenizer.eos_id] * (answer.finish_reason == "stop")
            for i, answer in zip(numbers, answers, strict=True)
        ]
        ours, theirs = (score.token_logprobs(m.engine, rows) for m in (llm, reference))
        for i, answer, new, old in zip(numbers, answers, ours, theirs, strict=True):
            text = answer.text.strip()
            worth[i] = world.worth(prompts[i], text)
            told[i] = world.safety(prompts[i].messages, text) == 0
            first = len(encoded[i]) - 1
            kl[i] = np.sum(new[first:]) - np.sum(old[first:])

    return {
        "reward": float(worth.mean()),
        "reward_error": float(worth.std() / np.sqrt(num_prompts)),
        **{kind: float(worth[i :: len(KINDS)].mean()) for i, kind in enumerate(KINDS)},
        "violations": float(told[KINDS.index("adversarial") :: len(KINDS)].mean()),
        "kl": float(kl.mean()),
    }


def over_runs(results: Sequence[Mapping[str, Measured]], stage: str, name: str) -> Any:
    """The mean over runs."""
    return np.mean([result[stage][name] for result in results], axis=0)


def error(of_each: Sequence[Any]) -> Any:
    """The standard error of the mean over runs."""
    return np.std(of_each, axis=0, ddof=1) / np.sqrt(len(of_each))


def reward_error(results: Sequence[Mapping[str, Measured]], stage: str) -> float:
    """The standard error of the mean reward: over runs, or over prompts of one."""
    if len(results) == 1:
        return results[0][stage]["reward_error"]
    return float(error([result[stage]["reward"] for result in results]))


def stage_table(results: Sequence[Mapping[str, Measured]]) -> Table:
    """Each stage: rewards by the rule, violations, divergence, instructions kept."""
    turns = (1, *TURNS)
    table = Table(
        *("", "reward", *KINDS, "violations", "KL", *map(str, turns)),
        title="By the rule of the world",
        caption=(
            "± one standard error over runs, or over prompts of one; violations: of "
            "adversarial prompts; KL from SFT, nats an answer; 1 to 20: instructions "
            "kept at turn"
        ),
    )
    for stage, title in STAGES.items():
        mean = {
            name: over_runs(results, stage, name)
            for name in ("reward", *KINDS, "violations", "kl", "kept")
        }
        table.add_row(
            title,
            f"{mean['reward']:.3f} ± {reward_error(results, stage):.3f}",
            *(f"{mean[kind]:.3f}" for kind in KINDS),
            f"{mean['violations']:.1%}",
            f"{mean['kl']:.2f}",
            *(f"{mean['kept'][turn - 1]:.0%}" for turn in turns),
        )
    return table


def turn_table(results: Sequence[Mapping[str, Measured]]) -> Table:
    """Table 30, and the paper's beside it."""
    columns = [f"turn {turn}" for turn in TURNS]
    table = Table("instructions kept at", *columns, "least, 2 to 20")
    for stage, (name, paper) in zip((BEFORE, AFTER), PAPER.items(), strict=True):
        kept = over_runs(results, stage, "kept")
        of_each = np.array([result[stage]["kept"] for result in results])
        spread = error(of_each) if len(results) > 1 else None
        cells = [
            f"{kept[turn - 1]:.0%}"
            + (f" ± {spread[turn - 1]:.0%}" if spread is not None else "")
            for turn in TURNS
        ]
        table.add_row(f"{name} ({stage})", *cells, f"{of_each[:, 1:].min():.0%}")
        table.add_row("  the paper's 70B", *(f"{share:.0%}" for share in paper))
    return table


def rating_table(runs: Sequence[Path]) -> Table:
    """Reward models: held-out pairs in order, by how much better one was rated."""
    ratings = [name for _, name in raters.RATINGS]
    table = Table("pairs in order", *ratings, "safe and unsafe")
    for model in ("helpfulness", "safety"):
        lasts = [_last_validation(run / model) for run in runs]
        cells = []
        for kind, name in (
            *(("accuracy_by_rating", rating) for rating in ratings),
            ("accuracy_by_safety", "safe and unsafe"),
        ):
            shares = [last[kind][name] for last in lasts if name in last[kind]]
            cells.append(f"{np.mean(shares):.1%}" if shares else "")
        table.add_row(model, *cells)
    return table


def _last_validation(workdir: Path) -> Mapping[str, Any]:
    """Of a reward model."""
    records = read_metrics(workdir / METRICS)
    return next(record for record in reversed(records) if "accuracy" in record)


def draw(folder: Path, results: Sequence[Mapping[str, Measured]]) -> None:
    """Rewards by stage, instructions by turn, and two maps of attention (Figure 10)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = range(len(STAGES))
    rewards = [over_runs(results, stage, "reward") for stage in STAGES]
    errors = [reward_error(results, stage) for stage in STAGES]
    left.errorbar(numbers, rewards, errors, fmt="o-", capsize=3, label="reward")
    violations = [over_runs(results, stage, "violations") for stage in STAGES]
    left.plot(numbers, violations, "s--", label="violations")
    left.set(xticks=numbers, xticklabels=STAGES, ylim=(0, 1.02), ylabel="of 1")
    left.legend()
    for stage in ("sft", BEFORE, AFTER, "v5", "ppo"):
        kept = over_runs(results, stage, "kept")
        right.plot(range(1, len(kept) + 1), kept, "o-", markersize=3, label=stage)
    right.set(xlabel="turn", ylabel="instructions kept", ylim=(0, 1.05))
    right.set_xticks((1, 2, 4, 6, 10, 15, 20))
    right.legend()
    figure.savefig(folder / "stages.png", dpi=120)

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), (BEFORE, AFTER), strict=True):
        image = axes.imshow(results[0][stage]["map"], vmin=0, vmax=1, cmap="magma")
        axes.set(title=STAGES[stage], xlabel="looked at, 8 tokens", ylabel="looks")
        figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(folder / "attention.png", dpi=120)
    print(f"\nBesides, in {folder}: table.txt, stages.png, attention.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
