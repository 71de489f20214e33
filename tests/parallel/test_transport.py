"""Messages of several arrays, whatever their formats, arrive as they were sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.transport import move

N, SLOTS = 4, 3
FORMATS = [
    [(jnp.float8_e4m3fn, (8,)), (jnp.float32, (2,)), (jnp.int16, (2, 3))],
    [(jnp.bfloat16, (5,)), (jnp.float32, ()), (jnp.uint8, (2,))],
    [(jnp.uint8, (3,)), (jnp.bfloat16, (1,)), (jnp.float32, (3,))],
    [(jnp.int32, (7,))],
]


@pytest.mark.parametrize("formats", FORMATS, ids=["words of 4 bytes", "of 2", "of 1", "one array"])
@pytest.mark.parametrize("transport", ["padded", "gather", "ragged"])
def test_a_message_arrives(transport, formats):
    rng = np.random.default_rng(0)
    used = rng.integers(0, SLOTS + 1, (N, N))  # by sender and receiver
    in_use = np.arange(SLOTS) < used[..., None]

    def drawn(dtype, shape):
        numbers = rng.integers(1, 100, (N, N, SLOTS, *shape))
        return jnp.asarray(np.where(in_use.reshape(N, N, SLOTS, *[1] * len(shape)), numbers, 0)).astype(dtype)

    payload = [drawn(*leaf) for leaf in formats]

    def on_device(payload, sent, received):
        own = jax.tree.map(lambda leaf: leaf[0], payload)
        return jax.tree.map(lambda leaf: leaf[None], move(own, sent[0], received[0], axis="local", transport=transport))

    mesh = make_mesh(MeshConfig(local=N))
    exchanged = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=P("local"), out_specs=P("local"), check_vma=False))
    found = exchanged(payload, jnp.asarray(used, jnp.int32), jnp.asarray(used.T, jnp.int32))
    for sent, got in zip(payload, found, strict=True):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(np.float32(got), np.float32(jnp.swapaxes(sent, 0, 1)))
