"""`llama-jax generate CHECKPOINT`: let a model write."""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import tyro

import llama_jax
from llama_jax.config.sampling import TopP
from llama_jax.conversion import open_checkpoint
from llama_jax.model import num_params
from sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Let a model write.

    Attributes:
      checkpoint: Meta's directory, what `save` wrote, or the work directory of a run.
      prompt: texts to go on from; several are continued at once.
      max_new_tokens: tokens after each prompt, at most.
      temperature: 0 always takes the likeliest token.
      top_p: draw among the likeliest tokens that together have this probability.
      seed: the same seed writes the same text.
      dtype: float32 or bfloat16; that of the files, if not given.
      tensor: devices that each layer is split over.
      tokenizer: tokenizer.model, if it is not beside the weights.
      max_length: the context in tokens, where the files do not say.
      json: one JSON object a prompt, with tokens and log-probabilities.
      dry_run: say what would be loaded, and stop.
    """

    checkpoint: tyro.conf.Positional[str]
    prompt: tuple[str, ...] = ("",)
    max_new_tokens: int = 128
    temperature: float = 0.6
    top_p: float = 0.9
    seed: int = 0
    dtype: str | None = None
    tensor: int = 1
    tokenizer: str | None = None
    max_length: int = 4096
    json: bool = False
    dry_run: bool = False


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax generate",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    sampler = TopP(options.top_p, temperature=options.temperature)
    if options.dry_run:
        source = open_checkpoint(options.checkpoint, max_length=options.max_length)
        print(
            f"{options.checkpoint}: {num_params(source.config):,} parameters, "
            f"{source.dtype}; {len(options.prompt)} prompts, {sampler}"
        )
        return 0
    mesh = make_mesh(
        MeshConfig(fsdp=1, tensor=options.tensor), jax.devices()[: options.tensor]
    )
    llm = llama_jax.load(
        options.checkpoint,
        mesh=mesh,
        dtype=options.dtype,
        max_length=options.max_length,
        tokenizer=options.tokenizer,
    )
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "sampler": sampler,
        "seed": options.seed,
    }
    if len(options.prompt) == 1 and not options.json:
        pieces = llm.stream(options.prompt[0], **settings)
        sys.stdout.write(options.prompt[0])
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return 0
    for prompt, completion in zip(
        options.prompt, llm.generate(options.prompt, **settings), strict=True
    ):
        if options.json:
            fields = {"prompt": prompt, **dataclasses.asdict(completion)}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(f"{prompt}{completion.text}\n")
    return 0
