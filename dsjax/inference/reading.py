"""Weights from disk to where programs read them: a process reads what its own devices hold, and one weight at a time.

What programs read is known first as shapes (`weights.arranged` of shapes). Each of their arrays is then made of pieces
of a checkpoint's arrays: a row of a stacked one is a layer's, a slot holds an expert's weights. So nothing is ever
stacked, cut or copied on a device, and no device holds for a moment what is another's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Int32, PyTree

from dsjax.checkpoint.arrays import Arrays, Index, of_blocks
from dsjax.checkpoint.blocks import BLOCK, quantize
from dsjax.config import ModelConfig
from dsjax.inference.layout import Layout, weight_spec
from dsjax.inference.replicas import Tables
from dsjax.inference.weights import arranged, check_blocks, moe_layers, tables_of_slots
from dsjax.model.layout import EDGES, stack
from dsjax.model.transformer import abstract_parameters
from dsjax.numerics.weights import PRODUCTS, Fp8Weight

AT_ONCE = 1 << 28
"""Bytes of a process's part of an array that are in its memory on their way to an accelerator."""
_ALIGNED = 64
"""Bytes at a multiple of which memory begins that a CPU device takes over as it is."""

type Read = Callable[[Index], tuple[np.ndarray, ...]]
"""Returns a part of each of some arrays, given as a part of the first."""


def read_weights(
    arrays: Arrays,
    config: ModelConfig,
    layout: Layout,
    held: Int32[np.ndarray, "L R"],
    shardings: Callable[[PartitionSpec], Sharding],
    dtype: DTypeLike,
    *,
    fp8: bool,
) -> tuple[PyTree, PyTree]:
    """Return the weights that programs read, and router biases, stacked, each where its device is.

    Args:
        arrays: of the model.
        held: the expert of each slot, in MoE layers and then in MTP modules.
        shardings: where an array is that is divided so.
        dtype: of what is not in FP8.
        fp8: whether products are. Codes and scales that the checkpoint has are taken as they are, other weights are
            quantized.

    Raises:
        ValueError: a layout that cuts through blocks of weights in FP8; weights that are not finite.
    """
    params, biases = (stack(tree, config) for tree in abstract_parameters(config))
    wanted = jax.eval_shape(lambda tree: arranged(tree, config, layout, held, dtype, fp8=fp8), params)
    check_blocks(wanted, layout)
    sparse = moe_layers(config)
    held_in = {"moe": held[:sparse], "mtp": held[sparse:]}

    def made(tree: str, path: tuple, leaf: Any) -> Any:
        names = [key.key for key in path]
        rows = held_in.get(names[0], held)
        if isinstance(leaf, Tables):
            found = tables_of_slots(rows, config, layout)
            whole = shardings(PartitionSpec())
            return Tables(*(_made((part,), whole, lambda index, part=part: (part[index],))[0] for part in found))
        pieces = partial(_pieces, tree=tree, names=names, held=rows, config=config)
        if not isinstance(leaf, Fp8Weight):
            read = partial(_read_values, arrays, pieces, leaf)
            return _made((leaf,), shardings(weight_spec(path)), read)[0]
        read = partial(_read_codes, arrays, pieces, leaf)
        codes, scales = _made((leaf.codes, leaf.scales), shardings(weight_spec(path)), read)
        return jax.tree.unflatten(jax.tree.structure(leaf), (codes, scales))

    def is_one(leaf: Any) -> bool:
        return isinstance(leaf, (Fp8Weight, Tables))

    return (
        jax.tree_util.tree_map_with_path(partial(made, "params"), wanted, is_leaf=is_one),
        jax.tree_util.tree_map_with_path(partial(made, "biases"), biases),
    )


def fp8_weights_kept(arrays: Arrays) -> tuple[int, int]:
    """Return how many of the arrays that programs read in FP8 are taken as they are stored, and how many there are."""
    names = [path for path in arrays.shapes if path.split("/")[-1] in PRODUCTS and not path.endswith("/kv_b")]
    return sum(_is_kept(arrays, path) for path in names), len(names)


def _is_kept(arrays: Arrays, path: str) -> bool:
    """Whether codes and scales are as programs read them: with the rows of gate and up in one matrix, no block may have
    rows of both."""
    return arrays.is_fp8(path) and not (path.endswith("/gate_up") and arrays.shapes[path][-2] % BLOCK)


