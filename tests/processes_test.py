"""Which process of a run this is, from flags or from SLURM."""

import pytest

from ternax import processes
from ternax.errors import UsageError
from ternax.processes import Member, find

SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_JOB_ID": "5000",
    "SLURM_JOB_NODELIST": "gpu[03-07,11],big1",
}


def test_alone():
    assert find(None, None, None, {}) is None
    assert find(None, None, None, SLURM | {"SLURM_NTASKS": "1"}) is None
    assert processes.current() == Member(0, 1, "")


def test_flags_lead():
    assert find("host:12", 4, 1, SLURM) == Member(1, 4, "host:12")


def test_slurm():
    assert find(None, None, None, SLURM) == Member(3, 8, f"gpu03:{12288 + 5000 % 4096}")


@pytest.mark.parametrize(
    "nodes, first", [("node1", "node1"), ("a-b,c", "a-b"), ("n[1,3]", "n1"), ("n[10-12]x", "n10")]
)
def test_first_node(nodes, first):
    found = find(None, None, None, SLURM | {"SLURM_JOB_NODELIST": nodes})
    assert found is not None and found.coordinator.startswith(f"{first}:")


@pytest.mark.parametrize(
    "flags, why",
    [
        (("host:1", 2, None), "go together"),
        ((None, None, 0), "go together"),
        (("host", 2, 0), "must be host:port"),
        (("host:0", 2, 0), "must be host:port"),
        (("host:1", 2, 2), "counts from 0 to 1, found 2"),
    ],
)
def test_what_cannot_be(flags, why):
    with pytest.raises(UsageError, match=why):
        find(*flags, {})
