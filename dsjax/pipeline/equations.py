"""Lists of equations, the bodies of traced functions, and functions made of parts of them."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jaxtyping import Array, PyTree

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated", "scatter-add", "ffi_call"}
"""Primitives that may make a weight's gradient."""
KERNELS = {"pallas_call", "core_map", "mpmd_map"}
"""Primitives of Pallas kernels, by JAX's versions; whose name says that they are products."""


def variables(atoms: Iterable[Any]) -> list[jex.Var]:
    """Return the atoms that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def reads(eqns: Sequence[jex.JaxprEqn], results: Sequence[Any] = ()) -> list[jex.Var]:
    """Return the variables that equations and their results read and no equation makes."""
    made = {var for eqn in eqns for var in eqn.outvars}
    atoms = [*(atom for eqn in eqns for atom in eqn.invars), *results]
    return list(dict.fromkeys(var for var in variables(atoms) if var not in made))


def as_function(
    template: jex.Jaxpr,
    eqns: Sequence[jex.JaxprEqn],
    inputs: Sequence[jex.Var],
    outputs: Sequence[Any],
    consts: Mapping[jex.Var, Any] | None = None,
) -> Callable[..., list[Array]]:
    """Return the function of `inputs` that runs equations, in their order, and returns `outputs`.

    Args:
        template: any traced function.
        consts: values of variables that are not inputs.
    """
    known = [var for var in reads(eqns, outputs) if consts and var in consts]
    effects = {effect for eqn in eqns for effect in eqn.effects}
    jaxpr = template.replace(
        constvars=known, invars=list(inputs), outvars=list(outputs), eqns=list(eqns), effects=effects
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, [consts[var] for var in known]))


def without_gradient_rules(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return a function of the same results whose equations are also those inside of functions with a rule for their
    gradients, which it loses."""

    def run(*args: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _opened(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _opened(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in atoms]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "custom_vjp_call":
            inner = eqn.params["call_jaxpr"]
            stack = str(eqn.source_info.name_stack)
            with jax.named_scope(stack) if stack else contextlib.nullcontext():
                results = _opened(inner.jaxpr, inner.consts, read(eqn.invars))
        else:
            needed = reads([eqn])
            results = as_function(jaxpr, [eqn], needed, eqn.outvars)(*(values[var] for var in needed))
        values |= zip(eqn.outvars, results, strict=True)
    return read(jaxpr.outvars)


def has_product(eqn: jex.JaxprEqn) -> bool:
    """Return whether an equation, or one inside of it, may make a weight's gradient."""
    if eqn.primitive.name in PRODUCTS:
        return True
    if eqn.primitive.name in KERNELS:
        name = str(eqn.params.get("name") or eqn.params.get("name_and_src_info"))
        return "matmul" in name or "wgrad" in name
    return any(has_product(inner) for jaxpr in jex.jaxprs_in_params(eqn.params) for inner in jaxpr.eqns)
