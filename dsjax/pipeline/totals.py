"""Gradients of weights, added to their totals.

Those of an overflow of the expert exchange are as large as the parameters, and seldom there: made by themselves, they
would need as much memory again, and time even where they are zero. So the total goes into the equation that makes them,
last, when all else has been added. A conditional gives it back as it came where it has nothing to add, and a loop that
adds a gradient up begins with it in place of zero.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives

from dsjax.pipeline.equations import as_function, variables
from dsjax.pipeline.listing import Listing, restricted

SCOPE = "weights_of_overflow"
"""In which gradients are made that are seldom there. To a pair it is computing, which nobody waits for, and no part of
the exchange on the network (`overlap`); in a profile and in XLA's program it is found by its name."""

Inside = Mapping[jex.Var, tuple[jex.Var, jex.Var]]
"""For results of an equation that are added inside of it, the total and the sum."""


def added(
    listing: Listing, grads: Sequence[Any], totals: Sequence[jex.Var], among: Sequence[jex.JaxprEqn]
) -> list[Any]:
    """Append the additions of gradients to totals, float32, and return the sums.

    Args:
        among: the equations that totals may go into, which are run for gradients of weights alone.
    """
    made, may_take = _makers(listing.eqns), _makers(among)
    readers = Counter(var for eqn in listing.eqns for var in variables(eqn.invars))
    readers.update(variables(grads))

    def goes_inside(term: Any) -> bool:
        eqn = made.get(term) if readers[term] == 1 and term in may_take else None
        return eqn is not None and (_is_rare(eqn, term) or _is_sum(eqn, term, made))

    def terms_of(grad: Any) -> list[Any]:
        if isinstance(grad, jex.Literal):
            return [grad]
        eqn = made.get(grad) if readers[grad] == 1 else None
        if eqn is not None and eqn.primitive.name == "add_any" and any(map(goes_inside, variables(eqn.invars))):
            return list(eqn.invars)
        return [grad]

    sums = list(totals)
    by_maker: dict[int, dict[int, jex.Var]] = {}
    for at, grad in enumerate(grads):
        terms = terms_of(grad)
        last = next((term for term in variables(terms) if goes_inside(term)), None)
        for term in terms:
            if term is last:
                by_maker.setdefault(listing.eqns.index(made[term]), {})[at] = term
            else:
                add = jax.make_jaxpr(lambda total, grad: total + grad.astype(jnp.float32))(sums[at].aval, term.aval)
                (sums[at],) = listing.inline(add, [sums[at], term])
    for number, terms in by_maker.items():
        sum_of = {term: jex.Var(totals[at].aval) for at, term in terms.items()}
        eqn = restricted(listing.eqns[number], set(sum_of))
        listing.eqns.append(_adding(eqn, {term: (sums[at], sum_of[term]) for at, term in terms.items()}))
        for at, term in terms.items():
            sums[at] = sum_of[term]
    return sums


def _makers(eqns: Iterable[jex.JaxprEqn]) -> dict[jex.Var, jex.JaxprEqn]:
    return {var: eqn for eqn in eqns for var in eqn.outvars}


def _is_zero(made: Mapping[jex.Var, jex.JaxprEqn], var: Any) -> bool:
    eqn = None if isinstance(var, jex.Literal) else made.get(var)
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return False
    (operand, *_) = eqn.invars
    return isinstance(operand, jex.Literal) and operand.val == 0


def _is_rare(eqn: jex.JaxprEqn, out: jex.Var) -> bool:
    """Return whether a result is that of a conditional, and zero in some of its cases."""
    return eqn.primitive is primitives.cond_p and any(
        _is_zero(_makers(branch.jaxpr.eqns), branch.jaxpr.outvars[eqn.outvars.index(out)])
        for branch in eqn.params["branches"]
    )


def _is_sum(eqn: jex.JaxprEqn, out: jex.Var, made: Mapping[jex.Var, jex.JaxprEqn]) -> bool:
    """Return whether a result is what a loop adds up, in float32, beginning with zero."""
    if eqn.primitive is not primitives.scan_p or out.aval.dtype != jnp.float32:
        return False
    body, carried = eqn.params["jaxpr"].jaxpr, _carried(eqn)
    at = eqn.outvars.index(out)
    if at not in carried or not _is_zero(made, eqn.invars[carried[at]]):
        return False
    return _addition(body.eqns, body.outvars, at, body.invars[carried[at]]) is not None


