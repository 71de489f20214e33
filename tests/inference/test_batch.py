"""A file of prompts becomes a file of answers, also in several goes; what is wrong with a line is said at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from processes import AS_TESTS

from dsjax.generate import main
from dsjax.inference.batch import LineSettings, answer, finished, read_prompts
from dsjax.inference.engine import Engine
from dsjax.inference.load import load_model
from dsjax.inference.sampling import Sampling
from dsjax.inference.settings import EngineSettings

SETTINGS = EngineSettings(slots=4)
DEFAULT = LineSettings(Sampling(temperature=0.5), 20)
PROMPTS = [
    {"prompt": "def "},
    {"prompt": "class Point:\n", "id": "a", "temperature": 0, "max_tokens": 5},
    {"prompt": "größer", "id": 7, "seed": 3, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2, "stop": "\n"},
    {"prompt": "", "logprobs": 2, "max_tokens": 3},
]


@pytest.fixture
def prompts(tmp_path):
    """Writes a file of prompts."""

    def write(lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def command(run, prompts, output, *more):
    return [str(run), "--prompts", str(prompts), "--output", str(output), "--slots", "4", *more]


def answers(path):
    return {line["id"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_lines_and_their_settings(prompts):
    first, second, third, fourth = read_prompts(prompts(PROMPTS), DEFAULT)
    assert (first.id, second.id, third.id, fourth.id) == (1, "a", 7, 4)
    assert first.settings == DEFAULT
    assert second.settings == LineSettings(Sampling(temperature=0.0), 5)
    sampling = Sampling(temperature=0.5, seed=3, top_k=4, top_p=0.9, repetition_penalty=1.2)
    assert third.settings == LineSettings(sampling, 20, ("\n",))
    assert fourth.settings.sampling.logprobs == 2


def test_answers(run, prompts, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    long = {"prompt": "a b c " * 60, "id": "long"}
    with pytest.raises(SystemExit) as exit:
        main(command(run, prompts([*PROMPTS, long]), output))
    assert exit.value.code == 1  # as one of them has no answer
    found = answers(output)
    assert found.keys() == {1, "a", 7, 4, "long"}
    assert re.search(r"prompt has \d+ tokens: must be below the 64", found["long"]["error"])
    assert re.search(r"dsjax: 4 answers, 1 errors, 0 that were there; \d+ tokens in", capsys.readouterr().err)
    for line in found.values():
        assert line.get("tokens", 0) <= {1: 200, "a": 5, 7: 200, 4: 3, "long": 0}[line["id"]]
    assert found["a"].keys() == {"id", "text", "tokens", "finish"}
    told = found[4]["logprobs"]
    assert len(told) == found[4]["tokens"]
    assert all(len(token["likeliest"]) == 2 and token["logprob"] < 0 for token in told)
    # As the command for a single prompt has it.
    capsys.readouterr()
    main([str(run), "--prompt", "class Point:\n", "--temperature", "0", "--max-tokens", "5"])
    assert capsys.readouterr().out.rstrip("\n") == ("class Point:\n" + found["a"]["text"]).rstrip("\n")


def test_what_is_left_is_answered_later_and_the_same(run, prompts, tmp_path):
    lines = read_prompts(prompts([{"prompt": f"x = {i}", "seed": i, "max_tokens": 9} for i in range(12)]), DEFAULT)
    engine, whole, output = Engine(load_model(run), SETTINGS), tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    for _ in islice(answer(engine, lines, output), 5):
        pass
    done = finished(output, lines)
    assert len(done) == 5
    assert len(list(answer(Engine(load_model(run), SETTINGS), [x for x in lines if x.id not in done], output))) == 7
    assert len(list(answer(engine, lines, whole))) == 12
    assert engine.pages_held == 0  # those of the first go were cancelled
    assert answers(output) == answers(whole)
    assert output.read_bytes().count(b"\n") == 12


@pytest.mark.slow
def test_a_killed_run_goes_on(run, prompts, tmp_path, capsys):
    file = prompts([{"prompt": f"x = {i}", "seed": i, "max_tokens": 40 + i} for i in range(60)])
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    words = [sys.executable, "-m", "dsjax.generate", *command(run, file, output)]
    environment = os.environ | AS_TESTS
    process = subprocess.Popen(words, env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = output.read_bytes()
    there = before.count(b"\n")
    assert 2 <= there < 60, "it was to be killed on the way"
    with output.open("ab") as cut:
        cut.write(b'{"id": 1, "te')

    main(command(run, file, output))
    assert f"dsjax: {60 - there} answers, 0 errors, {there} that were there" in capsys.readouterr().err
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    main(command(run, file, whole))
    assert answers(output) == answers(whole)
    assert output.read_bytes().count(b"\n") == 60

    main(command(run, file, output))
    assert "dsjax: 0 answers, 0 errors, 60 that were there" in capsys.readouterr().err


def test_what_an_output_has(prompts, tmp_path):
    lines, output = read_prompts(prompts(PROMPTS), DEFAULT), tmp_path / "answers.jsonl"
    assert finished(output, lines) == set()
    good = b'{"id": "a", "text": "x"}\n'
    output.write_bytes(good + b'{"id": 1, "error": "too long"}\n' + b'{"id": 7, "text": "whole, but for its end"}')
    assert finished(output, lines) == {"a"}
    assert output.read_bytes() == good
    output.write_bytes(good + b'{"id": "another", "text": "x"}\n')
    with pytest.raises(ValueError, match="line 2: id = 'another' is not among the prompts"):
        finished(output, lines)
    output.write_bytes(b"# Notes\n" + good)
    with pytest.raises(ValueError, match="line 1: not written by dsjax"):
        finished(output, lines)
    assert output.read_bytes() == b"# Notes\n" + good


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", 'line 2: must be an object with a text "prompt"'),
        ('{"prompt": 3}', 'line 2: must be an object with a text "prompt"'),
        ('{"prompt": "x", "temprature": 1}', "line 2: 'temprature' is no setting; there are prompt, id"),
        ('{"prompt": "x", "temperature": "hot"}', "line 2: temperature = 'hot': must be a number"),
        ('{"prompt": "x", "top_k": 1.5}', "line 2: top_k = 1.5: must be an integer"),
        ('{"prompt": "x", "top_p": 0}', "line 2: top_p = 0.0: must be greater than 0"),
        ('{"prompt": "x", "max_tokens": 0}', "line 2: max_tokens = 0: must be at least 1"),
        ('{"prompt": "x", "logprobs": 99}', "line 2: logprobs = 99: must be 0 to 20"),
        ('{"prompt": "x", "stop": ["a", ""]}', "line 2: stop = "),
        ('{"prompt": "x", "id": 1}', "line 2: id = 1: must not be that of another line"),
        ('{"prompt": "x", "id": null}', "line 2: id = None: must be a text or an integer"),
        (r'{"prompt": "\ud800"}', "line 2: .*must be UTF-8"),
    ],
)
def test_errors_of_lines(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(path, DEFAULT)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "none.jsonl", "--output", "out"], "No such file"),
        (["--prompts", "none.jsonl"], "--prompts and --output go together"),
        (["--output", "out"], "--prompts and --output go together"),
        (["--prompts", "a", "--output", "b", "--prompt", "c"], "prompt = 'c': must be empty"),
        (["--stop", ""], "stop = ''"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0.0: must be greater than 0"),
        (["--slots", "0"], "slots = 0: must be at least 1"),
    ],
)
def test_errors_of_the_command(run, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        main([str(run), *argv])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_output_that_cannot_be_written(run, prompts, tmp_path, capsys):
    """It is found before a model is loaded; where the model is what is wrong, no file is left."""
    path = prompts(PROMPTS)
    for where, message in (
        ("nowhere/x.jsonl", f"dsjax: {tmp_path / 'nowhere/x.jsonl'}: No such file or directory\n"),
        ("x.jsonl", "dsjax: nowhere: no such folder\n"),
    ):
        with pytest.raises(SystemExit):
            main(command("nowhere", path, tmp_path / where))
        assert capsys.readouterr().err == message
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_no_prompts(prompts):
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(prompts([]), replace(DEFAULT, max_tokens=1))
