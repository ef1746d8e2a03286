"""The options of the command line are a list in a file, so that growth is deliberate.

After a wanted change: python -m tests.architecture.test_options
"""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

from llama_jax.cli import (
    COMMANDS,
    chat,
    convert,
    data,
    generate,
    inspect,
    plan,
    sample,
    train,
)
from llama_jax.config.recipe import (
    PpoRecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
)

GOLDEN = Path(__file__).with_name("options.txt")
OPTIONS = {
    "train": train.Options[PretrainRecipe],
    "train sft": train.Options[SftRecipe],
    "train reward": train.Options[RewardRecipe],
    "train ppo": train.Options[PpoRecipe],
    "plan": plan.Options,
    "generate": generate.Options,
    "chat": chat.Options,
    "convert": convert.Options,
    "inspect": inspect.Options,
    "data tokenizer": data.TokenizerStep,
    "data prepare": data.PrepareStep,
    "data dialogs": data.DialogsStep,
    "data comparisons": data.ComparisonsStep,
    "data prompts": data.PromptsStep,
    "sample answers": sample.AnswersStep,
    "sample pool": sample.PoolStep,
    "sample ghost": sample.GhostStep,
    "sample distil": sample.DistilStep,
}


def options(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(typing.get_origin(cls) or cls)
    if given := typing.get_args(cls):
        (hints["fields"],) = given
    for field in dataclasses.fields(typing.get_origin(cls) or cls):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            # The recipe itself has no name: its parts stand at the top.
            inner = "" if name == "fields" else f"{prefix}{name}."
            yield from options(hints[field.name], inner)
        else:
            yield f"{prefix}{name}"


def listed() -> str:
    return "".join(
        f"{command} {option}\n"
        for command, cls in OPTIONS.items()
        for option in options(cls)
    )


def test_every_command_is_listed():
    assert {command.split()[0] for command in OPTIONS} == set(COMMANDS)


def test_every_command_has_a_dry_run():
    for command in OPTIONS:
        assert f"{command} dry-run\n" in listed()


def test_no_option_comes_or_goes_by_accident():
    assert listed() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(listed())
