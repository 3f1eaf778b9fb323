"""Images with class labels: folders of class folders, ``.npz`` arrays, and scikit-learn's digits by default.

Shape legend: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from penstock.data.base import Data, Source
from penstock.data.loader import Batches
from penstock.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
#: Folders of images are decoded into memory up to this many bytes, and beyond it each time they are needed.
IN_MEMORY = 512 * 2**20
#: How many training images the normalisation is measured on.
MEASURED = 4096

#: What Pillow raises on a file that is cut off, damaged or no image at all.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)

Split = Literal["train", "validation", "test"]
_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_ARRAYS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("x_train", "y_train"),
        ("train_images", "train_labels"),
        ("images", "labels"),
        ("x", "y"),
        ("data", "target"),
        ("data", "labels"),
    ),
    "validation": (("x_val", "y_val"), ("x_valid", "y_valid"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
_SPELLINGS = "images and labels, x and y, or x_train and y_train (and x_test and y_test)"

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class ImageConfig:
    """How images are prepared and split."""

    image_size: int = 0
    """Side in pixels that images are cropped and resized to; 0: as they are, the most common size where they differ."""
    augment: Literal["none", "shift", "shift-flip"] = "none"
    """Of training images: none; shifted by up to an eighth of the side; shifted, and mirrored half of the time."""
    train_size: int | None = None
    """Training images kept, class by class in proportion; 0: all. None: all of your own, and of the embedded digits as
    many as the system's claim is about."""
    validation_ratio: float = 0.1
    """Share of the training images held out for validation, where the data has no validation set of its own."""
    test_ratio: float | None = None
    """Share held out for testing, where there is no test set. None: a fifth; of the digits what `train_size` leaves."""
    seed: int = 0
    """Of the splits; the seed of a training run does not change them."""


class ImageBatch(NamedTuple):
    """Normalised float32 ``images`` (B, C, H, W) and int64 ``labels`` (B,)."""

    images: Tensor
    labels: Tensor


class Pixels(Protocol):
    """Images by number, all of one size."""

    def __call__(self, rows: Tensor) -> Tensor:
        """From numbers (B,) to float32 (B, C, H, W): 8-bit images in 0 to 1, others in their own unit."""

    def __len__(self) -> int: ...


class ImageData(Data):
    """Labelled images in three splits; batches are `ImageBatch`.

    Args:
        pixels: the images of each split's origin.
        labels: the class numbers of each split's origin, (N,) int64.
        rows: which of them form the split.
        classes: names in the order of their numbers.
        augment: as in `ImageConfig`.
        about: what `describe` adds to the sizes.
    """

    def __init__(
        self,
        pixels: Mapping[Split, Pixels],
        labels: Mapping[Split, Tensor],
        rows: Mapping[Split, Tensor],
        classes: Sequence[str],
        augment: Literal["none", "shift", "shift-flip"],
        about: Mapping[str, Any],
    ) -> None:
        self._pixels, self._labels, self._rows = pixels, labels, rows
        self._augment, self._about = augment, about
        channels, height, width = pixels["train"](rows["train"][:1]).shape[1:]
        mean, std = _moments(pixels["train"], rows["train"][:MEASURED])
        self.spec: dict[str, Any] = {
            "classes": list(classes),
            "image_size": [height, width],
            "channels": channels,
            "mean": mean,
            "std": std,
        }

    def train(self, batch_size: int, seed: int) -> Batches:
        fetch = self._fetch("train")

        def augmented(numbers: Tensor) -> ImageBatch:
            batch = fetch(numbers)
            # A function of the place in the epoch, so that a resumed run sees the same images.
            place = (seed * 1_000_003 + batches.epoch) * 1_000_003 + batches.position
            images = _augment(batch.images, self._augment, torch.Generator().manual_seed(place % 2**63))
            return batch._replace(images=images)

        size = len(self._rows["train"])
        batches = Batches(augmented, size, batch_size, shuffle=True, seed=seed, drop_last=True)
        return batches

    def validation(self, batch_size: int) -> Batches:
        return Batches(self._fetch("validation"), len(self._rows["validation"]), batch_size)

    def test(self, batch_size: int) -> Batches:
        return Batches(self._fetch("test"), len(self._rows["test"]), batch_size)

    def describe(self) -> dict[str, Any]:
        height, width = self.spec["image_size"]
        sizes: dict[str, int] = {split: len(rows) for split, rows in self._rows.items()}
        shape = {
            "classes": len(self.spec["classes"]),
            "height": height,
            "width": width,
            "channels": self.spec["channels"],
        }
        return {**self._about, **sizes, **shape}

    def _fetch(self, split: Split) -> Callable[[Tensor], ImageBatch]:
        pixels, labels, rows = self._pixels[split], self._labels[split], self._rows[split]

        def fetch(numbers: Tensor) -> ImageBatch:
            chosen = rows[numbers]
            return ImageBatch(normalise(pixels(chosen), self.spec), labels[chosen])

        return fetch


