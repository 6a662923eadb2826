"""The safetensors reader and writer: the reference library both ways, hostile headers, fuzzing."""

import json
import mmap
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minilora.errors import ModelError
from minilora.files import safetensors
from minilora.files.safetensors import DTYPES, SafetensorsFile, write_safetensors, write_tensors

FUZZ = settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, in the shapes that go wrong: 0-d, empty, odd sizes, non-contiguous."""
    torch.manual_seed(0)
    tensors = {
        f"{name}.{i}": (torch.randn(shape) * 50).to(dtype)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(), (0,), (3, 0, 2), (5,), (2, 3, 1)])
    }
    return tensors | {
        "strided": torch.randn(4, 6).T,
        "多字节 name": torch.ones(1),
        "nan": torch.tensor([torch.nan, torch.inf]),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def write_raw(path: Path, header: bytes | str | dict, data: bytes = b"", length: int | None = None) -> Path:
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def one(**changes) -> dict:
    """A header of one good tensor of 8 bytes, changed."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_the_library_reads_what_we_write(tmp_path):
    tensors = every_kind()
    write_tensors(tmp_path / "x", tensors, {"who": "us"})
    theirs = load_file(tmp_path / "x")
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[n], tensors[n]) for n in tensors)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "us"}


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {n: t.contiguous() for n, t in every_kind().items()}
    save_file(tensors, tmp_path / "x", {"who": "them"})
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {"who": "them"} and file.entries.keys() == tensors.keys()
    assert all(same(file.tensor(n), tensors[n]) for n in tensors)


def test_our_tensors_lie_aligned(tmp_path):
    write_tensors(tmp_path / "x", every_kind())
    file = SafetensorsFile(tmp_path / "x")
    assert not [n for n, e in file.entries.items() if (file._data_start + e.start) % e.dtype.itemsize]


def test_tensors_at_odd_offsets(tmp_path):
    a, b = torch.tensor([7], dtype=torch.uint8), torch.tensor([1.5, -2.0], dtype=torch.float64)
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]}}  # fmt: skip
    file = SafetensorsFile(write_raw(tmp_path / "x", header, a.numpy().tobytes() + b.numpy().tobytes()))
    assert same(file.tensor("a"), a) and same(file.tensor("b"), b)
    assert file.tensor("b").data_ptr() % 8 == 0  # as torch wants it


def test_a_read_tensor_can_be_changed_and_the_file_stays(tmp_path):
    write_tensors(tmp_path / "x", {"w": torch.zeros(4)})
    before = (tmp_path / "x").read_bytes()
    SafetensorsFile(tmp_path / "x").tensor("w").fill_(1.0)
    assert (tmp_path / "x").read_bytes() == before


def test_forgotten_pages_are_read_again(tmp_path):
    w = torch.arange(10000.0)
    write_tensors(tmp_path / "x", {"v": torch.ones(3), "w": w})
    file = SafetensorsFile(tmp_path / "x")
    assert same(file.tensor("w"), w)
    file.forget("w")
    assert same(file.tensor("w"), w) and same(file.tensor("v"), torch.ones(3))


def test_a_file_without_tensors(tmp_path):
    write_tensors(tmp_path / "x", {})
    assert not SafetensorsFile(tmp_path / "x").entries and not load_file(tmp_path / "x")


def test_the_writer_takes_no_file_that_exists(tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {"w": torch.ones(1)})
    assert (tmp_path / "x").read_text() == "precious"


def test_the_writer_takes_no_tensor_of_another_shape(tmp_path):
    with pytest.raises(AssertionError):
        write_safetensors(tmp_path / "x", {"w": (torch.float32, (2,))}, lambda name: torch.ones(3))


