"""Every family on tiny random models: packing, caching, folders, adapters, training; and what is refused."""

import json
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import IDS, OWN, SOP, cached_logits, config_json, conversation, conversations, randomise, tiny, tiny_folder
from published import PUBLISHED
from torch import Tensor

from minilora import add_lora, load_adapter, load_model, merge, save_adapter, save_model
from minilora.checkpoint.load import FAMILIES, empty_model, keys_not_read, read_config
from minilora.checkpoint.refused import REFUSED as REFUSED_TYPES
from minilora.checkpoint.refused import SMALL_GLM, SMALL_QWEN
from minilora.checkpoint.verify import wide_logits_of
from minilora.data import Example, make_batch
from minilora.errors import ModelError
from minilora.evaluate import evaluate
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.generate import Request, decode, generate
from minilora.kernels.rms_norm import rms_norm_ref
from minilora.lora import adapters, linears
from minilora.machine.flops import attention_flops
from minilora.models.decoder import Decoder
from minilora.models.layers import RMSNorm
from minilora.models.stream import Documents
from minilora.run.schedule import learning_rate
from minilora.sampling import GREEDY, Sampling, random_of
from minilora.settings import resolve
from minilora.train import train_step

families = pytest.mark.parametrize("family", OWN)


def adapted(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    model = tiny(family, dtype, **changes)
    add_lora(model, r=3, alpha=6)
    randomise(model)
    return model.to(dtype)


def loss_and_gradients(model: Decoder, examples: list[Example], together: bool) -> tuple[Tensor, Tensor]:
    streams = [examples] if together else [[e] for e in examples]
    losses = [model.loss(make_batch(stream)) for stream in streams]
    for loss in losses:
        loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return torch.stack(losses).sum().detach(), gradients


def assert_close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


# one computation by many routes


@families
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_packed_is_alone(family: str, training: bool):
    model = adapted(family).train(training)
    packed, alone = (loss_and_gradients(model, conversations(family), together) for together in (True, False))
    assert_close(packed[0], alone[0])
    assert_close(packed[1], alone[1])


@families
def test_checkpointing_changes_no_bit(family: str):
    model = adapted(family, torch.float32).train()
    kept = loss_and_gradients(model, conversations(family), True)
    model.checkpointing = True
    assert all(map(torch.equal, loss_and_gradients(model, conversations(family), True), kept))


@families
def test_cached_decoding_is_the_full_forward(family: str):
    model = adapted(family)
    ids = torch.from_numpy(conversation(family, 11, 9, 0).ids)
    with torch.no_grad():
        full = model.logits(ids)
        # the whole prompt and <sop> first; 12 and 20 tokens have one rotary base in Qwen-1
        pieces = cached_logits(model, ids, [12, 1, 1, 4, 2])
    assert_close(torch.cat(pieces), full)


@families
def test_generation_takes_the_likeliest_of_the_full_forward(family: str):
    model = adapted(family)
    ids = [*range(1, 12), SOP] if family == "chatglm" else list(range(1, 13))
    for token in generate(model, list(ids), set(), 8):
        with torch.no_grad():
            assert token == int(model.logits(torch.tensor(ids))[-1].argmax())
        ids.append(token)


@families
@pytest.mark.parametrize("slots", [2, 9])
def test_many_answers_are_those_of_one_prompt_alone(family: str, slots: int):
    """Greedy, and sampled with answers that end at different passes; some prompts exceed the tiny Qwen-1's length."""
    model = adapted(family)
    prompts = [conversation(family, n, 1, n).ids.tolist() for n in (3, 12, 1, 5, 14, 2)]

    def answers(stop: set[int], sampling: Sampling) -> list[list[int]]:
        requests = [Request(p, stop, 14, sampling, random_of(0, n)) for n, p in enumerate(prompts)]
        for _ in decode(model, deque(requests), slots):
            pass
        return [r.ids for r in requests]

    assert answers(set(), GREEDY) == [list(generate(model, p, set(), 14)) for p in prompts]
    stop, sampling = set(range(6)), Sampling(temperature=2.0)
    drawn = answers(stop, sampling)
    assert drawn == [list(generate(model, p, stop, 14, sampling, random_of(0, n))) for n, p in enumerate(prompts)]
    assert len({len(ids) for ids in drawn}) > 1


@families
def test_the_loss_is_that_of_the_logits(family: str):
    model = adapted(family).train()
    expected = torch.zeros(())
    for e in conversations(family):
        logits = model.logits(torch.from_numpy(e.ids))
        expected = expected + torch.nn.functional.cross_entropy(logits, torch.from_numpy(e.targets), reduction="sum")
    assert_close(model.loss(make_batch(conversations(family))), expected)


@families
def test_logits_block_by_block_are_the_logits(family: str):
    """What the proof of a merge takes for truth, of a model in fp32."""
    model = adapted(family, torch.float32)
    ids = torch.from_numpy(conversation(family, 11, 9, 0).ids)
    with torch.no_grad():
        assert_close(wide_logits_of(model, [ids])[0], model.double().logits(ids))


# folders and adapters


@families
def test_save_and_load(tmp_path: Path, family: str):
    folder, model = tiny_folder(tmp_path / "m", family), tiny(family)
    loaded = load_model(folder, device="cpu")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@families
def test_an_adapter_goes_on_every_linear_and_comes_back(tmp_path: Path, family: str):
    model = adapted(family, torch.float32)
    wrapped = dict(adapters(model))
    weights = {n for n, p in tiny(family).named_parameters() if p.dim() == 2}
    c = model.config
    outside = {f"{model.names.embedding}.weight"} | (set() if c.tied else {f"{model.names.head}.weight"})
    outside |= {n for n in weights if n.endswith((".gate.weight", ".wpe.weight"))}  # of routers; positions
    assert {f"{path}.weight" for path in wrapped} == weights - outside
    save_adapter(model, tmp_path / "a")
    keys = SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors").entries.keys()
    in_files = {".experts.gate_up_proj": ".experts.base_layer", ".experts.down_proj": ".experts"}
    paths = {re.sub(r"\.experts\.\w+$", lambda m: in_files[m[0]], path) for path in wrapped}
    assert keys == {f"base_model.model.{path}.lora_{half}.weight" for path in paths for half in "AB"}
    other = tiny(family)
    load_adapter(other, tmp_path / "a")
    ids = torch.from_numpy(conversation(family, 5, 5, 0).ids)
    assert torch.equal(other.logits(ids), model.logits(ids))


@families
def test_merged_is_adapted(tmp_path: Path, family: str):
    folder, model = tiny_folder(tmp_path / "m", family), adapted(family)
    ids = torch.from_numpy(conversation(family, 5, 15, 0).ids)
    wrapped, base = model.logits(ids).detach(), tiny(family, torch.float64).logits(ids)
    merge(model)
    assert_close(model.logits(ids), wrapped)
    assert (wrapped - base).abs().max() > 0.01 * base.abs().max()
    save_model(model, tmp_path / "merged", folder)
    assert (load_model(tmp_path / "merged", device="cpu").logits(ids) - wrapped).abs().max() < 1e-3


@families
@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_groups_of_linears(family: str, targets: str):
    one, all_of_them = tiny(family), linears(tiny(family))
    add_lora(one, targets, r=2)
    found = [path for path, _ in adapters(one)]
    assert 0 < len(found) < len(all_of_them)
    assert all((".mlp." in path) == (targets == "mlp") for path in found)


@families
def test_it_learns(family: str):
    model, examples = tiny(family), conversations(family)
    add_lora(model, r=8, alpha=16)
    model.train()
    before = evaluate(model, examples, 100).loss
    config = resolve({"lr": 3e-2, "warmup": 1})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, fused=True)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, 30)
        train_step(model, optimizer, [make_batch(examples)], config, step)
    assert evaluate(model, examples, 100).loss < 0.3 * before


