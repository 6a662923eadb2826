"""The sizes of the models that the benches take their shapes from (each one's published config.json)."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Width, ffn width, query heads, key/value heads, head size, vocabulary, layers."""

    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    layers: int

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_size


MODELS = {
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151936, 24),
    "qwen2.5-1.5b": Shape(1536, 8960, 12, 2, 128, 151936, 28),
    "qwen2.5-7b": Shape(3584, 18944, 28, 4, 128, 152064, 28),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 151936, 36),
    "chatglm-6b": Shape(4096, 16384, 32, 32, 128, 130528, 28),
    "glm-4-9b": Shape(4096, 13696, 32, 2, 128, 151552, 40),
}
TOY = Shape(48, 80, 4, 2, 16, 144, 2)  # no model: for trying the benches out
