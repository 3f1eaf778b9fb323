"""Where the parts of a transformers decoder are, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from penstock.errors import UserError

#: Which layers: all, or their numbers, from the end if negative.
Layers: TypeAlias = Literal["all"] | Sequence[int]


@dataclass(frozen=True)
class Layout:
    """The names of a decoder's parts; a dot goes one level down. The defaults are those of Llama.

    Attributes:
        layers: the list of layers, in the base model (transformers' ``model.base_model``).
        attention, mlp: in a layer. The attention's first argument, or its ``hidden_states``, is its normalised input.
        queries, keys: in the attention, the last modules before rotary positions: the projections, or the norms after
            them. The same name twice: one fused projection, whose rows are head by head a head's queries, keys, values.
        values: in the attention, the projection to values; the fused one where there is one.
        output: in the attention, the projection of the concatenated heads.
        mlp_output: in the MLP, the projection of its hidden layer.
        head_dim: in the attention, the number of channels of a head.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    output: str = "o_proj"
    mlp_output: str = "down_proj"
    head_dim: str = "head_dim"


#: By the class of the base model, which all its heads (for language modelling, classification, ...) share.
LAYOUTS: dict[str, Layout] = {
    "LlamaModel": Layout(),
    "Qwen2Model": Layout(),
    "Qwen3Model": Layout(queries="q_norm", keys="k_norm"),
    "GPTNeoXModel": Layout(
        attention="attention",
        queries="query_key_value",
        keys="query_key_value",
        values="query_key_value",
        output="dense",
        mlp_output="dense_4h_to_h",
        head_dim="head_size",
    ),
}


@dataclass(frozen=True)
class Place:
    """A layer of a model, its parts resolved.

    Attributes:
        number: of the layer.
        name: dotted, in the model.
        layer: the layer itself.
        layout: the names of its parts.
    """

    number: int
    name: str
    layer: nn.Module
    layout: Layout

    @property
    def attention(self) -> nn.Module:
        return part(self.layer, self.layout.attention)

    @property
    def mlp(self) -> nn.Module:
        return part(self.layer, self.layout.mlp)

    @property
    def output(self) -> nn.Module:
        """The projection of the concatenated heads."""
        return part(self.attention, self.layout.output)

    @property
    def mlp_output(self) -> nn.Module:
        return part(self.mlp, self.layout.mlp_output)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.width(self.output, "out_features")

    @property
    def head_dim(self) -> int:
        return self.width(self.attention, self.layout.head_dim)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self._heads(self.output, "in_features")

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        if self.layout.queries == self.layout.keys:
            return self.num_heads
        return self._heads(part(self.attention, self.layout.values), "out_features")

    def width(self, module: nn.Module, attribute: str) -> int:
        """A size that a part of the layer has as an attribute.

        Raises:
            UserError: if it has no such whole number.
        """
        size = getattr(module, attribute, None)
        if not isinstance(size, int):
            raise UserError(f"layout: {type(module).__name__} in {self.name} has no whole number {attribute!r}")
        return size

    def _heads(self, projection: nn.Module, attribute: str) -> int:
        width = self.width(projection, attribute)
        if width % self.head_dim:
            raise UserError(
                f"{self.name}: {attribute}={width} is no multiple of {self.layout.head_dim}={self.head_dim}"
            )
        return width // self.head_dim

    def like_weights(self, module: nn.Module) -> nn.Module:
        """``module`` on the device, in the precision and the mode of this layer."""
        reference = next(p for p in self.layer.parameters() if p.is_floating_point())
        return module.to(reference.device, reference.dtype).train(self.layer.training)


def part(owner: nn.Module, name: str) -> nn.Module:
    """The sub-module ``name`` of ``owner``.

    Raises:
        UserError: if there is none, listing those there are.
    """
    try:
        return owner.get_submodule(name)
    except AttributeError:
        known = ", ".join(dict(owner.named_children())) or "no parts"
        raise UserError(f"layout: {type(owner).__name__} has no {name!r}; it has {known}") from None


def base_of(model: nn.Module) -> nn.Module:
    """The decoder inside a model with a head; of transformers' models their ``base_model``."""
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return base


def find_places(model: nn.Module, layers: Layers = "all", layout: Layout | None = None) -> list[Place]:
    """The layers of ``model`` that were asked for, in order.

    Raises:
        UserError: for a compiled model, a class that is not in `LAYOUTS` without a ``layout``, parts that are not
            there, or layers that are out of range.
    """
    if "_orig_mod" in model._modules:
        raise UserError("the model is compiled: graft the module it was compiled from (its _orig_mod), then compile")
    base = base_of(model)
    if layout is None:
        layout = next((LAYOUTS[c.__name__] for c in type(base).__mro__ if c.__name__ in LAYOUTS), None)
    if layout is None:
        raise UserError(
            f"{type(base).__name__} is not known here, only {', '.join(LAYOUTS)}; for another class say where its parts "
            "are: layout=penstock.interop.graft.Layout(layers=..., attention=..., ...)"
        )
    stack = part(base, layout.layers)
    if not isinstance(stack, nn.ModuleList):
        raise UserError(f"layout: {layout.layers!r} is a {type(stack).__name__}, not a list of layers")
    number = len(stack)
    chosen = list(range(number)) if layers == "all" else list(layers)
    if not chosen or any(one not in range(-number, number) for one in chosen):
        raise UserError(f"layers={layers!r}: it must be 'all' or numbers from {-number} to {number - 1}")
    names = {module: name for name, module in model.named_modules()}
    places = [Place(one, names[stack[one]], stack[one], layout) for one in sorted({one % number for one in chosen})]
    for place in places:
        _ = place.attention, place.mlp, place.output
    return places


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a module passes on, which may come with more in a tuple."""
    return output[0] if isinstance(output, tuple) else output
