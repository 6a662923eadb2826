"""A pickle of weights, read as the child process of convert reads it: the bytes of a file, or the pickle alone, in an archive with storages."""

import io
import pickle
import zipfile
from functools import cache

import torch

from minilora.checkpoint.unpickle import rewrite
from minilora.errors import ModelError
from minilora.files.safetensors import SafetensorsFile

from ..room import fresh

WORDS = ["ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nFloatStorage\n", "cos\nsystem\n", "cbuiltins\neval\n", "ccollections\nOrderedDict\n", "(lp0\n", "}q\x00", "Q", "R", "b", "u",
         "(", "t", "\x85", "\x86", "\x87", "K\x00", "J\x00\x00\x00\x40", "\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40", "storage", "0", "1", "cpu", "cuda:0", "meta", "N", "\x88", "."]  # fmt: skip
SEEDS: list[bytes] = []
STORAGES = {"0": bytes(64), "1": bytes(range(8)), "2": bytes(8), "3": bytes(64)}


class _Call:
    def __reduce__(self):
        return open, ("/dev/shm/minilora-was-here", "w")


@cache
def _tensors() -> dict:
    x = torch.arange(16, dtype=torch.float32)
    return {
        "a": x.view(4, 4),
        "b": x.view(4, 4).T,
        "c": torch.zeros(4, dtype=torch.float16),
        "d": torch.nn.Parameter(torch.ones(2)),
    }


def _saved(value: object, zipped: bool = True) -> bytes:
    raw = io.BytesIO()
    torch.save(value, raw, _use_new_zipfile_serialization=zipped)
    return raw.getvalue()


def prepare() -> None:
    whole = _saved(_tensors())
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        alone = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    SEEDS[:] = [
        alone,
        whole,
        _saved(_tensors(), False),
        pickle.dumps({"a": _Call()}, 2),
        pickle.dumps({"a": 1}),
        pickle.dumps({"a": _Call()}, 4),
    ]


def target(data: bytes) -> None:
    folder = fresh("pickles")
    source, out = folder / "x.bin", folder / "x.safetensors"
    if data[:2] == b"PK" or data[:1] != b"\x80":
        source.write_bytes(data)
    else:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("x/data.pkl", data)
            for name, held in STORAGES.items():
                archive.writestr(f"x/data/{name}", held)
            archive.writestr("x/version", "3\n")
    wrong = rewrite(source, out)
    if wrong is not None:
        assert len(wrong) < 10_000
        raise ModelError(wrong)
    SafetensorsFile(out)
