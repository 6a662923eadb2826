"""What the tests share: the tolerance rule, and tiny models with random weights.

The rule: an operation may be as wrong as the plain torch that it replaces, twice over, and no more. Truth is
the reference in fp64; the yardstick is the reference in the operation's own dtype. In fp64 there is no wider
truth: 1e-12 of the scale.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.proof.rule import allowed, distance
from minilora import save_model
from minilora.checkpoint.load import FAMILIES
from minilora.data import IGNORE, Example
from minilora.models.cache import Cache
from minilora.models.decoder import Decoder
from minilora.models.layers import pack_weights


def as_wrong_as(ours: Tensor, plain: Tensor, truth: Tensor, what: str = "", scale: float = 0.0) -> None:
    """Assert the tolerance rule for one tensor; scale is what its values are made from, if more."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, {list(truth.shape)} expected"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, {plain.dtype} expected"
    if truth.numel() == 0:
        return
    scale = max(scale, float(truth.abs().max()))
    wrong, most = distance(ours, truth), allowed(plain, truth, scale)
    assert wrong <= most, f"{what}: off by {wrong:.3g}, allowed is {most:.3g}, values reach {scale:.3g}"


def leaves_of(args: Iterable[Any], trained: Iterable[int]) -> list[Any]:
    """The arguments, in the same memory, of which the trained ones require grad."""
    both = enumerate(args)
    return [a.detach().requires_grad_(i in trained) if isinstance(a, Tensor) else a for i, a in both]


def run(op: Callable, args: Iterable[Any], trained: Iterable[int], dy: Tensor | None = None) -> list[Tensor]:
    """The output of op and the gradients of its trained arguments for the upstream gradient dy, else ones."""
    leaves = leaves_of(args, trained)
    out = op(*leaves)
    if trained:
        out.backward(torch.ones_like(out) if dy is None else dy.to(out.dtype))
    return [out.detach(), *(leaves[i].grad for i in trained)]


