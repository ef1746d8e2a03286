"""A card of a stage of the chat recipe: what it is, how it went, what it writes.

    python -m scripts.card DIR [--prompts FILE.jsonl
        [--helpfulness DIR --safety DIR --reference CHECKPOINT]]

DIR is what any stage left: the work directory of a run, an iteration of rejection
sampling, or rows of Ghost Attention or of context distillation. It gets `card.md`, of
tables and samples, and `card.png`, a page of plots. Samples are answers of the run's
model to the first of the prompts, a line {"messages": [...]} each; those of an
iteration are the best and the worst of its own, those of rows what is learnt. With two
reward models and a reference, the card of a run says what answers are worth, and how
far they are from the reference. Models answer on all devices, of all hosts if each of
them runs this, and sees one DIR.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from llama_jax.checkpoint.manager import CHECKPOINTS, open_run, saved_recipe
from llama_jax.checkpoint.params import is_remote, place
from llama_jax.config.recipe import PpoRecipe, PretrainRecipe, RewardRecipe
from llama_jax.data import PromptLines
from llama_jax.errors import CheckpointError, DataError, LlamaError
from llama_jax.finetune import distill, gatt, shards
from llama_jax.finetune.ppo_state import PLAN, best_policy
from llama_jax.finetune.rejection import MANIFEST, Iteration, best_of, reward_curve
from llama_jax.finetune.rollout import Rollout
from llama_jax.finetune.shards import Shards
from llama_jax.model import num_params
from llama_jax.train import faults
from llama_jax.train.metrics import METRICS, Record, read_metrics
from llama_jax.train.run import BEGINNING
from scripts import card_answers, card_plots, card_text
from scripts.card_answers import cut_mark
from sharding import ShardingError, hosts

TEXT, PICTURE = "card.md", "card.png"

# What the loss of a stage is counted in.
_LOSS_UNITS = {
    RewardRecipe.stage: "nats per pair",
    PpoRecipe.stage: "of the policy, per token",
}

# Stages that make rows to learn from, and what their directories are.
_ROWS = {"Ghost Attention": gatt.KIND, "context distillation": distill.KIND}
# What a model was asked for, as manifests have it and as a card says it.
_ASKED = {
    "policy": "policy",
    "helpfulness_model": "helpfulness model",
    "safety_model": "safety model",
    "resample": "answers sampled of a dialog",
    "num_samples": "answers to choose from",
    "sampler": "sampler",
    "max_new_tokens": "longest answer allowed, tokens",
    "seed": "seed",
}


def main(argv: Sequence[str]) -> int:
    """Write the card; returns the exit status."""
    args = options(argv)
    # Only where models answer are there other hosts to do it with.
    answers = args.prompts is not None
    try:
        with faults.together() if answers else contextlib.nullcontext():
            directory = place(args.directory)
            card = card_of(directory, args)
            if answers and jax.process_index() != 0:
                return 0
            write(directory, card)
    except (LlamaError, ShardingError) as error:
        print(f"card: {error}", file=sys.stderr)
        return 1
    print(f"Written to {directory / TEXT} and {directory / PICTURE}.")
    return 0


def options(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="card", description="A card of what a stage left."
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--prompts", help="of samples, a .jsonl file")
    parser.add_argument(
        "--num-samples", type=_count, default=6, help="of prompts or rows shown"
    )
    parser.add_argument("--helpfulness", help="the reward model of that name")
    parser.add_argument("--safety", help="likewise")
    parser.add_argument("--reference", help="a model to measure the divergence from")
    parser.add_argument("--num-scored", type=_count, default=96, help="prompts scored")
    parser.add_argument("--max-new-tokens", type=_count, default=256)
    parser.add_argument(
        "--tensor", type=_count, default=1, help="devices that share weights"
    )
    args = parser.parse_args(argv)
    scoring = (args.helpfulness, args.safety, args.reference)
    if any(scoring) and not all((*scoring, args.prompts)):
        parser.error(
            "answers are scored with all of --prompts, --helpfulness, --safety and "
            "--reference"
        )
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give an integer of 1 or more")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is shown.

    Attributes:
      title: of text and picture.
      sections: Markdown by heading.
      plots: of the picture.
    """

    title: str
    sections: Mapping[str, str]
    plots: Sequence[card_plots.Plot]

    def text(self) -> str:
        """The card as Markdown."""
        parts = [f"# {card_text.escaped(self.title)}", f"![Plots]({PICTURE})"]
        parts += [f"## {name}\n\n{body}" for name, body in self.sections.items()]
        return "\n\n".join(parts) + "\n"

    def figure(self) -> Figure:
        """The plots, on one page."""
        return card_plots.page(self.title, self.plots)


