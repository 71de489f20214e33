"""How much memory the intermediate results of a traced program take at once, as an estimate.

XLA makes one kernel of chains of elementwise operations, so what only such operations read is never in memory. What
products, kernels, collectives and the like read or write is, from where it is made until it is last read.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jex

from dsjax.pipeline.equations import KERNELS, PRODUCTS, variables

_IN_MEMORY = {
    *PRODUCTS,
    *KERNELS,
    *("all_to_all", "ragged_all_to_all", "all_gather", "reduce_scatter", "psum", "psum_invariant", "ppermute", "pmax"),
    *("sort", "scatter", "top_k", "cumsum", "custom_call", "ffi_call", "argsort"),
}
_IN_PLACE = {"dynamic_update_slice", "optimization_barrier"}
"""Whose results are their inputs' memory. So are, of inputs that nothing else reads, the state of a `while`, and what a
`cond` gives back as it came in one of its cases."""


@dataclass(frozen=True)
class Peak:
    """The moment at which intermediate results take most memory."""

    nbytes: int
    by_scope: dict[str, int]
    """Of them, those that are made in each of the given scopes; the rest under ""."""


def peak(jaxpr: jex.Jaxpr, scopes: Sequence[str] = ()) -> Peak:
    """Return the peak of a program run in the order in which it was traced; inputs and results do not count.

    Args:
        scopes: words to look for in the names of `jax.named_scope`, the first that occurs counts.
    """
    eqns = list(jaxpr.eqns)
    roots = _roots(jaxpr)
    last: dict[Any, int] = {}
    for at, eqn in enumerate(eqns):
        if any(var in roots for var in eqn.outvars):
            last |= dict.fromkeys(_read(eqn, roots), at)
    results = set(variables(jaxpr.outvars))
    in_place = set()
    read_later: set[Any] = set()
    for eqn in reversed(eqns):
        for var, out in _in_place(eqn):
            if eqn.primitive.name in ("cond", "while") and var in read_later:
                continue
            in_place.add(out)
            if out in results:
                results.add(var)
            elif out in last:
                last[var] = max(last.get(var, 0), last[out])
        read_later.update(variables(eqn.invars))
    held: dict[str, int] = defaultdict(int)
    leaving: dict[int, list[tuple[str, int]]] = defaultdict(list)
    scope_of: dict[Any, str] = {}
    most = Peak(0, {})
    for at, eqn in enumerate(eqns):
        name = str(eqn.source_info.name_stack)
        scope = next((scope for scope in scopes if scope in name), "")
        if eqn.primitive.name == "scan":
            for var in _carried(eqn, [var for var in variables(eqn.invars) if var in scope_of and last[var] == at]):
                held[scope_of[var]] -= _bytes(var)
                leaving[at].remove((scope_of[var], _bytes(var)))
        for var in eqn.outvars:
            if var in roots and var not in results and var not in in_place and var in last:
                held[scope] += _bytes(var)
                leaving[last[var]].append((scope, _bytes(var)))
                scope_of[var] = scope
        inside = _inner_peak(eqn, scopes)
        total = sum(held.values()) + inside.nbytes
        if total > most.nbytes:
            parts = {key: held.get(key, 0) + inside.by_scope.get(key, 0) for key in {*held, *inside.by_scope}}
            most = Peak(total, parts)
        for key, nbytes in leaving.pop(at, ()):
            held[key] -= nbytes
    return most


def _bytes(var: jex.Var) -> int:
    return var.aval.size * var.aval.dtype.itemsize


def _in_place(eqn: jex.JaxprEqn) -> list[tuple[Any, jex.Var]]:
    """Return the inputs of an equation whose memory its results are in, each with the result."""
    match eqn.primitive.name:
        case "optimization_barrier":
            pairs = zip(eqn.invars, eqn.outvars, strict=True)
        case "dynamic_update_slice":
            pairs = [(eqn.invars[0], eqn.outvars[0])]
        case "cond":
            pairs = [
                (eqn.invars[1 + branch.jaxpr.invars.index(given)], out)
                for branch in eqn.params["branches"]
                for given, out in zip(branch.jaxpr.outvars, eqn.outvars, strict=True)
                if given in branch.jaxpr.invars
            ]
        case "while":
            before = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            pairs = zip(eqn.invars[before:], eqn.outvars, strict=True)
        case _:
            pairs = []
    return [(var, out) for var, out in pairs if not isinstance(var, jex.Literal)]


def _carried(eqn: jex.JaxprEqn, unread: Sequence[jex.Var]) -> list[jex.Var]:
    """Return those of `unread`, inputs of a scan that nothing reads later, with whose memory it can go on."""
    results = Counter((var.aval.shape, var.aval.dtype) for var in eqn.outvars)
    found = []
    for var in dict.fromkeys(unread):
        kind = var.aval.shape, var.aval.dtype
        if results[kind]:
            results[kind] -= 1
            found.append(var)
    return found


def _inner_peak(eqn: jex.JaxprEqn, scopes: Sequence[str]) -> Peak:
    """Return the largest peak of the programs inside an equation; kernels work in memory of their own."""
    inner = [] if eqn.primitive.name in KERNELS else jex.jaxprs_in_params(eqn.params)
    peaks = [peak(jaxpr, scopes) for jaxpr in inner]
    return max(peaks, key=lambda peak: peak.nbytes, default=Peak(0, {}))


def _roots(jaxpr: jex.Jaxpr) -> dict[Any, frozenset]:
    """Return the variables that are in memory, each with those in memory that are read to make it."""
    through: dict[Any, frozenset] = {}  # of variables that are not: what in memory they are made from
    wanted = set(variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        if _touches_memory(eqn):
            wanted.update(variables(eqn.invars))
    roots: dict[Any, frozenset] = {}
    for eqn in jaxpr.eqns:
        sources = frozenset().union(
            *(through.get(var, frozenset([var]) if var in roots else frozenset()) for var in variables(eqn.invars))
        )
        for var in eqn.outvars:
            if _touches_memory(eqn) or var in wanted:
                roots[var] = sources
            else:
                through[var] = sources
    return roots


def _read(eqn: jex.JaxprEqn, roots: dict[Any, frozenset]) -> set[Any]:
    found = {var for var in variables(eqn.invars) if var in roots}
    for var in eqn.outvars:
        found |= roots.get(var, frozenset())
    return found


def _touches_memory(eqn: jex.JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name in _IN_MEMORY or name in _IN_PLACE or bool(list(jex.jaxprs_in_params(eqn.params)))