# ChatGLM-6B


def test_the_positions_of_chatglm():
    """prompt prompt [gMASK] <sop> answer answer, as the original code builds them."""
    assert Documents.of([6], [3]).positions.tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert Documents.of([2], [3], [4]).positions.tolist() == [[2, 2], [2, 3]]
    assert Documents.of([2], starts=[4]).positions.tolist() == [4, 5]
    batch = make_batch([conversation("chatglm", 2, 3, 0), conversation("chatglm", 1, 2, 1)])
    assert batch.documents.positions.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.documents.prefix_lens == [2, 1] and batch.documents.cu_seqlens == [0, 5, 8]


def test_the_prompt_sees_itself_and_no_more():
    """A change in the prompt's last token reaches the prompt's first; a change in the answer reaches what follows it alone."""
    model = tiny("chatglm", torch.float64)
    ids = torch.from_numpy(conversation("chatglm", 6, 6, 0).ids)
    same = []
    for place in (5, 9):
        changed = ids.clone()
        changed[place] = (ids[place] + 1) % SOP
        same.append((model.logits(changed) == model.logits(ids)).all(-1))
    assert not same[0].any()
    assert same[1][:9].all() and not same[1][9:].any()


def test_frequencies_of_chatglm_are_rounded_to_fp16():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 1}
    model = empty_model(FAMILIES["chatglm"].config(config_json("chatglm", **sizes)))
    found, factor = model.frequencies(torch.device("cpu"), torch.bfloat16)
    exact = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert factor == 1 and found.dtype == torch.float32 and len(found) == 32
    assert torch.equal(found, found.half().float()) and not torch.equal(found, exact.float())
    assert ((found - exact).abs() <= 2**-11 * exact + 2**-25).all()


