"""Examples on disk: a data set of any size in a few bytes of memory a row.

Every row is rendered once. Its tokens go to a file, in the cache folder or unnamed in the system's temporary folder. Memory holds
one record a row: where its tokens start, how many there are, the number of the row, and its hashes.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, overload

import numpy as np

from ..errors import DataError, ModelError
from ..files.atomic import atomic_folder, verify_manifest
from ..files.regular import SMALL, open_file, read_file
from ..files.run_folder import require_outside_runs
from ..files.strict_json import parse_json
from .files import Places

IGNORE = -100
RECORD = np.dtype(
    [("start", "<i8"), ("length", "<i4"), ("trained", "<i4"), ("row", "<i8"), ("question", "<u8"), ("content", "<u8"),
     ("prefix", "<i4"), ("second", "<i4")]
)  # fmt: skip
BYTES = 5  # of a token: its id as int32, and whether it is trained


@dataclass(frozen=True)
class Example:
    """One conversation: ids and targets int64 [n]; targets[t] is the token that follows t if it is trained, else -100.

    prefix is how many first tokens see each other, None for a model that is causal throughout. A pair of conversations
    (preferences.py) has one after the other: the second begins at `second`.
    """

    ids: np.ndarray
    targets: np.ndarray
    where: str
    prefix: int | None = None
    second: int = 0

    @property
    def lengths(self) -> list[int]:
        """Of its documents."""
        return [self.second, len(self.ids) - self.second] if self.second else [len(self.ids)]

    @property
    def trained(self) -> int:
        return int((self.targets != IGNORE).sum())


class TokenStore:
    """The tokens of rows, written once and read by number.

    `records` is of RECORD; `digest` hashes the tokens and their masks; `rate` is how often training sees each row; who
    draws the rows sets it.
    """

    rate: float

    def __init__(self, file: BinaryIO, records: np.ndarray, digest: str, source: Places):
        self._file, self.records, self.digest, self.source = file, records, digest, source

    def __len__(self) -> int:
        return len(self.records)

    def __del__(self):
        self._file.close()

    def example(self, number: int) -> Example:
        record = self.records[number]
        n, start = int(record["length"]), int(record["start"])
        raw = os.pread(self._file.fileno(), BYTES * n, BYTES * start)
        if len(raw) != BYTES * n:
            raise DataError(
                "a file of cached tokens was cut short while it was read", "Delete the cache and start again."
            )
        ids = np.frombuffer(raw, "<i4", n).astype(np.int64)
        trained = np.frombuffer(raw, bool, n, 4 * n)
        prefix = None if record["prefix"] < 0 else int(record["prefix"])
        return Example(ids, shifted(ids, trained), self.source.where(int(record["row"])), prefix, int(record["second"]))


def shifted(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The targets of ids [n] of which `trained` bool [n] are to be predicted: the next id where it is trained, else -100."""
    targets = np.full_like(ids, IGNORE)
    targets[:-1][trained[1:]] = ids[1:][trained[1:]]
    return targets


class Writer:
    """Takes rendered rows one by one into a file, which it closes if that fails."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._tokens = file, hashlib.sha256(), 0
        self._records = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:
            self._file.close()

    def add(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        row: int,
        question: int,
        content: int,
        prefix: int | None,
        second: int = 0,
    ) -> None:
        """ids int64 [n] below 2^31, trained bool [n]; question and content are 64-bit hashes; the others as an Example's."""
        raw = ids.astype("<i4").tobytes() + trained.tobytes()
        self._digest.update(len(ids).to_bytes(8, "little") + raw)
        self._file.write(raw)
        targets = int(trained[1:].sum())
        record = (self._tokens, len(ids), targets, row, question, content, -1 if prefix is None else prefix, second)
        self._records += np.array(record, RECORD).tobytes()
        self._tokens += len(ids)

    def finish(self, source: Places) -> TokenStore:
        """The store, which the file belongs to from now on."""
        self._file.flush()
        return TokenStore(self._file, np.frombuffer(self._records, RECORD), self._digest.hexdigest(), source)


