"""Read one pickle of weights and write it as safetensors: the child process of convert.py, and the one place that unpickles.

torch.load with weights_only builds tensors and plain containers and refuses everything else. Beside that the process may not
take more memory, time or disk than such a file needs, and gets no open file of its parent.
"""

import errno
import sys
import zipfile
from pathlib import Path

from ..isolated import bound

MEMORY, SECONDS, SECONDS_A_GB = 1 << 30, 120, 60
NO_MEMORY = "it asks for more memory than a file of its size"


def most_written(size: int) -> int:
    """Bytes that the tensors of a file of `size` bytes may have together: two names may show one storage, as of a tied head."""
    return 2 * size + (64 << 20)


def rewrite(source: Path, target: Path) -> str | None:
    """Write the tensors of a pickle to `target`; returns what is wrong with it, None if nothing."""
    import torch

    from ..errors import MiniloraError
    from ..files.safetensors import NAMES, SafetensorsFile, write_tensors

    try:
        # a file of torch before 1.6 is no zip archive and cannot be mapped
        found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # noqa: BLE001 whatever a crafted file makes of the reader
        text = str(error) or NO_MEMORY  # a MemoryError says nothing
        unsafe = "Weights only load failed" in text or "Unsupported" in text
        return (
            "it holds more than tensors and was not read"
            if unsafe
            else f"it cannot be read: {text.partition(chr(10))[0]}"
        )
    if not isinstance(found, dict) or not found:
        return "it holds no tensors by name"
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            return f"{str(name)[:80]!r} is not a tensor"
        if tensor.layout != torch.strided or tensor.dtype not in NAMES or tensor.is_meta:
            return f"tensor {name[:80]!r} is {tensor.dtype}, {tensor.layout}"
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            return f"tensor {name[:80]!r} would be {tensor.nbytes:,} bytes, {tensor.untyped_storage().nbytes():,} are there"
    if sum(tensor.nbytes for tensor in found.values()) > most_written(source.stat().st_size):
        return "its tensors are larger than the file itself"
    try:
        write_tensors(target, found)
        SafetensorsFile(target)  # a name or a shape that the strict reader would not take
    except (MiniloraError, RuntimeError, MemoryError) as error:
        return str(error).partition("\n")[0] or NO_MEMORY
    return None


def main(source: Path, target: Path) -> None:
    """Bounded, and with an exit code: 4 for a file that is not what it should be, 6 for a disk that is full."""
    import torch

    torch.set_num_threads(1)  # each has a reserve of addresses
    size = source.stat().st_size
    bound(MEMORY + 3 * size, SECONDS + SECONDS_A_GB * size // 10**9, most_written(size))
    try:
        wrong = rewrite(source, target)
    except OSError as error:
        wrong = "its tensors are larger than the file itself"
        if error.errno != errno.EFBIG:
            print(error.strerror, file=sys.stderr)
            sys.exit(6)
    if wrong:
        print(wrong, file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
