"""What stands for a model and the form of its pages: the same only if both are, however a unit divides the model."""

import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from dsjax.checkpoint.checksum import checksums, checksums_of_parts
from dsjax.inference.load import Model
from dsjax.inference.weights import moe_layers


def fingerprint(model: Model, page_size: int, cache_format: str) -> str:
    """Return a digest of a model's settings and weights, and of the format of its pages.

    Each expert counts once, wherever its slots are, and a shared expert alike whether or not it is one of the routed:
    so a unit that reads prompts and one that writes answers have the same, and can pass pages on.
    """
    sums = sorted(_sums(model))
    described = repr((model.config, np.dtype(model.runtime.compute_dtype).name, page_size, cache_format, sums))
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()


def _sums(model: Model) -> Iterator[tuple[str, list[int]]]:
    """Yield names and checksums of all weights, of experts for each layer and expert."""
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.biases)):
        names, name = [getattr(key, "key", "") for key in path], jax.tree_util.keystr(path)
        if "experts" in names:
            sums = checksums_of_parts(leaf, axes=2)
            if model.placement is not None:
                layers = moe_layers(model.config)
                of_expert = model.placement.slots_of_expert[:, :, 0]
                of_expert = of_expert[layers:] if "mtp" in names else of_expert[:layers]
                sums = np.take_along_axis(sums, of_expert, axis=1)
            routed = model.config.n_routed_experts
            yield name, sums[:, :routed].ravel().tolist()
            if sums.shape[1] > routed:
                yield name.replace("'experts'", "'shared'"), sums[:, routed].tolist()
        elif "shared" in names:
            yield name, checksums_of_parts(leaf, axes=1).tolist()
        elif "tables" not in names:  # which say where experts are
            yield name, list(checksums({name: leaf}).values())
