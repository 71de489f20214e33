"""The order of a pair: the components of one chunk's forward pass between those of another chunk's backward pass.

Two chunks of opposite directions share nothing, so while one's tokens are on the network the other can compute (report
section 3.2.1, Figure 4). Step by step, for each layer:

    computing        attention(F)   MLP(B)        MLP(F)        attention(B)
    on the network   combine(B)     dispatch(F)   dispatch(B)   combine(F)

XLA starts a transfer as early and waits for it as late as it can, but which chunk to compute next it does not know:
left alone it takes one as far as it gets, and then sends the tokens of both with nothing left to compute. So here every
step waits for the one before it. In a step, the computing is divided into as many parts as the tokens have hops, and
what follows a hop waits for the part beside it: else XLA would go on with the tokens as soon as they are there, and
compute afterwards. Gradients of weights, which nobody waits for, stay free to fill gaps, such as the transfers between
stages.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend.core as jex
from jax import lax
from jaxtyping import PyTree

from dsjax.pipeline.equations import as_function, has_product, reads, variables

_CHUNK = re.compile(r"(?:^|/)([FBI])(?:/|$)")
_NETWORK = re.compile(r"\b(?:dispatch|combine|overflow)\b")
_HOPS = {"all_to_all", "ragged_all_to_all", "all_gather"}


class _Component(NamedTuple):
    """What one chunk does in a step: in even steps the forward pass computes, in odd steps the backward pass."""

    step: int
    on_network: bool


class _Moment(NamedTuple):
    step: int
    part: int


def interleaved(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return a function of the same results in which the components of two chunks take turns.

    Args:
        function: whose equations are in a scope named F, or B or I; and in one named dispatch, combine or overflow, if
            they are part of the expert exchange.
    """

    def in_turns(*args: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr = closed.jaxpr
        component_of = _components(jaxpr)
        moment_of = _moments(jaxpr, component_of)
        groups: dict[_Moment, list[jex.JaxprEqn]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            groups[moment_of[eqn.outvars[0]]].append(eqn)
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values |= zip(jaxpr.invars, jax.tree.leaves(args), strict=True)
        last_read = _last_reads(jaxpr, moment_of)
        for moment, eqns in sorted(groups.items()):
            needed, made = reads(eqns), [var for eqn in eqns for var in eqn.outvars]
            behind = [var for var in needed if var in moment_of and _follows(moment, moment_of[var])]
            if moment.part and all(component_of[var].on_network for var in behind):
                # It reads nothing of what was computed beside it.
                behind += [
                    var
                    for var, last in last_read.items()
                    if last > moment and _follows(moment, moment_of[var]) and not component_of[var].on_network
                ]
            if len({component_of[var].on_network for var in behind}) == 2:
                values |= zip(behind, lax.optimization_barrier([values[var] for var in behind]), strict=True)
            results = as_function(jaxpr, eqns, needed, made)(*(values[var] for var in needed))
            values |= zip(made, results, strict=True)
        leaves = [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return in_turns


def _components(jaxpr: jex.Jaxpr) -> dict[jex.Var, _Component]:
    """Return which component makes a variable: as early as what it takes allows."""
    component_of: dict[jex.Var, _Component] = {}
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        on_network = bool(_NETWORK.search(stack))
        step = max((component_of[var].step for var in variables(eqn.invars) if var in component_of), default=-1)
        if chunk := _CHUNK.search(stack):
            forward = chunk[1] == "F"
            step = max(step, 0) if forward else step
            step += (step % 2 == 0) != (forward != on_network)
        component_of |= dict.fromkeys(eqn.outvars, _Component(step, on_network))
    return component_of


def _moments(jaxpr: jex.Jaxpr, component_of: dict[jex.Var, _Component]) -> dict[jex.Var, _Moment]:
    """Divide every component into parts: by its hops, or by those of its products that wait for each other.

    A part of the network is a hop and what it takes; what follows the last hop is one more. There are as many parts of
    the computing as there are hops beside it.
    """
    depth_of: dict[jex.Var, int] = {}
    before_of: dict[jex.Var, int] = {}
    deepest: dict[_Component, int] = defaultdict(int)
    for eqn in jaxpr.eqns:
        component = component_of[eqn.outvars[0]]
        before = max((depth_of[var] for var in variables(eqn.invars) if component_of.get(var) == component), default=0)
        depth = before + (eqn.primitive.name in _HOPS if component.on_network else has_product(eqn))
        deepest[component] = max(deepest[component], depth)
        depth_of |= dict.fromkeys(eqn.outvars, depth)
        before_of |= dict.fromkeys(eqn.outvars, before)
    moment_of: dict[jex.Var, _Moment] = {}
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0]
        component = component_of[out]
        before = [moment_of[var] for var in variables(eqn.invars) if var in moment_of]
        if component.on_network:
            part = before_of[out]
        else:
            parts = max(1, deepest[_Component(component.step, True)])
            part = min(parts * max(depth_of[out] - 1, 0) // max(deepest[component], 1), parts - 1)
        moment = max(_Moment(component.step, part), *before, _Moment(-1, 0))
        moment_of |= dict.fromkeys(eqn.outvars, moment)
    return moment_of


def _last_reads(jaxpr: jex.Jaxpr, moment_of: dict[jex.Var, _Moment]) -> dict[jex.Var, _Moment]:
    """Return when each variable that equations make is read for the last time."""
    last: dict[jex.Var, _Moment] = {}
    for eqn in jaxpr.eqns:
        for var in variables(eqn.invars):
            if var in moment_of:
                last[var] = max(last.get(var, moment_of[var]), moment_of[eqn.outvars[0]])
    return last


def _follows(moment: _Moment, before: _Moment) -> bool:
    """Whether a moment waits for what is made in another: the first part of its step for any of the step before, others
    for the part in front of them."""
    return before.step == moment.step - 1 if moment.part == 0 else before == (moment.step, moment.part - 1)
