"""Write what transformers continues the golden checkpoints' prompts with, greedily: `tests/golden/greedy.json`.

    torchenv/bin/python tests/oracle/make_greedy.py

The environment is that of `make_golden.py`, and so are the weights, read from `tests/golden/VARIANT/hf`. Prompts are
the beginnings of the golden's `input_ids`, some longer than the 64 tokens before YaRN's extension. transformers'
`generate`, with its cache, gives the ids, with a repetition penalty in two of the cases; `margins` are the differences
of the two highest scores at every step, for tests to know where a tie is too near.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = {
    "v3": DeepseekV3ForCausalLM,
    "v3_no_yarn": DeepseekV3ForCausalLM,
    "v2_lite": DeepseekV2ForCausalLM,
    "v2": DeepseekV2ForCausalLM,
}
CASES = [(0, 5, 1.0), (0, 70, 1.0), (1, 30, 1.0), (0, 5, 1.3), (1, 70, 1.3)]
"""Row of `input_ids`, tokens of the prompt, repetition penalty."""
NEW = 24


def continuations(variant: str) -> list[dict]:
    model = VARIANTS[variant].from_pretrained(GOLDEN / variant / "hf", dtype=torch.float32, attn_implementation="eager")
    model.eval()
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    rows = load_file(GOLDEN / variant / "golden.safetensors")["input_ids"]
    found = []
    for row, length, penalty in CASES:
        prompt = rows[row : row + 1, :length]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=penalty,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(out.scores).topk(2).values
        found.append(
            {
                "row": row,
                "length": length,
                "repetition_penalty": penalty,
                "ids": out.sequences[0, length:].tolist(),
                "margins": [round(margin, 6) for margin in (best[:, 0] - best[:, 1]).tolist()],
            }
        )
    return found


if __name__ == "__main__":
    lines = [f"  {json.dumps(variant)}: {json.dumps(continuations(variant))}" for variant in VARIANTS]
    (GOLDEN / "greedy.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
