"""Write a trained arm for other runtimes (ONNX, torch.export) and for transformers."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.lab.predict import sample_inputs
from penstock.lab.store import Run, open_run
from penstock.lab.train import hush

#: Samples the model is traced with; the batch axis is exported as free.
_TRACED = 4


def export(
    run: Path, form: Literal["onnx", "pt2", "hf"], *, arm: str | None = None, seed: int = 0, output: Path | None = None
) -> dict[str, Any]:
    """Export a trained arm with a free batch axis and check what was written against PyTorch on other samples.

    Args:
        run: a run folder.
        form: "onnx" (through torch.export, opset of the installed exporter), "pt2" (torch.export), or "hf", a folder
            for transformers with the model and its tokenizer (language models only).
        arm, seed: which.
        output: the file or folder; default ``<run>/<arm>.<form>``. What was exported there before is replaced.

    Returns:
        file, bytes, arm, and difference: the largest absolute difference of the outputs.

    Raises:
        UserError: if the run cannot be used, the extra that is needed is not installed, or the folder holds something
            else.
    """
    hush()
    opened = open_run(run)
    model = opened.model(arm, seed=seed)
    output = output or run / f"{arm or opened.arms[0]}.{form}"
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    if form == "hf":
        difference = _transformers(opened, model, arm, seed, output)
        size = sum(file.stat().st_size for file in output.iterdir())
        return {"file": str(output), "bytes": size, "arm": arm or opened.arms[0], "difference": difference}
    inputs = sample_inputs(opened, model, size=2 * _TRACED + 1)
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} if isinstance(x, Tensor) else None for x in inputs)
    traced = tuple(x[:_TRACED] if isinstance(x, Tensor) else x for x in inputs)
    with torch.no_grad():
        expected = model(*inputs)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as folder:
        temporary = Path(folder) / output.name
        write = _onnx if form == "onnx" else _pt2
        with torch.no_grad():
            got = write(model, traced, shapes, inputs, temporary)
        temporary.replace(output)
    difference = float((_first(expected) - got).abs().max())
    return {"file": str(output), "bytes": output.stat().st_size, "arm": arm or opened.arms[0], "difference": difference}


def _pt2(model: nn.Module, traced: tuple[Any, ...], shapes: Any, inputs: tuple[Any, ...], path: Path) -> Tensor:
    program = torch.export.export(model, traced, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return _first(torch.export.load(path).module()(*inputs))


def _onnx(model: nn.Module, traced: tuple[Any, ...], shapes: Any, inputs: tuple[Any, ...], path: Path) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError:
        raise UserError("ONNX export needs more packages: pip install 'penstock[onnx]'") from None
    # The exporter reports its progress on standard output, which belongs to --json.
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, traced, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    fed = [x.numpy() for x in inputs if isinstance(x, Tensor)]
    return torch.from_numpy(session.run(None, dict(zip(names, fed, strict=True)))[0])


def _transformers(run: Run, model: nn.Module, arm: str | None, seed: int, output: Path) -> float:
    """Write the folder whole or not at all; returns how far the logits of what it holds are from the model's."""
    try:
        from transformers import AutoModelForCausalLM

        from penstock.interop import hf
    except ImportError:
        raise UserError("export for transformers needs more packages: pip install 'penstock[hf]'") from None
    if output.exists() and not _replaceable(output):
        raise UserError(f"--output {output}: holds something else; give another folder")
    # The progress bars of transformers say nothing about models of this size.
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        temporary = Path(folder) / "model"
        hf.save(run, temporary, arm=arm, seed=seed)
        (tokens_BL, *_) = sample_inputs(run, model, size=_TRACED)
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(temporary)(tokens_BL).logits
            difference = float((model(tokens_BL) - again).abs().max())
        if output.exists():
            shutil.rmtree(output)
        temporary.replace(output)
    return difference


def _replaceable(output: Path) -> bool:
    """Whether a path that exists is an empty folder or an earlier export for transformers."""
    if not output.is_dir():
        return False
    try:
        found = json.loads((output / "config.json").read_text())
    except (OSError, ValueError):
        return not any(output.iterdir())
    return isinstance(found, dict) and found.get("model_type") == "penstock"


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))
