"""Time training steps of a small DeepSeek-V3 in transformers on torch: the other side of `compare_step_time.py`.

Runs in a Python of its own; torch and transformers are no dependencies of dsjax:

    python3.11 -m venv torch-env
    torch-env/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate
    torch-env/bin/python tests/oracle/bench_torch.py

The model is that of `calibration.json` (7.19M parameters) without MTP, in float32, with AdamW and clipping. Attention
is torch's fused one, experts are grouped products, AdamW is fused: the fastest choices there are.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

MODEL = json.loads(Path(__file__).with_name("calibration.json").read_text())


def training_step(args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that takes one step and returns its loss."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = transformers.DeepseekV3Config(
        **MODEL,
        num_key_value_heads=MODEL["num_attention_heads"],
        max_position_embeddings=args.sequence,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = args.attention
    config._experts_implementation = args.experts
    model = transformers.DeepseekV3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        tokens = torch.randint(0, config.vocab_size, (args.batch, args.sequence))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def timed(step: Callable[[], float], count: int) -> list[float]:
    """Return the milliseconds of each of `count` steps."""
    milliseconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts_implementation")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 3 untimed ones")
    parser.add_argument("--serve", action="store_true", help="take steps as asked: a count per line in, times out")
    args = parser.parse_args()
    step = training_step(args)
    timed(step, 3)
    if args.serve:
        print(
            json.dumps({"framework": f"torch {torch.__version__}, transformers {transformers.__version__}"}), flush=True
        )
        for line in sys.stdin:
            print(json.dumps(timed(step, int(line))), flush=True)
    else:
        milliseconds = timed(step, args.steps)
        print(json.dumps({"median_ms": statistics.median(milliseconds), "min_ms": min(milliseconds)}))


if __name__ == "__main__":
    main()
