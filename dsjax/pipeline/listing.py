"""The equations of a traced function in the order of execution, with its calls written out; and parts of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import partial_eval  # undocumented; only `dce_jaxpr`, in `restricted`

from dsjax.pipeline.equations import has_product, variables

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


class Listing:
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
                eqns.append(restricted(eqn, needed))
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


def restricted(eqn: jex.JaxprEqn, needed: set[Any]) -> jex.JaxprEqn:
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


def _by_output(eqn: jex.JaxprEqn) -> list[tuple[jex.Var, jex.JaxprEqn]]:
    """Each output of an equation with what makes it alone."""
    return [(var, restricted(eqn, {var})) for var in eqn.outvars]


def _is_free(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive is primitives.cond_p:
        # JAX 0.11 makes the operands of a conditional its results, where its derivative needs them: parameters too.
        return all(_is_free(inner) for branch in eqn.params["branches"] for inner in branch.jaxpr.eqns)
    return eqn.primitive.name in FREE or not eqn.invars


def _bytes(var: jex.Var) -> int:
    return var.aval.size * var.aval.dtype.itemsize
