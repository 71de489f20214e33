"""What dividing a run over devices costs: its step on meshes of eight devices beside that of one.

    python -m dsjax.benchmarks.meshes [CONFIG] [--steps 10] [--rounds 3]

The global batch is the same on every mesh. On a CPU all devices are simulated by the same cores, so nothing can get
faster: what a mesh adds to the single device's time is what dividing costs. Each mesh adds one thing to that before it:
smaller products and ZeRO's gathers (`data 8`), an exchange of tokens (`local 8`), a second hop (`node 2, local 4`), the
same two hops with nothing but what is in use sent (emulated on a CPU, where it costs more). Processes of their own, in
turns; prints JSON with medians of a mesh's medians.
"""

import argparse
import json
import statistics
import subprocess
import sys

MESHES = {
    "one device": {},
    "data 8": {"mesh.data": 8},
    "local 8": {"mesh.local": 8},
    "node 2, local 4": {"mesh.node": 2, "mesh.local": 4},
    "node 2, local 4, ragged": {"mesh.node": 2, "mesh.local": 4, "dispatch.transport": "ragged"},
}
_ALONE = {"mesh.data": 1, "mesh.node": 1, "mesh.local": 1}


def measure(config: str, steps: int, settings: dict[str, int | str]) -> dict:
    """Return what `python -m dsjax.bench train` prints for a config with some settings of its mesh."""
    words = [word for name, value in (_ALONE | settings).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dsjax.bench", "train", config, "--steps", str(steps), *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/tiny_expert_parallel.toml")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[dict]] = {name: [] for name in MESHES}
    for _ in range(options.rounds):
        for name, settings in MESHES.items():
            found[name].append(measure(options.config, options.steps, settings))
    alone = statistics.median(result["step_s_median"] for result in found["one device"])
    table = {}
    for name, results in found.items():
        step = statistics.median(result["step_s_median"] for result in results)
        table[name] = {
            "step_ms": round(step * 1e3, 1),
            "over_one_device": round(step / alone, 2),
            "compile_s": round(statistics.median(result["compile_s"] for result in results), 1),
            "exchange_rounds": results[-1]["exchange_rounds"],
            "peak_memory_mb": round(max(result["peak_memory_process_bytes"] for result in results) / 1e6),
        }
    print(json.dumps({"tokens_per_step": found["one device"][0]["tokens_per_step"], "meshes": table}, indent=2))


if __name__ == "__main__":
    main()
