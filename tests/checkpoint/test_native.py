"""Training checkpoints: what goes in comes out, damage is seen and named, and a kill loses nothing."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoint.native import (
    Checkpoints,
    DamagedCheckpoint,
    NoUsableCheckpoint,
    differing_fields,
    found_in,
    last_saved,
)

# Orbax leaves reads unawaited when another read of the same restore fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {
        "params": {
            "embed": jnp.asarray(random.standard_normal((256, 300)), jnp.float32),
            "layers": {"0": {"norm": jnp.full(16, seed, jnp.bfloat16)}},
        },
        "biases": {"bias": jnp.asarray(random.standard_normal(8), jnp.float32)},
        "codes": jnp.asarray(random.standard_normal((5, 6)), jnp.float8_e4m3fn),
        "ema": {"embed": random.standard_normal((32, 30)).astype(np.float32)},
        "moment": random.standard_normal(12).astype(ml_dtypes.bfloat16),
        "mask": jnp.asarray([True, False, seed % 2 == 0]),
        "key": jnp.asarray([seed, 7], jnp.uint32),
        "step": jnp.int32(seed),
    }


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 10 and 20."""
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, _state(step), {"config": {"model": {"hidden_size": step}}, "fingerprint": "abc"})
    return tmp_path / "checkpoints"


def test_state_and_metadata_come_back_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        step, state, metadata = checkpoints.restore(_state(0))
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.read_metadata(10)["config"] == {"model": {"hidden_size": 10}}
        assert checkpoints.arrays(10)["params/embed"] == jax.ShapeDtypeStruct((256, 300), jnp.float32)
        _assert_equal(checkpoints.restore(_state(0), step=10)[1], _state(10))
    assert step == 20
    assert metadata == {"config": {"model": {"hidden_size": 20}}, "fingerprint": "abc"}
    _assert_equal(state, _state(20))


def test_versions_and_checksums_are_written(saved):
    outer = json.loads(next((saved / "20" / "metadata").glob("metadata")).read_text())
    contents = json.loads(outer["contents"])
    assert set(contents["versions"]) == {"dsjax", "jax", "orbax-checkpoint"}
    shape, dtype, checksum = contents["arrays"]["moment"]
    assert (shape, dtype, len(checksum)) == ([12], "bfloat16", 8)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": jnp.full(4, step)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_arrays_may_be_donated_or_changed_after_save(tmp_path):
    state = {"device": jnp.arange(1 << 20), "host": np.arange(1 << 20)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state["host"][:] = -1
        jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["device"]))
        expected = {"device": jnp.arange(1 << 20), "host": np.arange(1 << 20)}
        checkpoints.wait()
        _assert_equal(checkpoints.restore(expected)[1], expected)


@pytest.mark.parametrize("step", [20, 15])
def test_a_step_that_is_not_newer_is_refused(saved, step):
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=f"cannot save step {step} .*step 20 is"):
        checkpoints.save(step, _state(0), {})


def test_an_empty_array_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="without elements: a/b"):
        checkpoints.save(1, {"a": {"b": np.zeros((0, 3))}}, {})