def _pieces(
    index: Index,
    *,
    tree: str,
    names: Sequence[str],
    held: Int32[np.ndarray, "L R"],
    config: ModelConfig,
) -> Iterator[tuple[tuple[int, ...], str, Index]]:
    """Yield, for each piece of the part [index] of a stacked array, its place there, and of which array it is which
    part.

    Args:
        tree: "params" or "biases".
        names: of the stacked array, from the root.
        held: the expert of each slot, in the layers of the array.
    """
    group, *rest = names
    if group in EDGES:
        yield (), f"{tree}/{group}", index
        return
    first = {"dense": "layers/0", "moe": f"layers/{config.first_k_dense_replace}", "mtp": "mtp/0"}[group]
    parent, number = first.split("/")
    rows, *others = index
    for at, row in enumerate(range(rows.start, rows.stop)):
        path = "/".join((tree, parent, str(int(number) + row), *rest))
        if "experts" not in rest:
            yield (at,), path, tuple(others)
            continue
        slots, *of_expert = others
        for place, expert in enumerate(held[row, slots].tolist()):
            if expert == config.n_routed_experts:
                yield (at, place), path.replace("/experts/", "/shared/"), tuple(of_expert)
            else:
                yield (at, place), path, (slice(expert, expert + 1), *of_expert)


def _read_values(arrays: Arrays, pieces: Callable, leaf: jax.ShapeDtypeStruct, index: Index) -> tuple[np.ndarray]:
    out = _empty(index, leaf.dtype)
    for at, path, part in pieces(index):
        arrays.read(path, part, leaf.dtype, out[at])
    return (out,)


def _read_codes(arrays: Arrays, pieces: Callable, leaf: Fp8Weight, index: Index) -> tuple[np.ndarray, np.ndarray]:
    codes = _empty(index, leaf.codes.dtype)
    scales = _empty(of_blocks(index, leaf.codes.shape), leaf.scales.dtype)
    if leaf.pair:  # Gate and up are two matrices in a checkpoint, both of them whole on a device.
        *lead, rows, columns = index
        index = (*lead, slice(0, 2), slice(0, rows.stop // 2), columns)
    for at, path, part in pieces(index):
        if _is_kept(arrays, path):
            found = arrays.read_codes(path, part)
        else:
            weight = arrays.read(path, part, np.float32)
            found = quantize(weight.reshape(-1, weight.shape[-1]))
        for out, piece in zip((codes, scales), found, strict=True):
            out[at] = piece.reshape(out[at].shape)
    return codes, scales


def _empty(index: Index, dtype: Any) -> np.ndarray:
    """Return memory for the part [index] of an array."""
    shape, dtype = [part.stop - part.start for part in index], np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def _made(wanted: tuple[Any, ...], sharding: Sharding, read: Read) -> tuple[jax.Array, ...]:
    """Return arrays of these shapes, divided alike, of parts that are read.

    A CPU's arrays are the memory that they are read into. On their way elsewhere, little of them is here at once.
    """
    rows = wanted[0].shape[0]
    per_row = sum(prod(sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in wanted) // rows
    here = sharding.addressable_devices
    size = max(1, AT_ONCE // max(1, per_row * len(here)))
    is_divided = sharding.shard_shape(wanted[0].shape)[0] < rows
    if is_divided or size >= rows or _takes_memory_over(next(iter(here))):
        return jax.block_until_ready(_put(wanted, sharding, read, 0, rows))
    empty = jax.jit(lambda: tuple(jnp.zeros(one.shape, one.dtype) for one in wanted), out_shardings=sharding)
    whole = empty()
    for start in range(0, rows, size):
        part = _put(wanted, sharding, read, start, min(start + size, rows))
        whole = jax.block_until_ready(_write(whole, part, start))
    return whole


def _takes_memory_over(device: jax.Device) -> bool:
    return device.platform == "cpu"


@partial(jax.jit, donate_argnums=0)
def _write(whole: PyTree, part: PyTree, start: int) -> PyTree:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=0), whole, part)


def _put(wanted: tuple[Any, ...], sharding: Sharding, read: Read, start: int, stop: int) -> tuple[jax.Array, ...]:
    """Return rows of arrays; devices that hold the same are given what has been read once."""
    shapes = [(stop - start, *one.shape[1:]) for one in wanted]
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shapes[0]).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shapes[0], strict=True))
        holders.setdefault(bounds, []).append(device)
    parts: list[list[jax.Array]] = [[] for _ in wanted]
    for (rows, *others), devices in holders.items():
        index = (slice(start + rows[0], start + rows[1]), *(slice(*bounds) for bounds in others))
        for found, part in zip(parts, read(index), strict=True):
            found += [jax.device_put(part, device) for device in devices]
    return tuple(
        jax.make_array_from_single_device_arrays(shape, sharding, found)
        for shape, found in zip(shapes, parts, strict=True)
    )
