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
and leaves the latter on the tape, so layers should be unrolled. A `lax.cond` is in both pieces, in each without what
only the other needs. That is for the overflow of the expert exchange (`parallel.exchange`), whose backward pass makes
the gradient of all experts: on the tape these would be as large as the parameters, for each micro-batch in flight and
usually zero. In `bwd_weight` it needs the tokens, their cotangent and their routing, which are on the tape anyway or
small. The price is paid by an overflow only: its exchange runs once more, with the all-to-alls that this takes, under a
predicate on which all devices of the exchange agree. And what a `lax.cond` makes of a gradient in one case, where it is
zero in the other, is added to the totals inside of it: there are never zeros as large as the parameters.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import partial_eval  # undocumented; only `dce_jaxpr`, in `_restricted`
from jaxtyping import Array, PyTree

from dsjax.pipeline.equations import as_function, has_product, reads, variables

BARRIER = "optimization_barrier"
FREE = {
    "name",
    "reduce_precision",
    "convert_element_type",
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "slice",
    "stop_gradient",
    BARRIER,
}
"""Primitives that cost no more than to read their result, and are exact: done again rather than kept."""
CALLS = {
    primitives.jit_p,
    primitives.remat_p,
    primitives.call_p,
    primitives.closed_call_p,
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
}

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
    program = _Program(closed.jaxpr)
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
    totals_out = program.added(dparams_out, total_vars)

    residuals, tape = (tuple(_aval(var.aval) for var in variables) for variables in (residual_vars, tape_vars))
    of_forward = {"params": params, "x": x, "ctx": ctx}
    of_backward = {"params": params, "residuals": residuals, "ctx": ctx, "dy": y}
    of_weight = {"params": params, "tape": tape, "ctx": ctx, "totals": totals}
    forward_in = [*param_vars, *x_vars, *ctx_vars]
    backward_in = [*param_vars, *residual_vars, *ctx_vars, *dy_vars]
    piece = program.piece
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


