"""The methods against PEFT: equal logits and gradients, and folders that open on both sides.

Runs where transformers and peft are installed (the extra "peers").
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from oracle import IDS
from torch import Tensor

from minilora import load_adapter, load_model, merge, save_adapter
from minilora.data import IGNORE, Example, make_batch
from minilora.files.safetensors import SafetensorsFile
from minilora.lora import adapters, trained_parameters
from minilora.methods.pissa import pissa_init
from minilora.models.decoder import Decoder
from minilora.run.schedule import set_learning_rate
from minilora.run.setup import optimizer_of, prepare
from minilora.settings import resolve
from minilora.train import train_step

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn about while they are imported is theirs
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
FAMILIES = ["qwen2", "qwen3", "glm"]
kinds = pytest.mark.parametrize("family", FAMILIES)
KEYS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
ROW = Example(IDS.numpy(), torch.cat((torch.full((6,), IGNORE), IDS[7:], torch.tensor([IGNORE]))).numpy(), "row", None)


def theirs(family: str, folder: Path | None = None) -> Any:
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "attn_implementation": "eager",
    }  # fmt: skip
    own = {} if family == "qwen2" else {"head_dim": 8, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **own})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator) + name.endswith("norm.weight")
    if folder is not None:
        model.save_pretrained(folder)
    return model.double()


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def their_loss(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of the row's own tokens and the summed loss, in fp64."""
    logits = model(IDS[None]).logits[0][-len(IDS) :]
    targets = torch.from_numpy(ROW.targets)
    kept = targets != IGNORE
    return logits, torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum")


def close(ours: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    """Adapters are read as fp32 on both sides: products of them in fp64 agree to its rounding."""
    torch.testing.assert_close(
        ours.detach().double(), wanted.detach().double(), rtol=0, atol=tolerance * float(wanted.abs().max())
    )


def ours_of(base: Path, adapter: Path) -> Decoder:
    model = load_model(base, torch.float64)
    load_adapter(model, adapter)
    return model.double().eval()


CONFIGS = {
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=KEYS),
    "dora rslora": lambda: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=8),
}  # fmt: skip


@kinds
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_opens_here_with_equal_logits_and_gradients(name: str, family: str, tmp_path: Path):
    model = peft.get_peft_model(theirs(family, tmp_path / "base"), CONFIGS[name]())
    randomise(model)
    model = model.double().eval()
    model.save_pretrained(tmp_path / "a")
    logits, loss = their_loss(model)
    ours = ours_of(tmp_path / "base", tmp_path / "a")
    close(ours.logits(IDS), logits)
    with_grad = ours.requires_grad_(False).train()
    for name_, p in with_grad.named_parameters():
        p.requires_grad_(name_ in _own(with_grad))
    mine = with_grad.loss(make_batch([ROW]))
    mine.backward()
    close(mine, loss, 1e-6)
    if name == "p-tuning":
        return  # the network that made its tokens is not read
    loss.backward()
    saved = peft.get_peft_model_state_dict(model)
    grads = _their_grads(model, name)
    found = _grads(with_grad)
    assert found.keys() == grads.keys() and saved
    for key, grad in found.items():
        close(grad, grads[key], 1e-5)


def _own(model: Decoder) -> set[str]:
    from minilora.models.layers import Adapted

    return {
        f"{path}.{n}" for path, m in model.named_modules() if isinstance(m, Adapted) for n, _ in m.named_parameters() if n[:5] != "base."
    }  # fmt: skip


def _grads(model: Decoder) -> dict[str, Tensor]:
    ends = ("lora_A", "lora_B", "lora_magnitude_vector", "ia3_l")
    found = {}
    for name, p in trained_parameters(model).items():
        found[name if name.endswith(ends) else "embedding"] = cast(Tensor, p.grad).reshape(-1)
    return found


def _their_grads(model: Any, method: str) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            short = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            found["embedding" if "prompt_encoder" in name else short] = p.grad.reshape(-1)
    return found


