"""Folders whose weights are quantised already: bitsandbytes' 4 and 8 bits, and FP8 by blocks, tensor by tensor.

    bitsandbytes, 4 bits    weight [n, 1] U8, weight.absmax, weight.quant_map, weight.nested_absmax, weight.nested_quant_map,
                            weight.quant_state.bitsandbytes__nf4 (JSON as bytes)
    bitsandbytes, 8 bits    weight I8, SCB F32, weight_format U8
    FP8                     weight F8_E4M3, weight_scale_inv

Each kind is read into its class (kernels/nf4.py, int8_rows.py, fp8_blocks.py). What does not fit, or another kind, is
refused in one line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor, nn

from minilora.kernels.fp8_blocks import E4M3, FP8Weight, grid
from minilora.kernels.fp8_rows import FP8RowsWeight
from minilora.kernels.int8_rows import Int8Weight
from minilora.kernels.nf4 import BLOCK, NESTED_BLOCK, NF4, NF4Weight, dynamic_levels
from minilora.kernels.quantized import QuantizedWeight, Weight, weight_as
from minilora.models.quantized import quantized_weights

from ..errors import ModelError
from ..files.model_folder import ModelFolder
from ..files.tensors import Tensors
from .places import Place, by_weight, places

STATE = "quant_state.bitsandbytes__"
NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4")
KEYS = ("quantization_config", "quantization_bit", "compression_config", "quantization")  # of config.json
QUANTS = ("nf4", "int8")  # that a plain weight is put into while it is loaded
# what has a scale of its own
BLOCKS = {
    "nf4": f"in blocks of {BLOCK}",
    "int8": "by rows",
    "fp8": "in blocks of 128 x 128",
    "fp8-rows": "with a scale a row",
}
FORMS: dict[str, type[QuantizedWeight]] = {
    "nf4": NF4Weight, "int8": Int8Weight, "fp8": FP8Weight, "fp8-rows": FP8RowsWeight
}  # fmt: skip


def format_of(j: dict[str, Any]) -> str | None:
    """The format that a config.json says its weights are in, None if plain; ValueError names one not read here."""
    said = next((j[k] for k in KEYS if j.get(k)), None)
    if said is None:
        return None
    settings = said if isinstance(said, dict) else {}
    method, kind = settings.get("quant_method"), settings.get("bnb_4bit_quant_type", "nf4")
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return "int8"
    if method == "bitsandbytes" and kind == "nf4":
        return "nf4"
    if method == "fp8" and settings.get("weight_block_size") == [128, 128] and settings.get("fmt", "e4m3") == "e4m3":
        return "fp8"
    if method is None and {"group_size", "bits"} <= settings.keys():
        method = f"MLX, {settings['bits']} bits"
    if method == "bitsandbytes":
        method = f"bitsandbytes, {str(kind)[:20]}"
    told = str(method)[:40] if method else f"{said} bits" if isinstance(said, int) else ""
    raise ValueError("the weights are quantised" + (f" ({told})" if told else ""))


def plain_config(j: dict[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says its weights are quantised."""
    return {key: value for key, value in j.items() if key not in KEYS}


def in_memory(quant: str, j: dict[str, Any]) -> str:
    """The format, or off, that the linears of a folder with this config.json have in memory."""
    return format_of(j) or "off" if quant == "keep" else quant


def quant_of(model: nn.Module) -> str:
    """The format of a model's quantised weights, or off."""
    return next((w.name for w in quantized_weights(model).values()), "off")


def described(quant: str) -> str:
    """A base with weights in this format, for people."""
    return "a base that is not quantised" if quant == "off" else f"a base in {quant}"


def quantized_note(model: nn.Module) -> str | None:
    """A line on the quantised weights of a model: format, blocks, bits, bytes, and the error where it is known."""
    weights = quantized_weights(model)
    if not weights:
        return None
    size, count = sum(w.nbytes for w in weights.values()), sum(w.numel() for w in weights.values())
    names = " and ".join(f"{name} {BLOCKS[name]}" for name in sorted({w.name for w in weights.values()}))
    line = f"{names}: {len(weights)} weights at {8 * size / count:.2f} bits, {size / 1e6:,.1f} MB"
    if names.startswith(FP8RowsWeight.name):
        line += ", x and dY rounded to FP8 by tokens for products with them, adapters in the compute dtype"
    errors = {name: w.error for name, w in weights.items() if w.error is not None}
    if not errors:
        return line
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    path = worst.replace(".base.", ".").removesuffix(".weight")
    line += f"; relative error (Frobenius) {100 * mean:.2g} %, at most {100 * errors[worst]:.2g} % ({path})"
    left = [w.error_left for w in weights.values() if w.error_left is not None]
    return line + (f"; {100 * sum(left) / len(left):.2g} % with the adapters of LoftQ" if left else "")


