"""Runs a pipeline program on the devices of a mesh, inside `shard_map`: the same code on every rank, told by a table.

Per tick each rank reads its row of the table and branches on its opcode, and on how many layers its stages have; all
reads of buffers come first, then the ops, then all writes; last, what leaves for a neighbour is sent, and stored where
the receiver's row says. In steady state all ranks have the same opcode: a branch is left only where stages differ in
layers. XLA runs one op's all-to-alls under the other's products, inside of a branch too.

A stage is run layer by layer, and so is its backward pass: each layer is a chunk of its own. Buffers hold activations
(inputs of stages), gradients (of their outputs), residuals and tapes (see `pipeline.chunk`); their depths and who lies
where are the program's (see `pipeline.program`), and do not grow with micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from dsjax.pipeline import buffers
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


class Results(NamedTuple):
    """What one device has of a step."""

    grads: tuple[tuple[PyTree, ...], ...]
    """Of the weights of each slot and place, float32, summed over micro-batches; zero in places that are empty."""
    edge_grads: PyTree
    """Of the edges as they are held, float32; zero but on ranks that have the first or the last stage."""
    aux: tuple[tuple[PyTree, ...], ...]
    """What the chunks of each slot and place reported, summed over micro-batches."""
    report: PyTree
    """What `finish` reported, summed over micro-batches."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    activations: PyTree
    gradients: PyTree
    residuals: tuple[tuple[Array, ...], ...]
    """Of every place."""
    tapes: tuple[tuple[Array, ...], ...]
    """Of every place."""
    results: Results


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
        state = self.empty(self._no_results())
        for segment in self.program.segments:
            state = self._segment(state, segment, table)
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

    def empty(self, results: Results | None = None) -> _State:
        """Return a state whose buffers hold nothing."""
        results = results or self._no_results()
        pools, pieces = self.program.pools, self.pieces

        return _State(
            activations=buffers.empty(pools.activations + 1, self.x),
            gradients=buffers.empty(pools.gradients + 1, self.x),
            residuals=tuple(buffers.empty(pools.residuals, pieces.residual_avals) for _ in self.weights[0]),
            tapes=tuple(buffers.empty(pools.tapes, pieces.tape_avals) for _ in self.weights[0]) if pools.tapes else (),
            results=results,
        )

    def _segment(self, state: _State, segment: Segment, table: Int[Array, "ticks ranks fields"]) -> _State:
        period = len(segment.phases)
        phases = [(phase, *self.branches(segment, number)) for number, phase in enumerate(segment.phases)]

        def body(state: _State, rows: Int[Array, "period ranks fields"]) -> tuple[_State, None]:
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

        def branch(state: _State, row: Int[Array, " fields"]) -> tuple[_State, dict[str, PyTree]]:
            read: dict[Kind, Any] = {}
            for kind, slot in opcode:
                match kind:
                    case Kind.F:
                        read[kind] = buffers.read(state.activations, row[Field.F_INPUT])
                    case Kind.B | Kind.I:
                        read[kind] = (
                            buffers.read(state.residuals[: counts[slot]], row[Field.B_RESIDUAL]),
                            buffers.read(state.gradients, row[Field.B_INPUT]),
                        )
                    case Kind.W:
                        read[kind] = buffers.read(state.tapes[: counts[slot]], row[Field.W_TAPE])
            if self.program.schedule.ranks > 1:
                if is_pair and alone:
                    read, state = _after_grads(read, state)
                read, state = _before_writes(read, state)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.x)
            sent = {"activation": zeros, "gradient": zeros}
            for kind, slot in opcode:
                match kind:
                    case Kind.F:
                        with jax.named_scope("F"):
                            state, sent["activation"] = runs._forward(
                                state, row, slot, counts[slot], pieces, read[kind]
                            )
                    case Kind.B | Kind.I:
                        with jax.named_scope(str(kind)):
                            state, sent["gradient"] = runs._backward(state, row, slot, kind, pieces, *read[kind])
                    case Kind.W:
                        with jax.named_scope("W"):
                            state = runs._weights(state, row, slot, pieces, read[kind])
            return state, sent

        return interleaved(jax.named_call(branch, name="pair")) if is_pair else branch

    def _has(self, stage: int, slot: int) -> bool:
        """Return whether any rank has a stage in a slot."""
        return any(stages[slot] == stage for stages in self.program.stages)

    @property
    def _last_stage(self) -> int:
        return max(map(max, self.program.stages))

    def _forward(
        self, state: _State, row: Int[Array, " fields"], slot: int, count: int, pieces: SplitVJP, x: PyTree
    ) -> tuple[_State, PyTree]:
        model, micro_batch = self.model, row[Field.F_MICRO_BATCH]
        if self._has(0, slot):

            def embed() -> PyTree:
                return self.embed(self._edges(model.first), micro_batch)

            x = self._only_if(row[Field.F_FIRST], embed, lambda: x)
        y = x
        for place in range(count):
            ctx = model.context(slot, place, micro_batch)
            y, aux, residuals = pieces.fwd(self.weights[slot][place], y, ctx)
            results = state.results
            total = jax.tree.map(jnp.add, results.aux[slot][place], aux)
            state = replace(
                state,
                residuals=_with(
                    state.residuals, place, buffers.write(state.residuals[place], residuals, row[Field.F_RESIDUAL])
                ),
                results=results._replace(aux=_with(results.aux, slot, _with(results.aux[slot], place, total))),
            )
        if self.program.schedule.route.kind == "vee":
            state = replace(state, activations=buffers.write(state.activations, y, row[Field.F_TURN]))
        if self._has(self._last_stage, slot):
            state = self._finish(state, row, y)
        return state, y

    def _finish(self, state: _State, row: Int[Array, " fields"], y: PyTree) -> _State:
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
        state: _State,
        row: Int[Array, " fields"],
        slot: int,
        kind: Kind,
        pieces: SplitVJP,
        residuals: tuple,
        dy: PyTree,
    ) -> tuple[_State, PyTree]:
        model, micro_batch, dx = self.model, row[Field.B_MICRO_BATCH], dy
        for place in reversed(range(len(residuals))):
            if kind is Kind.B and place + 2 < len(residuals):
                # The gradients of one layer may wait and fill gaps; those of all would need memory for all.
                state, dx = _after_place(state, slot, place + 2, dx)
            arguments = self.weights[slot][place], residuals[place], model.context(slot, place, micro_batch), dx
            if kind is Kind.B:
                dx, grads = pieces.bwd(*arguments, state.results.grads[slot][place])
                state = _with_grads(state, slot, place, grads)
            else:
                dx, tape = pieces.bwd_input(*arguments)
                state = replace(
                    state,
                    tapes=_with(
                        state.tapes, place, buffers.write_in_branch(state.tapes[place], tape, row[Field.B_TAPE])
                    ),
                )
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

    def _weights(self, state: _State, row: Int[Array, " fields"], slot: int, pieces: SplitVJP, tapes: tuple) -> _State:
        for place, tape in enumerate(tapes):
            if place:  # left alone, XLA makes the gradients of all layers before it adds them up
                state, tape = _after_place(state, slot, place - 1, tape)
            ctx = self.model.context(slot, place, row[Field.W_MICRO_BATCH])
            grads = pieces.bwd_weight(self.weights[slot][place], tape, ctx, state.results.grads[slot][place])
            state = _with_grads(state, slot, place, grads)
        return state

    def _edges(self, names: tuple[str, ...]) -> PyTree:
        return {name: self.edges[name] for name in names}

    def _with_edges(self, results: Results, grads: PyTree) -> PyTree:
        """Return the gradients of the edges with those of one more micro-batch."""
        before = {name: results.edge_grads[name] for name in grads}
        return results.edge_grads | jax.tree.map(lambda total, new: total + new.astype(jnp.float32), before, grads)

    def _only_if(self, flag: Int[Array, ""], then: Callable[[], PyTree], otherwise: Callable[[], PyTree]) -> PyTree:
        """Branch on a flag of the table; with a single rank, which has all stages, there is nothing to ask."""
        return then() if self.program.schedule.ranks == 1 else lax.cond(flag > 0, then, otherwise)


