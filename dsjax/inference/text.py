"""Tokens and text at the seam: text that grows token by token, and prompts that end within a word."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from dsjax.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What bytes become that are not, or not yet, a character."""
INCOMPLETE = 3
"""Bytes of a UTF-8 character that may be there before its last one."""


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = (), shown: str | None = None
) -> Iterator[str]:
    """Yield the text of tokens as they come, never a part of a character that the next token could complete.

    Args:
        tokenizer: of the tokens.
        ids: the tokens.
        before: tokens in front of them.
        shown: beginning of the text of all of these that is not to be yielded; by default the text of `before`.
    """
    # Only what came since the text last ended with a whole character is decoded again, and what came just before,
    # because some tokenizers drop a space in front of the first token.
    context, pending = list(before), []
    done = len(tokenizer.decode(context) if shown is None else shown)
    for id in ids:
        pending.append(id)
        text = tokenizer.decode(context + pending)
        whole = len(text) - min(INCOMPLETE, len(text) - len(text.rstrip(UNKNOWN)))
        if whole > done:
            yield text[done:whole]
            done = whole
        if whole == len(text) == done:
            context, pending = pending, []
            done = len(tokenizer.decode(context))
    if rest := tokenizer.decode(context + pending)[done:]:
        yield rest


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
    spelled = (tokenizer.token(id) or "" for id in range(vocab_size))
    fits = np.fromiter((text.startswith(last) for text in spelled), bool, vocab_size)
    fits[[id for id in special if id is not None]] = False
    return list(ids[:-1]), fits
