"""The gated delta rule: a memory that forgets and corrects itself, by documents (Yang, Kautz and Hatamizadeh, 2024).

A value head has a state S [E, U], zero at the start of each document. With k and q of unit length, q divided by sqrt(E),
for each token

    S = e^g S        S = S + k (beta (v - S^T k))^T        o = S^T q

q, k [T, G, E], v [T, H, U], g (never positive) and beta [T, H]: H value heads, H / G for each of G key heads.

A CPU takes CHUNK tokens at a time as matrix products (Yang et al., 2024, "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length"). With c the sum of g from the start of a chunk, D_ij = e^(c_i - c_j) for i >= j, and S the state
that the chunk begins with:

    A = beta k k^T * D below the diagonal                  N = (I + A)^-1 beta (v - e^c (k S))
    o = e^c (q S) + (q k^T * D) N                          S' = e^(c_last) S + (e^(c_last - c) k)^T N

Chunks of all documents and some heads are multiplied together; a loop goes along the documents. (I + A)^-1 is made of
inverses of half the size, which is as stable as solving row by row. All is fp32 (fp64 for fp64). Saved for the backward:
what was given; the rest is made again. A GPU runs Flash Linear Attention's kernels where they are installed (fla.py), else this.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import fla
from minilora.kernels.dispatch import check_same, once_differentiable, recording, to_device

CHUNK = 32  # FLA takes 64; half of that is a fifth fewer operations, and on a CPU no slower for each
EPS = 1e-6  # under the root of a length
AT_ONCE = 1 << 20  # values of v that go through the chunks together: what a CPU's cache holds


def gated_delta_rule_ref(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The specification, token by token: o [T, H, U] in the dtype of v, and the states after each document [S, H, E, U]."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (_unit(x.to(wide)).repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    outs, states = [], []
    for number, (start, end) in enumerate(pairwise(cu_seqlens)):
        s = q.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if state is None else state[number].to(wide)
        for t in range(start, end):
            s = s * g[t, :, None, None].to(wide).exp()
            error = v[t].to(wide) - torch.einsum("heu,he->hu", s, k[t])
            s = s + torch.einsum("he,hu->heu", k[t], beta[t, :, None].to(wide) * error)
            outs.append(torch.einsum("heu,he->hu", s, q[t]) * k.shape[2] ** -0.5)
        states.append(s)
    o = torch.stack(outs) if outs else q.new_zeros(v.shape)
    return o.to(v.dtype), torch.stack(states)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


class Cut(NamedTuple):
    """A stream cut into chunks of `size` slots: the first ones of all documents, the longest first, then the second ones, ...

    source [slots] is the token of each slot, any token where there is none; slot [T] the slot of each token; counts, how many
    documents have a first chunk, a second one, ...; order, which document is the longest, the second, ...
    """

    size: int
    source: Tensor
    slot: Tensor
    counts: tuple[int, ...]
    order: Tensor

    @staticmethod
    def of(cu_seqlens: Sequence[int], size: int, device: torch.device) -> "Cut":
        return _cut(tuple(cu_seqlens), size, device)


@lru_cache(16)  # the layers of a model ask for the same one
def _cut(cu_seqlens: tuple[int, ...], size: int, device: torch.device) -> Cut:
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    size = min(size, max(16, 1 << (max(lengths) - 1).bit_length()))  # no larger than the longest document needs
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    chunks = [-(-lengths[i] // size) for i in order]
    counts = tuple(sum(c > step for c in chunks) for step in range(chunks[0]))
    first = [sum(counts[:step]) for step in range(len(counts))]  # chunk of each step
    slot = torch.empty(cu_seqlens[-1], dtype=torch.int64)
    for rank, i in enumerate(order):
        within = torch.arange(lengths[i])
        starts = torch.tensor(first, dtype=torch.int64)[within // size] + rank
        slot[cu_seqlens[i] : cu_seqlens[i + 1]] = starts * size + within % size
    source = torch.zeros(sum(counts) * size, dtype=torch.int64)
    source[slot] = torch.arange(len(slot))
    return Cut(size, to_device(source, device), to_device(slot, device), counts, to_device(torch.tensor(order), device))


def _into(x: Tensor, cut: Cut) -> Tensor:
    """x [T, heads, n] as chunks [chunks, heads, size, n], a view of memory in the order of tokens."""
    return x.flatten(1).index_select(0, cut.source).view(-1, cut.size, *x.shape[1:]).transpose(1, 2)


def _numbers_into(x: Tensor, cut: Cut, wide: torch.dtype) -> Tensor:
    """x [T, heads] as [chunks, heads, size], zero where there is no token."""
    padded = x.new_zeros(len(cut.source), x.shape[1], dtype=wide).index_copy_(0, cut.slot, x.to(wide))
    return padded.view(-1, cut.size, x.shape[1]).transpose(1, 2).contiguous()


def _out_of(x: Tensor, cut: Cut) -> Tensor:
    """Chunks [chunks, heads, size, ...] as tokens [T, heads, ...]."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, cut.slot)


