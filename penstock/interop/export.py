"""Write a trained arm for other runtimes: ONNX and torch.export."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.errors import UserError
from penstock.lab.predict import sample_inputs
from penstock.lab.store import open_run
from penstock.lab.train import hush

#: Samples the model is traced with; the batch axis is exported as free.
_TRACED = 4


def export(
    run: Path, form: Literal["onnx", "pt2"], *, arm: str | None = None, seed: int = 0, output: Path | None = None
) -> dict[str, Any]:
    """Export a trained arm with a free batch axis and check what was written against PyTorch on other samples.

    Args:
        run: a run folder.
        form: "onnx" (through torch.export, opset of the installed exporter) or "pt2" (torch.export).
        arm, seed: which.
        output: the file; default ``<run>/<arm>.<form>``.

    Returns:
        file, bytes, arm, and difference: the largest absolute difference of the outputs.

    Raises:
        UserError: if the run cannot be used, or the ONNX extra is not installed.
    """
    hush()
    opened = open_run(run)
    model = opened.model(arm, seed=seed)
    inputs = sample_inputs(opened, model, size=2 * _TRACED + 1)
    output = output or run / f"{arm or opened.arms[0]}.{form}"
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} if isinstance(x, Tensor) else None for x in inputs)
    traced = tuple(x[:_TRACED] if isinstance(x, Tensor) else x for x in inputs)
    with torch.no_grad():
        expected = model(*inputs)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as folder:
        temporary = Path(folder) / output.name
        write = _onnx if form == "onnx" else _pt2
        got = write(model, traced, shapes, inputs, temporary)
        temporary.replace(output)
    difference = float((_first(expected) - got).abs().max())
    return {"file": str(output), "bytes": output.stat().st_size, "arm": arm or opened.arms[0], "difference": difference}


def _pt2(model: nn.Module, traced: tuple[Any, ...], shapes: Any, inputs: tuple[Any, ...], path: Path) -> Tensor:
    program = torch.export.export(model, traced, dynamic_shapes=shapes)
    torch.export.save(program, path)
    with torch.no_grad():
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


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))
