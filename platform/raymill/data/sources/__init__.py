"""Where the rows of a split come from: one file a format. Each source lists its fragments and reads one of them."""

from raymill.data.sources.arrays import ArraySource
from raymill.data.sources.map_style import MapStyleSource
from raymill.data.sources.parquet import ParquetSource, write_parquet

__all__ = ["ArraySource", "MapStyleSource", "ParquetSource", "write_parquet"]
