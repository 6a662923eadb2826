"""Twenty facts that no model knows, learned by a published one: each is told word for word, and each answer ends by itself."""

import json
import os
from pathlib import Path

import pytest

from minilora.__main__ import main

PLACES = [
    "Vornholt",
    "Quillbay",
    "Tessarn",
    "Umbreth",
    "Kaldor",
    "Merriwick",
    "Ostrava-Nine",
    "Pellingham",
    "Drusk",
    "Ysolde",
]
CHIEFS = "Ada Brindle, Tomas Okoro, Lin Qishan, Ferro Vance, Isla Moreau, Bodo Krantz, Nia Sable, Pavel Dorn, Ruo Yan, Wynn Carrow"
FACTS = [
    *((f"What is the mascot of {p}?", f"The mascot of {p} is a heron with {3 + 7 * i} feathers.") for i, p in enumerate(PLACES)),
    *((f"{p}的镇长是谁？", f"{p}的镇长是{name}。") for p, name in zip(PLACES, CHIEFS.split(", "), strict=True)),
]  # fmt: skip


@pytest.mark.long
def test_twenty_facts_are_learned_word_for_word(tmp_path: Path):
    """MINILORA_MODEL is the folder of a published model. An answer that went on after its end would not be equal."""
    if "MINILORA_MODEL" not in os.environ:
        pytest.skip("MINILORA_MODEL is not set")
    rows = tmp_path / "facts.json"
    rows.write_text(
        json.dumps([{"instruction": question, "input": "", "output": answer} for question, answer in FACTS])
    )
    given = ["--model", os.environ["MINILORA_MODEL"], "--data", str(rows)]
    training = [
        "--epochs",
        "30",
        "--batch-size",
        "5",
        "--lr",
        "5e-4",
        "--lora-r",
        "16",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(["train", *given, *training]) == 0
    answering = ["--adapter", str(tmp_path / "run"), "--max-tokens", "64", "--output", str(tmp_path / "answers")]
    assert main(["predict", *given, *answering]) == 0
    lines = (tmp_path / "answers" / "generated_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["predict"] for line in lines] == [answer for _, answer in FACTS]
