"""A yaml file of settings, of a run and of a sweep."""

from minilora.config import FIELDS
from minilora.errors import UsageError
from minilora.settings import ALIASES, NOT_NEEDED, read_yaml, resolve, without_not_needed
from minilora.tools.sweep import PACKAGE, read_sweep

from ..room import ROOM, fresh

SEEDS = [
    b"model: m\ndata: d\nlr: 1e-4\nlora_r: 8\nrslora: on\nlora_targets: [q_proj, v_proj]\ndefine: {who: me}\nval: 0.05\nseed: 0x10\n",
    b"base: &b {model: m, data: d}\nzip: {max_source_length: [512, 1024], max_target_length: [128, 256]}\nproduct: {lora_r: [8, 16]}\ntest: {rows: 2}\n",
    b"- a\n- b\n", b"--- !!map {lr: !!float 1}\n...\n", b"lr: 2024-01-01\nbase: [1]\n", b"{\"lr\": 1, \"epochs\": 2}",
    *(p.read_bytes() for p in sorted((PACKAGE / "recipes").glob("*.yaml"))),
]  # fmt: skip
WORDS = [*FIELDS, *ALIASES, *NOT_NEEDED, "base:", "zip:", "product:", "test:", "question:", "smoke:", "&a", "*a", "<<: *a", "!!python/object:os.system", "!!binary",
         "!!set", "!!omap", "!!timestamp", "? ", ": ", "- ", "|", ">", "%YAML 1.1", "---", "...", "[", "]", "{", "}", "1:30:00", ".inf", ".nan", "~", "on", "off"]  # fmt: skip


def target(data: bytes) -> None:
    path = fresh("settings") / "run.yaml"
    path.write_bytes(data)
    given = read_yaml(path)
    if given.keys() & {"base", "zip", "product", "smoke"}:
        for smoke in (False, True):
            try:
                read_sweep(str(path), ROOM / "out", {}, smoke)
            except UsageError:
                if smoke:
                    raise
    else:
        resolve(without_not_needed(given)[0])