def _carried(scan: jex.JaxprEqn) -> dict[int, int]:
    """Return which results of a loop are its state at the end, and which arguments that at the beginning.

    All others but the loop's constants have the axis that it runs along besides."""
    body = scan.params["jaxpr"].jaxpr

    def along(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.shape != b.aval.shape for a, b in zip(outer, inner, strict=True))

    count = len(scan.outvars) - along(scan.outvars, body.outvars)
    first = len(scan.invars) - along(scan.invars, body.invars) - count
    return {at: first + at for at in range(count)}


def _addition(eqns: Sequence[jex.JaxprEqn], results: Sequence[Any], at: int, before: jex.Var) -> jex.JaxprEqn | None:
    """Return what makes a result of `before` and something else; None if it is made in another way, or one of both is
    used besides."""
    readers = [eqn for eqn in eqns for var in eqn.invars if var is before]
    if len(readers) != 1 or readers[0].primitive.name != "add_any" or results[at] not in readers[0].outvars:
        return None
    used = [var for eqn in eqns for var in eqn.invars] + [*results[:at], *results[at + 1 :]]
    return None if any(var is results[at] for var in used) or any(var is before for var in results) else readers[0]


def _adding(eqn: jex.JaxprEqn, inside: Inside) -> jex.JaxprEqn:
    """Return an equation that adds results to totals; a conditional has no others."""
    if eqn.primitive is not primitives.cond_p:
        return _adding_up(eqn, inside)
    (named,) = jax.make_jaxpr(jax.named_call(lambda x: -x, name=SCOPE))(0.0).jaxpr.eqns
    source = eqn.source_info.replace(name_stack=named.source_info.name_stack)
    return _adding_in_cases(eqn.replace(source_info=source), inside)


def _adding_in_cases(eqn: jex.JaxprEqn, inside: Inside) -> jex.JaxprEqn:
    """Return a conditional that adds its results to totals, and gives those back where the results are zero."""
    totals = [inside[var][0] for var in eqn.outvars]

    def with_sums(branch: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
        listing = Listing(branch.jaxpr)
        operands, sums = _like(branch.jaxpr.invars), _like(totals)
        arguments = [*operands, *sums]
        results = listing.inline(branch, operands)
        made = _makers(listing.eqns)
        some = [at for at, result in enumerate(results) if not _is_zero(made, result)]
        found = added(listing, [results[at] for at in some], [sums[at] for at in some], listing.eqns)
        for at, total in zip(some, found, strict=True):
            sums[at] = total
        return _closed(listing, arguments, sums)

    return eqn.replace(
        invars=[*eqn.invars, *totals],
        outvars=[inside[var][1] for var in eqn.outvars],
        params=eqn.params | {"branches": tuple(map(with_sums, eqn.params["branches"]))},
    )


def _adding_up(eqn: jex.JaxprEqn, inside: Inside) -> jex.JaxprEqn:
    """Return a loop that begins with totals where it began with zero."""
    body, carried = eqn.params["jaxpr"], _carried(eqn)
    listing, arguments, invars = Listing(body.jaxpr), _like(body.jaxpr.invars), list(eqn.invars)
    results = listing.inline(body, arguments)
    added_at = [at for at, var in enumerate(eqn.outvars) if var in inside]
    totals, addends = [arguments[carried[at]] for at in added_at], []
    for at, total in zip(added_at, totals, strict=True):
        invars[carried[at]] = inside[eqn.outvars[at]][0]
        addition = _addition(listing.eqns, results, at, total)
        listing.eqns = [eqn for eqn in listing.eqns if eqn is not addition]
        addends += [var for var in addition.invars if var is not total]
    for at, total in zip(added_at, added(listing, addends, totals, listing.eqns), strict=True):
        results[at] = total
    return eqn.replace(
        invars=invars,
        outvars=[inside[var][1] if var in inside else jex.Var(var.aval) for var in eqn.outvars],
        params=eqn.params | {"jaxpr": _closed(listing, arguments, results)},
    )


def _like(given: Iterable[jex.Var]) -> list[jex.Var]:
    return [jex.Var(var.aval) for var in given]


def _closed(listing: Listing, inputs: Sequence[jex.Var], outputs: Sequence[Any]) -> jex.ClosedJaxpr:
    eqns = listing.slice(outputs, inputs)
    function = as_function(listing.template, eqns, inputs, outputs, listing.consts)
    return jax.make_jaxpr(function)(*(var.aval for var in inputs))
