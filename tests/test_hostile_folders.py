"""Folders made to get in: each is opened by a command in a fork of its own, under a tripwire, with bounded memory and time.

A row of FOLDERS is what is changed in a folder with a tiny model, an adapter, rows and a run; the command; the exit code; and a word of what it
says. Outside lie a secret, which may not be opened, and the place where a canary would appear. Whatever the row, nothing is written outside,
no process is started but the one that renders templates (which has a tripwire of its own), no connection is opened, and no control code, tag or
endless line is shown.
"""

import contextlib
import io
import json
import mmap
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_rows

from bench.fuzz import judge, tripwire
from bench.fuzz.judge import Fault, bounded
from minilora import add_lora, load_model, save_adapter
from minilora.__main__ import main
from minilora.checkpoint import convert, unpickle
from minilora.files.safetensors import SafetensorsFile, write_tensors
from minilora.rows import workbook
from minilora.rows.workbook_cells import read_cells
from minilora.text import own_template

ESC, TAG = "\x1b[31m\u202e", "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
CHAT = "chat --model model --prompt hi --max-tokens 2 --greedy"
ADAPTED = f"{CHAT} --adapter adapter"
INSPECT, CONVERT = "inspect model model", "convert model out"
MARK = "<img/src=x>"
PREDICT = "predict --model model --data rows.json --max-tokens 3"
TRAIN = "train --model model --data rows.json --output out --max-steps 1"
RUN = TRAIN.replace("--output out", "--output run")
DATA = "inspect data --model model --data"
EVAL = "eval --model model --data rows.json"
CANARY = "open('../canary', 'w').close()\nimport os\nos.system('touch ../canary')\n"

Change = Callable[[Path], object]


# what a row is made of


