"""Write the goldens that the parity tests compare with: small random DeepSeek models, run by transformers on torch.

    python3.11 -m venv torchenv && torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    torchenv/bin/python tests/oracle/make_golden.py [variant ...]

Each variant becomes a folder of `tests/golden/`: `hf/` is a checkpoint with the released names (an MTP module is the
layer after the last one), `golden.safetensors` holds `input_ids`, `logits`, `loss`, the choices of every router, with
MTP `mtp_logits` and `mtp_loss`, and `grad/NAME` of loss + 0.3 mtp_loss for every parameter. All is float32.
`--check` compares what is there with a new run and writes nothing. torch and transformers are no dependencies of dsjax.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

MTP_WEIGHT = 0.3
SEQUENCES, TOKENS = 2, 96  # longer than the 64 tokens before YaRN's extension
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = PLAIN | {"rope_type": "yarn", "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}

SHAPE = {
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.05,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
SMALL = SHAPE | {
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
V3_ROUTING = {
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
}
V2_ROUTING = {"n_shared_experts": 2, "num_experts_per_tok": 3, "norm_topk_prob": False}

VARIANTS = {
    "v3": lambda: DeepseekV3Config(
        **SHAPE | V3_ROUTING,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        rope_parameters=YARN | {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "v3_no_yarn": lambda: DeepseekV3Config(**SMALL | V3_ROUTING, q_lora_rank=16, rope_parameters=PLAIN),
    "v2_lite": lambda: DeepseekV2Config(
        **SMALL | V2_ROUTING,
        q_lora_rank=None,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        rope_parameters=YARN | {"factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v2": lambda: DeepseekV2Config(
        **SMALL | V2_ROUTING,
        q_lora_rank=16,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
        rope_parameters=PLAIN,
    ),
}


class Model:
    """A random model with its MTP modules, if it has any."""

    def __init__(self, config: DeepseekV2Config | DeepseekV3Config):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        self.config = config
        is_v3 = isinstance(config, DeepseekV3Config)
        self.main = (DeepseekV3ForCausalLM if is_v3 else DeepseekV2ForCausalLM)(config)
        self.mtp = MtpModel(self.main, config.num_mtp_layers) if is_v3 else None
        self.parts = [part for part in (self.main, self.mtp) if part is not None]
        self._randomize()
        for part in self.parts:
            part.train()

    @torch.no_grad()
    def _randomize(self) -> None:
        """Draw what transformers leaves at 0 or 1, so that tests can see it, and what it leaves uninitialized."""
        if self.mtp is not None:
            for name, p in self.mtp.named_parameters():
                if name.startswith("layers.") and p.dim() > 1:
                    p.normal_(0.0, self.config.initializer_range)
        for part in self.parts:
            for name, buffer in part.named_buffers():
                if "e_score_correction_bias" in name:
                    buffer.copy_(0.2 * torch.randn_like(buffer))
            for name, p in part.named_parameters():
                if "norm" in name:
                    p.copy_(1.0 + 0.1 * torch.randn_like(p))
            for name, p in part.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    if p.abs().max() == 0:
                        p.normal_(0.0, self.config.initializer_range)
                    p.mul_(4.0)  # keeps the scores away from ties

    def released(self, *, grads: bool) -> dict[str, torch.Tensor]:
        """Return all parameters and router biases, or all gradients, under the released names."""
        tensors = {}
        for part in self.parts:
            named = list(part.named_parameters()) + ([] if grads else list(part.named_buffers()))
            for name, p in named:
                if part is self.mtp:
                    name = self._mtp_name(name)
                if name is not None and "inv_freq" not in name:
                    tensors |= dict(_experts_apart(name, p.grad if grads else p))
        return {name: t.detach().clone().contiguous() for name, t in tensors.items()}

    def _mtp_name(self, name: str) -> str | None:
        """Return the released name of an MTP module's parameter; None for those of the main model that it shares."""
        if not name.startswith("layers."):
            return None
        _, k, rest = name.split(".", 2)
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        return f"model.layers.{self.config.num_hidden_layers + int(k)}.{rest}"

    def routers(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield every router under the name of its layer in the checkpoint."""
        for part in self.parts:
            for name, module in part.named_modules():
                if type(module).__name__.endswith("TopkRouter"):
                    full = self._mtp_name(f"{name}.") if part is self.mtp else f"{name}."
                    yield full.removesuffix(".mlp.gate."), module


def _experts_apart(name: str, t: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Split the experts of a layer, one tensor in memory, into the tensors of the release."""
    if name.endswith("experts.gate_up_proj"):
        for projection, half in zip(("gate_proj", "up_proj"), t.chunk(2, dim=1), strict=True):
            for e, matrix in enumerate(half):
                yield f"{name.removesuffix('gate_up_proj')}{e}.{projection}.weight", matrix
    elif name.endswith("experts.down_proj"):
        for e, matrix in enumerate(t):
            yield f"{name.removesuffix('down_proj')}{e}.down_proj.weight", matrix
    else:
        yield name, t


def golden(model: Model) -> dict[str, torch.Tensor]:
    """Run a model forward and backward on random tokens and return everything that the tests compare."""
    config = model.config
    ids = torch.randint(2, config.vocab_size, (SEQUENCES, TOKENS))
    choices = {}
    for layer, router in model.routers():
        router.register_forward_hook(lambda _, __, out, layer=layer: choices.__setitem__(layer, out))

    out = model.main(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
    tensors = {"input_ids": ids, "logits": out.logits, "loss": out.loss}
    total = out.loss
    if model.mtp is not None:
        # Position i reads the state after the final norm and the embedding of token i + 1, and predicts token i + 2.
        # RoPE is relative, so that it may count from 1. MtpModel.forward with labels raises in transformers 5.23.
        cache = MtpCache(config=config.get_mtp_config())
        positions = torch.arange(1, TOKENS)[None]
        hidden = model.mtp.forward_layer(0, out.hidden_states[-1][:, :-1], positions, cache, input_ids=ids[:, 1:])
        logits = model.mtp._project_to_logits(hidden)
        mtp_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
        tensors |= {"mtp_logits": logits, "mtp_loss": mtp_loss}
        total = total + MTP_WEIGHT * mtp_loss
    total.backward()

    for layer, (_, weights, experts) in choices.items():
        by_expert = experts.argsort(-1)
        tensors[f"router/{layer}/experts"] = experts.gather(1, by_expert).to(torch.int32)
        tensors[f"router/{layer}/weights"] = weights.gather(1, by_expert)
    tensors |= {f"grad/{name}": grad for name, grad in model.released(grads=True).items()}
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def write(folder: Path, model: Model, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint and the golden of a variant."""
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    config |= {"architectures": [type(model.main).__name__], "torch_dtype": "float32", "dtype": "float32"}
    (folder / "hf" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.released(grads=False), folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "golden.safetensors")


def check(folder: Path, model: Model, tensors: dict[str, torch.Tensor]) -> None:
    """Print the largest difference between a golden that is there and a new run, and fail where names differ."""
    for file, new in (("hf/model.safetensors", model.released(grads=False)), ("golden.safetensors", tensors)):
        old = load_file(folder / file)
        assert old.keys() == new.keys(), f"{folder / file}: {sorted(old.keys() ^ new.keys())[:5]}"
        worst = max((float((old[name].double() - new[name].double()).abs().max()), name) for name in new)
        print(f"{folder / file}: {len(new)} tensors, largest difference {worst[0]:.2e} in {worst[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "golden")
    parser.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    args = parser.parse_args()
    for variant in args.variants:
        model = Model(VARIANTS[variant]())
        tensors = golden(model)
        (check if args.check else write)(args.out / variant, model, tensors)
        print(f"{variant}: " + " ".join(f"{k}={tensors[k]:.6f}" for k in ("loss", "mtp_loss") if k in tensors))


if __name__ == "__main__":
    main()
