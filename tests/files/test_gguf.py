"""The GGUF writer, by a reader of the tests: layout, values of every kind, and what quantised blocks may be off by."""

from pathlib import Path

import pytest
import torch
from gguf_file import decoded, read_gguf
from torch import Tensor

from minilora.files import gguf
from minilora.files.gguf import KINDS, encode, write_gguf

METADATA = {"a.text": "é你", "a.number": 7, "a.real": 0.5, "a.switch": True, "a.off": False, "a.texts": ["x", ""], "a.numbers": [1, -2],
            "a.none": []}  # fmt: skip


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every kind, sizes that leave gaps to be filled, and a tensor that is written in several pieces."""
    monkeypatch.setattr(gguf, "NUMBERS_AT_ONCE", 64)
    tensors = {
        f"{kind}.{i}": numbers(*shape) for kind in KINDS for i, shape in enumerate([(3, 64), (1, 32), (2, 3, 32)])
    }
    tensors |= {"f32.odd": numbers(5), "f16.odd": numbers(3, 1)}
    shapes = {name: (name.split(".")[0], tuple(t.shape)) for name, t in tensors.items()}
    write_gguf(tmp_path / "x", METADATA, shapes, tensors.__getitem__)
    metadata, found = read_gguf(tmp_path / "x")
    assert metadata == METADATA and found.keys() == tensors.keys()
    for name, (kind, values) in found.items():
        assert kind == shapes[name][0]
        assert torch.equal(values.flatten(), decoded(kind, encode(tensors[name].flatten(), kind).numpy().tobytes()))
        if kind == "f32":
            assert torch.equal(values, tensors[name])


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_blocks_are_off_by_no_more_than_their_rounding(kind: str, scale: float):
    """Half a step; in q4_0, whose codes go from -8 to 7, a whole one at the end that has no code; and the scale's own rounding."""
    x = numbers(4096).reshape(-1, 32) * scale * numbers(128, 1).exp()
    x[3] = 0
    x[4, 1:] = 0
    off = (decoded(kind, encode(x.flatten(), kind).numpy().tobytes()).reshape(x.shape) - x).abs()
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    reach = {"q8_0": 127, "q4_0": 8}[kind]
    step = largest.abs() / reach
    no_code = -x / largest * 8 > 7.5 if kind == "q4_0" else torch.zeros_like(x, dtype=torch.bool)
    allowed = torch.where(no_code, step, step / 2)
    rounding = reach * (step * 2**-11 + 2**-25)  # of the scale, to fp16
    assert (off <= allowed * (1 + 1e-5) + rounding).all()
    assert off.max() > 0.2 * step.max()  # it is rounded at all


def test_a_block_by_hand():
    """Scale 2 and codes 127, 64, -1; the number of largest magnitude is -8 of q4_0's steps, whatever its sign."""
    x = torch.zeros(32)
    x[0], x[1], x[2], x[17] = 254, 127, -2, -254
    raw = encode(x, "q8_0")
    assert raw[:2].view(torch.float16).item() == 2 and raw[2:].view(torch.int8)[[0, 1, 2, 17]].tolist() == [
        127,
        64,
        -1,
        -127,
    ]
    x = torch.zeros(32)
    x[0], x[16], x[1] = 16, -8, 2
    raw = encode(x, "q4_0")
    assert raw[:2].view(torch.float16).item() == -2
    assert (raw[2] & 15, raw[2] >> 4, raw[3] & 15, raw[3] >> 4) == (0, 12, 7, 8)
