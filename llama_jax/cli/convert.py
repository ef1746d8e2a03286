"""`llama-jax convert SOURCE TARGET --to FORMAT`: a checkpoint in another format."""

import dataclasses
from collections.abc import Sequence

import tyro

from llama_jax.conversion.converter import Conversion, To, convert, make_plan
from llama_jax.model import num_params
from llama_jax.progress import bytes_progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint to another format, in little memory, and prove it.

    Started again after it was stopped, it goes on where it was.

    Attributes:
      source: Meta's directory or Hugging Face's, what `save` wrote, or the work
        directory of a run.
      target: a directory that is empty or does not exist.
      to: the format of the result.
      model_parallel: shards of Meta's format; 1 if not given.
      dtype: bfloat16, float16 or float32; that of the source, if not given.
      overwrite: replace what is at the target, once the new one is whole (in a bucket,
        before).
      strict: refuse weights that are NaN or infinite, which otherwise is a warning.
      no_verify: do not read the result back to compare digests and logits.
      tokenizer: tokenizer.model, if it is not beside the source's weights.
      max_length: the context in tokens, where the source does not say.
      dry_run: say what would be converted, and stop.
    """

    source: tyro.conf.Positional[str]
    target: tyro.conf.Positional[str]
    to: To
    model_parallel: int | None = None
    dtype: str | None = None
    overwrite: bool = False
    strict: bool = False
    no_verify: bool = False
    tokenizer: str | None = None
    max_length: int = 4096
    dry_run: bool = False


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax convert",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    settings = {
        "to": options.to,
        "model_parallel": options.model_parallel,
        "dtype": options.dtype,
        "overwrite": options.overwrite,
        "max_length": options.max_length,
        "tokenizer": options.tokenizer,
    }
    if options.dry_run:
        plan = make_plan(options.source, options.target, **settings)
        print(
            f"{plan.source.directory}: {plan.source.format}, "
            f"{num_params(plan.source.config):,} parameters, {plan.source.dtype}; "
            f"to {plan.target}: {plan.to}, {plan.dtype}, {plan.num_bytes / 1e9:.2f} GB"
        )
        return 0
    with bytes_progress() as watch:
        done = convert(
            options.source,
            options.target,
            **settings,
            verify=not options.no_verify,
            strict=options.strict,
            watch=watch,
        )
    print(_report(done))
    return 0


def _report(done: Conversion) -> str:
    size, manifest = done.num_bytes / 1e9, done.manifest
    lines = [
        f"{done.target}: {done.source} to {manifest.format}, {manifest.dtype}, "
        f"{size:.2f} GB in {done.seconds:.1f} s ({size / done.seconds:.2f} GB/s)"
    ]
    if done.num_resumed:
        lines.append(
            f"gone on with: {done.num_resumed} of {len(manifest.digests)} weights were "
            "there, and are as they were"
        )
    if done.proof_seconds is None:
        lines.append("not read back (--no-verify)")
    else:
        lines.append(
            f"read back in {done.proof_seconds:.1f} s: every weight is as it was read, "
            f"logits of both ends agree to {done.logits_apart:.1e}"
        )
    lines.append(f"weights' sha256 {manifest.fingerprint}")
    return "\n".join(lines)
