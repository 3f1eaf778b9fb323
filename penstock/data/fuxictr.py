"""Tables that FuxiCTR has encoded: a directory with feature_map.json, feature_vocab.json and Parquet splits.

Ids are taken over as they are: within a field 0 is padding, and most often the last is any unseen word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.data.rawtables import RawTable, did_you_mean
from penstock.data.schema import Field, Label, Schema
from penstock.errors import UserError

_MAP, _VOCABULARY = "feature_map.json", "feature_vocab.json"
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_SPECIAL = {"__PAD__": "(missing)", "__OOV__": "(unseen)"}
_OLD = "FuxiCTR before version 2.3 wrote it; run its preprocessing again with a newer one, which writes Parquet"


def encoded_folder(path: Path) -> Path | None:
    """The directory that FuxiCTR wrote, if ``path`` is one or is its map."""
    folder = path.parent if path.name == _MAP else path
    return folder if (folder / _MAP).is_file() else None


def read_splits(folder: Path, test: Path | None) -> dict[str, RawTable]:
    """The tables of the three splits, of which ``test`` may be another file of ids.

    Raises:
        UserError: if one is not there, or not in Parquet.
    """
    found = {}
    for split, name in _SPLITS.items():
        places = [folder / f"{name}.parquet", folder / name] if split != "test" or test is None else [test]
        there = next((place for place in places if place.exists()), None)
        if there is None:
            if old := [p.name for p in sorted(folder.iterdir()) if p.suffix in (".h5", ".npz")]:
                raise UserError(f"{folder}: holds {old[0]} and no {name}.parquet; {_OLD}")
            raise UserError(f"{folder}: there is neither {name}.parquet nor {name}/, the rows for {split}")
        found[split] = RawTable(there)
    return found


def read_map(folder: Path, asked: str | None, group: str, *, several: bool) -> tuple[Schema, list[str]]:
    """What the map says of the columns, and notes for people.

    Args:
        folder: the directory.
        asked: the label, of those in the map; several separated by commas where ``several`` is true.
        group: a column of groups, or "".
        several: whether there may be more than one label.

    Raises:
        UserError: for a map that cannot be read, or a label that is none.
    """
    path = folder / _MAP
    content = _json(path)
    listed = content.get("features")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{path}: has no list of features; {_OLD}")
    features: dict[str, Mapping[str, Any]] = {name: spec for one in listed for name, spec in one.items()}
    vocabulary = _json(folder / _VOCABULARY) if (folder / _VOCABULARY).exists() else {}
    notes = [f"ids are those of FuxiCTR's {content.get('dataset_id', folder.name)}"]
    fields = []
    for name, spec in features.items():
        kind = spec.get("type")
        if kind == "numeric":
            fields.append(Field(name, "numeric", numeric="standardize"))
        elif kind == "categorical" or kind == "sequence":
            owner = spec.get("share_embedding", "")
            if owner and owner not in features:
                raise UserError(f"{path}, {name}: shares the embedding of {owner!r}, which is no feature")
            if "pretrained_emb" in spec:
                notes.append(f"{name}: its pre-trained vectors are left out")
            if not isinstance(size := features[owner or name].get("vocab_size"), int):
                raise UserError(f"{path}, {owner or name}: has no vocab_size; {_OLD}")
            words = _words(size, vocabulary.get(owner or name, {}))
            fields.append(
                Field(name, kind, words=words, max_length=int(spec.get("max_len", 0)), encoded=size, share=owner)
            )
        elif name != group:
            notes.append(f"{name}, of type {kind}, is left out")
    if not fields:
        raise UserError(f"{path}: has no feature that is numeric, categorical or a sequence")
    names = _labels(path, content.get("labels", []), asked, several=several)
    return Schema.lay_out(fields, [Label(name, ("0", "1"), number=True) for name in names], group), notes


def _labels(path: Path, known: list[str], asked: str | None, *, several: bool) -> list[str]:
    names = known if asked is None else [asked] if asked in known else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{path}: no label {name!r}; {did_you_mean(name, known)}")
    if not names or (len(names) > 1 and not several):
        raise UserError(f"{path}: which is the label? give --label, one of {', '.join(known) or '(none in the map)'}")
    return names


def _words(size: int, ids: Mapping[str, int]) -> tuple[str, ...]:
    """What each id stands for, or nothing where no word is known."""
    if not ids:
        return ()
    names = [f"(id {place})" for place in range(size)]
    for word, place in ids.items():
        if 0 <= place < size:
            names[place] = _SPECIAL.get(word, word)
    return tuple(names)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold an object")
    return content