def test_an_empty_folder_and_an_unknown_step(saved, tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none"):
            checkpoints.restore(_state(0))
    with Checkpoints(saved) as checkpoints, pytest.raises(FileNotFoundError, match=r"of step 11.*\[10, 20\]"):
        checkpoints.restore(_state(0), step=11)


def _biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _truncate(step: Path) -> None:
    data = _biggest(step)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def _flip(step: Path) -> None:
    data = _biggest(step)
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 0x10
    data.write_bytes(contents)


def _flip_metadata(step: Path) -> None:
    file = step / "metadata" / "metadata"
    file.write_text(file.read_text().replace("hidden_size", "hidden_sise"))


def _garbage(name: str):
    def damage(step: Path) -> None:
        (step / name).write_bytes(b"\x00garbage" * 9)

    return damage


DAMAGE = {
    "truncated data": (_truncate, "state: "),
    "deleted data": (lambda step: _biggest(step).unlink(), "state: "),
    "deleted state": (lambda step: shutil.rmtree(step / "state"), "state: "),
    "flipped bit": (_flip, "checksum does not match: params/embed"),
    "garbage manifest": (_garbage("state/manifest.ocdbt"), "state: "),
    "garbage array index": (_garbage("state/_METADATA"), "state: "),
    "garbage metadata": (_garbage("metadata/metadata"), "metadata: "),
    "flipped metadata": (_flip_metadata, "metadata: checksum does not match"),
    "deleted metadata": (lambda step: shutil.rmtree(step / "metadata"), "metadata: "),
    "nothing left": (lambda step: [shutil.rmtree(step), step.mkdir()], "metadata: "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(saved, kind, caplog):
    damage, reason = DAMAGE[kind]
    damage(saved / "20")
    caplog.set_level(logging.WARNING, logger="dsjax.checkpoint")
    with Checkpoints(saved, keep=3) as checkpoints:
        step, state, metadata = checkpoints.restore(_state(0))
        assert (step, metadata["config"]) == (10, {"model": {"hidden_size": 10}})
        _assert_equal(state, _state(10))
        assert f"checkpoint {saved / '20'} is damaged and not used: {reason}" in caplog.text
        assert checkpoints.steps() == [10]

        checkpoints.save(20, _state(21), {})
        checkpoints.wait()
        assert f"damaged checkpoint {saved / '20'} moved to damaged-20-" in caplog.text
        _assert_equal(checkpoints.restore(_state(0))[1], _state(21))
        checkpoints.save(30, _state(30), {})
    assert sum(path.name.startswith("damaged-20-") for path in saved.iterdir()) == 1
    with Checkpoints(saved) as again:
        assert again.steps() == [10, 20, 30]


def test_if_all_are_damaged_the_error_lists_every_one(saved):
    _flip(saved / "20")
    _truncate(saved / "10")
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(NoUsableCheckpoint) as error:
            checkpoints.restore(_state(0))
        assert f"{saved / '20'}: checksum does not match: params/embed" in str(error.value)
        assert f"{saved / '10'}: state: " in str(error.value)


def test_a_damaged_step_asked_for_by_number_is_not_replaced(saved):
    _flip_metadata(saved / "20")
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="metadata: checksum"):
            checkpoints.read_metadata(20)
        with pytest.raises(NoUsableCheckpoint, match="metadata: checksum"):
            checkpoints.restore(_state(0), step=20)


MISFITS = {
    "shape": (lambda s: s["params"].update(embed=jnp.zeros((256, 301))), r"params/embed is float32\[256, 300\] in the"),
    "dtype": (lambda s: s.update(step=jnp.float32(0)), r"step is int32\[\] in the checkpoint, float32\[\] is wanted"),
    "new": (lambda s: s["biases"].update(extra=jnp.zeros(3)), "biases/extra is not in the checkpoint"),
    "gone": (lambda s: s.pop("codes"), "codes is in the checkpoint but not wanted"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_that_does_not_fit_is_not_damage(saved, kind, caplog):
    change, message = MISFITS[kind]
    wanted = _state(0)
    change(wanted)
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(wanted)
    assert not caplog.records


def test_a_part_can_be_read_alone(saved):
    with Checkpoints(saved) as checkpoints:
        wanted = {"params": _state(0)["params"]}
        _, state, _ = checkpoints.restore(wanted, partial=True)
        _assert_equal(state, {"params": _state(20)["params"]})
        with pytest.raises(ValueError, match="params/more is not in the checkpoint"):
            checkpoints.restore({"params": {"more": jnp.zeros(2)}}, partial=True)


def test_differing_fields_are_named():
    saved = {"train": {"batch_size": 8, "mtp_weights": [0.3, 0.1]}, "run": "a", "old": 1}
    now = {"train": {"batch_size": 16, "mtp_weights": (0.3, 0.1)}, "run": "a", "new": None}
    assert differing_fields(saved, now) == [
        "train.batch_size: 8 in the checkpoint, 16 now",
        "old: 1 in the checkpoint, absent now",
        "new: absent in the checkpoint, None now",
    ]
    assert differing_fields(saved, saved) == []


RESHARD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dsjax.checkpoint.native import Checkpoints
folder, action, count, rows, columns = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
assert jax.device_count() == count
mesh = jax.make_mesh((rows, columns), ("r", "c"), axis_types=(AxisType.Auto,) * 2)
place = lambda x: NamedSharding(mesh, P("r", "c") if x.ndim == 2 else P("c") if x.ndim else P())
value = {"w": np.arange(64 * 48, dtype=np.float32).reshape(64, 48), "f": np.arange(16).astype(jnp.float8_e4m3fn)}
value["s"] = np.asarray(np.int32(5))
with Checkpoints(folder) as checkpoints:
    if action == "save":
        checkpoints.save(1, jax.tree.map(lambda x: jax.device_put(x, place(x)), value), {})
    else:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), value)
        step, state, _ = checkpoints.restore(abstract)
        for name, array in state.items():
            assert array.sharding == place(value[name]), array.sharding
            assert np.asarray(array).tobytes() == value[name].tobytes(), name
"""


def _run(code: str, *arguments: object, devices: int = 1, **options) -> subprocess.Popen:
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | environment, **options)


def test_any_mesh_restores_what_another_saved(tmp_path):
    assert _run(RESHARD, tmp_path, "save", 8, 4, 2, devices=8).wait() == 0
    readers = [_run(RESHARD, tmp_path, "restore", n, *mesh, devices=n) for n, mesh in ((4, (1, 4)), (1, (1, 1)))]
    assert [reader.wait() for reader in readers] == [0, 0]


KILLED = """
import sys
import numpy as np
from dsjax.checkpoint.native import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, {"x": np.random.default_rng(step).standard_normal((3000, 2000))}, {"step": step})
    if step == 2:
        checkpoints.wait()
        print("saving", flush=True)
checkpoints.wait()
"""


def test_sigkill_during_a_save_leaves_the_one_before(tmp_path):
    process = _run(KILLED, tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    while not any("tmp" in path.name for path in tmp_path.iterdir()):
        assert process.poll() is None, "the save was over before it was seen"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "3").exists()
    with Checkpoints(tmp_path) as reader:
        assert reader.steps() == [1, 2]
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "a reader must not touch a save in progress"
    with Checkpoints(tmp_path) as checkpoints:
        step, state, metadata = checkpoints.restore({"x": np.empty((3000, 2000))})
        assert (step, metadata) == (2, {"step": 2})
        assert (state["x"] == np.random.default_rng(2).standard_normal((3000, 2000))).all()
        checkpoints.save(3, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


FAILING = """
import os, resource, sys, time
import numpy as np
from dsjax.checkpoint.native import Checkpoints, SaveFailed
folder, how = sys.argv[1:]
checkpoints = Checkpoints(folder)
state = {"x": np.random.default_rng(0).standard_normal((300, 2000))}
checkpoints.save(1, state, {})
checkpoints.wait()
checkpoints.check()
match how:
    case "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    case "full":
        with open(f"{folder}/filling", "wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
    case "gone":
        os.rename(folder, f"{folder}-away")
        open(folder, "w").close()
try:
    checkpoints.save(2, state, {})
    while True:
        time.sleep(0.01)
        checkpoints.check()
except SaveFailed as error:
    print(error, flush=True)
os._exit(7)
"""


def _failing(folder, how):
    process = _run(FAILING, folder, how, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out, _ = process.communicate(timeout=100)
    return process.returncode, out


@pytest.mark.parametrize(
    ("how", "why"),
    [("limited", "File too large; saved last: step 1"), ("gone", "Not a directory; saved last: unknown")],
)
def test_a_save_that_fails_is_noticed_without_waiting_for_the_next(tmp_path, how, why):
    status, out = _failing(tmp_path / "checkpoints", how)
    assert status == 7 and out.startswith(f"cannot save in {tmp_path}/checkpoints: {why}")
    if how == "limited":
        assert found_in(tmp_path / "checkpoints")[0] == [1]
        assert last_saved(tmp_path / "checkpoints") == "step 1" and last_saved(tmp_path / "none") == "none"


def test_a_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "dsjax", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        status, out = _failing(tmp_path / "checkpoints", "full")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (status, out) == (
        7,
        f"cannot save in {tmp_path}/checkpoints: No space left on device; saved last: step 1\n",
    )