class _Within:
    """What the chunks of some heads compute without a state: [chunks, G, H / G, size, ...], with 1 in the place of H / G for q and k."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cut: Cut):
        wide, groups = torch.promote_types(v.dtype, torch.float32), (q.shape[1], -1)
        self.scale = q.shape[2] ** -0.5
        (q, self.rq), (k, self.rk) = (self._units(_into(x, cut).to(wide)) for x in (q, k))
        self.q, self.k = q[:, :, None], k[:, :, None]
        self.v = _into(v, cut).to(wide).unflatten(1, groups)
        self.beta = _numbers_into(beta, cut, wide).unflatten(1, groups)[..., None]
        # differences of sums: after tokens that forget everything, sums in fp32 would have too few digits left
        c = _numbers_into(g, cut, torch.float64).cumsum(-1).unflatten(1, groups)[..., None]
        last = c[..., -1:, :]
        self.grown, self.rest, self.whole = (x.to(wide).exp() for x in (c, last - c, last))
        between = torch.empty(*c.shape[:-1], cut.size, dtype=wide, device=c.device)
        above = torch.ones(cut.size, cut.size, dtype=torch.bool, device=c.device).triu(1)
        self.d = torch.sub(c, c.mT, out=between).masked_fill_(above, float("-inf")).exp_()
        self.kk = self.k @ self.k.mT
        self.inverse = _inverse(self.kk * self.beta * self.d)
        self.p = (self.q @ self.k.mT) * self.d
        self.at = [slice(end - n, end) for n, end in zip(cut.counts, accumulate(cut.counts), strict=True)]
        if v.is_meta:  # without data one step tells what all of them take (machine/dry_run.py)
            del self.at[1:]

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of unit length, without gaps, and what each was multiplied with."""
        r = torch.linalg.vecdot(x, x)[..., None].add_(EPS).rsqrt_()
        return torch.mul(x, r, out=torch.empty(x.shape, dtype=x.dtype, device=x.device)), r

    def corrections(self, at: slice, state: Tensor) -> Tensor:
        """N of a step's chunks."""
        return self.inverse[at] @ torch.addcmul(self.v[at], self.k[at] @ state, self.grown[at], value=-1).mul_(
            self.beta[at]
        )

    def next_state(self, at: slice, state: Tensor, n: Tensor) -> Tensor:
        return state * self.whole[at] + (self.k[at] * self.rest[at]).mT @ n


def _inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for a [..., n, n], of which what is below the diagonal is read; n is a power of two.

    [[I + a, 0], [b, I + c]]^-1 = [[x, 0], [-y b x, y]] for inverses x and y, from single numbers on.
    """
    size, shape = a.shape[-1], a.shape
    a = a.reshape(-1, size, size)
    found = torch.eye(size, dtype=a.dtype, device=a.device).expand(a.shape).contiguous()
    half = 1
    while half < size:
        count = size // (2 * half)
        (b, whole) = (
            t.unflatten(2, (count, -1)).unflatten(1, (count, -1)).diagonal(0, 1, 3).movedim(-1, 1) for t in (a, found)
        )
        b, x, y = b[..., half:, :half], whole[..., :half, :half], whole[..., half:, half:]
        whole[..., half:, :half] = -b if half == 1 else -(y @ b @ x)
        half *= 2
    return found.view(shape)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cut: Cut, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o of some heads [T, H, U] and the states after the documents, the longest first [S, G, H / G, E, U]."""
    w = _Within(q, k, v, g, beta, cut)
    out, counts = torch.empty_like(w.v, memory_format=torch.contiguous_format), (*cut.counts, 0)
    if state is None:
        state = w.v.new_zeros(counts[0], *w.v.shape[1:3], q.shape[2], v.shape[2])
    last = []
    for at, count, following in zip(w.at, counts, counts[1:], strict=False):
        n = w.corrections(at, state)
        torch.mul(w.q[at] @ state, w.grown[at], out=out[at]).add_(w.p[at] @ n)
        state = w.next_state(at, state, n)
        last.append(state[following:count])
        state = state[:following]
    return _out_of(out.flatten(1, 2), cut).mul_(w.scale).to(v.dtype), torch.cat(last[::-1])


