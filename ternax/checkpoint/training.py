"""States of a training run on disk: saved behind its back, each step whole or not there at all.

A state is flattened to its leaves' names, "opt.0.mu.layers.mlp.up.kernel", and these are
what is stored. So a restore can compare names, shapes and dtypes by itself before any
byte is read: orbax casts a stored dtype to the one it is asked for and says nothing.
"""

import pathlib
from typing import Any

import jax

from ternax.checkpoint.files import first_line, unreadable
from ternax.errors import BadModelFile, OutputError, UsageError


class TrainCheckpoints:
    """Checkpoints of one run: a folder a step, of which the newest `keep` stay.

        with TrainCheckpoints("runs/mine/checkpoints") as checkpoints:
            checkpoints.save(100, state, {"tokens": 1_000_000})
            ...
            state, meta = checkpoints.restore(checkpoints.latest(), like)

    A step gets its name when everything in it is written, so one cut off, even by SIGKILL,
    never counts; its remains are gone by the next run's first save. Leaving the block waits.
    """

    def __init__(self, directory, keep: int = 3):
        """directory: made if it is not there. OutputError where it cannot be."""
        import orbax.checkpoint as ocp  # half a second, which only a training run needs

        self.directory = pathlib.Path(directory).absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritten(self.directory, error) from error
        self._orbax = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state, meta: dict) -> None:
        """Copies the state to the host and returns; it is written while training goes on.

        Args:
          step: of the run; each is saved once.
          state: a pytree of jax arrays, NamedTuples and optax states included. Its buffers
            may be donated as soon as this returns. Typed random keys go as their key_data.
          meta: JSON, kept with the step.

        Raises:
          UsageError: the step is there already.
          OutputError: this step, or the one before, cannot be written.
        """
        leaves = _named_leaves(state)
        if step in self._manager.all_steps():
            raise UsageError(
                f"step {step} is in {self.directory} already: continue behind step "
                f"{self._manager.latest_step()}, or save to another directory"
            )
        args = self._orbax.args
        items = args.Composite(state=args.StandardSave(leaves), meta=args.JsonSave(meta))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # a full disk comes as OSError, ValueError or RuntimeError
            raise _unwritten(self.directory / str(step), error) from error

    def latest(self) -> int | None:
        """The newest whole step, once what is being saved is there; None without any."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, step: int, like) -> tuple[Any, dict]:
        """The state of a step, bit for bit, and its meta.

        Args:
          step: one that is there, such as `latest()`.
          like: the state as a pytree of jax.ShapeDtypeStruct. Each leaf goes to its
            `sharding`, whatever it was saved from; one without goes to the first device.

        Raises:
          BadModelFile: no such step, a file that cannot be read, or a leaf that is missing,
            too many, or of another shape or dtype than in `like`.
        """
        self.wait()
        path = self.directory / str(step)
        if step not in self._manager.all_steps():
            found = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise BadModelFile(self.directory, f"step {step}", f"not there; steps found: {found}")
        wanted = {name: _placed(leaf) for name, leaf in _named_leaves(like).items()}
        try:
            stored = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise unreadable(path, "state", error) from error
        _check_same(path, stored, wanted)
        args = self._orbax.args
        items = args.Composite(state=args.StandardRestore(wanted), meta=args.JsonRestore())
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:
            raise unreadable(path, "state", error) from error
        leaves = [found["state"][name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), found["meta"]

    def drop_from(self, step: int) -> None:
        """Removes the states of `step` and all behind it."""
        self.wait()
        for found in self._manager.all_steps():
            if found >= step:
                self._manager.delete(found)

    def wait(self) -> None:
        """Until what is being saved is on disk. OutputError where it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _unwritten(self.directory, error) from error

    def close(self) -> None:
        """Waits, as `wait` does, and ends the threads behind it."""
        try:
            self._manager.close()
        except Exception as error:
            raise _unwritten(self.directory, error) from error

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, *stopped) -> None:
        self.close()


def _named_leaves(tree) -> dict[str, Any]:
    """Leaf name -> leaf, in the tree's order: "opt.0.mu.kernel"."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"two leaves of the state are called {name}")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name} is a typed random key: save its jax.random.key_data")
        named[name] = leaf
    return named


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """The abstract leaf with a sharding in any case: orbax would take the saved devices."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same(path, stored, wanted) -> None:
    """Raises BadModelFile for the first leaf that differs in name, shape or dtype."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise BadModelFile(path, name, "missing, expected by this run; is its config the same?")
        expected = (tuple(leaf.shape), leaf.dtype.name)
        found = (tuple(stored[name].shape), jax.numpy.dtype(stored[name].dtype).name)
        if found != expected:
            raise BadModelFile(
                path, name, f"expected {expected[1]} {expected[0]}, found {found[1]} {found[0]}"
            )
    extra = [name for name in stored if name not in wanted]
    if extra:
        raise BadModelFile(path, extra[0], "unknown to this run; is its config the same?")


def _unwritten(path, error: Exception) -> OutputError:
    return OutputError(f"{path}: the checkpoint cannot be written: {first_line(error)}")