def upstream(out: Tensor) -> Tensor:
    """A random gradient for an output; the same for outputs of one shape, whatever their dtype."""
    generator = torch.Generator().manual_seed(17)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def cached_logits(model: Decoder, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """Logits of a document that goes through the model in pieces, with a cache."""
    cache, pieces = Cache(model.config.layers, virtual=model.virtual), []
    for part in ids.split(lengths):
        documents = cache.extend(len(part)) if pieces else cache.start([len(part)], model.prefix_lens(part))
        pieces.append(model.to_logits(model(part, documents)))
    return pieces


def widen(args: Iterable[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def check_op(
    op: Callable, ref: Callable, args: Iterable[Any], trained: Iterable[int], plain: Callable | None = None
) -> None:
    """The rule for the output of op and for the gradient of every trained argument.

    ref is the specification; plain is the yardstick where the specification itself computes in a wider dtype.
    """
    args, trained = list(args), tuple(trained)
    dy = upstream(op(*args))
    ours, yard = run(op, args, trained, dy), run(plain or ref, args, trained, dy)
    truth = run(ref, widen(args), trained, dy)
    as_wrong_as(ours[0], yard[0], truth[0], "output")
    # a gradient that is zero by cancellation, as through a softmax over one key, is rounding of the others
    scale = max((float(t.abs().max()) for t in truth[1:] if t.numel()), default=0.0)
    for i, *values in zip(trained, ours[1:], yard[1:], truth[1:], strict=True):
        as_wrong_as(*values, what=f"gradient of argument {i}", scale=scale)


# grouped queries, sizes that are no powers of two
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "dtype": "float32",
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
SOP = 60  # of the tiny chatglm: what stands before it in a document sees each other
OWN = {
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "glm": SIZES | {"head_dim": 8},
    "glm4": SIZES | {"head_dim": 8},
    "qwen3_5": SIZES | {
        "head_dim": 8, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
    },
    "qwen3_next": SIZES | EXPERTS | {
        "head_dim": 8, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 5, "num_experts": 5, "shared_expert_intermediate_size": 20, "norm_topk_prob": True,
    },
    "qwen3_5_moe": SIZES | EXPERTS | {
        "head_dim": 8, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 5, "num_experts": 5, "shared_expert_intermediate_size": 20,
    },
    "qwen2_moe": SIZES | EXPERTS | {"num_experts": 5, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 8, "num_experts": 5, "norm_topk_prob": True},
    "glm4_moe": SIZES | EXPERTS | {
        "head_dim": 8, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "use_qk_norm": True, "attention_bias": True,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe_lite": SIZES | EXPERTS | {
        "n_routed_experts": 6, "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 6, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 8,
    },
    "qwen": {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "kv_channels": 6, "seq_length": 10, "dtype": "float32",
    },
    "gpt2": {
        "vocab_size": 61, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "dtype": "float32",
    },
    "chatglm2": {
        "padded_vocab_size": 61, "hidden_size": 24, "ffn_hidden_size": 40, "num_layers": 2, "num_attention_heads": 4,
        "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
        "seq_length": 64, "dtype": "float32",
    },
    "chatglm": {
        "vocab_size": 61, "hidden_size": 32, "inner_hidden_size": 56, "num_layers": 2, "num_attention_heads": 4,
        "max_sequence_length": 64, "bos_token_id": SOP, "dtype": "float32",
    },
}  # fmt: skip

_WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
WIDE = {  # changes that make widths which the kernels take
    "qwen2": _WIDE, "qwen3": _WIDE | {"head_dim": 16}, "glm": _WIDE | {"head_dim": 16}, "glm4": _WIDE | {"head_dim": 16},
    "qwen3_5": _WIDE | {"head_dim": 16, "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe"), _WIDE | {
        "head_dim": 16, "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    }),
    "qwen2_moe": _WIDE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": _WIDE | {"head_dim": 16, "moe_intermediate_size": 32},
    "glm4_moe": _WIDE | {"head_dim": 16, "moe_intermediate_size": 32},
    "glm4_moe_lite": _WIDE | {
        "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "qwen": _WIDE | {"kv_channels": 16, "intermediate_size": 192}, "gpt2": {"n_embd": 64, "n_inner": 96},
    "chatglm2": {"hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}, "chatglm": {"hidden_size": 64, "inner_hidden_size": 96},
}  # fmt: skip


def config_json(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model of a family."""
    return {"model_type": "chatglm" if family == "chatglm2" else family, **OWN[family], **changes}


def tiny(family: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Decoder:
    """A frozen Decoder with random weights, norms and biases too, so that none can be forgotten unseen."""
    module = FAMILIES[family]
    model = module.decoder(module.config(config_json(family, **changes))).to(dtype).requires_grad_(False).eval()
    pack_weights(model)  # as the loader does
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0  # of a norm
        p.copy_(0.2 * torch.randn(p.shape, generator=generator) + scale)
    return model


def tiny_folder(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder of a tiny model, without a tokenizer."""
    source = folder.parent / f"{folder.name}-config"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config_json(family, **changes)))
    save_model(tiny(family, seed=seed, **changes), folder, source)
    return folder


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Random values for every lora_B (and lora_A), as a training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))


IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 57, 60, 0, 23])


def conversation(family: str, source: int, answer: int, seed: int) -> Example:
    """A document of random ids, its answer trained; for ChatGLM-6B with <sop> between the two."""
    ids = np.random.default_rng(seed).integers(1, SOP, source + answer)
    prefix = None
    if family == "chatglm":
        ids[source], prefix = SOP, source
    targets = np.full_like(ids, IGNORE)
    targets[source:-1] = ids[source + 1 :]
    return Example(ids, targets, f"row {seed}", prefix)


def conversations(family: str) -> list[Example]:
    """Of several lengths; two go beyond the trained length of the tiny Qwen-1."""
    return [conversation(family, *sizes, seed) for seed, sizes in enumerate([(5, 4), (1, 8), (12, 3), (7, 20)])]
