"""Two micro-batches of inference, compiled for GPUs that are not there: what runs while tokens travel, and memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.inference.cache import empty_cache
from dsjax.inference.forward import Batch
from dsjax.inference.layout import Layout, mesh_of, weight_specs
from dsjax.inference.machine import Machine
from dsjax.inference.programs import OF_GROUPS, State, decode, prefill
from dsjax.inference.sampling import Sampling, choice
from dsjax.inference.weights import arranged, first_placement
from dsjax.model.layout import stack
from dsjax.model.transformer import abstract_parameters
from dsjax.planning.aot import COMPILER_OPTIONS, can_compile_for_gpus, gpu_devices
from dsjax.planning.compiled import QUICK
from dsjax.planning.hlo import collectives
from dsjax.runtime import Runtime
from dsjax.settings import load_model_config

NODES, PER_NODE, PAGE = 2, 8, 64
LAYOUTS = {
    "prefill": Layout(node=NODES, data=2, tensor=4, micro_batches=2),
    "decode": Layout(node=NODES, data=8, micro_batches=2),
}


def compiled(work, layers):
    """V3 with few layers, on 16 H800s: pieces of 4096 tokens, or 128 requests of 4096 on each."""
    layout = LAYOUTS[work]
    model = load_model_config("v3_671b")
    model = replace(
        model, num_hidden_layers=layers, first_k_dense_replace=0, vocab_size=8192, num_nextn_predict_layers=0
    )
    rows, tokens, slots = (2, 4096, 8) if work == "prefill" else (128, 1, 128)
    with gpu_devices(NODES, PER_NODE, "h800") as devices:
        mesh = mesh_of(layout, devices)
        runtime = Runtime(compute_dtype=jnp.bfloat16)
        machine = replace(Machine.of(runtime, layout, mesh), one_hop=work == "decode")

        def on(tree, specs):
            def shape(leaf, spec):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

            if isinstance(specs, PartitionSpec):
                return jax.tree.map(lambda leaf: shape(leaf, specs), tree)
            return jax.tree.map(shape, tree, specs)

        def inputs():
            whole, width = layout.groups * rows, layout.groups * (slots + 1)
            pages = layout.groups * (slots * 4096 // PAGE + 1)
            cache = empty_cache(model, pages, PAGE, jnp.bfloat16)
            state = State(cache, jnp.zeros(width, int), jnp.zeros((width, model.vocab_size), bool))
            number, settings = jnp.zeros(whole, int), jax.tree.map(jnp.asarray, choice([Sampling()] * whole))
            batch = Batch(number, jnp.zeros((whole, 4096 // PAGE), int), number, settings)
            rest = jnp.zeros((whole, tokens), int), number, jnp.zeros((whole, model.vocab_size), bool), number > 0
            return state, batch, rest

        params, biases = (stack(tree, model) for tree in abstract_parameters(model))
        held = first_placement(model, layout).expert_of_slot
        weights = jax.eval_shape(lambda p: arranged(p, model, layout, held, jnp.bfloat16, fp8=False), params)
        state, batch, rest = jax.eval_shape(inputs)
        state = State(
            *(None if field is None else on(field, spec) for field, spec in zip(state, state.spec, strict=True))
        )
        given = [on(weights, weight_specs(weights)), on(biases, PartitionSpec()), state, on(batch, OF_GROUPS)]
        if work == "prefill":
            given += on(rest, OF_GROUPS)
        program = (prefill if work == "prefill" else decode).on_unit(model, machine)
        return program.lower(*given).compile(compiler_options=COMPILER_OPTIONS | QUICK)


@pytest.mark.slow
@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest -m slow"
)
@pytest.mark.parametrize(
    ("work", "layers", "together", "share", "memory"), [("decode", 10, 6, 0.9, 1.2e9), ("prefill", 10, 6, 0.75, 5e9)]
)
def test_products_run_while_tokens_travel(work, layers, together, share, memory):
    """Behind the last layer of a loop's body there is nothing left to compute. And no layers' weights are copied out of
    the stack: the experts of one are 1.4 GB on each device; attention's scores in prefill take 3 GB."""
    program = compiled(work, layers)
    sent = [c for c in collectives(program.as_text()) if c.kind == "all-to-all" and "overflow" not in c.op_name]
    assert len(sent) == together * 2 * (2 if work == "decode" else 4)
    hidden, temporaries = sum(c.nbytes for c in sent if c.products), program.memory_analysis().temp_size_in_bytes
    hidden /= sum(c.nbytes for c in sent)
    print(f"{work}: {hidden:.3f} of the bytes of all-to-alls have products in flight; {temporaries / 1e9:.2f} GB")
    assert hidden > share and temporaries < memory
