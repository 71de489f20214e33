"""The token cache holds every document once, on one side, in the right form, and survives what happens to caches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import DataConfig
from dsjax.data import sources, tokens
from dsjax.data.sources import Document
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.tokens import arrange, load_tokens, split

GOLDEN = str(Path(__file__).parents[1] / "golden" / "tokenizer.json")
VOCABULARY = 400


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """The json and email packages of the standard library, as records."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text() for name in ("json", "email") for path in sorted((root / name).rglob("*.py"))]
    pieces = [piece for text in texts for piece in re.split(r"\n(?=def |class )", text) if piece]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return DataConfig(source="jsonl", path=str(path), sequence_length=64, cache=str(tmp_path / "cache"))


def records(config: DataConfig) -> list[str]:
    return [json.loads(line)["text"] for line in Path(config.path).read_text().splitlines()]


def unpacked(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], int]:
    """Returns the documents of a token file, FIM undone, and how many it was applied to."""
    begin, hole, end = tokenizer.fim
    found, rearranged = [], 0
    for document in np.split(ids, np.flatnonzero(ids == tokenizer.eos) + 1)[:-1]:
        document = document[:-1].tolist()
        if document[:1] == [begin]:
            rearranged += 1
            first, second = document.index(hole), document.index(end)
            document = [document[1:first], document[second + 1 :], document[first + 1 : second]]
        else:
            document = [document]
        found.append("".join(tokenizer.decode(part) for part in document))
    return found, rearranged


def test_every_document_is_there_once_on_one_side(config):
    whole = replace(config, fim_rate=0.5)
    cache = load_tokens(whole, VOCABULARY)
    assert cache.train.dtype == cache.validation.dtype == np.uint16 and isinstance(cache.train, np.memmap)
    train, rearranged = unpacked(cache.train, cache.tokenizer)
    validation, none = unpacked(cache.validation, cache.tokenizer)
    assert Counter(train + validation) == Counter(records(config)) and not set(train) & set(validation)
    assert (len(train), len(validation)) == (cache.train_documents, cache.validation_documents)
    assert 0.4 < rearranged / len(train) < 0.6 and none == 0
    assert 0.02 < len(validation) / len(train + validation) < 0.1
    assert cache.train[-1] == cache.validation[-1] == cache.tokenizer.eos


def test_the_standard_library_as_a_run_reads_it(tmp_path):
    progress = []
    config = DataConfig(cache=str(tmp_path), sequence_length=256)
    cache = load_tokens(config, 512, lambda *call: progress.append(call))
    assert len(cache.train) > 2_000_000 and 0.02 < len(cache.validation) / len(cache.train) < 0.1
    assert cache.train.max() < 512 and cache.tokenizer.vocab_size == 512
    assert {stage for stage, _, _ in progress} == {"training a tokenizer", "encoding"}
    assert all(0 < done <= total for _, done, total in progress) and progress[-1][1] == progress[-1][2]


def test_the_second_time_nothing_is_done(config):
    first = load_tokens(config, VOCABULARY)
    second = load_tokens(config, VOCABULARY, lambda *call: pytest.fail("work was done"))
    assert second.fingerprint == first.fingerprint and np.array_equal(first.train, second.train)


def test_what_is_in_the_key(config, tmp_path):
    """Whatever changes the tokens changes the fingerprint; where the source lies, or the sequence length, does not."""
    first = load_tokens(config, VOCABULARY)
    fingerprints = {first.fingerprint}
    for change in ({"fim_rate": 0.2}, {"validation_fraction": 0.2}, {"tokenizer": GOLDEN}):
        fingerprints.add(load_tokens(replace(config, **change), 129_280).fingerprint)
    fingerprints.add(load_tokens(config, VOCABULARY + 1).fingerprint)
    assert len(fingerprints) == 5
    (tmp_path / "copy").mkdir()
    copied = replace(config, path=str(shutil.copy(config.path, tmp_path / "copy")), sequence_length=32)
    assert load_tokens(copied, VOCABULARY).fingerprint == first.fingerprint
    with open(config.path, "a") as file:
        file.write('{"text": "one more"}\n')
    assert load_tokens(config, VOCABULARY).fingerprint not in fingerprints


def test_a_deepseek_tokenizer_and_four_bytes(config):
    cache = load_tokens(replace(config, tokenizer=GOLDEN, fim_rate=0.5), 129_280)
    assert cache.train.dtype == np.uint32 and cache.tokenizer.vocab_size == 128_815
    found, rearranged = unpacked(cache.train, cache.tokenizer)
    assert set(found) <= set(records(config)) and rearranged


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "seal.json"])
def test_a_damaged_cache_is_built_again(config, caplog, name):
    first = load_tokens(config, VOCABULARY)
    expected = np.array(first.train)
    (folder,) = Path(config.cache).glob("tokens-*[!k]")
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    second = load_tokens(config, VOCABULARY)
    assert second.fingerprint == first.fingerprint and np.array_equal(second.train, expected)
    assert len(caplog.messages) == 1 and str(folder) in caplog.messages[0] and name in caplog.messages[0]


