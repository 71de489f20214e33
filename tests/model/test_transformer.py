"""Laws of the whole model: rematerialization, causality, documents, initial values, size of the program."""

from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.model import transformer
from dsjax.model.layout import stack, unstack
from dsjax.model.transformer import Transformer, abstract_parameters, initial_parameters, losses, split
from dsjax.runtime import Runtime
from dsjax.settings import load_model_config

BATCH, LENGTH = 2, 24


@pytest.fixture(scope="module")
def tokens(small):
    return jnp.asarray(np.random.default_rng(0).integers(0, small.vocab_size, (BATCH, LENGTH + 1)), jnp.int32)


def loss_and_grads(config, runtime):
    """Return `(params, biases, tokens, balance_weight) -> (gradients, losses)` of main and MTP losses."""

    def total(params, biases, tokens, balance_weight):
        parts = losses(
            params, biases, tokens, config=config, runtime=runtime, balance_weight=balance_weight, mtp_weight=0.3
        )
        return parts.objective, parts

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.fixture(scope="module")
def run_plain(small):
    """With everything kept and one loop over the MoE layers."""
    return loss_and_grads(small, Runtime(remat="none", attention="plain"))


@pytest.fixture(scope="module")
def plain(run_plain, small_parameters, tokens):
    return run_plain(*small_parameters, tokens, 0.1)


def test_what_routers_report(small, plain):
    _, parts = plain
    assert parts.aux.loads.shape == (3 + 2, small.n_routed_experts) and parts.aux.loads.dtype == jnp.int32
    np.testing.assert_array_equal(parts.aux.loads.sum(axis=1), BATCH * LENGTH * small.num_experts_per_tok)
    assert parts.aux.balance_loss.shape == (5,)
    assert float(parts.aux.balance_loss.min()) > 0.9, "1 is perfect balance"


@pytest.mark.parametrize(
    "runtime",
    [
        Runtime(remat="report"),
        Runtime(remat="full", loss_chunk=7),
        Runtime(remat="report", unroll_layers=True, grouped_matmul="ragged"),
    ],
    ids=["report", "full", "unrolled"],
)
def test_the_runtime_changes_nothing(small, small_parameters, tokens, plain, runtime):
    """Losses, loads and every gradient; the balance loss, which enters by its cotangent, is not counted twice."""
    grads, parts = loss_and_grads(small, runtime)(*small_parameters, tokens, 0.1)
    want_grads, want = plain
    np.testing.assert_array_equal(parts.aux.loads, want.aux.loads)
    np.testing.assert_allclose(parts.main, want.main, rtol=1e-6)
    np.testing.assert_allclose(parts.mtp, want.mtp, rtol=1e-6)
    np.testing.assert_allclose(parts.aux.balance_loss, want.aux.balance_loss, rtol=1e-6)
    for (path, got), expected in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def test_balance_loss_enters_gradients_only(run_plain, small_parameters, tokens, plain):
    """In proportion to its weight, in every layer's router, the MTP modules' too; the losses are the same."""
    none, parts = run_plain(*small_parameters, tokens, 0.0)
    double, _ = run_plain(*small_parameters, tokens, 0.2)
    single, with_it = plain
    assert parts.main == with_it.main and parts.mtp == with_it.mtp
    for group, block in ("moe", lambda tree: tree), ("mtp", lambda tree: tree["block"]):
        bare, once, twice = (block(grads[group])["moe"]["router"] for grads in (none, single, double))
        np.testing.assert_allclose(twice - bare, 2 * (once - bare), atol=1e-5 * float(jnp.abs(twice).max()))
        assert (jnp.linalg.norm(once - bare, axis=(1, 2)) > 1e-4).all()


class Heads:
    """Runs the model and returns what its heads see: for the main model and each MTP module, in place of the loss."""

    def __init__(self, config, params, biases):
        def run(tokens, segments):
            seen = []

            def record(hidden, head, targets, weights, *, chunk):
                seen.append((hidden, targets, weights))
                return jnp.float32(0), jnp.zeros(len(weights))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transformer, "cross_entropy", record)
                # Modules count as much as the main model where their mean's weight is their number.
                depth = float(config.num_nextn_predict_layers)
                losses(params, biases, tokens, config=config, runtime=Runtime(), segments=segments, mtp_weight=depth)
            ((hidden, targets, weights),) = seen
            count = 1 + config.num_nextn_predict_layers
            return list(zip(*(jnp.split(array, count) for array in (hidden, targets, weights)), strict=True))

        self._run = jax.jit(run)

    def __call__(self, tokens, segments=None):
        """Return hidden states [B, S, D], targets [B, S] and weights [B, S] of each head."""
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
        seen = self._run(tokens, segments)
        return [[np.asarray(a).reshape(batch, length, *a.shape[1:]) for a in head] for head in seen]


@pytest.fixture(scope="module")
def heads(small, small_parameters):
    return Heads(small, *small_parameters)


def test_heads_predict_one_token_further_each(heads, tokens):
    seen = heads(tokens)
    assert len(seen) == 3
    for depth, (_, targets, weights) in enumerate(seen):
        has_target = np.arange(LENGTH) + depth + 1 <= LENGTH
        np.testing.assert_array_equal(weights, np.tile(np.float32(has_target / (BATCH * LENGTH)), (BATCH, 1)))
        np.testing.assert_array_equal(targets[:, has_target], tokens[:, depth + 1 :])


