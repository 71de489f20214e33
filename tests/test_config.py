"""Every law of a configuration refuses what breaks it, with one line that names the setting and its value."""

from dataclasses import replace

import pytest

from dsjax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, YarnConfig, describe, fits
from dsjax.settings import load_config, load_model_config

TINY = load_model_config("tiny")
YARN = YarnConfig(factor=40.0, original_max_position_embeddings=4096)
TRAIN = TrainConfig(steps=100, batch_size=12)
DATA = DataConfig()
OPTIMIZER = OptimizerConfig()
RUN = load_config(["tiny"])

BROKEN = [
    (TINY, {"vocab_size": 0}, "model.vocab_size = 0: must be at least 1"),
    (TINY, {"num_attention_heads": 0}, "model.num_attention_heads = 0: must be at least 1"),
    (TINY, {"q_lora_rank": -1}, "model.q_lora_rank = -1: must be at least 0"),
    (
        TINY,
        {"first_k_dense_replace": 9},
        "model.first_k_dense_replace = 9: must be at most model.num_hidden_layers",
    ),
    (TINY, {"qk_rope_head_dim": 15}, "model.qk_rope_head_dim = 15: must be even"),
    (TINY, {"n_group": 3}, "model.n_routed_experts = 8: must be divisible by model.n_group = 3"),
    (TINY, {"topk_group": 5}, "model.topk_group = 5: must be at most model.n_group = 4"),
    (TINY, {"num_experts_per_tok": 9}, "model.num_experts_per_tok = 9: must be at most model.n_routed_experts = 8"),
    (TINY, {"num_experts_per_tok": 5}, "model.num_experts_per_tok = 5: must be at most 4, the experts of"),
    (TINY, {"n_group": 8, "topk_group": 8}, "model.n_group = 8: must be at most model.n_routed_experts / 2 = 4"),
    (TINY, {"topk_method": "greedy"}, "model.n_group = 4: must be 1 with topk_method 'greedy'"),
    (TINY, {"scoring_func": "sofmax"}, "model.scoring_func = 'sofmax': must be one of 'sigmoid', 'softmax'"),
    (TINY, {"norm_topk_prob": 1}, "model.norm_topk_prob = 1: must be true or false"),
    (TINY, {"hidden_size": True}, "model.hidden_size = True: must be an integer"),
    (TINY, {"hidden_size": 128.0}, "model.hidden_size = 128.0: must be an integer"),
    (TINY, {"rms_norm_eps": 0.0}, "model.rms_norm_eps = 0.0: must be greater than 0"),
    (TINY, {"rope_theta": float("nan")}, "model.rope_theta = nan: must be a finite number"),
    (YARN, {"factor": 1.0}, "model.rope_scaling.factor = 1.0: must be greater than 1"),
    (YARN, {"beta_fast": 1.0}, "model.rope_scaling.beta_fast = 1.0: must be greater than beta_slow = 1.0"),
    (TRAIN, {"steps": 0}, "train.steps = 0: must be at least 1"),
    (TRAIN, {"loss_chunk": 0}, "train.loss_chunk = 0: must be at least 1"),
    (TRAIN, {"seed": -1}, "train.seed = -1: must be at least 0"),
    (TRAIN, {"micro_batch_size": 5}, "train.batch_size = 12: must be divisible by train.micro_batch_size = 5"),
    (TRAIN, {"batch_ramp_start": 4}, "train.micro_batch_size = 0: must be at least 1 with a batch ramp"),
    (TRAIN, {"batch_ramp_start": 4, "micro_batch_size": 2}, "train.batch_ramp_fraction = 0.0: must be greater than 0"),
    (TRAIN, {"batch_ramp_start": 3, "micro_batch_size": 2}, "train.batch_ramp_start = 3: must be divisible by"),
    (TRAIN, {"batch_ramp_start": 16, "micro_batch_size": 4}, "train.batch_ramp_start = 16: must be at most"),
    (TRAIN, {"batch_ramp_fraction": 0.1}, "train.batch_ramp_fraction = 0.1: must be 0 without"),
    (TRAIN, {"mtp_weights": (0.3, -0.1)}, "train.mtp_weights = (0.3, -0.1): must be two numbers of at least 0"),
    (TRAIN, {"mtp_weights": (0.3,)}, "train.mtp_weights = (0.3,): must be a list of 2"),
    (TRAIN, {"bias_stop": 1.5}, "train.bias_stop = 1.5: must be between 0 and 1"),
    (TRAIN, {"ema_decay": 1.0}, "train.ema_decay = 1.0: must be at least 0 and below 1"),
    (TRAIN, {"remat": "some"}, "train.remat = 'some': must be one of 'none', 'report', 'full'"),
    (DATA, {"source": "text"}, "data.path = '': must be a file, folder or glob, which data.source = 'text' needs"),
    (DATA, {"path": "books"}, "data.path = 'books': must be empty with data.source = 'python-stdlib'"),
    (DATA, {"validation_fraction": 1.0}, "data.validation_fraction = 1.0: must be between 0 and 1, both excluded"),
    (DATA, {"fim_rate": 1.1}, "data.fim_rate = 1.1: must be between 0 and 1"),
    (OPTIMIZER, {"learning_rate": 0.0}, "optimizer.learning_rate = 0.0: must be greater than 0"),
    (OPTIMIZER, {"beta2": 1.0}, "optimizer.beta2 = 1.0: must be at least 0 and below 1"),
    (OPTIMIZER, {"beta2": 0.99}, "optimizer.beta2 = 0.99: must be at most 0.98 with moment_dtype 'bf16'"),
    (OPTIMIZER, {"warmup": 0.7}, "optimizer.constant = 0.676: must be between 0.7 and 1"),
    (OPTIMIZER, {"second_tail_start": 1.1}, "optimizer.second_tail_start = 1.1: must be between 0.966 and 1"),
    (RUN.checkpoint, {"keep": 0}, "checkpoint.keep = 0: must be at least 1"),
    (RUN, {"precision": "fp16"}, "precision = 'fp16': must be one of 'auto', 'bf16', 'fp32', 'fp8', 'mxfp8'"),
    (
        RUN,
        {"data": replace(DATA, sequence_length=1)},
        "data.sequence_length = 1: must be greater than model.num_nextn_predict_layers = 1",
    ),
    (RUN.mesh, {"node": 0}, "mesh.node = 0: must be at least 1"),
    (RUN.dispatch, {"transport": "fast"}, "dispatch.transport = 'fast': must be one of 'padded', 'ragged', 'gather'"),
    (RUN.dispatch, {"node_slack": 0.0}, "dispatch.node_slack = 0.0: must be greater than 0"),
    (
        RUN,
        {"mesh": MeshConfig(node=2, local=3)},
        "mesh.node x mesh.local = 2 x 3 = 6: must divide model.n_routed_experts = 8, so that every device",
    ),
    (
        RUN,
        {"mesh": MeshConfig(data=2, node=2, local=2)},
        "train.batch_size = 4: must be divisible by mesh.data x mesh.node x mesh.local = 2 x 2 x 2 = 8, so that every",
    ),
    (
        RUN,
        {"mesh": MeshConfig(data=4), "train": replace(TRAIN, micro_batch_size=6)},
        "train.micro_batch_size = 6: must be divisible by mesh.data x mesh.node x mesh.local = 4 x 1 x 1 = 4",
    ),
]


