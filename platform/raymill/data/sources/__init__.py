"""Where the rows of a split come from: one file a format.

Here: sources, each of which lists its fragments from an index and reads one of them. Not here: in which order that is done
(`data`).
"""

from raymill.data.sources.arrays import ArraySource
from raymill.data.sources.map_style import MapStyleSource
from raymill.data.sources.parquet import ParquetSource, write_parquet
from raymill.data.sources.splits import split_by_key, split_by_share, split_by_time, split_into_folds

__all__ = [
    "ArraySource",
    "MapStyleSource",
    "ParquetSource",
    "split_by_key",
    "split_by_share",
    "split_by_time",
    "split_into_folds",
    "write_parquet",
]
