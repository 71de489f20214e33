"""One table: what a parameter is called here, at Hugging Face and in DeepSeek's demo.

A row is one rule. `*/moe/experts/gate_up[e,0]` says that the gate matrix of expert e is piece `[e, 0]` of our array:
a released tensor is always one contiguous piece of one of our arrays, so converting moves bytes and never reorders
them. `*` is a layer: a main one, or the block inside an MTP module, which Hugging Face counts on from the main layers.
Which rows a model has follows from which arrays it has (V2-Lite has `q` where V3 has `q_a` and `q_b`), so V2, V2-Lite
and V3 are one table, and both directions come from it. Nothing here needs more than the standard library.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Storage = Literal["fp8", "bf16", "fp32"]
"""A tensor's format in an FP8 release: 128x128 blocks with scales, BF16, or float32 always (the biases)."""
Cut = Literal["rows", "columns", "experts"] | None
"""How the demo divides a tensor among n files: equal shares of its rows or columns, whole experts, or not at all."""


@dataclass(frozen=True)
class Rule:
    """One row: the same tensor in three vocabularies; `.weight` is left out of names, which biases have not."""

    ours: str
    huggingface: str
    deepseek: str | None
    """None: the demo does without it (it has no MTP module)."""
    storage: Storage
    cut: Cut = None
    copy: bool = False
    """Whether it is a second copy, in the release, of a tensor that is held once here."""


TABLE = (
    Rule("embed", "model.embed_tokens", "embed", "bf16", "rows"),
    Rule("norm", "model.norm", "norm", "bf16"),
    Rule("head", "lm_head", "head", "bf16", "rows"),
    Rule("*/attention_norm", "*.input_layernorm", "*.attn_norm", "bf16"),
    Rule("*/attention/q", "*.self_attn.q_proj", "*.attn.wq", "fp8", "rows"),
    Rule("*/attention/q_a", "*.self_attn.q_a_proj", "*.attn.wq_a", "fp8"),
    Rule("*/attention/q_norm", "*.self_attn.q_a_layernorm", "*.attn.q_norm", "bf16"),
    Rule("*/attention/q_b", "*.self_attn.q_b_proj", "*.attn.wq_b", "fp8", "rows"),
    Rule("*/attention/kv_a", "*.self_attn.kv_a_proj_with_mqa", "*.attn.wkv_a", "fp8"),
    Rule("*/attention/kv_norm", "*.self_attn.kv_a_layernorm", "*.attn.kv_norm", "bf16"),
    Rule("*/attention/kv_b", "*.self_attn.kv_b_proj", "*.attn.wkv_b", "fp8", "rows"),
    Rule("*/attention/o", "*.self_attn.o_proj", "*.attn.wo", "fp8", "columns"),
    Rule("*/ffn_norm", "*.post_attention_layernorm", "*.ffn_norm", "bf16"),
    Rule("*/ffn/gate_up[0]", "*.mlp.gate_proj", "*.ffn.w1", "fp8", "rows"),
    Rule("*/ffn/gate_up[1]", "*.mlp.up_proj", "*.ffn.w3", "fp8", "rows"),
    Rule("*/ffn/down", "*.mlp.down_proj", "*.ffn.w2", "fp8", "columns"),
    Rule("*/moe/router", "*.mlp.gate", "*.ffn.gate", "bf16"),
    Rule("*/moe/bias", "*.mlp.gate.e_score_correction_bias", "*.ffn.gate.bias", "fp32"),
    Rule("*/moe/experts/gate_up[e,0]", "*.mlp.experts.{e}.gate_proj", "*.ffn.experts.{e}.w1", "fp8", "experts"),
    Rule("*/moe/experts/gate_up[e,1]", "*.mlp.experts.{e}.up_proj", "*.ffn.experts.{e}.w3", "fp8", "experts"),
    Rule("*/moe/experts/down[e]", "*.mlp.experts.{e}.down_proj", "*.ffn.experts.{e}.w2", "fp8", "experts"),
    Rule("*/moe/shared/gate_up[0]", "*.mlp.shared_experts.gate_proj", "*.ffn.shared_experts.w1", "fp8", "rows"),
    Rule("*/moe/shared/gate_up[1]", "*.mlp.shared_experts.up_proj", "*.ffn.shared_experts.w3", "fp8", "rows"),
    Rule("*/moe/shared/down", "*.mlp.shared_experts.down_proj", "*.ffn.shared_experts.w2", "fp8", "columns"),
    Rule("mtp/{k}/embed_norm", "model.layers.{mtp}.enorm", None, "bf16"),
    Rule("mtp/{k}/hidden_norm", "model.layers.{mtp}.hnorm", None, "bf16"),
    Rule("mtp/{k}/proj", "model.layers.{mtp}.eh_proj", None, "bf16"),
    Rule("mtp/{k}/norm", "model.layers.{mtp}.shared_head.norm", None, "bf16"),
    Rule("embed", "model.layers.{mtp}.embed_tokens", None, "bf16", copy=True),
    Rule("head", "model.layers.{mtp}.shared_head.head", None, "bf16", copy=True),
)
LAYER = ("layers/{layer}", "model.layers.{layer}", "layers.{layer}")
"""What `*` stands for in a main layer, in the three vocabularies."""
MODULE = ("mtp/{k}/block", "model.layers.{mtp}", None)
"""What it stands for in an MTP module; `mtp` is the number of main layers plus k."""
SCALE = {"huggingface": ".weight_scale_inv", "deepseek": ".scale"}
"""What a name ends in, for `.weight`, where it holds the scales of an FP8 weight."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a released checkpoint, and which piece of which of our arrays it is."""

    path: str
    """Our array, below `params` or `biases`: "params/layers/3/moe/experts/gate_up"."""
    index: tuple[int, ...]
    """Piece of that array: its leading indices."""
    shape: tuple[int, ...]
    """Shape of the tensor, which is the array's without the leading axes."""
    huggingface: str
    deepseek: str | None
    storage: Storage
    cut: Cut
    copy: bool


