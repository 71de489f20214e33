"""A model trained by dsjax, exported to Hugging Face's form, gives the same logits in transformers on torch.

    uv run python -m dsjax.train configs/tiny.toml --train.steps 30 --run RUN
    uv run python tests/oracle/exported_logits.py export FOLDER --run RUN
    python3.11 -m venv torchenv && torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate
    torchenv/bin/python tests/oracle/exported_logits.py check FOLDER > tests/oracle/exported_logits.json

The second command exports the run in float32 and in BF16 with `python -m dsjax.convert to-hf`, and writes what dsjax
computes; without `--run` it trains `configs/models/tiny.toml` on its own source for a few steps, with router biases far
from 0, and saves a checkpoint as a run does. The last, in an environment that has torch and no JAX, loads the exports
and compares.
"""

import argparse
import json
from pathlib import Path

import numpy as np

TOLERANCE = 2e-5
DTYPES = ("fp32", "bf16")


def export(folder: Path, run: Path | None, steps: int) -> None:
    """Write `fp32/`, `bf16/` and the logits of both."""
    import jax
    import jax.numpy as jnp

    from dsjax.checkpoint.huggingface import load_huggingface
    from dsjax.convert import main
    from dsjax.model.context import context
    from dsjax.model.layout import stack
    from dsjax.model.transformer import hidden_states, logits
    from dsjax.runtime import Runtime

    if run is None:
        train(folder / "run", steps)
    tokens = np.random.default_rng(0).integers(0, 200, (2, 96), dtype=np.int32)
    arrays = {"tokens": tokens, "source": "a run of dsjax.train" if run else "trained by this script"}
    for dtype in DTYPES:
        assert main(["to-hf", str(run or folder / "run"), str(folder / dtype), "--dtype", dtype]) == 0
        config, params, biases = load_huggingface(folder / dtype)

        @jax.jit
        def compute(params, biases, config=config):
            ctx = context(config, tokens.shape[1])
            x = params["embed"][jnp.asarray(tokens)]
            hidden, _ = hidden_states(params, biases, x, ctx, config=config, runtime=Runtime())
            return logits(params, hidden)

        report = json.loads((folder / dtype / "conversion.json").read_text())
        arrays["notes"], arrays["biases"] = report["notes"], max(float(abs(b).max()) for b in jax.tree.leaves(biases))
        arrays[dtype] = np.asarray(compute(stack(params, config), stack(biases, config)))
    np.savez(folder / "logits.npz", **arrays)


def train(folder: Path, steps: int) -> None:
    """Train a small model on the bytes of this file, and save it as a run does."""
    import jax
    import jax.numpy as jnp
    import optax

    from dsjax.checkpoint.native import Checkpoints
    from dsjax.checkpoint.runs import FOLDER
    from dsjax.model.layout import unstack
    from dsjax.model.transformer import initial_parameters, losses
    from dsjax.runtime import Runtime
    from dsjax.settings import load_model_config, to_dict

    config, length = load_model_config("tiny"), 64
    params, biases = initial_parameters(config, seed=0)
    biases = jax.tree.map(lambda b: b + 0.05 * jax.random.normal(jax.random.key(1), b.shape), biases)
    optimizer = optax.adam(3e-3)
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)

    @jax.jit
    def step(params, moments, tokens):
        def total(params):
            parts = losses(params, biases, tokens, config=config, runtime=Runtime(loss_chunk=512), mtp_weight=0.3)
            return parts.objective, parts.main

        grads, loss = jax.grad(total, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, loss

    moments, random = optimizer.init(params), np.random.default_rng(0)
    for i in range(steps):
        starts = random.integers(0, len(text) - length - 1, 4)
        tokens = jnp.asarray(np.stack([text[at : at + length + 1] for at in starts]))
        params, moments, loss = step(params, moments, tokens)
        print(f"step {i + 1}: loss {float(loss):.4f}")
    state = {"params": unstack(params, config), "biases": unstack(biases, config)}
    with Checkpoints(folder / FOLDER) as checkpoints:
        checkpoints.save(steps, state, {"config": {"model": to_dict(config)}, "loss": float(loss)})


def check(folder: Path) -> None:
    """Compare with transformers, print JSON, and fail beyond the tolerance."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    saved = np.load(folder / "logits.npz")
    commands = [line.strip() for line in __doc__.splitlines() if line.startswith("    ")]
    result = {"commands": commands, "source": str(saved["source"]), "notes": saved["notes"].tolist()}
    result |= {"largest_router_bias": float(saved["biases"]), "tokens": int(saved["tokens"].size)}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__, "tolerance": TOLERANCE}
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(
            folder / dtype, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            theirs = model(input_ids=torch.from_numpy(saved["tokens"]).long(), use_cache=False).logits.numpy()
        result[dtype] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "largest_logit": float(np.abs(theirs).max()),
            "largest_difference": float(np.abs(theirs - saved[dtype]).max()),
            "same_best_token": float((theirs.argmax(-1) == saved[dtype].argmax(-1)).mean()),
        }
    print(json.dumps(result, indent=2))
    assert all(result[dtype]["largest_difference"] < TOLERANCE for dtype in DTYPES)


def main() -> None:
    """Export or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["export", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    if options.action == "check":
        check(options.folder)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        export(options.folder, options.run, options.steps)


if __name__ == "__main__":
    main()