class _Program:
    """A list of equations in the order of execution, of which pieces are taken."""

    def __init__(self, template: jex.Jaxpr):
        self.template = template
        self.eqns: list[jex.JaxprEqn] = []
        self.consts: dict[jex.Var, Any] = {}

    def inline(self, jaxpr: jex.Jaxpr, args: Sequence[Any], stack: Any = None) -> list[Any]:
        """Append the equations of a function, calls written out, and return its results: variables or literals."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr
        atoms = dict(zip(inner.invars, args, strict=True))
        for var, value in zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True):
            atoms[var] = jex.Var(var.aval)
            self.consts[atoms[var]] = value

        def value(atom: Any) -> Any:
            return atom if isinstance(atom, jex.Literal) else atoms[atom]

        for eqn in inner.eqns:
            source = eqn.source_info
            if stack is not None:
                source = source.replace(name_stack=stack + source.name_stack)
            operands = [value(atom) for atom in eqn.invars]
            if eqn.primitive in CALLS:
                (body,) = jex.jaxprs_in_params(eqn.params)
                if eqn.primitive is primitives.remat_p and eqn.params["differentiated"]:
                    operands = self._behind_barrier(eqn, operands, source.name_stack)
                outs = self.inline(body, operands, source.name_stack)
                atoms.update(zip(eqn.outvars, outs, strict=True))
                continue
            if effects := [e for e in eqn.effects if type(e).__name__ != "NamedAxisEffect"]:
                raise ValueError(f"a chunk should have no side effects; {eqn.primitive} has {effects[0]}")
            outvars = [jex.Var(var.aval) for var in eqn.outvars]
            atoms.update(zip(eqn.outvars, outvars, strict=True))
            self.eqns.append(eqn.replace(invars=operands, outvars=outvars, source_info=source))
        return [value(atom) for atom in inner.outvars]

    def _behind_barrier(self, eqn: jex.JaxprEqn, operands: list[Any], stack: Any) -> list[Any]:
        """Keep recomputation from being done early, as `jax.checkpoint` does: not before what it is used with is there.

        A piece keeps of a barrier what it uses."""
        prevent = eqn.params["prevent_cse"]
        prevent = prevent if isinstance(prevent, tuple) else (prevent,) * len(operands)
        behind = [i for i, yes in enumerate(prevent) if yes and not isinstance(operands[i], jex.Literal)]
        if not behind:
            return operands
        before = [operands[i] for i in behind]
        barrier = jax.make_jaxpr(lambda *values: lax.optimization_barrier(values))(*(var.aval for var in before))
        replaced = dict(zip(behind, self.inline(barrier, before, stack), strict=True))
        return [replaced.get(i, operand) for i, operand in enumerate(operands)]

    def slice(self, wanted: Iterable[Any], available: Iterable[jex.Var]) -> list[jex.JaxprEqn]:
        """Return the equations that make `wanted` from `available` and constants."""
        available = {*available, *self.consts}
        needed = {*variables(wanted)} - available
        eqns = []
        for eqn in reversed(self.eqns):
            if not needed.isdisjoint(eqn.outvars):
                eqns.append(_restricted(eqn, needed))
                needed |= {*variables(eqns[-1].invars)} - available
        return eqns[::-1]

    def depend_only_on(self, given: Iterable[jex.Var]) -> set[Any]:
        """Return all that can be made from `given` and constants."""
        found = {*given, *self.consts}
        for eqn in self.eqns:
            for var, alone in _by_output(eqn):
                if found.issuperset(variables(alone.invars)):
                    found.add(var)
        return found

    def only_weights(self, dx: list[Any], dparams: list[Any], available: Iterable[jex.Var]) -> list[jex.JaxprEqn]:
        """Return the products that `dparams` needs and `dx` does not, and what follows from them."""
        done = {var for eqn in self.slice(dx, available) for var in eqn.outvars}
        eqns, made = [], set()
        for eqn in self.slice(dparams, [*available, *done]):
            if has_product(eqn) or not made.isdisjoint(variables(eqn.invars)):
                eqns.append(eqn)
                made.update(eqn.outvars)
        return eqns

    def smallest(
        self, wanted: Iterable[jex.Var], *, given: Iterable[jex.Var], inputs: Iterable[jex.Var] = ()
    ) -> tuple[jex.Var, ...]:
        """Return the variables of fewest bytes from which `wanted` can be made by `FREE` operations and from `given`.

        Args:
            inputs: behind which not to look.
        """
        given = self.depend_only_on(given)
        source = {}
        for eqn in self.eqns:
            for var, alone in _by_output(eqn):
                reads = [v for v in variables(alone.invars) if v not in given]
                if len(reads) == 1 and _is_free(alone):
                    source[var] = reads[0]
        for var in inputs:
            source.pop(var, None)
        wanted = dict.fromkeys(v for v in wanted if v not in given)
        users: dict[jex.Var, dict[jex.Var, None]] = {}
        roots: dict[jex.Var, None] = {}
        for var in wanted:
            while var in source:
                users.setdefault(source[var], {})[var] = None
                var = source[var]
            roots[var] = None

        def choice(var: jex.Var) -> list[jex.Var]:
            if var in wanted or var not in users:
                return [var]
            apart = [v for user in users[var] for v in choice(user)]
            return apart if sum(map(_bytes, apart)) <= _bytes(var) else [var]

        return tuple(v for root in roots for v in choice(root))

    def added(self, grads: Sequence[Any], totals: Sequence[jex.Var]) -> list[Any]:
        """Append the additions of gradients to totals, and return the sums.

        Summands that a conditional makes in some cases only are added to the total inside of it."""
        made = {var: eqn for eqn in self.eqns for var in eqn.outvars}
        readers = Counter(var for eqn in self.eqns for var in variables(eqn.invars))
        readers.update(variables(grads))

        def is_rare(term: Any) -> bool:
            return (
                not isinstance(term, jex.Literal) and readers[term] == 1 and term in made and _is_rare(made[term], term)
            )

        def terms_of(grad: Any) -> list[Any]:
            eqn = None if isinstance(grad, jex.Literal) or readers[grad] > 1 else made.get(grad)
            if eqn is not None and eqn.primitive.name == "add_any" and any(map(is_rare, eqn.invars)):
                return list(eqn.invars)
            return [grad]

        inside: dict[jex.Var, tuple[jex.Var, jex.Var]] = {}
        sums, added = list(totals), list(map(terms_of, grads))
        for at, terms in enumerate(added):
            if rare := [term for term in terms if is_rare(term)]:
                sums[at] = jex.Var(totals[at].aval)
                inside[rare[0]] = totals[at], sums[at]
                terms.remove(rare[0])
        self.eqns = [_adding(eqn, inside) if inside.keys() & set(eqn.outvars) else eqn for eqn in self.eqns]
        for at, terms in enumerate(added):
            for term in terms:
                add = jax.make_jaxpr(lambda total, grad: total + grad.astype(jnp.float32))(sums[at].aval, term.aval)
                (sums[at],) = self.inline(add, [sums[at], term])
        return sums

    def piece(
        self, name: str, args: dict[str, PyTree], inputs: list[jex.Var], outputs: list[Any], like: PyTree
    ) -> Callable:
        """Return the function of arguments like `args`, whose leaves are `inputs`, that returns a tree like `like`."""
        eqns = self.slice(outputs, inputs)
        function = as_function(self.template, eqns, inputs, outputs, self.consts)
        wanted = {name: jax.tree.map(_aval, tree) for name, tree in args.items()}
        structure = jax.tree.structure(like)

        def call(*given: PyTree) -> PyTree:
            if len(given) != len(wanted):
                raise ValueError(f"{name} takes {', '.join(wanted)}, not {len(given)} arguments")
            leaves = [
                leaf for arg, tree in zip(wanted, given, strict=True) for leaf in _checked(arg, tree, wanted[arg])
            ]
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


def _restricted(eqn: jex.JaxprEqn, needed: set[Any]) -> jex.JaxprEqn:
    """Return an equation without the outputs that are not needed, if it can do without."""
    outvars = [var for var in eqn.outvars if var in needed]
    if eqn.primitive.name == BARRIER:
        kept = [i for i, var in enumerate(eqn.outvars) if var in needed]
        return eqn.replace(invars=[eqn.invars[i] for i in kept], outvars=outvars)
    if eqn.primitive is not primitives.cond_p or len(outvars) == len(eqn.outvars):
        return eqn
    alone = jax.make_jaxpr(lambda: ())().jaxpr.replace(
        invars=list(dict.fromkeys(variables(eqn.invars))), outvars=outvars, eqns=[eqn], effects=set(eqn.effects)
    )
    (eqn,) = partial_eval.dce_jaxpr(alone, True)[0].eqns
    return eqn


def _is_rare(eqn: jex.JaxprEqn, out: jex.Var) -> bool:
    """Whether a result is that of a conditional, and zero in some of its cases."""
    return eqn.primitive is primitives.cond_p and any(
        _is_zero(branch.jaxpr, branch.jaxpr.outvars[eqn.outvars.index(out)]) for branch in eqn.params["branches"]
    )


def _is_zero(jaxpr: jex.Jaxpr, out: Any) -> bool:
    made = [eqn for eqn in jaxpr.eqns if out in eqn.outvars]
    if not made or made[0].primitive.name != "broadcast_in_dim":
        return False
    (operand, *_) = made[0].invars
    return isinstance(operand, jex.Literal) and operand.val == 0


def _adding(eqn: jex.JaxprEqn, inside: Mapping[jex.Var, tuple[jex.Var, jex.Var]]) -> jex.JaxprEqn:
    """Return a conditional that adds some of its results to totals, which it leaves as they are where those are zero.

    Args:
        inside: for results that are added, the total and the sum.
    """
    index, *operands = eqn.invars
    added = [at for at, var in enumerate(eqn.outvars) if var in inside]
    totals = [inside[eqn.outvars[at]][0] for at in added]

    def with_sums(branch: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
        def run(*args: Array) -> list[Array]:
            results = jex.jaxpr_as_fun(branch)(*args[: len(operands)])
            for at, total in zip(added, args[len(operands) :], strict=True):
                zero = _is_zero(branch.jaxpr, branch.jaxpr.outvars[at])
                results[at] = total if zero else total + results[at].astype(jnp.float32)
            return results

        return jax.make_jaxpr(run)(*(atom.aval for atom in [*operands, *totals]))

    return eqn.replace(
        invars=[index, *operands, *totals],
        outvars=[inside[var][1] if var in inside else var for var in eqn.outvars],
        params=eqn.params | {"branches": tuple(map(with_sums, eqn.params["branches"]))},
    )


def _by_output(eqn: jex.JaxprEqn) -> list[tuple[jex.Var, jex.JaxprEqn]]:
    """Each output of an equation with what makes it alone."""
    return [(var, _restricted(eqn, {var})) for var in eqn.outvars]


def _is_free(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive is primitives.cond_p:
        # JAX 0.11 makes the operands of a conditional its results, where its derivative needs them: parameters too.
        return all(_is_free(inner) for branch in eqn.params["branches"] for inner in branch.jaxpr.eqns)
    return eqn.primitive.name in FREE or not eqn.invars


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


def _bytes(var: jex.Var) -> int:
    return var.aval.size * var.aval.dtype.itemsize


def _check_floating(name: str, tree: PyTree) -> None:
    for path, leaf in _leaves(tree):
        if not jnp.issubdtype(dtype := _aval(leaf).dtype, jnp.floating):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} of a chunk is {dtype}: should be floating-point; what is not "
                "differentiated belongs into ctx or aux"
            )
