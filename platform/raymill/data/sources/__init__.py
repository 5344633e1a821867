"""Where the rows of a split come from: one file a format.

Here: sources, each of which lists its fragments from an index and reads one of them. Not here: in which order that is done
(`data`).
"""

from raymill.data.sources.arrays import ArraySource
from raymill.data.sources.map_style import MapStyleSource
from raymill.data.sources.parquet import ParquetSource, write_parquet

__all__ = ["ArraySource", "MapStyleSource", "ParquetSource", "write_parquet"]
