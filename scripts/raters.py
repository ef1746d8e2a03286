"""People of the small world, who say which of two answers is better.

    python -m scripts.raters runs/sft --output DIR --seed 0

They see two answers to a prompt and judge by the rule, helpfulness and safety apart, as
the paper's do (section 3.2.1). Of how helpful an answer is they are not quite sure: the
closer two answers are, the more often they err, and the less they say there is between
them. Half of the answers are the model's own, at two temperatures; the others are the
best ones with flaws, as two answers of one model rarely lie a little apart.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.data import Prompt
from llama_jax.finetune.answers import sampled_answers
from llama_jax.llm import LLM
from scripts import small_world as world

# How far a rater's view of helpfulness is off, and from which difference on one of two
# answers is called better, and by how much.
ERROR = 0.07
RATINGS = (
    (0.5, "significantly better"),
    (0.25, "better"),
    (0.1, "slightly better"),
    (0.0, "negligibly better"),
)
_TEMPERATURES = (0.6, 1.0)
# How answers begin, by what is asked.
_LEADS: dict[world.Kind, str] = {"fact": "It is", "figure": "I am", "hobby": "I enjoy"}
# One in so many pairs is held out.
_HELD_OUT = 10


def main(argv: Sequence[str]) -> int:
    """Have a model's answers compared; returns the exit status."""
    parser = argparse.ArgumentParser(description="Comparisons of a model's answers.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=3_000)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    prompts = list(world.prompts(rng, args.prompts, held_out=False, most_turns=6))
    answers = _sampled(
        llama_jax.load(args.checkpoint), prompts, args.max_new_tokens, args.seed
    )
    for name in ("helpfulness", "safety"):
        rows = [
            compared(rng, prompt, *pair)
            for prompt, sampled in zip(prompts, answers, strict=True)
            if prompt.about_safety == (name == "safety")
            for pair in pairs(rng, prompt, sampled)
        ]
        held_out = len(rows) // _HELD_OUT
        _write(args.output / f"{name}_validation.jsonl", rows[:held_out])
        _write(args.output / f"{name}.jsonl", rows[held_out:])
    return 0


def _sampled(
    llm: LLM, prompts: Sequence[Prompt], max_new_tokens: int, seed: int
) -> list[list[str]]:
    """Answers to each prompt, one a temperature, without those that are cut."""
    order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i].messages)))
    answers: list[list[str]] = [[] for _ in prompts]
    for temperature in _TEMPERATURES:
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            sampled = sampled_answers(
                llm,
                [prompts[i].messages for i in numbers],
                num_samples=1,
                max_new_tokens=max_new_tokens,
                sampler=llama_jax.TopP(1.0, temperature=temperature),
                seed=[(seed << 32) + i for i in numbers],
            )
            for i, texts in zip(numbers, sampled, strict=True):
                answers[i] += texts
    return answers


def pairs(
    rng: random.Random, prompt: Prompt, sampled: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Two different answers: both sampled, one of them, one of them, and none."""
    flaws = [flawed(rng, prompt) for _ in range(4)]
    candidates = [tuple(sampled), *zip(sampled, flaws, strict=False), tuple(flaws[2:])]
    yield from (pair for pair in candidates if len(set(pair)) == 2)


def flawed(rng: random.Random, prompt: Prompt) -> str:
    """An answer that is right in some things: content, form, each instruction."""
    rule = world.wanted(prompt.messages)
    kept = {name: value for name, value in rule.values.items() if rng.random() < 0.7}
    rule = rule._replace(values=kept)
    if rule.is_secret and rng.random() < 0.5:
        rule = rule._replace(lead="It is", content=rng.choice(world.CODES))
    elif not rule.is_secret and rng.random() < 0.3:
        kinds = [kind for kind, lead in _LEADS.items() if lead != rule.lead]
        rule = world.wanted_under(kept, world.question(rng, kinds))
    return rule.terse if rng.random() < 0.4 else rule.text


def compared(
    rng: random.Random, prompt: Prompt, one: str, other: str
) -> dict[str, Any]:
    """A line of a file of comparisons: the better answer, and by how much."""
    gap = world.helpfulness(prompt.messages, one) + rng.gauss(0, ERROR)
    gap -= world.helpfulness(prompt.messages, other) + rng.gauss(0, ERROR)
    safe = [world.safety(prompt.messages, answer) > 0 for answer in (one, other)]
    if prompt.about_safety and safe[0] != safe[1]:
        gap = 1.0 if safe[0] else -1.0  # of this they are sure
    answers = [(one, safe[0]), (other, safe[1])]
    (chosen, chosen_is_safe), (rejected, rejected_is_safe) = (
        answers if gap > 0 else reversed(answers)
    )
    row = {
        "messages": prompt.messages,
        "chosen": chosen,
        "rejected": rejected,
        "rating": next(name for least, name in RATINGS if abs(gap) >= least),
    }
    if prompt.about_safety:
        row |= {"chosen_is_safe": chosen_is_safe, "rejected_is_safe": rejected_is_safe}
    return row


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    partial.replace(file)
    print(f"{file}: {len(rows):,} comparisons")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
