"""What a training step costs: compilation, time, memory."""

import statistics
import time
from typing import Any

import jax

from dsjax.config import Config
from dsjax.data.batches import Batches
from dsjax.data.tokens import load_tokens
from dsjax.model.flops import peak, training_flops_per_token
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import place
from dsjax.runtime import runtime_of
from dsjax.training.announcement import peak_of_all
from dsjax.training.memory import peak_of_devices, peak_of_process
from dsjax.training.schedule import Schedule
from dsjax.training.state import initial_state
from dsjax.training.step import Knobs, make_train_step


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Run a run's full-sized step `steps` times, and return what was measured, for JSON.

    Seconds are wall-clock medians of single steps, each waited for; the moving average of the weights, validation and
    checkpoints, which a run does beside its steps, are not in them. Memory is the high-water mark of the process and,
    where the backend tells it, of its fullest device.
    """
    schedule, length = Schedule(config), config.data.sequence_length
    data = load_tokens(config.data, config.model.vocab_size)
    batch = config.train.batch_size
    micro_batch = config.train.micro_batch_size or batch
    mesh = make_mesh(config.mesh)
    rows = Batches(data.train, length, config.train.seed).rows(0, batch).reshape(batch // micro_batch, micro_batch, -1)
    tokens = place(lambda first, count: rows[:, first : first + count], rows.shape, 1, mesh)
    knobs = Knobs(schedule.learning_rate(0), schedule.mtp_weight(0), schedule.bias_speed(0))
    state = initial_state(config, mesh)

    begin = time.perf_counter()
    end_of_document = data.tokenizer.eos if data.tokenizer else None
    step = make_train_step(config, runtime_of(config), mesh, end_of_document=end_of_document)
    compiled = step.lower(state, tokens, knobs).compile()
    compile_seconds = time.perf_counter() - begin
    for _ in range(2):
        state, _ = compiled(state, tokens, knobs)
    seconds = []
    for _ in range(steps):
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state, metrics = compiled(state, tokens, knobs)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)

    per_step, device = statistics.median(seconds), mesh.devices.flat[0]
    flops = training_flops_per_token(config.model, length)
    peak_flops = peak_of_all(mesh)
    tokens_per_s = batch * length / per_step
    return {
        "model": config.model.name,
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "tokens_per_step": batch * length,
        "compile_s": compile_seconds,
        "step_s_median": per_step,
        "step_s_min": min(seconds),
        "steps_per_s": 1 / per_step,
        "tokens_per_s": tokens_per_s,
        "gflop_per_token": flops / 1e9,
        "mfu": peak_flops and tokens_per_s * flops / peak_flops,
        "peak_flops": peak(device)[1],
        "exchange_rounds": int(metrics["rounds"].max()) / (batch // micro_batch) if "rounds" in metrics else 0,
        "peak_memory_process_bytes": peak_of_process(),
        "peak_memory_device_bytes": peak_of_devices(),
    }