def read_images(config: ImageConfig, source: Source, *, few: int = 0) -> ImageData:
    """The user's labelled images, or scikit-learn's digits (1797 of 8x8, ten classes).

    Args:
        config: how images are prepared and split; splits are stratified by class.
        source: ``data`` is a folder of class folders (or of ``train``, ``val`` and ``test`` folders of them), or an
            ``.npz`` with images (N, H, W), (N, H, W, C) or (N, C, H, W) and labels (N,); ``test`` is more of the same;
            ``label`` names the labels' array. Without a test set of its own, a data set's ``val`` is the test set.
        few: how many of the digits to train on, testing on the rest, where ``config`` leaves it open; 0: all.

    Raises:
        UserError: naming what is wrong with which file.
    """
    _check(config)
    if source.data is None:
        if source.test is not None or source.label is not None:
            raise UserError("--test and --label go with --data: the embedded digits have their own")
        parts: dict[Split, _Part] = {"train": _digits()}
        name = "scikit-learn digits"
        config = replace(config, train_size=few if config.train_size is None else config.train_size)
    else:
        parts, name = _user_parts(source), str(source.data)
    size, channels, note = _common_shape(parts, config.image_size)
    classes = parts["train"].classes
    if len(classes) < 2:
        raise UserError(f"{name}: only one class ({classes[0]!r}); at least two are needed")
    labels = {split: _numbered(part, classes) for split, part in parts.items()}
    rows = _split(name, labels, classes, config, rest_is_test=source.data is None)
    pixels = {split: part.images.prepare(size, channels) for split, part in parts.items()}
    about = (
        {"source": name} | ({"test source": str(source.test)} if source.test else {}) | ({"note": note} if note else {})
    )
    return ImageData(
        {split: pixels.get(split, pixels["train"]) for split in rows},
        {split: labels.get(split, labels["train"]) for split in rows},
        rows,
        classes,
        config.augment,
        about,
    )


def read_unlabelled(path: Path, spec: Mapping[str, Any]) -> tuple[list[str], Pixels]:
    """Images to predict, in the size and channels of a model's ``spec``, with a name for each.

    Args:
        path: an image, a folder of images (nested or flat), or an ``.npz`` with an array of images.
        spec: of the data the model was trained on.

    Raises:
        UserError: naming what is wrong with which file.
    """
    size, channels = (spec["image_size"][0], spec["image_size"][1]), spec["channels"]
    if path.suffix.lower() == ".npz":
        arrays = _load(path)
        keys = [x for split in ("test", "train", "validation") for x, _ in _ARRAYS[split] if x in arrays]
        if not keys:
            raise UserError(f"{path}: holds {_list(arrays)}; the images must be named images or x")
        images: _Images = _ArrayImages(path, keys[0], arrays[keys[0]])
        names = [f"{path.name}[{row}]" for row in range(len(images))]
    elif path.is_dir():
        files = _image_files(path)
        if not files:
            raise UserError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        images, names = _FileImages(files), [str(file.relative_to(path)) for file in files]
    elif path.is_file():
        images, names = _FileImages([path]), [path.name]
    else:
        raise UserError(f"{path}: there is no such file or folder")
    return names, images.prepare(size, channels)


