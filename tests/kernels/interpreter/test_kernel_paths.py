"""What the header of a run says of the kernels is what the operations do."""

from typing import Any

import pytest
import torch
from oracle import OWN, SOP, tiny
from shadow import shadow

from minilora import add_lora
from minilora.kernels import int8_rows
from minilora.kernels.dequantize import ROWS_IN_THE_LOOP
from minilora.kernels.dispatch import kernels_enabled, use_gemm
from minilora.lora import LoRALinear
from minilora.machine.kernel_paths import kernel_paths
from minilora.models.layers import Linear
from minilora.models.moe import SparseMLP
from minilora.models.qwen3_5 import HybridConfig
from minilora.models.stream import Documents

CPU = torch.device("cpu")


def nodes(node: Any, seen: set[Any]) -> set[str]:
    """The names of the autograd nodes that a result hangs on."""
    if node is None or node in seen:
        return set()
    seen.add(node)
    return {type(node).__module__ + "." + node.name()}.union(*(nodes(n, seen) for n, _ in node.next_functions))


def graph(family: str, targets: str) -> tuple[set[str], list[str]]:
    model = tiny(family)
    add_lora(model, targets)
    ids = torch.tensor([3, 1, 4, SOP, 5, 9])
    out = model(ids, Documents.of([6], [3] if family == "chatglm" else None))
    return nodes(out.grad_fn, set()), kernel_paths(model, CPU)


@pytest.mark.parametrize("family", OWN)
def test_the_lines_name_what_runs(family: str):
    found, lines = graph(family, "all-linear")
    *layers, loss = lines
    model = tiny(family)
    mixed = [isinstance(block.mlp, SparseMLP) for block in model.blocks if hasattr(block, "mlp")]
    delta = isinstance(model.config, HybridConfig)  # its first layer is of another kind than its second
    assert len(layers) == 1 + (delta or len(set(mixed)) > 1) and loss.startswith("loss: Triton")
    assert layers[0].startswith("layers 0 to 1: Triton " if len(layers) == 1 else "layer 0: Triton ")
    if delta:
        assert "gated delta rule" in layers[0].partition(";")[2] and "rope" not in layers[0]
    for number, line in enumerate(layers):
        assert ("mlp.experts" in line.partition(";")[0]) == mixed[number] and "one after the other" not in line
    triton, _, library = layers[-1].partition(";")
    assert any("_OnTriton" in name for name in found) and ("rms_norm" in triton) == (family not in ("chatglm", "gpt2"))
    assert ("rope" in triton) == (family != "gpt2") and "attention" in library
    own = {"qwen": "attn.c_attn", "chatglm": "attention.query_key_value", "chatglm2": "self_attention.query_key_value",
           "glm4_moe_lite": "self_attn.q_a/kv_a_proj_with_mqa", "gpt2": "attn.c_attn"}  # fmt: skip
    assert own.get(family, "self_attn.q/k/v") in triton


def test_linears_without_an_adapter_are_the_librarys():
    _, lines = graph("qwen2", "q_proj,gate_proj")
    triton, _, library = lines[0].partition(";")
    assert "q/k/v" in triton and "gate/up" in triton and "mlp.down" in library and "self_attn.o" in library


def test_switches():
    with kernels_enabled(False):
        found, lines = graph("qwen2", "all-linear")
        assert lines == ["PyTorch for every layer (no GPU)"] and not any("_OnTriton" in name for name in found)
    with use_gemm("library"):  # the narrow products of the linears are still Triton's
        _, lines = graph("qwen2", "all-linear")
        assert "q/k/v" in lines[0].partition(";")[0]


def test_quantised_linears_are_said_to_go_by_two_ways():
    model = tiny("qwen2")
    for module in [m for b in model.blocks for m in b.modules() if isinstance(m, Linear)]:
        weight = int8_rows.quantize(module.weight)
        del module.weight
        module.register_module("weight", weight)
    add_lora(model, "all-linear")
    layers, loss, ways = kernel_paths(model, CPU)
    assert (
        "q/k/v" in layers.partition(";")[0] and loss.startswith("loss") and ways.startswith("int8: widened by a kernel")
    )
    linear = next(m for m in model.modules() if isinstance(m, LoRALinear))
    with torch.no_grad(), shadow() as launches:
        for rows in (3, ROWS_IN_THE_LOOP + 1):
            linear(torch.randn(rows, linear.base.in_features))
    made = [launch.kernel for launch in launches]
    assert made[-1] == "dequantize._widen_kernel" and "lora_gemm._forward_kernel" in made[:-1]
