"""A disk that may lose its power: which states it can be in afterwards, from the operations that were done.

The model is that of POSIX, weaker than any journaling file system (Pillai et al., All File Systems Are Not Created Equal, OSDI 2014): what was
written to a file is safe once the file was flushed, a name once its folder was. Until then a write may be missing, short or
zeros, and each change of a name may be there or not, in any order; a rename is one change.
"""

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.reliability.operations import Operation

Entries = dict[str, "Node"]
State = dict[str, bytes | str | None]  # by path: the bytes of a file, the target of a link, None for a folder


@dataclass(eq=False)
class Node:
    """A file (data), a link (target) or a folder (entries): as the process sees it, and what of that is safe."""

    data: bytes = b""
    safe_data: bytes = b""
    target: str | None = None
    entries: Entries | None = None
    safe_entries: Entries = field(default_factory=dict)


Change = list[tuple[Node, str, Node | None]]  # of folders: this name is now that node, or nothing


class Disk:
    """Starts with what lies below `root`, which is safe; `do` an operation; `states` after a power cut now."""

    def __init__(self, root: Path):
        self.root = os.path.realpath(root)
        self.by_inode: dict[int, Node] = {}
        self.tree = self._load(Path(self.root))
        self.pending: list[Change] = []

    def _load(self, path: Path) -> Node:
        if path.is_symlink():
            node = Node(target=os.readlink(path))
        elif path.is_dir():
            entries = {p.name: self._load(p) for p in path.iterdir()}
            node = Node(entries=entries, safe_entries=dict(entries))
        else:
            node = Node(path.read_bytes(), path.read_bytes())
        self.by_inode[path.lstat().st_ino] = node
        return node

    def do(self, o: Operation) -> None:
        node = self.by_inode.get(o.inode)
        if o.kind in ("create", "mkdir", "symlink"):
            node = Node(entries={} if o.kind == "mkdir" else None, target=o.other if o.kind == "symlink" else None)
            self.by_inode[o.inode] = node
            self._change([(*self._place(o.path), node)])
        elif o.kind in ("unlink", "rmdir"):
            self._change([(*self._place(o.path), None)])
        elif o.kind == "rename":
            (old, name), new = self._place(o.path), self._place(o.other)
            assert old.entries is not None
            self._change([(old, name, None), (*new, old.entries[name])])
        elif o.kind == "write":
            assert node is not None
            node.data = node.data[: o.offset].ljust(o.offset, b"\0") + o.data + node.data[o.offset + len(o.data) :]
        elif o.kind == "truncate":
            assert node is not None
            node.data = node.data[: o.offset].ljust(o.offset, b"\0")
        elif o.kind == "fsync":
            assert node is not None
            node.safe_data = node.data
            if node.entries is not None:
                node.safe_entries = dict(node.entries)
                self.pending = [change for change in self.pending if any(folder is not node for folder, *_ in change)]

    def _place(self, path: str) -> tuple[Node, str]:
        """The folder of a path, and its last name."""
        *folders, name = os.path.relpath(path, self.root).split(os.sep)
        node = self.tree
        for folder in folders:
            assert node.entries is not None
            node = node.entries[folder]
        return node, name

    def _change(self, change: Change) -> None:
        for folder, name, node in change:
            assert folder.entries is not None
            _set(folder.entries, name, node)
        self.pending.append(change)

    def states(self, dice: random.Random) -> Iterator[State]:
        """Some of the states of a power cut now: none of the pending changes of names, all, the first ones, all but one, one alone, a few at
        random; and of what was not flushed nothing, half, zeros or all.
        """
        n = len(self.pending)
        every = range(n)
        chosen = {(), tuple(every)} | {tuple(range(i)) for i in every} | {(i,) for i in every}
        chosen |= {tuple(i for i in every if i != without) for without in every}
        chosen |= {tuple(i for i in every if dice.random() < 0.5) for _ in range(4 if n > 2 else 0)}
        for some in sorted(chosen):
            folders: dict[Node, Entries] = {}
            for i in some:
                for folder, name, node in self.pending[i]:
                    _set(folders.setdefault(folder, dict(folder.safe_entries)), name, node)
            for unsafe in ("nothing", "half", "zeros", "all"):
                found: State = {}
                _walk(self.tree, "", folders, unsafe, found)
                yield found


def _set(entries: Entries, name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _walk(folder: Node, above: str, folders: dict[Node, Entries], unsafe: str, found: State) -> None:
    for name, node in folders.get(folder, folder.safe_entries).items():
        path = os.path.join(above, name)
        if node.entries is not None:
            found[path] = None
            _walk(node, path, folders, unsafe, found)
        elif node.target is not None:
            found[path] = node.target
        else:
            found[path] = _after_cut(node, unsafe)


def _after_cut(file: Node, unsafe: str) -> bytes:
    safe, data = file.safe_data, file.data
    if data == safe or unsafe == "nothing":
        return safe
    kept = len(safe) if data.startswith(safe) else 0  # an appended file keeps what it had
    tail = data[kept:]
    return data[:kept] + {"half": tail[: len(tail) // 2], "zeros": bytes(len(tail)), "all": tail}[unsafe]


def restore(state: State, root: Path) -> None:
    """Make a state real."""
    shutil.rmtree(root)
    root.mkdir()
    for name, content in state.items():
        path = root / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
