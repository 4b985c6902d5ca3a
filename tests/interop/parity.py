"""Holds files that ternax writes against the programs they are for, where those are installed.

    python tests/interop/parity.py make DIR          # with ternax: models, and what it computes
    python tests/interop/parity.py transformers DIR  # with torch and transformers instead
    python tests/interop/parity.py llama DIR --program=llama-simple [MODEL ...]
    python tests/interop/parity.py llama DIR --program=bitnet.cpp/llama-simple --kinds=I2_S

`make` takes a trained model too, `--model=DIRECTORY` of floats of a byte vocabulary, for texts that
mean something. `transformers` prints the largest difference of a logit and counts equal greedy
tokens, for each of transformers' routes to a model: quantized online, and stored offline in both
conventions. They add in different orders, and an input between two int8 codes then takes the one
or the other; it fails where ours are further from one of them than they are from each other.
`llama` counts prompts whose greedy texts are equal; bitnet.cpp's program of that name is asked the
same way, and it alone knows I2_S. Ours keep their cache in f32, these programs in f16 unless they
are patched; and upstream's bitnet has no relu2.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np

PROMPTS = (
    "def main(",
    "import os\n",
    "class A(object):\n    def __init__",
    "    return self.",
    "if __name__ ==",
    "for i in range(",
    "raise ValueError(",
    "# This is a",
    "    if not ",
    "with open(",
    "x = ",
    '"""Return the',
    "try:\n",
    "    assert ",
    "while True:\n",
    "def test_",
    "    self.",
    "from collections import ",
    "    for line in",
    "print(",
)
NEW_TOKENS = 48
ROUTES = ("online", "autobitlinear", "bitlinear")
KINDS = ("TQ2_0", "TQ1_0", "F32", "I2_S")
TABLES = dict(embed_dtype="f32", head_dtype="f32")
# What f32 sums in another order make of logits, when no int8 code of an input changes.
EXACT = 1e-5


def make(directory: pathlib.Path, source: str | None) -> None:
    import ternax
    from tests.interop import models

    made = {}
    if source:
        made["trained"] = ternax.load(source, **TABLES)
    for config in models.CONFIGS.values():
        made[config.name] = models.packed(config, **TABLES)
        ternax.save(models.floats(config), directory / config.name / "online", "hf")
    for name, model in made.items():
        folder = directory / name
        ternax.save(model, folder / "autobitlinear", "hf")
        ternax.save(model, folder / "bitlinear", "hf,convention=bitlinear")
        expected(model, folder / "expected.npz")
        for kind in KINDS:
            file = folder / f"{kind}.gguf"
            ternax.save(model, file, f"gguf:{kind}")
            options = {"scheme": "none,dtype=f32", "inputs": "none"} if kind == "F32" else {}
            texts(ternax.load(file, i2_s="x86", **options, **TABLES), folder / f"{kind}.json")


def expected(model, path: pathlib.Path) -> None:
    """Logits of a text, and greedy tokens behind its beginning."""
    import ternax

    tokens = np.array([list(PROMPTS[2].encode() + PROMPTS[5].encode())], np.int32)
    greedy = ternax.generate(model, tokens[:, :8], max_new_tokens=24, kv_dtype="f32")
    np.savez(path, tokens=tokens, logits=np.asarray(model(tokens)), greedy=greedy)


def texts(model, path: pathlib.Path) -> None:
    """What follows each prompt, as hexadecimal bytes; ids that are none, by their GGUF names."""
    import ternax

    names = {i: bytes([i]) for i in range(256)}

    found = {}
    for prompt in PROMPTS:
        tokens = np.array([list(prompt.encode())], np.int32)
        out = ternax.generate(model, tokens, max_new_tokens=NEW_TOKENS, stop=(0,), kv_dtype="f32")
        ids = [int(i) for i in out[0] if i]
        found[prompt] = b"".join(names.get(i, f"<|{i}|>".encode()) for i in ids).hex()
    path.write_text(json.dumps(found))


def check_transformers(directory: pathlib.Path) -> None:
    import os

    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    failed = False
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        want = np.load(folder / "expected.npz", allow_pickle=False)
        tokens = torch.from_numpy(want["tokens"].astype(np.int64))
        routes = {}
        for route in (name for name in ROUTES if (folder / name).is_dir()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder / route, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits.numpy()
                greedy = model.generate(
                    tokens[:, :8], max_new_tokens=24, do_sample=False, eos_token_id=None
                ).numpy()
            routes[route] = logits
            far = np.abs(logits - want["logits"]).max()
            same = int((greedy[:, 8:] == want["greedy"][:, 8:]).sum())
            print(
                f"{folder.name:14} {route:14} {type(model).__name__:20} largest difference of a "
                f"logit {far:.2e} (std {want['logits'].std():.2f}); greedy tokens equal {same}/24"
            )
        apart = {
            pair: np.abs(routes[pair[0]] - routes[pair[1]]).max()
            for pair in itertools.combinations(routes, 2)
        }
        told = ", ".join(f"{a} and {b} {far:.2e}" for (a, b), far in apart.items())
        print(f"{folder.name:14} transformers' own routes: {told}")
        ours = max(np.abs(logits - want["logits"]).max() for logits in routes.values())
        if ours > max(apart.values(), default=0) + EXACT:
            print(f"{folder.name:14} ours is further: {ours:.2e}")
            failed = True
    sys.exit(failed)


def check_llama(directory: pathlib.Path, program: str, kinds: list[str], names: list[str]) -> None:
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        if names and folder.name not in names:
            continue
        for kind in kinds:
            want = json.loads((folder / f"{kind}.json").read_text())
            same, length = 0, 0
            for prompt, text in want.items():
                found = completion(program, folder / f"{kind}.gguf", prompt)
                ours = bytes.fromhex(text)
                same += found == ours
                length += len(ours) - len(prompt.encode())
            print(
                f"{folder.name:14} {kind:6} greedy texts equal {same}/{len(want)}, of "
                f"{length / len(want):.1f} bytes on average"
            )


def completion(program: str, model: pathlib.Path, prompt: str) -> bytes:
    """Prompt and greedy continuation. Another program of its kind loses the end of its output."""
    command = [program, "-m", str(model), "-n", str(NEW_TOKENS), prompt]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace")[-2000:])
    return done.stdout.partition(b"\nmain: decoded")[0].removesuffix(b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "transformers", "llama"))
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--program", default="llama-simple")
    parser.add_argument("--kinds", default="TQ2_0,TQ1_0,F32", help=f"of {', '.join(KINDS)}")
    args = parser.parse_args()
    if args.what == "make":
        sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
        make(args.directory, args.model)
    elif args.what == "transformers":
        check_transformers(args.directory)
    else:
        check_llama(args.directory, args.program, args.kinds.split(","), args.names)


if __name__ == "__main__":
    main()
