"""Python imports this at its start, where its folder is on the path: a log of what each rank writes, moves or makes below $AUDITED."""

import os
import sys

AUDITED, RANK = os.environ.get("AUDITED", ""), os.environ.get("RANK", "")
CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}


def note(event: str, args: tuple) -> None:
    written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (written or event in CHANGING) and any(str(a).startswith(f"{AUDITED}/run") for a in args[:2]):
        os.write(LOG, f"{event} {args[:2]}\n".encode())


if AUDITED and RANK:
    LOG = os.open(f"{AUDITED}/writes-{RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(note)
