"""Rows of parquet files, as JSON like the rows of other files.

It knows no fields (parts/rows.py), and needs pyarrow (requirements-parquet.txt).
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from parts.guards import LONGEST_NAME, one_line, shown

BATCH_ROWS = 1024  # rows that are Python objects at once


class RepeatedColumnError(ValueError):
    """Two columns of a file have one name, so that a row would keep the last one's value alone."""


def parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (row number from 1, JSON) for every row of a parquet file, row group by row group.

    A null is an absent field. Text may be stored as bytes; times become text. Raises ValueError
    that names the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # it is optional, and takes a while to import
        needed = "reading it needs `pip install -r requirements-parquet.txt`"
        raise ValueError(f"{path}: {needed}") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_columns(path, file.schema_arrow.names)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    columns = [plain_values(column, pyarrow) for column in batch.columns]
                    for values in zip(*columns):
                        row += 1
                        yield row, json_of(dict(zip(batch.schema.names, values)))
    except MemoryError as error:
        reason = str(error) or "a batch of rows does not fit"
        raise MemoryError(f"{path}: cannot be read behind row {row}: {reason}") from None
    except RepeatedColumnError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = one_line(str(error).partition("\n")[0], LONGEST_NAME)
        raise ValueError(
            f"{path}: cannot be read after row {row} ({reason}); the file is cut, damaged, or no "
            "parquet"
        ) from None


def check_columns(path: Path, names: list[str]):
    """Raise RepeatedColumnError that names a column which stands twice in the file."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise RepeatedColumnError(
                f"{path}: found two columns {shown(name)}; give each column a name of its own"
            )


def plain_values(column, pyarrow) -> list:
    """Return the values of an Arrow array as Python objects, without the nulls inside structs."""
    kind = column.type
    if pyarrow.types.is_temporal(kind):
        column = column.cast(pyarrow.string())  # nanoseconds are no Python object
    values = column.to_pylist()
    if pyarrow.types.is_nested(kind):
        values = [without_nulls(value) for value in values]
    return values


def without_nulls(value):
    """Return lists and objects without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def json_of(row: dict) -> bytes:
    """Write the JSON of a row of Python objects, without its nulls."""
    found = {name: value for name, value in row.items() if value is not None}
    return json.dumps(found, ensure_ascii=False, default=plain_value).encode()


def plain_value(value):
    """Return text for bytes that are UTF-8, a number for a decimal, text for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": len(value)}  # an object, so that it is not taken for text
    if isinstance(value, Decimal):
        return float(value)
    return str(value)
