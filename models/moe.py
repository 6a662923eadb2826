"""Mixtures of experts: a router chooses k of E SwiGLU MLPs for each token (Shazeer et al., 2017).

    softmax (Qwen)    p = softmax(x W^T) over all experts; the k largest; divided by their sum where `normalise`
    sigmoid (GLM)     s = sigmoid(x W^T); the k largest of s + bias, within the best groups of experts; weights are s
                      without the bias, divided by their sum where `normalise`, times `scale`  (DeepSeek-V3)

The experts of a layer lie in two matrices, one expert above the other (kernels/lora_experts.py), under the names that
transformers 5 has for them; load.py reads them from folders that hold each expert by itself. Routers are frozen by
default, and there is no auxiliary loss.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.kernels.lora_experts import Routing, lora_experts
from minilora.kernels.projection import Projection

from .config import Config
from .layers import MLP, Linear, projection


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """Config of a model some of whose layers are mixtures of experts; ffn is the width of the dense ones."""

    experts: int
    chosen: int  # experts of a token, k
    expert_ffn: int
    normalise: bool  # divide the weights of a token by their sum
    sigmoid: bool = False
    groups: int = 1  # of experts, and how many of them a token may choose from
    chosen_groups: int = 1
    scale: float = 1.0  # of the weights
    shared_ffn: int = 0  # width of the expert that every token has; 0: there is none
    shared: str = "shared_experts"  # its name in the checkpoint
    shared_gate: bool = False  # it is multiplied by sigmoid(x w^T)
    dense: tuple[int, ...] = ()  # layers that have one MLP


class ChoiceBias(nn.Parameter):
    """Decides which experts are chosen, and has no gradient: it stays as it is where every weight is trained."""

    def __new__(cls, data: Tensor, requires_grad: bool = False):
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True):
        return self


class Gate(Linear):
    """The linear of a router: x [T, D] -> logits [T, E]. Only its own name, not all-linear, puts an adapter on it."""

    def __init__(self, c: MoEConfig):
        super().__init__(c.width, c.experts, bias=False)
        if c.sigmoid:
            self.e_score_correction_bias = ChoiceBias(torch.empty(c.experts))

    def _apply(self, fn: Any, recurse: bool = True):
        """Move with the model, but keep the bias in fp32: the best experts differ by less than bf16 resolves."""
        bias = self._parameters.pop("e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if bias is not None:
            moved = fn(bias.detach())
            wide = moved if moved.dtype.itemsize >= bias.dtype.itemsize else bias.detach().to(moved.device)
            self.e_score_correction_bias = ChoiceBias(wide)
        return self


def choose(c: MoEConfig, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [T, k] in fp32 or wider, and the numbers [T, k] of the experts, for logits [T, E]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if bias is None:
        weights, index = logits.softmax(-1, dtype=wide).topk(c.chosen)
    else:
        scores = logits.to(wide).sigmoid()
        index = _in_best_groups(c, scores.detach() + bias).topk(c.chosen).indices
        weights = scores.gather(1, index)
    if c.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (0.0 if bias is None else 1e-20))
    return weights * c.scale, index


def _in_best_groups(c: MoEConfig, scores: Tensor) -> Tensor:
    """Scores [T, E], -inf outside of the groups whose two best experts sum to most."""
    if c.groups == 1:
        return scores
    grouped = scores.unflatten(1, (c.groups, -1))
    best = grouped.topk(2).values.sum(-1).topk(c.chosen_groups).indices
    others = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return grouped.masked_fill(others[..., None], float("-inf")).flatten(1)


class ExpertLinear(nn.Module):
    """One linear of every expert: the weight [E N, K] holds them one above the other."""

    bias = None
    output_needed = True  # False while recompute.py runs a block again whose output nobody reads

    def __init__(self, experts: int, in_features: int, out_features: int, parts: tuple[str, ...]):
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        # names of the matrices of an expert that lie in it, in checkpoints that have them apart
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(experts * out_features, in_features))

    def projection(self) -> Projection:
        return Projection(self.weight)

    def stacks(self, shared_outer: bool) -> tuple[tuple[int], tuple[int]]:
        """How many A and B adapters have; shared-outer: one on the side of the hidden state, gate_up's input, down's output."""
        reads = len(self.parts) == 2
        return (1 if shared_outer and reads else self.experts,), (1 if shared_outer and not reads else self.experts,)


class Experts(nn.Module):
    """x [T, D] with the weights and numbers [T, k] of a router -> [T, D]."""

    seen: Tensor  # bool [E]: which experts had a token in training

    def __init__(self, c: MoEConfig):
        super().__init__()
        self.gate_up_proj = ExpertLinear(c.experts, c.width, 2 * c.expert_ffn, ("gate_proj", "up_proj"))
        self.down_proj = ExpertLinear(c.experts, c.expert_ffn, c.width, ("down_proj",))
        self.register_buffer("seen", torch.zeros(c.experts, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        routing = Routing.of(index, len(self.seen))
        if self.training and torch.is_grad_enabled():
            self.seen |= routing.counts > 0
        first, last = projection(self.gate_up_proj), projection(self.down_proj)
        assert first is not None and last is not None, "adapters on experts are LoRA's alone"
        return lora_experts(x, weights, routing, first, last, self.down_proj.output_needed)


class SparseMLP(nn.Module):
    """A router, its experts, and the expert that every token has, if there is one: x [T, D] -> [T, D]."""

    last_linear = "experts.down_proj"

    def __init__(self, c: MoEConfig):
        super().__init__()
        self.c = c
        self.gate, self.experts = Gate(c), Experts(c)
        self.shared = c.shared if c.shared_ffn else None
        if self.shared:
            self.add_module(self.shared, MLP(replace(c, ffn=c.shared_ffn)))
        self.shared_expert_gate = Linear(c.width, 1, bias=False) if c.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32) if self.c.sigmoid else x.dtype
        bias = getattr(getattr(self.gate, "base", self.gate), "e_score_correction_bias", None)
        y = self.experts(x, *choose(self.c, self.gate(x.to(wide)), bias))
        if self.shared is None:
            return y
        shared = self.get_submodule(self.shared)(x)
        return y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)


def mlp_of(c: MoEConfig, layer: int) -> type[nn.Module]:
    """The class of a layer's MLP."""
    return MLP if layer in c.dense else SparseMLP
