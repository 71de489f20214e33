"""Collectives read off programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.planning.hlo import collectives

MESH = MeshConfig(node=2, local=4)


def compiled(function, spec=None):
    mesh = make_mesh(MESH)
    spec = spec or P(("node", "local"))
    f = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(f).lower(jnp.zeros((64, 16), jnp.int16)).compile().as_text()


@pytest.mark.parametrize(
    ("axis", "groups"),
    [
        ("node", {(0, 4), (1, 5), (2, 6), (3, 7)}),
        ("local", {(0, 1, 2, 3), (4, 5, 6, 7)}),
        (("node", "local"), {tuple(range(8))}),
    ],
)
def test_an_all_to_all(axis, groups):
    def exchange(x):
        with jax.named_scope("here"):
            return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)

    (found,) = collectives(compiled(exchange))
    assert (found.kind, found.nbytes) == ("all-to-all", 8 * 16 * 2)
    assert {tuple(sorted(group)) for group in found.groups} == groups
    assert "/here/" in found.op_name
    far = found.bytes_sent(lambda a, b: a // 4 != b // 4)
    assert far == {"node": 128, "local": 0}.get(axis, 128)
    assert found.bytes_sent(lambda a, b: a != b) == found.nbytes * (1 - 1 / len(found.groups[0]))


def test_others():
    text = compiled(lambda x: jax.lax.psum(x.astype(jnp.float32), "local").astype(jnp.int16))
    (found,) = collectives(text)
    assert (found.kind, found.nbytes) == ("all-reduce", 8 * 16 * 4)
    with pytest.raises(ValueError, match="all-reduce"):
        found.bytes_sent(lambda a, b: True)


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ],
)
def test_notations_of_groups(notation, groups):
    line = f"  %x = bf16[4,8]{{1,0}} all-to-all(%y), replica_groups={notation}, dimensions={{0}}"
    (found,) = collectives(line)
    assert (found.kind, found.nbytes, found.groups) == ("all-to-all", 64, groups)


@pytest.mark.parametrize(
    "result",
    [
        "((bf16[4,8]{1,0}), bf16[4,8]{1,0})",
        "(bf16[4,8]{1,0}, bf16[4,8]{1,0:S(7)})",
        "((bf16[4,8]{1,0}, bf16[4,8]{1,0:S(7)}, s64[8]{0}, /*index=5*/s64[8]{0}), bf16[4,8]{1,0:S(7)})",
    ],
)
def test_a_start_holds_its_operands(result):
    (found,) = collectives(f"  %x.1 = {result} ragged-all-to-all-start(%y), replica_groups={{{{0,1}}}}")
    assert (found.kind, found.nbytes) == ("ragged-all-to-all", 64)
