"""Cuts DeepSeek-V3's tokenizer.json down to a few kilobytes for the tests, and records what the whole one gives.

    python tests/golden/make_tokenizer.py tokenizer.json

Bytes, special tokens, and the merges that the sentences below need stay, with their ids; placeholders go. A merge that
is never applied changes nothing, so the cut tokenizer must give the same ids as the whole one on these sentences.
"""

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

SENTENCES = (
    "def f(x):\n    return self.x.append(x)  # 12345678 + 9\n",
    "the cost is 1234567.89 and\r\n\r\n  more",
    "  \t\tif (a != b) {\n\n    }",
    "你好,世界 Привет мир 😀 é",
    "<think>\nno <｜end▁of▁sentence｜> here</think>",
)


def main(path: str) -> None:
    """Writes tokenizer.json and tokenizer_cases.json beside this file."""
    packed = Path(path).read_bytes()
    text = (gzip.decompress(packed) if path.endswith(".gz") else packed).decode()
    whole = Tokenizer.from_str(text)
    whole.encode_special_tokens = True
    described = json.loads(text)
    merges = [tuple(merge.split(" ")) for merge in described["model"]["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    applied = {
        merge
        for sentence in SENTENCES
        for word, _ in whole.pre_tokenizer.pre_tokenize_str(sentence)
        for merge in _applied(word, ranks)
    }
    kept = sorted(applied, key=ranks.get)
    results = {first + second for first, second in kept}
    vocabulary = described["model"]["vocab"]
    added = [token for token in described["added_tokens"] if "place" not in token["content"]]
    cut = {token: id for token, id in vocabulary.items() if id < 259 or token in results}
    # Beside the model's own, the library numbers added tokens one by one, whatever id the file says.
    described["model"]["vocab"] = cut | {token["content"]: token["id"] for token in added}
    described["model"]["merges"] = [" ".join(merge) for merge in kept]
    described["added_tokens"] = added
    cases = [[sentence, whole.encode(sentence, add_special_tokens=False).ids] for sentence in SENTENCES]
    folder = Path(__file__).parent
    for name, value in (("tokenizer.json", described), ("tokenizer_cases.json", cases)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def _applied(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Returns the merges that byte-pair encoding applies to a word, one occurrence at a time."""
    parts, found = list(word), []
    while True:
        pairs = [pair for pair in pairwise(parts) if pair in ranks]
        if not pairs:
            return found
        best = min(pairs, key=ranks.get)
        found.append(best)
        at = next(i for i, pair in enumerate(pairwise(parts)) if pair == best)
        parts[at : at + 2] = [best[0] + best[1]]


if __name__ == "__main__":
    main(*sys.argv[1:])
