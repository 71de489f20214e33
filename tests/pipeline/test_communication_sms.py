"""Multiprocessors that are left to communication where a pair of chunks hides it, and only there."""

import math
import re
from collections import defaultdict
from dataclasses import replace

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
from meshes import MTP_WEIGHT, ROOMY, SMALL

from dsjax.config import KernelConfig, MeshConfig, PipelineConfig
from dsjax.pallas.choice import NUM_SMS
from dsjax.runtime import made_for, runtime_of
from dsjax.training.state import drawn_state
from dsjax.training.step import accumulated_loss_and_grads

KERNELS = r"scaled_matmul|grouped_\w*(matmul|wgrad)"


def blocks_by_scope(jaxpr, outer="", found=None):
    """Blocks of threads of every product's kernel, by whether it is of a pair."""
    found = defaultdict(set) if found is None else found
    for eqn in jaxpr.eqns:
        stack = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "mpmd_map":  # a kernel of Mosaic GPU
            if re.search(KERNELS, eqn.params["name"]):
                (mesh,) = eqn.params["meshes"]
                found[bool(re.search(r"\bpair\b", stack))].add(math.prod((*mesh.grid, *mesh.cluster)))
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            blocks_by_scope(getattr(inner, "jaxpr", inner), stack, found)
    return found


def traced(sms, precision):
    config = replace(
        SMALL,
        model=replace(SMALL.model, num_nextn_predict_layers=0, hidden_size=128, moe_intermediate_size=128),
        train=replace(SMALL.train, batch_size=8, micro_batch_size=2),
        mesh=MeshConfig(pipe=2, local=2),
        dispatch=ROOMY,
        pipeline=PipelineConfig(schedule="dualpipe"),
        kernels=KernelConfig(communication_sms=sms, attention="plain"),
        precision=precision,
    )
    with made_for("gpu"):
        state = jax.eval_shape(lambda: drawn_state(config))
        micro_batches = jax.ShapeDtypeStruct((4, 2, 17), jnp.int32)
        function = accumulated_loss_and_grads(config, runtime_of(config))
        return jax.make_jaxpr(function)(state.params, state.biases, micro_batches, MTP_WEIGHT).jaxpr


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_kernels_of_pairs_leave_what_communication_gets(precision):
    assert blocks_by_scope(traced(20, precision)) == {True: {NUM_SMS - 20}, False: {NUM_SMS}}


def test_without_the_setting_all_kernels_have_all():
    assert blocks_by_scope(traced(0, "fp8")) == {True: {NUM_SMS}, False: {NUM_SMS}}