class Stored:
    """The weights of a folder, for a model that has them: which are quantised and how, where each lies, and how it is read."""

    def __init__(self, tensors: Tensors, form: str | None, model: nn.Module):
        self.tensors, self.form = tensors, form
        self.parts = {name: self._parts(name) for name in tensors.shapes if name.endswith(".weight") and self._is(name)}
        self.hidden = {full for parts in self.parts.values() for full in parts.values()}  # no weights by themselves
        shapes = {name: shape for name, (_, shape) in tensors.shapes.items()}
        self.places = by_weight(places(model, shapes))  # of weights that lie otherwise in memory

    @classmethod
    def of(cls, folder: ModelFolder, model: nn.Module) -> Self:
        return cls(folder.tensors, format_of(folder.config), model)

    def _is(self, name: str) -> bool:
        dtype = self.tensors.shapes[name][0]
        if self.form == "nf4":  # the codes may be stored as numbers of 16 bits
            return not dtype.is_floating_point or f"{name}.absmax" in self.tensors.shapes
        return dtype == {"int8": torch.int8, "fp8": E4M3}.get(str(self.form))

    def _parts(self, name: str) -> dict[str, str]:
        """The tensors that belong to a weight, by short names."""
        stem = name.removesuffix("weight")
        names = {"nf4": {p: f"{name}.{p}" for p in NF4_PARTS}, "int8": {"SCB": f"{stem}SCB", "weight_format": f"{stem}weight_format"},
                 "fp8": {"weight_scale_inv": f"{stem}weight_scale_inv"}}  # fmt: skip
        return {short: full for short, full in names[str(self.form)].items() if full in self.tensors.shapes}

    def logical(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that the folder stands for: quantised weights, of the shapes of the model, and plain tensors."""
        return {
            name: (torch.float32, shapes.get(name, shape)) if name in self.parts else (dtype, shape)
            for name, (dtype, shape) in self.tensors.shapes.items()
            if name not in self.hidden
        }

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape [N, K] that a quantised weight has by its own files: codes of 4 bits lie flat, and their state tells it."""
        state = self.parts[name].get(f"{STATE}nf4")
        if state is None:
            return self.tensors.shapes[name][1]
        with self.tensors.reading(state) as raw, suppress(ValueError):
            shape = _state(raw).get("shape")
            if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape):
                return tuple(shape)
        return ()  # which reading the weight refuses

    def has_plain(self, name: str, shape: torch.Size) -> bool:
        """Whether a weight [N, K] is in the folder as one matrix, and not quantised."""
        place = self.places.get(name, [(name, Place(name, slice(None), tuple(shape)))])[0]
        found = self.tensors.shapes.get(place[0], ((), ()))[1]
        return len(found) == 2 and found == place[1].shape and name not in self.parts

    def empty(self, name: str, shape: torch.Size, device: str) -> QuantizedWeight:
        """What `reading` gives for a quantised weight, without what it holds."""
        if self.form == "nf4":
            plain = self.tensors.shapes.get(f"{name}.absmax", (torch.uint8,))[0] != torch.uint8
            return NF4Weight.empty(shape, device, nested=not plain)
        return FORMS[str(self.form)].empty(shape, device)

    @contextmanager
    def reading(self, name: str, shape: torch.Size) -> Iterator[Weight]:
        """A context with the tensor of that name, mapped, or the quantised weight [N, K] that it is the codes of."""
        if name in self.places and name not in self.parts:
            yield self._stack(name, shape)
        else:
            with self._reading(name, shape) as value:
                yield value

    @contextmanager
    def _reading(self, file: str, shape: torch.Size) -> Iterator[Weight]:
        """The same by the name that it has in the folder."""
        if file in self.parts:
            yield self._read(file, shape)
        else:
            with self.tensors.reading(file) as value:
                yield value

    @contextmanager
    def reading_linear(self, path: str, shape: torch.Size) -> Iterator[Weight]:
        """The weight [N, K] of a linear, or of one expert (...experts.7.gate_up_proj); ModelError if there is none."""
        layer, e, leaf = path.rsplit(".", 2)
        apart = [f"{layer}.{e}.{part}.weight" for part in ("gate_proj", "up_proj")]
        if f"{path}.weight" in self.tensors.shapes:
            with self.reading(f"{path}.weight", shape) as value:
                yield value
        elif layer.endswith(".experts") and f"{layer}.{leaf}" in self.tensors.shapes:
            with self.tensors.reading(f"{layer}.{leaf}") as stack:
                one = stack[int(e)]
                yield one if one.shape == shape else one.T
        elif leaf == "gate_up_proj" and set(apart) <= self.tensors.shapes.keys():
            half = torch.Size((shape[0] // 2, shape[1]))
            with self.reading(apart[0], half) as gate, self.reading(apart[1], half) as up:
                yield torch.cat([weight_as(part, torch.float32) for part in (gate, up)])
        else:
            raise ModelError(
                f"{self.tensors.folder} has no {path}.weight", "Give the base that the adapter was trained on."
            )

    def _stack(self, name: str, shape: torch.Size) -> Tensor:
        """A weight from the tensors of the folder that it is made of; quantised ones are widened."""
        whole: Tensor | None = None
        for file, place in self.places[name]:
            with self._reading(file, torch.Size(place.shape)) as value:
                plain = value.weight_as(torch.float32) if isinstance(value, QuantizedWeight) else value
                whole = plain.new_empty(shape) if whole is None else whole
                whole[place.rows] = place.matrix(plain)
        assert whole is not None, name
        return whole

    def _read(self, name: str, shape: torch.Size) -> QuantizedWeight:
        found: dict[str, Tensor] = {}
        for short, full in {"weight": name, **self.parts[name]}.items():
            with self.tensors.reading(full) as part:
                found[short] = part.clone()
        make = {"nf4": _nf4, "int8": _int8, "fp8": _fp8}[str(self.form)]
        try:
            if len(shape) != 2:
                raise ValueError(f"has shape {list(shape)}; a matrix belongs there")
            return make(found, shape)
        except (ValueError, KeyError) as error:
            reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise ModelError(
                f"{self.tensors.folder}: {name}, in {self.form}, {reason}",
                "Download the folder again, or use the bf16 release of this model.",
            ) from None


def _nf4(found: dict[str, Tensor], shape: torch.Size) -> NF4Weight:
    state, absmax, blocks = _state(found[f"{STATE}nf4"]), found["absmax"], -(-shape.numel() // BLOCK)
    _same("quant_type", state.get("quant_type"), "nf4")
    _same("blocksize", state.get("blocksize"), BLOCK)
    _same("shape", state.get("shape"), list(shape))
    codes = found["weight"].flatten().view(torch.uint8)
    _same("bytes of codes", len(codes), -(-shape.numel() // 2))
    _same("scales", list(absmax.shape), [blocks])
    _same("levels (quant_map)", found["quant_map"].tolist(), torch.tensor(NF4).tolist())
    if absmax.dtype != torch.uint8:
        if "nested_absmax" in found:
            raise ValueError(f"has nested_absmax, and scales (absmax) in {absmax.dtype}, which are no codes")
        return NF4Weight((shape[0], shape[1]), codes, _finite("absmax", absmax))
    _same("nested_blocksize", state.get("nested_blocksize"), NESTED_BLOCK)
    nested, levels, offset = found["nested_absmax"], found["nested_quant_map"], state.get("nested_offset")
    _same("scales of scales", list(nested.shape), [-(-blocks // NESTED_BLOCK)])
    if levels.shape != (256,) or not torch.allclose(levels.float(), dynamic_levels(), rtol=0, atol=1e-6):
        raise ValueError("has levels of scales (nested_quant_map) that are not bitsandbytes'")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 1e38:
        raise ValueError(f"has nested_offset {str(offset)[:40]!r}; a finite number belongs there")
    return NF4Weight((shape[0], shape[1]), codes, absmax, _finite("nested_absmax", nested), torch.tensor(float(offset)))


def _state(raw: Tensor) -> dict[str, Any]:
    """The JSON object that bitsandbytes puts into a tensor of bytes."""
    try:
        state = json.loads(raw.numpy().tobytes())
        return dict(state)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("has a quant_state that is not a JSON object") from None


def _int8(found: dict[str, Tensor], shape: torch.Size) -> Int8Weight:
    _same("shape", list(found["weight"].shape), list(shape))
    _same("scales (SCB)", list(found["SCB"].shape), [shape[0]])
    _same("weight_format", found.get("weight_format", torch.tensor(0)).tolist(), 0)  # rows, not the tiles of old cards
    return Int8Weight(found["weight"], _finite("SCB", found["SCB"]))


def _fp8(found: dict[str, Tensor], shape: torch.Size) -> FP8Weight:
    codes, scales = found["weight"], found["weight_scale_inv"]
    _same("shape", list(codes.shape), list(shape))
    _same("blocks of 128 x 128 (weight_scale_inv)", list(scales.shape), list(grid(shape)))
    if ((codes.view(torch.uint8) & 127) == 127).any():
        raise ValueError("holds values that are not finite (NaN)")
    return FP8Weight(codes, _finite("weight_scale_inv", scales))


def _same(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"has {what} {str(found)[:60]!r}; {str(wanted)[:60]} belongs there")


def _finite(what: str, scales: Tensor) -> Tensor:
    """The scales, of magnitudes, in fp32."""
    if not scales.is_floating_point() or not scales.isfinite().all() or (scales < 0).any():
        raise ValueError(f"has scales ({what}) that are not finite numbers, or below 0")
    return scales.float()
