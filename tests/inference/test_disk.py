"""Files of pages: engines share them while they run, no step waits for them, and what disks do harms no answer."""

import logging
import os
import shutil
import threading
import time
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, SETTINGS, answered, ending, prompt

from dsjax.inference.console import warnings_said
from dsjax.inference.disk import ABANDONED, MOST_WAITING, DiskTier, PageFiles
from dsjax.inference.engine import Engine
from dsjax.inference.load import Model
from dsjax.inference.pages import ROOT, Known
from dsjax.runtime import Runtime


@pytest.fixture(scope="module")
def model(small, random_parameters, tokenizer):
    return Model(small, Runtime(), *random_parameters(small), ending(tokenizer, -1), opening=0, context=64, origin="")


def known(number):
    return Known.of(ROOT, [number, 0])


def page(number):
    return {"entries": jnp.full((2, 100), number, jnp.float32)}


def sizes(folder):
    return [file.stat().st_size for file in folder.iterdir()]


def written(engine):
    for pool in engine._groups.pools:
        pool._tier.flush()


def test_engines_that_run_share_their_pages(model, tmp_path):
    """What one reads or writes, the other finds, though both began before there was a file."""
    settings = replace(SETTINGS, disk=str(tmp_path))
    one, other, alone = Engine(model, settings), Engine(model, settings), Engine(model, SETTINGS)
    for first, second, seed in ((one, other, 3), (other, one, 8)):
        request = first.submit(prompt(30, seed), GREEDY, max_tokens=8)
        (tokens,) = answered(first, request)
        assert request.cached_tokens == 0
        written(first)
        # The prompt, its answer, and what follows.
        longer = [*prompt(30, seed), *tokens, 7]
        request, same = (engine.submit(longer, GREEDY, max_tokens=6) for engine in (second, alone))
        assert answered(second, request) == answered(alone, same)
        assert request.cached_tokens == second.prefix.found_in_tier == 36


def test_no_step_waits_for_the_disk(model, tmp_path, monkeypatch):
    free, writing, write = threading.Event(), [], PageFiles.write
    monkeypatch.setattr(PageFiles, "write", lambda *args: (writing.append(args[1]), free.wait(), write(*args)))
    engine = Engine(model, replace(SETTINGS, disk=str(tmp_path)))
    requests = [engine.submit(prompt(40, seed), GREEDY, max_tokens=20) for seed in range(3)]
    answered(engine, *requests)  # more pages than may wait
    (folder,) = tmp_path.iterdir()
    assert (len(writing), sizes(folder)) == (1, [])
    free.set()
    written(engine)
    assert len(sizes(folder)) == MOST_WAITING
    engine.close()
    assert len(sizes(folder)) == len(engine._groups.pools[0]._known) > MOST_WAITING


def test_the_budget_is_that_of_all_engines(tmp_path):
    one, other = PageFiles(tmp_path, 20_000), PageFiles(tmp_path, 20_000)
    now = time.time()
    for number in range(60):
        (one, other)[number // 5 % 2].write(known(number), page(number))
        os.utime(one._file(known(number)), (now + number, now + number))
        assert one.read(known(0))["entries"].tolist()  # as it is used, it stays
        os.utime(one._file(known(0)), (now + number, now + number + 0.5))
        assert sum(sizes(tmp_path)) <= 20_000
    assert sum(sizes(tmp_path)) > 20_000 * 7 / 8 - max(sizes(tmp_path))
    found = [number for number in range(60) if other.has(known(number))]
    assert found == [0, *range(61 - len(found), 60)]


def test_what_another_engine_has_deleted(tmp_path, caplog):
    files, set_pages = PageFiles(tmp_path, 10**6), []
    tier = DiskTier(files, page, lambda page, arrays: set_pages.append(page))
    files.write(known(1), page(1))
    assert tier.has(known(1)) and tier.load(known(1), 5)
    (file,) = tmp_path.iterdir()
    file.unlink()
    assert not tier.load(known(1), 6)  # it had been there a moment ago
    assert set_pages == [5]
    assert not caplog.records


def test_what_killed_processes_have_left(tmp_path):
    for name, age in (("old", ABANDONED + 10), ("new", 10)):
        part = tmp_path / f"{name}.part"
        part.write_bytes(bytes(9000))
        os.utime(part, (time.time() - age,) * 2)
    files = PageFiles(tmp_path, 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["new.part"]  # which somebody may be writing
    files.write(known(1), page(1))
    assert not files.has(known(1))  # there is no room beside it
    assert [file.name for file in tmp_path.iterdir()] == ["new.part"]


@pytest.mark.parametrize("fault", ["deleted", "full"])
def test_a_disk_that_fails_is_told_of_once_and_changes_no_answer(model, tmp_path, caplog, monkeypatch, fault):
    expected = answered(alone := Engine(model, SETTINGS), alone.submit(prompt(40), GREEDY, max_tokens=9))
    engine = Engine(model, replace(SETTINGS, disk=str(tmp_path / "pages")))
    if fault == "deleted":
        shutil.rmtree(tmp_path / "pages")
    else:

        def full(file, **arrays):
            file.write(b"x")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
    with caplog.at_level(logging.WARNING):
        assert answered(engine, engine.submit(prompt(40), GREEDY, max_tokens=9)) == expected
        engine.close()
    (record,) = caplog.records
    why = {"deleted": "No such file or directory", "full": "No space left on device"}[fault]
    assert record.getMessage().startswith(f"prefix cache: no more pages are written to {tmp_path}")
    assert record.getMessage().endswith(f": {why}")
    assert not list(tmp_path.rglob("*.part"))


def test_commands_say_it_as_all_else(tmp_path, capsys):
    files = PageFiles(tmp_path / "pages", 10**6)
    (tmp_path / "pages").rmdir()
    with warnings_said():
        files.write(known(1), page(1))
    why = f"no more pages are written to {tmp_path / 'pages'}: No such file or directory"
    assert capsys.readouterr().err == f"dsjax: prefix cache: {why}\n"