def _with_grads(state: _State, slot: int, place: int, grads: PyTree) -> _State:
    results = state.results
    all_grads = _with(results.grads, slot, _with(results.grads[slot], place, grads))
    return replace(state, results=results._replace(grads=all_grads))


def _with[T](values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _before_writes(read: dict[Kind, Any], state: _State) -> tuple[dict[Kind, Any], _State]:
    """Keep reads before writes: otherwise XLA copies whole buffers to have both.

    A buffer that nothing writes in this tick is left out: behind the barrier XLA would copy it."""
    written = {"activations": state.activations, "gradients": state.gradients}  # by transfers at the end
    if Kind.F in read:
        written["residuals"] = state.residuals
    if Kind.I in read:
        written["tapes"] = state.tapes
    early = {kind: value for kind, value in read.items() if kind is not Kind.W or Kind.I in read}
    early, written = lax.optimization_barrier((early, written))
    return read | early, replace(state, **written)


def _after_grads(read: dict[Kind, Any], state: _State) -> tuple[dict[Kind, Any], _State]:
    """Make a pair wait for the gradients of ticks before. They then fill the time of the transfers between, which is
    all that there is for it; free to, they would fill some in the pair, where there is other work."""
    read, grads = lax.optimization_barrier((read, state.results.grads))
    return read, replace(state, results=state.results._replace(grads=grads))


def _after_place(state: _State, slot: int, place: int, value: PyTree) -> tuple[_State, PyTree]:
    """Make what reads `value` wait until the gradients of a place are added up."""
    added, value = lax.optimization_barrier((state.results.grads[slot][place], value))
    return _with_grads(state, slot, place, added), value
