"""Every operation as a function of plain arguments, with its reference, the formulations of others and what it needs at least.

The table of times (bench/kernels.py) and the check of results (bench/proof/parity.py) go over the same list: `of_model` has the
operations of one layer and the loss at a model's sizes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import formulations as others
from bench.proof.traffic import Cost
from bench.shapes import Shape
from minilora.kernels import (
    attention,
    cross_entropy,
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    lora_swiglu,
    rms_norm,
    rope,
    swiglu,
)
from minilora.kernels.fp8_blocks import FP8Weight
from minilora.kernels.int8_rows import Int8Weight
from minilora.kernels.nf4 import NF4Weight
from minilora.kernels.projection import Adapter, Projection
from minilora.kernels.quantized import QuantizedWeight

RANK = 16
CPU = torch.device("cpu")


class Operation(NamedTuple):
    """A call: operation and reference, arguments, which of them are trained, the least cost, the peers by name."""

    op: Callable[..., Any]
    ref: Callable[..., Any]
    args: tuple[Any, ...]
    trained: tuple[int, ...]
    cost: Cost
    peers: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    plain: Callable[..., Any] | None = None  # plain torch, where the reference computes in a wider dtype
    ones: bool = False  # what flows in from above: ones, or random numbers


class Entry(NamedTuple):
    """An operation at a size, which is made when it is asked for: the arguments may be gigabytes."""

    op: str
    where: str
    make: Callable[[torch.dtype, torch.device], Operation]

    @property
    def name(self) -> str:
        return f"{self.op} {self.where}"


def leaves(operation: Operation, wide: bool = False) -> list[Any]:
    """The arguments, in fp64 if wide, of which the trained ones require grad."""

    def leaf(i: int, a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return (a.double() if wide else a).detach().requires_grad_(i in operation.trained)

    return [leaf(i, a) for i, a in enumerate(operation.args)]


def outputs(out: Any) -> list[Tensor]:
    """What can be differentiated of what an operation gives."""
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]


def both_ways(side: Callable[..., Any], args: Sequence[Any], dys: Sequence[Tensor]) -> list[Tensor | None]:
    """Outputs, and the gradients of the arguments that require grad for the upstream gradients dys; None where there is none."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = outputs(side(*args))
    if not inputs:
        return [*out]
    into = [dy.to(o.dtype) for dy, o in zip(dys, out, strict=True)]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, inputs, into, allow_unused=True)]


def present(found: list[Tensor | None]) -> list[Tensor]:
    assert all(f is not None for f in found), "a gradient is missing"
    return [f for f in found if f is not None]


def upstream(operation: Operation) -> list[Tensor]:
    """Gradients for the outputs of the operation."""
    fill = torch.ones_like if operation.ones else torch.randn_like
    with torch.no_grad():  # by plain torch: that our kernel fails is not to cost the others their figures
        return [fill(o) for o in outputs((operation.plain or operation.ref)(*operation.args))]


def passes(values: int, dtype: torch.dtype, forward: int, backward: int) -> Cost:
    """The cost of going over so many values so many times."""
    size = values * dtype.itemsize
    return Cost(0, forward * size, 0, backward * size)


def norm(rows: int, n: int, trained: tuple[int, ...] = (0,), once: bool = False, offset: float = 0.0) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, _ = rms_norm.example(rows, n, dtype, str(device), offset, once)
        peers: dict[str, Callable[..., Any]] = {}
        if not once and not offset:
            peers = {"hf": lambda x, w, eps, *_: others.hf_rms_norm(x, w, eps)}
            peers |= others.installed("rms_norm")
        return Operation(rms_norm.rms_norm, rms_norm.rms_norm_ref, args, trained, passes(rows * n, dtype, 2, 3), peers)

    return Entry("rms_norm", f"{rows} x {n}" + ", once" * once, make)


def add_norm(rows: int, n: int, trained: tuple[int, ...] = (0, 1), once: bool = False) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, _ = rms_norm.add_example(rows, n, dtype, str(device), round_once=once)
        cost = passes(rows * n, dtype, 4, 4)
        peers = {} if once else {"hf": lambda x, r, w, eps, *_: others.hf_add_rms_norm(x, r, w, eps)}
        return Operation(rms_norm.add_rms_norm, rms_norm.add_rms_norm_ref, args, trained, cost, peers)

    return Entry("add_rms_norm", f"{rows} x {n}" + ", once" * once, make)


def rotate(tokens: int, heads: int, size: int, rotated: int | None = None, interleaved: bool = False) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, _ = rope.example(tokens, heads, size, dtype, str(device), rotated, interleaved)
        peer = others.hf_rope_interleaved if interleaved else others.hf_rope
        peers = {"hf": lambda x, cos, sin, _: peer(x, cos, sin)}
        if rotated is None and not interleaved:
            peers |= others.installed("rope")
        return Operation(rope.rope, rope.rope_ref, args, (0,), passes(args[0].numel(), dtype, 2, 2), peers)

    form = (f" of which {rotated}" if rotated else "") + " interleaved" * interleaved
    return Entry("rope", f"{tokens} x {heads} x {size}{form}", make)


