"""Multi-head latent attention (DeepSeek-AI, 2024, "DeepSeek-V2"): queries, keys and values from narrow latents.

    q = q_b(norm(q_a(x)))            of each head [nope | rope]
    [c | r] = kv_a(x)                c is the latent of keys and values, r one rotated key for all heads
    [k | v] = kv_b(norm(c))          of each head; its key is [k | r]

Only the parts called rope are rotated. Scores are divided by sqrt(nope + rope). The cache holds k and v of every head, as
for other models, not the latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels.lora_linear import lora_linear_group
from minilora.kernels.rope import rope_pair

from .layers import Linear, RMSNorm, each, projections
from .moe import MoEConfig
from .stream import Context

EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is


@dataclass(frozen=True, kw_only=True)
class LatentConfig(MoEConfig):
    """head_size is nope + rope, rotary is rope."""

    q_rank: int
    kv_rank: int
    v_size: int  # of a head, at most head_size


class LatentAttention(nn.Module):
    packed_modules = ("q_a_proj", "kv_a_proj_with_mqa")

    def __init__(self, c: LatentConfig, layer: int):
        super().__init__()
        self.layer, self.interleaved, self.heads = layer, c.interleaved, c.heads
        self.rope, self.nope, self.v_size = c.rotary, c.head_size - c.rotary, c.v_size
        self.q_a_proj = Linear(c.width, c.q_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_rank, EPS)
        self.q_b_proj = Linear(c.q_rank, c.heads * c.head_size, bias=False)
        self.kv_a_proj_with_mqa = Linear(c.width, c.kv_rank + c.rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_rank, EPS)
        self.kv_b_proj = Linear(c.kv_rank, c.heads * (self.nope + c.v_size), bias=False)
        self.o_proj = Linear(c.heads * c.v_size, c.width, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        linears = self.q_a_proj, self.kv_a_proj_with_mqa
        fused = projections(*linears)
        q_latent, kv = lora_linear_group(x, fused) if fused else each(x, *linears)
        latent, r = kv.split((kv.shape[1] - self.rope, self.rope), dim=1)
        q = self.q_b_proj(self.q_a_layernorm(q_latent)).unflatten(1, (self.heads, -1))
        k, v = (
            self.kv_b_proj(self.kv_a_layernorm(latent))
            .unflatten(1, (self.heads, -1))
            .split((self.nope, self.v_size), dim=2)
        )
        q, q_rope = q.split((self.nope, self.rope), dim=2)
        q_rope, r = rope_pair(q_rope, r[:, None], context.cos, context.sin, self.interleaved)
        q, k = torch.cat((q, q_rope), 2), torch.cat((k, r.expand(-1, self.heads, -1)), 2)
        v = F.pad(v, (0, q.shape[2] - self.v_size))  # attention takes heads of one size
        return self.o_proj(context.attend(self.layer, q, k, v)[..., : self.v_size].flatten(1))
