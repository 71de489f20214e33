"""An answer's thinking, told from what it says: `<think>...</think>` in front of it."""

from typing import NamedTuple

from dsjax.serving.chat import THINKING_TAGS

OPEN, CLOSE = THINKING_TAGS


class Said(NamedTuple):
    """A piece of an answer."""

    thinking: str = ""
    content: str = ""


class Thinking:
    """Divides a text that grows; white space around the tags is nobody's.

    An answer thinks if it begins with the tag, or if the prompt has ended with it.
    """

    def __init__(self, prompt: str):
        """Begins behind the text of a prompt."""
        self._place = "thinking" if prompt.rstrip().endswith(OPEN) else "before"
        self._held, self._begun = "", False

    def push(self, text: str) -> Said:
        """Take the next piece; return what is certain by now."""
        self._held += text
        thinking = ""
        if self._place == "before":
            start = self._held.lstrip()
            if OPEN.startswith(start):  # it may become the tag
                return Said()
            if start.startswith(OPEN):
                self._place, self._held = "thinking", start.removeprefix(OPEN)
            else:
                self._place, self._begun = "content", True
        if self._place == "thinking":
            thinking, found, rest = self._held.partition(CLOSE)
            if not found:
                kept = _certain(thinking)
                thinking, self._held = self._trimmed(thinking[:kept]), thinking[kept:]
                return Said(thinking)
            thinking = self._trimmed(thinking.rstrip())
            self._place, self._held, self._begun = "content", rest, False
        content, self._held = self._trimmed(self._held), ""
        return Said(thinking, content)

    def flush(self) -> Said:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return Said(thinking=held) if self._place == "thinking" else Said(content=held)

    def _trimmed(self, text: str) -> str:
        """Drop white space in front of the first word."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


def _certain(thinking: str) -> int:
    """Characters that neither the closing tag nor the white space in front of it can have."""
    overlap = next((n for n in range(len(CLOSE) - 1, 0, -1) if thinking.endswith(CLOSE[:n])), 0)
    return len(thinking[: len(thinking) - overlap].rstrip())
