"""Compare the time of a training step with transformers' on torch, side by side, and print the ratio as JSON.

    python tests/oracle/compare_step_time.py --torch-python torch-env/bin/python

`bench_torch.py` says how to make that Python. Both sides train the model of `calibration.json` on random tokens, in
float32, on the same two threads. They live at the same time and take a few steps in turn, so that whatever else the
machine does meets both; the one whose turn it is not waits for its input. A ratio below 1 means that dsjax is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def training_step(batch: int, sequence: int) -> Callable[[], None]:
    """Return a function that takes one step of dsjax and waits for it."""
    import jax
    import numpy as np

    from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig
    from dsjax.runtime import runtime_of
    from dsjax.training.state import initial_state
    from dsjax.training.step import Knobs, make_train_step

    sizes = json.loads((HERE / "calibration.json").read_text())
    config = Config(
        model=ModelConfig(name="calibration", **sizes),
        train=TrainConfig(steps=1, batch_size=batch, remat="none", unroll_layers=True),
        data=DataConfig(sequence_length=sequence),
    )
    rng = np.random.default_rng(0)
    state = initial_state(config)
    train_step = make_train_step(config, runtime_of(config))
    knobs = Knobs(learning_rate=1e-3, mtp_weight=0.0, bias_speed=1e-3)

    def step() -> None:
        nonlocal state
        tokens = rng.integers(0, config.model.vocab_size, (1, batch, sequence + 1), dtype=np.int32)
        state, metrics = train_step(state, tokens, knobs)
        jax.block_until_ready((state, metrics))

    return step


def serve(batch: int, sequence: int) -> None:
    """Take as many steps as each line of input asks for, and print their milliseconds."""
    from dsjax.host_memory import keep_freed_memory

    keep_freed_memory()  # as the commands do

    import time

    import jax

    step = training_step(batch, sequence)
    for _ in range(3):
        step()
    print(json.dumps({"framework": f"jax {jax.__version__}"}), flush=True)
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            milliseconds.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(milliseconds), flush=True)


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.framework = self._answer()["framework"]
        self.milliseconds: list[float] = []

    def take(self, steps: int) -> None:
        print(steps, file=self.process.stdin, flush=True)
        # The first step of a turn finds caches full of the other side's data.
        self.milliseconds += self._answer()[1:]

    def summary(self) -> dict:
        self.process.stdin.close()
        self.process.wait()
        median = statistics.median(self.milliseconds)
        return {
            "framework": self.framework,
            "median_ms": round(median, 1),
            "min_ms": round(min(self.milliseconds), 1),
        }

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with status {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="Python that has torch and transformers")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--steps", type=int, default=6, help="steps per turn, the first of them not counted")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = ["--batch", str(args.batch), "--sequence", str(args.sequence)]
    if args.serve:
        return serve(args.batch, args.sequence)
    if args.torch_python is None:
        parser.error("--torch-python is missing: a Python with torch and transformers, see bench_torch.py")

    sides = {
        "torch": Side(args.torch_python, str(HERE / "bench_torch.py"), "--serve", *sizes),
        "dsjax": Side(sys.executable, __file__, "--serve", *sizes),
    }
    for _ in range(args.rounds):
        for side in sides.values():
            side.take(args.steps)
    result = {name: side.summary() for name, side in sides.items()}
    result["ratio_of_medians"] = round(result["dsjax"]["median_ms"] / result["torch"]["median_ms"], 3)
    result["ratio_of_minima"] = round(result["dsjax"]["min_ms"] / result["torch"]["min_ms"], 3)
    result["load_average"] = os.getloadavg()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
