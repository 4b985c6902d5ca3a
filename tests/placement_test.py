"""Training split over meshes: one device's losses, each device's share, and going on elsewhere."""

import json

import numpy as np
import pytest

from ternax.errors import UsageError
from tests import split

_TRAIN = """
import json, pathlib, sys
import jax
import numpy as np
from ternax import configs, data
from ternax.mesh import make_mesh, parse
from ternax.placement import Placement
from ternax.train import TrainSpec
from ternax.training import TrainRun
from tests.train_test import CORPUS

config = configs.get_config("tiny-bitnet")
for text in json.loads(sys.argv[1]):
    sizes = parse(text)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    placement = Placement(make_mesh(sizes, devices))
    spec = TrainSpec(steps=int(sys.argv[2]), batch=4, length=16, warmup_steps=2)
    folder = pathlib.Path(sys.argv[3])
    run = TrainRun(config, spec, CORPUS, folder, save_every=2, log_every=1, placement=placement)
    found = {}

    def ready(trainer):
        kernel = trainer.state["params"]["layers"]["mlp"]["up"]["kernel"]
        found["share"] = kernel.size // kernel.addressable_shards[0].data.size
        found["first"] = trainer.step

    def watch(progress):
        if progress.step == int(sys.argv[4]):
            raise KeyboardInterrupt

    try:
        run.run(ready=ready, watch=watch)
    except KeyboardInterrupt:
        pass
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    print(json.dumps(found | {"losses": [json.loads(line)["loss_nats"] for line in lines]}))
"""


def train(folder, meshes, steps=4, stop=-1):
    said = split.run(_TRAIN, 4, json.dumps(meshes), str(steps), str(folder), str(stop))
    return [json.loads(line) for line in said.splitlines()]


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Stopped in its third step on four devices, resumed on two, against one that was not."""
    [whole] = train(tmp_path / "whole", ["data:1"])
    [cut] = train(tmp_path / "cut", ["fsdp:2,tensor:2"], stop=3)
    [rest] = train(tmp_path / "cut", ["fsdp:2"])
    assert (whole["share"], cut["share"], rest["share"]) == (1, 4, 2)
    assert (cut["first"], len(cut["losses"])) == (0, 3)
    assert (rest["first"], len(rest["losses"])) == (2, 4)
    # Sums are taken in another order, and a weight on the edge of a trit may tip over.
    np.testing.assert_allclose(rest["losses"], whole["losses"], rtol=5e-3)
    np.testing.assert_allclose(cut["losses"][:2], whole["losses"][:2], rtol=1e-5)


def test_a_batch_divides():
    from ternax import mesh
    from ternax.placement import Placement

    with pytest.raises(UsageError, match="cuts a batch in 4, found 6 sequences"):
        Placement(mesh.abstract_mesh(mesh.parse("data:2,fsdp:2"))).check_batch(6)
