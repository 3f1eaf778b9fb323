"""Labelled images: the folders and arrays people have, what is refused, the splits, and the task on top."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from penstock.data import Source, images
from penstock.data.images import ImageConfig, ImageData, normalise, read_images, read_unlabelled
from penstock.errors import UserError
from penstock.tasks.base import Training
from penstock.tasks.image_classification import ImageClassification, accuracy, predict


def picture(path: Path, colour: int | tuple[int, ...] = 128, size: tuple[int, int] = (8, 6), mode: str = "L") -> None:
    """Write an image of one colour, ``size`` being (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, colour in (("cat", 50), ("dog", 200)):
        for i in range(20):
            picture(tmp_path / "pets" / label / f"{i}.png", colour + i)
    return tmp_path / "pets"


def read(path: Path | None = None, test: Path | None = None, label: str | None = None, **config: object) -> ImageData:
    return read_images(ImageConfig(**config), Source(path, test, label))  # type: ignore[arg-type]


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def every(data: ImageData, split: str) -> tuple[Tensor, Tensor]:
    batches = data.train(7, 0) if split == "train" else getattr(data, split)(7)
    batches.shuffle = batches.drop_last = False
    found = list(batches)
    return torch.cat([b.images for b in found]), torch.cat([b.labels for b in found])


# -- the embedded digits and the splits --------------------------------------------------------------------------


def test_digits_are_normalised_and_typed() -> None:
    data = read()
    pixels, labels = every(data, "train")
    assert pixels.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert pixels.shape[1:] == (1, 8, 8)
    assert pixels.mean() == pytest.approx(0, abs=1e-4)
    assert pixels.std() == pytest.approx(1, abs=1e-3)
    assert data.spec["classes"] == [str(i) for i in range(10)]
    assert json.loads(json.dumps(data.spec)) == data.spec


def test_splits_are_disjoint_stratified_and_seeded() -> None:
    def rows(data: ImageData) -> dict[str, list[int]]:
        return {split: rows.tolist() for split, rows in data._rows.items()}

    first = rows(read())
    assert sorted(chain.from_iterable(first.values())) == list(range(1797))
    assert {split: len(r) for split, r in first.items()} == {"train": 1258, "validation": 180, "test": 359}
    assert rows(read()) == first != rows(read(seed=1))
    for split in ("train", "validation", "test"):
        counts = Counter(every(read(), split)[1].tolist())
        share = len(first[split]) / 1797
        assert all(abs(counts[label] - share * 180) < 5 for label in range(10))


def test_train_size_takes_from_every_class_and_leaves_the_validation_alone() -> None:
    small, large = read(train_size=20), read(train_size=50)
    assert sorted(Counter(every(small, "train")[1].tolist()).values()) == [2] * 10
    assert set(small._rows["train"].tolist()) < set(large._rows["train"].tolist())
    assert torch.equal(small._rows["validation"], large._rows["validation"])
    assert len(small._rows["test"]) == 1797 - 180 - 20
    assert len(read(train_size=20, test_ratio=0.5)._rows["test"]) == round(1797 * 0.5)


def test_few_is_a_default_that_train_size_overrides() -> None:
    assert len(read_images(ImageConfig(), Source(), few=150).train(1, 0)) == 150
    assert len(read_images(ImageConfig(train_size=30), Source(), few=150).train(1, 0)) == 30
    assert len(read_images(ImageConfig(train_size=0), Source(), few=150).train(1, 0)) == 1258


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"validation_ratio": 0.0}, "validation_ratio=0 and test_ratio=0.2"),
        ({"validation_ratio": 0.5, "test_ratio": 0.5}, "must be above 0 and leave something"),
        ({"train_size": 5000}, "train_size=5000 are wanted"),
        ({"train_size": 5}, "no training image of class"),
        ({"train_size": -1}, "must not be negative"),
    ],
)
def test_impossible_splits_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**config)


def test_test_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="go with --data"):
        read(None, tmp_path)


# -- folders ----------------------------------------------------------------------------------------------------


def test_class_folders(folder: Path) -> None:
    data = read(folder)
    assert data.spec["classes"] == ["cat", "dog"]
    assert data.spec["image_size"] == [6, 8]
    assert data.spec["channels"] == 1
    pixels, labels = every(data, "train")
    assert ((pixels.mean((1, 2, 3)) > 0) == (labels == 1)).all()
    described = data.describe()
    assert (described["train"], described["validation"], described["test"]) == (28, 4, 8)
    assert described["source"] == str(folder)


