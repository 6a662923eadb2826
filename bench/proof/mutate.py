"""Plant faults in the kernels, two models and the engine, one at a time in a copy of the repository, and see which of them the tests notice.

    python -m bench.proof.mutate [--each 2] [--per-file 4] [--only kernels/rms_norm] [--list]

A fault is a change of the syntax tree (a mask dropped, a sign turned, a rounding, an fsync or a check forgotten ...), so the faults
follow the code as it changes. Of every kind `--each` are planted in every file, spread over it. References, examples, the choice of
tiles and what only tells the user something are left alone: the first two are what the tests compare with, the others change no result.
Of the engine the files are those of ENGINE. In the routers and the gated DeltaNet of models/ the faults are written out (BY_HAND):
mistakes that others made there. A fault is killed when the file's tests fail or run for too long. Exit code 1 when fewer than 95 % are
killed.
"""

import argparse
import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from minilora.files.atomic import write_file

ROOT = Path(__file__).parent.parent.parent
GATE = 0.95
LEFT_ALONE = re.compile(
    r"_ref$|example$|^_tile|^_grid|^_config|^use_triton$|^kernels_enabled$|_note$|^_header$|_not_read$|^long_row$"
)
# functions, and names of texts below, that nothing is computed from
TELLS = {"print", "say", "quote", "begin", "reached"}
TEXTS = {"what", "hint", "told", "shown", "reason"}
ON_GPUS = re.compile(r"is_cuda|_computed|type == 'cuda'")  # conditions; bench.gpu is the proof there
# arguments that change how a file looks or where a tensor lies, not what is in it; strict is an assertion
FORM = {"strict", "indent", "separators", "ensure_ascii", "encoding", "device", "non_blocking", "digest_size"}
# operations whose shared tests run on the interpreter too
WITH_KERNELS = r"rms_norm|swiglu|(?<![a-z])rope|cross_entropy|lora_linear"
SECONDS = {"1": 600, "0": 600, "engine": 100}  # of a processor, for the tests of one fault


class Fault(NamedTuple):
    file: str
    kind: str
    function: str
    line: int
    start: int  # in bytes of the file, as the syntax tree counts
    end: int
    new: str

    def old(self, source: str) -> str:
        return " ".join(source.encode()[self.start : self.end].decode().split())

    def planted(self, source: str) -> str:
        whole = source.encode()
        return (whole[: self.start] + self.new.encode() + whole[self.end :]).decode()

    def told(self, source: str) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.old(source)}  ->  {self.new or 'nothing'}"


Change = tuple[str, ast.AST, str]  # kind, what is replaced, by what


