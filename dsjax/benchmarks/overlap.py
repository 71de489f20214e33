"""What overlapping is worth: a pipeline's step with its pairs overlapped, beside the same pairs one after the other,
for numbers of multiprocessors that communication gets.

NCCL learns its channels when JAX starts, so every number is a process of its own, and processes take turns. Each
compiles both steps, of which samples take turns.
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsjax.config import Config
from dsjax.parallel.hosts import simulate_devices
from dsjax.parallel.xla_flags import set_flags
from dsjax.settings import load_config, to_toml

SAMPLES = ("overlapped", "one_after_the_other")
Measure = Callable[[Config, int], dict[str, Any]]


@dataclass(frozen=True)
class Overlap:
    """Time a pipeline's step with its pairs overlapped and not, for numbers of multiprocessors for communication.

    JSON goes to stdout, a table to stderr. On a CPU, which has no multiprocessors, the first number only.
    """

    sms: tuple[int, ...] = (0, 8, 16, 20, 24, 32)
    """Values of `kernels.communication_sms`; processes of their own, in turns."""
    steps: int = 10
    """Samples of either step in a process, in turns; medians count."""
    rounds: int = 3
    """Processes for each number."""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not self.sms:
            raise ValueError("sms = (): must be one number or more")


def check(config: Config, sms: Sequence[int]) -> None:
    """Raise ValueError for a run without pairs, or numbers that cannot be."""
    if config.mesh.pipe == 1 or config.pipeline.schedule not in ("dualpipe", "dualpipev"):
        raise ValueError(
            f"mesh.pipe = {config.mesh.pipe} with pipeline.schedule = {config.pipeline.schedule!r}: only a pipeline in "
            "the order of 'dualpipe' or 'dualpipev' has pairs to overlap, such as tiny_dualpipe"
        )
    for count in sms:
        with_sms(config, count)


def with_sms(config: Config, count: int) -> Config:
    """Return the run with so many multiprocessors for communication."""
    return replace(config, kernels=replace(config.kernels, communication_sms=count))


def measure(config: Config, options: Overlap, of_process: Measure) -> dict[str, Any]:
    """Measure, and return what `table` shows, for JSON.

    Args:
        of_process: what measures a process, see `in_process`.
    """
    sms, steps = options.sms, options.steps
    check(config, sms)
    first = of_process(with_sms(config, sms[0]), steps)
    counts = list(sms) if first["platform"] == "gpu" else [sms[0]]
    seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn, count in enumerate(counts * options.rounds):
        found = of_process(with_sms(config, count), steps) if turn else first
        for name in SAMPLES:
            seconds[count][name] += found["seconds"][name]
    rows = {}
    for count, samples in seconds.items():
        medians = {name: statistics.median(samples[name]) for name in SAMPLES}
        rows[count] = {
            **{f"{name}_s": round(medians[name], 6) for name in SAMPLES},
            "overlapped_over_one_after_the_other": round(medians[SAMPLES[0]] / medians[SAMPLES[1]], 4),
            "samples": min(map(len, samples.values())),
        }
    return {
        "model": config.model.name,
        "device": first["device"],
        "mesh": {name: getattr(config.mesh, name) for name in ("pipe", "data", "node", "local")},
        "schedule": config.pipeline.schedule,
        "note": "" if first["platform"] == "gpu" else "no GPU: there are no multiprocessors to divide, so no sweep",
        "by_communication_sms": {str(count): row for count, row in rows.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the same for people."""
    lines = [f"{result['model']} on {result['device']}, {result['schedule']}, medians"]
    lines.append("communication_sms  overlapped, ms  one after the other, ms  ratio")
    for count, row in result["by_communication_sms"].items():
        overlapped, apart = (1e3 * row[f"{name}_s"] for name in SAMPLES)
        lines.append(
            f"{count:>17}  {overlapped:14.2f}  {apart:23.2f}  {row['overlapped_over_one_after_the_other']:5.3f}"
        )
    return "\n".join([*lines, *filter(None, [result["note"]])])


def in_process(config: Config, steps: int) -> dict[str, Any]:
    """Measure one number of multiprocessors in a new process."""
    command = [sys.executable, "-m", "dsjax.benchmarks.overlap", str(steps)]
    done = subprocess.run(command, input=to_toml(config), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"measuring kernels.communication_sms = {config.kernels.communication_sms} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def samples_here(config: Config, steps: int) -> dict[str, Any]:
    """Return seconds of both steps, measured in turns on random tokens, and the device."""
    import jax
    import jax.numpy as jnp

    from dsjax.benchmarks.clock import wall_seconds
    from dsjax.parallel.mesh import make_mesh
    from dsjax.runtime import runtime_of
    from dsjax.training.state import initial_state
    from dsjax.training.step import Knobs, make_train_step

    mesh, train = make_mesh(config.mesh), config.train
    micro_batch = train.micro_batch_size or train.batch_size
    shape = train.batch_size // micro_batch, micro_batch, config.data.sequence_length + 1
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, jnp.int32)
    knobs = Knobs(0.0, train.mtp_weights[0], 0.0)
    state = initial_state(config, mesh)

    def runner(overlap: bool) -> Callable[[int], None]:
        own = replace(config, pipeline=replace(config.pipeline, overlap=overlap))
        step = make_train_step(own, runtime_of(own), mesh, end_of_document=0)

        def run(calls: int) -> None:
            nonlocal state
            for _ in range(calls):
                state, _ = step(state, tokens, knobs)
            jax.block_until_ready(state)

        run(2)
        return run

    runners = {name: runner(overlap) for name, overlap in zip(SAMPLES, (True, False), strict=True)}
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLES}
    for _ in range(steps):
        for name, run in runners.items():
            seconds[name].append(wall_seconds(run, 1))
    device = mesh.devices.flat[0]
    return {"platform": device.platform, "device": device.device_kind, "seconds": seconds}


def main(argv: Sequence[str]) -> None:
    """Measure the run whose settings stdin has, and print JSON: the processes that `in_process` starts."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(sys.stdin.read())
        file.flush()
        config = load_config([file.name])
    set_flags(config)
    simulate_devices(config.mesh.devices)
    print(json.dumps(samples_here(config, int(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
