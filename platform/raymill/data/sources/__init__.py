"""Where the rows of a split come from: one file a format.

Here: sources, each of which lists its fragments from an index or in one cheap pass and reads one of them; and ways to split one.
Not here: in which order that is done (`data`).
"""

from raymill.data.sources.arrays import ArraySource
from raymill.data.sources.arrow_ipc import ArrowSource
from raymill.data.sources.image_folder import ImageFolderSource, decode_images
from raymill.data.sources.lines.tables import CsvSource, JsonLinesSource
from raymill.data.sources.lines.text import TextSource
from raymill.data.sources.map_style import MapStyleSource
from raymill.data.sources.parquet import ParquetSource, write_parquet
from raymill.data.sources.splits import resample, split_by_key, split_by_share, split_by_time, split_into_folds
from raymill.data.sources.tar import TarSource

__all__ = [
    "ArraySource",
    "ArrowSource",
    "CsvSource",
    "ImageFolderSource",
    "JsonLinesSource",
    "MapStyleSource",
    "ParquetSource",
    "TarSource",
    "TextSource",
    "decode_images",
    "resample",
    "split_by_key",
    "split_by_share",
    "split_by_time",
    "split_into_folds",
    "write_parquet",
]
