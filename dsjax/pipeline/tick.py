"""What a rank does in a tick: an F, a B or I, and a W, layer by layer.

F goes from the first layer to the last and B back; a layer of B and a layer of F take turns. So it is known which of
the two comes first to a buffer. No op writes residuals or tapes that another one of its tick reads (`program.check`):
any order is right, but there has to be one, or XLA copies whole buffers (see `buffers`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from dsjax.pipeline import buffers
from dsjax.pipeline.buffers import State, with_grads, with_item, with_residuals
from dsjax.pipeline.chunk import SplitVJP
from dsjax.pipeline.program import Field, Opcode
from dsjax.pipeline.schedule import Kind

if TYPE_CHECKING:
    from dsjax.pipeline.executor import Executor


class Branch(NamedTuple):
    """What some ranks do in a tick."""

    opcode: Opcode
    counts: tuple[int, ...]
    """How many layers the stage in each physical slot has; 0 in one that is not used."""
    ranks: tuple[int, ...]
    """Who they are."""


class TracedTick:
    """A tick while it is traced: its ops take `state` layer by layer, and leave another."""

    def __init__(
        self,
        executor: "Executor",
        pieces: SplitVJP,
        branch: Branch,
        state: State,
        row: Int[Array, " fields"],
    ):
        """Take what the tick begins with.

        Args:
            pieces: of a layer.
            row: of the program's table.
        """
        self.executor, self.model, self.pieces = executor, executor.model, pieces
        self.opcode, self.counts, _ = self.branch = branch
        self.state, self.row = state, row
        self.ordered = executor.program.schedule.ranks > 1
        self.unwritten = {place for kind, slot in self.opcode if kind is Kind.F for place in range(self.counts[slot])}
        """Layers whose residuals F is still to write."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), executor.x)
        self.sent = {"activation": zeros, "gradient": zeros}

    def run(self, *, wait_for_grads: bool) -> tuple[State, dict[str, PyTree]]:
        """Return the state, and what leaves for neighbours: `{"activation": y, "gradient": dx}`.

        Args:
            wait_for_grads: those of ticks before. They then fill the time of the transfers between, which is all that
                there is for it; free to, they would fill some in the tick, where other work does.
        """
        roles = {kind.role for kind, _ in self.opcode}
        x = buffers.read(self.state.activations, self.row[Field.F_INPUT]) if Kind.F in roles else None
        dy = buffers.read(self.state.gradients, self.row[Field.B_INPUT]) if Kind.B in roles else None
        if self.ordered:
            self.state, (x, dy) = buffers.before_arrivals(self.state, (x, dy), wait_for_grads=wait_for_grads)
        in_turns: dict[Kind, Iterator[None]] = {}
        for kind, slot in reversed(self.opcode):
            match kind.role:
                case Kind.B:
                    in_turns[kind] = self._backward(kind, slot, dy)
                case Kind.F:
                    in_turns[kind] = self._forward(slot, x)
        _run_in_turns(in_turns)
        for kind, slot in self.opcode:
            with jax.named_scope(str(kind)):
                match kind.role:
                    case Kind.F:
                        self._leave(slot, self.sent["activation"])
                    case Kind.B:
                        self._leave_backward(slot, self.sent["gradient"])
                    case Kind.W:
                        self._weights(slot)
        return self.state, self.sent

    def _forward(self, slot: int, x: PyTree) -> Iterator[None]:
        model, micro_batch = self.model, self.row[Field.F_MICRO_BATCH]
        if self._has(0, slot):

            def embed() -> PyTree:
                return self.executor.embed(self.executor.edges_of(model.first), micro_batch)

            x = self._only_if(self.row[Field.F_FIRST], embed, lambda: x)
        y = x
        for place in range(self.counts[slot]):
            if place and self.ordered:
                # Left alone, XLA writes the residuals of all layers when all have been run.
                self.state, y = buffers.after_residuals(self.state, place - 1, y)
            ctx = model.context(slot, place, micro_batch)
            y, aux, residuals = self.pieces.fwd(self.executor.weights[slot][place], y, ctx)
            written = buffers.write(self.state.residuals[place], residuals, self.row[Field.F_RESIDUAL])
            self.state = with_residuals(self.state, place, written)
            self.unwritten.remove(place)
            of_slot = self.state.results.aux[slot]
            total = jax.tree.map(jnp.add, of_slot[place], aux)
            self._set_results(aux=with_item(self.state.results.aux, slot, with_item(of_slot, place, total)))
            yield
        self.sent["activation"] = y

    def _leave(self, slot: int, y: PyTree) -> None:
        """Do what follows the layers of F."""
        if self.executor.program.schedule.route.kind == "vee":
            self.state = replace(
                self.state, activations=buffers.write(self.state.activations, y, self.row[Field.F_TURN])
            )
        if self._has(max(map(max, self.executor.program.stages)), slot):
            self._finish(y)

    def _finish(self, y: PyTree) -> None:
        """Compute the loss and the gradient of the last stage's output at once: logits are never kept."""
        model, micro_batch, results = self.model, self.row[Field.F_MICRO_BATCH], self.state.results

        def last() -> tuple[PyTree, PyTree, PyTree]:
            (d_edges, dy), report = self.executor.finish(self.executor.edges_of(model.last), y, micro_batch)
            return dy, self._with_edges(d_edges), jax.tree.map(jnp.add, results.report, report)

        def not_last() -> tuple[PyTree, PyTree, PyTree]:
            return jax.tree.map(jnp.zeros_like, y), results.edge_grads, results.report

        dy, edge_grads, report = self._only_if(self.row[Field.F_LAST], last, not_last)
        self.state = replace(self.state, gradients=buffers.write(self.state.gradients, dy, self.row[Field.F_LOSS]))
        self._set_results(edge_grads=edge_grads, report=report)

    def _backward(self, kind: Kind, slot: int, dy: PyTree) -> Iterator[None]:
        model, micro_batch, dx = self.model, self.row[Field.B_MICRO_BATCH], dy
        layers = self.counts[slot]
        for place in reversed(range(layers)):
            if kind is Kind.B and place + 2 < layers:
                # The gradients of one layer may wait and fill gaps; those of all would need memory for all.
                self.state, dx = buffers.after_grads(self.state, slot, place + 2, dx)
            if kind is Kind.I and place + 1 < layers:  # as with residuals
                self.state, dx = buffers.after_tapes(self.state, dx)
            residuals, dx = self._residuals(place, dx)
            arguments = self.executor.weights[slot][place], residuals, model.context(slot, place, micro_batch), dx
            if kind is Kind.B:
                dx, grads = self.pieces.bwd(*arguments, self.state.results.grads[slot][place])
                self.state = with_grads(self.state, slot, place, grads)
            else:
                dx, tape = self.pieces.bwd_input(*arguments)
                at = self._tape(place, self.row[Field.B_TAPE])
                self.state = replace(self.state, tapes=buffers.write(self.state.tapes, tape, at))
            yield
        self.sent["gradient"] = dx

    def _leave_backward(self, slot: int, dx: PyTree) -> None:
        """Do what follows the layers of B or I."""
        model, micro_batch = self.model, self.row[Field.B_MICRO_BATCH]
        if self._has(0, slot):

            def first() -> PyTree:
                edges = self.executor.edges_of(model.first)
                _, transpose = jax.vjp(lambda edges: model.embed(edges, micro_batch), edges)
                return self._with_edges(transpose(dx)[0])

            edge_grads = self._only_if(self.row[Field.B_FIRST], first, lambda: self.state.results.edge_grads)
            self._set_results(edge_grads=edge_grads)
        if self.executor.program.schedule.route.kind == "vee":
            self.state = replace(self.state, gradients=buffers.write(self.state.gradients, dx, self.row[Field.B_TURN]))

    def _weights(self, slot: int) -> None:
        after = self.row[Field.W_TAPE]
        for place in range(self.counts[slot]):
            if place:  # left alone, XLA makes the gradients of all layers before it adds them up
                self.state, after = buffers.after_grads(self.state, slot, place - 1, after)
            tape = buffers.read(self.state.tapes, self._tape(place, after))
            ctx = self.model.context(slot, place, self.row[Field.W_MICRO_BATCH])
            weights, totals = self.executor.weights[slot][place], self.state.results.grads[slot][place]
            self.state = with_grads(self.state, slot, place, self.pieces.bwd_weight(weights, tape, ctx, totals))

    def _residuals(self, place: int, dx: PyTree) -> tuple[tuple[Array, ...], PyTree]:
        """Read the residuals of a layer, not before the gradient that they are used with is there: XLA would copy those
        of all layers out of the buffers at once."""
        slot, buffer = self.row[Field.B_RESIDUAL], self.state.residuals[place]
        if not self.ordered:
            return buffers.read(buffer, slot), dx
        slot, dx = lax.optimization_barrier((slot, dx))
        residuals = buffers.read(buffer, slot)
        if place in self.unwritten:
            residuals, buffer = lax.optimization_barrier((residuals, buffer))
            self.state = with_residuals(self.state, place, buffer)
        return residuals, dx

    def _has(self, stage: int, slot: int) -> bool:
        """Return whether any of these ranks has a stage in a slot."""
        return any(self.executor.program.stages[rank][slot] == stage for rank in self.branch.ranks)

    def _tape(self, place: int, slot: Int[Array, ""]) -> Int[Array, ""]:
        return place * self.executor.program.pools.tapes + slot

    def _set_results(self, **values: PyTree) -> None:
        self.state = replace(self.state, results=self.state.results._replace(**values))

    def _with_edges(self, grads: PyTree) -> PyTree:
        """Return the gradients of the edges with those of one more micro-batch."""
        totals = self.state.results.edge_grads
        before = {name: totals[name] for name in grads}
        return totals | jax.tree.map(lambda total, new: total + new.astype(jnp.float32), before, grads)

    def _only_if(self, flag: Int[Array, ""], then: Callable[[], PyTree], otherwise: Callable[[], PyTree]) -> PyTree:
        """Branch on a flag of the table; with a single rank, which has all stages, there is nothing to ask."""
        return lax.cond(flag > 0, then, otherwise) if self.ordered else then()


def _run_in_turns(ops: dict[Kind, Iterator[None]]) -> None:
    while ops:
        for kind, op in list(ops.items()):
            with jax.named_scope(str(kind)):
                try:
                    next(op)
                except StopIteration:
                    del ops[kind]
