"""What a card says, as Markdown in which no text can pass for more than text.

`records` are those of a run's metrics.jsonl.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.data import Prepared
from llama_jax.data.prepare import TRAIN
from llama_jax.errors import DataError
from llama_jax.finetune.ppo_state import best_pass
from llama_jax.finetune.rejection import RewardCurve
from llama_jax.text.chat import Message
from llama_jax.train.metrics import Record
from scripts.card_plots import series

# A dialog that asks, and answers to it by what is said of them.
Sample = tuple[Sequence[Message], Mapping[str, str]]

# What PPO measures, and cards of others: its name here, and how it is written.
_MEASURED = {
    "reward": ("reward, mean of Rc", "{:.4g}"),
    "helpfulness": ("helpfulness, mean of σ(score)", "{:.4g}"),
    "safety": ("safety, mean of σ(score)", "{:.4g}"),
    "kl": ("KL from the reference, nats per answer", "{:.4g}"),
    "answer_length": ("length of answers, tokens", "{:.4g}"),
    "cut": ("answers that were cut", "{:.1%}"),
    "clipped": ("tokens whose ratio is clipped", "{:.1%}"),
    "answer_seconds": ("seconds to answer", "{:.4g}"),
    "reshard_seconds": ("of these, to copy the policy", "{:.4g}"),
    "read_seconds": ("seconds to read the answers", "{:.4g}"),
}
# Those of a pass over held-out prompts.
_HELD_OUT = ("reward", "helpfulness", "safety", "kl", "answer_length", "cut")
# Answers to choose from, in the table of the reward curve; and as many as there are.
_CURVE_SIZES = (1, 2, 3, 5, 10, 20, 50, 100)


def data_table(data: Mapping[str, Any]) -> str:
    """The data sets of a recipe, as far as they are still where the run read them."""
    rows = list[Sequence[object]]()
    for path, weight in zip(data["paths"], data["weights"], strict=True):
        try:
            prepared = Prepared.load(path)
        except DataError:
            rows.append((path, f"{weight:g}", "not there any more", "", "", ""))
            continue
        for name in (TRAIN, data["validation_split"]):
            if split := prepared.splits.get(name):
                holds = f"{split.num_documents:,} {prepared.kind}"
                counts = f"{split.num_tokens:,}", f"{split.num_rows:,}"
                rows.append((path, f"{weight:g}", name, holds, *counts))
    return table(("path", "weight", "split", "holds", "tokens", "rows"), rows)


def training_table(
    recipe: Mapping[str, Any], records: Sequence[Record], loss_unit: str
) -> str:
    """How long a run was, and what became of its loss."""
    train, data = recipe["train"], recipe["data"]
    rates = series(records, "learning_rate")
    told = {
        "steps": f"{rates[-1][0]:,} of {train['num_steps']:,}",
        "tokens a step": f"{train['batch_size'] * data['sequence_length']:,}",
        "highest learning rate": _at(max(rates, key=_value)),
        "last learning rate": _at(rates[-1]),
    }
    if losses := series(records, "loss"):
        told[f"first loss, {loss_unit}"] = _at(losses[0])
        told["last loss"] = _at(losses[-1])
    if held_out := series(records, "validation_loss"):
        told["best validation loss"] = _at(min(held_out, key=_value))
        told["last validation loss"] = _at(held_out[-1])
    return facts(told)


def comparisons_table(report: Mapping[str, Any]) -> str:
    """What a validation of a reward model reports, see docs/chat.md."""
    parts = {**report["accuracy_by_rating"], **report["accuracy_by_safety"]}
    shares = {
        "accuracy": report["accuracy"],
        **{f"accuracy, {name}": share for name, share in parts.items()},
        "unsafe answers with σ(score) below 1/2": report["unsafe_recall"],
        "calibration error": report["calibration_error"],
    }
    told = {name: f"{s:.1%}" for name, s in shares.items() if s is not None}
    return table(("", f"after step {report['step']:,}"), told.items())


def iterations_table(records: Sequence[Record]) -> str:
    """The first and the last iteration of PPO."""
    rows = [
        (label, form.format(points[0][1]), form.format(points[-1][1]))
        for name, (label, form) in _MEASURED.items()
        if (points := series(records, name))
    ]
    (_, first), *_, (_, last) = 2 * series(records, "iteration")
    return table(("", f"iteration {first:,}", f"iteration {last:,}"), rows)


def answers_table(
    told: Mapping[str, float], *, num_prompts: int, reference: object
) -> str:
    """What answers are worth on average, in PPO's measures."""
    named = {name: _MEASURED[name] for name in told}
    measured = {label: form.format(told[key]) for key, (label, form) in named.items()}
    asked = {"prompts": f"{num_prompts:,}", "temperature": "1", "reference": reference}
    return facts({**asked, **measured})


def held_out_table(passes: Sequence[Record], max_kl: float | None) -> str:
    """Every pass of PPO over the held-out prompts, and the best within `max_kl`."""
    labels, forms = zip(*(_MEASURED[name] for name in _HELD_OUT), strict=True)
    rows = list[Sequence[object]]()
    for record in passes:
        values = (record.get(f"validation_{name}") for name in _HELD_OUT)
        told = [
            "" if value is None else form.format(value)
            for form, value in zip(forms, values, strict=True)
        ]
        rows.append((f"{record['step']:,}", *told))
    within = "" if max_kl is None else f" within {max_kl:g} nats of the reference"
    summary = f"No pass was{within}."
    if best := best_pass(passes, max_kl):
        reward = _at((best["step"], best["validation_reward"]))
        summary = f"The best reward{within} was {reward}."
    return f"{table(('step', *labels), rows)}\n\n{summary}"


def curve_table(curve: RewardCurve) -> str:
    """Some points of Figure 7, the last among them."""
    num_answers = len(curve.max)
    sizes = [size for size in _CURVE_SIZES if size < num_answers] + [num_answers]
    return table(
        ("N", "best of N", "median of N"),
        [(n, f"{curve.max[n - 1]:.4g}", f"{curve.median[n - 1]:.4g}") for n in sizes],
    )


def recipe_table(recipe: Mapping[str, Any]) -> str:
    """A recipe, a row for each of its parts."""
    parts = {name: part for name, part in recipe.items() if isinstance(part, Mapping)}
    rest = {name: value for name, value in recipe.items() if name not in parts}
    return facts(
        {
            name: ", ".join(f"{field}={value!r}" for field, value in part.items())
            for name, part in {**parts, "others": rest}.items()
        }
    )


def samples(shown: Iterable[Sample]) -> str:
    """Dialogs, and the answers to them."""
    parts = list[str]()
    for number, (messages, answers) in enumerate(shown, start=1):
        parts.append(f"### Prompt {number}")
        for message in messages:
            parts += [f"{message['role'].capitalize()}:", fenced(message["content"])]
        for name, answer in answers.items():
            parts += [f"**{name}**", fenced(answer)]
    return "\n\n".join(parts)


def facts(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    return table(("", ""), values.items())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, whatever its cells hold."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(escaped(str(cell)) for cell in line)} |" for line in lines
    )


def escaped(text: str) -> str:
    """A text on one line, of which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_~\[\]<>&|$])", r"\\\1", " ".join(text.split()))


def fenced(text: str) -> str:
    """A text as it is, within a fence that it does not have."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _at(point: tuple[int, float]) -> str:
    return f"{point[1]:.4g} (step {point[0]:,})"
