"""RecBole's atomic files read and prepared alike on pandas 2 and pandas 3.

Parts adapted from RecBole (MIT, (c) 2020 RUCAIBox).

RecBole 1.2.1 relies on three things that pandas 3 took away: ``Series.agg(len)`` as "the length of
each", ``fillna(inplace=True)`` on a column of a frame, and arrays of values that can be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType

from recbole_mm.errors import UserError

SIDE_FILES = ("text", "image")  # read by recbole_mm itself, by item token

# What a missing number may look like; a token is missing only if empty ("NA" is a fine brand).
_MISSING_NUMBERS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none", "<NA>"]


class AtomicColumn(pd.Series):  # type: ignore[type-arg]
    """A column as before pandas 3: ``agg(len)`` is the length of each, values are writable."""

    @property
    def _constructor(self) -> Callable[..., AtomicColumn]:
        return AtomicColumn

    @property
    def values(self) -> Any:
        values = super().values
        writable = not isinstance(values, np.ndarray) or values.flags.writeable
        return values if writable else values.copy()  # torch warns of read-only memory

    def agg(self, func: Any = None, axis: Any = 0, *args: Any, **kwargs: Any) -> Any:
        if func is len:
            return self.map(len)
        return super().agg(func, axis, *args, **kwargs)


class AtomicFrame(pd.DataFrame):
    """A frame of `AtomicColumn`."""

    @property
    def _constructor(self) -> Callable[..., AtomicFrame]:
        return AtomicFrame

    @property
    def _constructor_sliced(self) -> Callable[..., AtomicColumn]:
        return AtomicColumn


@dataclass(frozen=True)
class Column:
    """One column of an atomic file's header, ``name:type``."""

    name: str
    ftype: FeatureType

    @property
    def header(self) -> str:
        return f"{self.name}:{self.ftype.value}"


def read_header(path: Path, separator: str, encoding: str) -> list[Column]:
    """The columns of an atomic file.

    Raises:
        UserError: a column is not ``name:type``, has a type that RecBole does not know or a name
            that another has, all columns are one, or the file is not text in `encoding`.
    """
    try:
        with open(path, encoding=_without_mark(encoding)) as file:
            names = file.readline().rstrip("\r\n").split(separator)
    except UnicodeDecodeError:
        raise _not_text(path, encoding) from None
    columns: list[Column] = []
    for header in names:
        name, _, ftype = header.rpartition(":")
        if len(names) == 1 and ":" in name:
            raise UserError(
                f"{path}, row 1: '{header}' is one column, as field_separator is {separator!r}: "
                "write that between columns, in all rows, or set field_separator."
            )
        if not name or ftype not in {known.value for known in FeatureType}:
            raise UserError(
                f"{path}, row 1: column '{header}' is not NAME:TYPE with TYPE one of "
                "token, token_seq, float, float_seq."
            )
        if name in {column.name for column in columns}:
            raise UserError(f"{path}, row 1: column '{name}' occurs twice; rename one of the two.")
        columns.append(Column(name, FeatureType(ftype)))
    return columns


