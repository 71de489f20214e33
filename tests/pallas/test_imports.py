"""Kernels are imported when they are called."""

import subprocess
import sys


def test_nothing_but_kernels_imports_mosaic():
    code = (
        "import sys, dsjax.training.loop, dsjax.convert, dsjax.checkpoint.conversion; "
        "print([name for name in ('jax.experimental.pallas.mosaic_gpu', 'dsjax.pallas.hopper') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
