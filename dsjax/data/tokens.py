"""The token cache: documents held out or not, rearranged for FIM, encoded, joined, and memory-mapped.

A document becomes its tokens and the end token; no begin token, as in the report's packed sequences (section 4.1). All
choices (held out, FIM, where it is cut) are drawn from a hash of the document's content, so they depend neither on the
seed of a run nor on the other documents: copies of a text are never on both sides, and a growing corpus keeps its
split.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from jaxtyping import UInt

from dsjax.config import DataConfig
from dsjax.data.cache import digest, digest_of_files, sealed
from dsjax.data.sources import Document, SourceFile, documents, expanded, source_files
from dsjax.data.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and the bytes of the source that are done and that there are."""

_FORMAT = 1  # to be raised when the same source and settings would give other tokens
_BATCH = 2**20  # characters that are encoded at once
_SAMPLE = 2**28  # bytes of text that a tokenizer is trained on, about


@dataclass(frozen=True)
class TokenCache:
    """The tokens of a source, on disk.

    `fingerprint` stands for the tokens, the settings and the tokenizer; a run is resumed only on the same one.
    """

    train: UInt[np.ndarray, " train_tokens"]
    validation: UInt[np.ndarray, " validation_tokens"]
    tokenizer: Tokenizer | None
    """None for the source `tokens` without `data.tokenizer`."""
    fingerprint: str
    train_documents: int
    validation_documents: int


def load_tokens(config: DataConfig, vocab_size: int, progress: Progress | None = None) -> TokenCache:
    """Returns the tokens of a source, from the cache if it has them, else reading, encoding and storing them.

    Args:
        config: the source and how it is arranged.
        vocab_size: of the model; every token id is below it.
        progress: told how far the work is.

    Returns:
        Memory-mapped uint16, or uint32 where `vocab_size` is above 65,536.

    Raises:
        ValueError: the source or the tokenizer is unfit (sources.py, tokenizer.py), the source is empty or too small
            for one window of `sequence_length + 1` tokens per side, the tokenizer has no tokens for what is asked.
    """
    files = source_files(config)
    cache = expanded(config.cache, "data.cache")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}; name a folder, which is made if it is absent"
        raise ValueError(f"data.cache = {config.cache!r}: {reason}") from None
    ledger = cache / f"ledger-{digest([str(file.path.absolute()) for file in files])}.json"
    source = digest_of_files(files, ledger)
    job = _Job(config, vocab_size, files, ledger, source, progress or (lambda stage, done, total: None))
    tokenizer = _tokenizer(job, cache)
    if tokenizer is None and config.fim_rate:
        raise ValueError(f"data.fim_rate = {config.fim_rate}: without data.tokenizer it must be 0")
    if tokenizer is None and config.document_mask:
        raise ValueError("data.document_mask = True: without data.tokenizer it must be False")
    if tokenizer and config.fim_rate and tokenizer.fim is None:
        raise ValueError(f"data.tokenizer = {config.tokenizer!r} has no FIM tokens; set data.fim_rate to 0")
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer = {config.tokenizer!r} has ids up to {tokenizer.vocab_size - 1}; "
            f"model.vocab_size = {vocab_size} must be at least {tokenizer.vocab_size}"
        )
    settings = [config.source, config.text_field, config.validation_fraction, config.fim_rate, vocab_size]
    folder = cache / f"tokens-{digest(_FORMAT, source, tokenizer and tokenizer.digest, settings)}"
    facts = sealed(folder, partial(_build, job, tokenizer))
    sides = {}
    for side in ("train", "validation"):
        count = facts[f"{side}_tokens"]
        if count < config.sequence_length + 1:
            raise ValueError(
                f"{_where(config)}: {count} tokens for {side}, fewer than one window of data.sequence_length + 1 = "
                f"{config.sequence_length + 1}; use more text, a shorter sequence or another data.validation_fraction"
            )
        sides[side] = np.memmap(folder / f"{side}.bin", _dtype(vocab_size), mode="r", shape=(count,))
    return TokenCache(
        **sides,
        tokenizer=tokenizer,
        fingerprint=facts["fingerprint"],
        train_documents=facts["train_documents"],
        validation_documents=facts["validation_documents"],
    )


@dataclass(frozen=True)
class _Job:
    config: DataConfig
    vocab_size: int
    files: list[SourceFile]
    ledger: Path
    source: str
    progress: Progress

    def documents(self, stage: str, end: int | None) -> Iterator[tuple[Document, bool]]:
        """Yields each document and whether it is held out, telling how far it is."""
        total = sum(file.path.stat().st_size for file in self.files)
        found = documents(self.config, self.files, vocab_size=self.vocab_size, end_of_document=end)
        empty = True
        for document, held_out in split(found, self.config.validation_fraction):
            empty = False
            yield document, held_out
            self.progress(stage, document.consumed, total)
        if empty:
            raise ValueError(f"{_where(self.config)}: the source is empty")