def _without_mark(encoding: str) -> str:
    """The encoding that skips the byte order mark that some programs begin UTF-8 with."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _not_text(path: Path, encoding: str) -> UserError:
    """The mistake in a file that cannot be decoded, with its first bad row where rows show it."""
    where = str(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                where = f"{path}, row {number}"
                break
    return UserError(f"{where}: this is not {encoding}; re-encode the file, or set encoding.")


def read_columns(path: Path, columns: list[Column], separator: str, encoding: str) -> AtomicFrame:
    """Reads some columns of an atomic file; tokens are Python strings and NaN where empty.

    Raises:
        UserError: a row has too many fields, an open quote, or text where a number belongs, or
            there is no row.
    """
    numbers = [c.header for c in columns if c.ftype == FeatureType.FLOAT]
    missing: dict[str, Sequence[str]] = {
        c.header: _MISSING_NUMBERS if c.header in numbers else [""] for c in columns
    }
    try:
        frame = pd.read_csv(
            path,
            sep=separator,
            dtype=object,
            encoding=_without_mark(encoding),
            keep_default_na=False,
            na_values=missing,
            engine="c" if len(separator) == 1 else "python",
        )
    except UnicodeDecodeError:
        raise _not_text(path, encoding) from None
    except pd.errors.ParserError as error:
        raise UserError(f"{path} is not a clean atomic file: {error}.") from error
    if frame.empty:
        raise UserError(f"{path} has a header and no rows: write some, or leave the file out.")
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what is too much for row names
        raise UserError(f"{path}, row 2: there are more fields than columns in the header.")
    for header in numbers:
        frame[header] = _to_float(frame[header], path)
    frame = frame[[c.header for c in columns]]
    frame.columns = pd.Index([c.name for c in columns])
    return AtomicFrame(frame)


def _to_float(column: pd.Series[Any], path: Path) -> pd.Series[Any]:
    try:
        return column.astype(np.float64)
    except ValueError:
        bad = pd.to_numeric(column, errors="coerce").isna() & column.notna()
        row = int(np.flatnonzero(bad.to_numpy())[0])
        raise UserError(
            f"{path}, row {row + 2}, column '{column.name}': '{column.iloc[row]}' is not a number."
        ) from None


def split_sequences(
    column: pd.Series[Any], ftype: FeatureType, separator: str, where: str
) -> list[Any]:
    """Cuts each value of a ``_seq`` column into an array of words or numbers; empty where missing.

    Raises:
        UserError: a word of a float_seq column is not a number; `where` names file and column.
    """
    words = [[w for w in v.split(separator) if w] if isinstance(v, str) else [] for v in column]
    if ftype == FeatureType.TOKEN_SEQ:
        return [np.array(row, dtype=np.str_) for row in words]
    rows: list[Any] = []
    for number, row in enumerate(words):
        try:
            rows.append(np.array(row, dtype=np.float64))
        except ValueError as error:
            raise UserError(f"{where}, row {number + 2}: {error}.") from None
    return rows


class FrameMends(Dataset):
    """What RecBole's `Dataset` does on frames, with the same numbers on pandas 2 and 3."""

    def _download(self) -> None:
        raise UserError(
            f"There is no dataset folder {self.dataset_path}: RecBole's download is gone, make the "
            "atomic files with `python -m dataset_tools table` or set --data_path."
        )

    def _load_data(self, token: str, dataset_path: str) -> None:
        for suffix in self._needed_files() if Path(dataset_path).is_dir() else ():
            if suffix in SIDE_FILES:
                raise UserError(
                    f"additional_feat_suffix names '{suffix}', which RecBole cannot read: "
                    "leave it out, side files are found by themselves."
                )
            path = Path(dataset_path) / f"{token}.{suffix}"
            if not path.is_file():
                raise UserError(
                    f"{self.config['model']} needs the file {path}, which is not there."
                )
        super()._load_data(token, dataset_path)

    def _needed_files(self) -> list[str]:
        """Suffixes of the files without which there is no dataset for this model."""
        inter = [f"{part}.inter" for part in self.benchmark_filename_list or ()] or ["inter"]
        return inter + list(self.config["additional_feat_suffix"] or ())

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> AtomicFrame | None:
        """Reads an atomic file and notes the type, source and length of its columns."""
        wanted, unwanted = self._get_load_and_unload_col(source)
        if wanted == set():
            return None
        path, separator = Path(filepath), self.config["field_separator"]
        encoding = self.config["encoding"] or "utf-8"
        header = read_header(path, separator, encoding)
        columns = [
            column
            for column in header
            if (wanted is None or column.name in wanted)
            and (unwanted is None or column.name not in unwanted)
        ]
        if source == FeatureSource.INTERACTION:
            self._check_columns(path, header, columns)
        if not columns:
            self.logger.warning(f"No columns has been loaded from [{source}]")
            return None
        self._note_properties(columns, source)
        frame = read_columns(path, columns, separator, encoding)
        for column in columns:
            if column.ftype.value.endswith("seq"):
                self._split_column(frame, column, path)
        return frame

    def _check_columns(self, path: Path, header: list[Column], loaded: list[Column]) -> None:
        """Users, items and, where rows are ordered by them, times: RecBole fails late, or never.

        Times as tokens would be ordered by where they first appear in the file.
        """
        needed = [("USER_ID_FIELD", self.uid_field, FeatureType.TOKEN)]
        needed += [("ITEM_ID_FIELD", self.iid_field, FeatureType.TOKEN)]
        needed = [need for need in needed if need[1] is not None]  # RecBole can do without both
        if self.config["eval_args"]["order"] == "TO" and self.benchmark_filename_list is None:
            needed.append(("TIME_FIELD", self.time_field, FeatureType.FLOAT))
        types = {column.name: column.ftype for column in header}
        for key, name, ftype in needed:
            if name not in types:
                raise UserError(
                    f"{path}: there is no column '{name}' among {', '.join(types)}: rename one, "
                    f"or name yours with {key}."
                )
            if types[name] != ftype:
                raise UserError(
                    f"{path}, row 1: write {name}:{ftype.value}, not {name}:{types[name].value}."
                )
            if name not in {column.name for column in loaded}:
                raise UserError(f"load_col leaves out the column '{name}' of {path}: add it.")

    def _note_properties(self, columns: list[Column], source: FeatureSource | str) -> None:
        if source == "link":
            return
        for column in columns:
            self.field2source[column.name] = source
            self.field2type[column.name] = column.ftype
            if not column.ftype.value.endswith("seq"):
                self.field2seqlen[column.name] = 1
            if "float" in column.ftype.value:
                self.field2bucketnum[column.name] = 2

    def _split_column(self, frame: AtomicFrame, column: Column, path: Path) -> None:
        where = f"{path}, column '{column.header}'"
        rows = split_sequences(
            frame[column.name], column.ftype, self.config["seq_separator"], where
        )
        longest = max(map(len, rows), default=0)
        limit = (self.config["seq_len"] or {}).get(column.name)
        if limit:
            rows = [row[:limit] for row in rows]
        frame[column.name] = pd.Series(rows, index=frame.index, dtype=object)
        self.field2seqlen[column.name] = min(limit, longest) if limit else longest

    def _user_item_feat_preparation(self) -> None:
        super()._user_item_feat_preparation()
        for name in ("user_feat", "item_feat"):
            frame = getattr(self, name)
            if frame is not None:  # a merge gives a plain frame
                setattr(self, name, AtomicFrame(frame))

    def _filter_nan_user_or_item(self) -> None:
        """Drops rows without user or item.

        RecBole takes row names for places: after a row without user, another than the one without
        item is dropped.
        """
        for field, own in ((self.uid_field, "user_feat"), (self.iid_field, "item_feat")):
            for name in (own, "inter_feat") if field is not None else ():
                frame = getattr(self, name)
                if frame is None or not (missing := frame[field].isna()).any():
                    continue
                self.logger.warning(
                    f"{self.dataset_name}.{name.removesuffix('_feat')}: rows without {field} "
                    f"left out: {missing.sum()} of {len(frame)}"
                )
                setattr(self, name, frame[~missing].copy())

    def _fill_nan(self) -> None:
        """Missing tokens become [PAD] (0), numbers the column's mean, sequences empty."""
        times = self.inter_feat.get(self.time_field)
        if times is not None and times.isna().any():
            self.logger.warning(
                f"{self.dataset_name}.inter: missing {self.time_field} set to the mean of the "
                f"others: {times.isna().sum()} of {len(times)}"
            )
        for feat_name in self.feat_name_list:
            frame = getattr(self, feat_name)
            for field in frame:
                ftype, column = self.field2type[field], frame[field]
                if ftype == FeatureType.TOKEN:
                    frame[field] = column.fillna(0).astype(np.int64)
                elif ftype == FeatureType.FLOAT:
                    frame[field] = column.fillna(column.mean())
                else:
                    dtype = np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64
                    filled = [np.array([], dtype) if isinstance(v, float) else v for v in column]
                    frame[field] = pd.Series(filled, index=frame.index, dtype=object)
