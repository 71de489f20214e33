"""Programs compiled for GPUs that are not there."""

import pytest

from dsjax.benchmarks import dispatch_bytes
from dsjax.config import Config, DispatchConfig, MeshConfig, TrainConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.planning.aot import COMPILER_OPTIONS, can_compile_for_gpus, gpu_devices
from dsjax.planning.hlo import collectives
from dsjax.settings import load_model_config

TOKENS = 4096


@pytest.mark.skipif(
    not can_compile_for_gpus(), reason="JAX's CUDA plugin is not installed: uv run --extra cuda13 pytest"
)
@pytest.mark.parametrize("transport", ["ragged", "padded"])
def test_the_exchange_compiles_for_gpus(monkeypatch, transport):
    """An MoE layer of DeepSeek-V3 on 8 nodes of 8 H100; rows of both hops, there and back, in BF16."""
    config = Config(
        model=load_model_config("v3_671b"),
        train=TrainConfig(steps=1, batch_size=64),
        mesh=MeshConfig(node=8, local=8),
        dispatch=DispatchConfig(transport=transport),
    )
    with gpu_devices(nodes=8, per_node=8) as devices:
        monkeypatch.setattr(dispatch_bytes, "make_mesh", lambda mesh: make_mesh(mesh, devices))
        found = collectives(dispatch_bytes.compiled_exchange(config, TOKENS, COMPILER_OPTIONS))
    kind = {"ragged": "ragged-all-to-all", "padded": "all-to-all"}[transport]
    # There with eight weights and numbers of experts, or with one of each; back without.
    row, choice, rounds = 7168 * 2, 4 + 2, 2  # the first round, and the body of the loop over further ones
    messages = [2464 * row, 2464 * (row + 8 * choice), 5120 * row, 5120 * (row + choice)]
    of_rows = sorted(c.nbytes for c in found if c.kind == kind and c.nbytes > 1e8)
    assert of_rows == sorted(rounds * [8 * message for message in messages])


def test_without_the_plugin_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("dsjax.planning.aot.can_compile_for_gpus", lambda: False)
    with pytest.raises(RuntimeError, match="uv run --extra cuda13"), gpu_devices(1, 8):
        pass
