"""What a model folder is and how minilora reads it: family, sizes, linears, chat format, and what it does not read.

Everything comes from config.json, the tokenizer's files and the headers of the safetensors files; no tensor is read. A folder
may have a config.json alone. What would stop a training is collected as a problem.
"""

from collections import Counter
from typing import Any

import torch

from minilora.models.decoder import Decoder

from ..checkpoint.load import check_shapes, classes_of, empty_model, keys_not_read, read_config
from ..checkpoint.quantized import Stored
from ..checkpoint.save import CARRIED, COMPANIONS, own_code
from ..errors import ModelError
from ..files.model_folder import Folder, ModelFolder
from ..files.tensors import INDEX
from ..lora import add_lora, linears
from ..machine.kernel_paths import kernel_paths
from ..sampling import read_generation
from ..targets import chosen
from ..text.tokenizer import TOKENIZER_FILES, check_fits, load_tokenizer

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


def describe(folder: Folder, targets: str = "all-linear") -> dict[str, Any]:
    """A model folder as plain values for JSON; `problems` lists what and what to do, and is empty if it can be trained.

    Raises ModelError if there is no config.json that could be read, UsageError for targets that no linear has.
    """
    folder = ModelFolder.of(folder)
    j = folder.config
    found: dict[str, Any] = {
        "folder": str(folder),
        "model_type": j.get("model_type"),
        "architectures": classes_of(j),
        "problems": [],
    }
    model = None
    try:
        model = empty_model(read_config(folder))
        found |= _sizes(model) | {"linears": _linears(model, targets), "kernels": _kernels(model, targets)}
    except ModelError as error:
        found["problems"].append(str(error))
    for part, needed in ((_weights, _has_weights(folder)), (_chat, _has_tokenizer(folder))):
        try:
            found |= part(folder, model) if needed else {}
        except ModelError as error:
            found["problems"].append(str(error))
    try:
        found["unknown_keys"] = keys_not_read(folder)
    except ModelError:
        found["unknown_keys"] = None  # of a family that is not here, which is among the problems
    return found | {"code": own_code(folder.path), "ignored": _ignored(folder)}


def _sizes(model: Decoder) -> dict[str, Any]:
    c = model.config
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    return {
        "family": c.family,
        "dtype": str(c.dtype).removeprefix("torch."),
        "sizes": {
            "layers": c.layers,
            "width": c.width,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_size": c.head_size,
            "ffn": c.ffn,
            "vocab": c.vocab,
            "max_positions": c.max_positions,
            "tied": c.tied,
        },
        "parameters": sum(parameters.values()),
        "parameters_of": {
            "linears": sum(m.weight.numel() for m in linears(model).values()),
            "head": model.head.numel(),
        },
    }


def _linears(model: Decoder, targets: str) -> list[dict[str, Any]]:
    """The linears that would get adapters, those of all layers under one name: name, [out, in], bias, how many."""
    all_of_them = linears(model)
    groups = Counter()
    for path in chosen(list(all_of_them), targets):
        linear = all_of_them[path]
        name = ".".join("*" if part.isdigit() else part for part in path.split("."))
        groups[name, linear.out_features, linear.in_features, linear.bias is not None] += getattr(linear, "experts", 1)
    return [
        {"name": name, "shape": [out, into], "bias": bias, "count": n} for (name, out, into, bias), n in groups.items()
    ]


def _kernels(model: Decoder, targets: str) -> list[str]:
    """Which kernels each operation uses on this machine, with adapters on the targets."""
    adapted = empty_model(model.config)
    add_lora(adapted, targets)
    return kernel_paths(adapted, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _has_weights(folder: ModelFolder) -> bool:
    return (folder / INDEX).exists() or any(p.suffix in WEIGHTS for p in folder.path.iterdir())


def _weights(folder: ModelFolder, model: Decoder | None) -> dict[str, Any]:
    tensors = folder.tensors
    size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors.shapes.values())
    if model is not None:
        check_shapes(model, Stored.of(folder, model))
    beside = sorted({match[1] for name in tensors.shapes if (match := CARRIED.fullmatch(name))})
    return {
        "weights": {
            "tensors": len(tensors.shapes),
            "bytes": size,
            "ignored": sorted(tensors.ignored),
            "carried": beside,
        }
    }


