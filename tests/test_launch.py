"""Processes of one machine: how they are started, and that all end when one does or when they are asked to."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from dsjax.launch import _own_words, main
from dsjax.parallel.local_cluster import Options, _divide, _visible_gpus

CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path

me, what = os.environ["DSJAX_PROCESS"], sys.argv[1]
def note(name, text=""):
    Path(f"{name}.new{me}").write_text(str(text))
    os.replace(f"{name}.new{me}", name)
def sleep():
    note(f"pid{me}", os.getpid())
    time.sleep(60)

match what:
    case "say":
        print(f"out {me} of {os.environ['DSJAX_PROCESSES']}: {os.environ.get('JAX_NUM_CPU_DEVICES')}")
        print("err", me, file=sys.stderr)
    case "fail":
        if me == "1":
            while not os.path.exists("pid0") or not os.path.exists("grandchild"): time.sleep(0.01)
            sys.exit(7)
        if me == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if me == "2":
            note("grandchild", subprocess.Popen(["sleep", "60"]).pid)
        sleep()
    case "fail once":
        note(f"address{me}{len(list(Path().glob(f'address{me}*')))}", os.environ["DSJAX_COORDINATOR"])
        if me == "1" and not os.path.exists("address11"): os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.exists("address11"): time.sleep(0.01)
    case "refuse":
        sys.exit(2)
    case "die" if os.environ["DSJAX_PROCESSES"] == "1":
        print(f"1: {sys.argv[1:]}")
    case "die":
        if me == "1": os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    case "save":
        def save(number, _):
            note(f"got{me}", signal.Signals(number).name)
            sys.exit(0)
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, save)
        sleep()
    case "deaf":
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
        sleep()
"""

TOGETHER = """
import sys
from dsjax.parallel.hosts import console_of_process, errors_of_process, simulate_devices, start

start()
with errors_of_process():
    assert simulate_devices(2)
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    x = jax.make_array_from_callback((count,), sharding, lambda index: jnp.arange(1.0, count + 1)[index])
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P()))(x)
    console_of_process().print("shown by process", jax.process_index())
    place, here = f"{jax.process_index()} of {jax.process_count()}", jax.local_device_count()
    print(f"process {place}: {here} of {count}: {total[0]:.0f}")
    sys.stdout.flush()
    if sys.argv[1:] == ["fail"]:
        import time
        from pathlib import Path

        if jax.process_index() == 0:
            Path("shown").touch()
            time.sleep(60)
        while not Path("shown").exists():
            time.sleep(0.01)
        raise ValueError("this one  is wrong")
    if sys.argv[1:] == ["all fail"]:
        raise ValueError("all are wrong")
    if sys.argv[1:] == ["lost"]:
        import os, signal

        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(x))
"""


