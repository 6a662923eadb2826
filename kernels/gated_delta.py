"""The gated delta rule: a memory that forgets and corrects itself, by documents (Yang, Kautz and Hatamizadeh, 2024).

A value head has a state S [E, U], zero at the start of each document. With k and q of unit length, q divided by sqrt(E),
for each token

    S = e^g S        S = S + k (beta (v - S^T k))^T        o = S^T q

q, k [T, G, E], v [T, H, U], g (never positive) and beta [T, H]: H value heads, H / G for each of G key heads.

A CPU takes CHUNK tokens at a time as matrix products (Yang et al., 2024, "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length"). With c the sum of g from the start of a chunk, D_ij = e^(c_i - c_j) for i >= j, and S the state
that the chunk begins with:

    A = beta k k^T * D below the diagonal      M = (I + A)^-1 beta e^c k      N = (I + A)^-1 beta v - M S
    o = e^c q S + (q k^T * D) N                S' = e^(c_last) S + (e^(c_last - c) k)^T N

Only N and S' need the chunk before: a loop along the documents has two products. All else is computed at once for the chunks of
all documents and some heads. (I + A)^-1 is made of inverses of half the size, which is as stable as solving row by row. All is
fp32 (fp64 for fp64). Saved for the backward: what was given; the rest is made again. A GPU runs Flash Linear Attention's kernels where they are installed (fla.py), else this.
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
AT_ONCE = (
    1 << 18
)  # values of v that go through the chunks together, with states of four times the size: what a CPU's cache holds


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


class Step(NamedTuple):
    """Chunks of a step along the documents, those of them whose documents go on, and the chunks that these go on with."""

    all: slice
    going_on: slice
    following: slice


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

    def steps(self) -> list[Step]:
        ends, following = list(accumulate(self.counts)), [*self.counts[1:], 0]
        return [
            Step(slice(end - n, end), slice(end - n, end - n + more), slice(end, end + more))
            for n, end, more in zip(self.counts, ends, following, strict=True)
        ]


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


class _Chunks:
    """The matrices of the chunks of some heads: [chunks, G, H / G, size, ...], with 1 in the place of H / G for q and k.

    All but n and states is computed without a state; `walk` completes these two.
    """

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
        self.seeing, self.written = self.q * self.grown, self.k * self.rest  # e^c q and e^(c_last - c) k
        self.m = self.inverse @ (self.k * (self.beta * self.grown))
        self.n = self.inverse @ _times(self.v, self.beta)  # less M S, in `walk`
        self.states = self.n.new_empty(*self.n.shape[:3], q.shape[-1], v.shape[-1])
        self.steps = cut.steps()
        if v.is_meta:  # without data one step tells what all of them take (machine/dry_run.py)
            del self.steps[1:]

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of unit length, without gaps, and what each was multiplied with."""
        r = torch.linalg.vecdot(x, x)[..., None].add_(EPS).rsqrt_()
        return _times(x, r), r

    def walk(self, state: Tensor | None) -> None:
        """N of all chunks and the states that they begin with, from those of the documents [S, G, H / G, E, U], None for zero."""
        first = self.states[self.steps[0].all]
        first.zero_() if state is None else first.copy_(state)
        for step, going_on, following in self.steps:
            _add_product(self.n[step], self.m[step], self.states[step], -1)
            self.next_states(going_on, self.states[following])

    def next_states(self, at: slice | Tensor, out: Tensor) -> Tensor:
        """The states after chunks."""
        torch.mul(self.states[at], self.whole[at], out=out)
        return _add_product(out, self.written[at].mT, self.n[at])


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x * y without gaps, whatever x is a view of."""
    return torch.mul(x, y, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _add_product(to: Tensor, a: Tensor, b: Tensor, alpha: int = 1) -> Tensor:
    """to += alpha a @ b, of stacks of matrices without gaps between them."""
    to.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2), alpha=alpha)
    return to


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
) -> tuple[Tensor, _Chunks]:
    """o of some heads [T, H, U], and their chunks."""
    w = _Chunks(q, k, v, g, beta, cut)
    w.walk(state)
    out = _add_product(w.p @ w.n, w.seeing, w.states)
    return _out_of(out.flatten(1, 2), cut).mul_(w.scale).to(v.dtype), w


def _backward(do: Tensor, inputs: Sequence[Tensor], cut: Cut) -> tuple[Tensor, ...]:
    """dq, dk, dv, dg, dbeta of some heads.

    With dS' of the state after a chunk and dR of beta (v - e^c k S), which (I + A)^-1 makes N:

        dN = P^T do + (e^(c_last - c) k) dS'        dS = e^(c_last) dS' + (e^c q)^T do - M^T dN
        dR = (I + A)^-T dN                          dA = -dR N^T        dP = do N^T
    """
    q, k, v, g, beta = inputs
    w = _Chunks(q, k, v, g, beta, cut)
    w.walk(None)
    # of slots without a token it is zero
    do = do.new_zeros(len(cut.source), *do.shape[1:], dtype=w.n.dtype).index_copy_(
        0, cut.slot, do.to(w.n.dtype).mul(w.scale)
    )
    do = do.unflatten(0, (-1, cut.size)).transpose(1, 2).contiguous().view(w.n.shape)
    dn, ds = w.p.mT @ do, w.seeing.mT @ do
    dwritten, dwhole = torch.zeros_like(w.written), torch.zeros_like(w.whole)
    for step, going_on, following in w.steps[::-1]:
        after = ds[following]
        _add_product(dn[going_on], w.written[going_on], after)
        _add_product(dwritten[going_on], w.n[going_on], after.mT)
        dwhole[going_on] = (w.states[going_on] * after).sum((-1, -2), keepdim=True)
        _add_product(ds[step], w.m[step].mT, dn[step], -1)
        ds[going_on].addcmul_(after, w.whole[going_on])
    # S' = e^(c_last) S + (e^(c_last - c) k)^T N
    dk = (dwritten * w.rest).sum(2)
    dc = -(dwritten.mul_(w.written)).sum(-1, keepdim=True)
    dc[..., -1:, :] += dwhole * w.whole - dc.sum(-2, keepdim=True)
    # o = e^c q S + P N
    dseeing = do @ w.states.mT
    dq = (dseeing * w.grown).sum(2)
    dc += dseeing.mul_(w.seeing).sum(-1, keepdim=True)
    dp = do @ w.n.mT
    of_p = dp * w.p
    dp = dp.mul_(w.d).sum(2)
    q, k = w.q.squeeze(2), w.k.squeeze(2)
    dq += dp @ k
    dk += dp.mT @ q
    # R = beta (v - e^c k S)
    dr = w.inverse.mT @ dn
    of_ks = (dr @ w.states.mT).mul_(w.grown)
    seen = (of_ks * w.k).sum(-1, keepdim=True)
    dbeta = (dr * w.v).sum(-1, keepdim=True) - seen
    dk -= of_ks.mul_(w.beta).sum(2)
    dc -= seen * w.beta
    # A = beta k k^T * D below the diagonal; D_ij = e^(c_i - c_j)
    da = (dr @ w.n.mT).neg_().mul_(w.d).tril_(-1)
    of_d = da * w.kk
    dbeta += of_d.sum(-1, keepdim=True)
    of_d = of_d.mul_(w.beta).add_(of_p)
    dc += of_d.sum(-1, keepdim=True) - of_d.sum(-2)[..., None]
    da = da.mul_(w.beta).sum(2)
    dk += (da + da.mT) @ k
    dg = dc.flip(-2).cumsum(-2).flip(-2)
    dq, dk = (_of_units(*parts) for parts in ((dq, q, w.rq), (dk, k, w.rk)))
    numbers = (_out_of(d.flatten(1, 2).squeeze(-1), cut) for d in (dg, dbeta))
    return _out_of(dq, cut), _out_of(dk, cut), _out_of((dr * w.beta).flatten(1, 2), cut), *numbers


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
    o, w = _forward(q, k, v, g, beta, cut, before)
    last = cut.slot[torch.tensor(cu_seqlens[1:]) - 1] // cut.size  # chunk of each document's last token
    after = w.next_states(last, torch.empty_like(w.states[: len(last)]))
    return o, after.flatten(1, 2)


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
