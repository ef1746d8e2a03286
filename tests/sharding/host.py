"""One host of two, run as a process of its own by test_hosts.py.

Prints one JSON object: what this host found.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sharding import (
    MeshConfig,
    ShardingError,
    array_sharding,
    hosts,
    make_mesh,
    training_rules,
)


def main() -> None:
    hosts.start()
    hosts.start()  # once joined, a second call has nothing to do
    me, num_hosts = jax.process_index(), jax.process_count()
    mesh = make_mesh(MeshConfig())
    sharding = array_sharding(
        training_rules(sequence_parallel=False), mesh, "batch", "sequence"
    )
    # Rows 0 to 3 are the first host's, 4 to 7 the second's.
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 12 * me
    batch = hosts.global_rows({"tokens": rows}, sharding)["tokens"]
    weights = jnp.arange(8, dtype=jnp.float32)[:, None]
    total, weighted = jax.jit(lambda x: (x.sum(), (x * weights).sum()))(batch)

    hosts.require_agreement(recipe={"steps": 10, "lr": 1e-4}, code="abc")
    complaint = ""
    try:
        hosts.require_agreement(recipe={"steps": 10}, data=f"digest {me}", code="abc")
    except ShardingError as error:
        complaint = str(error)
    found = {
        "hosts": num_hosts,
        "devices": len(jax.devices()),
        "local_devices": len(jax.local_devices()),
        "shape": batch.shape,
        "total": float(total),
        "weighted": float(weighted),
        "complaint": complaint,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
