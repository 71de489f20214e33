"""How a process finds its place: from settings, from the environment, alone; and what it says when it cannot."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsjax.parallel import hosts
from dsjax.parallel.hosts import Distributed, Place, find_place
from dsjax.settings import load_run
from dsjax.train import Options

OURS = {"DSJAX_COORDINATOR": "node0:29400", "DSJAX_PROCESSES": "4", "DSJAX_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[001-016]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x16)",
}
PREFIX = f"process 1 ({socket.gethostname()}): "
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def place(monkeypatch):
    """Sets this process's place."""

    def place(*numbers):
        monkeypatch.setattr(hosts, "_joined", Place(*numbers))

    return place


@pytest.fixture
def initialize(monkeypatch):
    """What `start` asks of JAX, in place of joining."""
    asked = {}
    monkeypatch.setattr(hosts, "_joined", None)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.update(arguments))
    monkeypatch.setattr(hosts, "_await_coordinator", lambda place, *_: asked.update(awaited=place.coordinator))
    return asked


@pytest.mark.parametrize(
    ("settings", "environment", "place"),
    [
        ({}, {}, Place()),
        ({}, OURS, Place(3, 4, "node0:29400", "environment")),
        ({}, {**OURS, "DSJAX_PROCESSES": "1", "DSJAX_PROCESS": "0"}, Place(0, 1, "node0:29400", "environment")),
        ({}, SLURM, Place(5, 16, "", "slurm")),
        ({}, OURS | SLURM, Place(3, 4, "node0:29400", "environment")),
        ({}, {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
        ({}, {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}, Place()),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, Place()),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, Place(5, 8, "", "slurm")),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Place()),
        ({"processes": 1}, OURS | SLURM, Place()),
        ({"processes": 1, "process": 0}, OURS, Place()),
        ({"coordinator": "[::1]:80", "processes": 2, "process": 1}, OURS, Place(1, 2, "[::1]:80", "settings")),
        ({"timeout": 5}, OURS, Place(3, 4, "node0:29400", "environment")),
    ],
)
def test_place(settings, environment, place):
    assert find_place(Distributed(**settings), environment) == place


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("node0", 2, 0), "distributed.coordinator = 'node0': must be host:port of process 0, such as node0:29400"),
        (("node0:", 2, 0), "distributed.coordinator = 'node0:': must be host:port of process 0, such as node0:29400"),
        (("a:0", 2, 0), "distributed.coordinator = 'a:0': must be host:port of process 0, such as node0:29400"),
        (("http://a:1", 2, 0), "distributed.coordinator = 'http://a:1': must be host:port of process 0, such as"),
        (("a:65536", 2, 0), "distributed.coordinator = 'a:65536': must be host:port of process 0, such as node0:29400"),
        (("a:1", 0, -1), "distributed.processes is missing: it must be how many processes the run has"),
        (("", 0, 1), "distributed.processes is missing: it must be how many processes the run has"),
        (("a:1", 4, -1), "distributed.process is missing: it must be the number of this process, from 0 to 3"),
        (("", 2, 0), "distributed.coordinator is missing: it must be host:port of process 0, the same for all 2"),
        (("a:1", 2, 2), "distributed.process = 2: must be from 0 to 1, as distributed.processes = 2"),
        (("a:1", 2, -2), "distributed.process = -2: must be from 0 to 1, as distributed.processes = 2"),
        (("a:1", -1, 0), "distributed.processes = -1: must be at least 1"),
        (("", 0, -1, 0), "distributed.timeout = 0: must be at least 1"),
        (("", 0, -1, 9, 0), "distributed.heartbeat = 0: must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Distributed(*settings)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**OURS, "DSJAX_COORDINATOR": "x"},
            "DSJAX_COORDINATOR = 'x': must be host:port of process 0, such as",
        ),
        ({**OURS, "DSJAX_PROCESS": "4"}, "DSJAX_PROCESS = 4: must be from 0 to 3, as DSJAX_PROCESSES = 4"),
        ({**OURS, "DSJAX_PROCESS": "one"}, "DSJAX_PROCESS = 'one': must be an integer of at least 0"),
        ({"DSJAX_PROCESSES": "4"}, "DSJAX_PROCESS is missing: it must be the number of this process, from 0 to 3"),
        ({"DSJAX_PROCESSES": "0"}, "DSJAX_PROCESSES = 0: must be at least 1"),
        ({"DSJAX_PROCESS": "0"}, "DSJAX_PROCESSES is missing: it must be how many processes the run has"),
        (
            {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16"},
            "SLURM_NTASKS = 16, but srun has not started this process: put srun before the command, or run it alone "
            "with --distributed.processes 1",
        ),
    ],
)
def test_environments_that_contradict_themselves(environment, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        find_place(Distributed(), environment)


def test_options_of_train():
    words = ["tiny", "--distributed.coordinator", "a:1", "--distributed.processes=2", "--distributed.process", "1"]
    assert load_run(words, Options, "train")[1].distributed == Distributed("a:1", 2, 1)
    assert load_run(["tiny"], Options, "train")[1].distributed == Distributed()


def test_start_asks_jax(initialize, monkeypatch):
    hosts.start(Distributed("node0:29400", 2, 1, timeout=5, heartbeat=7))
    assert initialize == {
        "jax_cpu_collectives_implementation": "gloo",
        "jax_enable_preemption_service": False,
        "awaited": "node0:29400",
        "cluster_detection_method": "deactivate",
        "coordinator_address": "node0:29400",
        "num_processes": 2,
        "process_id": 1,
        "initialization_timeout": 65,
        "heartbeat_timeout_seconds": 7,
    }
    assert (hosts.processes(), hosts.is_first_process(), hosts.process_prefix()) == (2, False, PREFIX)
    initialize.clear()
    hosts.start(Distributed("elsewhere:1", 3, 2))
    assert initialize == {}


@pytest.mark.parametrize(
    ("tasks", "others", "devices"),
    [
        ("1(x16)", {}, []),
        ("1", {}, []),
        ("8(x2)", {}, [6]),
        ("1(x3),2", {}, [6]),
        ("8(x2)", {"SLURM_GPUS_PER_TASK": "1"}, []),
        ("8(x2)", {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}, []),
        ("8(x2)", {"SLURM_TRES_PER_TASK": "cpu=4"}, [6]),
    ],
)
def test_start_under_slurm(initialize, monkeypatch, tasks, others, devices):
    for name, value in {**SLURM, "SLURM_LOCALID": "6", "SLURM_STEP_TASKS_PER_NODE": tasks, **others}.items():
        monkeypatch.setenv(name, value)
    hosts.start()
    assert (initialize["cluster_detection_method"], initialize["local_device_ids"]) == ("slurm", devices)
    assert (initialize["num_processes"], initialize["process_id"]) == (16, 5)
    assert not initialize.keys() & {"coordinator_address", "awaited"}


def test_alone(initialize, monkeypatch):
    for name in [*OURS, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    hosts.start()
    assert initialize == {}
    assert (hosts.processes(), hosts.is_first_process(), hosts.process_prefix()) == (1, True, "")
    with pytest.raises(KeyError), hosts.errors_of_process():
        raise KeyError


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "Connection refused"), ("nowhere.invalid", ".*")])
def test_no_coordinator(monkeypatch, host, reason):
    monkeypatch.setattr(hosts, "_joined", None)
    with socket.socket() as taken:  # bound, not listening: nobody else will
        taken.bind(("127.0.0.1", 0))
        address = f"{host}:{taken.getsockname()[1]}"
        message = (
            rf"process 1 had no answer from process 0 at {address} for 1 s \({reason}\): start it there, or correct the"
        )
        with pytest.raises(TimeoutError, match=f"^{message} address$"):
            hosts._await_coordinator(Place(1, 2, address), 0, 1)


