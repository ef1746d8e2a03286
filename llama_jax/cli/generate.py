"""`llama-jax generate CHECKPOINT`: let a model write."""

import dataclasses
import json
from collections.abc import Sequence

import tyro

from llama_jax.cli.writer import Writer, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Writer):
    """Let a model write.

    Attributes:
      prompt: texts to go on from; several are continued at once.
      num_samples: answers to each prompt, which is read only once.
      json: one JSON object an answer, with tokens, log-probabilities and timing.
    """

    prompt: tuple[str, ...] = ("",)
    num_samples: int = 1
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax generate",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    settings = options.settings()
    prompts, num_samples = options.prompt, options.num_samples
    if options.dry_run:
        print(f"{options.summary()}; {len(prompts)} prompts, {settings.sampler}")
        return 0
    llm = options.load()
    if len(prompts) == num_samples == 1 and not options.json:
        pieces = llm.stream(prompts[0], **vars(settings))
        show(prompts[0])
        for piece in pieces:
            show(piece)
        print()
        return 0
    completions = llm.generate(prompts, num_samples=num_samples, **vars(settings))
    of_each = [prompt for prompt in prompts for _ in range(num_samples)]
    for prompt, completion in zip(of_each, completions, strict=True):
        if options.json:
            fields = {"prompt": prompt, **dataclasses.asdict(completion)}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            show(f"{prompt}{completion.text}\n\n")
    return 0