def normalise(images_BCHW: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """Images with the mean taken off and divided by the deviation, channel by channel."""
    mean, std = (images_BCHW.new_tensor(spec[key])[:, None, None] for key in ("mean", "std"))
    return (images_BCHW - mean) / std


# -- pixels -----------------------------------------------------------------------------------------------------


class _MemoryPixels:
    """Images held in memory, as they came (uint8 or float32)."""

    def __init__(self, values_NCHW: Tensor) -> None:
        self.values = values_NCHW

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, rows: Tensor) -> Tensor:
        return _in_unit(self.values[rows])


class _FilePixels:
    """Images decoded each time they are needed."""

    def __init__(self, files: Sequence[Path], size: tuple[int, int], channels: int) -> None:
        self.files, self.size, self.channels = files, size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __call__(self, rows: Tensor) -> Tensor:
        files = [self.files[row] for row in rows.tolist()]
        return _in_unit(torch.stack(_parallel(lambda file: _decode(file, self.size, self.channels), files)))


class _Images(Protocol):
    """Images as found, before they have one size."""

    def __len__(self) -> int: ...

    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images there are of each (height, width)."""

    def channels(self) -> int:
        """The channels they need."""

    def prepare(self, size: tuple[int, int], channels: int) -> Pixels:
        """All of them verified, cropped to the shape of ``size``, and resized."""


class _FileImages:
    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._headers = _parallel(_header, files)

    def __len__(self) -> int:
        return len(self.files)

    def sizes(self) -> Counter[tuple[int, int]]:
        return Counter(size for size, _ in self._headers)

    def channels(self) -> int:
        return 1 if all(gray for _, gray in self._headers) else 3

    def prepare(self, size: tuple[int, int], channels: int) -> Pixels:
        if len(self.files) * channels * math.prod(size) <= IN_MEMORY:
            return _MemoryPixels(torch.stack(_parallel(lambda file: _decode(file, size, channels), self.files)))
        _parallel(lambda file: bool(len(_decode(file, size, channels))), self.files)
        return _FilePixels(self.files, size, channels)


class _ArrayImages:
    def __init__(self, path: Path | str, key: str, values: NDArray[Any]) -> None:
        self.where = f"{path}: array {key!r}"
        if values.dtype.kind not in "buif":
            raise UserError(f"{self.where} has type {values.dtype}; images are numbers")
        if values.ndim == 3:
            values = values[:, None]
        elif values.ndim == 4 and values.shape[3] in (1, 3, 4):
            values = values.transpose(0, 3, 1, 2)
        elif values.ndim != 4 or values.shape[1] not in (1, 3, 4):
            raise UserError(
                f"{self.where} has shape {values.shape}; images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 "
                "or 4 channels"
            )
        if values.size == 0:
            raise UserError(f"{self.where} has shape {values.shape}: it holds no images")
        if values.dtype.kind in "ui" and values.min() >= 0 and values.max() <= 255:
            values = values.astype(np.uint8, copy=False)
        else:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32, copy=False)
            if not (finite := np.isfinite(values).all((1, 2, 3))).all():
                raise UserError(f"{self.where}: image {int(finite.argmin())} holds values that are not finite numbers")
        self.values_NCHW = torch.from_numpy(np.ascontiguousarray(values))

    def __len__(self) -> int:
        return len(self.values_NCHW)

    def sizes(self) -> Counter[tuple[int, int]]:
        return Counter({(self.values_NCHW.shape[2], self.values_NCHW.shape[3]): len(self)})

    def channels(self) -> int:
        return self.values_NCHW.shape[1]

    def prepare(self, size: tuple[int, int], channels: int) -> Pixels:
        values = self.values_NCHW
        if values.shape[1] != channels:
            if values.shape[1] != 1:
                raise UserError(f"{self.where} has {values.shape[1]} channels, the data {channels}")
            values = values.expand(-1, channels, -1, -1)
        if tuple(values.shape[2:]) != size:
            values = _resize(values, size)
        return _MemoryPixels(values)


def _header(file: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) as it will be shown, and whether it is gray, without decoding."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return ((width, height) if turned else (height, width)), image.mode in ("1", "L", "LA") or _is_deep(image)
    except _UNREADABLE as error:
        raise UserError(f"{file}: not a readable image ({_reason(error)})") from None


def _decode(file: Path, size: tuple[int, int], channels: int) -> Tensor:
    """One image as uint8 (C, H, W), turned upright, cropped about its centre to the shape of ``size``, and resized."""
    height, width = size
    try:
        with Image.open(file) as opened:
            opened.draft(None, (max(size), max(size)))  # a JPEG much too large is decoded at half its size, or less
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise UserError(f"{file}: 32-bit float pixels have no known scale; save them as an .npz array")
            if _is_deep(image):
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            values = np.array(image)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{file}: not a readable image ({_reason(error)})") from None
    return torch.from_numpy(values).reshape(height, width, -1).permute(2, 0, 1)


def _is_deep(image: Image.Image) -> bool:
    """Whether it has 16 bits a pixel, which Pillow would cut off instead of scaling."""
    return image.mode.startswith("I")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format is recognised"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resize(values_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Cropped about the centre to the shape of ``size``, then resized bilinearly, 256 images at a time."""
    (rows, columns), (height, width) = values_NCHW.shape[2:], size
    scale = min(rows / height, columns / width)
    kept = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    cropped = values_NCHW[:, :, top : top + kept[0], left : left + kept[1]]
    resized = [F.interpolate(c.float(), size=size, mode="bilinear", antialias=True) for c in cropped.split(256)]
    if values_NCHW.dtype == torch.uint8:
        return torch.cat([r.round().clamp(0, 255).to(torch.uint8) for r in resized])
    return torch.cat(resized)


