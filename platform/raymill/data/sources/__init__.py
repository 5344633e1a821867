"""Where the rows of a split come from: one file a format.

Here: sources, each of which lists its fragments from an index or in one cheap pass and reads one of them; and ways to split one.
Not here: in which order that is done (`data`).
"""

from raymill.data.sources.arrays import ArraySource
from raymill.data.sources.arrow_ipc import ArrowSource
from raymill.data.sources.lines.tables import CsvSource, JsonLinesSource
from raymill.data.sources.lines.text import TextSource
from raymill.data.sources.map_style import MapStyleSource
from raymill.data.sources.parquet import ParquetSource, write_parquet
from raymill.data.sources.pictures.boxes import CocoSource, VocSource
from raymill.data.sources.pictures.decode import broken_pictures, decode_images, decode_masks
from raymill.data.sources.pictures.folder import ImageFolderSource
from raymill.data.sources.pictures.masks import MaskSource
from raymill.data.sources.row_cache import cached
from raymill.data.sources.splits import resample, split_by_key, split_by_share, split_by_time, split_into_folds
from raymill.data.sources.tar import TarSource

__all__ = [
    "ArraySource",
    "ArrowSource",
    "CocoSource",
    "CsvSource",
    "ImageFolderSource",
    "JsonLinesSource",
    "MapStyleSource",
    "MaskSource",
    "ParquetSource",
    "TarSource",
    "TextSource",
    "VocSource",
    "broken_pictures",
    "cached",
    "decode_images",
    "decode_masks",
    "resample",
    "split_by_key",
    "split_by_share",
    "split_by_time",
    "split_into_folds",
    "write_parquet",
]
