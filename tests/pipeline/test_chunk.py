"""The pieces of a chunk: the bits of `jax.vjp`, and in each piece the work that belongs there."""

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from meshes import SMALL

from dsjax.config import Config, DispatchConfig, MeshConfig, TrainConfig
from dsjax.model.block import SAVED, Block, block_function
from dsjax.model.context import context
from dsjax.parallel.exchange import exchange_of
from dsjax.parallel.mesh import EXPERT_AXES, make_mesh
from dsjax.pipeline.chunk import split_vjp
from dsjax.runtime import Runtime

PIECES = ("fwd", "bwd", "bwd_input", "bwd_weight")
T, D, F, DEVICES = 12, 8, 20, 4
"""Of the toy, per device."""
MODEL = dataclasses.replace(
    SMALL.model, num_hidden_layers=2, q_lora_rank=12, kv_lora_rank=20, num_nextn_predict_layers=0
)


def jitted(function):
    # Otherwise XLA may leave out roundings to BF16 where both neighbours are in one program, which pieces are not.
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


def by_pieces(split, params, x, ctx, dy):
    """All results of the pieces: y, aux, then dx and dparams of the backward pass, whole and in two."""
    y, aux, residuals = split.fwd(params, x, ctx)
    nothing = in_float32(jax.tree.map(jnp.zeros_like, params))
    whole = split.bwd(params, residuals, ctx, dy, nothing)
    dx, tape = split.bwd_input(params, residuals, ctx, dy)
    return y, aux, whole, (dx, split.bwd_weight(params, tape, ctx, nothing))


def in_float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def by_jax(chunk, params, x, ctx, dy):
    y, vjp, aux = jax.vjp(lambda params, x: chunk(params, x, ctx), params, x, has_aux=True)
    dparams, dx = vjp(dy)
    dparams = in_float32(dparams)
    return y, aux, (dx, dparams), (dx, dparams)


def work(split, params, x, ctx, dy):
    """How often each primitive occurs in each piece; under "overflow:" and its name in what runs in some cases only."""
    backward, totals = (params, split.residual_avals, ctx, dy), in_float32(params)
    of_pieces = (params, x, ctx), (*backward, totals), backward, (params, split.tape_avals, ctx, totals)
    arguments = dict(zip(PIECES, of_pieces, strict=True))

    def count(jaxpr, prefix, counts):
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            counts[prefix + name] += 1
            for inner in jex.jaxprs_in_params(eqn.params):
                count(inner, "overflow:" if name == "cond" or at_most_once(eqn) else prefix, counts)
        return counts

    return {name: count(jax.make_jaxpr(getattr(split, name))(*arguments[name]).jaxpr, "", Counter()) for name in PIECES}


def at_most_once(eqn):
    """Whether it is a conditional that is a loop, for its state to be updated in place."""
    return eqn.primitive.name == "while" and eqn.outvars[0].aval.dtype == bool


def check_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), jax.tree_util.keystr(path)


def check_same_but_for_the_order_of_sums(found, expected, dtype):
    """The bits of all but gradients of weights, to which an overflow adds its own in its own order."""
    *values, (dx, grads), (dx_again, grads_again) = found
    *expected_values, (dx_expected, grads_expected), _ = expected
    check_same_bits((values, dx, dx_again), (expected_values, dx_expected, dx_expected))
    for sums in (grads, grads_again):
        for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(grads_expected), strict=True):
            scale = np.abs(np.asarray(b)).max()
            np.testing.assert_allclose(a, b, atol=scale * (1e-6 if dtype == jnp.float32 else 2**-7))


