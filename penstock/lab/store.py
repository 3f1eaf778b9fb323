"""Run folders: written whole or not at all, owned by one process at a time, loadable by name of arm."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import yaml
from safetensors.torch import save as safetensors_bytes
from torch import nn

from penstock._version import __version__
from penstock.data.base import Source
from penstock.errors import UserError, nearest
from penstock.lab.config import from_dict
from penstock.lab.jsontext import plain_json
from penstock.lab.system import System, system
from penstock.nn.checkpoints import load_strict, read_state

#: Version of the run folder's layout; a folder of another one is refused.
FORMAT = 1


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path``, renamed in the end, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass
class RunFolder:
    """The files of one run; see `create` and `open`."""

    #: The file that says what the folder is.
    ABOUT: ClassVar[str] = "config.yaml"

    path: Path
    _lock: IO[bytes] | None = None

    @classmethod
    def create(cls, name: str, out: Path | None) -> Self:
        """A new folder: ``out`` itself, else ``runs/<name>-<time>``; locked for this process.

        Raises:
            UserError: if ``out`` holds something already.
        """
        if out is not None:
            if out.exists() and not out.is_dir():
                raise UserError(f"--out {out}: is a file; give a folder")
            if out.is_dir() and any(out.iterdir()):
                hint = f"go on with --resume {out}, or " if (out / cls.ABOUT).exists() else ""
                raise UserError(f"--out {out}: the folder is not empty; {hint}give another --out")
            out.mkdir(parents=True, exist_ok=True)
            return cls(out)._locked()
        base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in range(1000):
            path = base if number == 0 else base.with_name(f"{base.name}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path)._locked()
            except FileExistsError:
                continue
        raise UserError(f"{base}: cannot find a free folder name")

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Self:
        """A run that exists.

        Args:
            path: the folder.
            write: take the lock, so that no other process writes it.

        Raises:
            UserError: if it is no run folder, is of another version, or another process has it.
        """
        if not (path / cls.ABOUT).is_file():
            raise UserError(f"{path}: is not a run folder (it has no {cls.ABOUT})")
        folder = cls(path)
        about = folder.about
        if about.get("format") != FORMAT or _minor(about.get("version")) != _minor(__version__):
            raise UserError(
                f"{path}: is a run of penstock {about.get('version')} (layout {about.get('format')}); "
                f"this is penstock {__version__} (layout {FORMAT}): use that version or run it again"
            )
        return folder._locked() if write else folder

    def _locked(self) -> Self:
        self._lock = (self.path / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path}: another process is writing this run; wait for it or give another --out"
            ) from None
        return self

    def release(self) -> None:
        """Let go of the folder; the lock also ends with the process."""
        if self._lock is not None:
            self._lock.close()
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock = None

    def discard(self) -> None:
        """Remove a folder in which nothing was written."""
        self.release()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def about(self) -> dict[str, Any]:
        """What `ABOUT` says."""
        try:
            about = yaml.safe_load((self.path / self.ABOUT).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path / self.ABOUT}: not readable ({str(error).splitlines()[0]})") from None
        if not isinstance(about, dict) or "system" not in about:
            raise UserError(f"{self.path / self.ABOUT}: does not describe a run")
        return about

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, plain_json(value))

    def read_json(self, name: str) -> Any:
        """A JSON file of the run.

        Raises:
            UserError: if it is missing or broken.
        """
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: the run has no {name}; it did not finish (go on with --resume {self.path})"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path / name}: broken JSON ({error.msg}, line {error.lineno})") from None

    def write_log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """``log.csv``: one row a logged number."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["arm", "seed", "stage", "step", "metric", "value"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / "log.csv", text.getvalue())

    def cell(self, arm: str, seed: int) -> Path:
        return self.path / "cells" / f"{arm}.seed{seed}.json"

    def save_model(self, arm: str, seed: int, model: nn.Module) -> None:
        """The arm's weights: ``models/<arm>/model.safetensors`` (first seed) or ``model.seed<k>.safetensors``."""
        # Tied tensors share memory, which safetensors refuses; each name gets its own copy.
        state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
        folder = self.path / "models" / arm
        write_atomically(folder / self._weights(seed), safetensors_bytes(state))
        about = self.about
        write_atomically(
            folder / "config.json", plain_json({k: about[k] for k in ("system", "version", "config")} | {"arm": arm})
        )

    @staticmethod
    def _weights(seed: int) -> str:
        return "model.safetensors" if seed == 0 else f"model.seed{seed}.safetensors"


@dataclass
class Run:
    """A finished (or half-finished) run, opened for use."""

    folder: RunFolder
    system: System[Any]
    config: Any
    spec: dict[str, Any]

    @property
    def source(self) -> Source:
        """Where the run's data came from."""
        return Source.from_dict(self.folder.about["data"])

    @property
    def arms(self) -> list[str]:
        """The arms that have been trained."""
        models = self.folder.path / "models"
        order = list(self.system.arms(self.config, self.spec))
        return [arm for arm in order if (models / arm / "model.safetensors").is_file()]

    def model(self, arm: str | None = None, *, seed: int = 0) -> nn.Module:
        """A trained arm (default: the first, the gated one), in eval mode.

        Raises:
            UserError: if there is no such arm or its weights do not fit.
        """
        arms = self.arms
        if not arms:
            raise UserError(f"{self.folder.path}: no arm has been trained yet; go on with --resume {self.folder.path}")
        arm = arm or arms[0]
        if arm not in arms:
            close = nearest(arm, arms) or arms
            raise UserError(
                f"{self.folder.path}: no trained arm {arm!r}; there are {', '.join(arms)} (did you mean {close[0]}?)"
            )
        path = self.folder.path / "models" / arm / RunFolder._weights(seed)
        if not path.exists():
            raise UserError(f"{self.folder.path}: arm {arm} was not trained with seed {seed}; seeds count from 0")
        model = self.system.arms(self.config, self.spec)[arm]()
        return load_strict(model, read_state(path), source=str(path)).eval()


def open_run(path: Path | str) -> Run:
    """Open a run folder.

    Raises:
        UserError: if it is none, or of another version.
    """
    folder = RunFolder.open(Path(path))
    about = folder.about
    found = system(about["system"])
    config = from_dict(found.Config, about["config"], where=str(folder.path / "config.yaml"))
    return Run(folder, found, config, folder.read_json("data.json"))


def load(path: Path | str, *, arm: str | None = None, seed: int = 0) -> nn.Module:
    """A trained model of a run.

    Args:
        path: a run folder, or one of its ``models/<arm>`` folders.
        arm: which (default the gated one).
        seed: of which training.

    Raises:
        UserError: if the folder is no run, is of another version, or has no such arm.
    """
    path = Path(path)
    if path.parent.name == "models" and (path / "config.json").is_file():
        return open_run(path.parent.parent).model(arm or path.name, seed=seed)
    return open_run(path).model(arm, seed=seed)


def _minor(version: object) -> str:
    return ".".join(str(version).split(".")[:2])
