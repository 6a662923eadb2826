"""The tensors of a checkpoint folder: model.safetensors, or the shards that model.safetensors.index.json lists."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from ..errors import ModelError
from ..terminal import shell
from .model_folder import read_json
from .safetensors import SafetensorsFile

INDEX = "model.safetensors.index.json"
# buffers that old checkpoints carry and that follow from config.json
IGNORED = re.compile(r".*\.(rotary_emb|rotary_pos_emb)\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


class Tensors:
    """The tensors of a checkpoint folder, by name, in whatever files they lie."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        for file in self._shards():
            for name in file.entries:
                if name in self._files:
                    raise ModelError(
                        f"{file.path}: tensor {name!r} also lies in {self._files[name].path.name}",
                        "The folder mixes two checkpoints: download it again.",
                    )
                self._files[name] = file
        self.ignored = [n for n in self._files if IGNORED.fullmatch(n)]
        self.shapes = {
            n: (f.entries[n].dtype, f.entries[n].shape) for n, f in self._files.items() if not IGNORED.fullmatch(n)
        }

    def _shards(self) -> Iterator[SafetensorsFile]:
        if (self.folder / "model.safetensors").exists():
            yield SafetensorsFile(self.folder / "model.safetensors")
            return
        if not (self.folder / INDEX).exists():
            self._refuse_without_weights()
        index = self.folder / INDEX
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
            raise ModelError(f"{index}: weight_map is missing or empty", "Download or copy the file again.")
        shards = sorted(set(places.values()))
        for shard in shards:
            plain = shard == Path(shard).name and shard.isprintable() and len(shard.encode()) <= 255
            if not plain or not shard.endswith(".safetensors"):
                raise ModelError(
                    f"{index}: {shard[:80]!r} is not a file name in this folder", "Do not trust this folder."
                )
        absent = [shard for shard in shards if not (self.folder / shard).is_file()]
        if absent:
            raise ModelError(
                f"{self.folder}: {', '.join(absent)} missing ({len(absent)} of {len(shards)} shards)",
                "Download the missing files.",
            )
        for shard in shards:
            file = SafetensorsFile(self.folder / shard)
            listed = {name for name, place in places.items() if place == shard}
            wrong = sorted(listed ^ set(file.entries))
            if wrong:
                raise ModelError(
                    f"{self.folder / shard}: {fold(wrong)} not where the index says",
                    f"{INDEX} and the shards are of two checkpoints.",
                )
            yield file

    def _refuse_without_weights(self) -> None:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise ModelError(
                f"{self.folder}: the weights are pickle ({pickles[0]}), which can run code when it is read",
                f"Turn them into safetensors: {shell('convert', self.folder, 'OUT')}",
            )
        raise ModelError(
            f"{self.folder}: no model.safetensors and no {INDEX}", "Give the folder of a Hugging Face checkpoint."
        )

    def reading(self, name: str) -> "_Reading":
        """A context with the tensor of that name, mapped; its pages are given back at the end."""
        return _Reading(self._files[name], name)


class _Reading:
    def __init__(self, file: SafetensorsFile, name: str):
        self.file, self.name = file, name

    def __enter__(self) -> Tensor:
        return self.file.tensor(self.name)

    def __exit__(self, *_) -> None:
        self.file.forget(self.name)


def fold(names: Iterable[str]) -> str:
    """Names on one line, those that differ in the layer number alone as one with a count."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{pattern} ({len(g)} tensors)" for pattern, g in counts.items())
