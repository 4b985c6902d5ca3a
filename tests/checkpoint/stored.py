"""What the tests of saved models share."""

import hashlib
import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import ternax
from ternax.checkpoint import box


def in_a_box(name: str, tmp_path, monkeypatch):
    """Puts a model called `name` into a box of its own, of weights that seed 0 does not make."""
    monkeypatch.setattr(box, "BOX", tmp_path / "box")
    model = ternax.load(name, seed=99)
    ternax.save(model, tmp_path / "box" / name)
    return model


def bits(model) -> dict:
    """Path -> (shape, dtype, bytes) of every variable."""
    values = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    return {p: (v.shape, str(v.dtype), np.asarray(v).tobytes()) for p, v in values.items()}


def static(model):
    """All of a model but its arrays: formats, parts, backends."""
    return nnx.split(model)[0]


def edit_manifest(path, change) -> None:
    """Applies change(content), then makes the manifest's own hash right again."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    text = json.dumps(content, sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(content))


def read_weights(path) -> dict[str, np.ndarray]:
    """The leaves as orbax gives them to anybody, without this library."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
        tree = files.metadata(path / "weights").item_metadata.tree
        as_numpy = dict.fromkeys(tree, ocp.RestoreArgs(restore_type=np.ndarray))
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return files.restore(path / "weights", args=args)


def write_weights(path, arrays: dict[str, np.ndarray]) -> None:
    """Other arrays in the place of a saved model's."""
    shutil.rmtree(path / "weights")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
        files.save(path / "weights", args=ocp.args.PyTreeSave(arrays))


def edit_leaf(path, name: str, value: np.ndarray, *, honest: bool) -> None:
    """Replaces one leaf. honest: the manifest tells its new shape, dtype and hash."""
    write_weights(path, read_weights(path) | {name: value})
    if honest:
        sha256 = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        leaf = {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": sha256}
        edit_manifest(path, lambda content: content["leaves"].update({name: leaf}))