@pytest.mark.parametrize(("settings", "change", "message"), BROKEN, ids=[message for *_, message in BROKEN])
def test_law(settings, change, message):
    with pytest.raises(ValueError) as caught:
        replace(settings, **change)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_the_laws_allow():
    replace(OPTIMIZER, beta2=0.999, moment_dtype="fp32")
    replace(OPTIMIZER, constant=0.8, decay=0.8, second_tail_start=0.9)  # V2-Lite's steps down
    replace(TRAIN, batch_ramp_start=4, batch_ramp_fraction=0.1, micro_batch_size=4)
    replace(TINY, first_k_dense_replace=8)
    replace(TINY, n_group=1, topk_group=1, topk_method="greedy")
    replace(RUN, data=replace(DATA, sequence_length=2**20))  # far beyond any original context, without YaRN


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [1, 0.5], [True, float("inf"), "1"]),
        (bool, [True], [1, "true"]),
        (int | None, [1, None], [1.0, "none"]),
        (tuple[int, int], [(1, 2)], [(1,), [1, 2], (1, 2.5)]),
        (tuple[str, ...], [(), ("a", "b")], ["ab", (1,)]),
    ],
)
def test_fits(kind, right, wrong):
    assert all(fits(value, kind) for value in right)
    assert not any(fits(value, kind) for value in wrong)
    assert describe(kind)
