"""A prompt as the engine takes it: ids that the model has, and for a text what its end asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dsjax.inference.load import Model
from dsjax.inference.text import reopen_last_token


@dataclass(frozen=True)
class Prompt:
    """A prompt that is encoded and checked; any number of requests may have it."""

    whole: Sequence[int]
    """All its tokens."""
    ids: Sequence[int]
    """Those that are read: all, or all but the last, which may grow."""
    before: Sequence[int]
    """Those that the text of the answer follows."""
    shown: str | None = None
    """Beginning of the text of all tokens that is not the answer's; None for the text of `before`."""
    first: Bool[np.ndarray, " V"] | None = None
    """Which tokens may follow; None for all."""

    @classmethod
    def of(cls, prompt: str | Sequence[int], model: Model) -> "Prompt":
        """Encode a text or check ids; any thread may.

        Raises:
            ValueError: no prompt, or an id that the model has not.
        """
        vocab_size, tokenizer = model.config.vocab_size, model.tokenizer
        if isinstance(prompt, str):
            whole = [model.opening, *tokenizer.encode([prompt], special=True)[0]]
            ids, first = reopen_last_token(tokenizer, whole, vocab_size)
            found = cls(whole, ids, ids[1:], tokenizer.decode(whole[1:]), first)
        else:
            ids = [int(id) for id in prompt]
            found = cls(ids, ids, ids)
        if not found.ids:
            raise ValueError("the prompt has no tokens: it must begin with the one that opens a document")
        if wrong := [id for id in found.ids if not 0 <= id < vocab_size]:
            raise ValueError(f"prompt: token {wrong[0]} must be below model.vocab_size = {vocab_size}")
        return found

    def most_tokens(self, asked: int, context: int, room: int) -> int:
        """Return how many tokens its answer may have.

        Args:
            asked: as many at most.
            context: tokens that prompt and answer may have.
            room: tokens that the cache has room for.

        Raises:
            ValueError: none are asked for, or the prompt fills the context, or prompt and answer the cache.
        """
        if asked < 1:
            raise ValueError(f"max_tokens = {asked}: must be at least 1")
        if len(self.whole) >= context:
            raise ValueError(f"the prompt has {len(self.whole)} tokens: must be below the {context} of the context")
        most = min(asked, context - len(self.whole))
        if len(self.ids) + most > room:
            raise ValueError(
                f"prompt and answer may have {len(self.ids) + most} tokens: must be at most the {room} that the cache "
                "has room for; lower max_tokens, or raise cache_bytes"
            )
        return most
