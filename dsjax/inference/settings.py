"""The settings of an engine."""

from dataclasses import dataclass
from typing import Literal

from dsjax.inference.cache import CacheFormat

Precision = Literal["auto", "bf16", "fp32", "fp8"]
"""Of weights and their products; see `load_model`."""

SMALLEST_PIECE = 16
"""Tokens of the shortest program that reads prompts."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much an engine does at once, and with what memory."""

    slots: int = 32
    """Requests that are decoded at the same time; others wait."""
    context: int = 0
    """Most tokens of a prompt and its answer; 0 for the length that the model was made for."""
    prefill_tokens: int = 256
    """Tokens of prompts that are read between two decode steps: a long prompt does not hold up the other requests."""
    page_size: int = 64
    """Tokens of a page, a power of two; a prompt's beginning is found again in whole pages."""
    cache_format: CacheFormat = "compute"
    """`fp8` halves the cache of a BF16 model; answers differ a little."""
    cache_bytes: int = 0
    """Memory for the latent cache; 0 for what all slots may need, but at most 80 % of an accelerator's free memory, or
    4 GiB of a CPU's."""
    prefix_bytes: int | None = None
    """Of these, most bytes that keep prompts which no request has any more; None for all, 0 for no prefix cache."""
    disk: str = ""
    """Folder for pages that there is no more room for; empty for none."""
    disk_bytes: int = 10 * 2**30
    """Most bytes of files in it."""
    speculate: int = 0
    """Tokens that the model's MTP modules draft per step, for the main model to read at once; 0 for none. Answers stay
    the same."""
    shortest_table: int = 256
    """Programs are made for tables of pages for so many tokens, four times as many, and so on: a step reads as much
    cache as its longest request's table has room for."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot work."""
        lowest = {
            "slots": 1,
            "context": 0,
            "prefill_tokens": SMALLEST_PIECE,
            "page_size": 1,
            "cache_bytes": 0,
            "disk_bytes": 0,
            "speculate": 0,
            "shortest_table": 1,
        }
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size = {self.page_size}: must be a power of two")
        if self.context == 1:
            raise ValueError("context = 1: must be 0, or at least 2 for a token of the prompt and one of the answer")
        if self.prefix_bytes is not None and self.prefix_bytes < 0:
            raise ValueError(f"prefix_bytes = {self.prefix_bytes}: must be at least 0")
        if self.disk and self.prefix_bytes == 0:
            raise ValueError(f"disk = {self.disk!r}: needs a prefix cache; leave prefix_bytes = 0 out")


def sizes(smallest: int, largest: int, factor: int = 4) -> list[int]:
    """Return sizes of programs: from the smallest on, each a multiple of the one before, and the largest."""
    found = []
    while smallest < largest:
        found.append(smallest)
        smallest *= factor
    return [*found, largest]


def batch_sizes(smallest: int, largest: int) -> list[int]:
    """Return sizes of batches: the smallest, four times as many, and from there on twice as many as the one before."""
    return [smallest, *sizes(4 * smallest, largest, factor=2)] if 4 * smallest < largest else sizes(smallest, largest)


def fitting(sizes: list[int], needed: int) -> int:
    """Return the smallest that is enough."""
    return next(size for size in sizes if size >= needed)