def _call(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _masks(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    """A mask that lets everything through, of the same shape."""
    if _call(node) in ("load", "store") and len(node.args) > 1:  # pyright: ignore[reportAttributeAccessIssue]
        mask = node.args[1 if _call(node) == "load" else 2]  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(mask, ast.Constant):
            yield "mask dropped", mask, f"({text(mask)}) == ({text(mask)})"
    if _call(node) in ("tl.load", "tl.store"):
        for keyword in node.keywords:  # pyright: ignore[reportAttributeAccessIssue]
            if keyword.arg == "mask":
                yield "mask dropped", keyword.value, f"({text(keyword.value)}) == ({text(keyword.value)})"


def _comparisons(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    others = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in others:
        left, right = text(node.left), text(node.comparators[0])
        kind = "off by one" if type(node.ops[0]) in (ast.Lt, ast.LtE, ast.Gt, ast.GtE) else "condition turned"
        yield kind, node, f"({left}) {others[type(node.ops[0])]} ({right})"


def _terms(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    if not isinstance(node, ast.BinOp) or any(_tells(side) for side in (node.left, node.right)):
        return  # a text is put together
    left, right = text(node.left), text(node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        yield "sign turned", node, f"({left}) {'-' if isinstance(node.op, ast.Add) else '+'} ({right})"
        yield "term dropped", node, left
    if isinstance(node.op, ast.Mult):
        yield "factor dropped", node, left
        yield "other factor dropped", node, right
    if isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
        yield "division dropped", node, left


def _strides(node: ast.AST, text: Callable[[ast.AST], str], function: ast.AST) -> Iterator[Change]:
    """Another stride, or size, of the same kernel; or the next axis."""
    if isinstance(node, ast.Name) and node.id.endswith("_stride") and isinstance(function, ast.FunctionDef):
        names = [a.arg for a in function.args.args if a.arg.endswith("_stride") or a.arg in ("N", "F", "HALF", "K")]
        if node.id in names and len(names) > 1:
            yield "stride swapped", node, names[(names.index(node.id) + 1) % len(names)]
    if isinstance(node, ast.Call) and _call(node).endswith(".stride") and len(node.args) == 1:
        yield "stride of another axis", node.args[0], {"0": "1", "1": "0", "-1": "0"}.get(text(node.args[0]), "0")


def _roundings(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call) and _call(node) == "rounded":
        yield "rounding forgotten", node, text(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        what = text(node.args[0])
        if not what.endswith("device"):
            yield "int64 forgotten" if "int64" in what else "cast forgotten", node, text(node.func.value)
    if isinstance(node, ast.Name) and node.id == "ACC" and isinstance(node.ctx, ast.Load):
        yield "half accumulator", node, "tl.float16"
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("tl.float32", "torch.float32"):
        yield "half accumulator", node, text(node).replace("32", "16")


def _statements(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement dropped", node, "pass"
    if isinstance(node, ast.AugAssign):
        yield "sum overwritten", node, f"{text(node.target)} = {text(node.value)}"
    if isinstance(node, ast.If | ast.IfExp):
        match node.test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield "condition turned", node.test, text(operand)
            case _:
                yield "condition turned", node.test, f"not ({text(node.test)})"


def _functions(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    others = {
        "tl.exp": "tl.exp2", "tl.exp2": "tl.exp", "tl.log": "tl.log2", "tl.max": "tl.min", "tl.maximum": "tl.minimum",
        "tl.minimum": "tl.maximum", "tl.rsqrt": "tl.sqrt", "tl.abs": "", "cdiv": "int.__floordiv__",
    }  # fmt: skip
    if isinstance(node, ast.Call) and _call(node) in others:
        yield "another function", node.func, others[_call(node)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "minus dropped", node, f"({text(node.operand)})"


def _numbers(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.keyword) and node.arg in ("value", "alpha", "beta", "scale"):
        yield "factor of an update turned", node.value, f"-({text(node.value)})"
    if (
        isinstance(node, ast.Subscript)
        and "needs_input_grad" in text(node.value)
        and isinstance(node.slice, ast.Constant)
    ):
        yield "another gradient's need", node.slice, str(1 - min(1, int(str(node.slice.value))))
    if isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value:
        yield "number changed", node, repr(node.value / 2)


def _decisions(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Raise):
        yield "raise dropped", node, "pass"
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return | ast.Continue | ast.Break):
        yield "early exit dropped", node.body[-1], "pass"
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition always true", node.test, "True"
    if isinstance(node, ast.comprehension):
        yield from (("filter dropped", test, "True") for test in node.ifs)
    if isinstance(node, ast.BoolOp):
        operator = " and " if isinstance(node.op, ast.And) else " or "
        for dropped in node.values:
            yield "operand dropped", node, operator.join(f"({text(v)})" for v in node.values if v is not dropped)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", node, text(node.operand)


def _arguments(node: ast.AST, text: Callable[[ast.AST], str], _: ast.AST) -> Iterator[Change]:
    others = {"min": "max", "max": "min", "any": "all", "all": "any"}
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number off by one", node, str(node.value + 1)
    if isinstance(node, ast.Call):
        if _call(node) in others:
            yield "another function", node.func, others[_call(node)]
        if _call(node) == "sorted":
            yield "order forgotten", node, f"list({text(node.args[0])})"
        for dropped in node.keywords:
            if dropped.arg not in {None, *FORM}:
                kept = ", ".join(text(a) for a in (*node.args, *node.keywords) if a is not dropped)
                yield "argument dropped", node, f"{text(node.func)}({kept})"


MUTATORS = (_masks, _comparisons, _terms, _strides, _roundings, _statements, _functions, _numbers)
OF_THE_ENGINE = (_comparisons, _terms, _roundings, _statements, _functions, _numbers, _decisions, _arguments)
# faults that change nothing that a caller can see, by file, function, kind and the text replaced; each with its reason
EQUIVALENT = {
    ("swiglu", "sigmoid", "off by one", "x >= 0"): "at 0 both branches are 1",
    ("lora_gemm", "as_operand", "cast forgotten", "x.to(DTYPE)"): "on a GPU alone, where it does not compile",
    ("dequantize", "dequantize", "cast forgotten", "tl.load(scales[0] + o_b, mask=m_b, other=0).to(tl.int32)"):
        "offsets are signed in some versions of Triton, on a GPU alone",
    ("dequantize", "dequantize", "cast forgotten", "b_codes.to(tl.int32)"): "the same; codes of 4 bits have no sign",
    ("attention", "_cpu_backward", "cast forgotten", "part.squeeze(0).transpose(0, 1).to(q.dtype)"):
        "autograd casts a gradient to the dtype of its input",
    ("lang", "rounded", "off by one", "(bits & 0x7FFFFFFF) > 0x7F800000"): "infinity has no bits to round",
    ("lora", "LoRALinear.__init__", "number off by one", "0"): "the number of a mask, until the model's have theirs",
    ("lora", "add_lora", "number off by one", "0"): "masks for who sets no keys: any do; or a default of the seed",
    ("lora", "add_lora", "condition always true", "not wrapper.lora_A.is_meta"): "what is drawn for a plan lies nowhere",
    ("train", "train_step", "condition always true", "config.lora_dropout"): "keys of masks that nobody draws",
    ("fit", "streams_on_card", "off by one", "tokens <= most_twice"): "the bound is an estimate",
    ("fit", "stream_tokens", "early exit dropped", "return Streams(usual)"): "it saves a second",
    ("fit", "stream_tokens", "off by one", "longest <= TRIAL"): "the same",
    ("load", "check_shapes", "order forgotten", "sorted(wanted.keys() & found.keys())"): "the order of a message",
    ("step", "StepResult.read", "number off by one", "4"): "how many rows are named",
    ("load", "_check_kind", "order forgotten", "sorted(names)"): "which of several is named",
    ("adapter_config", "refuse_what_is_not_lora", "number changed", "1e30"): "beyond every use",
    ("token_store", "Writer.add", "number off by one", "8"): "another hash of the same tokens",
    ("token_store", "Examples.digest", "number off by one", "16"): "a letter more of a hash",
    ("snapshot", "fill_trained_folder", "number off by one", "1"): "beyond every size",
    ("snapshot", "fill_trained_folder", "number off by one", "62"): "beyond every size",
}  # fmt: skip


# of models/: (what is wrong, what is there, what is planted)
BY_HAND = {
    "models/moe.py": [
        ("no normalisation", "if c.normalise:", "if False:"),
        ("normalised over all experts", "weights.sum(-1, keepdim=True)", "logits.to(wide).sigmoid().sum(-1, keepdim=True)"),
        ("bias in the weight", "scores.gather(1, index)", "(scores + bias).gather(1, index)"),
        ("no bias in the choice", "scores.detach() + bias)", "scores.detach())"),
        ("the worst experts", "logits.softmax(-1, dtype=wide).topk(c.chosen)", "logits.softmax(-1, dtype=wide).topk(c.chosen, largest=False)"),
        ("weights in another order", "weights * c.scale, index", "weights.flip(1) * c.scale, index"),
        ("no scale", "weights * c.scale, index", "weights, index"),
        ("groups by their best expert", "grouped.topk(2)", "grouped.topk(1)"),
        ("no gate of the shared expert", "self.shared_expert_gate(x).sigmoid() * shared", "shared"),
    ],
    "models/qwen3_5.py": [
        ("state not reset", "short_conv(qkv, w, bounds)), g, beta, bounds)", "short_conv(qkv, w, bounds)), g, beta, [0, bounds[-1]])"),
        ("convolution not reset", "self.heads(short_conv(qkv, w, bounds))", "self.heads(short_conv(qkv, w, [0, bounds[-1]]))"),
        ("state of a prompt forgotten", "g, beta, bounds, before[1])", "g, beta, bounds)"),
        ("no gate of attention", " * gate.sigmoid()).flatten(-2)", ").flatten(-2)"),
        ("gate before its query", "q, gate = qg", "gate, q = qg"),
        ("no gate of the state", "o = swiglu(z.unflatten(-1, (-1, self.value_size)), self.norm(o))", "o = self.norm(o)"),
        ("beta without its sigmoid", "b.to(wide).sigmoid()", "b.to(wide)"),
        ("no bias of the decay", "a.to(wide) + self.dt_bias.to(wide)", "a.to(wide)"),
        ("norm without its offset", "self.eps, 1.0, True)\n\n    def of_sum", "self.eps, 0.0, True)\n\n    def of_sum"),
    ],
}  # fmt: skip


def by_hand(file: str, source: str) -> list[Fault]:
    """The faults that are written out for a file, in the order of its lines."""
    found = []
    for kind, old, new in BY_HAND[file]:
        assert source.count(old) == 1, (file, kind, source.count(old))
        start = len(source[: source.index(old)].encode())
        line = source[: source.index(old)].count("\n") + 1
        found.append(Fault(file, kind, "", line, start, start + len(old.encode()), new))
    return sorted(found, key=lambda fault: fault.start)


def _tells(node: ast.AST) -> bool:
    """Whether this is a text, only says something, decides how a file looks, or runs on GPUs alone."""
    if isinstance(node, ast.keyword):
        return node.arg in FORM
    if isinstance(node, ast.If | ast.IfExp | ast.BoolOp):
        return bool(ON_GPUS.search(ast.unparse(getattr(node, "test", node))))
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Name) and target.id in TEXTS for target in node.targets)
    node = node.value if isinstance(node, ast.Expr) else node
    return (
        isinstance(node, ast.JoinedStr)
        or _call(node).split(".")[-1] in TELLS
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )


def faults(file: str, source: str) -> list[Fault]:
    """Every fault that can be planted in a file, in the order of its lines."""
    whole, lines = source.encode(), [0]
    for line in whole.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            lines[node.lineno - 1] + node.col_offset,  # pyright: ignore[reportAttributeAccessIssue]
            lines[node.end_lineno - 1] + node.end_col_offset,  # pyright: ignore[reportAttributeAccessIssue]
        )

    def text(node: ast.AST) -> str:
        return whole[slice(*span(node))].decode()

    found = []

    def visit(node: ast.AST, function: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if _tells(child):
                continue
            inner, name = function, path
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                if LEFT_ALONE.search(child.name):
                    continue
                inner, name = child, f"{path}.{child.name}".strip(".")
            if name and not isinstance(child, ast.arguments):
                for mutator in OF_THE_ENGINE if file in ENGINE else MUTATORS:
                    for kind, target, new in mutator(child, text, inner):
                        start, end = span(target)
                        if isinstance(target, ast.expr) and new:
                            new = f"({new})"
                        fault = Fault(file, kind, name, getattr(target, "lineno", 0), start, end, new)
                        found.append(fault)
            if not isinstance(child, ast.Raise):  # else what is left is its message
                visit(child, inner, name)

    tree = ast.parse(source)
    for node in ast.walk(tree):  # types and decorators are not code that runs on data
        for field in ("annotation", "returns", "decorator_list"):
            if hasattr(node, field):
                setattr(node, field, [] if field == "decorator_list" else None)
    visit(tree, tree, "")
    return list({(fault.start, fault.end, fault.new): fault for fault in reversed(found)}.values())[::-1]


def equivalent(fault: Fault, source: str) -> bool:
    return (Path(fault.file).stem, fault.function, fault.kind, fault.old(source)) in EQUIVALENT


def chosen(found: list[Fault], each: int) -> list[Fault]:
    """At most `each` of every kind, spread over the file."""
    kinds = defaultdict(list)
    for fault in found:
        kinds[fault.kind].append(fault)
    picked = []
    for of_kind in kinds.values():
        some = min(each, len(of_kind))
        picked += [of_kind[(2 * i + 1) * len(of_kind) // (2 * some)] for i in range(some)]
    return sorted(picked, key=lambda fault: fault.start)


# what the names of a kernel's tests hold, where it is not the name of its file; a longer word is not meant
_LORA, _EXPERTS, _WEIGHTS = (
    r"lora|augmented|test_kernel_choice|test_far|dequantize|weights", r"experts", r"dequantize|quantized|weights|widened",
)  # fmt: skip
NEAR = {
    "swiglu": r"(?<!lora_)swiglu|mlp", "swiglu_shrink": r"mlp|gate_and_up", "kept": r"mlp",
    "linear_cross_entropy": r"(?<![a-z])cross_entropy|librar|test_far", "attention": r"attention|window|prefix|packed",
    "lora_experts": _EXPERTS, "experts_on_triton": _EXPERTS, "expert_tiles": _EXPERTS, "expert_gemm": _EXPERTS,
    "expert_shrink": _EXPERTS, "expert_swiglu": _EXPERTS, "expert_rows": r"lora_experts",
    "short_conv": r"short_conv|convolution", "gated_delta": r"gated_delta", "moe": r"test_moe|test_golden.*moe",
    "qwen3_5": r"test_qwen3_5|test_golden.*qwen3_5|test_every_family.*cached_decoding.*qwen3_5", "fla": r"fla",
    "dropout": r"dropout|mask|key|draws|kept|dropped", "lang": r"rms_norm|(?<![a-z])rope|swiglu|lora|cross_entropy",
    "dispatch": r"switch|librar|refuse|whole|many_weights|rms_norm|test_kernel_choice",
    "augmented": _LORA, "group": _LORA, "library_gemm": _LORA, "lora_gemm": _LORA, "lora_shrink": _LORA, "lora_linear": _LORA,
    "lora_swiglu": _LORA, "on_triton": _LORA, "projection": _LORA, "wide_products": _LORA,
    "dequantize": _WEIGHTS, "nf4": _WEIGHTS, "int8_rows": _WEIGHTS, "fp8_blocks": _WEIGHTS, "quantized": _WEIGHTS,
    "packed": _WEIGHTS, "frozen_linear": _WEIGHTS,
}  # fmt: skip
# the files of the engine that decide what is learnt and what is kept, and the tests of each
ENGINE = {
    "minilora/lora.py": "test_lora checkpoint/test_experts",
    "minilora/data.py": "test_data test_objective run/test_step",
    "minilora/rows/dataset.py": "rows/test_sources rows/test_load_rows test_data",
    "minilora/rows/token_store.py": "rows/test_load_rows rows/test_sources test_data",
    "minilora/rows/render.py": "rows/test_render test_data rows/test_load_rows rows/test_tool_rows",
    "minilora/rows/shapes.py": "rows/test_rows rows/test_keys rows/test_tool_rows rows/test_load_rows test_objective",
    "minilora/rows/split.py": "rows/test_sources rows/test_load_rows",
    "minilora/objective.py": "test_objective",
    "minilora/train.py": "run/test_step test_objective test_train run/test_resume run/test_study ranks/test_ranks",
    "minilora/run/step.py": "run/test_step test_objective run/test_monitor",
    "minilora/run/schedule.py": "run/test_schedule run/test_fit test_train run/test_resume",
    "minilora/run/fit.py": "run/test_fit tools/test_plan",
    "minilora/run/snapshot.py": "run/test_snapshot run/test_leftovers run/test_resume",
    "minilora/run/folder.py": "run/test_folder run/test_leftovers run/test_resume test_train machine/test_gemm test_replaced",
    "minilora/files/atomic.py": "files/test_atomic run/test_leftovers files/test_regular checkpoint/test_load test_replaced",
    "minilora/files/run_folder.py": "run/test_folder test_replaced",
    "minilora/files/safetensors.py": "files/test_safetensors files/test_atomic",
    "minilora/checkpoint/adapter.py": "test_lora checkpoint/test_experts checkpoint/test_foreign_adapters checkpoint/test_loftq test_cases",
    "minilora/checkpoint/adapter_config.py": "test_lora checkpoint/test_experts checkpoint/test_foreign_adapters test_cases",
    "minilora/checkpoint/factors.py": "checkpoint/test_factors tools/test_inspect_adapter checkpoint/test_foreign_adapters checkpoint/test_experts",
    "minilora/checkpoint/load.py": "checkpoint/test_load models/test_config_keys checkpoint/test_quantized_folders",
    "minilora/checkpoint/save.py": "checkpoint/test_own_code checkpoint/test_load checkpoint/test_merge checkpoint/test_quantized_folders checkpoint/test_vision_folders",
    "minilora/checkpoint/merge.py": "checkpoint/test_merge checkpoint/test_loftq checkpoint/test_vision_folders",
}
# tests of the engine that take seconds, of what others hold too
SLOW = re.compile(
    r"large_file|fuzzed_(rows|xlsx|tokenizers)|lora bf16|signal_saves|full-[2-7]|fp32-[2-7]|widened_base|which_bits|may_not_grow|"
    r"test_ranks\.py::(?!test_the_first_rank)|"
    r"larger_than_the_model|fills_up|what_is_typed|plan\.py::test_(a_7b|augm|a_config|a_storage|eight|logits|recomp|the_dry|what_is)"
)
FILES = {
    "1": ["kernels/interpreter", "kernels/test_kernels", "kernels/test_lora_linear_group", "kernels/test_lora_mlp"],
    "0": [
        "kernels/test_kernels", "kernels/test_lora_linear_group", "kernels/test_lora_mlp", "kernels/test_attention",
        "kernels/test_augmented", "kernels/test_fp8_rows", "kernels/test_gated_delta", "kernels/test_kernel_choice",
        "kernels/test_launch", "kernels/test_lora_experts", "kernels/test_quantized", "models/test_every_family",
        "models/test_golden", "models/test_moe", "models/test_qwen3_5",
    ],
    "engine": sorted({name for names in ENGINE.values() for name in names.split()}),
}  # fmt: skip


def _pytest(folder: Path, mode: str, *args: str, seconds: int = 36_000) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-m", "not long", "-p", "no:cacheprovider", *args]
    environment = {
        **os.environ, "TRITON_INTERPRET": str(int(mode == "1")), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder.parent),  # a fault may delete what lies beside its file
        "PYTHONPATH": str(folder),  # a test may start the command line in another folder
    }  # fmt: skip
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=10 * seconds, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),  # others may use the machine too
    )  # fmt: skip


def collected(folder: Path, mode: str) -> list[str]:
    """The tests that the suite runs on Triton's interpreter, on the torch paths, or of the engine."""
    paths = [folder / "tests" / name for name in FILES[mode]]
    listed = _pytest(folder, mode, "--collect-only", "-q", *(str(p if p.is_dir() else f"{p}.py") for p in paths)).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    if mode == "1":
        names = [n for n in names if not n.startswith("tests/kernels/test_kernels.py") or re.search(WITH_KERNELS, n)]
    return [n for n in names if mode != "engine" or not SLOW.search(n)]


def quickest_first(folder: Path, mode: str, names: list[str]) -> list[str]:
    """Tests in the order of the seconds that they take without a fault, so that most faults are noticed in little time."""
    if not names:  # pytest would run the whole suite
        return []
    run = _pytest(folder, mode, "-q", "--durations=0", *names)
    if run.returncode:
        sys.exit(f"tests fail without any fault:\n{run.stdout[-3000:]}")
    seconds = dict.fromkeys(names, 0.0)
    for taken, name in re.findall(r"^([\d.]+)s (?:call|setup|teardown) +(\S.*)$", run.stdout, re.MULTILINE):
        if name in seconds:
            seconds[name] += float(taken)
    return sorted(names, key=lambda name: seconds[name])


def tests_of(fault: Fault, there: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """(how they are run, the tests of a fault's file)."""
    if fault.file in ENGINE:
        files = {f"tests/{name}.py" for name in ENGINE[fault.file].split()}
        return [("engine", [name for name in there["engine"] if name.split("::")[0] in files])]
    stem = Path(fault.file).stem
    near = re.compile(NEAR.get(stem, rf"(?<![a-z]){stem}"))
    found = {mode: [name for name in there[mode] if near.search(name)] for mode in ("1", "0")}
    assert any(found.values()), f"no tests for {fault.file}"
    if "OnTorch" in fault.function:
        modes = ["0"]
    elif "kernel" in fault.function:
        modes = ["1"]
    else:
        modes = ["0", "1"]
    return [(mode, found[mode]) for mode in modes if found[mode]]


def survives(folder: Path, fault: Fault, there: dict[str, list[str]]) -> bool:
    for mode, names in tests_of(fault, there):
        assert all((folder / name.split("::")[0]).is_file() for name in names), "a fault deleted the tests"
        try:
            result = _pytest(folder, mode, "-q", "-x", *names, seconds=SECONDS[mode])
        except subprocess.TimeoutExpired:
            return False
        if result.returncode:
            assert result.returncode != 5, f"no tests for {fault.file}"
            return False
    return True


def in_turn(faults: list[Fault], most: int) -> list[Fault]:
    """At most so many of every file, spread over it; a fault of every file before the second of any."""
    files = defaultdict(list)
    for fault in faults:
        files[fault.file].append(fault)
    spread = [
        [of[(2 * i + 1) * len(of) // (2 * most)] for i in range(most)] if len(of) > most else of
        for of in files.values()
    ]
    return [fault for row in zip_longest(*spread) for fault in row if fault]


def _without_line(told: str) -> str:
    return re.sub(r":\d+ ", " ", told, count=1)


def _recorded(path: Path) -> list[dict]:
    """What became of the faults of a run, or of several that lie in one file."""
    recorded = json.loads(path.read_text())
    return [done for sample in recorded.get("samples", [recorded]) for done in sample["faults"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.proof.mutate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--each", type=int, default=2, help="faults of every kind in every file (2)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="files, or parts of their names")
    parser.add_argument("--per-file", type=int, default=1000, help="faults in every file (all of --each)")
    parser.add_argument(
        "--again", type=Path, metavar="FILE.json", help="plant only what survived there, of --each 1000"
    )
    parser.add_argument(
        "--without", type=Path, metavar="FILE.json", help="a fresh sample: plant nothing of what is there"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="what became of every fault, written after each")
    args = parser.parse_args(argv)
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "kernels").glob("*.py"))]
    sources = {file: (ROOT / file).read_text() for file in (*files, *ENGINE)}
    known = {_without_line(done["fault"]) for done in _recorded(args.without)} if args.without else set()

    def can_be_planted(fault: Fault, source: str) -> bool:
        return not equivalent(fault, source) and _without_line(fault.told(source)) not in known

    planted = [
        f
        for file, source in sources.items()
        if any(part in file for part in args.only)
        for f in chosen([f for f in faults(file, source) if can_be_planted(f, source)], args.each)
    ]
    for file in BY_HAND:
        sources[file] = (ROOT / file).read_text()
        planted += by_hand(file, sources[file]) if any(part in file for part in args.only) else []
    planted = in_turn(planted, args.per_file)
    if args.again:
        lived = {_without_line(done["fault"]) for done in _recorded(args.again) if not done["killed"]}
        planted = [fault for fault in planted if _without_line(fault.told(sources[fault.file])) in lived]
    if args.list:
        print(*[fault.told(sources[fault.file]) for fault in planted], sep="\n")
        return 0
    os.nice(10)
    done = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(
            ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs")
        )
        parts = {fault.file in ENGINE for fault in planted}
        there = {mode: collected(folder, mode) if (mode == "engine") in parts else [] for mode in FILES}
        for mode, names in there.items():
            needed = {
                name for fault in planted for other, some in tests_of(fault, there) if other == mode for name in some
            }
            there[mode] = quickest_first(folder, mode, [name for name in names if name in needed])
        for fault in planted:
            source, began = sources[fault.file], time.monotonic()
            ast.parse(fault.planted(source))  # loud if a fault is no Python: it would count as killed
            (folder / fault.file).write_text(fault.planted(source))
            lives = survives(folder, fault, there)
            (folder / fault.file).write_text(source)
            seconds = round(time.monotonic() - began)
            print("SURVIVED" if lives else "killed  ", fault.told(source), f"({seconds} s)", flush=True)
            done.append({"fault": fault.told(source), "killed": not lives, "seconds": seconds})
            if args.save:
                write_file(
                    args.save, json.dumps({"faults": done, "killed": sum(d["killed"] for d in done)}, indent=1) + "\n"
                )
    killed = sum(d["killed"] for d in done)
    print(f"{killed} of {len(done)} faults killed: {killed / max(1, len(done)):.1%}")
    return int(killed < GATE * len(done))


if __name__ == "__main__":
    sys.exit(main())
