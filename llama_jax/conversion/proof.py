"""That a checkpoint holds what was converted: digests, and logits of both ends."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax

from llama_jax.conversion import names, verify
from llama_jax.conversion.detect import AnyCheckpoint
from llama_jax.conversion.manifest import Manifest, digest
from llama_jax.conversion.meta import verify_checklist
from llama_jax.conversion.stored import listed
from llama_jax.conversion.transfer import NUM_WORKERS, Progress, Watch
from llama_jax.errors import CheckpointError
from sharding import hosts


def require_files(
    checkpoint: AnyCheckpoint, *, given_up: threading.Event | None = None
) -> None:
    """Compare files with the digests that their format has: Meta's checklist.

    Hosts share the files out among them. Ends early once `given_up` is set.

    Raises:
      CheckpointError: one is damaged.
      ShardingError: another host says so.
    """
    if checkpoint.format != "meta":
        return
    with hosts.failing_together():
        verify_checklist(
            checkpoint.directory,
            share=jax.process_index(),
            of=jax.process_count(),
            given_up=given_up,
        )


def read_digests(checkpoint: AnyCheckpoint, *, watch: Watch) -> dict[str, str]:
    """Read every weight, and return the digest of each by its Hugging Face name.

    Raises:
      CheckpointError: files are damaged or missing.
    """
    weights = [
        weight
        for weight in names.weights(checkpoint.config)
        if checkpoint.head == "unembed" or weight.parameter.path != "unembed/kernel"
    ]
    progress = Progress("verify", weights, checkpoint, checkpoint.dtype, watch)

    def read(weight: names.Weight) -> tuple[str, str]:
        found = digest(checkpoint, weight)
        progress.add_weight(weight)
        return weight.name, found

    if checkpoint.head == "scalar":  # which has no name in other programs' files
        checkpoint.read("scalar/kernel")
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        return dict(pool.map(read, weights))


def require_digests(
    checkpoint: AnyCheckpoint, found: Mapping[str, str], manifest: Manifest
) -> None:
    """Compare digests with those of a manifest.

    Raises:
      CheckpointError: one differs; names it.
    """
    if str(checkpoint.dtype) != manifest.dtype or found.keys() != set(manifest.digests):
        raise CheckpointError(
            f"{checkpoint.directory} is not what its manifest describes: files are of "
            "another model. Convert or copy it again."
        )
    wrong = [
        stored_name(checkpoint, weight)
        for weight in names.weights(checkpoint.config)
        if found[weight.name] != manifest.digests[weight.name]
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.directory} is damaged: {listed(wrong)} differ from what was "
            "converted. Convert or copy it again."
        )


def require_same_logits(source: AnyCheckpoint, result: AnyCheckpoint) -> float:
    """Compute logits of both, each in its own layout; returns how far they are apart.

    Raises:
      CheckpointError: further than equal weights can be.
    """
    with ThreadPoolExecutor(2) as pool:
        theirs, ours = pool.map(
            lambda end: verify.logits(end, dtype=result.dtype), (source, result)
        )
    apart = verify.difference(theirs, ours)
    if not apart <= verify.LOGITS_TOLERANCE:
        raise CheckpointError(
            f"the logits of {source.directory} and of the result differ by {apart:.2g} "
            "relative to the largest, where equal weights differ by at most "
            f"{verify.LOGITS_TOLERANCE:g}: weights were read or written in a wrong "
            "order. The result was not put in place; please report this."
        )
    return apart


def stored_name(checkpoint: AnyCheckpoint, weight: names.Weight) -> str:
    """What a weight is called in a checkpoint's own files."""
    if checkpoint.format == "orbax":
        layer = "" if weight.layer is None else f"[{weight.layer}]"
        return weight.parameter.path + layer
    return weight.stored_name(checkpoint.form(weight.parameter))
