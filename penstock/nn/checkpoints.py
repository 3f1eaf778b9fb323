"""Reading checkpoints safely and fitting authors' key names to ours."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from penstock.errors import UserError

State = Mapping[str, Tensor]

#: Where checkpoints keep the state dict, outermost first.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "module")


def read_state(source: str | Path | State) -> dict[str, Tensor]:
    """A state dict from a file or a mapping, with wrappers and a leading ``module.`` taken off.

    Args:
        source: a ``.safetensors`` file, a file written by ``torch.save``, or a mapping of tensors.

    Raises:
        UserError: if the file is missing, is no checkpoint, or is a pickle that wants code executed.
    """
    if isinstance(source, str | Path):
        state = _read_file(Path(source))
    else:
        state = dict(source)
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = dict(state[wrapper])
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        odd = [key for key, value in state.items() if not isinstance(value, Tensor)][:3]
        raise UserError(
            f"{source if isinstance(source, str | Path) else 'the checkpoint'}: no state dict (entries that are no tensors: {odd})"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        asks = f" (it asks for {what.group(1)})" if what else ""
        raise UserError(
            f"{path}: refused, the pickle wants code executed{asks}; save the state dict's tensors only, or as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)


def rename(state: State, table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Keys rewritten by the first matching (regular expression, replacement) of ``table``; others stay."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in table:
            new, hits = re.subn(pattern, replacement, key)
            if hits:
                key = new
                break
        renamed[key] = value
    return renamed


def load_strict(model: nn.Module, state: State, *, source: str = "the checkpoint") -> nn.Module:
    """Load ``state`` into ``model``; every tensor must be there and fit.

    Values are copied into the model's own dtype.

    Raises:
        UserError: naming the first few missing, extra and misshapen tensors.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, must be {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complaints = [
        f"{kind}: {'; '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"
        for kind, found in (("missing", missing), ("not expected", extra), ("misshapen", misshapen))
        if found
    ]
    if complaints:
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(complaints)}")
    model.load_state_dict(dict(state), strict=True)
    return model
