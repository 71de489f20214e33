"""The bytes between nodes that the report's routing asks for, counted in the compiled program."""

import json
import subprocess
import sys


def test_bytes_between_nodes():
    """At most 8.6 times a device's tokens at EP 64, metadata included, and half of what one flat all-to-all sends."""
    command = [sys.executable, "-m", "dsjax.benchmarks.dispatch_bytes"]
    counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert counted["unit_bytes"] == 4096 * 7168 * 2
    # Two ways for rows of 8 x 2464 slots, of which 7 of 8 leave the node.
    assert 2 * 7 * 2464 / 4096 < counted["two_hops"]["between_nodes_units"] <= 8.6
    assert counted["flat_over_two_hops"] >= 2