OURS = {
    "dora": {"method": "dora", "lora_r": 3, "lora_alpha": 7},
    "pissa": {"lora_init": "pissa", "lora_r": 3, "lora_alpha": 7},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "pre_seq_len": 4},
    "prefix mlp": {"method": "prefix", "pre_seq_len": 4, "prefix_projection": True},
    "prompt": {"method": "prompt", "pre_seq_len": 4},
}


@kinds
@pytest.mark.parametrize("name", OURS)
def test_a_folder_of_ours_opens_in_peft(name: str, family: str, tmp_path: Path):
    theirs(family, tmp_path / "base")
    ours = prepare(load_model(tmp_path / "base", torch.float64), resolve(OURS[name]))
    if name == "pissa":
        pissa_init(ours)
    randomise(ours)
    ours.eval()
    save_adapter(ours, tmp_path / "a", tmp_path / "base")
    model = peft.PeftModel.from_pretrained(theirs(family), tmp_path / "a").double().eval()
    ours.double()
    with torch.no_grad():
        close(their_loss(model)[0], ours.logits(IDS))
    if name in ("dora", "pissa", "ia3"):
        merge(ours)
        with torch.no_grad():
            close(their_loss(model.merge_and_unload())[0], ours.logits(IDS))


def steps(model: Decoder, **settings: Any) -> Decoder:
    config = resolve({"lr": 1e-2, "clip": 0, **settings})
    optimizer = optimizer_of(model.train(), config)
    for step in range(3):
        set_learning_rate(optimizer, 1e-2)
        train_step(model, optimizer, [make_batch([ROW])], config, step).read()
    return model.eval()


def their_steps(model: Any, optimizer: Any) -> None:
    targets = int((torch.from_numpy(ROW.targets) != IGNORE).sum())
    for _ in range(3):
        (their_loss(model.train())[1] / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_lora_plus_takes_the_steps_of_pefts_optimizer(tmp_path: Path):
    """DoRA too: its magnitudes learn as fast as B."""
    torch.manual_seed(0)  # of peft's start
    from peft.optimizers import create_loraplus_optimizer

    for dora in (False, True):
        model = peft.get_peft_model(
            theirs("qwen2", tmp_path / "base"), peft.LoraConfig(r=3, lora_alpha=7, use_dora=dora, target_modules=KEYS)
        )
        model.save_pretrained(tmp_path / "a")
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0)
        their_steps(model.double(), optimizer)
        ours = load_model(tmp_path / "base", torch.float64)
        load_adapter(ours, tmp_path / "a")
        steps(ours.double(), loraplus_lr_ratio=16, method="dora" if dora else "lora")
        with torch.no_grad():
            close(ours.logits(IDS), their_loss(model)[0], 1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_and_learns_as_in_peft(rslora: bool, tmp_path: Path):
    base = theirs("qwen2", tmp_path / "base").float()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, init_lora_weights="pissa", target_modules=KEYS)
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    ours = prepare(load_model(tmp_path / "base", torch.float32), resolve({**OURS["pissa"], "rslora": rslora}))
    pissa_init(ours)
    for path, wrapper in adapters(ours):
        a, b = (start[f"base_model.model.{path}.lora_{half}.default.weight"] for half in "AB")
        close(wrapper.lora_B @ wrapper.lora_A, b @ a, 1e-4)
    with torch.no_grad():
        close(ours.eval().logits(IDS), their_loss(model)[0], 1e-5)
    their_steps(
        model, torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2, weight_decay=0)
    )
    steps(ours)
    with torch.no_grad():
        logits = their_loss(model)[0]
        close(ours.logits(IDS), logits, 1e-4)
    if rslora:
        return  # peft does not convert it
    save_adapter(ours, tmp_path / "ours")
    again = load_model(tmp_path / "base", torch.float32)
    load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        close(again.logits(IDS), ours.logits(IDS), 1e-6)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 6
    model.save_pretrained(tmp_path / "plain")
    found = SafetensorsFile(tmp_path / "plain" / "adapter_model.safetensors")
    assert found.entries
    from_theirs = load_model(tmp_path / "base", torch.float32)
    load_adapter(from_theirs, tmp_path / "plain")
    with torch.no_grad():
        close(from_theirs.logits(IDS), logits, 1e-4)
