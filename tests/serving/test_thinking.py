"""Thinking is told from what is said, wherever the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.serving.thinking import Thinking

CASES = {
    "": ("", ""),
    "hello": ("", "hello"),
    "  hello": ("", "  hello"),
    "<think>\nhm\n</think>\n\nhello\n": ("hm", "hello\n"),
    "\n<think>hm</think>hello": ("hm", "hello"),
    "<think>\n\n</think>\n\nhello": ("", "hello"),
    "<think>a < b </thin k> \n c</think> d </think> e": ("a < b </thin k> \n c", "d </think> e"),
    "<thinker> x": ("", "<thinker> x"),
    "see <think>x</think>": ("", "see <think>x</think>"),
    "<think>cut off": ("cut off", ""),
    "<think>cut </thi": ("cut </thi", ""),
    "<thi": ("", "<thi"),
    "<think>a</think>": ("a", ""),
}


def divided(pieces, prompt=""):
    thinking = Thinking(prompt)
    said = [*(thinking.push(piece) for piece in pieces), thinking.flush()]
    return tuple("".join(part) for part in zip(*said, strict=True))


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_whole_and_by_characters(text, expected):
    assert divided([text]) == expected
    assert divided(text) == expected


@pytest.mark.parametrize("prompt", ["<｜Assistant｜><think>\n", "<think>"])
def test_the_prompt_may_open_it(prompt):
    assert divided(["hm", "\n</th", "ink>\n\nhello"], prompt) == ("hm", "hello")


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a"])), st.data())
def test_cuts_change_nothing(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert divided(pieces) == divided([text])


def test_nothing_is_held_back_for_long():
    thinking = Thinking("")
    assert thinking.push("<think>hm, ") == ("hm,", "")
    assert thinking.push("so") == (" so", "")
    assert thinking.push("</think>yes ") == ("", "yes ")
    assert thinking.push("no") == ("", "no")
