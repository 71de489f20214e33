"""DualPipe compiled for 32 H100s that are not there: what XLA runs while tokens are on the network."""

import math
import re
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, DataConfig, MeshConfig, PipelineConfig, TrainConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import batch_spec
from dsjax.pipeline import executor
from dsjax.pipeline.step import program_of
from dsjax.planning.aot import COMPILER_OPTIONS, can_compile_for_gpus, gpu_devices
from dsjax.planning.hlo import collectives
from dsjax.runtime import Runtime
from dsjax.settings import load_model_config
from dsjax.training.state import drawn_state, state_shardings
from dsjax.training.step import accumulated_loss_and_grads

MICRO_BATCHES, SEQUENCES, LENGTH = 12, 4, 1024
"""Sequences of a device."""


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest -m slow"
)
def test_the_steady_state_hides_tokens_and_transfers(monkeypatch):
    """Four stages of a layer, 8 devices each in 2 nodes; a quarter of DeepSeek-V3's widths, 4096 tokens per device."""
    model = replace(
        load_model_config("v3_671b"),
        num_hidden_layers=5,
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=4096,
        moe_intermediate_size=1024,
        num_attention_heads=16,
        n_routed_experts=32,
        vocab_size=4096,
        num_nextn_predict_layers=0,
    )
    mesh_config = MeshConfig(pipe=4, node=2, local=4)
    sequences = SEQUENCES * mesh_config.batch_shards
    config = Config(
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=1, batch_size=MICRO_BATCHES * sequences, micro_batch_size=sequences),
        mesh=mesh_config,
        pipeline=PipelineConfig(schedule="dualpipe"),
        precision="bf16",
    )
    split = []
    splitter = executor.split_vjp
    monkeypatch.setattr(executor, "split_vjp", lambda *args: split.append(splitter(*args)) or split[-1])
    with gpu_devices(nodes=4, per_node=8) as devices:
        mesh = make_mesh(config.mesh, devices)
        state = jax.eval_shape(lambda: drawn_state(config))
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            state,
            state_shardings(state, mesh),
        )
        runtime = Runtime(compute_dtype=jnp.bfloat16, attention="chunked", remat="report")
        tokens = jax.ShapeDtypeStruct(
            (MICRO_BATCHES, sequences, LENGTH + 1), jnp.int32, sharding=NamedSharding(mesh, batch_spec(3, 1))
        )
        weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
        step = jax.jit(accumulated_loss_and_grads(config, runtime, mesh))
        lowered = step.lower(state.params, state.biases, tokens, weight)
        # Which of the products' kernels is fastest does not matter here, nor how well they are optimized.
        compiled = lowered.compile(
            compiler_options=COMPILER_OPTIONS
            | {
                "xla_gpu_autotune_level": 0,
                "xla_gpu_enable_triton_gemm": False,
                "xla_backend_optimization_level": 0,
                "xla_llvm_disable_expensive_passes": True,
            }
        )

    text = compiled.as_text()
    by_computation = defaultdict(list)
    for collective in collectives(text):
        if "/overflow/" not in collective.op_name:
            by_computation[collective.computation].append(collective)

    def of_kind(found, kind):
        return [collective for collective in found if collective.kind == kind]

    # The only computation in which there is no branch has both: tokens and transfers between stages.
    (steady,) = [
        found
        for found in by_computation.values()
        if of_kind(found, "all-to-all") and of_kind(found, "collective-permute")
    ]
    tokens_sent = of_kind(steady, "all-to-all")
    assert len(tokens_sent) == 2 * 8, "two pairs, of four hops each way"
    hidden = sum(c.nbytes for c in tokens_sent if c.products) / sum(c.nbytes for c in tokens_sent)
    transfers = of_kind(steady, "collective-permute")
    print(f"of the tokens' bytes {hidden:.3f} have products in flight")
    assert hidden >= 7 / 8
    assert len(transfers) == 4 and all(transfer.products for transfer in transfers)

    pieces, pools = split[0], program_of(config, MICRO_BATCHES).pools
    residuals, tape, x = map(nbytes, (pieces.residual_avals, pieces.tape_avals, pieces.y_avals))
    copies = [  # zeros that are copied, before the first tick, do not count
        math.prod(map(int, shape.split(","))) * (2 if kind == "bf16" else 4)
        for kind, shape in re.findall(
            r" = (bf16|f32|s32|u16)\[([\d,]+)\]\S* copy\((?!%broadcast)", text
        )  # but of zeros
    ]
    assert max(copies) < residuals
    stash = pools.residuals * residuals + pools.tapes * tape + (pools.activations + pools.gradients + 2) * x
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{temporary / 1e6:.0f} MB, stash and tapes {stash / 1e6:.0f}, a residual set {residuals / 1e6:.0f}")
    # A pair works on the rows of eight experts per token, and has room for the further rounds of an overflow.
    assert temporary < stash + 10 * residuals
