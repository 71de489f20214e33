"""The backward pass of a chunk of layers, cut in two: what the previous stage waits for, and what only weights need.

A schedule runs four pieces of a chunk at times of its own (zero bubble, arXiv 2401.10241; DualPipe, report section
3.2.1):

    y, aux, residuals = fwd(params, x, ctx)
    dx, totals        = bwd(params, residuals, ctx, dy, totals)     or, at two different times,
    dx, tape          = bwd_input(params, residuals, ctx, dy)
    totals            = bwd_weight(params, tape, ctx, totals)

The gradients of `params` are added to `totals`, which are float32: sums over micro-batches.

All are slices of one list of equations: `jax.vjp` of the chunk is traced once, calls (jit, checkpoint, custom
derivatives) are written out, and each piece keeps the equations that its results depend on. So a chunk is an ordinary
function: rematerialization is its own affair, by `jax.checkpoint` and its policies, and a kernel takes part if its
backward rule has separate equations for the gradients of inputs and of weights.

What lies between the pieces:

- Residuals are what `jax.vjp` keeps of the forward pass, each value once, and nothing that follows from `params` and
  `ctx` alone: both are there again at backward time, and casts of weights are made again instead of kept.
- The tape is what the weights' products read (their inputs and the cotangents of their outputs), and those gradients
  that take no product, such as the gains of norms, ready. Of values that are casts or other layouts of each other, the
  ones that take least memory are kept, on the tape as among the residuals.
- `bwd_weight` holds the products (`equations.PRODUCTS`) that `dx` does not need, and what follows from them;
  collectives stay in `bwd_input` unless they follow from such a product.

Loops (`lax.scan`, `lax.while_loop`) are units: one that makes gradients of inputs and of weights runs in `bwd_input`
and leaves the latter on the tape, so layers should be unrolled. A `lax.cond` that has products for both is in both
pieces, in each without what only the other needs. That is for the overflow of the expert exchange
(`parallel.exchange`), whose backward pass makes the gradient of all experts: on the tape these would be as large as the
parameters, for each micro-batch in flight and usually zero. In `bwd_weight` it needs the tokens, their cotangent and
their routing, which are on the tape anyway or small. The price is paid by an overflow only: its exchange runs once
more, with the all-to-alls that this takes, under a predicate on which all devices of the exchange agree. And what a
`lax.cond` makes of a gradient in one case, where it is zero in the other, is added to the totals inside of it
(`totals`), and in their memory (`in_place`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dsjax.pipeline.equations import as_function, reads, variables
from dsjax.pipeline.in_place import in_place
from dsjax.pipeline.listing import Listing
from dsjax.pipeline.totals import added

Chunk = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""`chunk(params, x, ctx) -> (y, aux)`: `x`, `y` are what passes from stage to stage, `ctx` is not differentiated, and
`aux` only reported."""