def _backward(do: Tensor, inputs: Sequence[Tensor], cut: Cut) -> tuple[Tensor, ...]:
    """dq, dk, dv, dg, dbeta of some heads.

    With dN = P^T do + (e^(c_last - c) k) dS', P = q k^T * D and dR = (I + A)^-T dN:

        dS = e^(c_last) dS' + q^T (e^c do) - k^T (beta e^c dR)        dA = -dR N^T        dP = do N^T
    """
    q, k, v, g, beta = inputs
    w = _Within(q, k, v, g, beta, cut)
    shape = (w.v.shape[0], *w.v.shape[1:3], q.shape[2], v.shape[2])
    states, ns = w.v.new_empty(shape), torch.empty_like(w.v, memory_format=torch.contiguous_format)
    state = w.v.new_zeros(cut.counts[0], *shape[1:])
    for at in w.at:
        states[at] = state = state[: at.stop - at.start]
        ns[at] = n = w.corrections(at, state)
        state = w.next_state(at, state, n)
    # of slots without a token it is zero
    do = do.new_zeros(len(cut.source), *do.shape[1:], dtype=ns.dtype).index_copy_(
        0, cut.slot, do.to(ns.dtype).mul(w.scale)
    )
    do = do.unflatten(0, (-1, cut.size)).transpose(1, 2).contiguous().view(ns.shape)
    drs, grown_do = torch.empty_like(ns), do * w.grown
    dk = ns.new_empty(*ns.shape[:-1], q.shape[2])  # of e^(c_last - c) k, at first
    dlast = ns.new_empty(*ns.shape[:3], 1, 1)
    ds = state.new_zeros(0, *shape[1:])
    for at in w.at[::-1]:
        ds = torch.cat((ds, ds.new_zeros(at.stop - at.start - len(ds), *shape[1:])))  # documents that end here
        dn = (w.p[at].mT @ do[at]).add_((w.k[at] * w.rest[at]) @ ds)
        drs[at] = dr = w.inverse[at].mT @ dn
        torch.matmul(ns[at], ds.mT, out=dk[at])
        dlast[at] = (states[at] * ds).sum((-1, -2), keepdim=True)
        ds = (ds * w.whole[at]).add_(w.q[at].mT @ grown_do[at]).sub_(w.k[at].mT @ (dr * w.beta[at] * w.grown[at]))
    # S' = e^(c_last) S + (e^(c_last - c) k)^T N
    dk *= w.rest
    dc = -(dk * w.k).sum(-1, keepdim=True)
    dc[..., -1:, :] += dlast * w.whole - dc.sum(-2, keepdim=True)
    # o = e^c (q S) + P N
    dq = grown_do @ states.mT
    dc += (dq * w.q).sum(-1, keepdim=True)
    dp = do @ ns.mT
    of_p = dp * w.p
    dp *= w.d
    dq += dp @ w.k
    dk += dp.mT @ w.q
    # R = beta (v - e^c (k S))
    of_ks = (drs * w.grown) @ states.mT
    seen = (of_ks * w.k).sum(-1, keepdim=True)
    dbeta = (drs * w.v).sum(-1, keepdim=True) - seen
    dk -= of_ks.mul_(w.beta)
    dc -= seen * w.beta
    # A = beta k k^T * D below the diagonal; D_ij = e^(c_i - c_j)
    da = (drs @ ns.mT).neg_().mul_(w.d).tril_(-1)
    of_d = da * w.kk
    dbeta += of_d.sum(-1, keepdim=True)
    of_d = of_d.mul_(w.beta).add_(of_p)
    dc += of_d.sum(-1, keepdim=True) - of_d.sum(-2)[..., None]
    da *= w.beta
    dk += (da + da.mT) @ w.k
    dg = dc.flip(-2).cumsum(-2).flip(-2)
    dq, dk = (_of_units(d.sum(2), x.squeeze(2), r) for d, x, r in ((dq, w.q, w.rq), (dk, w.k, w.rk)))
    numbers = (_out_of(d.flatten(1, 2).squeeze(-1), cut) for d in (dg, dbeta))
    return _out_of(dq, cut), _out_of(dk, cut), _out_of((drs * w.beta).flatten(1, 2), cut), *numbers