def card_of(directory: epath.Path, args: argparse.Namespace) -> Card:
    """The card of whatever a directory holds.

    Raises:
      LlamaError: it holds none, or one that is not done or damaged; prompts for what
        writes nothing, or that leave no room for an answer.
      ShardingError: `--tensor` does not divide the model.
    """
    if (directory / MANIFEST).exists():
        _require_no_prompts(directory, args)
        return iteration_card(Iteration.open(directory), args.num_samples)
    for stage, kind in _ROWS.items():
        if (directory / kind.manifest).exists():
            _require_no_prompts(directory, args)
            return rows_card(stage, shards.open_done(kind, directory), args.num_samples)
    if (directory / CHECKPOINTS).exists():
        return run_card(Run.open(directory), args)
    manifests = ", ".join([MANIFEST, *(kind.manifest for kind in _ROWS.values())])
    raise CheckpointError(
        f"{directory} is nothing that has a card: a run has {CHECKPOINTS}, what a "
        f"model wrote to learn from has one of {manifests}. Check the path."
    )


def _require_no_prompts(directory: epath.Path, args: argparse.Namespace) -> None:
    if args.prompts is not None:
        raise DataError(
            f"{directory} holds answers, which are its samples: leave out --prompts."
        )


def write(directory: epath.Path, card: Card) -> None:
    """Put text and picture into a directory, each whole or not at all.

    Raises:
      DataError: they cannot be written.
    """
    picture = io.BytesIO()
    card.figure().savefig(picture, format="png")
    files = {PICTURE: picture.getvalue(), TEXT: card.text().encode()}
    try:
        for name, content in files.items():
            if is_remote(directory):  # where objects appear whole
                (directory / name).write_bytes(content)
                continue
            partial = directory / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(directory / name)
    except OSError as error:
        raise DataError(f"{directory} cannot be written to: {error}.") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
      directory: its work directory.
      step: of its newest checkpoint.
      num_params: of its model.
      recipe: what that was made with.
      records: its metrics.
    """

    directory: epath.Path
    step: int
    num_params: int
    recipe: Mapping[str, Any]
    records: Sequence[Record]

    @classmethod
    def open(cls, directory: epath.Path) -> Self:
        """A run that has saved something.

        Raises:
          CheckpointError: it has not, is damaged, or has lost its metrics.
        """
        source = open_run(directory)
        newest = source.directory.parent
        records = read_metrics(directory / METRICS)
        if not card_plots.series(records, "learning_rate"):
            raise CheckpointError(
                f"{directory} has no {METRICS} with steps in it, of which its card is "
                "made: copy it there."
            )
        return cls(
            directory=directory,
            step=int(newest.name),
            num_params=num_params(source.config, source.head),
            recipe=saved_recipe(newest),
            records=records,
        )

    @property
    def stage(self) -> str:
        """What was done, in words; runs before there was a choice do not say it."""
        return self.recipe.get("stage", PretrainRecipe.stage)

    @property
    def began_with(self) -> dict[str, str]:
        """The model that it went on from, if any; PPO keeps that with its sizes."""
        try:
            if self.stage == PpoRecipe.stage:
                plan = json.loads((self.directory / PLAN).read_text())
                return {"began with": plan["init_from"]}
            return {"began with": (self.directory / BEGINNING).read_text().strip()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @property
    def answering(self) -> epath.Path:
        """The model whose answers are shown: PPO's best, where it looks for one."""
        if self.stage != PpoRecipe.stage:
            return self.directory
        ppo = self.recipe["ppo"]
        return best_policy(self.directory, ppo["patience"], ppo.get("max_kl"))