def occurring(counts, primitive):
    return tuple(counts[name][primitive] for name in PIECES)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sizes(tree):
    return Counter((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(tree))


# A toy with every feature.


@jax.custom_vjp
def permute(plan, x):
    return x[plan["there"]]


permute.defvjp(lambda plan, x: (permute(plan, x), plan), lambda plan, dy: (None, dy[plan["back"]]))


def toy_layer(params, x, ctx):
    hidden, mtp = checkpoint_name(x["hidden"], "hidden"), x["mtp"]
    rms = lax.rsqrt(jnp.square(hidden.astype(jnp.float32)).mean(-1, keepdims=True) + 1e-6)
    normalized = (hidden.astype(jnp.float32) * rms * params["gain"]).astype(hidden.dtype)
    there = jnp.argsort(normalized[:, 0] + ctx["bias"])
    plan = jax.tree.map(lambda a: checkpoint_name(a, "plan"), {"there": there, "back": jnp.argsort(there)})
    rows = checkpoint_name(lax.all_to_all(permute(plan, normalized), "local", 0, 0, tiled=True), "rows")

    def experts(rows):
        up = checkpoint_name(rows @ params["up"].astype(rows.dtype), "up")
        return jax.nn.silu(up) @ params["down"].astype(rows.dtype)

    def overflow(y):
        rows = lax.all_to_all(permute(plan, normalized), "local", 0, 0, tiled=True)
        up = rows @ params["up"].astype(rows.dtype)
        return y + lax.all_to_all(up @ params["down"].astype(rows.dtype), "local", 0, 0, tiled=True)

    y = hidden + permute(
        {"there": plan["back"], "back": there}, lax.all_to_all(experts(rows), "local", 0, 0, tiled=True)
    )
    y = lax.cond(lax.pmax(there[0], "local") >= ctx["from"], jax.checkpoint(overflow), lambda y: y, y)
    turned = mtp * jnp.cos(ctx["positions"])[:, None].astype(mtp.dtype)
    mtp = jnp.tanh(turned) @ params["tied"].astype(mtp.dtype)
    aux = {"loads": jnp.bincount(there // 3, length=4), "loss": lax.stop_gradient(rms.mean())}
    return {"hidden": y, "mtp": mtp}, aux


def toy(params, x, ctx):
    policy = jax.checkpoint_policies.save_only_these_names("hidden", "plan", "rows", "up")
    first, second = (jax.checkpoint(toy_layer, policy=policy) for _ in range(2))
    x, aux = first({**params["first"], "tied": params["tied"]}, x, ctx)
    y, more = second({**params["second"], "tied": params["tied"]}, x, ctx)
    return y, (aux, more)


def toy_arguments(dtype):
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    def layer():
        return {"gain": 1 + normal(D) / 10, "up": normal(D, F) / 3, "down": normal(F, D) / 4, "unused": normal(2)}

    params = {"first": layer(), "second": layer(), "tied": normal(D, D) / 3}
    x, dy = (
        {"hidden": normal(DEVICES * T, D).astype(dtype), "mtp": normal(DEVICES * T, D).astype(dtype)} for _ in "xy"
    )
    return params, x, {"positions": jnp.arange(T), "bias": normal(), "from": 0}, dy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_toy_with_every_feature(dtype):
    arguments = toy_arguments(dtype)
    mesh = make_mesh(MeshConfig(local=DEVICES))
    found = {}

    def on_devices(function):
        mapped = jax.shard_map(
            lambda *args: jax.tree.map(lambda a: a[None], function(*args)),
            mesh=mesh,
            in_specs=(P(), P("local"), P(), P("local")),
            out_specs=P("local"),
            check_vma=False,
        )
        return jitted(mapped)(*arguments)

    calls = []

    def pieces(params, x, ctx, dy):
        split = split_vjp(lambda *args: calls.append(1) or toy(*args), params, x, ctx)
        found.update(split=split, work=work(split, params, x, ctx, dy))
        return by_pieces(split, params, x, ctx, dy)

    results = on_devices(pieces)
    assert len(calls) == 1
    check_same_but_for_the_order_of_sums(results, on_devices(lambda *args: by_jax(toy, *args)), dtype)

    split, work_of = found["split"], found["work"]
    assert occurring(work_of, "dot_general") == (6, 12, 6, 6)
    assert occurring(work_of, "all_to_all") == (4, 4, 4, 0)
    # An overflow is recomputed for weights, with the tokens and the cotangents on their way to the experts.
    assert occurring(work_of, "overflow:all_to_all") == (4, 8, 4, 4)
    assert occurring(work_of, "overflow:dot_general") == (4, 12, 4, 8)

    width = jnp.dtype(dtype).itemsize
    # For each layer hidden, mtp, rows, up, and two permutations; neither weights in another format nor the tanh.
    assert nbytes(split.residual_avals) == 2 * T * ((3 * D + F) * width + 2 * 4)
    # For each layer the input and the cotangent of three products; of an overflow its tokens, their cotangent, two
    # permutations and the predicate; and the gain's gradient.
    assert nbytes(split.tape_avals) == 2 * (T * ((D + F + F + D + D + D + D + D) * width + 2 * 4) + 1 + 4 * D)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("rounds", [None, 3])
def test_gradients_are_added_to_totals(rounds, rare, dtype):
    """What is zero but in rare cases too, and what rounds add up, and then without zeros as large as the parameters."""

    def chunk(params, x, ctx):
        def rarely(y):
            if rounds is None:
                return y + jnp.sin(y @ params["w"])

            def step(total, number):
                in_round = lambda: jnp.sin(number * y @ params["w"])  # noqa: E731
                return total + lax.cond(number != 1, in_round, lambda: jnp.zeros_like(y)), None

            return lax.scan(step, y, jnp.arange(rounds))[0]

        y = jnp.tanh(x @ params["w"] + params["b"])
        return lax.cond(ctx, jax.checkpoint(rarely), lambda y: y, y), None

    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = {"w": jax.random.normal(next(keys), (3, 3), dtype) / 3, "b": jnp.ones(3, dtype)}
    x, dy = (jax.random.normal(next(keys), (2, 3), dtype) for _ in "xy")
    totals = {"w": jax.random.normal(next(keys), (3, 3)), "b": jnp.arange(3.0)}
    split = split_vjp(chunk, params, x, rare)
    *_, (_, dparams), _ = by_jax(chunk, params, x, rare, dy)
    expected = jax.tree.map(jnp.add, totals, dparams)
    _, _, residuals = split.fwd(params, x, rare)
    _, tape = split.bwd_input(params, residuals, rare, dy)
    found = split.bwd(params, residuals, rare, dy, totals)[1], split.bwd_weight(params, tape, rare, totals)
    for sums in found:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6 if dtype == jnp.float32 else 0.02), sums, expected)

    def is_total(var):
        return var.aval.shape == (3, 3)

    def all_eqns(jaxpr):
        return [
            eqn for e in jaxpr.eqns for eqn in (e, *(i for j in jex.jaxprs_in_params(e.params) for i in all_eqns(j)))
        ]

    for piece, arguments in ((split.bwd, (residuals, rare, dy)), (split.bwd_weight, (tape, rare))):
        eqns = all_eqns(jax.make_jaxpr(piece)(params, *arguments, totals).jaxpr)
        in_place = [eqn for eqn in eqns if at_most_once(eqn) and any(map(is_total, eqn.outvars))]
        zeros = [eqn for eqn in eqns if eqn.primitive.name == "broadcast_in_dim" and is_total(eqn.outvars[0])]
        assert in_place
        # A loop that adds up in another format begins with zero, and a round that has nothing adds zero.
        assert bool(zeros) == (rounds is not None and dtype == jnp.bfloat16)


def shared_by_turns(params, x, ctx):
    return lax.scan(lambda y, _: (jnp.tanh(y @ params["w"]), None), x, None, length=3)[0], None


def shared_by_turns_backwards(params, x, ctx):
    return lax.scan(lambda y, row: (jnp.tanh(y @ params["w"] * row), None), x, x, reverse=True)[0], None


def sometimes_without_a_product(params, x, ctx):
    return lax.cond(ctx, lambda y: jnp.sin(y * params["w"]), lambda y: y, x), None


def summed_and_read(params, x, ctx):
    def turn(state, row):
        total = state[0] + state[1]
        return (total, state[1] + row), total * row

    return lax.scan(turn, (params["a"], params["b"]), x)[1], None


def sometimes_summed_and_read(params, x, ctx):
    return lax.cond(ctx, lambda y: summed_and_read(params, y, ctx)[0] @ params["w"], lambda y: y, x), None


@pytest.mark.parametrize(
    "chunk",
    [
        shared_by_turns,
        shared_by_turns_backwards,
        sometimes_without_a_product,
        summed_and_read,
        sometimes_summed_and_read,
    ],
)
def test_totals_go_only_where_nobody_else_looks(chunk):
    """Loops and conditionals that the input's gradient needs too, or whose sums are read on the way."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x, dy = (jax.random.normal(next(keys), (3, 3)) for _ in "xy")
    params, totals = (
        {name: jax.random.normal(next(keys), shape) for name, shape in {"w": (3, 3), "a": (3,), "b": (3,)}.items()}
        for _ in range(2)
    )
    split = split_vjp(chunk, params, x, True)
    *_, (dx, dparams), _ = by_jax(chunk, params, x, True, dy)
    _, _, residuals = split.fwd(params, x, True)
    whole = split.bwd(params, residuals, True, dy, totals)
    dx_alone, tape = split.bwd_input(params, residuals, True, dy)
    for found in (whole, (dx_alone, split.bwd_weight(params, tape, True, totals))):
        np.testing.assert_allclose(found[0], dx, rtol=1e-5, atol=1e-6)
        expected = jax.tree.map(jnp.add, totals, dparams)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[1], expected)
    eqns = jax.make_jaxpr(split.bwd)(params, residuals, True, dy, totals).eqns
    assert sum(eqn.primitive.name == "scan" for eqn in eqns) <= 1


def test_pieces_run_in_branches_of_a_loop():
    """As a schedule runs them: memory of residuals and tapes is a loop's state."""

    def chunk(params, x, ctx):
        return jnp.tanh(x @ params) * ctx, None

    params, xs = jnp.eye(3) + 1, jnp.arange(12.0).reshape(2, 2, 3) / 10
    split = split_vjp(chunk, params, xs[0], 2.0)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (split.residual_avals, split.tape_avals))

    def step(state, now):
        op, i = now
        residuals, tape, dparams = state
        branches = [
            lambda: (split.fwd(params, xs[i], 2.0)[2], tape, dparams),
            lambda: (residuals, split.bwd_input(params, residuals, 2.0, xs[i])[1], dparams),
            lambda: (residuals, tape, split.bwd_weight(params, tape, 2.0, dparams)),
        ]
        return lax.switch(op, branches), None

    operations = jnp.array([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]])
    (_, _, dparams), _ = jax.jit(lambda: lax.scan(step, (*zeros, jnp.zeros_like(params)), operations))()
    expected = sum(jax.vjp(lambda params, x=x: chunk(params, x, 2.0)[0], params)[1](x)[0] for x in xs)
    np.testing.assert_allclose(dparams, expected, rtol=1e-6)