def tensors(arrays: Mapping[str, Sequence[int]]) -> list[Tensor]:
    """Return every tensor of a release of the model whose arrays have these shapes, in the order of its layers.

    Args:
        arrays: shape by path, of all arrays of the model: {"params/embed": (129280, 7168), ...}.

    Raises:
        ValueError: an array has no row in the table.
    """
    main, modules = _count(arrays, "layers"), _count(arrays, "mtp")
    scopes = [(rule, {}) for rule in _EXPANDED if "{" not in rule.ours and "{mtp}" not in rule.huggingface]
    for layer in range(main):
        scopes += [(rule, {"layer": layer}) for rule in _EXPANDED if "{layer}" in rule.ours]
    for k in range(modules):
        numbers = {"k": k, "mtp": main + k}
        scopes += [(rule, numbers) for rule in _EXPANDED if "{mtp}" in rule.huggingface]
    found = [tensor for rule, numbers in scopes for tensor in _pieces(rule, numbers, arrays)]
    unnamed = sorted(set(arrays) - {tensor.path for tensor in found})
    if unnamed:
        raise ValueError(f"no row of the name table is for {', '.join(unnamed[:5])}")
    return found


def locate(name: str, main_layers: int) -> tuple[str, tuple[int, ...]] | None:
    """Return our path and index of a Hugging Face name, or None if the table has no such name."""
    numbers = tuple(int(number) for number in _NUMBER.findall(name))
    key = _NUMBER.sub(".#", name)
    in_module = bool(numbers) and numbers[0] >= main_layers
    if (key, in_module) not in _BY_SHAPE:
        return None
    rule = _BY_SHAPE[key, in_module]
    fields = dict(zip(re.findall(r"{(\w+)}", rule.huggingface), numbers, strict=True))
    if in_module:
        fields["k"] = fields["mtp"] - main_layers
    path, index = _ours(rule)
    return path.format(**fields), tuple(fields["e"] if i == "e" else int(i) for i in index)


def scale_shape(shape: Sequence[int], block: int = 128) -> tuple[int, ...]:
    """Return the shape of the scales of a weight: one per block of the last two axes, partial blocks counted."""
    *lead, rows, columns = shape
    return (*lead, math.ceil(rows / block), math.ceil(columns / block))


def scale_name(name: str, vocabulary: Literal["huggingface", "deepseek"] = "huggingface") -> str:
    """Return the name of the scales of the weight of this name."""
    return name.removesuffix(".weight") + SCALE[vocabulary]


def _count(paths: Iterable[str], group: str) -> int:
    return len({path.split("/")[2] for path in paths if path.split("/")[1] == group})


def _pieces(rule: Rule, numbers: dict[str, int], arrays: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
    template, index = _ours(rule)
    path = template.format(**numbers)
    if path not in arrays:
        return
    shape = tuple(arrays[path])
    for piece in product(*(range(shape[axis]) if i == "e" else [int(i)] for axis, i in enumerate(index))):
        fields = numbers | {"e": piece[0] if piece else 0}
        huggingface = rule.huggingface.format(**fields)
        deepseek = rule.deepseek and rule.deepseek.format(**fields)
        yield Tensor(path, piece, shape[len(piece) :], huggingface, deepseek, rule.storage, rule.cut, rule.copy)


def _ours(rule: Rule) -> tuple[str, list[str]]:
    """Split "params/x/gate_up[e,0]" into the path and the index."""
    path, _, index = rule.ours.rstrip("]").partition("[")
    return path, index.split(",") if index else []


def _expand(rule: Rule) -> Iterator[Rule]:
    """Write a row out: its tree, the suffix of a weight, and a layer's row for main layers and for modules."""
    tree, suffix = ("biases", "") if rule.storage == "fp32" else ("params", ".weight")
    for ours, huggingface, deepseek in (LAYER, MODULE) if "*" in rule.ours else (("", "", ""),):
        yield Rule(
            f"{tree}/{rule.ours.replace('*', ours)}",
            rule.huggingface.replace("*", huggingface) + suffix,
            rule.deepseek.replace("*", deepseek) + suffix if rule.deepseek and deepseek is not None else None,
            rule.storage,
            rule.cut,
            rule.copy,
        )


_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_EXPANDED = tuple(expanded for rule in TABLE for expanded in _expand(rule))
_BY_SHAPE = {
    (re.sub(r"{\w+}", "#", rule.huggingface), "{mtp}" in rule.huggingface): rule for rule in _EXPANDED if not rule.copy
}
