"""Tokens and text at the seam: text that grows token by token, and prompts that end within a word."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from dsjax.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What bytes become that are not, or not yet, a character."""
INCOMPLETE = 3
"""Bytes of a UTF-8 character that may be there before its last one."""


class TextStream:
    """Text that grows token by token; never a part of a character that the next token could complete.

    Attributes:
        before: tokens in front of the first.
        shown: beginning of the text of all tokens that is not returned; None for the text of `before`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), shown: str | None = None):
        """Begins behind other tokens.

        Args:
            tokenizer: of the tokens.
            before: tokens in front of the first.
            shown: beginning of the text of all tokens that is not to be returned; by default the text of `before`.
        """
        self._tokenizer = tokenizer
        # Only what came since the text last ended with a whole character is decoded again, and what came just before,
        # because some tokenizers drop a space in front of the first token.
        self.before, self.shown = before, shown
        self._context, self._pending = list(before), []
        self._done = len(tokenizer.decode(self._context) if shown is None else shown)

    def push(self, id: int) -> str:
        """Returns the text that a token adds, which may be none."""
        self._pending.append(id)
        text = self._tokenizer.decode(self._context + self._pending)
        whole = len(text) - min(INCOMPLETE, len(text) - len(text.rstrip(UNKNOWN)))
        new = text[self._done : whole]
        self._done = max(self._done, whole)
        if whole == len(text) == self._done:
            self._context, self._pending = self._pending, []
            self._done = len(self._tokenizer.decode(self._context))
        return new

    def flush(self) -> str:
        """Returns what was held back, now that nothing follows."""
        return self._tokenizer.decode(self._context + self._pending)[self._done :]


class StopStrings:
    """Ends a text in front of the first of some strings, wherever the borders of its pieces are.

    Attributes:
        strings: these.
    """

    def __init__(self, strings: Sequence[str]):
        """Raises ValueError for a string without characters."""
        if "" in strings:
            raise ValueError("stop = '': must have at least one character")
        self.strings, self._held = strings, ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns text that is in front of any stop, and whether one has come."""
        text = self._held + text
        if found := [at for string in self.strings if (at := text.find(string)) >= 0]:
            return text[: min(found)], True
        held = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Returns what was held back because a stop could have begun with it."""
        return self._held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text with which a string begins, fewer than all of it."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


def reopen_last_token(
    tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int
) -> tuple[list[int], Bool[np.ndarray, " V"]]:
    """Return a prompt without its last token, and which tokens may take that one's place: those that begin with it.

    Text is cut into tokens at word borders: `def ` ends with a space that, in training, is always part of the next
    token. A model that is given the space alone has hardly seen what follows it; given the choice, it finds a word.
    Where the last token is special, nothing is taken back, and all tokens may follow.
    """
    special = {tokenizer.bos, tokenizer.eos, *(tokenizer.fim or ())}
    if ids[-1] in special:
        return list(ids), np.ones(vocab_size, bool)
    last = tokenizer.token(ids[-1])
    fits = np.zeros(vocab_size, bool)
    fits[[id for id in tokenizer.beginning_with(last) if id < vocab_size and id not in special]] = True
    return list(ids[:-1]), fits
