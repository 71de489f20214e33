"""The rules by which arrays are divided, and the two collectives that follow from them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig
from dsjax.model.transformer import abstract_parameters
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import gather, partition, partitions, place, reduce_scatter, specs
from dsjax.settings import load_model_config


def path(text):
    return tuple(SimpleNamespace(key=name) for name in text.split("/"))


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("embed", (64, 32), P(("data", "node", "local"), None)),
        ("moe/attention/q_b", (8, 24, 16), P(None, ("data", "node", "local"), None)),
        ("layers/3/attention/q_b", (24, 16), P(("data", "node", "local"), None)),
        ("mtp/0/proj", (32, 64), P(None, ("data", "node", "local"))),
        ("mtp/proj", (8, 32, 64), P(None, None, ("data", "node", "local"))),
        ("moe/moe/experts/gate_up", (3, 8, 2, 16, 32), P(None, ("node", "local"), None, None, ("data",))),
        ("layers/3/moe/experts/down", (8, 32, 16), P(("node", "local"), ("data",), None)),
        ("norm", (12,), P(("node", "local"))),  # not divisible by 8
        ("norm", (3,), P(None)),
    ],
)
def test_where_arrays_live(name, shape, spec):
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    assert partition(path(name), shape, mesh).spec(len(shape)) == spec


def test_every_array_of_the_released_model_is_divided():
    """On 128 devices of a stage, 2 x 8 x 8: nothing but what is too small stays whole."""
    params, _ = abstract_parameters(load_model_config("v3_671b"))
    sizes = {"pipe": 1, "data": 2, "node": 8, "local": 8}
    divided = partitions(params, SimpleNamespace(shape=sizes))
    for at in jax.tree.leaves(divided):
        assert not at.copies and np.prod([sizes[axis] for axis in at.owned + at.zero]) == 128


def test_gather_and_reduce_scatter_are_transposes_and_a_sum():
    """Each device's gradient differs: a part must be the sum over all devices that use the weight."""
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    tree = {
        "embed": jnp.arange(64.0).reshape(16, 4),
        "norm": jnp.arange(12.0),
        "tiny_norm": jnp.arange(3.0),
        "moe": {"moe": {"experts": {"down": jnp.arange(4 * 6 * 5.0).reshape(1, 4, 6, 5)}}},
    }
    divided, where = partitions(tree, mesh), specs(tree, mesh)

    def on_device(parts):
        whole = gather(parts, divided)
        number = jax.lax.axis_index(("data", "node", "local")) + 1.0
        return reduce_scatter(jax.tree.map(lambda leaf: leaf * number, whole), divided)

    placed = jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), where))
    found = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(where,), out_specs=where, check_vma=False))(placed)
    for name in ("embed", "norm", "tiny_norm"):
        np.testing.assert_array_equal(found[name], 36 * tree[name])  # 1 + ... + 8
    # Expert e belongs to devices e and e + 4 in both data replicas: their numbers add to 2 e + 6.
    down = tree["moe"]["moe"]["experts"]["down"]
    np.testing.assert_array_equal(
        found["moe"]["moe"]["experts"]["down"], down * (2 * jnp.arange(4.0) + 6)[None, :, None, None]
    )


def test_a_process_reads_the_rows_of_its_devices():
    mesh = make_mesh(MeshConfig(data=2, node=2, local=2))
    asked = []

    def rows(first, count):
        asked.append((first, count))
        return np.arange(first, first + count)[None, :, None] + 100 * np.arange(3)[:, None, None]

    placed = place(rows, (3, 16, 1), 1, mesh)
    assert sorted(asked) == [(first, 2) for first in range(0, 16, 2)]
    np.testing.assert_array_equal(placed[..., 0], np.arange(16) + 100 * np.arange(3)[:, None])


def test_a_mesh_that_does_not_fit_shows_the_arithmetic():
    with pytest.raises(
        ValueError,
        match=r"^mesh.pipe x mesh.data x mesh.node x mesh.local = 1 x 2 x 4 x 4 = 32 devices: there are 8$",
    ):
        make_mesh(MeshConfig(data=2, node=4, local=4))
    assert make_mesh(MeshConfig(data=2)).size == 2
    two_processes = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=r"= 1 x 2 x 1 x 1 = 2 devices: there are 8 in 2 processes, and none may be"):
        make_mesh(MeshConfig(data=2), two_processes)