class Examples(Sequence[Example]):
    """Rows of several stores in an order, in which a row may be repeated; each is read from the disk when it is asked for."""

    def __init__(self, stores: list[TokenStore], order: np.ndarray | None = None):
        """order int64: numbers into the stores laid end to end; default all of them once."""
        self.stores = stores
        self._ends = np.cumsum([len(s) for s in stores])
        self.order = np.arange(sum(map(len, stores))) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Examples": ...
    def __getitem__(self, place: int | slice) -> "Example | Examples":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        store, number = self._at(place)
        return store.example(number)

    def _at(self, place: int) -> tuple[TokenStore, int]:
        number = int(self.order[place])
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self.stores[which], number - int(self._ends[which]) + len(self.stores[which])

    def take(self, places: np.ndarray) -> "Examples":
        """The examples at places int64."""
        return Examples(self.stores, self.order[places])

    def column(self, name: str) -> np.ndarray:
        """A field of RECORD for each example."""
        if not self.stores:
            return np.zeros(0, RECORD[name])
        return np.concatenate([s.records[name] for s in self.stores])[self.order]

    @property
    def firsts(self) -> np.ndarray:
        """bool [n]: whether an example is the first of its row, of which a long text makes several."""
        marks = [np.diff(s.records["row"], prepend=-1) != 0 for s in self.stores]
        return np.concatenate(marks)[self.order] if marks else np.zeros(0, bool)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, 0 if there is none."""
        return int(self.column("length").max(initial=0))

    def value(self, place: int) -> tuple[str, Any]:
        """(where, value) of the row behind an example, as its file has it."""
        store, number = self._at(place)
        row = int(store.records[number]["row"])
        return store.source.where(row), store.source.value(row)

    def digest(self) -> str:
        """A hash of the tokens, masks and order of the examples."""
        parts = "".join(s.digest for s in self.stores).encode() + self.order.astype("<i8").tobytes()
        return hashlib.sha256(parts).hexdigest()[:16]

    def joined(self, other: "Examples") -> "Examples":
        """These examples and then the others."""
        return Examples(
            self.stores + other.stores, np.concatenate([self.order, other.order + sum(map(len, self.stores))])
        )


class TokenCache:
    """A folder of stores, each under a hash of everything that decides its tokens."""

    def __init__(self, folder: Path, model: Path, adapter: Path | None = None):
        """adapter: a folder whose tokenizer or chat template may go before the model's. OutputInUse for a place that a run fills."""
        require_outside_runs(folder)
        self.folder = folder
        self._base = {"tokenizer": tokenizer_hash(model), "code": _code_hash()}
        if adapter is not None:
            self._base["adapter"] = tokenizer_hash(adapter)

    def key(self, **parts: Any) -> str:
        """The name of a store: file hash, settings and chosen rows come as parts."""
        return hashlib.sha256(json.dumps(self._base | parts, sort_keys=True).encode()).hexdigest()[:32]

    def load(self, key: str, source: Places) -> tuple[TokenStore, dict[str, Any]] | None:
        """A store and the report on it if it is there and every byte is as it was written."""
        folder = self.folder / key
        if not folder.is_dir() or verify_manifest(folder) is not None:
            return None
        notes = parse_json(read_file(folder / "notes.json", DataError, SMALL))
        records = np.fromfile(folder / "records", RECORD)
        return TokenStore(open_file(folder / "tokens", DataError), records, notes["digest"], source), notes["report"]

    def write(self, key: str) -> Any:
        """A new folder to fill, as a context; it appears whole or not at all."""
        return atomic_folder(self.folder / key, manifest=True)


def unnamed_file() -> BinaryIO:
    """A file without a name in the system's temporary folder; the space is free again when it is closed."""
    return tempfile.TemporaryFile()  # type: ignore[return-value]


TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")


def tokenizer_hash(model: Path) -> str:
    """A hash of every small file of a model folder that a tokenizer or a chat format may be read from."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in TOKENIZER_FILES for p in model.glob(pattern)}):
        if not path.name.endswith(".index.json"):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(read_file(path, ModelError)).digest())
    return digest.hexdigest()


def _code_hash() -> str:
    """A hash of the sources that turn rows into tokens: another version fills the cache anew."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *package.glob("rows/*.py"), *package.glob("text/*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
