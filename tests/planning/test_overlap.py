"""DualPipe compiled for 32 H100s that are not there: what XLA runs while tokens are on the network."""

import math
import re
from collections import defaultdict
from dataclasses import replace

import pytest

from dsjax.config import Config, DataConfig, MeshConfig, PipelineConfig, TrainConfig
from dsjax.planning.aot import can_compile_for_gpus
from dsjax.planning.compiled import scheduled_step
from dsjax.planning.hlo import collectives
from dsjax.planning.report import report_of
from dsjax.settings import load_model_config

MICRO_BATCHES, SEQUENCES, LENGTH = 12, 4, 1024
"""Sequences of a device."""


@pytest.mark.slow
@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest -m slow"
)
def test_the_steady_state_hides_tokens_and_transfers():
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
    found = scheduled_step(config, "h100")
    by_computation = defaultdict(list)
    for collective in collectives(found.text):
        if "overflow" not in collective.op_name:
            by_computation[collective.computation].append(collective)

    def of_kind(kind, among):
        return [collective for collective in among if collective.kind == kind]

    # The only computation in which there is no branch has both: tokens and transfers between stages.
    (steady,) = [
        among
        for among in by_computation.values()
        if of_kind("all-to-all", among) and of_kind("collective-permute", among)
    ]
    tokens_sent = of_kind("all-to-all", steady)
    assert len(tokens_sent) == 2 * 8, "two pairs, of four hops each way"
    hidden = sum(c.nbytes for c in tokens_sent if c.products) / sum(c.nbytes for c in tokens_sent)
    transfers = of_kind("collective-permute", steady)
    print(f"of the tokens' bytes {hidden:.3f} have products in flight")
    assert hidden > 0.97
    assert len(transfers) == 4 and all(transfer.products for transfer in transfers)

    plan = report_of(config, "h100").memory
    residuals = plan.residuals_per_token * SEQUENCES * LENGTH
    copies = [  # zeros that are copied, before the first tick, do not count
        math.prod(map(int, shape.split(","))) * (2 if kind == "bf16" else 4)
        for kind, shape in re.findall(r" = (bf16|f32|s32|u16)\[([\d,]+)\]\S* copy\((?!%broadcast)", found.text)
    ]
    assert max(copies) < residuals
    state = sum(plan.device[name] for name in ("master_weights", "moments", "router_biases", "tokens"))
    print(f"all else {found.temporary_bytes / 1e9:.2f} GB, planned {(plan.total - state) / 1e9:.2f}")
    assert found.temporary_bytes == pytest.approx(plan.total - state, rel=0.05)
