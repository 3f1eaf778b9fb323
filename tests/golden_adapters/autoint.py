"""Golden cases of autoint: one layer of FuxiCTR's and of the authors', and whole models with their losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.checkpoints import rename
from penstock.nn.fuxictr import regularization
from penstock.systems.recommendation.autoint.checkpoint import (
    AUTHORS_KEYS,
    FuxiFields,
    from_authors,
    layer_from_authors,
    to_authors,
)
from penstock.systems.recommendation.autoint.model import AutoInt, InteractingLayer
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

#: FuxiCTR's defaults.
_LAYER: dict[str, Any] = {
    "attention_dim": None,
    "num_heads": 1,
    "use_residual": True,
    "use_scale": False,
    "layer_norm": False,
}
_MODEL: dict[str, Any] = {
    "learning_rate": 1e-3,
    "embedding_dim": 10,
    "dnn_hidden_units": [64, 64, 64],
    "dnn_activations": "ReLU",
    "attention_layers": 2,
    "attention_dim": 8,
    "net_dropout": 0.0,
    "batch_norm": False,
    "use_wide": False,
    "embedding_regularizer": None,
    "net_regularizer": None,
}


def _read(layer: InteractingLayer, x_BMI: Tensor) -> Tensors:
    with watch(layer, keep="values") as log:
        out = layer(x_BMI)
    return {"out": out, "attention": log.values()["gate"][0]}


def layer(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {*_LAYER, "input_dim"})
    config = _LAYER | config
    module = layer_from_authors(
        params,
        num_heads=config["num_heads"],
        use_scale=config["use_scale"],
        use_residual=config["use_residual"],
    ).eval()
    width = config["attention_dim"] or config["input_dim"]
    assert module.value is not None
    assert (module.value.in_features, module.value.out_features) == (config["input_dim"], width)
    assert (module.norm is not None) == config["layer_norm"]
    outputs = _read(module, inputs["x"])
    outputs["out"].square().sum().backward()
    named = _to_authors_layer({k: p.grad for k, p in module.named_parameters() if p.grad is not None})
    return outputs | {f"grad.{name}": grad for name, grad in named.items()}


def _to_authors_layer(state: Tensors) -> Tensors:
    """A layer's tensors under FuxiCTR's names."""
    named = rename({f"layers.0.{name}": value for name, value in state.items()}, AUTHORS_KEYS)
    return {name.removeprefix("self_attention.0."): value for name, value in named.items()}


def tf_layer(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"has_residual", "input_dim", "num_heads", "num_units"})
    module = layer_from_authors(params, num_heads=config.get("num_heads", 1)).eval()
    width = config.get("num_units") or config["input_dim"]
    assert module.value is not None
    assert (module.value.in_features, module.value.out_features) == (config["input_dim"], width)
    assert (module.residual is not None) == config.get("has_residual", True)
    return _read(module, inputs["x"])


def model(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {*_LAYER, *_MODEL, "features"})
    config = _LAYER | _MODEL | config
    features = config["features"]
    sequence = features.get("sequence")
    names = [*features["numeric"], *features["categorical_vocab"], *([sequence[0]] if sequence else [])]
    sequences = [sequence[0]] if sequence else []
    net = from_authors(
        params,
        num_heads=config["num_heads"],
        dropout=config["net_dropout"],
        use_scale=config["use_scale"],
        use_residual=config["use_residual"],
        dnn_activations=config["dnn_activations"],
        fields=names,
        sequences=sequences,
    ).eval()
    fields = FuxiFields.read(params, fields=names, sequences=sequences)
    _check(net, config, fields)

    outputs: Tensors = {}
    theirs = [fields.order.index(place) for place in range(len(names))]
    for number, one in enumerate(net.layers):
        one.register_forward_hook(
            lambda _, __, out, number=number: outputs.__setitem__(f"layer{number}", out[:, theirs])
        )
    logit_B = net(*fields.inputs(inputs))
    bce = F.binary_cross_entropy_with_logits(logit_B, inputs["y"].to(logit_B.dtype).flatten())
    total = bce + regularization(
        net, embedding=config["embedding_regularizer"] or 0.0, net=config["net_regularizer"] or 0.0
    )
    total.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    outputs |= {"prob": logit_B.sigmoid()[:, None], "bce": bce, "loss_total": total}
    return outputs | {f"grad.{name}": grad for name, grad in to_authors(grads, fields).items()}


def _check(net: AutoInt, config: dict[str, Any], fields: FuxiFields) -> None:
    """What the case says of the model that its tensors built."""
    rows = dict(zip(fields.names, fields.rows, strict=True))
    sequence = config["features"].get("sequence")
    expected = config["features"]["categorical_vocab"] | ({sequence[0]: sequence[1]} if sequence else {})
    assert {name: rows[name] for name in expected} == expected
    assert fields.of("numeric") == list(config["features"]["numeric"])
    assert fields.width == config["embedding_dim"]
    assert len(net.layers) == config["attention_layers"]
    assert all(layer.value.out_features == config["attention_dim"] for layer in net.layers)
    assert all((layer.norm is not None) == config["layer_norm"] for layer in net.layers)
    assert (net.wide is not None) == config["use_wide"]
    hidden = [m.out_features for m in net.dnn or () if isinstance(m, nn.Linear)][:-1]
    assert hidden == list(config["dnn_hidden_units"] or ())
    assert any(isinstance(m, nn.BatchNorm1d) for m in net.dnn or ()) == bool(config["batch_norm"] and hidden)


ADAPTERS = {"layer": layer, "tf_layer": tf_layer, "model": model}
