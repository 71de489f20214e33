"""The programs of inference: `prefill` reads a piece of a prompt, `decode` one token of each of a batch; both choose
the token after. And what looks at a page, or changes one.

Shapes are static and the state is given away, so a program is compiled once per shape and writes in place. On a unit of
several devices a program is that of a single one inside `shard_map`: every group has its own requests, slots and pages,
of which it sees no others; see `layout`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from dsjax.config import ModelConfig
from dsjax.inference.cache import PagedCache, write
from dsjax.inference.forward import Batch, forward
from dsjax.inference.layout import AXES, GROUPS, weight_specs
from dsjax.inference.machine import Machine
from dsjax.inference.sampling import Drawn, draw

OF_GROUPS = PartitionSpec(GROUPS)
"""How arrays of requests are divided."""


class State(NamedTuple):
    """What stays on the device from one pass to the next. A request has one of S slots; the last is for padding."""

    cache: PagedCache
    tokens: Int[Array, " S"]
    """The token chosen last, which `decode` reads."""
    seen: Bool[Array, "S V"]
    """Tokens of prompt and answer, for the repetition penalty; only kept where a request has one."""
    lengths: Int[Array, " S"] | None = None
    """Tokens that the cache has; only for speculation, where the device alone knows."""
    drafts: Int[Array, "S K"] | None = None
    """Tokens that may follow the one chosen last; only for speculation."""
    loads: Int[Array, "1 sparse E"] | None = None
    """Tokens that chose each expert, on this device since it was last asked; only where experts are placed by it."""

    @property
    def spec(self) -> "State":
        """How the state of a unit is divided."""
        spec = State(*(None if field is None else OF_GROUPS for field in self))
        loads = None if self.loads is None else PartitionSpec(AXES)
        return spec._replace(cache=PartitionSpec(None, GROUPS), loads=loads)

    def counting(self, loads: Int[Array, "sparse E"]) -> "State":
        """Return the state in which these loads are counted, if any are."""
        return self if self.loads is None else self._replace(loads=self.loads + loads)


def program(results: int) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Compile functions `(params, biases, state, batch, ..., *, config, runtime)`, which give back a tuple with the
    state in its second place and what belongs to requests in the others; for one device, or for the unit of `runtime`.

    Args:
        results: length of the tuple.
    """

    def decorate(function: Callable[..., tuple]) -> Callable[..., tuple]:
        alone = jax.jit(function, static_argnames=("config", "runtime"), donate_argnames="state")

        @functools.lru_cache(maxsize=64)
        def on_unit(config: ModelConfig, runtime: Machine) -> Callable[..., tuple]:
            def whole(params: PyTree, biases: PyTree, state: State, batch: Batch, *rest: Array) -> tuple:
                mapped = jax.shard_map(
                    functools.partial(function, config=config, runtime=runtime),
                    mesh=runtime.mesh,
                    in_specs=(weight_specs(params), PartitionSpec(), state.spec, OF_GROUPS, *[OF_GROUPS] * len(rest)),
                    out_specs=(OF_GROUPS, state.spec, *[OF_GROUPS] * (results - 2)),
                    check_vma=False,
                )
                return mapped(params, biases, state, batch, *rest)

            return jax.jit(whole, donate_argnums=2)

        @functools.wraps(function)
        def run(*args: Any, config: ModelConfig, runtime: Machine) -> tuple:
            if runtime.is_divided:
                return on_unit(config, runtime)(*args)
            return alone(*args, config=config, runtime=runtime)

        run.alone, run.on_unit = alone, on_unit
        return run

    return decorate


@program(results=2)
def prefill(
    params: PyTree,
    biases: PyTree,
    state: State,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    first: Bool[Array, "#B V"],
    last: Bool[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Machine,
) -> tuple[Drawn, State]:
    """Read a piece of each prompt, and choose the token behind it.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        state: given away.
        tokens: the pieces, padded to one length.
        counts: tokens of each piece, at least 1.
        first: which tokens may be chosen.
        last: whether a piece is the last of its prompt; what is chosen behind others is of no account.
    """
    hidden, state = extended(params, biases, state, batch, tokens, counts, config=config, runtime=runtime)
    ends = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]
    return choose(runtime.scores(params, ends), batch, batch.lengths + counts, state, first, last)


