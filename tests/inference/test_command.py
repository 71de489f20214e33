"""`python -m dsjax.generate`: what is printed where, and what is said when something is wrong."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import AS_TESTS

from dsjax.generate import main


@pytest.fixture
def generated(run, capsys):
    """Runs the command and returns what it writes to stdout and stderr."""

    def call(*argv):
        main([str(run), *argv])
        return capsys.readouterr()

    return call


def test_as_a_program(run):
    command = [sys.executable, "-m", "dsjax.generate", str(run), "--prompt", "def ", "--max-tokens", "12"]
    environment = os.environ | AS_TESTS | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=Path(__file__).parents[2], timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    assert re.search(r"dsjax: step 2 of .*\ndsjax: \d+ tokens in [\d.]+ s, \d+ tokens/s", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_seeds_and_settings(generated):
    def text(*argv):
        return generated("--prompt", "def ", "--max-tokens=20", *argv).out

    assert text() == text("--seed", "0", "--temperature", "0.8", "--top-p", "0.95") != text("--seed", "1")
    assert text("--temperature", "0") == text("--top-k", "1", "--seed", "3") == text("--top-p", "1e-6", "--seed", "4")
    assert text("--ema") != text()


def test_speculation_changes_the_speed_alone(generated):
    plain, found = (generated("--prompt", "def ", "--max-tokens=20", *argv) for argv in ((), ("--speculate", "2")))
    assert found.out == plain.out
    assert re.search(r"20 tokens in .* tokens/s, \d+% of \d+ drafts accepted", found.err), found.err
    assert "drafts" not in plain.err


@pytest.mark.slow
def test_a_unit_of_devices_writes_the_same(generated, tmp_path):
    asked = ("--prompt", "def ", "--max-tokens=12", "--precision", "fp32")
    alone = generated(*asked)
    assert generated(*asked, "--deployment", "tiny_decode").out == alone.out
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f'{{"prompt": "def {name}"}}\n' for name in "abc"))
    found = generated("--prompts", str(prompts), "--output", str(output), "--deployment", "tiny_prefill")
    assert found.err.count("3 answers, 0 errors") == 1 and len(output.read_text().splitlines()) == 3


def test_a_deployment_that_is_none(generated, capsys):
    for name, message in (
        ("nowhere", "nowhere: no such file, and no packaged deployment (tiny_decode, tiny_prefill, v3_decode_144"),
        ("v3_decode_144", "144 devices"),
    ):
        with pytest.raises(SystemExit):
            generated("--deployment", name)
        assert message in capsys.readouterr().err


def test_an_empty_prompt_begins_a_document(generated):
    assert generated("--max-tokens", "5").out.endswith("\n")


def test_the_context_ends_the_text(generated):
    found = generated("--prompt", "x = 1", "--temperature", "3", "--max-tokens", "1000", "--seed", "2").err
    assert "stopped by the context of 64 tokens" in found or int(re.search(r"(\d+) tokens", found)[1]) < 62


def test_a_longer_context_is_possible(generated):
    words = "a b c " * 15
    assert generated("--prompt", words, "--max-context", "80", "--max-tokens", "3").out.startswith(words)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a b " * 40], r"the prompt has \d+ tokens: must be below the 64 of the context"),
        (["--temperature", "-1"], "temperature = -1.0: must be at least 0"),
        (["--top-p", "0"], "top_p = 0.0: must be greater than 0 and at most 1"),
        (["--top-k", "-2"], "top_k = -2: must be at least 0"),
        (["--seed", "-1"], "seed = -1: must be at least 0"),
        (["--max-tokens", "0"], "max_tokens = 0: must be at least 1"),
        (["--speculate", "-1"], "speculate = -1: must be at least 0"),
        (["--max-tokens", "many"], "max_tokens = 'many': must be an integer"),
        (["--topp", "0.5"], "unknown option --topp; did you mean --top-p"),
        (["more"], "unexpected argument 'more'"),
        (["--prompt", "\udcff"], "prompt"),
    ],
)
def test_errors(run, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        main([str(run), *argv])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert re.search(message, error)
    assert len(error.splitlines()) <= 2  # the model that was loaded, and the error


def test_no_run_is_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "argument PATH is missing" in capsys.readouterr().err


def test_no_such_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere"), "--prompt", "x"])
    assert capsys.readouterr().err == f"dsjax: {tmp_path / 'nowhere'}: no such folder\n"
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_checkpoint(run, tmp_path, capsys):
    folder = tmp_path / "young"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert capsys.readouterr().err == f"dsjax: {folder}: the run has no checkpoint yet\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert all(option in page for option in ("--prompt", "--max-tokens", "--temperature", "--top-p", "--seed", "--ema"))