def run_card(run: Run, args: argparse.Namespace) -> Card:
    """The card of pretraining, fine-tuning, a reward model or PPO."""
    records = run.records
    loss_unit = _LOSS_UNITS.get(run.stage, "nats per token")
    what = {
        "stage": run.stage,
        **run.began_with,
        "parameters": f"{run.num_params:,}",
        "newest checkpoint": f"step {run.step:,}",
    }
    sections = {
        "What it is": card_text.facts(what),
        "Data": card_text.data_table(run.recipe["data"]),
        "Training": card_text.training_table(run.recipe, records, loss_unit),
    }
    if reports := [record for record in records if "accuracy" in record]:
        sections["Comparisons held out"] = card_text.comparisons_table(reports[-1])
    if any("iteration" in record for record in records):
        sections["Iterations"] = card_text.iterations_table(records)
    if passes := [record for record in records if "validation_reward" in record]:
        max_kl = run.recipe["ppo"].get("max_kl")
        sections["Prompts held out"] = card_text.held_out_table(passes, max_kl)
    sections["Recipe"] = card_text.recipe_table(run.recipe)
    plots = card_plots.of_run(records, loss_unit)
    if args.prompts is not None:
        num_read = max(args.num_samples, args.num_scored)
        prompts = list(itertools.islice(PromptLines(args.prompts), num_read))
        hosts.require_agreement(
            prompts=[prompt._asdict() for prompt in prompts],
            step=run.step,
            options=vars(args),
        )
        dtype = run.recipe["train"]["compute_dtype"]
        model = card_answers.load(run.answering, args, dtype)
        if args.reference is not None:
            asked = prompts[: args.num_scored]
            told = card_answers.scored(model, asked, args)
            sections["Answers"] = card_text.answers_table(
                told, num_prompts=len(asked), reference=args.reference
            )
            plots += card_plots.of_answers(told)
        shown = card_answers.shown(model, prompts[: args.num_samples], args)
        sections["Samples"] = card_text.samples(shown)
        if run.answering != run.directory:  # it is not the newest
            what["answers are those of"] = str(run.answering)
            sections["What it is"] = card_text.facts(what)
    return Card(f"{run.stage.capitalize()}: {run.directory}", sections, plots)


def iteration_card(iteration: Iteration, num_samples: int) -> Card:
    """The card of an iteration of rejection sampling."""
    rewards = iteration.rewards()
    curve = reward_curve(rewards)
    num_prompts, num_answers = rewards.shape
    num_cut = num_learnable = 0
    shown = list[card_text.Sample]()
    for rollout in iteration.rollouts():
        num_cut += sum(not answer.is_whole for answer in rollout.answers)
        num_learnable += best_of(rollout) is not None
        if len(shown) < num_samples:
            shown.append(best_and_worst(rollout))
    what = {"stage": "rejection sampling", **asked_for(iteration.plan)}
    told = {
        "prompts": f"{num_prompts:,}",
        "answers": f"{rewards.size:,}",
        "mean reward": f"{rewards.mean():.4g}",
        f"best of {num_answers}": f"{curve.max[-1]:.4g}",
        "answers that were cut": f"{num_cut / rewards.size:.1%}",
        "prompts with an answer to learn from": f"{num_learnable:,}",
    }
    sections = {
        "What it is": card_text.facts(what),
        "Rewards": card_text.facts(told),
        "Reward curve": card_text.curve_table(curve),
        "Samples": card_text.samples(shown),
    }
    plots = card_plots.of_iteration(rewards, curve)
    return Card(f"Rejection sampling: {iteration.path}", sections, plots)


def rows_card(stage: str, made: Shards, num_samples: int) -> Card:
    """The card of rows to learn from, as Ghost Attention and distillation make them.

    Raises:
      DataError: there are none, or a file is damaged.
    """
    rows = list(made.lines(lambda line: json.loads(line)["messages"]))
    if not rows:
        raise DataError(f"{made.path} has no rows: no answer was one to learn from.")
    turns = [sum(m["role"] == "user" for m in messages) for messages in rows]
    lengths = [len(messages[-1]["content"]) for messages in rows]
    told = {
        "dialogs": f"{made.num_items:,}",
        "rows": f"{len(rows):,}",
        "turns of a row, on average": f"{np.mean(turns):.1f}",
        "turns of the longest": f"{max(turns):,}",
        "length of the learnt answer, characters on average": f"{np.mean(lengths):.1f}",
    }
    shown = [(row[:-1], {"Learnt": row[-1]["content"]}) for row in rows[:num_samples]]
    sections = {
        "What it is": card_text.facts({"stage": stage, **asked_for(made.plan)}),
        "Rows": card_text.facts(told),
        "Samples": card_text.samples(shown),
    }
    title = f"{stage[0].upper()}{stage[1:]}: {made.path}"
    return Card(title, sections, card_plots.of_rows(turns, lengths))


def asked_for(plan: Mapping[str, Any]) -> dict[str, object]:
    """What a manifest says of models and settings, in words."""
    return {label: plan[name] for name, label in _ASKED.items() if name in plan}


def best_and_worst(rollout: Rollout) -> card_text.Sample:
    """The prompt, with two of the answers to it and what they scored."""
    combined = rollout.scores.combined
    numbers = {"Best": int(np.argmax(combined)), "Worst": int(np.argmin(combined))}
    answers = dict[str, str]()
    for name, number in numbers.items():
        scores = ", ".join(
            f"{kind} {values[number]:.4g}"
            for kind, values in rollout.scores._asdict().items()
        )
        answer = rollout.answers[number]
        answers[f"{name}: {scores}{cut_mark(answer.is_whole)}"] = answer.text
    return rollout.prompt.messages, answers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