def test_ids_without_sop_are_an_error():
    with pytest.raises(ValueError, match="<sop>"):
        tiny("chatglm").logits(torch.tensor([1, 2, 3]))


def test_a_batch_of_documents_is_told_what_to_give():
    with pytest.raises(ValueError, match=r"not \[1, 3\]: give ids\[0\]"):
        tiny("qwen2").logits(torch.tensor([[1, 2, 3]]))


def test_attention_flops_count_the_prefix():
    c = tiny("chatglm").config
    one = 3 * 4 * c.heads * c.head_size * c.layers
    assert attention_flops(c, Documents.of([10], [10])) == one * 100
    assert attention_flops(c, Documents.of([10])) == one * 55
    assert attention_flops(c, Documents.of([10, 4], [4, 1])) == one * (55 + 6 + 10)


# the same model in two layouts


def test_chatglm2_is_glm_by_other_names():
    """GLM-4-9B's rope_ratio multiplies the rotary base; its qkv holds all q, then all k, then all v."""
    original = tiny("chatglm2", torch.float64, rope_ratio=500, _name_or_path="THUDM/glm-4-9b-chat")
    theirs = tiny("glm", torch.float64, rope_theta=5e6, rms_norm_eps=1e-5)
    weights, renamed = dict(original.named_parameters()), {}
    parts = {"embed_tokens": "embedding.word_embeddings", "layers": "encoder.layers", "norm": "encoder.final_layernorm"}
    leaves = {
        "o_proj": "dense",
        "gate_up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "self_attn": "self_attention",
    }
    rows = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
    for name, p in theirs.named_parameters():
        words = name.split(".")
        old = (
            ["transformer", parts[words[1]], *words[2:]]
            if words[0] == "model"
            else ["transformer.output_layer", words[1]]
        )
        part = next((rows[w] for w in words if w in rows), slice(None))
        old = ["query_key_value" if w in rows else leaves.get(w, w) for w in old]
        renamed[name] = weights[".".join(old)].detach()[part].reshape(p.shape)
    theirs.load_state_dict(renamed, strict=True)
    assert_close(original.logits(IDS), theirs.logits(IDS))


