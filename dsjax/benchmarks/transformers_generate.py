"""Run by another Python, with torch and transformers: times transformers' `generate`, one line of JSON per round.

    python transformers_generate.py FOLDER    # weights in Hugging Face's form

A line of the input is {"prompts": [[id, ...], ...], "max_tokens": n, "threads": n, "margins": bool}, prompts of one
length; the answer {"seconds": s, "tokens": [[id, ...], ...]}, and with them, where they are asked for, "margins":
[[m, ...], ...], how far the score of each token is above the next best. Nothing of dsjax is imported, which that Python
need not have.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

# Or transformers would find files beside this one where it looks for packages of the same names.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
import transformers  # noqa: E402


def main(folder: str) -> None:
    """Answer lines until there are no more."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    say({"torch": torch.__version__, "transformers": transformers.__version__})
    for line in sys.stdin:
        say(answer(model, **json.loads(line)))


def answer(
    model: Any, prompts: list[list[int]], max_tokens: int, threads: int, margins: bool
) -> dict[str, float | list[list[int]] | list[list[float]]]:
    """Continue prompts greedily."""
    torch.set_num_threads(threads)
    ids = torch.tensor(prompts)
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            output_scores=margins,
            return_dict_in_generate=True,
        )
    found = {"seconds": time.perf_counter() - begin, "tokens": out.sequences[:, ids.shape[1] :].tolist()}
    if margins:
        best = torch.stack(out.scores, dim=1).topk(2).values
        found["margins"] = (best[..., 0] - best[..., 1]).tolist()
    return found


def say(what: dict[str, Any]) -> None:
    """Write a line of the output."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
