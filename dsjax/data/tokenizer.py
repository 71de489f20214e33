"""Text to token ids and back: any Hugging Face `tokenizer.json`, or a byte-level BPE trained on the corpus.

The one we train splits text as DeepSeek-V3's does (numbers in groups of at most three digits, punctuation together
with the letters or line ends that follow it) and has the same special tokens, so nothing downstream tells them apart.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsjax.data.sources import expanded, opened

BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
"""What stands before the prefix, before the suffix, and before the middle."""

SMALLEST = 256 + 3 + len(FIM)
"""Ids that a trained tokenizer needs at least: every byte and the special tokens."""

# tokenizer.json does not say which token has which role, so the names in use decide; the first that exists counts.
_BEGINS = (BEGIN, "<|begin_of_text|>", "<bos>", "<s>")
_ENDS = (END, "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>")
_FIMS = (FIM, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
_ROLES = {*_BEGINS, *_ENDS, *(name for names in _FIMS for name in names)}

# The three splits of DeepSeek-V3's tokenizer.json, in its order; bytes become printable characters after them.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class Tokenizer:
    """A tokenizer and the ids of its special tokens.

    Attributes:
        vocab_size: the highest id plus 1.
        bos: id of the token before a text at inference, None if there is none.
        eos: id of the token after every document.
        fim: ids of the tokens before prefix, suffix and middle of fill-in-the-middle, None if there are none.
        added: spellings and ids of the tokens that a text is searched for before it is split, special ones among them.
        digest: stands for the whole tokenizer.
    """

    def __init__(self, text: str, origin: str) -> None:
        """Reads a tokenizer from the text of its `tokenizer.json`.

        Args:
            text: the JSON.
            origin: the file's name, for errors.

        Raises:
            ValueError: the text is not a tokenizer, or has no token for the end of a document.
        """
        try:
            described = json.loads(text)
            # DeepSeek's FIM tokens are not marked as special; unmarked, a document that spells one would get its id.
            for token in described.get("added_tokens", ()):
                token["special"] |= token["content"] in _ROLES
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{origin}: not a Hugging Face tokenizer.json: {error}") from error
        # A file may ask for cut or padded texts; a document is all of its tokens and no other.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = text
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.added = {token["content"]: ids[token["content"]] for token in described.get("added_tokens", ())}
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.bos = next((ids[name] for name in _BEGINS if name in ids), None)
        self.fim = next((tuple(ids[name] for name in names) for names in _FIMS if ids.keys() >= set(names)), None)
        eos = next((ids[name] for name in _ENDS if name in ids), None)
        if eos is None:
            raise ValueError(f"{origin}: no token for the end of a document; known ones are {', '.join(_ENDS)}")
        self.eos = eos

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` (or .json.gz), or the one in a folder.

        Raises:
            ValueError: there is no such file, or it holds no tokenizer that can be used.
        """
        path = expanded(path, "data.tokenizer")
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"data.tokenizer = {str(path)!r}: no such file")
        with opened(path) as (stream, _):
            data = stream.read()
        try:
            return cls(data.decode(), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE; the same texts give the same tokenizer.

        Args:
            texts: documents; they are read once and not kept.
            vocab_size: ids at most; a small corpus may not fill them.

        Raises:
            ValueError: the vocabulary cannot hold every byte.
        """
        if vocab_size < SMALLEST:
            raise ValueError(f"model.vocab_size = {vocab_size}: a byte-level tokenizer needs at least {SMALLEST}")
        untrained = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        untrained.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        untrained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BEGIN, END, PAD, *FIM],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        untrained.train_from_iterator(texts, trainer)
        return cls(untrained.to_str(), "the trained tokenizer")

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`."""
        Path(path).write_text(self._text, encoding="utf-8")

    @cached_property
    def _of_documents(self) -> tokenizers.Tokenizer:
        """One that takes special tokens for text. Switching between the two would have to wait for other threads that
        encode, and the library holds Python's lock while it waits."""
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Returns the ids of every text, on all cores; none is added at the begin or the end. Any thread may ask.

        Args:
            texts: documents or prompts.
            special: whether a text that spells a special token gets its id; never for documents.
        """
        tokenizer = self._tokenizer if special else self._of_documents
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, special tokens included; bytes that are not whole characters become U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def token(self, id: int) -> str | None:
        """Returns how the vocabulary spells an id, None if it is not in use."""
        return self._tokenizer.id_to_token(id)

    def beginning_with(self, text: str) -> list[int]:
        """Returns the ids that the vocabulary spells with this text at the beginning."""
        spelled, ids = self._in_order
        found = slice(bisect_left(spelled, text), bisect_right(spelled, text, key=lambda token: token[: len(text)]))
        return ids[found]

    @cached_property
    def _in_order(self) -> tuple[list[str], list[int]]:
        """All spellings in the order of their characters, and their ids."""
        known = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items())
        return [token for token, _ in known], [id for _, id in known]
