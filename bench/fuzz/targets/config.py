"""config.json of every family: its keys, its sizes, and the modules that follow from them, without memory."""

from pathlib import Path

from minilora.checkpoint.load import empty_model, keys_not_read, read_config
from minilora.files.model_folder import ModelFolder
from minilora.models.config_keys import NEUTRAL, USED

from ..room import fresh

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
SEEDS = [(p / "config.json").read_bytes() for p in sorted(GOLDEN.iterdir()) if (p / "config.json").is_file()]
WORDS = sorted({*NEUTRAL, *(key for keys in USED.values() for key in keys), *USED, "yarn", "linear", "dynamic", "llama3", "mrope", "full_attention",
                "sliding_attention", "linear_attention", "bfloat16", "float8_e4m3fn", "silu", "gelu", "quantization_config", "text_config"})  # fmt: skip


def target(data: bytes) -> None:
    folder = fresh("config")
    (folder / "config.json").write_bytes(data)
    opened = ModelFolder(folder)
    config = read_config(opened)
    keys_not_read(opened)
    model = empty_model(config)
    assert sum(p.numel() for p in model.parameters()) > 0