def test_files_decoded_on_demand_are_the_same_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = every(read(folder), "test")[0]
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    data = read(folder)
    assert isinstance(data._pixels["test"], images._FilePixels)
    assert torch.equal(every(data, "test")[0], kept)


def test_split_folders_are_used_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("Val", 3), ("test", 2)):
        for label in "ab":
            for i in range(count):
                picture(tmp_path / split / label / f"{i}.png")
    described = read(tmp_path).describe()
    assert (described["train"], described["validation"], described["test"]) == (20, 6, 4)


def test_without_a_test_folder_val_is_the_test_set(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3)):
        for label in "ab":
            for i in range(count):
                picture(tmp_path / split / label / f"{i}.png")
    described = read(tmp_path).describe()
    assert (described["train"], described["validation"], described["test"]) == (18, 2, 6)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for label in ("bus", "train"):
        for i in range(10):
            picture(tmp_path / label / "photos" / f"{i}.png")
    assert read(tmp_path).spec["classes"] == ["bus", "train"]


def test_a_test_path_replaces_the_split(folder: Path, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        picture(tmp_path / "more" / label / "x.png", 90)
    data = read(folder, tmp_path / "more")
    assert data.describe()["test"] == 2
    assert data.describe()["train"] == 36
    picture(tmp_path / "more" / "fox" / "x.png")
    with pytest.raises(UserError, match=r"more: classes that the training images do not have: 'fox'"):
        read(folder, tmp_path / "more")


def test_other_sizes_are_resized_to_the_most_common_and_said_so(folder: Path) -> None:
    picture(folder / "cat" / "wide.png", size=(40, 6))
    data = read(folder)
    assert data.spec["image_size"] == [6, 8]
    assert data.describe()["note"] == "1 images of another size were cropped and resized to 6x8, the most common size"
    assert read(folder, image_size=4).spec["image_size"] == [4, 4]


def test_resizing_crops_about_the_centre(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(5):
            stripes = np.zeros((4, 12), np.uint8)
            stripes[:, 4:8] = 255
            (tmp_path / label).mkdir(exist_ok=True)
            Image.fromarray(stripes).save(tmp_path / label / f"{i}.png")
    assert float(read(tmp_path, image_size=4)._pixels["train"](torch.tensor([0])).min()) == 1.0
    arrays = save(tmp_path / "a.npz", x=np.stack([stripes] * 10), y=np.arange(10) % 2)
    assert float(read(arrays, image_size=4)._pixels["train"](torch.tensor([0])).min()) == 1.0


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(5):
            image = Image.new("L", (8, 4))
            image.putpixel((0, 0), 255)
            exif = image.getexif()
            exif[0x0112] = 6  # the camera was turned clockwise: the first row is the right-hand column
            (tmp_path / label).mkdir(exist_ok=True)
            image.save(tmp_path / label / f"{i}.png", exif=exif)
    data = read(tmp_path)
    assert data.spec["image_size"] == [8, 4]
    assert data._pixels["train"](torch.tensor([0]))[0, 0].argmax() == 3


def test_colours_sixteen_bits_and_palettes(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(5):
            picture(tmp_path / label / f"{i}.png", (255, 0, 51), mode="RGB")
    Image.fromarray(np.full((6, 8), 257 * 51, np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("RGB", (8, 6), (255, 0, 51)).convert("P").save(tmp_path / "a" / "palette.gif")
    data = read(tmp_path)
    assert data.spec["channels"] == 3
    pixels = data._pixels["train"](torch.arange(12))
    files = data._pixels["train"]
    assert isinstance(files, images._MemoryPixels)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert pixels[names.index("deep.png"), :, 0, 0].tolist() == pytest.approx([0.2] * 3)
    assert pixels[names.index("palette.gif"), :, 0, 0].tolist() == pytest.approx([1, 0, 0.2], abs=0.01)


def test_strange_names_stay_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)<", "$(rm -rf ~); `x`", "$x^$ [bold]"]
    for name in names:
        for i in range(6):
            picture(tmp_path / name / f"{i} & <b>.png")
    data = read(tmp_path)
    assert sorted(data.spec["classes"]) == sorted(names)
    task = ImageClassification(linear(data), Training(), data)
    task.figures()["Confusion matrix (test)"].canvas.draw()  # "$x^$" is no formula


def test_clutter_is_ignored(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    picture(folder / "__MACOSX" / "cat" / "1.png")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "cat" / "._1.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    assert read(folder).spec["classes"] == ["cat", "dog"]


def broken(folder: Path) -> str:
    (folder / "cat" / "bad.png").write_bytes(b"not an image")
    return "bad.png: not a readable image (no image format is recognised)"


def cut_off(folder: Path) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(folder / "dog" / "cut.jpg")
    whole = (folder / "dog" / "cut.jpg").read_bytes()
    (folder / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return "cut.jpg: not a readable image"


def empty_file(folder: Path) -> str:
    (folder / "dog" / "none.png").touch()
    return "none.png: not a readable image"


def floats(folder: Path) -> str:
    Image.fromarray(np.zeros((6, 8), np.float32)).save(folder / "dog" / "f.tif")
    return "f.tif: 32-bit float pixels have no known scale"


def empty_class(folder: Path) -> str:
    (folder / "fox").mkdir()
    return "fox: this class folder holds no images"


@pytest.mark.parametrize("spoil", [broken, cut_off, empty_file, floats, empty_class])
def test_bad_folders_are_refused_up_front(folder: Path, spoil: object, monkeypatch: pytest.MonkeyPatch) -> None:
    message = spoil(folder)  # type: ignore[operator]
    for limit in (images.IN_MEMORY, 0):
        monkeypatch.setattr(images, "IN_MEMORY", limit)
        with pytest.raises(UserError, match=re.escape(message)) as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_wrong_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "nowhere: there is no such file or folder"),
        (folder / "cat", "cat: holds 20 images but no class folders"),
        (folder / "cat" / "0.png", "0.png: images come as a folder of class folders or as an .npz"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read(path)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match="hollow: holds no images"):
        read(tmp_path / "hollow")
    picture(tmp_path / "one" / "cat" / "1.png")
    with pytest.raises(UserError, match=r"one: only one class \('cat'\)"):
        read(tmp_path / "one")
    with pytest.raises(UserError, match=r"--label y: in .* the labels are the names of the class folders"):
        read(folder, label="y")
    picture(tmp_path / "only" / "test" / "cat" / "1.png")
    with pytest.raises(UserError, match="only: holds no training images"):
        read(tmp_path / "only")


def test_a_class_too_small_to_split_is_named(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "common" / f"{i}.png")
    for seed in range(3):
        picture(tmp_path / "rare" / "1.png")
        assert read(tmp_path, seed=seed).describe()["train"] == 15  # a single image is trained on
        with pytest.raises(UserError, match=r"no training image of class 'rare'.*has 1 images in all"):
            read(tmp_path, seed=seed, test_ratio=0.6)


# -- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x", "y"), ("X", "Y"), ("x_train", "y_train"), ("train_images", "train_labels")]
)
@pytest.mark.parametrize("shape", [(30, 8, 6), (30, 8, 6, 1), (30, 1, 8, 6), (30, 8, 6, 3), (30, 3, 8, 6)])
def test_spellings_and_shapes_of_arrays(tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    path = save(tmp_path / "a.npz", **{names[0]: pixels, names[1]: np.arange(30) % 3})
    data = read(path)
    assert data.spec["image_size"] == [8, 6]
    assert data.spec["channels"] == (3 if 3 in shape else 1)
    assert data.spec["classes"] == ["0", "1", "2"]
    assert data.describe()["train"] == 21


def test_keras_arrays_bring_their_test_set(tmp_path: Path) -> None:
    some = np.zeros((20, 4, 4))
    path = save(
        tmp_path / "a.npz", x_train=some, y_train=np.arange(20) % 2, x_test=some[:6], y_test=np.arange(6)[:, None] % 2
    )
    described = read(path).describe()
    assert (described["train"], described["validation"], described["test"]) == (18, 2, 6)


def test_labels_in_their_own_order_and_by_name(tmp_path: Path) -> None:
    some = np.zeros((22, 4, 4))
    assert read(save(tmp_path / "a.npz", x=some, y=np.arange(22) % 11 * 1.0)).spec["classes"][-2:] == ["9", "10"]
    named = save(tmp_path / "b.npz", x=some, breed=np.array(["pug", "cat"] * 11))
    assert read(named, label="breed").spec["classes"] == ["cat", "pug"]
    with pytest.raises(UserError, match="holds x, breed; it must hold kind and the images"):
        read(named, label="kind")


def test_eight_bits_are_scaled_whatever_their_type(tmp_path: Path) -> None:
    wide = np.full((10, 4, 4), 255, np.int64)
    data = read(save(tmp_path / "a.npz", x=wide, y=np.arange(10) % 2))
    assert data.spec["mean"] == [1.0]
    assert data.spec["std"] == [1.0]  # a constant channel is not divided by zero


Y = np.arange(10) % 2
X = np.zeros((10, 4, 4))
NAN = X.copy()
NAN[3, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": X, "b": Y}, "holds a, b; it must hold images and labels"),
        ({}, "holds no arrays"),
        ({"x": X, "y": Y[:5]}, "10 images in 'x' but 5 labels in 'y'"),
        ({"x": X[0], "y": Y}, r"'x' has shape \(4, 4\)"),
        ({"x": np.zeros((10, 5, 5, 7)), "y": Y}, "with 1, 3 or 4 channels"),
        ({"x": X[:0], "y": Y[:0]}, "holds no images"),
        ({"x": NAN, "y": Y}, "image 3 holds values that are not finite"),
        ({"x": X, "y": np.eye(2)[Y]}, r"'y' has shape \(10, 2\); labels are one class an image"),
        ({"x": X, "y": Y + 0.5}, "label 0 in 'y' is 0.5"),
        ({"x": X, "y": np.where(Y, np.nan, 0)}, "label 1 in 'y' is nan"),
        ({"x": X, "y": np.zeros(10, int)}, r"only one class \('0'\)"),
        ({"x": X, "y": np.array([{}] * 10, object)}, "'y' holds Python objects"),
        ({"x": X.astype(complex), "y": Y}, "has type complex128"),
        ({"x": X, "y": Y.astype("S")}, r"has type \|S"),
        ({"x": X[:2], "y": Y[:2]}, "of its 2 images 0 are left to train on"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(save(tmp_path / "bad.npz", **arrays))
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.random.default_rng(0).random((50, 9, 9)), y=np.arange(50) % 2)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:1000], whole[:2000] + bytes(64) + whole[2064:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npz: not a readable \.npz"):
            read(path)
    np.save(tmp_path / "b.npy", X)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"b\.npz: holds a single array"):
        read(tmp_path / "b.npz")


def test_gray_tests_fit_colour_training_but_not_the_reverse(folder: Path, tmp_path: Path) -> None:
    colour = save(tmp_path / "c.npz", x=np.zeros((10, 4, 4, 3), np.uint8), y=Y)
    gray = save(tmp_path / "g.npz", x=np.zeros((10, 5, 5), np.uint8), y=Y)
    data = read(colour, gray)
    assert every(data, "test")[0].shape == (10, 3, 4, 4)
    with pytest.raises(UserError, match=r"c\.npz: array 'x' has 3 channels, the data 1"):
        read(gray, colour)


# -- batches ----------------------------------------------------------------------------------------------------


def test_augmented_images_move_and_resume_exactly() -> None:
    plain, data = read(train_size=100), read(train_size=100, augment="shift-flip")
    first, again = data.train(10, 3), data.train(10, 3)
    epoch = [b.images for b in first]
    assert all(torch.equal(a, b.images) for a, b in zip(epoch, again, strict=True))
    still = [b.images for b in plain.train(10, 3)]
    assert not any(torch.equal(a, b) for a, b in zip(epoch, still, strict=True))
    assert not torch.equal(epoch[0], next(iter(first)).images)  # another epoch, other moves
    resumed = data.train(10, 3)
    resumed.load_state_dict({"epoch": 0, "position": 4})
    assert torch.equal(next(iter(resumed)).images, epoch[4])
    assert torch.equal(every(data, "test")[0], every(plain, "test")[0])


def test_a_shift_moves_by_at_most_an_eighth() -> None:
    dots = torch.zeros(500, 2, 16, 24)
    dots[:, :, 8, 12] = 1
    moved = images._augment(dots, "shift", torch.Generator().manual_seed(0))
    places = moved[:, 0].flatten(1).argmax(1)
    rows, columns = places // 24 - 8, places % 24 - 12
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert (moved.sum((2, 3)) == 1).all()
    assert set(
        (images._augment(dots, "shift-flip", torch.Generator())[:, 0].flatten(1).argmax(1) % 24).tolist()
    ) == set(range(9, 15))


# -- the task ---------------------------------------------------------------------------------------------------


def linear(data: ImageData) -> nn.Module:
    torch.manual_seed(0)
    features = data.spec["channels"] * data.spec["image_size"][0] * data.spec["image_size"][1]
    return nn.Sequential(nn.Flatten(), nn.Linear(features, len(data.spec["classes"])))


def fit(data: ImageData, **options: float) -> tuple[ImageClassification, dict[str, float]]:
    task = ImageClassification(linear(data), Training(steps=60, lr=0.02), data, **options)
    trainer = L.Trainer(
        max_steps=60, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, data.train(32, 0), data.validation(100))
    return task, dict(trainer.test(task, data.test(100), verbose=False)[0])


def test_training_learns_and_reports() -> None:
    data = read()
    task, metrics = fit(data)
    assert set(metrics) == {"test/loss", "test/accuracy", "test/accuracy_top5"}
    assert metrics["test/accuracy"] > 0.85
    assert metrics["test/accuracy_top5"] > metrics["test/accuracy"]
    assert accuracy(task.model, data.test(64)) == pytest.approx(metrics["test/accuracy"])
    logits, labels = predict(task.model, data.test(64))
    assert metrics["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    confusion = task.confusion()
    assert confusion.sum() == len(labels)
    assert confusion.diag().sum() / confusion.sum() == pytest.approx(metrics["test/accuracy"])
    assert confusion.sum(1).tolist() == labels.bincount().tolist()


def test_smoothing_is_in_training_only() -> None:
    data = read()
    batch = next(iter(data.test(50)))
    task = ImageClassification(linear(data), Training(), data, label_smoothing=0.5)
    plain = float(nn.functional.cross_entropy(task.model(batch.images), batch.labels).detach())
    assert float(task.eval().step(batch)[0].detach()) == pytest.approx(plain)
    assert float(task.train().step(batch)[0].detach()) != pytest.approx(plain)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        ImageClassification(linear(data), Training(), data, label_smoothing=1.0)


def test_predictions_of_files(folder: Path, tmp_path: Path) -> None:
    data = read(folder)
    task, _ = fit(data)
    picture(tmp_path / "new" / "dark.png", 55, size=(16, 12))
    picture(tmp_path / "new" / "deep" / "light.jpg", (205, 205, 205), mode="RGB")
    table = ImageClassification.predict_file(task.model, data.spec, tmp_path / "new", batch_size=1)
    assert table.columns == ["file", "prediction", "probability cat", "probability dog"]
    assert table["file"].to_list() == ["dark.png", "deep/light.jpg"]
    assert table["prediction"].to_list() == ["cat", "dog"]
    assert table.select("probability cat", "probability dog").sum_horizontal().to_list() == pytest.approx([1, 1])
    one = ImageClassification.predict_file(task.model, data.spec, tmp_path / "new" / "dark.png")
    assert one.row(0)[1:] == pytest.approx(table.row(0)[1:])


def test_predictions_of_arrays(tmp_path: Path) -> None:
    data = read()
    model = linear(data).eval()
    path = save(tmp_path / "a.npz", images=np.random.default_rng(0).random((5, 8, 8)))
    table = ImageClassification.predict_file(model, data.spec, path)
    assert table["file"].to_list() == [f"a.npz[{i}]" for i in range(5)]
    assert table.width == 12


def test_unreadable_predictions_are_refused(tmp_path: Path) -> None:
    spec = read().spec
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none", "there is no such file or folder"),
        (tmp_path / "empty", "holds no images"),
        (save(tmp_path / "a.npz", z=X), "holds z; the images must be named"),
        (save(tmp_path / "b.npz", x=np.zeros((3, 8, 8, 3))), "has 3 channels, the data 1"),
    ):
        with pytest.raises(UserError, match=message):
            read_unlabelled(path, spec)


def test_normalising_undoes_the_moments() -> None:
    spec = {"mean": [1.0, 2.0], "std": [2.0, 4.0]}
    out = normalise(torch.tensor([3.0, 6.0])[None, :, None, None], spec)
    assert out.flatten().tolist() == [1.0, 1.0]
