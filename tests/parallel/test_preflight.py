"""What hosts that are not alike are told before the first step; by real processes, and by what each would say."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from rich.console import Console

from dsjax.config import MeshConfig
from dsjax.parallel import preflight
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.preflight import Space, _odd_ones, _warnings, all_to_all
from dsjax.settings import to_toml

NO_SPACE = Space()


@pytest.fixture
def shown(run, tmp_path, capsys):
    """Run the checks in this process, and return what they show."""

    def shown(space=NO_SPACE, **options):
        config = replace(run, run=str(tmp_path / "a" / "b"), mesh=MeshConfig(data=2, local=4))
        preflight.preflight(config, space, Console(soft_wrap=True), **options)
        assert list(tmp_path.iterdir()) == [], "nothing is left"
        return capsys.readouterr().out

    return shown


def test_alone(shown):
    out = shown()
    assert "preflight 1 host, 1 process of 8 cpu" in out and "all-to-all per device: data " in out
    assert "warning" not in out


def test_room_for_checkpoints(shown):
    assert "checkpoint.keep = 2 checkpoints and the one that is written beside them need 1e+06 TB more" in shown(
        Space(0, 10**18)
    )
    with pytest.raises(ValueError, match=r"a checkpoint has 1e\+06 TB and .* are free; make room, or name a folder on"):
        shown(Space(10**18, 10**18))


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    config = replace(run, run=str(tmp_path / "file" / "run"))
    with pytest.raises(ValueError, match=rf"^run = '{config.run}': cannot write in {tmp_path}/file: Not a directory$"):
        preflight.preflight(config, Space(), Console(quiet=True))


@pytest.mark.parametrize("axis", ["pipe", "data", "node", "local"])
def test_all_to_all_notices_what_was_not_sent(axis, monkeypatch):
    mesh = make_mesh(MeshConfig(**{"data": 2, "local": 4} if axis == "local" else {axis: 4, "local": 2}))
    right, rate = all_to_all(mesh, axis)
    assert right and rate > 0
    send = jax.lax.all_to_all
    monkeypatch.setattr(jax.lax, "all_to_all", lambda x, *args, **kwargs: send(x, *args, **kwargs).at[0, 1, 7].add(1))
    assert not all_to_all(mesh, axis)[0]


def test_odd_ones_are_named():
    hosts = ["a", "b", "c", "d"]
    values = [{"jax": "1", "seed": "0"}, {"jax": "1", "seed": "2"}, {"jax": "0", "seed": "0"}, {"jax": "0"}]
    assert list(_odd_ones(values, hosts)) == [
        "jax: 0 in processes 2 (c), 3 (d), 1 in the others",
        "seed: 2 in process 1 (b), 0 in the others",
        "seed: none in process 3 (d), 0 in the others",
    ]
    assert list(_odd_ones([{"x": ""}, {"x": "-O"}], hosts)) == ["x: -O in process 1 (b), empty in process 0 (a)"]


def test_clocks(run):
    facts = [{"clock": 100.0, "free": 1}, {"clock": 104.0}, {"clock": 41.0}]
    assert list(_warnings(run, facts, ["a", "b", "c"], Space())) == [
        "the clock of process 2 (c) is 59 s behind that of process 0 (a)"
    ]


@pytest.fixture
def start_two(run, tmp_path):
    """Start two processes of a run, the second with options and an environment of its own."""

    def start_two(*options, devices=1, variables=None):
        (tmp_path / "run.toml").write_text(to_toml(replace(run, run=str(tmp_path / "run"), mesh=MeshConfig(local=2))))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        words = [sys.executable, "-m", "dsjax.train", str(tmp_path / "run.toml"), "--preflight"]
        words += ["--distributed.coordinator", address, "--distributed.processes", "2"]
        running = []
        for process, more in enumerate([(), options]):
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices if process else 1)}
            environment |= (variables or {}) if process else {}
            command = [*words, f"--distributed.process={process}", *map(str, more)]
            running.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
        ended = [process.communicate(timeout=200) for process in running]
        return [process.returncode for process in running], ended[0], ended[1]

    return start_two


HOST = socket.gethostname()


def test_processes_that_agree(start_two, tmp_path):
    """The folder may have another name in another place."""
    (tmp_path / "link").symlink_to(tmp_path)
    statuses, (out, _), (silent, _) = start_two("--run", tmp_path / "link" / "run")
    assert statuses == [0, 0]
    assert "preflight 1 host, 2 processes of 1 cpu" in out and "local " in out and "clocks within" in out
    assert [line for line in silent.splitlines() if "[Gloo]" not in line] == []


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (("--train.seed", 7), {}, "train.seed: 7 in process 1 (HOST), 0 in process 0 (HOST)"),
        ((), {"devices": 3}, "devices: 3 in process 1 (HOST), 1 in process 0 (HOST)"),
        (
            (),
            {"variables": {"XLA_FLAGS": "--xla_dump_to=/nowhere"}},
            "XLA_FLAGS: --xla_dump_to=/nowhere in process 1 (HOST), empty in process 0 (HOST)",
        ),
    ],
)
def test_processes_that_do_not(start_two, options, more, message):
    statuses, (out, err), (_, other) = start_two(*options, **more)
    assert (statuses, out) == ([2, 2], "")
    assert (err, other) == (f"dsjax: {message.replace('HOST', HOST)}\n", "")


def test_a_folder_that_is_not_shared(start_two, tmp_path):
    (tmp_path / "other").mkdir()
    statuses, (_, err), (_, other) = start_two("--run", tmp_path / "other" / "run")
    assert (statuses, other) == ([2, 2], "")
    assert err == (
        f"dsjax: run = '{tmp_path}/run': process 1 ({HOST}): {tmp_path}/other is not the folder that process 0 has: it "
        "must be on a file system that all share\n"
    )