def text(name: str, content: str | bytes) -> Change:
    """A file with that content, in the place of what was there."""

    def change(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return change


def keys(name: str, **values: Any) -> Change:
    """Keys of a JSON file changed."""
    return lambda here: text(name, json.dumps(_json(here / name) | values))(here)


def link(name: str, to: str) -> Change:
    def change(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).symlink_to(to)

    return change


def pipe(name: str) -> Change:
    def change(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.mkfifo(here / name)

    return change


def gone(name: str) -> Change:
    return lambda here: (here / name).unlink()


def index(places: Any) -> Change:
    """An index in the place of the model's one file, which becomes its only shard."""

    def change(here: Path) -> None:
        (here / "model/model.safetensors").rename(here / "model/one.safetensors")
        names = SafetensorsFile(here / "model/one.safetensors").entries
        wanted = places(dict.fromkeys(names, "one.safetensors")) if callable(places) else places
        text("model/model.safetensors.index.json", json.dumps({"weight_map": wanted}))(here)

    return change


def header(header: Any, data: bytes = b"", length: int | None = None) -> Change:
    """A safetensors file of that header for the model."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return text("model/model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensors(place: str, change_them: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """The tensors of a file changed."""

    def change(here: Path) -> None:
        file = SafetensorsFile(here / place)
        held = {name: file.tensor(name).clone() for name in file.entries}
        change_them(held)
        (here / place).unlink()
        write_tensors(here / place, held, {k: v for k, v in file.metadata.items() if k != "format"})

    return change


def both(*changes: Change) -> Change:
    def change(here: Path) -> None:
        for each in changes:
            each(here)

    return change


class Calls:
    """What calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def bin_of(payload: Any, name: str = "model/pytorch_model.bin", keep: bool = False) -> Change:
    """A pickle in the place of the model's weights, or beside them."""

    def change(here: Path) -> None:
        if not keep:
            (here / "model/model.safetensors").unlink()
        if isinstance(payload, bytes):
            (here / name).write_bytes(payload)
        else:
            torch.save(payload, here / name)

    return change


SYSTEM = Calls(os.system, "touch ../canary")
PLAIN_PICKLE = pickle.dumps({"a": SYSTEM}, 2)


def archive(pickled: bytes) -> bytes:
    """A zip file as torch.save writes it, around any pickle."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", "3\n")
    return raw.getvalue()


def book(parts: dict[str, str]) -> bytes:
    """A workbook of one sheet, with parts of it replaced or added."""
    head = '<?xml version="1.0"?>'
    main_ns = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    rel_ns = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    pack_ns = "http://schemas.openxmlformats.org/package/2006"
    cells = "".join(
        f'<c r="{c}1" t="inlineStr"><is><t>{t}</t></is></c>' for c, t in (("A", "prompt"), ("B", "response"))
    )
    whole = {
        "[Content_Types].xml": f'{head}<Types xmlns="{pack_ns}/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/><Override PartName="/xl/workbook.xml" '
        'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
        "_rels/.rels": f'{head}<Relationships xmlns="{pack_ns}/relationships"><Relationship Id="a" Type="{rel_ns}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'{head}<workbook xmlns="{main_ns}" xmlns:r="{rel_ns}"><sheets><sheet name="s" sheetId="1" r:id="b"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'{head}<Relationships xmlns="{pack_ns}/relationships"><Relationship Id="b" Type="{rel_ns}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'{head}<worksheet xmlns="{main_ns}"><sheetData><row r="1">{cells}</row>MORE</sheetData></worksheet>',
    }  # fmt: skip
    more = parts.get(
        "more",
        '<row r="2"><c r="A2" t="inlineStr"><is><t>q</t></is></c><c r="B2" t="inlineStr"><is><t>a</t></is></c></row>',
    )
    whole |= {name: held for name, held in parts.items() if name != "more"}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
        for name, held in whole.items():
            file.writestr(name, held.replace("MORE", more))
    return raw.getvalue()


def jinja(template: str) -> Change:
    return text("model/chat_template.jinja", template)


def says(content: str) -> Change:
    """A tokenizer that decodes every letter as this text."""
    to_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = [to_text, {"type": "Replace", "pattern": {"Regex": "."}, "content": content}]
    return keys("model/tokenizer.json", decoder={"type": "Sequence", "decoders": steps})


def forged(here: Path) -> None:
    """A snapshot of a later step, of another run and another machine, whose hashes are right."""
    old, new = (here / f"run/checkpoints/step-{n}" for n in (1, 4))
    shutil.copytree(old, new)
    keys("run/checkpoints/step-4/state.json", step=4, machine={"torch": ESC}, identity={ESC: ESC})(here)
    sums = {
        p.name: {"size": p.stat().st_size, "sha256": sha256(p.read_bytes()).hexdigest()}
        for p in new.iterdir()
        if p.name != "MANIFEST.json"
    }
    text("run/checkpoints/step-4/MANIFEST.json", json.dumps(sums))(here)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LORA, CONFIG, TOKENS = "adapter/adapter_config.json", "model/config.json", "model/tokenizer.json"
BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]" for i in range(9))
SHARD = {"a": "one.safetensors"}
ONE = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
LOADS = ("modeling_x.py", "configuration_x.py", "tokenization_x.py")
CODE = both(
    *(
        text(f"model/{name}", CANARY)
        for name in (*LOADS, "__init__.py", "torch.py", "json.py", "sitecustomize.py", "conftest.py")
    )
)
AUTO = {
    "auto_map": {
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoConfig": "configuration_x.X",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
}
METRICS = {
    "step": 1,
    "epoch": 1,
    "loss": 1.0,
    "lr": 0.1,
    "grad_norm": 1.0,
    "tokens": 5,
    "target_tokens": 2,
    "tokens_per_second": 1.0,
    "memory_gb": 1.0,
    "time": 1.0,
}
SECRET = "secret.safetensors"
STEP = {"step": 4, "seconds": 1.5, "best_loss": 0.5, "best_step": 2, "identity": {}, "machine": {"torch": ESC}}

# name: what is changed, the command, its exit code, a word of what it says
FOLDERS: dict[str, tuple[Change, str, int, str]] = {
    # pickle
    "a pickle that starts a command": (bin_of({"a": SYSTEM}), CONVERT, 4, "more than tensors"),
    "a pickle that starts a command, no archive": (bin_of(PLAIN_PICKLE), CONVERT, 4, "more than tensors"),
    "a pickle that evaluates a text": (bin_of({"a": Calls(eval, "__import__('os').system('touch ../canary')")}), CONVERT, 4, "more than tensors"),
    "a pickle that opens a file": (bin_of({"a": Calls(open, "../canary", "w")}), CONVERT, 4, "more than tensors"),
    "a pickle that imports a module": (bin_of({"a": Calls(__import__, "antigravity")}), CONVERT, 4, "more than tensors"),
    "a pickle of opcodes by hand": (bin_of(archive(b"cos\nsystem\n(S'touch ../canary'\ntR.")), CONVERT, 4, "more than tensors"),
    "a pickle of a storage that is not there": (bin_of(archive(pickle.dumps({"a": 1}, 2))), CONVERT, 4, "is not a tensor"),
    "a view of one value as gigabytes": (bin_of({"a": torch.zeros(1).as_strided((1 << 15, 1 << 15), (0, 0))}), CONVERT, 4, "bytes"),
    "a pickle in the place of weights": (bin_of({"a": SYSTEM}), CHAT, 4, "minilora convert"),
    "pickles beside good weights": (both(*(bin_of({"a": SYSTEM}, f"model/{n}", True) for n in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"))), CHAT, 0, ""),
    "the pickled metadata of a distributed checkpoint": (text("model/.metadata", PLAIN_PICKLE), CHAT, 0, ""),
    "an adapter's pickle beside its weights": (bin_of({"a": SYSTEM}, "adapter/adapter_model.bin", True), ADAPTED, 0, ""),
    # code of a folder
    "auto_map names the folder's own code": (both(CODE, keys(CONFIG, **AUTO)), CHAT, 0, ""),
    "a tokenizer's auto_map": (both(CODE, text("model/tokenizer_config.json", json.dumps(AUTO | {"tokenizer_class": "X"}))), CHAT, 0, ""),
    "an own class is asked for": (both(CODE, keys(CONFIG, model_type="x", **AUTO)), CHAT, 4, "not supported"),
    "own generation code": (both(text("model/custom_generate/generate.py", CANARY), text("model/generation_config.json", '{"custom_generate": "x"}')), CHAT, 0, ""),
    "code beside an adapter": (both(text("adapter/torch.py", CANARY), keys(LORA, auto_mapping={"base_model_class": "X", "parent_library": "torch"})), ADAPTED, 0, ""),
    "an adapter that imports a library": (keys(LORA, auto_mapping={"parent_library": "antigravity"}, megatron_core="antigravity"), ADAPTED, 0, ""),
    "an adapter whose base lies elsewhere": (keys(LORA, base_model_name_or_path="../secret.safetensors"), ADAPTED, 0, ""),
    "an adapter of an unknown method": (keys(LORA, peft_type={"a": ["b"]}), ADAPTED, 4, "peft_type"),
    # patterns that backtrack
    "target_modules (a+)+$": (keys(LORA, target_modules="(.+)+x$"), ADAPTED, 0, ""),
    "target_modules of alternatives": (keys(LORA, target_modules="(.|.)" * 12 + "x"), ADAPTED, 4, "leaves out"),
    "rank_pattern (|.)(|.)": (keys(LORA, rank_pattern={"(|.)" * 30 + "x": 3}), ADAPTED, 4, "too complex"),
    "many patterns": (keys(LORA, rank_pattern={f"{'.?' * 16}[Z{chr(0x4E00 + i)}]": 3 for i in range(40)}), ADAPTED, 4, "too complex"),
    "a broken pattern behind many": (keys(LORA, rank_pattern={f"{'.?' * 16}[Z{chr(0x4E00 + i)}]": 3 for i in range(40)} | {"(": 3}), ADAPTED, 4, "too complex"),
    "alpha_pattern (.|.)*": (keys(LORA, alpha_pattern={"(.|.)*x": 3}), ADAPTED, 4, "too complex"),
    "exclude_modules": (keys(LORA, exclude_modules="((.*)*)*x"), ADAPTED, 0, ""),
    "a million patterns": (keys(LORA, rank_pattern={f"a{i}": 1 for i in range(20_000)}), ADAPTED, 4, "patterns"),
    "a tokenizer's own pattern": (keys(TOKENS, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}), CHAT.replace("hi", "x" * 60), 4, "tokenizer"),
    "--lora-targets that backtracks": (text("run.yaml", "lora_targets: '((.|q)*)*x$'"), f"{TRAIN} -c run.yaml", 2, "for ever"),
    # chat templates
    "a template that walks classes": (jinja("{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML), CHAT, 0, "SecurityError"),
    "a template that reaches os": (jinja("{{ lipsum.__globals__['os'].system('touch ../canary') }}" + CHATML), CHAT, 0, ""),
    "a template that formats itself out": (jinja("{{ '{0.__class__.__init__.__globals__}'.format(lipsum) }}" + CHATML), CHAT, 0, ""),
    "a template that includes a file": (jinja("{% include '/etc/passwd' %}{% import '/etc/passwd' as x %}" + CHATML), CHAT, 0, ""),
    "a template that never ends": (jinja("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML), CHAT, 0, ""),
    "a template of a gigabyte": (jinja("{{ 'a' * 10**9 }}" + CHATML), CHAT, 0, ""),
    "a template that pads to a gigabyte": (jinja("{{ '%1000000000d' % 1 }}" + CHATML), CHAT, 0, ""),
    "a template that calls itself": (jinja("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML), CHAT, 0, ""),
    "a template that steers the terminal": (jinja(f"{{{{ raise_exception('{ESC}') }}}}" + CHATML), CHAT, 0, ""),
    "a template of another kind": (text("model/tokenizer_config.json", json.dumps({"chat_template": [{"name": ESC, "template": {"a": 1}}]})), CHAT, 0, ""),
    # an index and its shards
    "a shard above the folder": (index({"a": "../secret.safetensors"}), CHAT, 4, "not a file name"),
    "a shard by its whole path": (index({"a": "/etc/passwd.safetensors"}), CHAT, 4, "not a file name"),
    "a shard with a NUL": (index({"a": "one.safetensors\0.safetensors"}), CHAT, 4, "not a file name"),
    "a shard that is a link to itself": (both(index(SHARD), link("model/one.safetensors", "one.safetensors")), CHAT, 4, "link"),
    "a shard that is a pipe": (both(index(SHARD), pipe("model/one.safetensors")), CHAT, 4, "not a regular file"),
    "an index that lists more than there is": (index(lambda places: places | {"model.more": "one.safetensors"}), CHAT, 4, "not where the index says"),
    "an index of lists": (index([["a", "one.safetensors"]]), CHAT, 4, "weight_map"),
    "an index of numbers": (index({"a": 5}), CHAT, 4, "weight_map"),
    "an index nested deep": (both(index(SHARD), text("model/model.safetensors.index.json", '{"weight_map":' * 99_999)), CHAT, 4, "JSON"),
    "an index that steers the terminal": (index({ESC: "one.safetensors"}), CHAT, 4, ""),
    "an endless index": (both(gone("model/model.safetensors"), link("model/model.safetensors.index.json", "/dev/zero")), CHAT, 4, "not a regular file"),
    "a pickle shard behind a link": (both(bin_of({"a": torch.ones(1)}), link("model/pytorch_model.bin", "../../secret.safetensors")), CONVERT, 4, "link"),
    # headers and tensors
    "a header of an exabyte": (header(ONE, bytes(8), 1 << 60), CHAT, 4, "is the limit"),
    "a tensor of a terabyte": (header({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}), CHAT, 4, "cut short"),
    "tensors that overlap": (header(ONE | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), CHAT, 4, "starts at"),
    "a tensor twice": (header(json.dumps(ONE)[:-1].encode() + b"," + json.dumps(ONE)[1:].encode(), bytes(8)), CHAT, 4, "duplicate key"),
    "a name that steers the terminal": (header({ESC: ONE["w"]}, bytes(8)), CHAT, 4, "printable"),
    "bytes behind the tensors": (header(ONE, bytes(8) + b"PK\3\4"), CHAT, 4, "cut short"),
    "a header with a NaN": (header(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)), CHAT, 4, "JSON"),
    "weights with a NaN": (tensors("model/model.safetensors", lambda t: t["model.norm.weight"].fill_(torch.nan)), EVAL, 4, "not finite"),
    "an adapter with an infinity": (tensors("adapter/adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(torch.inf)), ADAPTED, 4, "not finite"),
    "weights of another shape": (tensors("model/model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(1 << 10)})), CHAT, 4, "model.norm.weight"),
    # config.json
    "a width near 2^31": (keys(CONFIG, hidden_size=2**31 - 8), INSPECT, 4, "hidden_size"),
    "a vocabulary of 10^30": (keys(CONFIG, vocab_size=10**30), "plan --model model", 4, "vocab_size"),
    "a million layers": (keys(CONFIG, num_hidden_layers=10**6), "plan --model model", 4, "num_hidden_layers"),
    "a model of moderate numbers that is none": (keys(CONFIG, num_hidden_layers=512, intermediate_size=1 << 20, num_attention_heads=1 << 15), CHAT, 4, ""),
    "an epsilon that steers the terminal": (keys(CONFIG, rms_norm_eps=ESC), INSPECT, 4, "rms_norm_eps"),
    "lists and objects for names": (keys(CONFIG, model_type=[ESC, {}], architectures={"a": [ESC]}), INSPECT, 4, "model_type"),
    "architectures that are numbers": (keys(CONFIG, architectures=[[1], {"a": ESC}, None]), CHAT, 0, ""),
    "a config nested deep": (text(CONFIG, '{"a":' * 99_999), CHAT, 4, "JSON"),
    "a config of 5,000 digits": (text(CONFIG, '{"hidden_size": ' + "9" * 5000 + "}"), CHAT, 4, "JSON"),
    "a config with half a surrogate pair": (keys(CONFIG, **{"\ud800": "\udfff", "hidden_act": "\ud800"}), INSPECT, 4, "hidden_act"),
    "a config that is a pipe": (pipe(CONFIG), CHAT, 4, "not a regular file"),
    "an endless config": (link(CONFIG, "/dev/zero"), INSPECT, 4, "not a regular file"),
    "a text_config in a text_config": (keys(CONFIG, model_type="qwen3_5", text_config={"text_config": {"text_config": 1}, "model_type": ESC}), INSPECT, 4, ""),
    "many keys": (keys(CONFIG, **{f"k{i}{ESC}": i for i in range(50_000)}), INSPECT, 0, "more"),
    # how answers are drawn
    "generation settings out of range": (text("model/generation_config.json", json.dumps({"temperature": 1e24, "top_k": 10**30, "repetition_penalty": 0})), CHAT.replace("--greedy", ""), 4, "generation_config"),
    "generation settings that are no numbers": (text("model/generation_config.json", '{"temperature": NaN, "top_k": Infinity}'), CHAT.replace("--greedy", ""), 4, "generation_config"),
    "end tokens without end": (text("model/generation_config.json", json.dumps({"eos_token_id": [[1], {"a": 2}, -1, 10**20, ESC]})), CHAT, 4, "eos_token_id"),
    # tokenizers
    "a tokenizer that panics": (keys(TOKENS, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a" * 600, "b" * 600]]}), CHAT, 4, "tokenizer"),
    "a tokenizer that cuts texts into nothing": (keys(TOKENS, pre_tokenizer={"type": "FixedLength", "length": 0}), CHAT, 4, "tokenizer"),
    "a tokenizer whose template lacks a token": (keys(TOKENS, post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}), CHAT, 0, ""),
    "a tokenizer that grows texts": (keys(TOKENS, normalizer={"type": "Prepend", "prepend": "x" * 5_000_000}), CHAT, 4, "times as long"),
    "a vocabulary larger than the model": (keys(TOKENS, added_tokens=[{"id": 10**6, "content": "x", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}]), CHAT, 4, "tokenizer"),
    "ids below zero": (text("model/tokenizer_config.json", json.dumps({"added_tokens_decoder": {"-5": {"content": ESC}}})), CHAT, 4, "tokenizer"),
    "an empty SentencePiece model": (both(gone(TOKENS), keys(CONFIG, model_type="chatglm", padded_vocab_size=260, _name_or_path="chatglm2"), text("model/tokenizer.model", b"")), "inspect data --model model --data rows.json", 4, ""),
    "tokens that steer the terminal": (text("model/added_tokens.json", json.dumps({ESC: 300})), CHAT, 0, ""),
    # rows
    "rows that steer the terminal": (text("rows.json", json.dumps([{"instruction": ESC, "output": ESC * 50, ESC: ESC}])), f"{DATA} rows.json", 3, ""),
    "rows nested deep": (text("rows.json", '[{"prompt":' * 99_999), f"{DATA} rows.json", 3, "JSON"),
    "a million empty rows": (text("rows.jsonl", "\n" * 1_000_000), f"{DATA} rows.jsonl", 3, "no rows"),
    "a long line": (text("rows.jsonl", '{"prompt": "' + "x" * 1_000_000), f"{DATA} rows.jsonl", 3, "JSON"),
    "a row of five million characters": (text("rows.jsonl", json.dumps({"prompt": "q", "response": "x" * 5_000_000})), f"{DATA} rows.jsonl", 3, "are read"),
    "rows that are a pipe": (pipe("rows.json"), f"{DATA} rows.json", 3, "not a regular file"),
    "a csv of formulas": (text("rows.csv", f"prompt,response\n=cmd|'/c calc'!A1,{ESC}\n"), f"{DATA} rows.csv", 0, ""),
    "a workbook with one far cell": (text("rows.xlsx", book({"more": '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>'})), f"{DATA} rows.xlsx", 3, "span"),
    "a workbook of entities": (text("rows.xlsx", book({"xl/worksheets/sheet1.xml": '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><worksheet>&b;</worksheet>'})), f"{DATA} rows.xlsx", 3, "entities"),
    "a workbook that reads a file": (text("rows.xlsx", book({"xl/worksheets/sheet1.xml": '<!DOCTYPE x [<!ENTITY a SYSTEM "../secret.safetensors">]><worksheet>&a;</worksheet>'})), f"{DATA} rows.xlsx", 3, "entities"),
    "a workbook with a part of 300 MB": (text("rows.xlsx", book({"xl/more.xml": "<a>" + " " * (300 << 20) + "</a>"})), f"{DATA} rows.xlsx", 3, "unpacks"),
    "a workbook whose parts lie elsewhere": (text("rows.xlsx", book({"xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="b" Type="x/worksheet" Target="../../../secret.safetensors"/></Relationships>'})), f"{DATA} rows.xlsx", 3, "no rows"),
    # settings
    "yaml that grows": (text("run.yaml", BOMB), f"{TRAIN} -c run.yaml", 2, "larger"),
    "yaml that makes an object": (text("run.yaml", "seed: !!python/object/apply:os.system ['touch ../canary']"), f"{TRAIN} -c run.yaml", 2, ""),
    "yaml with a NUL in a path": (text("run.yaml", 'output: "x\\0y"'), "train --model model --data rows.json -c run.yaml", 2, "output"),
    "yaml that steers the terminal": (text("run.yaml", f'"{json.dumps(ESC)[1:-1]}": 1\nlr: "{json.dumps(ESC)[1:-1]}"'), f"{TRAIN} -c run.yaml", 2, ""),
    "yaml that is a device": (link("run.yaml", "/dev/zero"), f"{TRAIN} -c run.yaml", 2, "not a regular file"),
    # what a model says, and what things are called
    "a model that steers the terminal": (says(ESC), CHAT, 0, ""),
    "a model that writes tags": (says(MARK), f"{PREDICT} --output p ; {PREDICT} --output q ; compare p q --output out.html", 0, ""),
    "names that are tags": (lambda here: (here / "rows.json").rename(here / f"{MARK.replace('/', '-')}.json"), f"{TRAIN.replace('rows', MARK.replace('/', '-'))} ; report out", 0, ""),
    "a file's name that steers the terminal": (pipe(f"model/{ESC}.json"), CHAT, 4, "not a regular file"),
    "a state that steers the terminal": (forged, f"{RUN} --resume", 9, "other settings"),
    # a run that somebody else made
    "a run whose texts are tags": (both(text("run/metrics.jsonl", json.dumps(METRICS | {TAG: TAG}) + "\n"), text("run/config.yaml", f"model: '{TAG}'\ndata: '{TAG}'\n"), keys("run/data.json", **{TAG: TAG}, notes=[TAG], dropped={TAG: 3})), "report run", 0, ""),
    "a run whose texts steer the terminal": (both(text("run/metrics.jsonl", json.dumps(METRICS | {ESC: ESC}) + "\n"), text("run/config.yaml", f'model: "{json.dumps(ESC)[1:-1]}"\n')), "report run", 0, ""),
    "metrics of other shapes": (text("run/metrics.jsonl", '[1]\n5\nnull\n{"step": [1], "loss": {"a": 1}}\n{"step": 2, "loss": "x"}\n{"step": 1e999}\n'), "report run", 3, "no run writes"),
    "answers of other shapes": (text("p/part.jsonl", '{}\n[1]\n5\n{"row": [1]}\n{"row": 0, "predict": 5}\n'), f"{PREDICT} --output p", 8, "other weights"),
    "metrics that are a pipe": (pipe("run/metrics.jsonl"), "report run", 3, "not a regular file"),
    "a manifest that names a file elsewhere": (both(text("run/checkpoints/step-4/state.json", json.dumps(STEP)), lambda here: text("run/checkpoints/step-4/MANIFEST.json", json.dumps({f"{'../' * 4}{SECRET}": {"size": (here.parent / SECRET).stat().st_size, "sha256": ""}}))(here)), f"{RUN} --resume", 0, "skipped step-4"),
    "a state of another shape": (both(text("run/checkpoints/step-4/state.json", json.dumps([STEP])), text("run/checkpoints/step-4/MANIFEST.json", "[]")), f"{RUN} --resume", 0, "skipped step-4"),
    "a lock that is a link out": (both(lambda here: (here / "out").mkdir(), link("out/.lock", "../../canary")), TRAIN, 8, ""),
}  # fmt: skip


# how a row is tried


def run(line: str) -> int:
    """A command line; its exit code."""
    return main(line.split())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """What every row begins with: it is opened once, so that all is imported before a fork counts its memory."""
    folder = tmp_path_factory.mktemp("good") / "here"
    make_model(folder / "model")
    make_rows(folder / "rows.json")
    model = load_model(folder / "model", device="cpu")
    add_lora(model, "q_proj,v_proj", r=2)
    save_adapter(model, folder / "adapter")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert run(RUN) == 0
    return folder


@pytest.fixture(scope="module")
def opened(good, tmp_path_factory):
    """The commands, on folders that nobody touched."""
    here = Path(shutil.copytree(good, tmp_path_factory.mktemp("opened") / "here"))
    pytest.importorskip("openpyxl")
    text("rows.xlsx", book({}))(here)
    before = os.getcwd()
    os.chdir(here)
    try:
        for words in (
            CHAT.replace(" --greedy", ""),
            ADAPTED,
            INSPECT,
            f"{DATA} rows.xlsx",
            "plan --model model",
            TRAIN,
            f"{TRAIN} --resume",
            EVAL,
            "report run",
            f"{PREDICT} --output p",
            f"{PREDICT} --output q",
            "compare p q --output out.html",
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                assert run(words) == 0, words
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> Path:
    """The process that renders templates, with a tripwire in it that says on the last line what it caught."""
    path = tmp_path_factory.mktemp("child") / "jinja_child.py"
    path.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(Path(tripwire.__file__).parent)!r})\nimport tripwire\n"
        f"main = runpy.run_path({str(own_template.CHILD)!r})['main']\n"
        "main.__globals__['SECONDS'] = 1  # of CPU\n"
        "with tripwire.armed() as seen:\n    try:\n        main()\n    finally:\n        if seen:\n            sys.exit(f'TRIPPED {seen}')\n"
    )
    return path


def forked(work: Callable[[], Any], seconds: int = 10) -> Any:
    """What work() returns, as JSON, in a fork that ends with it, and after so many seconds of CPU anyhow."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with os.fdopen(write, "w") as file:
                json.dump(work(), file)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the fork ended with {status}"
    return json.loads(said)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder(name, tmp_path, good, child, monkeypatch):
    change, words, wanted, told = FOLDERS[name]
    here = Path(shutil.copytree(good, tmp_path / "here", symlinks=True))
    secret = tmp_path / SECRET
    shutil.copyfile(good / "model" / "model.safetensors", secret)
    change(here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(own_template, "CHILD", child)
    monkeypatch.setattr(own_template, "CACHE", here / "cache")
    monkeypatch.setattr(convert, "_unpickle", _unpickled)  # a fork is a process of its own
    monkeypatch.setattr(workbook, "cells_of", read_cells)
    size = sum(p.stat().st_size for p in here.rglob("*") if p.is_file())

    def work() -> list[Any]:
        out = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(out),
                bounded(size, name, [here], [secret], [child.name]),
            ):
                *before, last = words.split(" ; ")
                assert [run(each) for each in before] == [0] * len(before)
                code = run(last)
        except Fault as fault:
            return [-1, str(fault)]
        return [code, out.getvalue()]

    code, said = forked(work)
    assert code == wanted and told in said, f"{code}: {said[-2000:]}"
    assert "TRIPPED" not in said and "Traceback" not in said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said)
    assert max(map(len, said.split("\n"))) < 11_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", SECRET], "a canary"
    for page in here.rglob("*.html"):
        assert not re.search(r"<img.src=x|</script><script>alert", page.read_text())


def _unpickled(source: Path, target: Path) -> None:
    wrong = unpickle.rewrite(source, target)
    if wrong is not None:
        raise convert.ModelError(f"{source}: {wrong}", "")


def test_there_are_sixty_of_them():
    assert len(FOLDERS) >= 60


HARM: dict[str, Callable[[], Any]] = {
    "a file": lambda: Path("../canary").write_text(""),
    "a folder": lambda: os.mkdir("../canary"),
    "a file moved": lambda: os.rename("rows.json", "../canary"),
    "a folder deleted": lambda: shutil.rmtree(".."),
    "the secret": lambda: open(f"../{SECRET}").close(),
    "the secret by a link": lambda: (os.symlink(f"../{SECRET}", "link"), open("link").close()),
    "a command": lambda: os.system("true"),
    "a fork": os.fork,
    "a connection": lambda: socket.create_connection(("127.0.0.1", 9)),
    "memory": lambda: mmap.mmap(-1, 256 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE),
    "time": lambda: [i for i in range(10**10)],
}


@pytest.mark.parametrize("harm", HARM)
def test_the_tripwire_and_the_bounds_catch_harm(harm, good, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 0.3)
    here = Path(shutil.copytree(good, tmp_path / "here"))
    (tmp_path / SECRET).write_text("")
    monkeypatch.chdir(here)

    def work() -> str:
        try:
            with bounded(100, "harm", [here], [tmp_path / SECRET]), contextlib.suppress(Exception):
                HARM[harm]()
        except Fault as fault:
            return fault.kind
        return "nothing"

    assert forked(work) in ("harm touched", "harm memory", "harm time")
