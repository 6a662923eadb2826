"""GLM and Qwen models that are known and not supported: what is missing here, and what to take instead."""

from typing import Any, NamedTuple

from ..files.model_folder import VISION


class Refused(NamedTuple):
    """missing: what these models have and minilora does not; instead: a model, and its model_type, which is supported."""

    missing: str
    instead: tuple[str, str]


SMALL_QWEN, SMALL_GLM, LATENT_GLM = (
    ("Qwen3.5-9B", "qwen3_5"),
    ("GLM-4-9B-0414", "glm4"),
    ("GLM-4.7-Flash", "glm4_moe_lite"),
)
_MHC = "several residual streams, mixed by learned gates"
REFUSED = {
    "qwen4_exp": Refused(f"{_MHC}, attention to indexed blocks, and tables of n-grams", ("Qwen3.8-27B", "qwen3_5")),
    "glm5_next": Refused(f"{_MHC}, decay for each channel (KDA), and attention to indexed blocks", LATENT_GLM),
    "glm_moe_dsa": Refused(
        "attention to the tokens that an index picks (DSA), over latent keys and values", LATENT_GLM
    ),
}
PARTS = {"vision_config": "pictures", "audio_config": "sound", "thinker_config": "sound and pictures"}
# by the words of model_type, where config.json has none of those parts
WORDS = {"vl": "pictures", "glm4v": "pictures", "glm46v": "pictures", "ocr": "pictures", "image": "pictures", "glmga": "pictures",
         "audio": "sound", "asr": "sound", "glmasr": "sound", "omni": "sound and pictures"}  # fmt: skip


def refusal(kind: str, j: dict[str, Any]) -> tuple[str, str] | None:
    """What is missing for a model_type, and what to take instead; None if nothing is known of it."""
    found = REFUSED.get(kind) or REFUSED.get(kind.removesuffix("_text"))
    if found is None:
        senses = [what for part, what in PARTS.items() if j.get(part)] + [
            WORDS[w] for w in kind.split("_") if w in WORDS
        ]
        if not senses:
            return None
        glm = kind.startswith("glm")
        found = Refused(f"a part that reads {senses[0]}", SMALL_GLM if glm else SMALL_QWEN)
    name, its_type = found.instead
    kept = ", whose language model is trained and whose vision is kept as it is" if its_type in VISION else ""
    return f"it has {found.missing}", f"Take {name} (model_type {its_type}){kept}."
