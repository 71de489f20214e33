"""Runs a pipeline program on the devices of a mesh, inside `shard_map`: the same code on every rank, told by a table.

Per tick each rank reads its row of the table and branches on its opcode, and on how many layers its stages have. What
ops read is what buffers held before the tick; last, what leaves for a neighbour is sent, and stored where the
receiver's row says. In steady state all ranks have the same opcode: a branch is left only where stages differ in
layers. XLA runs one op's all-to-alls under the other's products, inside of a branch too.

A stage is run layer by layer, and so is its backward pass: each layer is a chunk of its own. How deep the buffers are,
and who lies where, are the program's (see `pipeline.program`), and do not grow with micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from dsjax.pipeline import buffers
from dsjax.pipeline.buffers import (
    Read,
    Results,
    State,
    after_grads,
    after_residuals,
    before_writes,
    with_grads,
    with_item,
)
from dsjax.pipeline.chunk import SplitVJP, split_vjp
from dsjax.pipeline.overlap import interleaved
from dsjax.pipeline.program import Field, Program, Segment
from dsjax.pipeline.schedule import Kind

AXIS = "pipe"


class Model(NamedTuple):
    """What the executor runs; `micro_batch` is a number, an int32 scalar."""

    chunk: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """One place of a stage, `(weights, x, ctx) -> (y, aux)`: a layer."""
    context: Callable[[int, int, Array], PyTree]
    """`(slot, place, micro_batch) -> ctx`."""
    embed: Callable[[PyTree, Array], PyTree]
    """What the first stage begins with: `(edges, micro_batch) -> x`; without collectives over the pipe axis."""
    finish: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    """What the last stage ends with: `(edges, y, micro_batch) -> (objective, report)`."""
    first: tuple[str, ...]
    """Names of the edges that `embed` uses."""
    last: tuple[str, ...]
    """Names of the edges that `finish` uses."""


Branch = tuple[tuple[tuple[Kind, int], ...], tuple[int, ...]]
"""An opcode, and the layers of the stage in each physical slot."""


class Executor:
    """A program with what it runs, on one device; to be made and used inside `shard_map`."""

    def __init__(
        self,
        program: Program,
        model: Model,
        weights: tuple[tuple[PyTree, ...], ...],
        counts: Sequence[tuple[int, ...]],
        edges: PyTree,
        x: PyTree,
        in_pairs: "Executor | None" = None,
    ):
        """Cut the chunk's backward pass, and look at shapes; nothing is computed.

        Args:
            weights: of the places in each physical slot, as many in all.
            counts: of every rank, how many places of each physical slot hold a layer.
            edges: what the first and the last stage use besides, as it is held.
            x: shape of what passes from stage to stage, as `jax.ShapeDtypeStruct`.
            in_pairs: what runs the pairs, where it is another model's, which keeps the same.
        """
        self.program, self.model, self.weights, self.edges, self.x = program, model, weights, edges, x
        self.counts = list(counts)
        self.row_of_rank = lax.axis_index(AXIS)
        none = jnp.zeros((), jnp.int32)
        self.pieces: SplitVJP = split_vjp(model.chunk, weights[0][0], x, model.context(0, 0, none))
        # Traced and lowered once, however many branches run them; a pair has to see their equations.
        self.alone = SplitVJP(**{name: jax.jit(f) if callable(f) else f for name, f in vars(self.pieces).items()})
        self.embed, self.finish = jax.jit(model.embed), jax.jit(jax.grad(model.finish, argnums=(0, 1), has_aux=True))
        self.in_pairs = in_pairs or self
        assert self.in_pairs.pieces.residual_avals == self.pieces.residual_avals
        self.report = jax.eval_shape(lambda edges, y: model.finish(edges, y, none)[1], self._edges(model.last), x)

    def run(self) -> Results:
        """Return what the device has of a step."""
        table = jnp.asarray(self.program.table)
        state = replace(self.empty(self._no_results()), tapes=())
        for segment in self.program.segments:
            # A loop that just passes tapes on would copy them in each of its branches.
            defers, tapes = self.program.defers(segment), state.tapes
            if defers:
                tapes = tapes or self._empty_tapes()
            state = self._segment(replace(state, tapes=tapes if defers else ()), segment, table)
            tapes = state.tapes if defers else tapes
            state = replace(state, tapes=tapes if self.program.is_waiting(segment.stop) else ())
        return state.results

    def _no_results(self) -> Results:
        def zeros(like: PyTree, dtype: Any = None) -> PyTree:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), like)

        return Results(
            grads=zeros(self.weights, jnp.float32),
            edge_grads=zeros(self.edges, jnp.float32),
            aux=tuple(tuple(zeros(self.pieces.aux_avals) for _ in slot) for slot in self.weights),
            report=zeros(self.report),
        )

    def empty(self, results: Results | None = None) -> State:
        """Return a state whose buffers hold nothing."""
        results = results or self._no_results()
        pools, pieces, places = self.program.pools, self.pieces, len(self.weights[0])
        return State(
            activations=buffers.empty(pools.activations + 1, self.x),
            gradients=buffers.empty(pools.gradients + 1, self.x),
            residuals=tuple(buffers.empty(pools.residuals, pieces.residual_avals) for _ in range(places)),
            tapes=self._empty_tapes(),
            results=results,
        )

    def _empty_tapes(self) -> tuple[Array, ...]:
        slots = len(self.weights[0]) * self.program.pools.tapes
        return buffers.empty(slots, self.pieces.tape_avals) if slots else ()

    def _segment(self, state: State, segment: Segment, table: Int[Array, "ticks ranks fields"]) -> State:
        period = len(segment.phases)
        phases = [(phase, *self.branches(segment, number)) for number, phase in enumerate(segment.phases)]

        def body(state: State, rows: Int[Array, "period ranks fields"]) -> tuple[State, None]:
            for (phase, branches, number_of), row in zip(phases, rows, strict=True):
                row = row[self.row_of_rank]
                functions = [self.branch(*branch, alone=len(branches) == 1) for branch in branches]
                if len(functions) == 1:
                    state, sent = functions[0](state, row)
                else:
                    which = jnp.asarray(number_of)[row[Field.OPCODE], self.row_of_rank]
                    state, sent = lax.switch(which, functions, state, row)
                for transfer in phase.transfers:
                    arrived = jax.tree.map(
                        lambda leaf, transfer=transfer: lax.ppermute(leaf, AXIS, transfer.pairs), sent[transfer.payload]
                    )
                    slot = row[transfer.channels[0].field]
                    for channel in transfer.channels[1:]:
                        slot = jnp.minimum(slot, row[channel.field])
                    buffer = {"activation": "activations", "gradient": "gradients"}[transfer.payload]
                    state = replace(state, **{buffer: buffers.write(getattr(state, buffer), arrived, slot)})
            return state, None

        rows = table[segment.start : segment.stop].reshape(-1, period, *table.shape[1:])
        if len(rows) == 1:
            return body(state, rows[0])[0]
        if self.program.schedule.ranks > 1:
            return lax.scan(body, state, rows)[0]
        # With one rank every F is followed by its B, and nothing else outlives a turn of the loop.
        results, _ = lax.scan(
            lambda results, rows: (body(self.empty(results), rows)[0].results, None), state.results, rows
        )
        return self.empty(results)

    def branches(self, segment: Segment, phase: int) -> tuple[list[Branch], Int[np.ndarray, "opcodes ranks"]]:
        """Return what ranks do in a phase of a segment, and the number of it by opcode and rank."""
        opcodes = self.program.table[segment.start + phase : segment.stop : len(segment.phases), :, Field.OPCODE]
        branches: list[Branch] = []
        number_of = np.zeros((len(self.program.opcodes), self.program.schedule.ranks), np.int32)
        for rank, codes in enumerate(opcodes.T):
            for code in dict.fromkeys(codes.tolist()):
                opcode = self.program.opcodes[code]
                used = {slot for _, slot in opcode}
                counts = (count if slot in used else 0 for slot, count in enumerate(self.counts[rank]))
                branch = opcode, tuple(counts)
                if branch not in branches:
                    branches.append(branch)
                number_of[code, rank] = branches.index(branch)
        return branches, number_of

    def branch(self, opcode: tuple[tuple[Kind, int], ...], counts: tuple[int, ...], alone: bool = False) -> Callable:
        """Return what a rank does in a tick: `(state, row) -> (state, {"activation": y, "gradient": dx})`.

        Args:
            alone: whether all ranks do it.
        """
        is_pair = {Kind.F, Kind.B} <= {kind.role for kind, _ in opcode}
        runs = self.in_pairs if is_pair else self
        pieces = runs.pieces if is_pair else runs.alone

        def branch(state: State, row: Int[Array, " fields"]) -> tuple[State, dict[str, PyTree]]:
            read = self._read(state, row, opcode, counts)
            if self.program.schedule.ranks > 1:
                read, state = before_writes(read, state, opcode, after_grads=is_pair and alone)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.x)
            sent = {"activation": zeros, "gradient": zeros}
            for kind, slot in opcode:
                match kind:
                    case Kind.F:
                        with jax.named_scope("F"):
                            state, sent["activation"] = runs._forward(state, row, slot, counts[slot], pieces, read.x)
                    case Kind.B | Kind.I:
                        with jax.named_scope(str(kind)):
                            state, sent["gradient"] = runs._backward(
                                state, row, slot, kind, pieces, read.residuals, read.dy
                            )
                    case Kind.W:
                        with jax.named_scope("W"):
                            state = runs._weights(state, row, slot, pieces, read.tapes)
            return state, sent

        return interleaved(jax.named_call(branch, name="pair")) if is_pair else branch

    def _read(
        self, state: State, row: Int[Array, " fields"], opcode: tuple[tuple[Kind, int], ...], counts: tuple[int, ...]
    ) -> Read:
        read = Read()
        for kind, slot in opcode:
            match kind:
                case Kind.F:
                    read = read._replace(x=buffers.read(state.activations, row[Field.F_INPUT]))
                case Kind.B | Kind.I:
                    layers = state.residuals[: counts[slot]]
                    residuals = tuple(buffers.read(layer, row[Field.B_RESIDUAL]) for layer in layers)
                    dy = buffers.read(state.gradients, row[Field.B_INPUT])
                    read = read._replace(residuals=residuals, dy=dy)
                case Kind.W:
                    at = (self._slot_of_tape(place, row[Field.W_TAPE]) for place in range(counts[slot]))
                    read = read._replace(tapes=tuple(buffers.read(state.tapes, slot) for slot in at))
        return read

    def _has(self, stage: int, slot: int) -> bool:
        """Return whether any rank has a stage in a slot."""
        return any(stages[slot] == stage for stages in self.program.stages)

    @property
    def _last_stage(self) -> int:
        return max(map(max, self.program.stages))

    def _forward(
        self, state: State, row: Int[Array, " fields"], slot: int, count: int, pieces: SplitVJP, x: PyTree
    ) -> tuple[State, PyTree]:
        model, micro_batch = self.model, row[Field.F_MICRO_BATCH]
        if self._has(0, slot):

            def embed() -> PyTree:
                return self.embed(self._edges(model.first), micro_batch)

            x = self._only_if(row[Field.F_FIRST], embed, lambda: x)
        y = x
        for place in range(count):
            if place and self.program.schedule.ranks > 1:
                # Left alone, XLA writes the residuals of all layers when all have been run.
                state, y = after_residuals(state, place - 1, y)
            ctx = model.context(slot, place, micro_batch)
            y, aux, residuals = pieces.fwd(self.weights[slot][place], y, ctx)
            results = state.results
            total = jax.tree.map(jnp.add, results.aux[slot][place], aux)
            state = replace(
                state,
                residuals=with_item(
                    state.residuals, place, buffers.write(state.residuals[place], residuals, row[Field.F_RESIDUAL])
                ),
                results=results._replace(aux=with_item(results.aux, slot, with_item(results.aux[slot], place, total))),
            )
        if self.program.schedule.route.kind == "vee":
            state = replace(state, activations=buffers.write(state.activations, y, row[Field.F_TURN]))
        if self._has(self._last_stage, slot):
            state = self._finish(state, row, y)
        return state, y

    def _finish(self, state: State, row: Int[Array, " fields"], y: PyTree) -> State:
        """Compute the loss and the gradient of the last stage's output at once: logits are never kept."""
        model, micro_batch, results = self.model, row[Field.F_MICRO_BATCH], state.results

        def last() -> tuple[PyTree, PyTree, PyTree]:
            (d_edges, dy), report = self.finish(self._edges(model.last), y, micro_batch)
            return dy, self._with_edges(results, d_edges), jax.tree.map(jnp.add, results.report, report)

        def not_last() -> tuple[PyTree, PyTree, PyTree]:
            return jax.tree.map(jnp.zeros_like, y), results.edge_grads, results.report

        dy, edge_grads, report = self._only_if(row[Field.F_LAST], last, not_last)
        return replace(
            state,
            gradients=buffers.write(state.gradients, dy, row[Field.F_LOSS]),
            results=results._replace(edge_grads=edge_grads, report=report),
        )

    def _backward(
        self,
        state: State,
        row: Int[Array, " fields"],
        slot: int,
        kind: Kind,
        pieces: SplitVJP,
        residuals: tuple,
        dy: PyTree,
    ) -> tuple[State, PyTree]:
        model, micro_batch, dx = self.model, row[Field.B_MICRO_BATCH], dy
        for place in reversed(range(len(residuals))):
            if kind is Kind.B and place + 2 < len(residuals):
                # The gradients of one layer may wait and fill gaps; those of all would need memory for all.
                state, dx = after_grads(state, slot, place + 2, dx)
            arguments = self.weights[slot][place], residuals[place], model.context(slot, place, micro_batch), dx
            if kind is Kind.B:
                dx, grads = pieces.bwd(*arguments, state.results.grads[slot][place])
                state = with_grads(state, slot, place, grads)
            else:
                dx, tape = pieces.bwd_input(*arguments)
                at = self._slot_of_tape(place, row[Field.B_TAPE])
                state = replace(state, tapes=buffers.write(state.tapes, tape, at))
        if self._has(0, slot):
            results = state.results

            def first() -> PyTree:
                edges = self._edges(model.first)
                _, transpose = jax.vjp(lambda edges: model.embed(edges, micro_batch), edges)
                return self._with_edges(results, transpose(dx)[0])

            edge_grads = self._only_if(row[Field.B_FIRST], first, lambda: results.edge_grads)
            state = replace(state, results=results._replace(edge_grads=edge_grads))
        if self.program.schedule.route.kind == "vee":
            state = replace(state, gradients=buffers.write(state.gradients, dx, row[Field.B_TURN]))
        return state, dx

    def _weights(self, state: State, row: Int[Array, " fields"], slot: int, pieces: SplitVJP, tapes: tuple) -> State:
        for place, tape in enumerate(tapes):
            if place:  # left alone, XLA makes the gradients of all layers before it adds them up
                state, tape = after_grads(state, slot, place - 1, tape)
            ctx = self.model.context(slot, place, row[Field.W_MICRO_BATCH])
            grads = pieces.bwd_weight(self.weights[slot][place], tape, ctx, state.results.grads[slot][place])
            state = with_grads(state, slot, place, grads)
        return state

    def _slot_of_tape(self, place: int, slot: Int[Array, ""]) -> Int[Array, ""]:
        return place * self.program.pools.tapes + slot

    def _edges(self, names: tuple[str, ...]) -> PyTree:
        return {name: self.edges[name] for name in names}

    def _with_edges(self, results: Results, grads: PyTree) -> PyTree:
        """Return the gradients of the edges with those of one more micro-batch."""
        before = {name: results.edge_grads[name] for name in grads}
        return results.edge_grads | jax.tree.map(lambda total, new: total + new.astype(jnp.float32), before, grads)

    def _only_if(self, flag: Int[Array, ""], then: Callable[[], PyTree], otherwise: Callable[[], PyTree]) -> PyTree:
        """Branch on a flag of the table; with a single rank, which has all stages, there is nothing to ask."""
        return then() if self.program.schedule.ranks == 1 else lax.cond(flag > 0, then, otherwise)
