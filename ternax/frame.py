"""Records as a pandas DataFrame, for a notebook or a script of one's own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ternax.errors import UsageError
from ternax.metrics import METRICS
from ternax.record import Record


def frame(records: Sequence[Record]) -> Any:
    """One row a record: its fields, then a column for each metric that any of them has.

    `samples` holds a tuple a row; a metric that a record lacks is missing, not zero.

    Raises UsageError without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise UsageError("a data frame needs pandas: pip install 'ternax[report]'") from error
    plain = [f.name for f in dataclasses.fields(Record) if f.name != "metrics"]
    used = [name for name in METRICS if any(name in record.metrics for record in records)]
    columns: dict[str, list] = {
        name: [getattr(record, name) for record in records] for name in plain
    }
    columns |= {name: [record.metrics.get(name) for record in records] for name in used}
    return pandas.DataFrame(columns)