def turn_sections(tokens: int, heads: int, size: int) -> Entry:
    """The two halves of a head by angles of their own, as ChatGLM-6B."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        (x, cos, sin, _), _ = rope.example(tokens, heads, size, dtype, str(device))
        args = (x, *(angle.unflatten(-1, (2, -1)) for angle in (cos, sin)), False)
        return Operation(rope.rope, rope.rope_ref, args, (0,), passes(x.numel(), dtype, 2, 2))

    return Entry("rope", f"{tokens} x {heads} x {size} in 2 sections", make)


def gate(rows: int, f: int) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, _ = swiglu.example(rows, f, dtype, str(device))
        peers = {"hf": others.hf_swiglu, **others.installed("swiglu")}
        return Operation(swiglu.swiglu, swiglu.swiglu_ref, args, (0, 1), passes(rows * f, dtype, 3, 5), peers)

    return Entry("swiglu", f"{rows} x {f}", make)


def gate_fused(rows: int, f: int) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, _ = swiglu.fused_example(rows, f, dtype, str(device))
        peers = {"hf": lambda gu: others.hf_swiglu(*gu.chunk(2, dim=-1))}
        cost = passes(rows * f, dtype, 3, 5)
        return Operation(swiglu.swiglu_fused, swiglu.swiglu_fused_ref, args, (0,), cost, peers)

    return Entry("swiglu_fused", f"{rows} x 2 x {f}", make)


def linear(name: str, tokens: int, k: int, n: int, r: int = RANK, p: float = 0.0) -> Entry:
    """One linear with an adapter: x, w, bias, a, b, scale."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        (x, [(w, bias, adapter)]), cost = lora_linear.group_example(tokens, k, (n,), r, dtype, str(device), p)
        assert adapter is not None
        args = (x, w, bias, adapter.a, adapter.b, adapter.scale, p, adapter.key)
        peers = {
            label: lambda *args, peer=peer: peer(*args[:6])
            for label, peer in {**others.LORA_LINEARS, **others.installed("lora_linear")}.items()
            if not p
        }
        return Operation(lora_linear.lora_linear, lora_linear.lora_linear_ref, args, (0, 3, 4), Cost(**cost), peers)

    return Entry("lora_linear", f"{name} {tokens} x {k} -> {n}, r={r}" + f", dropout {p}" * bool(p), make)


def flat(x: Tensor, projections: Sequence[Projection]) -> tuple[tuple[Any, ...], tuple[int, ...], Callable[..., Any]]:
    """(x, w, bias, a, b, w, bias, ...), the places of x, a and b in it, and what makes the projections of it again."""
    args: list[Any] = [x]
    trained = [0]
    for p in projections:
        args += [p.weight, p.bias]
        if p.adapter:
            trained += [len(args), len(args) + 1]
            args += [p.adapter.a, p.adapter.b]

    def again(*flat: Any) -> list[Projection]:
        rest, made = iter(flat), []
        for p in projections:
            weight, bias = next(rest), next(rest)
            adapter = p.adapter and p.adapter._replace(a=next(rest), b=next(rest))
            made.append(Projection(weight, bias, adapter))
        return made

    return tuple(args), tuple(trained), again


def members(
    tokens: int, k: int, ns: Sequence[int], ranks: Sequence[int], p: float, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, list[Projection]], Cost]:
    """A group whose ranks may differ; a member of rank 0 has no adapter and no bias."""
    (x, projections), cost = lora_linear.group_example(tokens, k, tuple(ns), max(ranks), dtype, str(device), p)
    found = []
    for (weight, bias, adapter), r in zip(projections, ranks, strict=True):
        assert adapter is not None
        cut = adapter._replace(a=adapter.a[:r].contiguous(), b=adapter.b[:, :r].contiguous())
        found.append(Projection(weight, bias if r else None, cut if r else None))
    return (x, found), Cost(**cost)


