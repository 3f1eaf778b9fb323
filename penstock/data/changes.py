"""What differs between the table a model was trained on and one that it is given later."""

from __future__ import annotations

import polars as pl

from penstock.data.rawtables import Chunk
from penstock.data.schema import Field, Schema
from penstock.errors import UserError


def check_kinds(schema: Schema, chunk: Chunk) -> None:
    """Look whether columns are still of the kind they were in training.

    Args:
        schema: of the training table.
        chunk: the first rows of the other, which has all of its columns.

    Raises:
        UserError: naming all columns that are not, and how they differ.
    """
    if differ := [
        f"column {one.name!r}: {how}" for one in schema.fields if (how := _change(one, chunk.frame[one.name]))
    ]:
        raise UserError(f"{chunk.path}, {'; '.join(differ)}")


def _change(one: Field, column: pl.Series) -> str:
    """How a column differs, or nothing."""
    present = column.drop_nulls()
    if one.encoded or not len(present):
        return ""
    lists = isinstance(column.dtype, pl.List)
    if one.kind == "sequence":
        text = pl.Series(dtype=pl.String) if lists else present.cast(pl.String)
        odd = text.filter(text.str.contains(r"[\^|]"))
        if text.str.contains(one.separator, literal=True).any() or not len(odd):
            return ""
        return f"holds {odd[0]!r}, where the training table divides by {one.separator!r}"
    if lists:
        had = "numbers" if one.kind == "numeric" else "one value a row"
        return f"holds lists, where the training table has {had}"
    is_number = present.cast(pl.Float64, strict=False).is_not_null()
    if one.kind == "numeric" and is_number.sum() < len(present) / 2:
        return f"holds text, as {present.filter(~is_number)[0]!r}, where the training table has numbers"
    if one.kind == "categorical" and is_number.all() and one.words and not any(map(_is_number, one.words)):
        return f"holds numbers, as {present[0]}, where the training table has words, as {one.words[0]!r}"
    return ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