def split(found: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    """Yields each document and whether it is held out, which the hash of its content decides.

    If that holds out none, or all there is of a single document, the end of the last document is held out: `fraction`
    of the whole, but at most half of that document.
    """
    last, size, any_held_out, alone = None, 0, False, True
    for document in found:
        if last is not None:
            held_out = _below(_draws(last.content)[0], fraction)
            any_held_out |= held_out
            yield last, held_out
            alone = False
        last, size = document, size + len(document.content)
    if last is None:
        return
    held_out = _below(_draws(last.content)[0], fraction)
    if any_held_out or (held_out and not alone):
        yield last, held_out
        return
    content = last.content
    cut = len(content) - min(len(content) // 2, round(fraction * size))
    if isinstance(content, str):
        cut = content.rfind("\n", max(cut - 1000, 0), cut) + 1 or cut
    for part, held_out in ((content[:cut], False), (content[cut:], True)):
        if len(part):
            yield replace(last, content=part), held_out


def arrange(content: Any, rate: float, tokenizer: Tokenizer | None, *, fim: bool) -> list[Any]:
    """Returns the parts of a document in the order of training: texts, and arrays or lists of ids.

    With probability `rate`, and only if `fim`, it is cut at two uniform positions (characters, or tokens) and becomes
    begin, prefix, hole, suffix, end, middle (PSM form, report section 4.1). The end token closes it in any case.
    """
    if tokenizer is None:
        return [content]
    if not isinstance(content, str) and content[-1] == tokenizer.eos:
        content = content[:-1]
    _, chance, *cuts = _draws(content)
    if not fim or not _below(chance, rate):
        return [content, [tokenizer.eos]]
    first, second = sorted(cut * (len(content) + 1) >> 64 for cut in cuts[:2])
    begin, hole, end = tokenizer.fim
    prefix, middle, suffix = content[:first], content[first:second], content[second:]
    return [[begin], prefix, [hole], suffix, [end], middle, [tokenizer.eos]]


def _build(job: _Job, tokenizer: Tokenizer | None, folder: Path) -> dict[str, int]:
    sides = ("train", "validation")
    counts = dict.fromkeys([f"{side}_{what}" for side in sides for what in ("tokens", "documents")], 0)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:

        def write(batch: list[tuple[list[Any], bool]]) -> None:
            texts = [part for parts, _ in batch for part in parts if isinstance(part, str)]
            encoded = iter(tokenizer.encode(texts) if texts else ())
            for parts, held_out in batch:
                file: BinaryIO = validation if held_out else train
                side = sides[held_out]
                counts[f"{side}_documents"] += 1
                for part in parts:
                    ids = np.asarray(next(encoded) if isinstance(part, str) else part, _dtype(job.vocab_size))
                    file.write(ids.tobytes())
                    counts[f"{side}_tokens"] += len(ids)

        batch, size = [], 0
        for document, held_out in job.documents("encoding", tokenizer and tokenizer.eos):
            parts = arrange(document.content, job.config.fim_rate, tokenizer, fim=not held_out)
            batch.append((parts, held_out))
            size += len(document.content)
            if size >= _BATCH:
                write(batch)
                batch, size = [], 0
        write(batch)
    _unchanged(job)
    return counts


def _tokenizer(job: _Job, cache: Path) -> Tokenizer | None:
    if job.config.tokenizer:
        return Tokenizer.load(job.config.tokenizer)
    if job.config.source == "tokens":
        return None

    def texts() -> Iterator[str]:
        total = sum(file.path.stat().st_size for file in job.files)
        for document, held_out in job.documents("training a tokenizer", None):
            if not held_out and _below(_draws(document.content)[4], min(_SAMPLE / total, 1.0)):
                yield document.content

    def build(folder: Path) -> dict[str, Any]:
        Tokenizer.train(texts(), job.vocab_size).save(folder / "tokenizer.json")
        _unchanged(job)
        return {}

    config = job.config
    settings = [config.source, config.text_field, config.validation_fraction, job.vocab_size, tokenizers.__version__]
    folder = cache / f"tokenizer-{digest(_FORMAT, job.source, settings)}"
    sealed(folder, build)
    return Tokenizer.load(folder)


def _unchanged(job: _Job) -> None:
    if digest_of_files(job.files, job.ledger) != job.source:
        raise ValueError(f"{_where(job.config)}: the source changed while it was read; start again when it is at rest")


def _draws(content: Any) -> list[int]:
    """Returns five uniform 64-bit numbers: held out, FIM, its two cuts, part of the tokenizer's sample."""
    data = content.encode() if isinstance(content, str) else content.astype("<i8").tobytes()
    found = hashlib.blake2b(data, digest_size=40).digest()
    return [int.from_bytes(found[start : start + 8], "little") for start in range(0, 40, 8)]


def _below(draw: int, fraction: float) -> bool:
    return draw < fraction * 2**64


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _where(config: DataConfig) -> str:
    return f"data.path = {config.path!r}" if config.path else f"data.source = {config.source!r}"