def test_no_head_sees_the_future(heads, tokens):
    """Head k predicts token i + k + 1 at position i from the tokens up to i + k, and from all of them."""
    changed = 13
    before, after = heads(tokens), heads(tokens.at[:, changed].set((tokens[:, changed] + 1) % 64))
    for depth, ((hidden, *_), (other, *_)) in enumerate(zip(before, after, strict=True)):
        first = changed - depth
        np.testing.assert_allclose(hidden[:, :first], other[:, :first], atol=1e-5)
        differs = np.abs(hidden - other).max(axis=(0, 2)) > 1e-4
        assert differs[first], f"head {depth} does not read the token that it should follow"


def test_documents_do_not_see_each_other(heads, tokens):
    """Two documents packed into a sequence equal each of them alone, though their positions differ."""
    half = LENGTH // 2
    segments = jnp.repeat(jnp.asarray([[0, 1]] * BATCH), half, axis=1)
    packed, unmasked = heads(tokens, segments), heads(tokens)
    alone = heads(jnp.concatenate([tokens[:, : half + 1], tokens[:, half : 2 * half + 1]]))
    for depth, ((hidden, *_), (apart, *_), (mixed, *_)) in enumerate(zip(packed, alone, unmasked, strict=True)):
        # The last positions of a document alone have no next tokens to embed.
        full = half - depth
        np.testing.assert_allclose(hidden[:, :full], apart[:BATCH, :full], atol=1e-5)
        np.testing.assert_allclose(hidden[:, half : half + full], apart[BATCH:, :full], atol=1e-5)
        assert np.abs(mixed[:, half:] - hidden[:, half:]).max() > 1e-3, "the mask does nothing"


def test_module_and_functions_agree(small, tokens):
    """The NNX module holds the parameters that `initial_parameters` makes, and calling it gives the main logits."""
    config = replace(small, num_hidden_layers=3, num_nextn_predict_layers=1)
    module = nnx.jit(lambda: Transformer(config, nnx.Rngs(3)))()
    params, biases = split(module)
    made_params, made_biases = jax.jit(lambda: initial_parameters(config, 3))()
    for ours, theirs in ((stack(params, config), made_params), (stack(biases, config), made_biases)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    leaves = jax.tree.leaves_with_path(params)
    drawn = {path: leaf for path, leaf in leaves if not path[-1].key.endswith("norm")}
    assert all(abs(float(leaf.std()) / 0.05 - 1) < 0.2 for leaf in drawn.values())
    assert len({float(leaf.ravel()[0]) for leaf in drawn.values()}) == len(drawn), "two tensors have the same values"

    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, biases))
    assert abstract_parameters(config) == abstract

    logits, aux = nnx.jit(lambda module, tokens: module(tokens))(module, tokens[:, :-1])
    assert logits.shape == (BATCH, LENGTH, small.vocab_size) and logits.dtype == jnp.float32
    main = jax.jit(lambda *a: losses(*a, config=config, runtime=Runtime(), mtp_weight=None))
    parts = main(made_params, made_biases, tokens)
    mean = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(parts.main, mean, rtol=1e-6)
    np.testing.assert_array_equal(parts.aux.loads, aux.loads)
    assert parts.mtp == 0


def test_bfloat16_stays_near(small, small_parameters, tokens, plain):
    params, biases = small_parameters
    runtime = Runtime(compute_dtype=jnp.bfloat16)
    parts = jax.jit(lambda: losses(params, biases, tokens, config=small, runtime=runtime))()
    assert parts.main.dtype == jnp.float32
    np.testing.assert_allclose(parts.main, plain[1].main, rtol=0.01)


def test_the_largest_model_builds_without_memory():
    config = load_model_config("v3_671b")
    params, biases = abstract_parameters(config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, biases)))
    main = {name: value for name, value in params.items() if name != "mtp"}
    router_biases = biases["layers"]
    total = sum(prod(leaf.shape) for leaf in jax.tree.leaves((main, router_biases)))
    assert total == 671_026_419_200
    # A release repeats the embedding and the head in the MTP module.
    mtp = sum(
        prod(leaf.shape) for leaf in jax.tree.leaves((params["mtp"], biases["mtp"], params["embed"], params["head"]))
    )
    assert total + mtp == 684_489_845_504
    assert unstack(stack(params, config), config) == params


def lowered(config, runtime):
    """The training loss of a model of many layers and its gradients, in StableHLO, from shapes alone."""
    params, biases = (stack(tree, config) for tree in abstract_parameters(config))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)

    def total(params, biases, tokens):
        parts = losses(params, biases, tokens, config=config, runtime=runtime, mtp_weight=0.3)
        return parts.objective, parts.aux

    return jax.jit(jax.grad(total, has_aux=True)).lower(params, biases, tokens)


def depths(small):
    return [replace(small, first_k_dense_replace=3, num_hidden_layers=n, num_nextn_predict_layers=1) for n in (6, 61)]


def test_the_program_does_not_grow_with_depth(small):
    six, sixty_one = (len(lowered(config, Runtime()).as_text().splitlines()) for config in depths(small))
    assert sixty_one <= 1.05 * six
    unrolled = [len(lowered(config, Runtime(unroll_layers=True)).as_text().splitlines()) for config in depths(small)]
    assert unrolled[1] > 5 * unrolled[0], "the measure sees nothing"


@pytest.mark.slow
def test_the_compiled_program_does_not_grow_with_depth(small):
    six, sixty_one = (len(lowered(c, Runtime()).compile().as_text().splitlines()) for c in depths(small))
    assert sixty_one <= 1.5 * six
