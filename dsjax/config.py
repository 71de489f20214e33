"""Every setting of a run and the laws it obeys: frozen dataclasses that refuse what cannot work.

Fields of `ModelConfig` keep the names of Hugging Face's `config.json`, which the field knows by heart.
A wrong value is a ValueError of one line: the setting, the value, and what would be right.
`settings.py` reads them from TOML and the command line, and writes them.
"""

import math
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Precision = Literal["auto", "bf16", "fp32", "fp8", "mxfp8"]
Remat = Literal["none", "report", "full"]
AttentionKernel = Literal["auto", "plain", "chunked", "cudnn", "splash", "tokamax"]
GroupedMatmulKernel = Literal["auto", "tiles", "mosaic", "batched", "ragged"]
Fp8Kernel = Literal["auto", "mosaic", "xla", "interpret"]
PipelineSchedule = Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]
Transport = Literal["padded", "ragged", "gather"]
Source = Literal["python-stdlib", "text", "jsonl", "parquet", "tokens"]


def describe(kind: Any) -> str:
    """What a value of the annotation `kind` is, in the words of an error message."""
    parts = get_args(kind)
    match get_origin(kind):
        case origin if origin is Literal:
            return "one of " + ", ".join(map(repr, parts))
        case origin if origin is tuple and parts[-1] is Ellipsis:
            return f"a list, each item {describe(parts[0])}"
        case origin if origin is tuple:
            return f"a list of {len(parts)}, each item {describe(parts[0])}"
        case origin if origin is UnionType:
            return " or ".join(describe(part) for part in parts)
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", NoneType: "'none'"}
    return words.get(kind, "a table of settings")


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of the annotation `kind`: a bool is no number, an int is a float, NaN and infinity are not."""
    parts = get_args(kind)
    match get_origin(kind):
        case origin if origin is Literal:
            return value in parts
        case origin if origin is tuple:
            kinds = (parts[0],) * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
            return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
        case origin if origin is UnionType:
            return any(fits(value, part) for part in parts)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


class _Laws:
    """What the fields of a dataclass obey: their annotations, checked at once, and what its `__post_init__` adds."""

    def __init__(self, settings: Any, section: str = ""):
        self.settings, self.section = settings, section
        kinds = get_type_hints(type(settings))
        for name in (f.name for f in fields(settings)):
            self(name, fits(getattr(settings, name), kinds[name]), describe(kinds[name]))

    def __call__(self, name: str, holds: bool, right: str) -> None:
        if not holds:
            raise ValueError(f"{self.section}{name} = {getattr(self.settings, name)!r}: must be {right}")

    def at_least(self, low: int, *names: str) -> None:
        for name in names:
            self(name, getattr(self.settings, name) >= low, f"at least {low}")

    def positive(self, *names: str) -> None:
        for name in names:
            self(name, getattr(self.settings, name) > 0, "greater than 0")

    def share(self, *names: str) -> None:
        for name in names:
            self(name, 0 <= getattr(self.settings, name) <= 1, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (report section 4.3; arXiv 2309.00071), applied to the decoupled RoPE dimensions only."""

    factor: float
    """How many times longer the context becomes."""
    original_max_position_embeddings: int
    """Tokens of context before the extension."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a frequency is divided by `factor`."""
    mscale: float = 1.0
    """Weight of the length correction of cos and sin."""
    mscale_all_dim: float = 1.0
    """Weight of the length correction of the softmax scale; equal to `mscale`, it leaves cos and sin alone."""

    def __post_init__(self) -> None:
        law = _Laws(self, "model.rope_scaling.")
        law("factor", self.factor > 1, "greater than 1: it is how many times longer the context becomes")
        law.at_least(1, "original_max_position_embeddings")
        law.positive("beta_slow")
        law("beta_fast", self.beta_fast > self.beta_slow, f"greater than beta_slow = {self.beta_slow}")
        law.at_least(0, "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The size and the mathematics of a DeepSeek model (V2, V2-Lite, V3, R1, V3.1)."""

    name: str
    """Name of the file in `configs/models/` that holds the sizes."""
    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Main transformer layers, dense and MoE together, without MTP modules."""
    first_k_dense_replace: int
    """How many of the first layers have a dense FFN in place of the MoE."""
    intermediate_size: int
    """Inner width of the dense FFNs."""
    moe_intermediate_size: int
    """Inner width of one expert."""
    num_attention_heads: int
    """Heads of multi-head latent attention."""
    q_lora_rank: int = 0
    """Width of the compressed query; 0 projects queries directly, as V2-Lite does."""
    kv_lora_rank: int
    """Width of the compressed key and value, which is what the cache holds."""
    qk_nope_head_dim: int
    """Width of the part of a query or key that carries no position."""
    qk_rope_head_dim: int
    """Width of the part of a query or key that RoPE turns; the key's is shared by all heads."""
    v_head_dim: int
    """Width of a value."""
    n_routed_experts: int
    """Routed experts of an MoE layer."""
    n_shared_experts: int = 1
    """Experts that every token uses; they are one FFN of `n_shared_experts * moe_intermediate_size`."""
    num_experts_per_tok: int
    """Routed experts that a token uses (top-k)."""
    n_group: int = 1
    """Groups of routed experts (nodes) for node-limited routing."""
    topk_group: int = 1
    """Groups that a token may use."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """How router logits become affinities: sigmoid in V3, softmax in V2."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """How experts are chosen. V3's `noaux_tc` adds a bias and scores a group by its two best experts,
    V2's `group_limited_greedy` scores a group by its best one, V2-Lite's `greedy` knows no groups."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are made to sum to 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts, after that."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN; absent for pre-training at the original length."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights."""
    embedding_initializer_range: float = 0.0
    """The same of the embedding; 0 for `initializer_range`, as the report has it. Small models learn faster with more:
    their few steps otherwise go into making tokens heard over the noise of fresh layers."""
    num_nextn_predict_layers: int = 0
    """Multi-token prediction modules (depth D of report section 2.2); 0 for none."""

    def __post_init__(self) -> None:
        law = _Laws(self, "model.")
        law.at_least(1, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size")
        law.at_least(1, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        law.at_least(1, "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
        law.at_least(
            0, "q_lora_rank", "first_k_dense_replace", "num_nextn_predict_layers", "embedding_initializer_range"
        )
        layers, experts, groups, chosen = self.num_hidden_layers, self.n_routed_experts, self.n_group, self.topk_group
        law(
            "first_k_dense_replace", self.first_k_dense_replace <= layers, f"at most model.num_hidden_layers = {layers}"
        )
        law("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even: RoPE turns pairs")
        law("n_routed_experts", experts % groups == 0, f"divisible by model.n_group = {groups}")
        law("topk_group", chosen <= groups, f"at most model.n_group = {groups}")
        law("num_experts_per_tok", self.num_experts_per_tok <= experts, f"at most model.n_routed_experts = {experts}")
        size = experts // groups
        law(
            "num_experts_per_tok",
            self.num_experts_per_tok <= chosen * size,
            f"at most {chosen * size}, the experts of model.topk_group = {chosen} groups of {size}",
        )
        law(
            "n_group",
            size >= 2 or self.topk_method != "noaux_tc",
            f"at most model.n_routed_experts / 2 = {experts // 2}, since 'noaux_tc' scores a group by its two best",
        )
        law(
            "n_group",
            groups == 1 or self.topk_method != "greedy",
            "1 with topk_method 'greedy', which knows no groups",
        )
        law("rope_theta", self.rope_theta > 1, "greater than 1")
        law.positive("routed_scaling_factor", "rms_norm_eps", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are arranged."""

    source: Source = "python-stdlib"
    """`python-stdlib` (the .py files of the running Python's standard library), `text` or `jsonl` (files or folders,
    gzip and zstd too), `parquet`, or `tokens` (a .npy array of token ids, or a folder of them)."""
    path: str = ""
    """File, folder or glob of the source; not used by `python-stdlib`."""
    text_field: str = "text"
    """Field (JSONL) or column (Parquet) that holds a document's text."""
    tokenizer: str = ""
    """A Hugging Face `tokenizer.json`; empty trains a byte-level BPE of the model's vocabulary size on the source."""
    sequence_length: int = 4096
    """Tokens that the model reads per sequence; a window holds one more, the last target."""
    validation_fraction: float = 0.05
    """Share of the documents held out."""
    fim_rate: float = 0.1
    """Share of the training documents rearranged as prefix, suffix, middle to learn to fill in (report section 4.1)."""
    document_mask: bool = False
    """Whether attention stops at document borders; the report packs documents without such a mask."""
    cache: str = ".cache/dsjax"
    """Folder for trained tokenizers and token files, keyed by content."""

    def __post_init__(self) -> None:
        law = _Laws(self, "data.")
        if self.source == "python-stdlib":
            law("path", not self.path, "empty with data.source = 'python-stdlib'; to read it, name its kind of source")
        else:
            law("path", bool(self.path), f"a file, folder or glob, which data.source = {self.source!r} needs")
        law("text_field", bool(self.text_field), "the name of a field")
        law("cache", bool(self.cache), "a folder")
        law.at_least(1, "sequence_length")
        law("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1, both excluded")
        law.share("fim_rate")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: length, batch, losses, validation."""

    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Sequences per step, after the ramp."""
    micro_batch_size: int = 0
    """Sequences per forward and backward pass, whose gradients are added in float32; 0 for all at once."""
    batch_ramp_start: int = 0
    """Sequences per step at the beginning; 0 for no ramp (report: 3072 to 15360)."""
    batch_ramp_fraction: float = 0.0
    """Share of the run's steps over which the batch grows linearly, in a few sizes of whole micro-batches."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    initial_weights: str = ""
    """Weights to begin with, in any form that `dsjax.convert` reads (a run's too); empty draws them."""
    mtp_weights: tuple[float, float] = (0.3, 0.1)
    """Weight of the MTP loss before and after `mtp_change` (report section 4.2)."""
    mtp_change: float = 0.676
    """Share of the run after which the second MTP weight holds (report: 10T of 14.8T tokens)."""
    balance_weight: float = 1e-4
    """Weight alpha of the sequence-wise balance loss (report equation 17)."""
    bias_speed: float = 1e-3
    """Step gamma of the router-bias update (report section 2.1.2)."""
    bias_stop: float = 0.966
    """Share of the run after which the router biases stay as they are (report: the last 500B of 14.8T tokens)."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights that host memory holds; 0 keeps none."""
    max_bad_steps: int = 10
    """Steps with a non-finite loss or gradient in a row that end the run; each is skipped and counted."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    validation_sequences: int = 0
    """Held-out sequences per validation; 0 for all."""
    fp8_statistics: bool = False
    """Measure at every validation what FP8 does to weights, inputs and gradients; on one device. Compiles the layers
    one by one."""
    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""
    wandb: str = ""
    """Project on Weights & Biases that gets these lines too; empty for none. Needs the extra `dsjax[wandb]`."""
    stall_factor: float = 20.0
    """A step without progress for so many times the median step ends the process, with every thread's stack; 0 waits
    for ever."""
    stall_seconds: float = 300.0
    """Seconds without progress that a step may take in any case."""
    stall_patience: float = 7200.0
    """The same of what takes longer than a step: compilation, validation, saving."""
    remat: Remat = "report"
    """What the backward pass recomputes: `report` RMSNorms and MLA up-projections (section 3.2.3), `full` layers."""
    loss_chunk: int = 1024
    """Tokens whose float32 logits exist at once."""
    unroll_layers: bool = False
    """Compile every MoE layer by itself in place of one loop over them: faster on a CPU, slower to compile."""

    def __post_init__(self) -> None:
        law = _Laws(self, "train.")
        law.at_least(1, "steps", "batch_size", "max_bad_steps", "validate_every", "log_every", "loss_chunk")
        law.at_least(0, "micro_batch_size", "batch_ramp_start", "validation_sequences", "balance_weight", "bias_speed")
        law("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32")
        micro, start = self.micro_batch_size, self.batch_ramp_start
        if micro:
            law("batch_size", self.batch_size % micro == 0, f"divisible by train.micro_batch_size = {micro}")
            law("batch_ramp_start", start % micro == 0, f"divisible by train.micro_batch_size = {micro}")
        law("batch_ramp_start", start <= self.batch_size, f"at most train.batch_size = {self.batch_size}")
        if start:
            law("micro_batch_size", micro > 0, "at least 1 with a batch ramp, whose sizes are whole micro-batches")
            law("batch_ramp_fraction", self.batch_ramp_fraction > 0, f"greater than 0 with batch_ramp_start = {start}")
        else:
            law("batch_ramp_fraction", self.batch_ramp_fraction == 0, "0 without train.batch_ramp_start")
        law("mtp_weights", min(self.mtp_weights) >= 0, "two numbers of at least 0")
        law.share("batch_ramp_fraction", "mtp_change", "bias_stop")
        law("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        law("stall_factor", self.stall_factor == 0 or self.stall_factor > 1, "greater than 1, or 0 to wait for ever")
        law.positive("stall_seconds", "stall_patience")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule (report section 4.2); shares are of the run's steps."""

    learning_rate: float = 2.2e-4
    """Peak learning rate."""
    warmup: float = 0.0085
    """Share of the run over which the rate rises linearly from 0."""
    constant: float = 0.676
    """Share of the run after which the rate starts to fall along a cosine."""
    decay: float = 0.966
    """Share of the run at which the cosine has reached `first_tail`."""
    first_tail: float = 0.1
    """Rate after the cosine, as a share of the peak (report: 2.2e-5)."""
    second_tail_start: float = 0.989
    """Share of the run after which `second_tail` holds."""
    second_tail: float = 0.0332
    """Rate at the end, as a share of the peak (report: 7.3e-6)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment; above 0.98 a BF16 second moment stops moving, and is refused."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, of matrices only."""
    clip_norm: float = 1.0
    """Global norm to which gradients are scaled down; 0 for none."""
    moment_dtype: Literal["bf16", "fp32"] = "bf16"
    """Format of both moments (report section 3.3.3)."""

    def __post_init__(self) -> None:
        law = _Laws(self, "optimizer.")
        law.positive("learning_rate", "eps")
        law.at_least(0, "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            law(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        if self.moment_dtype == "bf16":
            law(
                "beta2",
                self.beta2 <= 0.98,
                "at most 0.98 with moment_dtype 'bf16': a step of 1 - beta2 is lost when a BF16 second moment "
                "is rounded, and the moment stops moving; or set optimizer.moment_dtype = 'fp32'",
            )
        low = 0.0
        for name in ("warmup", "constant", "decay", "second_tail_start"):
            law(name, low <= getattr(self, name) <= 1, f"between {low} and 1, since the parts of a run are in order")
            low = getattr(self, name)
        law.share("first_tail", "second_tail")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Implementations of the inner products; `auto` is the best there is on the platform, and the run shows which."""

    attention: AttentionKernel = "auto"
    """`plain` is the definition, `chunked` its blockwise form for any platform, `cudnn` for NVIDIA, `splash` for TPU,
    `tokamax` where that package is installed."""
    grouped_matmul: GroupedMatmulKernel = "auto"
    """Of the experts: `tiles` loops over blocks of rows (CPU), `mosaic` is kernels for Hopper (BF16), `batched` one
    product of all tiles (NVIDIA), `ragged` is `jax.lax.ragged_dot` (TPU)."""
    fp8: Fp8Kernel = "auto"
    """Of FP8 quantizers and products: `mosaic` for Hopper, `xla` is the definition, for any platform; `interpret` runs
    the kernels on a CPU, to look for mistakes in them."""
    fp8_gradient_blocks: bool = False
    """Quantize gradients of activations in blocks of 128 x 128, which diverges (report, appendix B.2): an ablation."""
    communication_sms: int = 0
    """Multiprocessors of a Hopper GPU that communication gets (report: 20): as many channels of NCCL, and where a pair
    of chunks hides it, our kernels take the others only. 0 leaves both as they are."""

    def __post_init__(self) -> None:
        law = _Laws(self, "kernels.")
        law("communication_sms", 0 <= self.communication_sms <= 64, "between 0 and 64: a GPU has 132, NCCL 64 channels")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; together they are all devices of the run.

    Sequences are divided over data x node x local, experts over node x local.
    """

    pipe: int = 1
    """Stages of the pipeline."""
    data: int = 1
    """Copies of all experts, which learn from different sequences."""
    node: int = 1
    """Nodes over which experts are divided; links between them are slow."""
    local: int = 1
    """Devices of a node over which its experts are divided; links between them are fast."""

    def __post_init__(self) -> None:
        law = _Laws(self, "mesh.")
        law.at_least(1, "pipe", "data", "node", "local")

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.pipe * self.data * self.node * self.local

    @property
    def batch_shards(self) -> int:
        """Parts into which the sequences of a micro-batch are divided."""
        return self.data * self.node * self.local

    @property
    def expert_shards(self) -> int:
        """Parts into which the experts of a layer are divided."""
        return self.node * self.local


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """In which order the stages of a pipeline work on micro-batches; without effect where `mesh.pipe` is 1."""

    schedule: PipelineSchedule = "dualpipe"
    """`gpipe`, `1f1b`, `zb1p` (ZB-H1), `dualpipe` (report section 3.2.1: two directions at once, parameters twice) or
    `dualpipev` (the same with two stages per rank, parameters once)."""
    max_deferred: int = 0
    """How many weight gradients may wait on a rank, each with the activations that it needs; 0 for no bound."""
    overlap: bool = True
    """Whether the two chunks of a pair take turns, so that one computes while the other's tokens travel; without, one
    follows the other, which is slower and gives the same bits."""

    def __post_init__(self) -> None:
        _Laws(self, "pipeline.").at_least(0, "max_deferred")


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How tokens travel to experts on other devices. No setting drops a token: what the first round's buffers do not
    hold goes in further rounds."""

    transport: Transport = "padded"
    """`padded` sends whole buffers by all-to-all, `ragged` only the rows in use (`jax.lax.ragged_all_to_all`: GPU and
    TPU, emulated on a CPU), `gather` sends everything everywhere, to check the others."""
    node_slack: float = 1.2
    """Rows of a buffer to another node, as a multiple of what it gets when routing is even."""
    device_slack: float = 1.25
    """The same of a buffer to another device of the node."""

    def __post_init__(self) -> None:
        _Laws(self, "dispatch.").positive("node_slack", "device_slack")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        _Laws(self, "checkpoint.").at_least(1, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    run: str = ""
    """Folder of the run; empty for `runs/` and the name of the TOML file."""
    precision: Precision = "auto"
    """Format of the matrix products: `auto` is float32 on a CPU, where BF16 is slower, and BF16 elsewhere; `fp8` is the
    report's recipe (tiles of 1 x 128, blocks of 128 x 128), `mxfp8` that of Blackwell (groups of 32)."""

    xla_flags: bool = True
    """Give XLA and NCCL the flags that are recommended for the chip (`parallel/xla_flags.py`) and that the environment
    does not set; the run shows them."""

    def __post_init__(self) -> None:
        _Laws(self)
        depth, length = self.model.num_nextn_predict_layers, self.data.sequence_length
        if length <= depth:
            raise ValueError(
                f"data.sequence_length = {length}: must be greater than model.num_nextn_predict_layers = {depth}"
            )
        mesh, experts = self.mesh, self.model.n_routed_experts
        if self.train.fp8_statistics and (self.precision not in ("fp8", "mxfp8") or mesh.devices > 1):
            raise ValueError(
                f"train.fp8_statistics with precision = {self.precision!r} on {mesh.devices} devices: needs precision "
                "'fp8' or 'mxfp8', and a single device"
            )
        kernels = self.kernels
        if kernels.fp8_gradient_blocks and self.precision != "fp8":
            raise ValueError(
                f"kernels.fp8_gradient_blocks with precision = {self.precision!r}: is an ablation of 'fp8', whose "
                "tiles are as wide as the blocks"
            )
        if kernels.fp8 in ("mosaic", "interpret") and self.precision == "mxfp8":
            raise ValueError(
                f"kernels.fp8 = {kernels.fp8!r} with precision = 'mxfp8': there are no kernels for groups of 32; "
                "'auto' and 'xla' compute it"
            )
        width = self.model.num_attention_heads * self.model.v_head_dim
        if self.precision in ("fp8", "mxfp8") and width % 8:
            raise ValueError(
                f"precision = {self.precision!r}: model.num_attention_heads x model.v_head_dim = {width} must be "
                "divisible by 8, because the output of attention is kept in 12 bits, 8 numbers in 3 words"
            )
        if experts % mesh.expert_shards:
            raise ValueError(
                f"mesh.node x mesh.local = {mesh.node} x {mesh.local} = {mesh.expert_shards}: must divide "
                f"model.n_routed_experts = {experts}, so that every device holds as many experts"
            )
        name = "micro_batch_size" if self.train.micro_batch_size else "batch_size"
        if getattr(self.train, name) % mesh.batch_shards:
            raise ValueError(
                f"train.{name} = {getattr(self.train, name)}: must be divisible by mesh.data x mesh.node x mesh.local "
                f"= {mesh.data} x {mesh.node} x {mesh.local} = {mesh.batch_shards}, so that every device gets as many "
                "sequences"
            )