@pytest.fixture
def launch(tmp_path):
    """Starts `dsjax.launch` in a folder of its own, with a module that it runs there."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "together.py").write_text(TOGETHER)

    @contextmanager
    def launch(*words):
        command = [sys.executable, "-m", "dsjax.launch", *map(str, words)]
        # Not the test run's own group, which a test that fails would leave processes in.
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return launch


@pytest.fixture
def run(launch):
    def run(*words):
        with launch(*words) as process:
            out, err = process.communicate(timeout=100)
            return process.returncode, out, err

    return run


def appears(file):
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"no {file.name}"
        time.sleep(0.02)
    return file.read_text()


def is_gone(pid):
    """Whether no process of that number is left, soon."""
    for _ in range(250):
        try:
            os.kill(int(pid), 0)
            with open(f"/proc/{pid}/stat") as stat:  # a zombie waits for whoever adopted it
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_output_and_environment(run):
    status, out, err = run("--processes", 3, "--devices-per-process=4", "--module", "child", "say")
    assert (status, out) == (0, "out 0 of 3: 4\n")
    assert sorted(err.splitlines()) == ["[1] err 1", "[1] out 1 of 3: 4", "[2] err 2", "[2] out 2 of 3: 4", "err 0"]


def test_a_failure_ends_the_others(run, tmp_path):
    status, out, err = run("--processes", 3, "--grace", 1, "--module", "child", "fail")
    assert (status, out, err) == (7, "", "dsjax: process 1 ended with exit status 7; ending the others\n")
    assert all(is_gone((tmp_path / name).read_text()) for name in ("pid0", "pid2", "grandchild"))


def test_restarts(run, tmp_path):
    status, out, err = run("--processes", 2, "--restarts", 2, "--module", "child", "fail once")
    assert (status, out) == (0, "")
    assert err.splitlines()[-2:] == [
        "dsjax: process 1 ended with signal SIGKILL; ending the others",
        "dsjax: starting all again, 1 of 2",
    ]
    assert (tmp_path / "address11").read_text() != (tmp_path / "address10").read_text()


def test_a_refusal_is_not_repeated(run, tmp_path):
    status, out, err = run("--processes", 2, "--restarts", 2, "--module", "child", "refuse")
    assert (status, out) == (2, "")
    assert "ended with exit status 2" in err and "starting" not in err


def test_fewer_processes_start_when_restarts_do_not_help(run):
    words = ("--restarts", 1, "--fallback-processes", 1, "--fallback=--of 'one host'", "--module", "child", "die")
    status, out, err = run("--processes", 2, *words)
    assert (status, out) == (0, "1: ['die', '--of', 'one host']\n")
    dead = "dsjax: process 1 ended with signal SIGKILL; ending the others"
    assert err.splitlines() == [
        dead,
        "dsjax: starting all again, 1 of 1",
        dead,
        "dsjax: starting 1 of 2 --of 'one host'",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_all(launch, tmp_path, number):
    with launch("--processes", 2, "--restarts", 1, "--module", "child", "save") as process:
        appears(tmp_path / "pid0"), appears(tmp_path / "pid1")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err == f"dsjax: passing {number.name} on to all processes; the next one ends them at once\n"
    assert [appears(tmp_path / f"got{each}") for each in (0, 1)] == [number.name] * 2


def test_the_second_signal_ends_all(launch, tmp_path):
    with launch("--processes", 2, "--restarts", 1, "--module", "child", "deaf") as process:
        pids = [appears(tmp_path / f"pid{each}") for each in (0, 1)]
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("dsjax: passing SIGINT on")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert "ended with signal SIGKILL" in err and "starting" not in err
    assert all(map(is_gone, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_killed_launcher_leaves_nobody(launch, tmp_path):
    with launch("--processes", 2, "--module", "child", "deaf") as process:
        pids = [appears(tmp_path / f"pid{each}") for each in (0, 1)]
        process.kill()
        assert all(map(is_gone, pids))


def test_a_sum_over_all_devices_and_an_error(run):
    status, out, err = run("--processes", 2, "--devices-per-process", 2, "--module", "together", "fail")
    assert status == 2
    shown = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert shown == ["shown by process 0", "process 0 of 2: 2 of 4: 10"]
    told = [line for line in err.splitlines() if "[Gloo]" not in line]
    assert told == [
        "[1] process 1 of 2: 2 of 4: 10",
        f"[1] dsjax: process 1 ({socket.gethostname()}): this one is wrong",
        "dsjax: process 1 ended with exit status 2; ending the others",
    ]


def told_by(err):
    return [line for line in err.splitlines() if "[Gloo]" not in line and "2 of 4: 10" not in line]


def test_what_all_processes_find_wrong_is_said_once(run):
    status, _, err = run(
        "--processes", 2, "--devices-per-process", 2, "--restarts", 1, "--module", "together", "all fail"
    )
    mistake, end = told_by(err)
    assert (status, mistake) == (2, "dsjax: all are wrong")
    assert "ended with exit status 2" in end  # of all, or of the first, if the others are slow to go


def test_a_lost_process_is_named_and_the_others_are_quiet(run):
    status, _, err = run("--processes", 2, "--devices-per-process", 2, "--module", "together", "lost")
    assert status == 128 + signal.SIGKILL
    assert told_by(err) == ["dsjax: process 1 ended with signal SIGKILL; ending the others"]


@pytest.mark.slow
def test_joining_and_parting(run):
    status, out, err = run("--processes", 3, "--module", "together", "--devices-per-process", 2)
    assert (status, "process 0 of 3: 2 of 6: 21" in out, "[2] process 2 of 3: 2 of 6: 21" in err) == (0, True, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny", "processes = 0: must be at least 1, before the run: --processes 2 configs/tiny.toml"),
        ("--processes 2 --grace -1 tiny", "grace = -1: must be at least 0"),
        (
            "--processes 2 --fallback=--mesh.data=1 tiny",
            "fallback = '--mesh.data=1': also needs --fallback-processes, how many start with it",
        ),
        (
            "--processes 2 --fallback-processes 1 --fallback=--mesh.date=1 tiny",
            "unknown option --mesh.date; did you mean --mesh.data?",
        ),
        ("--processes", "--processes has no value: it must be an integer"),
        ("--proceses 2 tiny", "unknown option --proceses; did you mean --processes?"),
        ("--processes 2", "no run is named: give a TOML file, such as configs/tiny.toml, or --help"),
        ("--processes 2 tiny --train.steps x", "train.steps = 'x': must be an integer"),
        (
            "--processes 2 tiny --distributed.processes 1",
            "--distributed.processes and its like are for dsjax.launch to say: leave them away",
        ),
        ("--processes 2 --module dsjax.serve x --slots 0", "slots = 0: must be at least 1"),
        ("--processes 2 --module dsjax.generate x --promt y", "unknown option --promt; did you mean --prompt?"),
        (
            "--processes 2 --module dsjax.generate x --distributed.processes 1",
            "--distributed.processes and its like are for dsjax.launch to say: leave them away",
        ),
    ],
)
def test_mistakes_are_told_once(words, message, capfd):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert (end.value.code, capfd.readouterr()) == (2, ("", f"dsjax: {message}\n"))


def test_words_of_launch_come_first():
    assert _own_words(["--processes", "2", "--grace=3", "tiny", "--fresh"]) == 3
    assert _own_words(["tiny", "--fresh"]) == 0
    assert _own_words(["--help"]) == 1


def test_gpus_are_divided():
    assert _visible_gpus({"CUDA_VISIBLE_DEVICES": "0, 3,GPU-5f"}) == ["0", "3", "GPU-5f"]
    assert _visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == _visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert _visible_gpus({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}) == []
    eight = list("01234567")
    assert _divide(eight, Options(processes=2)) == ["0,1,2,3", "4,5,6,7"]
    assert _divide(eight, Options(processes=3)) == ["0,1", "2,3", "4,5"]
    assert _divide(eight, Options(processes=2, devices_per_process=1)) == ["0", "1"]
    assert _divide([], Options(processes=2, devices_per_process=4)) == [None, None]
    with pytest.raises(ValueError) as error:
        _divide(eight, Options(processes=3, devices_per_process=4))
    assert str(error.value) == (
        "3 processes of 4 devices need 12 GPUs and 8 are visible: start fewer, or set JAX_PLATFORMS=cpu, which "
        "simulates devices on the CPU"
    )
    with pytest.raises(ValueError, match="2 processes of 1 devices need 2 GPUs and 1 are visible"):
        _divide(["0"], Options(processes=2))