def _of_units(d: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """The gradient through x = r y of unit length, for y."""
    return (d - x * torch.linalg.vecdot(x, d)[..., None]).mul_(r)


def _parts(q: Tensor, v: Tensor, cut: Cut) -> list[tuple[slice, slice]]:
    """Heads of q and of v that are computed together."""
    each = v.shape[1] // q.shape[1]
    step = max(1, AT_ONCE // (len(cut.source) * each * v.shape[2]))
    parts = [(slice(i, i + step), slice(i * each, (i + step) * each)) for i in range(0, q.shape[1], step)]
    return parts[:1] if v.is_meta else parts


class _OnTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cut: Cut) -> Tensor:
        ctx.save_for_backward(q, k, v, g, beta)
        ctx.cut = cut
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        for few, many in _parts(q, v, cut):
            o[:, many] = _forward(q[:, few], k[:, few], v[:, many], g[:, many], beta[:, many], cut, None)[0]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        (do,), inputs, cut = grads, ctx.saved_tensors, ctx.cut
        found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
        for few, many in _parts(inputs[0], inputs[2], cut):
            parts = few, few, many, many, many
            given = [t[:, part] for t, part in zip(inputs, parts, strict=True)]
            for into, d, part in zip(found, _backward(do[:, many], given, cut), parts, strict=True):
                into[:, part] = d
        return *(d if needed else None for d, needed in zip(found, ctx.needs_input_grad, strict=False)), None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Sequence[int], chunk: int = CHUNK
) -> Tensor:
    """o [T, H, U] in the dtype of v for the documents of a stream, whose bounds cu_seqlens [S + 1] are.

    q, k [T, G, E] and v [T, H, U] of one dtype, which may be columns of a wider matrix; g and beta [T, H] in fp32 or wider.
    chunk, a power of two, changes nothing beyond rounding. ValueError for other shapes.
    """
    _check(q, k, v, g, beta, cu_seqlens)
    if fla.runs_on_fla(q, v):
        return fla.delta_rule(q, k, v, g, beta, cu_seqlens)
    return recording(_OnTorch)(q, k, v, g, beta, Cut.of(cu_seqlens, chunk, v.device))


@torch.no_grad()
def gated_delta_rule_with_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Sequence[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same from the states [S, H, E, U] that documents begin with, None for zero, and the states that they end with."""
    _check(q, k, v, g, beta, cu_seqlens)
    if state is not None and len(cu_seqlens) == len(v) + 1:  # a token of each document
        return _step(q, k, v, g, beta, state)
    cut, groups = Cut.of(cu_seqlens, CHUNK, v.device), (q.shape[1], -1)
    before = None if state is None else state.index_select(0, cut.order).unflatten(1, groups)
    o, after = _forward(q, k, v, g, beta, cut, before)
    return o, torch.empty_like(after).index_copy_(0, cut.order, after).flatten(1, 2)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token a document, as the specification has it."""
    q, k = (_unit(x.to(state.dtype)).repeat_interleave(v.shape[1] // x.shape[1], dim=1)[:, :, None] for x in (q, k))
    state = state * g[..., None, None].to(state.dtype).exp()
    error = (v.to(state.dtype)[:, :, None] - k @ state).mul_(beta[..., None, None].to(state.dtype))
    state = state.addcmul_(k.mT, error)
    return (q @ state).squeeze(2).mul_(k.shape[-1] ** -0.5).to(v.dtype), state


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Sequence[int]) -> None:
    check_same("gated_delta_rule", q=q, k=k, v=v)
    if q.dim() != 3 or q.shape != k.shape or v.dim() != 3 or len(q) != len(v) or v.shape[1] % q.shape[1]:
        raise ValueError(
            f"gated_delta_rule: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; "
            "it takes twice [T, G, E] and [T, H, U], H a multiple of G"
        )
    if g.shape != v.shape[:2] or beta.shape != g.shape:
        raise ValueError(
            f"gated_delta_rule: g {list(g.shape)}, beta {list(beta.shape)}; both must be {list(v.shape[:2])}"
        )
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(v) or any(a > b for a, b in pairwise(cu_seqlens)) or len(v) == 0:
        raise ValueError(f"gated_delta_rule: cu_seqlens {list(cu_seqlens)} must go up from 0 to the {len(v)} tokens")


def example(
    lengths: list[int], groups: int, heads: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple, dict]:
    """Arguments of one call with E and U of size, and the flops and bytes that a perfect forward needs."""
    tokens, wide = sum(lengths), torch.promote_types(dtype, torch.float32)
    q, k = (torch.randn(tokens, groups, size, device=device, dtype=dtype) for _ in range(2))
    v = torch.randn(tokens, heads, size, device=device, dtype=dtype)
    g = -F.softplus(torch.randn(tokens, heads, device=device, dtype=wide))
    beta = torch.rand(tokens, heads, device=device, dtype=wide)
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    moved = (2 * q.numel() + 2 * v.numel()) * v.element_size() + 2 * g.numel() * g.element_size()
    return (q, k, v, g, beta, cu_seqlens), {"flops": 6 * tokens * heads * size * size, "bytes": moved}