def group(
    name: str, tokens: int, k: int, ns: Sequence[int], ranks: Sequence[int] | None = None, p: float = 0.0
) -> Entry:
    """Linears of one x."""
    ranks = ranks or [RANK] * len(ns)

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        (x, projections), cost = members(tokens, k, ns, ranks, p, dtype, device)
        args, trained, again = flat(x, projections)

        def of(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: function(x, again(*rest))

        def term_by_term(peer: Callable[..., Tensor]) -> Callable[..., Any]:
            def each(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
                return tuple(peer(x, q.weight, q.bias, *adapter_of(q)[:3]) for q in again(*rest))

            return each

        peers = {}
        if not p and all(ranks):
            peers = {label: term_by_term(peer) for label, peer in others.LORA_LINEARS.items()}
            if len(ns) == 3:
                peers |= {label: of(peer) for label, peer in others.installed("lora_qkv").items()}
        ours, ref = lora_linear.lora_linear_group, lora_linear.lora_linear_group_ref
        return Operation(of(ours), of(ref), args, trained, cost, peers)

    widths, by = " + ".join(map(str, ns)), ", ".join(map(str, dict.fromkeys(ranks)))
    return Entry("lora_linear_group", f"{name} {tokens} x {k} -> {widths}, r={by}" + f", dropout {p}" * bool(p), make)


def quantized(name: str, form: type[QuantizedWeight], tokens: int, k: int, ns: Sequence[int], p: float = 0.0) -> Entry:
    """Linears of one x whose weights are quantised."""
    plain = group(name, tokens, k, ns, p=p)

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        made = plain.make(dtype, device)
        args = [form.of(a) if i % 4 == 1 else a for i, a in enumerate(made.args)]  # x, then w, bias, a, b of each
        less = sum(w.nbytes - codes.nbytes for w, codes in zip(made.args[1::4], args[1::4], strict=True))
        cost = made.cost._replace(bytes=made.cost.bytes - less, backward_bytes=made.cost.backward_bytes - less)
        return made._replace(args=tuple(args), cost=cost, peers={})

    return Entry("lora_linear_group", f"{form.name} {plain.where}", make)


def adapter_of(projection: Projection) -> Adapter:
    assert projection.adapter is not None
    return projection.adapter


def dual(tokens: int, k: int, f: int, r: int = RANK, p: float = 0.0, fused: bool = False) -> Entry:
    """SwiGLU of two linears where no backward follows, or of one that is both."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        example = lora_swiglu.fused_example if fused else lora_swiglu.example
        (x, projections), cost = example(tokens, k, f, r, dtype, str(device), p)
        args, _, again = flat(x, projections)

        def of(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, *rest: function(x, again(*rest))

        def pair(peer: Callable[..., Tensor]) -> Callable[..., Any]:
            def h(x: Tensor, *rest: Any) -> Tensor:
                ys = [peer(x, q.weight, q.bias, *adapter_of(q)[:3]) for q in again(*rest)]
                return others.hf_swiglu(*(ys[0].chunk(2, -1) if fused else ys))

            return h

        peers = {} if p else {label: pair(peer) for label, peer in others.LORA_LINEARS.items()}
        least = Cost(cost["flops"], cost["bytes"], 0, 0)
        return Operation(of(lora_swiglu.lora_swiglu), of(lora_swiglu.lora_swiglu_ref), args, (), least, peers)

    form = ", fused" * fused + f", dropout {p}" * bool(p)
    return Entry("lora_swiglu", f"{tokens} x {k} -> 2 x {f}, r={r}{form}", make)


def mlp(tokens: int, d: int, f: int, r: int = RANK, p: float = 0.0, joined: bool = False) -> Entry:
    """Gate, up, SwiGLU and down; gate and up may be one linear."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        (x, gate_up, down), cost = lora_mlp.example(tokens, d, f, r, dtype, str(device), p, joined)
        args, trained, again = flat(x, [*gate_up, down])

        def of(function: Callable[..., Any]) -> Callable[..., Any]:
            def y(x: Tensor, *rest: Any) -> Tensor:
                *first, last = again(*rest)
                return function(x, first, last)

            return y

        def term_by_term(peer: Callable[..., Tensor]) -> Callable[..., Any]:
            def y(x: Tensor, first: list[Projection], last: Projection) -> Tensor:
                gu = [peer(x, q.weight, q.bias, *adapter_of(q)[:3]) for q in first]
                h = others.hf_swiglu(*(gu[0].chunk(2, -1) if joined else gu))
                return peer(h, last.weight, last.bias, *adapter_of(last)[:3])

            return of(y)

        peers = {} if p else {label: term_by_term(peer) for label, peer in others.LORA_LINEARS.items()}
        return Operation(of(lora_mlp.lora_mlp), of(lora_mlp.lora_mlp_ref), args, trained, Cost(**cost), peers)

    form = ", joined" * joined + f", dropout {p}" * bool(p)
    return Entry("lora_mlp", f"{tokens} x {d} -> {f} -> {d}, r={r}{form}", make)


def attend(
    lengths: Sequence[int], heads: int, groups: int, size: int, window: int | None = None, prefix: int | None = None
) -> Entry:
    """The reference goes document by document: its scores of the whole stream would not fit."""

    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        (q, k, v, cu_seqlens), cost = attention.example(list(lengths), heads, groups, size, dtype, str(device))
        prefix_lens = None if prefix is None else [min(prefix, n) for n in lengths]

        def by_document(one: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def alone(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
                parts = []
                for i, (start, end) in enumerate(pairwise(cu_seqlens)):
                    own = None if prefix_lens is None else [prefix_lens[i]]
                    span = slice(start, end)
                    parts.append(one(q[span], k[span], v[span], [0, end - start], window, own))
                return torch.cat(parts)

            return alone

        size_of = dtype.itemsize * (2 * q.numel() + 2 * k.numel())
        # the backward makes the scores again, then four more products of their size
        least = Cost(cost["flops"], size_of, 2.5 * cost["flops"], 2 * size_of)
        plain = window is None and prefix is None
        peers = {"sdpa, by document": others.sdpa_by_document} if plain else {}
        args, ref = (q, k, v, cu_seqlens, window, prefix_lens), by_document(attention.attention_ref)
        return Operation(attention.attention, ref, args, (0, 1, 2), least, peers, by_document(others.eager_attention))

    form = "" if window is None else f", window {window}"
    form += "" if prefix is None else f", prefix {prefix}"
    return Entry("attention", f"{len(lengths)} documents, {sum(lengths)} x {heads} / {groups} x {size}{form}", make)


def loss(rows: int, vocab: int) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, cost = cross_entropy.example(rows, vocab, dtype, str(device))
        peers = {"hf": others.hf_cross_entropy, **others.installed("cross_entropy")}
        least = Cost(0, cost["bytes"], 0, cost["backward_bytes"])
        ours, ref = cross_entropy.cross_entropy, cross_entropy.cross_entropy_ref
        return Operation(ours, ref, args, (0,), least, peers)

    return Entry("cross_entropy", f"{rows} x {vocab}", make)


def linear_loss(rows: int, width: int, vocab: int, trained: tuple[int, ...] = (0,)) -> Entry:
    def make(dtype: torch.dtype, device: torch.device) -> Operation:
        args, cost = linear_cross_entropy.example(rows, width, vocab, dtype, str(device))
        peers = {"hf": others.hf_linear_cross_entropy, **others.installed("linear_cross_entropy")}
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            peers["torch"] = others.torch_linear_cross_entropy
        size, half = dtype.itemsize, cost["flops"] / 2
        # dx comes from the logits of the forward: what goes in is read once, and dx written
        least = Cost(half, size * width * (rows + vocab), half * len(trained), size * width * rows)
        ours, ref = linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.linear_cross_entropy_ref
        return Operation(ours, ref, args, trained, least, peers)

    head = ", trained head" if 1 in trained else ""
    return Entry("linear_cross_entropy", f"{rows} x {width} x {vocab}{head}", make)


def of_model(model: str, s: Shape, m: int) -> Iterator[Entry]:
    """The operations of one layer at m tokens, and the loss, the products of matrices first: most of a step's time is theirs.

    Half of the tokens have targets; logits are those of a quarter.
    """
    document = max(1, m // 8)
    lengths = [min(document, m - start) for start in range(0, m, document)]
    chatglm, glm = model == "chatglm-6b", model.startswith("glm-4")
    if chatglm:
        yield linear("q, k, v", m, s.width, 3 * s.query)
        yield linear("up", m, s.width, s.ffn)
    else:
        yield group("q, k, v", m, s.width, (s.query, s.kv, s.kv))
        if glm:
            yield linear("gate and up", m, s.width, 2 * s.ffn)
        else:
            yield group("gate, up", m, s.width, (s.ffn, s.ffn))
            yield linear("gate", m, s.width, s.ffn)
        yield dual(m, s.width, s.ffn, fused=glm)
    yield linear("down", m, s.ffn, s.width)
    yield linear("o", m, s.query, s.width)
    yield linear_loss(max(1, m // 2), s.width, s.vocab)
    yield attend(lengths, s.heads, s.kv_heads, s.head_size, prefix=document // 2 if chatglm else None)
    if chatglm:
        yield turn_sections(m, s.heads, s.head_size)
    else:
        yield norm(m, s.width)
        yield add_norm(m, s.width)
        yield rotate(m, s.heads, s.head_size, s.head_size // 2 if glm else None, glm)
        yield (gate_fused if glm else gate)(m, s.ffn)
        yield mlp(m, s.width, s.ffn, joined=glm)
    if model == "qwen2.5-7b":  # settles kernels/dequantize.py's ROWS_IN_THE_LOOP
        for rows in (1, 16, 128, 256, 512, 1024, 2048):
            yield quantized("gate, up", NF4Weight, rows, s.width, (s.ffn, s.ffn))
        for form in (Int8Weight, FP8Weight):
            yield quantized("gate, up", form, 512, s.width, (s.ffn, s.ffn))
    yield loss(max(1, m // 4), s.vocab)
