"""Conditionals that are loops of at most one turn, where they give something back as it came.

XLA copies what a conditional gives back as it came, and updates in place what a loop holds; where several branches of a
conditional have such a loop, if each begins with a value that it has made itself. Of gradients that are seldom there
(`totals`) the copies would be as large as the parameters, in every tick.
"""

from collections.abc import Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jaxtyping import Array

from dsjax.pipeline.listing import FREE, Listing


def in_place(eqns: Sequence[jex.JaxprEqn]) -> list[jex.JaxprEqn]:
    """Return equations in which no conditional of two cases does nothing in one but to give back what it came with; nor
    inside of conditionals and of `lax.scan`."""
    found = []
    for eqn in eqns:
        match eqn.primitive:
            case primitives.cond_p:
                branches = tuple(_with_eqns_in_place(branch) for branch in eqn.params["branches"])
                found += _as_loop(eqn.replace(params=eqn.params | {"branches": branches}))
            case primitives.scan_p:
                body = _with_eqns_in_place(eqn.params["jaxpr"])
                found.append(eqn.replace(params=eqn.params | {"jaxpr": body}))
            case _:
                found.append(eqn)
    return found


def _with_eqns_in_place(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    return closed.replace(jaxpr=closed.jaxpr.replace(eqns=in_place(closed.jaxpr.eqns)))


def _as_loop(eqn: jex.JaxprEqn) -> list[jex.JaxprEqn]:
    """Return a loop of at most one turn in place of a conditional that gives something back, and does nothing else."""
    branches = eqn.params["branches"]
    does_nothing = [all(inner.primitive.name in FREE for inner in branch.jaxpr.eqns) for branch in branches]
    if len(branches) != 2 or True not in does_nothing:
        return [eqn]
    usual = does_nothing.index(True)
    of_usual = branches[usual].jaxpr
    given = {at: of_usual.invars.index(var) for at, var in enumerate(of_usual.outvars) if var in of_usual.invars}
    if not given:
        return [eqn]

    def loop(index: Array, *operands: Array) -> list[Array]:
        def turn(held: tuple[Array, ...]) -> tuple[Array, ...]:
            here = list(operands)
            for at, operand in given.items():
                here[operand] = held[1 + at]
            return jnp.zeros_like(held[0]), *jex.jaxpr_as_fun(branches[1 - usual])(*here)

        start = index == 1 - usual, *jex.jaxpr_as_fun(branches[usual])(*operands)
        return lax.while_loop(lambda held: held[0], turn, start)[1:]

    listing = Listing(of_usual)
    listing.inline(jax.make_jaxpr(loop)(*(atom.aval for atom in eqn.invars)), eqn.invars, eqn.source_info.name_stack)
    *before, last = listing.eqns
    assert last.primitive is primitives.while_p and not listing.consts
    return [*before, last.replace(outvars=[last.outvars[0], *eqn.outvars])]
