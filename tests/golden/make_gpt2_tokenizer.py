"""GPT-2's ids of texts, by transformers: tests/golden/tokenizers/gpt2.

    PEERS/bin/python tests/golden/make_gpt2_tokenizer.py FOLDER      (transformers 5.23.0)

FOLDER holds OpenAI's vocab.json and merges.txt. The texts are those of qwen2_5/golden.json, and some that GPT-2 cuts in another way.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
OWN = [
    "it's IT'S they'll THEY'LL",
    "a1b22c333 12345 1,234",
    "one\ntwo\n\nthree \n four",
    "wait...  what?! \t end  ",
    "ﬁne café ｈａｌｆ",
]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello  there"}, {"role": "assistant", "content": " Hi!\n"}]  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"  # the default one of transformers 4.40

folder = Path(sys.argv[1])
tokenizer = transformers.GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
texts = [t["text"] for t in json.loads((HERE / "tokenizers/qwen2_5/golden.json").read_text(encoding="utf-8"))["texts"]]
texts = [t for t in texts if "<|" not in t] + OWN
golden = {
    "texts": [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False)} for t in texts],
    "chats": [{
        "messages": CHAT, "text": tokenizer.apply_chat_template(CHAT, chat_template=TEMPLATE, tokenize=False),
        "ids": tokenizer.apply_chat_template(CHAT, chat_template=TEMPLATE, return_dict=False),
    }],
}  # fmt: skip
out = HERE / "tokenizers" / "gpt2"
out.mkdir(exist_ok=True)
(out / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=0), encoding="utf-8")
(out / "config.json").write_text('{"model_type": "gpt2"}\n')
with tempfile.TemporaryDirectory() as full:
    tokenizer.save_pretrained(full)
    command = [
        sys.executable,
        str(HERE / "shrink_tokenizer.py"),
        f"{full}/tokenizer.json",
        str(out / "golden.json"),
        str(out),
    ]
    subprocess.run(command, check=True)
