"""Makes ternax/box/heldout.txt and heldout.json: whole files that no model here is trained on.

    python3.11 tests/goldens/make_heldout.py

The files are the held-out side of `ternax.data.open_corpus("stdlib")`, in the order of the
sha256 of their names, less those above 40 KiB, those that have 200 bytes in a row in common
with a file of the training side (chunk.py lives on in wave.py), and those with which the text
would pass 200,000 bytes. An END byte stands between them. What is in the repository was made by
the Python that heldout.json names, and the same Python makes the same bytes. The text is
CPython's, under the PSF License Agreement Version 2: ternax/box/LICENSE-PSF.txt.
"""

import hashlib
import json
import pathlib
import platform

from ternax import data

MOST_BYTES_A_FILE = 40 * 1024
MOST_BYTES = 200_000
SHARED_BYTES = 200
BOX = pathlib.Path(__file__).resolve().parents[2] / "ternax" / "box"


def chosen() -> list[tuple[str, bytes]]:
    """(name, text) of each file, in order."""
    files = dict(data._files(data.STDLIB))
    held_out = data._held_out(list(files))
    training = bytes([data.END]).join(text for name, text in files.items() if name not in held_out)
    found, total = [], 0
    for name in sorted(held_out, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = files[name]
        if len(text) > MOST_BYTES_A_FILE or total + len(text) + 1 > MOST_BYTES:
            continue
        if not shares(text, training):
            found.append((name, text))
            total += len(text) + 1
    return found


def shares(text: bytes, training: bytes) -> bool:
    """Whether SHARED_BYTES bytes in a row stand in both.

    Such a stretch holds a whole piece of half that length, cut at multiples of it.
    """
    half = SHARED_BYTES // 2
    for start in range(0, len(text) - half + 1, half):
        at = training.find(text[start : start + half])
        while at >= 0:
            before, behind = 0, half
            while (
                before < half
                and before < min(start, at)
                and text[start - before - 1] == training[at - before - 1]
            ):
                before += 1
            while (
                start + behind < len(text)
                and at + behind < len(training)
                and behind < SHARED_BYTES
                and text[start + behind] == training[at + behind]
            ):
                behind += 1
            if before + behind >= SHARED_BYTES:
                return True
            at = training.find(text[start : start + half], at + 1)
    return False


def main() -> None:
    files = chosen()
    text = bytes([data.END]).join(text for _, text in files)
    about = {
        "python": platform.python_version(),
        "sha256": hashlib.sha256(text).hexdigest(),
        "files": [[name, len(text)] for name, text in files],
    }
    (BOX / "heldout.txt").write_bytes(text)
    (BOX / "heldout.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"heldout.txt: {len(files)} files, {len(text)} bytes, sha256 {about['sha256']}")


if __name__ == "__main__":
    main()