@pytest.mark.parametrize(("family", "once"), [("chatglm2", True), ("glm", False), ("glm4", False), ("qwen", False)])
def test_norms_round_in_the_familys_order(family: str, once: bool):
    model = tiny(family, torch.bfloat16)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == (9 if family == "glm4" else 5)
    for norm in norms:
        right, wrong = (rms_norm_ref(x, norm.weight, norm.eps, round_once=order) for order in (once, not once))
        assert torch.equal(norm(x), right) and not torch.equal(right, wrong)


def test_rope_ratio_divides_positions_in_chatglm2():
    model = tiny("chatglm2", torch.float64, rope_ratio=4, _name_or_path="/models/chatglm2-6b-32k")
    plain = tiny("chatglm2", torch.float64)
    documents = Documents.of([len(IDS)])
    further = Documents(documents.cu_seqlens, 4 * documents.positions)
    assert_close(model(IDS, further), plain(IDS, documents))


def test_qwen1_reaches_beyond_its_length_in_evaluation_alone():
    model = tiny("qwen", torch.float64)
    plain = tiny("qwen", torch.float64, use_dynamic_ntk=False, use_logn_attn=False)
    long, short = torch.arange(1, 21), torch.arange(1, 11)
    assert torch.equal(model.logits(short), plain.logits(short))
    assert (model.logits(long) - plain.logits(long)).abs().max() > 1e-3
    assert torch.equal(model.train().logits(long), plain.logits(long))


def test_the_first_revision_of_qwen1(tmp_path: Path):
    new = config_json("qwen", max_position_embeddings=64)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "n_positions"}  # fmt: skip
    assert read(tmp_path, {names.get(k, k): v for k, v in new.items()}) == read(tmp_path, new)


@pytest.mark.parametrize("changes", [{}, {"partial_rotary_factor": 1.0, "attention_bias": False}])
def test_both_spellings_of_glm(tmp_path: Path, changes: dict[str, Any]):
    """GLM-Edge turns whole heads and has no biases."""
    old = config_json("glm", **changes)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "partial_rotary_factor")}
    new["rope_parameters"] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **changes}
    c = read(tmp_path, new)
    assert read(tmp_path, old) == c
    assert (c.rotary, c.qkv_bias) == ((8, False) if changes else (4, True))


# config.json


def read(folder: Path, j: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(j))
    return read_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(tmp_path: Path, name: str):
    count, j = PUBLISHED[name]
    model = empty_model(read(tmp_path, j))
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.is_meta for p in model.parameters()) and keys_not_read(tmp_path) is None