def test_a_port_in_use(monkeypatch):
    monkeypatch.setattr(hosts, "_joined", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError) as error:
            hosts._require_free_port(address)
    assert str(error.value) == f"process 0 cannot listen at {address}: Address already in use; choose another port"
    hosts._require_free_port(address)


def test_console(place, capfd):
    for numbers in [(), (0, 2), (1, 2)]:
        place(*numbers)
        hosts.console_of_process().print("process", *numbers)
    assert capfd.readouterr().out == "process\nprocess 0 2\n"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="devices of a CPU")
def test_simulated_devices():
    assert not hosts.simulate_devices(1)
    assert hosts.simulate_devices(8)
    with pytest.raises(ValueError) as error:
        hosts.simulate_devices(9)
    assert str(error.value) == (
        "mesh: each process needs 9 devices and has 8: start Python with JAX_NUM_CPU_DEVICES=9, which simulates them "
        "on the CPU"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Unable to initialize backend 'cuda': no GPU\nand more"),
            "Unable to initialize backend 'cuda': no",
        ),
        (AssertionError(), "JAX has no such devices here"),
    ],
)
def test_a_platform_that_is_not_there(monkeypatch, error, message):
    def fail():
        raise error

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(ValueError, match=rf"^JAX_PLATFORMS = .*: {message}"):
        hosts.simulate_devices(1)


def test_what_the_loss_of_another_process_does_is_no_refusal(monkeypatch):
    monkeypatch.setattr(hosts, "_SECONDS_TO_BE_ENDED", 0)
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert hosts._status(lost) == 1
    assert hosts._message(lost).startswith("another process is lost, or does not answer: UNKNOWN: Gloo AllGather")
    assert hosts._status(ValueError("run = 'x': no")) == 2 and hosts._message(ValueError("a\n b")) == "a: b"
    assert hosts._status(SystemExit("dsjax: saved")) == 1 and hosts._message(SystemExit("dsjax: saved")) == "saved"
    assert hosts._status(SystemExit(None)) == 0 and hosts._message(SystemExit(3)) == ""


def test_scripts_agree_with_what_is_read():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (hosts_of_run,) = job["spec"]["replicatedJobs"]
    work = hosts_of_run["template"]["spec"]
    (container,) = work["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value", "1") for each in container["env"]}
    name = job["metadata"]["name"]
    assert find_place(Distributed(), environment) == Place(
        1, work["completions"], f"{name}-{hosts_of_run['name']}-0-0.{name}:29400", "environment"
    )
    assert work["completions"] == work["parallelism"]
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=True)


@pytest.mark.slow
def test_waiting_in_vain():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"tiny --distributed.coordinator 127.0.0.1:{port} --distributed.processes 2 --distributed.timeout 1"

    def run(process):
        command = [sys.executable, "-m", "dsjax.train", *words.split(), f"--distributed.process={process}"]
        return subprocess.run(command, capture_output=True, text=True)

    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        late = run(1)
        assert (late.returncode, late.stdout) == (2, "")
        assert late.stderr == (
            f"dsjax: process 1 had no answer from process 0 at 127.0.0.1:{port} for 1 s (Connection refused): start it "
            "there, or correct the address\n"
        )
    alone = run(0)
    assert (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr == (
        f"dsjax: process 0: after 1 s not all 2 processes were at 127.0.0.1:{port}: start processes 0 to 1, or raise "
        "distributed.timeout\n"
    )
