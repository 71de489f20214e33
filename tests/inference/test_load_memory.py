"""What a process holds of weights: its part, and little beside it; of several processes, each reads its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsjax.benchmarks.conversion import v3_cut, write_synthetic
from dsjax.checkpoint.huggingface import save_huggingface
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.layout import Layout
from dsjax.inference.load import load_model
from dsjax.model.layout import unstack

WATCHED = """
import sys, threading
import jax, numpy as np
from dsjax.benchmarks.conversion import anonymous_memory
from dsjax.inference.layout import Layout
from dsjax.inference.load import load_model

path, precision = sys.argv[1:]
jax.block_until_ready(jax.device_put(np.zeros(8)))
idle, most, done = anonymous_memory("self"), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, anonymous_memory("self"))
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = load_model(path, precision=precision, layout=Layout(data=4))
done.set(); watcher.join()
# CPU devices that hold the same share its memory.
parts = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in jax.tree.leaves((model.params, model.biases))
         for s in a.addressable_shards}
print(sum(parts.values()), most - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_memory_beside_the_weights_is_bounded(tmp_path, precision):
    config = v3_cut(experts=8, vocab_size=49152, width=1024)
    write_synthetic(tmp_path / "model", config, shard_bytes=50_000_000)
    Tokenizer.train(["text"], 256 + 10).save(tmp_path / "model" / "tokenizer.json")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "model"), precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    own, held = map(int, done.stdout.split())
    assert own > 200_000_000
    # The embedding alone has 100 MB.
    assert held - own < 40_000_000


PROCESS = """
import json, os, sys
from dsjax.parallel.hosts import errors_of_process, start

start()
with errors_of_process():
    import jax, numpy as np
    from dsjax.checkpoint import files
    from dsjax.inference.layout import Layout
    from dsjax.inference.load import load_model

    read, preadv = [], os.preadv
    def counted(*given):
        read.append(preadv(*given))
        return read[-1]
    files.os.preadv = counted
    model = load_model(sys.argv[1], layout=Layout(node=2, data=2), precision="fp32")
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    sums = {jax.tree_util.keystr(path): [float(np.abs(s.data).astype(np.float64).sum()) for s in a.addressable_shards]
            for path, a in leaves}
    with open(f"found{jax.process_index()}.json", "w") as file:
        json.dump([sum(read), sums], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["run", "released"])
def test_each_of_two_processes_reads_its_own(run, small, random_parameters, tokenizer, tmp_path, form):
    path, layout = run, Layout(node=2, data=2)
    if form == "released":
        path, (params, biases) = tmp_path / "released", random_parameters(small)
        save_huggingface(path, small, unstack(params, small), unstack(biases, small), "fp32")
        tokenizer.save(path / "tokenizer.json")
    (tmp_path / "apart.py").write_text(PROCESS)
    command = [sys.executable, "-m", "dsjax.launch", "--processes", "2", "--devices-per-process", "2"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [*command, "--module", "apart", str(path)],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found{i}.json").read_text()) for i in range(2)]
    expected = load_model(path, layout=layout, precision="fp32")
    of_experts, others = 0, 0
    for at, array in jax.tree_util.tree_leaves_with_path(expected.params):
        name = jax.tree_util.keystr(at)
        sums = [float(abs(shard.data).sum()) for shard in array.addressable_shards]
        assert found[0][1][name] + found[1][1][name] == pytest.approx(sums, rel=1e-5), name
        if "experts" in name:
            of_experts += array.nbytes
        else:
            others += array.nbytes
    if form == "released":
        others += sum(array.nbytes for array in jax.tree.leaves(expected.biases))
        assert [read for read, _ in found] == [of_experts // 2 + others] * 2
