"""The tokenizer is DeepSeek's where it reads DeepSeek's file, and loses no byte where it is trained."""

import gzip
import json
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.data.tokenizer import BEGIN, END, FIM, SMALLEST, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer.load(GOLDEN / "tokenizer.json")


def library() -> list[str]:
    return [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(library(), 400)


def test_deepseek_special_tokens(deepseek):
    assert (deepseek.bos, deepseek.eos, deepseek.vocab_size) == (0, 1, 128815)
    assert deepseek.fim == (128801, 128800, 128802)
    assert [deepseek.token(id) for id in deepseek.fim] == ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]


@pytest.mark.parametrize(("text", "ids"), json.loads((GOLDEN / "tokenizer_cases.json").read_text()))
def test_deepseek_ids(deepseek, text, ids):
    assert deepseek.encode([text]) == [ids]
    assert deepseek.decode(ids) == text


def test_a_document_that_spells_a_special_token_does_not_get_its_id(deepseek, trained):
    for tokenizer in (deepseek, trained):
        text = f"a{BEGIN}b{END}{FIM[0]}c"
        plain, special = tokenizer.encode([text])[0], tokenizer.encode([text], special=True)[0]
        ids = {tokenizer.bos, tokenizer.eos, *tokenizer.fim}
        assert not ids & set(plain) and ids & set(special) == {tokenizer.bos, tokenizer.eos, tokenizer.fim[0]}
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text


def test_documents_and_prompts_are_encoded_by_several_threads_at_once(trained):
    text = f"def a{BEGIN}b{END}c(d):\n" * 300
    expected = {special: trained.encode([text], special=special)[0] for special in (False, True)}
    with ThreadPoolExecutor(4) as threads:
        asked = [bool(i % 2) for i in range(200)]
        found = list(threads.map(lambda special: trained.encode([text], special=special)[0], asked))
    assert expected[False] != expected[True]
    assert all(ids == expected[special] for ids, special in zip(found, asked, strict=True))


def test_training_is_deterministic_and_splits_as_deepseek(trained, tmp_path):
    again = Tokenizer.train(library(), 400)
    assert again.digest == trained.digest and trained.vocab_size == 400
    assert (trained.bos, trained.eos, trained.fim) == (0, 1, (3, 4, 5))
    trained.save(tmp_path / "tokenizer.json")
    theirs = json.loads((GOLDEN / "tokenizer.json").read_text())["pre_tokenizer"]
    ours = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert ours == theirs
    read = Tokenizer.load(tmp_path)
    assert read.digest == trained.digest and read.encode(library()) == trained.encode(library())
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress((tmp_path / "tokenizer.json").read_bytes()))
    assert Tokenizer.load(tmp_path / "packed.json.gz").digest == trained.digest


@given(text=st.text())
def test_no_byte_is_lost(trained, text):
    ids = trained.encode([text])[0]
    assert trained.decode(ids) == text
    assert all(6 <= id < trained.vocab_size for id in ids)


def test_numbers_are_cut_in_threes():
    tokenizer = Tokenizer.train(["1234567 " * 50, "12345678 " * 50], 300)
    assert [tokenizer.token(id) for id in tokenizer.encode(["1234567"])[0]] == ["123", "456", "7"]


def test_the_smallest_vocabulary_is_every_byte():
    tokenizer = Tokenizer.train(["aaaa"], SMALLEST)
    assert tokenizer.vocab_size == SMALLEST and tokenizer.decode(tokenizer.encode(["é\0\n"])[0]) == "é\0\n"
    with pytest.raises(ValueError) as caught:
        Tokenizer.train(["aaaa"], SMALLEST - 1)
    assert str(caught.value) == "model.vocab_size = 261: a byte-level tokenizer needs at least 262"


def other(names: list[str]) -> str:
    """Returns the tokenizer.json of a family that has these special tokens."""
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": id,
                    "content": name,
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
                for id, name in enumerate(names)
            ],
            "model": {"type": "BPE", "vocab": {**{name: id for id, name in enumerate(names)}, "a": 9}, "merges": []},
        }
    )


@pytest.mark.parametrize(
    ("names", "begin", "end", "fim"),
    [
        (["<s>", "</s>"], 0, 1, None),
        (["<|begin_of_text|>", "<|end_of_text|>"], 0, 1, None),
        (["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"], None, 0, (1, 3, 2)),
        (["<|fim_prefix|>", "<|endoftext|>", "<|fim_middle|>", "<|fim_suffix|>"], None, 1, (0, 3, 2)),
    ],
)
def test_special_tokens_of_other_families(names, begin, end, fim):
    tokenizer = Tokenizer(other(names), "x")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.fim, tokenizer.vocab_size) == (begin, end, fim, 10)


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    for where in (path, tmp_path):
        with pytest.raises(ValueError) as caught:
            Tokenizer.load(where)
        assert str(caught.value) == f"data.tokenizer = '{path}': no such file"
    for text in (b"{}", b"[]", b"\xff", b"not JSON", b'{"added_tokens": 3}', b'{"added_tokens": [{}]}'):
        path.write_bytes(text)
        with pytest.raises(ValueError) as caught:
            Tokenizer.load(path)
        assert str(caught.value).startswith(f"{path}: not a Hugging Face tokenizer.json: ")
    path.write_text(other(["<pad>"]))
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(path)
    assert str(caught.value) == (
        f"{path}: no token for the end of a document; known ones are "
        "<｜end▁of▁sentence｜>, <|end_of_text|>, <|endoftext|>, <eos>, </s>"
    )
