"""Flags of XLA and NCCL: known to the installed XLA, and the user's own win."""

import os
import subprocess
import sys
from dataclasses import replace

from dsjax.parallel.xla_flags import compiler_options, likely_platform, recommended, set_flags


def test_the_environment_wins(run):
    given = {"XLA_FLAGS": "--xla_gpu_nccl_terminate_on_error=false --xla_dump_to=x", "NCCL_DEBUG": "INFO"}
    environment = dict(given)
    limit = "--xla_gpu_memory_limit_slop_factor=1000"
    assert set_flags(run, environment, "gpu") == [limit, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.96"]
    given["XLA_FLAGS"] = f"{limit} {given['XLA_FLAGS']}"
    assert environment == given | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.96"}


def test_flags_are_added_to_those_of_the_user(run):
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    shown = set_flags(run, environment, "gpu")
    assert shown[0] == "--xla_gpu_nccl_terminate_on_error=true"
    ours = "--xla_gpu_nccl_terminate_on_error=true --xla_gpu_memory_limit_slop_factor=1000"
    assert environment["XLA_FLAGS"] == f"{ours} --xla_dump_to=x"
    assert {name: environment[name] for name in ("NCCL_DEBUG",)} == {"NCCL_DEBUG": "WARN"}
    assert set_flags(run, environment, "gpu") == [], "a second time there is nothing to add"


def test_a_setting_leaves_them_away(run):
    assert recommended(replace(run, xla_flags=False), "gpu") == recommended(run, "cpu") == ()
    assert likely_platform({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert likely_platform({"JAX_PLATFORMS": "cpu"}) == "cpu"


def test_a_compilation_takes_them_as_values(run):
    run = replace(run, kernels=replace(run.kernels, communication_sms=20))
    assert compiler_options(run, "gpu") == {
        "xla_gpu_nccl_terminate_on_error": True,
        "xla_gpu_memory_limit_slop_factor": 1000,
        "xla_gpu_nccl_collective_max_nchannels": 20,
        "xla_gpu_nccl_p2p_max_nchannels": 20,
    }


def test_xla_knows_them(run):
    """It ends a process over a flag that it does not know; those of GPUs it knows on a CPU too."""

    def status(flags):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    environment = {}
    set_flags(run, environment, "gpu")
    assert status(environment["XLA_FLAGS"]) == 0
    assert status("--xla_gpu_no_such_flag=true") != 0