def test_a_process_killed_while_it_writes_leaves_no_cache(config):
    program = f"""
import os, signal
from dsjax.config import DataConfig
from dsjax.data import tokens
tokens._BATCH = 1000
calls = []
def progress(stage, done, total):
    calls.append(stage)
    if calls.count("encoding") == 100:
        os.kill(os.getpid(), signal.SIGKILL)
tokens.load_tokens({config!r}, {VOCABULARY}, progress)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    (half,) = Path(config.cache).glob("tokens-*.tmp")
    assert (half / "train.bin").exists()
    cache = load_tokens(config, VOCABULARY)
    assert not half.exists()
    fresh = load_tokens(replace(config, cache=config.cache + "2"), VOCABULARY)
    assert np.array_equal(cache.train, fresh.train) and cache.fingerprint == fresh.fingerprint


def test_a_source_that_changes_while_it_is_read(config):
    def progress(stage, done, total):
        if stage == "encoding" and done == total:
            with open(config.path, "a") as file:
                file.write('{"text": "one more"}\n')

    with pytest.raises(ValueError) as caught:
        load_tokens(config, VOCABULARY, progress)
    assert str(caught.value) == (
        f"data.path = '{config.path}': the source changed while it was read; start again when it is at rest"
    )
    load_tokens(config, VOCABULARY)


def test_arrays_of_ids(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 300)
    documents = [np.append(rng.integers(6, VOCABULARY, length), 1) for length in lengths]
    np.save(tmp_path / "x.npy", np.concatenate(documents))
    config = DataConfig(
        source="tokens",
        path=str(tmp_path / "x.npy"),
        sequence_length=16,
        fim_rate=0.0,
        cache=str(tmp_path / "cache"),
    )
    cache = load_tokens(config, VOCABULARY)
    assert cache.tokenizer is None
    # One array without a known end token is one document: its end is held out.
    assert np.array_equal(np.concatenate([cache.train, cache.validation]), np.concatenate(documents))
    assert len(cache.validation) == round(0.05 * sum(map(len, documents)))

    known = load_tokens(replace(config, tokenizer=GOLDEN, fim_rate=0.5), 129_280)
    begin, hole, end = known.tokenizer.fim
    found = []
    for side in (known.train, known.validation):
        for ids in np.split(side, np.flatnonzero(side == 1) + 1)[:-1]:
            ids = ids.tolist()
            if ids[0] == begin:
                first, second = ids.index(hole), ids.index(end)
                ids = ids[1:first] + ids[second + 1 : -1] + ids[first + 1 : second] + [1]
            found.append(tuple(ids))
    assert Counter(found) == Counter(tuple(document.tolist()) for document in documents)
    assert 100 < np.count_nonzero(known.train == begin) < 200


def complaint(config: DataConfig, vocab_size: int = VOCABULARY) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokens(config, vocab_size)
    assert not list(Path(config.cache).glob("*.tmp"))
    return str(caught.value)


def test_what_cannot_be_trained_on(config, tmp_path):
    path = Path(config.path)
    assert complaint(replace(config, tokenizer=GOLDEN), 1024) == (
        f"data.tokenizer = '{GOLDEN}' has ids up to 128814; model.vocab_size = 1024 must be at least 128815"
    )
    described = json.loads(Path(GOLDEN).read_text().replace("fim▁hole", "hole"))
    (tmp_path / "plain.json").write_text(json.dumps(described))
    plain = replace(config, tokenizer=str(tmp_path / "plain.json"))
    assert complaint(plain, 129_280) == (
        f"data.tokenizer = '{tmp_path / 'plain.json'}' has no FIM tokens; set data.fim_rate to 0"
    )
    assert load_tokens(replace(plain, fim_rate=0.0), 129_280).tokenizer.fim is None
    np.save(tmp_path / "x.npy", np.arange(VOCABULARY + 1))
    arrays = replace(config, source="tokens", path=str(tmp_path / "x.npy"), fim_rate=0.0)
    assert complaint(arrays) == (f"{tmp_path / 'x.npy'}[400]: token id 400 is not in the model's vocabulary, 0 to 399")
    assert complaint(replace(arrays, fim_rate=0.1)) == "data.fim_rate = 0.1: without data.tokenizer it must be 0"
    assert complaint(replace(arrays, document_mask=True)) == (
        "data.document_mask = True: without data.tokenizer it must be False"
    )
    assert complaint(config, 200) == "model.vocab_size = 200: a byte-level tokenizer needs at least 262"

    whole = path.read_text()
    path.write_text(whole + '{"body": 1}\n')
    line = whole.count("\n") + 1
    assert complaint(config) == f"{path}:{line}: no field 'text', only 'body'; set data.text_field"
    path.write_text('{"text": ""}\n\n')
    assert complaint(config) == f"data.path = '{path}': the source is empty"
    path.write_text("")
    assert complaint(config) == f"data.path = '{path}': the source is empty"


def test_fewer_tokens_than_a_window(config):
    cache = load_tokens(config, VOCABULARY)
    for side in ("train", "validation"):
        count = len(getattr(cache, side))
        assert complaint(replace(config, sequence_length=count)) == (
            f"data.path = '{config.path}': {count} tokens for {side}, fewer than one window of data.sequence_length "
            f"+ 1 = {count + 1}; use more text, a shorter sequence or another data.validation_fraction"
        )
    assert load_tokens(replace(config, sequence_length=count - 1), VOCABULARY).fingerprint == cache.fingerprint


texts = st.text(min_size=1, max_size=60)


def as_documents(contents: list) -> list[Document]:
    return [Document(content, f"x:{line}", line) for line, content in enumerate(contents, 1)]


@given(contents=st.lists(texts, min_size=1, max_size=30), fraction=st.floats(0.01, 0.99))
def test_the_split_loses_nothing(contents, fraction):
    found = [(document.content, held_out) for document, held_out in split(as_documents(contents), fraction)]
    assert "".join(content for content, _ in found) == "".join(contents)
    if len("".join(contents)) > len(contents) == 1 and len(contents[0]) * fraction > 1:
        assert [held_out for _, held_out in found] == [False, True]


def test_the_split_depends_on_content_alone():
    contents = [f"document {i}" for i in range(4000)]
    sides = {document.content: held_out for document, held_out in split(as_documents(contents), 0.05)}
    assert 0.04 < np.mean(list(sides.values())) < 0.06
    mixed = contents[2000:] * 2 + ["another"]
    for document, held_out in split(as_documents(mixed), 0.05):
        assert sides.get(document.content, held_out) == held_out


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_long_documents_give_up_the_end_of_the_last(count):
    content = "".join(f"line {i}\n" for i in range(2000))
    contents = [f"book {i}\n{content}" for i in range(count)]
    found = list(split(as_documents(contents), 0.05))
    assert [held_out for _, held_out in found] == [False] * count + [True]
    held_out = found[-1][0].content
    assert held_out.startswith("line ") and contents[-1].endswith(held_out)
    assert 0.04 < len(held_out) / len("".join(contents)) < 0.06


@given(content=texts, rate=st.sampled_from([0.0, 1.0]), fim=st.booleans())
def test_prefix_suffix_middle(content, rate, fim):
    tokenizer = Tokenizer.load(GOLDEN)
    begin, hole, end = tokenizer.fim
    parts = arrange(content, rate, tokenizer, fim=fim)
    if fim and rate:
        assert parts[0] == [begin] and parts[2] == [hole] and parts[4] == [end] and parts[6:] == [[tokenizer.eos]]
        assert parts[1] + parts[5] + parts[3] == content
    else:
        assert parts == [content, [tokenizer.eos]]


def test_cuts_are_uniform():
    tokenizer = Tokenizer.load(GOLDEN)
    parts = [arrange(f"{i:04d}", 1.0, tokenizer, fim=True) for i in range(10_000)]
    found = Counter((len(prefix), len(prefix) + len(middle)) for _, prefix, _, _, _, middle, _ in parts)
    # Two uniform positions out of 5, in order: a pair of different ones is twice as likely as a pair of equal ones.
    assert len(found) == 15
    for (first, second), count in found.items():
        assert abs(count - 400 * (1 + (first != second))) < 120


def test_memory_does_not_grow_with_the_corpus(config, monkeypatch):
    """Documents are read as they are needed: never more of them wait than a batch of text and one."""
    monkeypatch.setattr(tokens, "_BATCH", 2000)
    waiting, most = [0], [0]
    real_documents, real_encode = sources.documents, Tokenizer.encode

    def counted(*args, **kwargs):
        for document in real_documents(*args, **kwargs):
            waiting[0] += len(document.content)
            most[0] = max(most[0], waiting[0] - len(document.content))
            yield document

    def encode(self, texts):
        waiting[0] = 0
        return real_encode(self, texts)

    load_tokens(config, VOCABULARY)
    monkeypatch.setattr(tokens, "documents", counted)
    monkeypatch.setattr(Tokenizer, "encode", encode)
    load_tokens(replace(config, fim_rate=0.3), VOCABULARY)
    assert 0 < most[0] < 2000 + max(map(len, records(config)))