NESTED = '{"a":' * 100_000
OFFSETS, SHAPE = "not a pair of byte numbers", "not a list of at most 8 sizes"
TWICE = json.dumps(one())[:-1] + "," + json.dumps(one())[1:]
HOSTILE = {
    "float size": (one(shape=[2.0]), SHAPE),
    "bool size": (one(dtype="U8", shape=[True], data_offsets=[0, 1]), SHAPE),
    "text size": (one(shape=["2"]), SHAPE),
    "negative size": (one(shape=[-2]), "-2 is negative"),
    "minus zero": ('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "-0 is negative"),
    "exponent": ('{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', SHAPE),
    "size of 2^63": (one(shape=[2**63]), SHAPE),
    "size of 5000 digits": ('{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', "not valid JSON"),
    "product overflows": (one(shape=[2**40, 2**40]), "more than any memory"),
    "product overflows before a zero": (one(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), "more than any memory"),
    "rank 9": (one(shape=[1] * 8 + [2]), SHAPE),
    "shape is null": (one(shape=None), SHAPE),
    "float offset": (one(data_offsets=[0.0, 8]), OFFSETS),
    "bool offset": (one(data_offsets=[False, 8]), OFFSETS),
    "three offsets": (one(data_offsets=[0, 8, 8]), OFFSETS),
    "offsets backwards": (one(data_offsets=[8, 0]), "needs 8 bytes; its data_offsets span -8"),
    "offset of 2^64": (one(data_offsets=[2**64 - 8, 2**64]), OFFSETS),
    "size does not follow from shape": (one(shape=[3]), "needs 12 bytes; its data_offsets span 8"),
    "unknown dtype": (one(dtype="F3"), "has dtype 'F3'"),
    "dtype is a list": (one(dtype=["F32"]), "has dtype"),
    "unknown field": (one(note="x"), "nothing else"),
    "missing field": ({"w": {"dtype": "F32", "shape": [2]}}, "must have dtype, shape and data_offsets"),
    "entry is a list": ({"w": [1]}, "must have dtype, shape and data_offsets"),
    "hole": (one(data_offsets=[4, 12]), "starts at data byte 4, the one before ends at 0"),
    "overlap": (one() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "starts at data byte 4"),
    "trailing bytes": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "the tensors end at byte"),
    "name twice": (TWICE, "duplicate key 'w'"),
    "field twice": ('{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', "duplicate key 'dtype'"),
    "empty name": ({"": one()["w"]}, "1 to 512 printable"),
    "long name": ({"w" * 513: one()["w"]}, "1 to 512 printable"),
    "control character in a name": ({"a\x1b[2J": one()["w"]}, "1 to 512 printable"),
    "NUL in a name": ({"a\0": one()["w"]}, "1 to 512 printable"),
    "half a surrogate pair in a name": ('{"\\ud800":' + json.dumps(one()["w"]) + "}", "1 to 512 printable"),
    "metadata is a list": (one() | {"__metadata__": []}, "__metadata__ must map"),
    "metadata holds a number": (one() | {"__metadata__": {"a": 1}}, "__metadata__ must map"),
    "metadata holds half a surrogate pair": ('{"__metadata__":{"a":"\\udfff"}}', "__metadata__ must map"),
    "NaN": ('{"w":NaN}', "NaN is not JSON"),
    "Infinity": ('{"w":-Infinity}', "-Infinity is not JSON"),
    "comma too many": ('{"w":1,}', "not valid JSON"),
    "comment": ('{/**/}', "not valid JSON"),
    "deep nesting": (NESTED, "not valid JSON"),
    "invalid UTF-8": (b'{"\xff":1}', "not valid JSON"),
    "surrogate bytes": ('{"\ud800":1}', "not valid JSON"),
    "UTF-16": ('{"w":1}'.encode("utf-16-le"), "not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "does not begin with '{'"),
    "leading blank": (" {}", "does not begin with '{'"),
    "an array": ("[]", "does not begin with '{'"),
    "no header": ("", "does not begin with '{'"),
    "NUL padding": ("{}\0\0\0", "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "rule"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, header, rule):
    path = write_raw(tmp_path / "x", header, bytes(8))
    with pytest.raises(ModelError) as error:
        SafetensorsFile(path)
    assert rule in error.value.what and str(path) in error.value.what
    assert len(error.value.what) < 1500


@pytest.mark.parametrize("size", range(8))
def test_too_short(tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ModelError, match=f"{size} bytes is too short"):
        SafetensorsFile(tmp_path / "x")


def test_header_past_the_end(tmp_path):
    with pytest.raises(ModelError, match="the header would end at byte 1008, the file at byte 18"):
        SafetensorsFile(write_raw(tmp_path / "x", "{}", bytes(8), length=1000))


@pytest.mark.parametrize("length", [safetensors.MAX_HEADER + 1, 2**63, 2**64 - 1, 2**64 - 8])
def test_header_over_the_limit(tmp_path, length):
    with pytest.raises(ModelError, match="is the limit"):
        SafetensorsFile(write_raw(tmp_path / "x", "{}", length=length))


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    write_tensors(tmp_path / "x", {str(i): torch.zeros(0) for i in range(4)})
    with pytest.raises(ModelError, match="4 tensors; 3 is the limit"):
        SafetensorsFile(tmp_path / "x")


def test_pages_that_are_given_back_are_those_of_the_tensor(tmp_path):
    """What was written into them is gone: the mapping has the file's bytes again."""
    n = 3 * mmap.PAGESIZE // 4
    write_tensors(tmp_path / "f", {name: torch.zeros(n) for name in "abc"})
    file = SafetensorsFile(tmp_path / "f")
    for name in "abc":
        file.tensor(name).fill_(1)
    file.forget("b")
    assert not file.tensor("b").any() and file.tensor("a")[: n // 3].all() and file.tensor("c")[-n // 3 :].all()


def test_every_truncation_is_refused(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "y").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            SafetensorsFile(tmp_path / "y")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(ModelError) as error:
            SafetensorsFile(path)
        assert str(path) in error.value.what


def test_a_lying_header_allocates_nothing(tmp_path):
    path = write_raw(tmp_path / "x", one(shape=[2**40], data_offsets=[0, 2**42]), bytes(8))
    with pytest.raises(ModelError, match="cut short"):
        SafetensorsFile(path)


def accepts(path: Path) -> bool:
    """Whether we take the file; if so the library must too, and both must read the same bits."""
    try:
        file = SafetensorsFile(path)
        ours = {name: file.tensor(name) for name in file.entries}
    except ModelError:
        return False
    try:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == ours.keys()
            assert all(same(theirs.get_tensor(name), tensor) for name, tensor in ours.items())
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what we accept: {error}") from None
    return True


GOOD = (
    '{"__metadata__":{"a":"b"},"v":{"dtype":"I8","shape":[],"data_offsets":[0,1]},'
    '"w":{"dtype":"BF16","shape":[2,1],"data_offsets":[1,5]},"z":{"dtype":"I64","shape":[0],"data_offsets":[5,5]}}'
)
PIECES = ["0", "-0", "1", "5", "1e0", "18446744073709551616", "9223372036854775808", '"v"', '"w"', '""', "null", "true", "NaN",
          '"F32"', '"U8"', '"BOOL"', '"F8_E4M3"', "[", "]", "{", "}", ",", ":", " ", "\\ud800", "\\u0000", "\0", "[0,0]", "[1,5]",
          '"data_offsets"', '"shape"', '"__metadata__"', "4294967296,4294967296,", "0,"]  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), st.sampled_from(PIECES) | st.text(max_size=2)), max_size=3
)


@FUZZ
@given(edits=edits, cut=st.integers(-2, 2))
def test_fuzzed_headers(tmp_path, edits, cut):
    header = GOOD
    for place, length, piece in edits:
        header = header[:place] + piece + header[place + length :]
    accepted = accepts(write_raw(tmp_path / "x", header, bytes(range(5 + cut)) if cut > -5 else b""))
    assert accepted or edits or cut


@FUZZ
@given(places=st.dictionaries(st.integers(0, 8 + len(GOOD) + 4), st.integers(0, 255), max_size=4))
def test_fuzzed_bytes(tmp_path, places):
    raw = bytearray(write_raw(tmp_path / "x", GOOD, bytes(5)).read_bytes())
    for place, value in places.items():
        raw[place] = value
    (tmp_path / "x").write_bytes(raw)
    assert accepts(tmp_path / "x") or places


sizes = st.integers(-1, 3) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, True, 1.0, None, "1"])
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F8_E5M2", "U64", "x", 1]), "shape": st.lists(sizes, max_size=3) | sizes},
    optional={"data_offsets": st.lists(sizes, min_size=2, max_size=2) | sizes, "more": sizes},
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "", "\0", "__metadata__"]), entries, max_size=3),
    size=st.integers(0, 24),
)
def test_fuzzed_entries(tmp_path, header, size):
    accepts(write_raw(tmp_path / "x", header, bytes(size)))


@FUZZ
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=4)), max_size=5
    )
)
def test_what_we_write_comes_back(tmp_path, shapes):
    (tmp_path / "x").unlink(missing_ok=True)
    tensors = {
        f"t{i}": (torch.arange(torch.Size(s).numel()).reshape(s) % 5).to(dtype) for i, (dtype, s) in enumerate(shapes)
    }
    write_tensors(tmp_path / "x", tensors)
    assert accepts(tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert all(same(file.tensor(n), t) for n, t in tensors.items())