def _has_tokenizer(folder: ModelFolder) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _chat(folder: ModelFolder, model: Decoder | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    if model is not None:
        check_fits(tokenizer, model.config.vocab, folder)
    names = {i: text for text, i in tokenizer.specials.items()}
    stops = sorted(tokenizer.stop_ids | read_generation(folder)[1])
    return {
        "ids": tokenizer.size,
        "template": tokenizer.template.name,
        "default_system": tokenizer.template.default_system,
        "template_note": tokenizer.notes.get("chat"),
        "last_answer_alone": tokenizer.template.last_only,
        "stop": [{"id": i, "token": names.get(i)} for i in stops],
    }


def _ignored(folder: ModelFolder) -> list[str]:
    """Names in the folder that minilora does not read."""
    read = {*COMPANIONS, *own_code(folder.path), INDEX}
    names = sorted(p.name for p in folder.path.iterdir() if p.name not in read and p.suffix != ".safetensors")
    return [name for name in names if not name.startswith(".")]


def text_of(found: dict[str, Any]) -> str:
    """A description for people."""
    lines = [f"folder      {found['folder']}"]
    names = " ".join(", ".join(found["architectures"]).split()) if "architectures" in found else ""
    if "family" in found:
        s = found["sizes"]
        tied = "tied to the head" if s["tied"] else "a head of its own"
        kv = f"{s['kv_heads']} for keys and values"
        lines += [
            f"family      {found['family']}   {names}",
            f"sizes       {s['layers']} layers, width {s['width']:,}, {s['heads']} heads of {s['head_size']} ({kv})",
            f"            ffn {s['ffn']:,}, vocabulary {s['vocab']:,} ({tied}), positions up to {s['max_positions']:,}",
            f"parameters  {found['parameters']:,} {found['dtype']}",
        ]
        rows = found["linears"]
        count, trained = sum(r["count"] for r in rows), sum(r["count"] * sum(r["shape"]) for r in rows)
        lines.append(f"adapters    {count} linears, {trained:,} parameters for each rank")
        wide = max((len(r["name"]) for r in rows), default=0)
        for r in rows:
            out, into = r["shape"]
            lines.append(
                f"            {r['count']:>3} x {r['name']:<{wide}}  {into:,} -> {out:,}{'  bias' * r['bias']}"
            )
        lines.append("kernels     " + "\n            ".join(found["kernels"]))
    else:
        lines.append(f"model_type  {found['model_type']}   {names}")
    if "weights" in found:
        w = found["weights"]
        lines.append(f"weights     {w['tensors']:,} tensors, {w['bytes'] / 1e9:,.3g} GB")
        if w["carried"]:
            lines.append(f"            {', '.join(w['carried'])}: not trained, in a merged folder as here")
    elif not found["problems"]:
        lines.append("weights     none here")
    if "template" in found:
        system = found["default_system"]
        lines += [
            f"tokenizer   {found['ids']:,} ids",
            f"template    {found['template']}   "
            + (f"default system {system!r}" if system else "no default system")
            + (", the last answer of a row is trained" if found["last_answer_alone"] else ""),
            *([f"            {found['template_note']}"] if found["template_note"] else []),
            "stop        " + ", ".join(f"{s['token'] or '?'} {s['id']}" for s in found["stop"]),
        ]
    elif not found["problems"]:
        lines.append("tokenizer   none here")
    if found["unknown_keys"]:
        lines.append("config      " + found["unknown_keys"])
    if found["code"]:
        lines.append("code        " + ", ".join(found["code"]) + " (copied with a merged model, never run)")
    if found["ignored"]:
        lines.append("not read    " + ", ".join(found["ignored"]))
    if found.get("weights", {}).get("ignored"):
        lines.append("            tensors " + ", ".join(found["weights"]["ignored"]))
    lines += [f"problem     {p}".replace("\n", "\n            ") for p in found["problems"]]
    return "\n".join(lines)