def _in_unit(values: Tensor) -> Tensor:
    return values.float() / 255 if values.dtype == torch.uint8 else values


def _moments(pixels: Pixels, rows: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel; a constant channel has deviation one."""
    sums = torch.zeros(2, 0, dtype=torch.float64)
    count = 0
    for some in rows.split(256):
        images = pixels(some).double()
        found = torch.stack([images.sum((0, 2, 3)), images.square().sum((0, 2, 3))])
        sums = found if not count else sums + found
        count += images.numel() // images.shape[1]
    mean, square = sums / count
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.tolist(), torch.where(std < 1e-6, 1.0, std).tolist()


def _augment(images_BCHW: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side, the border repeated, and perhaps mirrored."""
    if how == "none":
        return images_BCHW
    batch, _, height, width = images_BCHW.shape
    reach = max(min(height, width) // 8, 1)
    padded = F.pad(images_BCHW, (reach,) * 4, mode="replicate")
    moves = torch.randint(0, 2 * reach + 1, (batch, 2), generator=generator)
    rows = moves[:, :1] + torch.arange(height)
    columns = moves[:, 1:] + torch.arange(width)
    if how == "shift-flip":
        mirrored = torch.rand(batch, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    one = torch.arange(batch)[:, None, None]
    return padded[one, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``work`` on every item, in order; Pillow decodes outside the interpreter's lock."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error in one file the rest need not be decoded


# -- what the user gave -----------------------------------------------------------------------------------------


@dataclass
class _Part:
    """The images of one origin with the name of each one's class; ``classes`` in their order."""

    where: str
    images: _Images
    labels: Sequence[str]
    classes: list[str]


def _digits() -> _Part:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _ArrayImages("scikit-learn digits", "images", (digits.images / 16).astype(np.float32))
    labels = [str(label) for label in digits.target]
    return _Part("scikit-learn digits", images, labels, sorted(set(labels)))


def _user_parts(source: Source) -> dict[Split, _Part]:
    assert source.data is not None
    parts = _read(source.data, source.label)
    if "train" not in parts:
        raise UserError(f"{source.data}: holds no training images")
    if source.test is not None:
        given = _read(source.test, source.label)
        parts["test"] = given.get("test") or given.get("validation") or given["train"]
    elif "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return parts


def _read(path: Path, label: str | None) -> dict[Split, _Part]:
    if path.is_dir():
        if label is not None:
            raise UserError(f"--label {label}: in {path} the labels are the names of the class folders")
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path}: images come as a folder of class folders or as an .npz file")
    return _read_arrays(path, label)


def _read_folder(folder: Path) -> dict[Split, _Part]:
    folders = [child for child in _children(folder) if _image_files(child)]
    splits = {split: child for child in folders for split, names in _FOLDERS.items() if child.name.lower() in names}
    # A class may be called "train" too: only folders of folders, and nothing but them, are splits.
    if splits and len(splits) == len(folders) and all(_children(child) for child in folders):
        return {split: _class_folders(child) for split, child in splits.items()}
    return {"train": _class_folders(folder)}


def _class_folders(folder: Path) -> _Part:
    files: list[Path] = []
    labels: list[str] = []
    classes = []
    for child in _children(folder):
        images = _image_files(child)
        if not images:
            raise UserError(f"{child}: this class folder holds no images ({', '.join(SUFFIXES)})")
        classes.append(child.name)
        files += images
        labels += [child.name] * len(images)
    if not classes:
        loose = len(_image_files(folder))
        what = f"{loose} images but no class folders" if loose else "no images"
        raise UserError(f"{folder}: holds {what}; put the images of each class in a folder with its name")
    return _Part(str(folder), _FileImages(files), labels, classes)


def _children(folder: Path) -> list[Path]:
    """The folders in a folder, without those that file managers and notebooks leave."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))


def _image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, in order."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _read_arrays(path: Path, label: str | None) -> dict[Split, _Part]:
    arrays = _load(path)
    parts: dict[Split, _Part] = {}
    for split, spellings in _ARRAYS.items():
        for images, labels in spellings:
            labels = label.lower() if label is not None and split == "train" else labels
            if images in arrays and labels in arrays:
                parts[split] = _array_part(path, images, arrays[images], labels, arrays[labels])
                break
    if not parts:
        wanted = _SPELLINGS if label is None else f"{label} and the images as images or x"
        raise UserError(f"{path}: holds {_list(arrays)}; it must hold {wanted}")
    return parts


def _array_part(path: Path, key: str, images: NDArray[Any], label_key: str, labels: NDArray[Any]) -> _Part:
    found = _ArrayImages(path, key, images)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f"{path}: array {label_key!r} has shape {labels.shape}; labels are one class an image, (N,)")
    if len(labels) != len(found):
        raise UserError(f"{path}: {len(found)} images in {key!r} but {len(labels)} labels in {label_key!r}")
    if labels.dtype.kind == "f":
        odd = np.flatnonzero(labels != np.round(labels))  # not-a-number is odd too
        if odd.size:
            raise UserError(
                f"{path}: label {int(odd[0])} in {label_key!r} is {labels[odd[0]]}; labels are whole numbers or names"
            )
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "buiU":
        raise UserError(f"{path}: array {label_key!r} has type {labels.dtype}; labels are whole numbers or names")
    return _Part(str(path), found, [str(label) for label in labels], [str(label) for label in np.unique(labels)])


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` by lower-case name; pickled objects are refused."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise UserError(f"{path}: holds a single array without labels, not the arrays of an .npz")
        with arrays:
            return {key.lower(): _array(path, arrays, key) for key in arrays.files}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz file ({_reason(error)})") from None


def _array(path: Path, arrays: Any, key: str) -> NDArray[Any]:
    try:
        return arrays[key]
    except ValueError as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path}: array {key!r} holds Python objects, which are refused; save plain arrays"
            ) from None
        raise


def _list(arrays: Mapping[str, Any]) -> str:
    return ", ".join(arrays) or "no arrays"


# -- shapes, classes, splits ------------------------------------------------------------------------------------


def _check(config: ImageConfig) -> None:
    test = 0.2 if config.test_ratio is None else config.test_ratio
    if config.validation_ratio <= 0 or test <= 0 or config.validation_ratio + test >= 1:
        raise UserError(
            f"validation_ratio={config.validation_ratio:g} and test_ratio={test:g} must be above 0 and leave something "
            "to train on"
        )
    if config.image_size < 0 or (config.train_size or 0) < 0:
        raise UserError(f"image_size={config.image_size} and train_size={config.train_size} must not be negative")


def _common_shape(parts: Mapping[Split, _Part], image_size: int) -> tuple[tuple[int, int], int, str]:
    """The (height, width) and channels all images get, and what there is to say about it."""
    sizes = parts["train"].images.sizes()
    size = (image_size, image_size) if image_size else max(sizes, key=lambda s: (sizes[s], s))
    everywhere = sum((part.images.sizes() for part in parts.values()), Counter[tuple[int, int]]())
    others = sum(count for found, count in everywhere.items() if found != size)
    why = "" if image_size else ", the most common size"
    note = f"{others} images of another size were cropped and resized to {size[0]}x{size[1]}{why}" if others else ""
    return size, parts["train"].images.channels(), note


def _numbered(part: _Part, classes: Sequence[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in part.classes if name not in numbers]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        named = ", ".join(map(repr, unknown[:3]))
        raise UserError(f"{part.where}: classes that the training images do not have: {named}{more}")
    return torch.tensor([numbers[name] for name in part.labels])


def _split(
    name: str, labels: Mapping[Split, Tensor], classes: Sequence[str], config: ImageConfig, *, rest_is_test: bool
) -> dict[Split, Tensor]:
    """Which rows of each part form each split; a split without a part of its own comes out of the training images."""
    order = _stratified(labels["train"], config.seed)
    count = len(order)
    held = {"validation": max(round(count * config.validation_ratio), 1)}
    held["test"] = max(round(count * (0.2 if config.test_ratio is None else config.test_ratio)), 1)
    if rest_is_test and config.test_ratio is None and config.train_size:
        held["test"] = max(count - held["validation"] - config.train_size, 1)
    left = count - sum(number for split, number in held.items() if split not in labels)
    size = config.train_size or left
    if size > left or size < 1:
        raise UserError(
            f"{name}: of its {count} images {max(left, 0)} are left to train on, "
            + (f"and train_size={size} are wanted" if size > left else "which is too few")
        )
    rows: dict[Split, Tensor] = {"train": order[:size]}
    for split in ("validation", "test"):
        if split in labels:
            rows[split] = torch.arange(len(labels[split]))
        else:
            rows[split], order = order[len(order) - held[split] :], order[: len(order) - held[split]]
    absent = sorted(set(range(len(classes))) - set(labels["train"][rows["train"]].tolist()))
    if absent:
        images = int((labels["train"] == absent[0]).sum())
        raise UserError(
            f"{name}: no training image of class {classes[absent[0]]!r} among {size} (it has {images} images in all); "
            "more images of it, a larger train_size or smaller validation_ratio and test_ratio would give it some"
        )
    return rows


def _stratified(labels: Tensor, seed: int) -> Tensor:
    """A random order of which every stretch has the classes in proportion, as nearly as whole images allow.

    Each image stands at its place within its own class, as a share of the class.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place[shuffled].argsort(stable=True)]
