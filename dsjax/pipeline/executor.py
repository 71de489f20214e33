"""Runs a pipeline program on the devices of a mesh, inside `shard_map`: the same code on every rank, told by a table.

Per tick each rank reads its row of the table, branches on its opcode and on how many layers its stages have, and runs
the ops (`pipeline.tick`); last, what leaves for a neighbour is sent, and stored where the receiver's row says. In
steady state all ranks have the same opcode: a branch is left only where stages differ in layers. XLA runs one op's
all-to-alls under the other's products, inside of a branch too.

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
from dsjax.pipeline.buffers import Results, State
from dsjax.pipeline.chunk import SplitVJP, split_vjp
from dsjax.pipeline.overlap import interleaved
from dsjax.pipeline.program import Field, Opcode, Program, Segment
from dsjax.pipeline.schedule import Kind
from dsjax.pipeline.tick import Branch, TracedTick

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
        self.report = jax.eval_shape(lambda edges, y: model.finish(edges, y, none)[1], self.edges_of(model.last), x)

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
                functions = [self.branch(branch, alone=len(branches) == 1) for branch in branches]
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
        ranks_of: dict[tuple[Opcode, tuple[int, ...]], list[int]] = {}
        number_of = np.zeros((len(self.program.opcodes), self.program.schedule.ranks), np.int32)
        for rank, codes in enumerate(opcodes.T):
            for code in dict.fromkeys(codes.tolist()):
                opcode = self.program.opcodes[code]
                used = {slot for _, slot in opcode}
                counts = tuple(count if slot in used else 0 for slot, count in enumerate(self.counts[rank]))
                ranks_of.setdefault((opcode, counts), []).append(rank)
                number_of[code, rank] = list(ranks_of).index((opcode, counts))
        return [Branch(*key, tuple(ranks)) for key, ranks in ranks_of.items()], number_of

    def branch(self, branch: Branch, alone: bool = False) -> Callable:
        """Return what a rank does in a tick: `(state, row) -> (state, {"activation": y, "gradient": dx})`.

        Args:
            alone: whether all ranks do it.
        """
        is_pair = {Kind.F, Kind.B} <= {kind.role for kind, _ in branch.opcode}
        runs = self.in_pairs if is_pair else self
        pieces = runs.pieces if is_pair else runs.alone

        def run(state: State, row: Int[Array, " fields"]) -> tuple[State, dict[str, PyTree]]:
            return TracedTick(runs, pieces, branch, state, row).run(wait_for_grads=is_pair and alone)

        return interleaved(jax.named_call(run, name="pair")) if is_pair else run

    def edges_of(self, names: tuple[str, ...]) -> PyTree:
        """Return the edges of these names, as they are held."""
        return {name: self.edges[name] for name in names}
