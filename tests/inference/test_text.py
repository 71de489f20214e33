"""Streamed text is the whole text, in whole characters."""

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dsjax.data.tokenizer import FIM, Tokenizer
from dsjax.inference.text import UNKNOWN, StopStrings, TextStream, reopen_last_token


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A tokenizer that marks spaces and drops the one at the start of a text, as sentencepiece does."""
    model = tokenizers.models.WordLevel({"▁def": 0, "▁add": 1, "(": 2, "</s>": 3, "▁": 4}, unk_token="(")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(made.to_str(), "made here")


def stream_text(tokenizer, ids, before=(), shown=None):
    """The pieces of text that tokens make."""
    stream = TextStream(tokenizer, before, shown)
    for id in ids:
        if text := stream.push(id):
            yield text
    if rest := stream.flush():
        yield rest


def test_a_character_comes_when_it_is_whole(tokenizer):
    a, smile, b = tokenizer.encode(["a", "😁", "b"])
    assert len(smile) > 2
    stream = TextStream(tokenizer)
    assert [stream.push(id) for id in a + smile + b] == ["a", *[""] * (len(smile) - 1), "😁", "b"]
    assert stream.flush() == ""


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNKNOWN)))
def test_any_text(tokenizer, text):
    pieces = list(stream_text(tokenizer, tokenizer.encode([text])[0]))
    assert "".join(pieces) == text
    assert all(pieces) and not any(UNKNOWN in piece for piece in pieces)


@given(st.lists(st.integers(0, 300), max_size=40))
def test_any_tokens(tokenizer, ids):
    """Also those that are no UTF-8, as a model may write."""
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_broken_bytes_are_not_held_back_forever(tokenizer):
    byte = next(id for id in range(tokenizer.vocab_size) if tokenizer.token(id) == "ÿ")  # how the byte 0xFF is spelled
    assert len(list(itertools.islice(stream_text(tokenizer, itertools.repeat(byte)), 5))) == 5


def test_spaces_at_the_start(words):
    assert list(stream_text(words, [1, 2, 0, 1])) == ["add", "(", " def", " add"]
    assert list(stream_text(words, [1, 2, 0, 1], before=[0])) == [" add", "(", " def", " add"]


def test_what_is_shown_is_not_repeated(tokenizer):
    before, after = tokenizer.encode(["x = 😀"])[0], tokenizer.encode([" + 1"])[0]
    assert "".join(stream_text(tokenizer, after, before)) == " + 1"
    for cut in range(len(before)):
        assert "".join(stream_text(tokenizer, before[cut:] + after, before[:cut], shown="x = 😀")) == " + 1"


def test_the_last_token_of_a_prompt_may_become_longer(tokenizer):
    prompt = [tokenizer.eos, *tokenizer.encode(["def "])[0]]
    before, first = reopen_last_token(tokenizer, prompt, 400)
    assert tokenizer.decode(before[1:]) == "def"
    fitting = [tokenizer.decode([id]) for id in range(tokenizer.vocab_size) if first[id]]
    assert {" ", " a", " b"} <= set(fitting)
    assert all(text.startswith(" ") for text in fitting)
    assert not first[tokenizer.vocab_size :].any()


def test_tokens_that_begin_alike_are_found_at_once(tokenizer, monkeypatch):
    """They are those that the whole vocabulary has, and it is read once, not for every prompt."""
    vocabulary = {id: tokenizer.token(id) for id in range(tokenizer.vocab_size)}
    for text in {token[:length] for token in vocabulary.values() for length in (1, 2, len(token))}:
        expected = [id for id, token in vocabulary.items() if token.startswith(text)]
        assert sorted(tokenizer.beginning_with(text)) == expected
    asked = []
    monkeypatch.setattr(tokenizer, "token", lambda id: asked.append(id) or vocabulary[id])
    for text in ("def ", "x = "):
        reopen_last_token(tokenizer, tokenizer.encode([text])[0], 400)
    assert len(asked) == 2


@pytest.mark.parametrize("text", ["", f"x{FIM[1]}"])
def test_a_special_token_stays(tokenizer, text):
    prompt = [tokenizer.eos, *tokenizer.encode([text], special=True)[0]]
    before, first = reopen_last_token(tokenizer, prompt, 400)
    assert before == prompt
    assert first.all()


def test_a_special_token_does_not_lengthen_text(tokenizer):
    prompt = [tokenizer.eos, *tokenizer.encode(["a <"])[0]]
    assert tokenizer.token(prompt[-1])[-1] == "<"
    _, first = reopen_last_token(tokenizer, [prompt[0], tokenizer.encode(["<"])[0][0]], 400)
    assert not first[[tokenizer.bos, tokenizer.eos, *tokenizer.fim]].any()


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_wherever_pieces_end(text, strings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    stops, shown, stopped = StopStrings(strings), "", False
    for piece in pieces:
        new, stopped = stops.push(piece)
        shown += new
        if stopped:
            break
    # At the piece where the first of them is complete, the text ends in front of the earliest that is there.
    ends = [text.find(string) + len(string) for string in strings if string in text]
    assert stopped == bool(ends)
    if stopped:
        known = next(text[:end] for end in [*cuts, len(text)] if end >= min(ends))
        assert shown == text[: min(known.find(string) for string in strings if string in known)]
    else:
        assert shown + stops.flush() == text


def test_text_is_held_back_only_as_long_as_a_stop_may_come():
    stops = StopStrings(["\n\n", "END"])
    assert [stops.push(piece)[0] for piece in ("a\n", "b", "E", "N", "d", "\n")] == ["a", "\nb", "", "", "ENd", ""]
    assert stops.flush() == "\n"
    with pytest.raises(ValueError, match="stop = ''"):
        StopStrings(["x", ""])