@dataclass(frozen=True)
class SplitVJP:
    """The pieces of a chunk, for arrays of the shapes that it was split for.

    Each raises ValueError for arguments of another structure, shape or type.
    """

    fwd: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, tuple[Array, ...]]]
    """`fwd(params, x, ctx) -> y, aux, residuals`"""
    bwd: Callable[[PyTree, tuple[Array, ...], PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """`bwd(params, residuals, ctx, dy, totals) -> dx, totals`"""
    bwd_input: Callable[[PyTree, tuple[Array, ...], PyTree, PyTree], tuple[PyTree, tuple[Array, ...]]]
    """`bwd_input(params, residuals, ctx, dy) -> dx, tape`"""
    bwd_weight: Callable[[PyTree, tuple[Array, ...], PyTree, PyTree], PyTree]
    """`bwd_weight(params, tape, ctx, totals) -> totals`"""
    residual_avals: tuple[jax.ShapeDtypeStruct, ...]
    tape_avals: tuple[jax.ShapeDtypeStruct, ...]
    y_avals: PyTree[jax.ShapeDtypeStruct]
    aux_avals: PyTree[jax.ShapeDtypeStruct]


def split_vjp(chunk: Chunk, params: PyTree, x: PyTree, ctx: PyTree) -> SplitVJP:
    """Return the pieces of a chunk for arguments like these: arrays, tracers or `jax.ShapeDtypeStruct`.

    Inside `shard_map(check_vma=False)`, call it there. The results are those of `jax.vjp(chunk, params, x)`.

    Raises:
        ValueError: a leaf of `params`, `x` or `y` that is not floating-point; a chunk that returns no pair, whose `y`
            does not depend on `x`, whose `aux` has a derivative, or that has side effects, such as debug callbacks.
    """
    _check_floating("params", params)
    _check_floating("x", x)
    vjp_structure = None

    def forward(params: PyTree, x: PyTree, ctx: PyTree) -> tuple[PyTree, PyTree, list[Array]]:
        nonlocal vjp_structure
        out, vjp = jax.vjp(lambda params, x: chunk(params, x, ctx), params, x)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"a chunk should return a pair (y, aux), not {jax.tree.structure(out)}")
        y, aux = out
        _check_floating("y", y)
        _, of_aux = _divided(jax.tree.leaves(vjp.out_nzs), y, aux)  # the tree of `out_nzs` differs by version
        for (path, _), nonzero in zip(_leaves(aux), of_aux, strict=True):
            if nonzero:
                raise ValueError(
                    f"aux{jax.tree_util.keystr(path)} of a chunk has a derivative, which would be lost: should be "
                    "under `jax.lax.stop_gradient`"
                )
        leaves, vjp_structure = jax.tree.flatten(vjp)
        return y, aux, leaves

    closed, (y, aux, leaves) = jax.make_jaxpr(forward, return_shape=True)(params, x, ctx)
    program = Listing(closed.jaxpr)
    param_vars, x_vars, ctx_vars = (_new_vars(tree) for tree in (params, x, ctx))
    y_out, aux_out, leaves_out = _divided(program.inline(closed, [*param_vars, *x_vars, *ctx_vars]), y, aux, leaves)
    if program.depend_only_on([*param_vars, *ctx_vars]).issuperset(variables(y_out)):
        raise ValueError("no output y of the chunk depends on x")
    before = {*x_vars, *(var for eqn in program.eqns for var in eqn.outvars)}

    def backward(leaves: list[Array], dy: PyTree) -> tuple[PyTree, PyTree]:
        def zero(leaf: Any) -> np.ndarray:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return np.zeros(leaf.shape, leaf.dtype if floating else jax.dtypes.float0)

        dparams, dx = jax.tree.unflatten(vjp_structure, leaves)((dy, jax.tree.map(zero, aux)))
        return dx, dparams

    closed = jax.make_jaxpr(backward)(leaves, y)
    dy_vars = _new_vars(y)
    dx_out, dparams_out = _divided(program.inline(closed, [*leaves_out, *dy_vars]), x, params)

    again = [*param_vars, *ctx_vars]
    results = [*dx_out, *dparams_out]
    kept = reads(program.slice(results, available=[*before, *again, *dy_vars]), results)
    residual_vars = program.smallest((v for v in kept if v in before), given=again)
    products = program.only_weights(dx_out, dparams_out, available=[*again, *residual_vars, *dy_vars])
    tape_vars = program.smallest(reads(products, dparams_out), given=again, inputs=[*residual_vars, *dy_vars])
    totals = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32), params)
    total_vars = _new_vars(totals)
    totals_out = added(program, dparams_out, total_vars, products)

    residuals, tape = (tuple(_aval(var.aval) for var in variables) for variables in (residual_vars, tape_vars))
    of_forward = {"params": params, "x": x, "ctx": ctx}
    of_backward = {"params": params, "residuals": residuals, "ctx": ctx, "dy": y}
    of_weight = {"params": params, "tape": tape, "ctx": ctx, "totals": totals}
    forward_in = [*param_vars, *x_vars, *ctx_vars]
    backward_in = [*param_vars, *residual_vars, *ctx_vars, *dy_vars]
    piece = partial(_piece, program)
    return SplitVJP(
        fwd=piece("fwd", of_forward, forward_in, [*y_out, *aux_out, *residual_vars], (y, aux, residuals)),
        bwd=piece(
            "bwd",
            of_backward | {"totals": totals},
            [*backward_in, *total_vars],
            [*dx_out, *totals_out],
            (x, totals),
        ),
        bwd_input=piece("bwd_input", of_backward, backward_in, [*dx_out, *tape_vars], (x, tape)),
        bwd_weight=piece(
            "bwd_weight", of_weight, [*param_vars, *tape_vars, *ctx_vars, *total_vars], totals_out, totals
        ),
        residual_avals=residuals,
        tape_avals=tape,
        y_avals=jax.tree.map(_aval, y),
        aux_avals=jax.tree.map(_aval, aux),
    )


def _piece(
    program: Listing, name: str, args: dict[str, PyTree], inputs: list[jex.Var], outputs: list[Any], like: PyTree
) -> Callable:
    """Return the function of arguments like `args`, whose leaves are `inputs`, that returns a tree like `like`."""
    eqns = in_place(program.slice(outputs, inputs))
    function = as_function(program.template, eqns, inputs, outputs, program.consts)
    wanted = {name: jax.tree.map(_aval, tree) for name, tree in args.items()}
    structure = jax.tree.structure(like)

    def call(*given: PyTree) -> PyTree:
        if len(given) != len(wanted):
            raise ValueError(f"{name} takes {', '.join(wanted)}, not {len(given)} arguments")
        leaves = [leaf for arg, tree in zip(wanted, given, strict=True) for leaf in _checked(arg, tree, wanted[arg])]
        return jax.tree.unflatten(structure, function(*leaves))

    return call


def _checked(name: str, tree: PyTree, wanted: PyTree) -> list[Array]:
    """Return the leaves of an argument."""
    if (found := jax.tree.structure(tree)) != (structure := jax.tree.structure(wanted)):
        raise ValueError(f"{name} should be {structure}, not {found}")
    leaves = []
    for (path, leaf), aval in zip(_leaves(tree), jax.tree.leaves(wanted), strict=True):
        if (found := _aval(leaf)) != aval:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} should be {aval.dtype}{list(aval.shape)}, not "
                f"{found.dtype}{list(found.shape)}"
            )
        leaves.append(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, aval.dtype))
    return leaves


def _new_vars(tree: PyTree) -> list[jex.Var]:
    """Return new variables for the leaves of a tree."""
    return list(jax.make_jaxpr(lambda *leaves: leaves)(*jax.tree.leaves(tree)).jaxpr.invars)


def _divided(atoms: list[Any], *trees: PyTree) -> list[list[Any]]:
    """Divide atoms into the leaves of each tree."""
    ends = np.cumsum([jax.tree.structure(tree).num_leaves for tree in trees])
    return [atoms[end - jax.tree.structure(tree).num_leaves : end] for end, tree in zip(ends, trees, strict=True)]


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _aval(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else jax.eval_shape(lambda: jnp.asarray(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check_floating(name: str, tree: PyTree) -> None:
    for path, leaf in _leaves(tree):
        if not jnp.issubdtype(dtype := _aval(leaf).dtype, jnp.floating):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} of a chunk is {dtype}: should be floating-point; what is not "
                "differentiated belongs into ctx or aux"
            )