@program(results=3)
def decode(
    params: PyTree, biases: PyTree, state: State, batch: Batch, *, config: ModelConfig, runtime: Machine
) -> tuple[Drawn, State, Batch]:
    """Read the token chosen last of each request, and choose the next; return also the batch that continues.

    `state` is given away.
    """
    tokens, counts = state.tokens[batch.slots], jnp.ones_like(batch.slots)
    hidden, state = extended(params, biases, state, batch, tokens[:, None], counts, config=config, runtime=runtime)
    lengths = batch.lengths + 1
    drawn, state = choose(runtime.scores(params, hidden[:, 0]), batch, lengths, state)
    return drawn, state, batch._replace(lengths=lengths)


def extended(
    params: PyTree,
    biases: PyTree,
    state: State,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    *,
    config: ModelConfig,
    runtime: Machine,
) -> tuple[Float[Array, "B N D"], State]:
    """Return the states behind new tokens, see `forward`, and the state whose cache has them."""
    read = forward(params, biases, state.cache, batch, tokens, counts, config=config, runtime=runtime)
    cache = write(state.cache, read.entries, batch.tables, batch.lengths, counts)
    return read.hidden, state._replace(cache=cache).counting(read.loads)


def choose(
    scores: Float[Array, "B V"],
    batch: Batch,
    places: Int[Array, " B"],
    state: State,
    allowed: Bool[Array, "#B V"] | None = None,
    counts: Bool[Array, " B"] | bool = True,
) -> tuple[Drawn, State]:
    """Return the token chosen for each place, and the state that has it.

    Args:
        allowed: which tokens may be chosen; by default all.
        counts: whether what is chosen is a token of the answer.
    """
    drawn = draw(scores, batch.choice, places, lambda: state.seen[batch.slots], allowed)
    seen = state.seen.at[batch.slots, drawn.tokens].max(counts)
    return drawn, state._replace(tokens=state.tokens.at[batch.slots].set(drawn.tokens), seen=seen)


def take_loads(state: State) -> tuple[Int[Array, "sparse E"], State]:
    """Return what all devices have counted, and the state that counts from zero again."""
    return state.loads.sum(axis=0), state._replace(loads=jnp.zeros_like(state.loads))


@functools.partial(jax.jit, static_argnames="runtime", donate_argnames="state")
def mark_seen(
    state: State, group: Int[Array, ""], slot: Int[Array, ""], tokens: Bool[Array, " V"], *, runtime: Machine
) -> State:
    """Return the state in which a slot of a group has seen just these tokens."""

    def mark(state: State, group: Array, slot: Array, tokens: Array) -> State:
        at = jnp.where(runtime.is_of(group), slot, len(state.seen))
        return state._replace(seen=state.seen.at[at].set(tokens, mode="drop"))

    return _on_groups(mark, state, state.spec, runtime)(state, group, slot, tokens)


@functools.partial(jax.jit, static_argnames="runtime")
def read_page(
    state: State, group: Int[Array, ""], page: Int[Array, ""], *, runtime: Machine
) -> dict[str, Shaped[Array, "L ..."]]:
    """Return what is on a page of a group."""

    def read(state: State, group: Array, page: Array) -> dict[str, Array]:
        pages = {name: array[:, page] for name, array in state.cache.arrays.items()}
        return jax.tree.map(lambda found: lax.all_gather(found, GROUPS)[group], pages) if runtime.is_divided else pages

    return _on_groups(read, state, PartitionSpec(), runtime)(state, group, page)


@functools.partial(jax.jit, static_argnames="runtime", donate_argnames="state")
def write_page(
    state: State,
    group: Int[Array, ""],
    page: Int[Array, ""],
    contents: dict[str, Shaped[Array, "L ..."]],
    *,
    runtime: Machine,
) -> State:
    """Return the state with other contents of a page of a group."""

    def put(state: State, group: Array, page: Array, contents: dict[str, Array]) -> State:
        at = jnp.where(runtime.is_of(group), page, state.cache.pages)
        arrays = {name: array.at[:, at].set(contents[name], mode="drop") for name, array in state.cache.arrays.items()}
        return state._replace(cache=PagedCache(arrays))

    return _on_groups(put, state, state.spec, runtime)(state, group, page, contents)


def _on_groups(function: Callable[..., Any], state: State, result: Any, machine: Machine) -> Callable[..., Any]:
    """Return a function of a state and of what is the same on all devices, on every device of a unit."""
    if not machine.is_divided:
        return function

    def mapped(state: State, *rest: PyTree) -> Any:
        specs = (state.spec, *[PartitionSpec()] * len(rest))
        return jax.shard_map(function, mesh=machine.mesh, in_specs=specs, out_specs=result, check_vma=False)(
            state, *rest
        )

    return mapped
