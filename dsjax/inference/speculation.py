"""Speculative decoding: MTP modules draft the next tokens, the main model reads them all in one pass.

What the main model says behind each of them is a token of the answer as far as the drafts in front of it were right, so
a step gives 1 to 1 + K tokens of the answer for K drafts. Reading a few tokens takes hardly longer than reading one,
since both load the same weights.

A draft does not change what is chosen, only how soon. The token of a place is drawn as plain decoding draws it, from
the main model's logits with the noise of its seed and place, and a draft is right if it is that token. So answers are
those of plain decoding, token by token, at any temperature. Drafts are drawn with the same noise from the module's
logits: two distributions that share the noise of a Gumbel-max draw agree with probability (1 - d) / (1 + d) at least,
for a total variation distance d (Daliri, Musco, Suresh, arXiv 2408.07978), which is 1 where they are equal. The
well-known rejection rule (Leviathan et al., arXiv 2211.17192) reaches 1 - d, but its answers depend on the drafts.

At every place of a sequence level 0, the main model, has read its token and predicts the next, and so has level k,
module k: from its token and the state of level k - 1 at the place before (report section 2.2, with module k's row of
position i at place i + k). In this form what a page keeps depends on no token behind it. Drafts come in the order of
levels: the main model's state and the token chosen last give the first, module 1's state and that draft the second.
Where there are more drafts than modules, the last module goes on from its own states, as other engines let it.

Letters of shapes beside those of `cache.py`:
    K drafts   M modules
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dsjax.config import ModelConfig
from dsjax.inference.cache import PagedCache, read, read_states, write, write_states
from dsjax.inference.forward import (
    Batch,
    Read,
    are_requests,
    cached_attention,
    first_half,
    forward,
    moe_networks,
    places_known,
)
from dsjax.inference.machine import Machine
from dsjax.inference.programs import State, choose, program
from dsjax.inference.sampling import Drawn, draw, penalized, sample
from dsjax.model.attention import absorbed_attention
from dsjax.model.context import Context
from dsjax.model.moe import MoEAux
from dsjax.model.mtp import mtp
from dsjax.model.rope import rotation
from dsjax.model.transformer import bias_of
from dsjax.runtime import full_precision


class Verified(NamedTuple):
    """What a step has found for B requests."""

    drawn: Drawn
    """Of places [B, 1 + K]."""
    taken: Int[Array, " B"]
    """How many of them are tokens of the answer; 0 for a request that has all its tokens."""
    drafted: Int[Array, " B"]
    """How many drafts the main model has read."""


@program(results=2)
def prefill_and_draft(
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
    """Do what `programs.prefill` does, and draft tokens behind the one that is chosen."""
    how = {"config": config, "runtime": runtime}
    main = forward(params, biases, state.cache, batch, tokens, counts, **how)
    ends = jnp.take_along_axis(main.hidden, counts[:, None, None] - 1, axis=1)[:, 0]
    drawn, state = choose(runtime.scores(params, ends), batch, batch.lengths + counts, state, first, last)
    return drawn, _draft_and_keep(params, biases, state, batch, tokens, counts, main, **how)


@program(results=2)
def verify_and_draft(
    params: PyTree, biases: PyTree, state: State, batch: Batch, *, config: ModelConfig, runtime: Machine
) -> tuple[Verified, State]:
    """Read the token chosen last and the drafts of each request, choose the tokens behind them, and draft anew.

    `state` is given away.
    """
    how = {"config": config, "runtime": runtime}
    before, drafts = state.tokens[batch.slots], state.drafts[batch.slots]
    batch = batch._replace(lengths=state.lengths[batch.slots])
    tokens = jnp.concatenate([before[:, None], drafts], axis=1)
    width = tokens.shape[1]
    # The last token of an answer is not read.
    counts = jnp.clip(batch.ends - 1 - batch.lengths, 0, width)
    main = forward(params, biases, state.cache, batch, tokens, counts, **how)

    rows = batch._replace(choice=jax.tree.map(lambda leaf: jnp.repeat(leaf, width), batch.choice))
    places = batch.lengths[:, None] + 1 + jnp.arange(width)
    seen = _seen_behind(state, batch, tokens)
    drawn = draw(
        runtime.scores(params, main.hidden).reshape(-1, config.vocab_size), rows.choice, places.reshape(-1), seen
    )
    drawn = jax.tree.map(lambda leaf: leaf.reshape(-1, width, *leaf.shape[1:]), drawn)

    right = (drawn.tokens[:, :-1] == drafts) & (jnp.arange(1, width) < counts[:, None])
    taken = jnp.where(counts > 0, 1 + jnp.cumprod(right, axis=1).sum(axis=1), 0)
    final = jnp.take_along_axis(drawn.tokens, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
    is_taken = jnp.arange(width) < taken[:, None]
    state = state._replace(
        tokens=state.tokens.at[batch.slots].set(jnp.where(taken > 0, final, before)),
        seen=state.seen.at[batch.slots[:, None], drawn.tokens].max(is_taken),
    )
    state = _draft_and_keep(params, biases, state, batch, tokens, taken, main, **how)
    return Verified(drawn, taken, jnp.maximum(counts - 1, 0)), state


def _seen_behind(state: State, batch: Batch, tokens: Int[Array, "B N"]) -> Callable[[], Bool[Array, "BN V"]]:
    """Give what each place has seen if the tokens in front of it stay."""

    def seen() -> Bool[Array, "BN V"]:
        vocab_size = state.seen.shape[1]
        one_each = jax.nn.one_hot(tokens, vocab_size, dtype=jnp.int8)
        so_far = jax.lax.cummax(one_each, axis=1).astype(bool)
        return (state.seen[batch.slots][:, None] | so_far).reshape(-1, vocab_size)

    return seen


def _draft_and_keep(
    params: PyTree,
    biases: PyTree,
    state: State,
    batch: Batch,
    tokens: Int[Array, "B N"],
    counts: Int[Array, " B"],
    main: Read,
    *,
    config: ModelConfig,
    runtime: Machine,
) -> State:
    """Return the state in which the cache has the first `counts` tokens, and there are drafts behind the next."""
    chosen = state.tokens[batch.slots]

    def pick(scores: Float[Array, "B V"], places: Int[Array, " B"], drafts: list[Int[Array, " B"]]) -> Array:
        def seen() -> Bool[Array, "B V"]:
            so_far = [jax.nn.one_hot(token, scores.shape[1], dtype=bool) for token in drafts]
            return functools.reduce(jnp.logical_or, so_far, state.seen[batch.slots])

        return sample(penalized(scores, batch.choice, seen), batch.choice, places)

    drafts, entries, states = draft(
        params,
        biases,
        state.cache,
        batch,
        jnp.pad(tokens, ((0, 0), (0, 1))).at[jnp.arange(len(counts)), counts].set(chosen),
        counts,
        main.hidden,
        pick,
        state.drafts.shape[1],
        config=config,
        runtime=runtime,
    )
    where = batch.tables, batch.lengths, counts
    # Drafts that were wrong leave nothing behind: the one write of a pass comes when it is known what was right. It
    # also waits for all drafts, which read the cache: were it free to come before them, XLA would copy the whole cache.
    drafts, new, entries, states = jax.lax.optimization_barrier((drafts, main.entries, entries, states))
    cache = write_states(write(state.cache, jnp.concatenate([new, entries]), *where), states, *where)
    return state.counting(main.loads)._replace(
        cache=cache,
        lengths=state.lengths.at[batch.slots].set(batch.lengths + counts),
        drafts=state.drafts.at[batch.slots].set(drafts),
    )


@full_precision()
def draft(
    params: PyTree,
    biases: PyTree,
    cache: PagedCache,
    batch: Batch,
    tokens: Int[Array, "B N1"],
    counts: Int[Array, " B"],
    hidden: Float[Array, "B N D"],
    pick: Callable[[Float[Array, "B V"], Int[Array, " B"], list[Int[Array, " B"]]], Int[Array, " B"]],
    number: int,
    *,
    config: ModelConfig,
    runtime: Machine,
) -> tuple[Int[Array, "B K"], Float[Array, "M B N W"], Float[Array, "M B N D"]]:
    """Return tokens that may follow, and what the cache is to keep: entries of the modules, and states of all levels
    but the last.

    Args:
        params: stacked, weights in the compute format.
        biases: router biases, stacked.
        tokens: those that the main model has read behind the cache, and at `counts` the one chosen behind them.
        counts: how many the main model has read.
        hidden: its states behind them.
        pick: chooses the tokens of places from their logits; it is also told the drafts in front.
        number: K, at least M.
    """
    run = _Modules(params, biases, cache, batch, config, runtime)
    modules, width, rows = config.num_nextn_predict_layers, hidden.shape[1], jnp.arange(len(counts))
    before = read_states(cache, batch.tables, batch.lengths)
    levels, kept, drafts = [hidden], [], []
    for k in range(modules):
        # The module reads all that the main model has read and the drafts there are.
        left = jnp.concatenate([before[k][:, None], levels[-1]], axis=1)
        places = batch.lengths[:, None] + jnp.arange(tokens.shape[1])
        states, entries = run(k, left, tokens, places, run.behind_cache(k))
        last = jnp.take_along_axis(states, (counts + k)[:, None, None], axis=1)
        drafts.append(pick(runtime.scores(params, last[:, 0]), batch.lengths + counts + k + 1, drafts))
        tokens = jnp.pad(tokens, ((0, 0), (0, 1))).at[rows, counts + k + 1].set(drafts[-1])
        levels.append(states)
        kept.append(entries)

    own, index = kept[-1], jnp.arange(kept[-1].shape[1])
    is_own = (index < (counts + modules)[:, None]) & (batch.lengths[:, None] + index >= modules)
    for k in range(modules, number):
        # The last module reads its own last draft, and knows what it has just read beside what is in the cache.
        places = (batch.lengths + counts + k)[:, None]
        last, entry = run(modules - 1, last, drafts[-1][:, None], places, run.behind_drafts(own, is_own))
        drafts.append(pick(runtime.scores(params, last[:, 0]), places[:, 0] + 1, drafts))
        own = jnp.concatenate([own, entry], axis=1)
        is_own = jnp.pad(is_own, ((0, 0), (0, 1)), constant_values=True)

    def first_ones(arrays: list[Array]) -> Array:
        return jnp.stack([array[:, :width] for array in arrays])

    return jnp.stack(drafts, axis=1), first_ones(kept), first_ones(levels[:modules])


Attend = Callable[[PyTree, Array, Context], tuple[Array, Array]]
"""The first half of a layer: from parameters and states to states and entries of the cache."""


@dataclass(frozen=True)
class _Modules:
    """Runs MTP modules behind a cache."""

    params: PyTree
    biases: PyTree
    cache: PagedCache
    batch: Batch
    config: ModelConfig
    runtime: Machine

    def __call__(
        self, k: int, left: Float[Array, "B N D"], tokens: Int[Array, "B N"], places: Int[Array, "B N"], attend: Attend
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N W"]]:
        """Return states and entries of module k, counted from 0.

        Args:
            left: states of the level below, each at the place before.
        """
        stacked, biases, config = self.params["mtp"], self.biases.get("mtp", {}), self.config
        modules = config.num_nextn_predict_layers
        blocks, network = moe_networks(stacked["block"], modules, tokens.size, config=config, runtime=self.runtime)
        own, bias = jax.tree.map(lambda leaf: leaf[k], (stacked | {"block": blocks}, biases))
        kept = []

        def block(layer: PyTree, x: Array, ctx: Context) -> tuple[Array, MoEAux]:
            x, entries = attend(layer, self.runtime.share(x), ctx)
            kept.append(entries)
            x, aux = network(x, layer, k, ctx)
            return self.runtime.together(x, tokens.shape), aux

        # Rotations are relative, so the places of all levels may be counted alike.
        ctx = Context(*rotation(config, places)).for_layer(bias_of(bias.get("block", {})))
        if self.runtime.is_divided:
            real = jnp.broadcast_to(are_requests(self.batch)[:, None], tokens.shape)
            ctx = replace(ctx, real=self.runtime.share(real))
        states, _ = mtp(own, left, self.params["embed"][tokens], ctx, block, config=config)
        return states, kept[0]

    def behind_cache(self, k: int) -> Attend:
        """Let new tokens see what the cache has of module k, and themselves; it has nothing of the first k + 1."""
        at = self.config.num_hidden_layers + k

        def attend(layer: PyTree, x: Array, ctx: Context) -> tuple[Array, Array]:
            how = {"config": self.config, "runtime": self.runtime, "first": k + 1}
            return cached_attention(layer, x, self.cache, at, self.batch, ctx, **how)

        return attend

    def behind_drafts(self, own: Float[Array, "B N W"], is_own: Bool[Array, "B N"]) -> Attend:
        """Let one new token see what the cache has of the last module, entries that it has not yet, and itself."""
        modules = self.config.num_nextn_predict_layers
        at = self.config.num_hidden_layers + modules - 1

        def attend(layer: PyTree, x: Array, ctx: Context) -> tuple[Array, Array]:
            def form(to_queries: Array, new: Array, config: ModelConfig) -> Array:
                memory = read(self.cache, at, self.batch.tables, self.batch.lengths, new.dtype)
                known = places_known(jnp.arange(memory.shape[1]), self.batch, modules)
                pieces = [(memory, known[:, None]), (own, is_own[:, None]), (new, jnp.ones((1, 1, 1), bool))]
                return absorbed_attention(layer["attention"], to_queries, pieces, ctx, config=config)

            return first_half(layer, x, ctx, form, config=self.config, runtime=self.runtime)

        return attend
