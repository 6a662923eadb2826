"""Bytes of a file of rows as text: UTF-8, the encoding that the user names, or GB18030 where that is plausible.

Most bytes are a text in GB18030, so a csv is read in it without asking only if enough of its Chinese characters are frequent
ones. Other encodings are never guessed: an error names those that fit.
"""

import codecs
import io
import re
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError, RowError, UsageError, quote
from ..files.regular import open_file, read_file

BOM = b"\xef\xbb\xbf"
# some of the most frequent characters of Chinese texts; of 1,000 rows of instructions none had fewer than a fifth of these
COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现"
    "当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重"
    "并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入"
    "几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运请吗您"
)
TRADITIONAL = COMMON | frozenset(
    "這個們來為國說時會對過發後裡種經麼學現當沒動點從還進樣開無長機間問兩並頭體見實業關將幾條氣題給別變處東車書電數話報結讓許請嗎與應該專門員產"
    "務幫買賣錢價臺灣語認識訊號連線網頁單難興歡場邊際聽讀寫類歲愛親師總統辦運達選標準據響決議論遠區縣陽陸華萬億環樂覺應勞養壓壞醫藥術質課講談計設計"
)
COMMON_SHARE = 0.15  # at least so many of its Chinese characters are among them in a text that is Chinese
LETTERS = {"shift_jis": ("\u3040", "\u30ff"), "euc_kr": ("\uac00", "\ud7a3")}  # what only these have: kana, hangul
LATIN_SHARE = 0.15  # at most so many of the letters of a text in the Latin alphabet have an accent


def check_encoding(name: str) -> None:
    """UsageError unless Python knows the encoding, and it is one of text; "" is no encoding."""
    try:
        "a".encode(name or "utf-8")
    except (LookupError, ValueError):
        what = f"--encoding {quote(name)} is not a text encoding"
        raise UsageError(
            what, "Known are big5, gb18030, shift_jis, euc_kr, cp1252, utf-16 and what else Python knows."
        ) from None


def open_text(path: Path, encoding: str) -> BinaryIO:
    """The bytes of a text file in UTF-8: the file itself, or a copy in memory if it has another encoding."""
    check_encoding(encoding)
    if not encoding:
        return open_file(path, DataError)
    return io.BytesIO(_recoded(read_file(path, DataError), encoding, path))


def read_text(path: Path, encoding: str) -> bytes:
    """All bytes of a text file in UTF-8."""
    with open_text(path, encoding) as file:
        return file.read()


def _recoded(raw: bytes, encoding: str, path: Path) -> bytes:
    """Bytes of an encoding in UTF-8. A file that is UTF-8 already would pass as nearly any encoding, and be garbled."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig") and not raw.isascii() and _decodes(raw, "utf-8"):
        what = f"{path} is UTF-8, and --encoding says {encoding}"
        raise DataError(what, "Leave --encoding out; files of several encodings must be converted to one.")
    if "a\n".encode(encoding) == b"a\n":
        _check_one_encoding(raw, path)
    try:
        return raw.decode(encoding).removeprefix("\ufeff").encode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = raw[: error.start].count(10) + 1, raw[error.start]
        what = f"{path}, line {line}: byte 0x{byte:02x} is not {encoding}"
        raise DataError(what, f"--encoding {encoding} does not fit{_could_be(raw)}.") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}: in {encoding} it holds half a surrogate pair", "Correct the file there.") from None


def decode(raw: bytes, where: str) -> str:
    """Bytes as UTF-8 text; RowError with the line, the byte, and the encodings that fit."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if ", line" in where else f", line {raw[: error.start].count(10) + 1}"
        other = _could_be(raw) if _is_not_utf8(raw) else ""
        what = f"{where}{line}: byte 0x{raw[error.start]:02x} is not UTF-8{other}"
        raise RowError(
            "not UTF-8", what, _hint(raw) if other else "Correct the byte there, or save the file as UTF-8."
        ) from None


def decode_csv(raw: bytes, path: Path) -> tuple[str, str]:
    """The text and its encoding. A UTF-8 file with a broken byte is not taken for GB18030, in which most bytes are a text."""
    for mark, name in ((BOM, "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if raw.startswith(mark):
            try:
                return raw[len(mark) :].decode(name), f"{name} with byte order mark"
            except UnicodeDecodeError as error:
                line = raw[: error.start].count(10) + 1
                raise DataError(f"{path}, line {line}: a byte there is not {name}", "Save the file again.") from None
    if not _decodes(raw, "utf-8") and _is_not_utf8(raw):
        if _is_chinese(raw):
            _check_one_encoding(raw, path)
            return raw.decode("gb18030"), "gb18030"
        raise DataError(f"{path} is neither UTF-8 nor plausible Chinese in GB18030{_could_be(raw)}", _hint(raw))
    return decode(raw, str(path)), "utf-8"


def _check_one_encoding(raw: bytes, path: Path) -> None:
    """DataError for a file of which lines are UTF-8 and others are not, as of two files that were joined."""
    if _decodes(raw, "utf-8"):
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        # two bytes may be a character of UTF-8 by chance, three hardly
        if not line.isascii() and _decodes(line, "utf-8") and max(line.decode("utf-8")) >= "\u0800":
            what = f"{path}: line {number} is UTF-8, and other lines are not"
            raise DataError(what, "Convert its parts to one encoding before they are joined.")


def fitting(raw: bytes) -> list[str]:
    """The encodings in which bytes are a text, those first whose letters are there."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ["utf-16"]
    found = {"gb18030": 2.0} if _is_chinese(raw) else {}
    for name, (low, high) in LETTERS.items():
        if _decodes(raw, name):
            letters = [c for c in raw.decode(name) if c > "\x7f"]
            found[name] = sum(low <= c <= high for c in letters) / max(len(letters), 1)
    accents, plain = (len(re.findall(letters, raw)) for letters in (rb"[\x80-\xff]", rb"[A-Za-z]"))
    latin = accents <= LATIN_SHARE * (accents + plain)
    found |= {
        name: share
        for name, share in (("big5", _frequent(raw, "big5", TRADITIONAL)), ("cp1252", float(latin)))
        if _decodes(raw, name)
    }
    return sorted(found, key=lambda name: -found[name])


def _could_be(raw: bytes) -> str:
    return f"; it could be {', '.join(fitting(raw))}" if fitting(raw) else "; no encoding that is known here fits"


def _hint(raw: bytes) -> str:
    name = next(iter(fitting(raw)), "NAME")
    return (
        f"Save it as UTF-8, or name its encoding, such as --encoding {name}; inspect data shows whether it reads well."
    )


def _is_not_utf8(raw: bytes) -> bool:
    """Whether more of some bytes fails as UTF-8 than passes; otherwise single bytes are broken."""
    read = raw.decode("utf-8", errors="replace")
    broken = read.count("\ufffd")
    return broken > sum(ord(c) > 127 for c in read) - broken


def _is_chinese(raw: bytes) -> bool:
    """Whether enough of the Chinese characters of bytes in GB18030 are frequent ones, and more than they would be in Big5."""
    share = _frequent(raw, "gb18030", COMMON)
    return share >= COMMON_SHARE and share > _frequent(raw, "big5", TRADITIONAL)


def _frequent(raw: bytes, encoding: str, frequent: frozenset[str]) -> float:
    """The share of the Chinese characters of bytes in an encoding that are frequent ones: in a wrong one few are."""
    if not _decodes(raw, encoding):
        return 0.0
    characters = [c for c in raw.decode(encoding) if "\u3400" <= c <= "\u9fff"]
    return sum(c in frequent for c in characters) / max(len(characters), 1)


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