# The model's layers.


def layer_parameters(*, dense):
    state = nnx.state(Block(MODEL, nnx.Rngs(int(dense)), dense=dense), nnx.Param)
    return nnx.to_pure_dict(state)


def layers(runtime):
    """A chunk of several layers, the biases of whose routers are in `ctx`."""
    layer = block_function(MODEL, runtime)

    def chunk(params, x, ctx):
        shared, biases = ctx
        aux = []
        for layer_params, bias in zip(params, biases, strict=True):
            x, one = layer(layer_params, x, shared.for_layer(bias))
            aux.append(one)
        return x, aux

    return chunk


def layer_arguments(sequences, length, kinds, dtype=jnp.float32):
    """Arguments of a chunk of layers, dense where `kinds` says so: params, x, ctx, dy."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(sequences, length, MODEL.hidden_size)), dtype) for _ in "xy")
    segments = jnp.asarray(np.arange(length)[None] // 5 + np.zeros((sequences, 1)), jnp.int32)
    bias = jnp.asarray(0.05 * rng.normal(size=MODEL.n_routed_experts), jnp.float32)
    ctx = context(MODEL, length, segments=segments, balance_weight=0.01), [bias for _ in kinds]
    return tuple(layer_parameters(dense=dense) for dense in kinds), x, ctx, dy


def named(runtime, params, x, ctx):
    """Sizes of all values with a name that `remat = "report"` keeps."""
    found = Counter()
    chunk = layers(dataclasses.replace(runtime, remat="none"))

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "name" and eqn.params["name"] in SAVED:
                found[eqn.outvars[0].aval.dtype.name, eqn.outvars[0].aval.size] += 1
            for inner in jex.jaxprs_in_params(eqn.params):
                visit(inner)

    # Derivation rules name what they keep, so names are those of a differentiated pass.
    visit(jax.make_jaxpr(lambda x: jax.vjp(lambda x: chunk(params, x, ctx), x, has_aux=True)[0])(x).jaxpr)
    return found


def check_kept(kept, names):
    assert kept <= names  # of the plan, sizes of groups and whether rows wait are not read again
    assert not [key for key in names - kept if key[0] not in ("int32", "bool")]


DENSE = 5 + 2
MOE = 5 + 1 + 2 * 3 + 2
"""Products with weights: of attention, the router, routed experts (loops over three sizes of blocks), an FFN."""


@pytest.mark.parametrize(
    "remat, dtype, recomputed",
    [
        ("none", "float32", 0),
        # The up-projections of queries, keys and values.
        ("report", "bfloat16", 2 + 2),
        # All but the last of each FFN: dense; routed, whose loops are three, and shared.
        ("full", "float32", (DENSE + 2 - 1) + (MOE + 2 - 1 - 3)),
    ],
)
def test_layers_on_one_device(remat, dtype, recomputed):
    params, x, ctx, dy = layer_arguments(3, 24, (True, False), dtype)
    runtime = Runtime(compute_dtype=jnp.dtype(dtype), remat=remat)
    chunk = layers(runtime)
    split = split_vjp(chunk, params, x, ctx)
    results = jitted(lambda *args: by_pieces(split, *args))(params, x, ctx, dy)
    check_same_bits(results, jitted(lambda *args: by_jax(chunk, *args))(params, x, ctx, dy))

    n, attention = DENSE + MOE, 2 * 2  # scores and sums of values, whose backward pass has five products
    work_of = work(split, params, x, ctx, dy)
    assert occurring(work_of, "dot_general") == (n + attention, 2 * n + 10 + recomputed, n + 10 + recomputed, n)

    # One for each layer that recomputes, which happens in a piece that has what it is used with.
    assert occurring(work_of, "optimization_barrier") == (0, *(2 * [0 if remat == "none" else 2]), 0)

    kept = sizes(split.residual_avals)
    if remat == "full":
        assert kept == Counter({("float32", x.size): 2})
    if remat == "report":
        check_kept(kept, named(runtime, params, x, ctx))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not shapes & {aval.shape for aval in (*split.residual_avals, *split.tape_avals)}


@pytest.mark.parametrize("impl", ["batched", "ragged"])
def test_every_kernel_is_cut(impl):
    params, x, ctx, dy = layer_arguments(3, 24, (False,))
    work_of = work(split_vjp(layers(Runtime(grouped_matmul=impl, remat="report")), params, x, ctx), params, x, ctx, dy)
    dense, grouped = (occurring(work_of, name) for name in ("dot_general", "ragged_dot_general"))
    n = 5 + 1 + 2 + 2
    assert tuple(np.add(dense, grouped)) == (n + 2, 2 * n + 5 + 2, n + 5 + 2, n)


def test_tape_of_a_dense_layer():
    """Inputs and cotangents of its products, once, in the format of the products; and gradients of gains."""
    params, x, ctx, _ = layer_arguments(3, 24, (True,), jnp.bfloat16)
    split = split_vjp(layers(Runtime(compute_dtype=jnp.bfloat16, remat="report")), params, x, ctx)
    hidden, heads = MODEL.hidden_size, MODEL.num_attention_heads
    inputs = [
        hidden,  # of q_a and kv_a
        MODEL.q_lora_rank,
        MODEL.kv_lora_rank,
        heads * MODEL.v_head_dim,
        hidden,
        MODEL.intermediate_size,
    ]
    cotangents = [
        MODEL.q_lora_rank,
        heads * (MODEL.qk_nope_head_dim + MODEL.qk_rope_head_dim),
        MODEL.kv_lora_rank + MODEL.qk_rope_head_dim,
        heads * (MODEL.qk_nope_head_dim + MODEL.v_head_dim),
        hidden,
        2 * MODEL.intermediate_size,
        hidden,
    ]
    gains = [hidden, MODEL.q_lora_rank, MODEL.kv_lora_rank, hidden]
    tokens = Counter(("bfloat16", 3 * 24 * width) for width in inputs + cotangents)
    assert sizes(split.tape_avals) == tokens + Counter(("float32", width) for width in gains)


def split_on_mesh(remat):
    """An MoE layer on 2 x 4 devices, by its pieces and by JAX, in buffers that overflow."""
    config = Config(
        model=MODEL,
        mesh=MeshConfig(node=2, local=4),
        dispatch=DispatchConfig(node_slack=0.4, device_slack=0.3),
        train=TrainConfig(steps=1, batch_size=8, micro_batch_size=8),
    )
    arguments = layer_arguments(8, 16, (False,))
    runtime = Runtime(exchange=exchange_of(config), remat=remat)
    chunk = layers(runtime)
    found = {}

    def pieces(*args):
        found["split"] = split_vjp(chunk, *args[:3])
        found["work"] = work(found["split"], *args)
        found["names"] = named(runtime, *args[:3])
        return by_pieces(found["split"], *args)

    def of_experts(path, _):
        return P(EXPERT_AXES) if any(getattr(key, "key", None) == "experts" for key in path) else P()

    def on_mesh(function):
        return jitted(
            jax.shard_map(
                lambda *args: jax.tree.map(lambda a: a[None], function(*args)),
                mesh=make_mesh(config.mesh),
                in_specs=(
                    jax.tree_util.tree_map_with_path(of_experts, arguments[0]),
                    P(EXPERT_AXES),
                    context_specs(arguments[2]),
                    P(EXPERT_AXES),
                ),
                out_specs=P(EXPERT_AXES),
                check_vma=False,
            )
        )

    return arguments, found, on_mesh(pieces), on_mesh(lambda *args: by_jax(chunk, *args))


def context_specs(ctx):
    """Segments are divided like the sequences, all else is everywhere."""
    return jax.tree.map(lambda leaf: P(EXPERT_AXES) if jnp.issubdtype(jnp.result_type(leaf), jnp.integer) else P(), ctx)


def test_an_overflow_on_a_mesh_is_right():
    arguments, _, pieces, reference = split_on_mesh("report")
    results = pieces(*arguments)
    check_same_but_for_the_order_of_sums(results, reference(*arguments), jnp.float32)
    assert (results[1][0].rounds > 1).all()


@pytest.mark.parametrize(
    "remat, recomputed",
    [("none", 0), ("report", 0), ("full", 2)],  # the way there
)
def test_work_on_a_mesh(remat, recomputed):
    arguments, found, pieces, _ = split_on_mesh(remat)
    jax.eval_shape(pieces, *arguments)
    split, work_of = found["split"], found["work"]
    n = 5 + 1 + 2 * 2 + 2  # experts have two sizes of blocks
    fwd, _, bwd_input, bwd_weight = occurring(work_of, "dot_general")
    assert (fwd, bwd_weight) == (n + 2, n)
    assert bwd_input == n + 5 + {"none": 0, "report": 2, "full": n + 2 - 1 - 2}[remat]
    # Two hops there and two back: a message each, of all that a token brings.
    assert occurring(work_of, "all_to_all") == (4, 4 + recomputed, 4 + recomputed, 0)
    # An overflow's exchange runs for the input and for the weights, once each.
    for name in ("all_to_all", "dot_general"):
        _, whole, of_input, of_weight = occurring(work_of, f"overflow:{name}")
        assert of_weight > 0 and whole == of_input + of_weight
    assert occurring(work_of, "overflow:scan") == (1, 4, 2, 2)
    of_experts = {leaf.shape for leaf in jax.tree.leaves(arguments[0][0]["moe"]["experts"])}
    of_experts |= {(shape[0] // 8, *shape[1:]) for shape in of_experts}
    assert not of_experts & {aval.shape for aval in (*split.residual_avals, *split.tape_avals)}
    if remat == "full":
        assert nbytes(split.residual_avals) == nbytes(arguments[1]) // 8
    if remat == "report":
        check_kept(sizes(split.residual_avals), found["names"])


# What does not go.


def linear(params, x, ctx):
    return x @ params["w"], None


GOOD = ({"w": jnp.ones((3, 3))}, jnp.ones((2, 3)), {"position": jnp.arange(2)})


def with_callback(params, x, ctx):
    jax.debug.print("{}", x)
    return linear(params, x, ctx)


@pytest.mark.parametrize(
    "chunk, arguments, message",
    [
        (lambda params, x, ctx: (params["w"] * 2, None), GOOD, "no output y of the chunk depends on x"),
        (lambda params, x, ctx: (x, {"loss": x.sum()}), GOOD, r"aux\['loss'\] of a chunk has a derivative"),
        (lambda params, x, ctx: x, GOOD, "should return a pair"),
        (lambda params, x, ctx: ((x, ctx), None), GOOD, r"y\[1\]\['position'\] of a chunk is int32"),
        (linear, (GOOD[0], jnp.ones((2, 3), jnp.int32), None), "x of a chunk is int32"),
        (linear, ({**GOOD[0], "n": 3}, *GOOD[1:]), r"params\['n'\] of a chunk is int32"),
        (with_callback, GOOD, "should have no side effects; debug_print has"),
    ],
)
def test_chunks_that_cannot_be_split(chunk, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_vjp(chunk, *arguments)


@pytest.mark.parametrize(
    "piece, arguments, message",
    [
        ("fwd", ({"v": GOOD[0]["w"]}, *GOOD[1:]), "params should be PyTreeDef"),
        ("fwd", (GOOD[0], jnp.ones((4, 3)), GOOD[2]), r"x should be float32\[2, 3\], not float32\[4, 3\]"),
        ("fwd", (*GOOD[:2], {"position": 1.0}), r"ctx\['position'\] should be int32\[2\], not float32\[\]"),
        ("fwd", GOOD[:2], "fwd takes params, x, ctx, not 2 arguments"),
        ("bwd", (GOOD[0], (), GOOD[2], GOOD[1], GOOD[0]), "residuals should be PyTreeDef"),
        ("bwd_input", (GOOD[0], (GOOD[1],), GOOD[2], (GOOD[1],)), "dy should be PyTreeDef"),
        ("bwd_weight", (GOOD[0], (GOOD[1],), GOOD[2], GOOD[0]), "tape should be PyTreeDef"),
    ],
)
def test_arguments_that_do_not_fit(piece, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(split_vjp(linear, *GOOD), piece)(*arguments)


def test_a_loop_is_a_unit():
    """Correct, but its weights' gradients are made with its inputs', and lie on the tape."""

    def chunk(params, x, ctx):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0], None

    params, x, dy = jnp.ones((4, 3, 3)) / 2, jnp.ones((2, 3)), jnp.ones((2, 3))
    split = split_vjp(chunk, params, x, None)
    check_same_bits(by_pieces(split, params, x, None, dy), by_jax(chunk, params, x, None, dy))
    assert params.shape in {aval.shape for aval in split.tape_avals}


def test_what_follows_from_parameters_and_context_is_made_again():
    def chunk(params, x, ctx):
        return x * jnp.tanh(params) * jnp.cos(ctx), None

    split = split_vjp(chunk, jnp.ones(3), jnp.ones(3), jnp.ones(3))
    assert [aval.shape for aval in split.residual_avals] == [(3,)]  # x, which the parameters' gradient reads
