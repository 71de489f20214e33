"""The checksum sees every flipped bit and every swap, and nothing of where an array lives."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.checkpoint.checksum import _on_device, checksums

DTYPES = [
    np.float32, np.int32, np.uint32, np.uint8, np.int8, np.bool_, np.float16,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip


def _array(dtype, shape, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype is np.bool_:
        return (bits[..., 0] & 1).astype(np.bool_)
    return bits.view(dtype)[..., 0]


def _sum(array):
    return checksums({"x": array})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5)])
def test_host_and_device_agree(dtype, shape):
    array = np.asarray(_array(dtype, shape))
    assert _sum(array) == _sum(jnp.asarray(array)) == int(_on_device(jnp.asarray(array)))


@pytest.mark.parametrize(
    "spec", [P(), P("r"), P(None, "c"), P("c", "r"), P(("r", "c"), None, None), P(None, None, "r")]
)
def test_no_mesh_changes_it(spec):
    mesh = jax.make_mesh((4, 2), ("r", "c"), axis_types=(AxisType.Auto,) * 2)
    array = _array(ml_dtypes.bfloat16, (8, 4, 12))
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    assert int(_on_device(placed)) == _sum(placed) == _sum(array)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_eight_byte_numbers_on_the_host(dtype):
    array = _array(dtype, (4, 3))
    changed = array.copy()
    changed.view(np.uint64)[2, 1] ^= np.uint64(1) << np.uint64(40)
    assert _sum(array) != _sum(changed)
    assert _sum(np.asarray(array[0, 0])) != _sum(np.asarray(changed[2, 1]))


def test_host_arrays_are_read_in_pieces_without_a_difference(monkeypatch):
    array = _array(np.float32, (37, 5, 3))
    whole = _sum(array)
    for block in (1, 4, 20, 60):
        monkeypatch.setattr("dsjax.checkpoint.checksum._BLOCK", block)
        assert _sum(array) == whole
    assert _sum(np.asfortranarray(array)) == whole


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_every_single_flipped_bit_changes_it(dtype):
    array = _array(dtype, (6, 5))
    unsigned = array.view(f"u{array.itemsize}")
    before, sums = _sum(array), set()
    for bit in range(8 * array.itemsize):
        for at in np.ndindex(array.shape):
            changed = unsigned.copy()
            changed[at] ^= changed.dtype.type(1 << bit)
            sums.add(_sum(changed.view(dtype)))
    assert before not in sums


def test_swaps_change_it():
    array = _array(np.float32, (6, 6))
    swapped = array.copy()
    swapped[1, 2], swapped[4, 5] = array[4, 5], array[1, 2]
    assert len({_sum(a) for a in (array, array.T, array[::-1], array[:, ::-1], np.roll(array, 1, 0), swapped)}) == 6


def test_infinities_nans_and_the_sign_of_zero_count():
    plain = np.zeros(4, np.float32)
    others = [np.float32(value) for value in (-0.0, np.inf, -np.inf, np.nan)]
    assert len({_sum(np.r_[plain[:3], value].astype(np.float32)) for value in [np.float32(0), *others]}) == 5


def test_prng_keys_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"state/key: .*jax\.random\.key_data"):
        checksums({"state/key": jax.random.key(0)})