REFUSED = {
    "int4 of v1": ("chatglm", {"quantization_bit": 4}, "quantised"),
    "gptq": ("glm4", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    "p-tuning": ("chatglm", {"pre_seq_len": 128}, "P-tuning"),
    "one position": ("chatglm", {"position_encoding_2d": False}, "position_encoding_2d is False"),
    "heads": ("chatglm", {"num_attention_heads": 16}, "16 heads"),
    "no multi-query": ("chatglm2", {"multi_query_attention": False}, "multi_query_attention is False"),
    "layer norm": ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
    "no last norm": ("chatglm2", {"post_layer_norm": False}, "post_layer_norm is False"),
    "other residual": ("chatglm2", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
    "biases": ("chatglm2", {"add_bias_linear": True}, "add_bias_linear is True"),
    "odd pairs": ("chatglm2", {"kv_channels": 6}, "kv_channels is 6"),
    "groups": ("chatglm2", {"multi_query_group_num": 3}, "not a multiple"),
    "which ratio": ("chatglm2", {"rope_ratio": 50}, "_name_or_path"),
    "biases of qwen": ("qwen", {"no_bias": False}, "no_bias is False"),
    "odd width": ("qwen", {"intermediate_size": 81}, "intermediate_size is 81"),
    "rotary": ("qwen", {"rotary_pct": 0.5}, "rotary_pct"),
    "activation": ("glm", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    "partial": ("glm4", {"head_dim": 6}, "partial_rotary_factor"),
    "groups of glm": ("glm", {"num_key_value_heads": 3}, "not a multiple"),
    "llama3": ("glm", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type"),
    "nearest": ("qwen2", {"model_type": "qwen2_vl"}, "a part that reads pictures"),
    "nearest glm": ("qwen2", {"model_type": "glm4_mo"}, "(the nearest is glm4_moe)"),
    "qwen4": ("qwen3", {"model_type": "qwen4_exp"}, "tables of n-grams"),
    "qwen4's text": ("qwen3", {"model_type": "qwen4_exp_text"}, "tables of n-grams"),
    "glm5": ("glm", {"model_type": "glm5_next"}, "(KDA)"),
    "dsa": ("glm", {"model_type": "glm_moe_dsa"}, "(DSA)"),
    "vision": ("qwen3", {"model_type": "qwen3_vl_moe", "text_config": {}}, "a part that reads pictures"),
    "vision of an unknown one": ("qwen3", {"model_type": "new", "vision_config": {"depth": 1}}, "a part that reads pictures"),
    "sound": ("qwen2", {"model_type": "qwen2_audio"}, "a part that reads sound"),
    "omni": ("qwen2", {"model_type": "qwen3_omni_moe"}, "sound and pictures"),
    "vision of glm": ("glm", {"model_type": "glm4v_moe"}, "a part that reads pictures"),
    "gelu of gpt2": ("gpt2", {"activation_function": "gelu"}, "activation_function is gelu"),
    "heads of gpt2": ("gpt2", {"n_head": 5}, "not a multiple"),
    "scores of gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "our own name": ("chatglm2", {"model_type": "chatglm2"}, "(the nearest is chatglm)"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named(tmp_path: Path, family: str, changes: dict[str, Any], part: str):
    with pytest.raises(ModelError) as error:
        read(tmp_path, config_json(family, **changes))
    assert error.value.code == 4 and part in error.value.what and "\n" not in str(error.value.what)


def test_what_is_to_be_taken_instead_is_supported():
    instead = [refused.instead for refused in REFUSED_TYPES.values()] + [SMALL_QWEN, SMALL_GLM]
    assert {kind for _, kind in instead} <= FAMILIES.keys() and not REFUSED_TYPES.keys() & FAMILIES.keys()


@pytest.mark.parametrize("weights", OWN)
def test_weights_of_another_family_are_told(tmp_path: Path, weights: str):
    folder = tiny_folder(tmp_path / "m", weights)
    for family in OWN.keys() - {weights}:
        (folder / "config.json").write_text(json.dumps(config_json(family)))
        with pytest.raises(ModelError) as error:
            load_model(folder, device="cpu")
        assert error.value.what == f"{folder}: config.json says {family}, the weights are of {weights}"
        assert error.value.code == 4


@pytest.mark.parametrize(("name", "part"), [
    ("transformer.layers.0.attention.query_key_value.weight_scale", "quantised"),
    ("model.layers.0.self_attn.q_proj.qweight", "quantised"),
    ("transformer.prefix_encoder.embedding.weight", "P-tuning"),
])  # fmt: skip
def test_weights_that_are_no_plain_numbers(tmp_path: Path, name: str, part: str):
    folder = tiny_folder(tmp_path / "m", "chatglm")
    weights = {n: p.detach().clone() for n, p in tiny("chatglm").named_parameters()}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", weights | {name: torch.ones(3)})
    with pytest.raises(ModelError, match=part) as error:
        load_model(folder, device="cpu")
    assert "\n" not in error.value.what


def test_tied_and_buffers_of_chatglm(tmp_path: Path):
    """The published folder repeats the embedding as the head, and holds the rotary frequencies of every layer."""
    folder = tiny_folder(tmp_path / "m", "chatglm")
    weights = {n: p.detach().clone() for n, p in tiny("chatglm").named_parameters()}
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    weights |= {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", weights)
    ids = torch.from_numpy(conversation("chatglm", 5, 5, 0).ids)
    assert torch.equal(load_model(folder, device="cpu").logits(ids), tiny("chatglm").logits(ids))
    (folder / "model.safetensors").unlink()
    write_tensors(folder / "model.safetensors", weights | {"lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match="lm_head.weight differs from the embedding"):
        load_model(folder, device="cpu")
