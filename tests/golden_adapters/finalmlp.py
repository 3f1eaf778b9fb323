"""Golden cases of finalmlp: whole networks with loss and gradients, the fusion alone, and FuxiCTR's vocabularies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.gates import watch
from penstock.systems.recommendation.finalmlp.checkpoint import Features, features_of, from_authors, to_authors
from penstock.systems.recommendation.finalmlp.model import BilinearFusion, DualMLP, FinalMLP
from penstock.systems.recommendation.finalmlp.vocabulary import Vocabulary
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]
_STREAMS = {
    f"mlp{number}_{what}"
    for number in (1, 2)
    for what in ("batch_norm", "dropout", "hidden_activations", "hidden_units")
}
_DUAL = _STREAMS | {"embedding_dim", "embedding_regularizer", "features", "learning_rate", "net_regularizer"}
_FINAL = _DUAL | {"fs1_context", "fs2_context", "fs_hidden_units", "num_heads", "use_fs"}


def _network(config: dict[str, Any], params: Tensors) -> tuple[FinalMLP | DualMLP, Features]:
    """The model of a checkpoint, checked against what the case says of it."""
    told = config["features"]
    refuse_unknown(told, {"numeric", "categorical_vocab", "sequence"})
    sequences = [told["sequence"][0]] if told["sequence"] else []
    fields = [*told["numeric"], *told["categorical_vocab"], *sequences]
    model = from_authors(
        params,
        fields=fields,
        sequences=sequences,
        activation_1=config["mlp1_hidden_activations"],
        activation_2=config["mlp2_hidden_activations"],
        dropout_1=config["mlp1_dropout"],
        dropout_2=config["mlp2_dropout"],
        embedding_regularizer=config["embedding_regularizer"],
        net_regularizer=config["net_regularizer"],
    )
    features = features_of(params, fields, sequences)
    assert list(features.numeric) == list(told["numeric"])
    assert model.embedding.table.embedding_dim == config["embedding_dim"]
    sizes = [*told["categorical_vocab"].values(), *(1 for _ in told["numeric"])]
    assert model.field_sizes == sizes + ([told["sequence"][1]] if sequences else [])
    for number, stream in ((1, model.stream_1), (2, model.stream_2)):
        assert stream is not None
        widths = [layer.out_features for layer in stream if isinstance(layer, nn.Linear)]
        assert widths == list(config[f"mlp{number}_hidden_units"]) + [1] * isinstance(model, DualMLP)
        assert any(isinstance(layer, nn.BatchNorm1d) for layer in stream) == config[f"mlp{number}_batch_norm"]
    return model, features


def _batch(model: FinalMLP | DualMLP, features: Features, inputs: Tensors) -> tuple[Tensor, ...]:
    """The authors' dictionary of columns as our arguments."""
    offsets = dict(zip(features.ours, np.cumsum([0, *model.field_sizes[:-1]]).tolist(), strict=True))
    rows = len(inputs["y"])

    def stack(names: list[str], empty: Tensor) -> Tensor:
        columns = [inputs[name] + (0 if name in features.numeric else offsets[name]) for name in names]
        return torch.stack(columns, 1) if columns else empty

    single = [name for name in features.ours if name not in (*features.numeric, *features.sequences)]
    return (
        stack(single, torch.zeros(rows, 0, dtype=torch.int64)),
        stack(list(features.numeric), torch.zeros(rows, 0)),
        stack(list(features.sequences), torch.zeros(rows, 0, 0, dtype=torch.int64)),
    )


def _losses(model: FinalMLP | DualMLP, features: Features, logit: Tensor, label: Tensor) -> Tensors:
    """Probability, loss, and the gradients of all trained parameters."""
    probability = logit.sigmoid()
    bce = F.binary_cross_entropy(probability, label.to(logit.dtype))
    total = bce + model.penalty()
    total.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    outputs = {"prob": probability[:, None], "bce": bce, "loss_total": total}
    return outputs | {f"grad.{key}": value for key, value in to_authors(model, features, grads).items()}


def model(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _FINAL)
    net, features = _network(config, params)
    assert isinstance(net, FinalMLP)
    net.eval()
    dim, width = config["embedding_dim"], net.flat_width
    theirs = features.places(dim, inverse=True)
    batch = _batch(net, features, inputs)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        return hook

    for name in ("embedding", "stream_1", "stream_2"):
        net.get_submodule(name).register_forward_hook(keep(name))
    outputs: Tensors = {}
    if config["use_fs"]:
        for number, gate in ((1, net.gate_1), (2, net.gate_2)):
            assert gate is not None
            places = [] if gate.context is None else gate.context.places
            assert {features.ours[place] for place in places} == set(config[f"fs{number}_context"])
            assert [n.out_features for n in gate.net if isinstance(n, nn.Linear)] == [
                *config["fs_hidden_units"],
                width,
            ]
        with watch(net, keep="values") as log:
            logit = net(*batch)
        for number in (1, 2):
            half = log.values()[f"gate_{number}"][0] / 2
            outputs[f"half_gate{number}"] = half.expand(len(logit), width)[:, theirs]
        outputs["gated_feat1"] = 2 * outputs["half_gate1"] * seen["embedding"].flatten(1)[:, theirs]
    else:
        assert net.gate_1 is None
        logit = net(*batch)
    assert net.fusion.num_heads == config["num_heads"]
    outputs |= {"stream1": seen["stream_1"], "stream2": seen["stream_2"]}
    return outputs | _losses(net, features, logit, inputs["y"])


def dualmlp(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _DUAL)
    net, features = _network(config, params)
    assert isinstance(net, DualMLP)
    logit = net.eval()(*_batch(net, features, inputs))
    return _losses(net, features, logit, inputs["y"])


def fusion(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"num_heads", "output_dim", "x_dim", "y_dim"})
    net = BilinearFusion(
        config["x_dim"], config["y_dim"], output_dim=config["output_dim"], num_heads=config["num_heads"]
    ).to(inputs["x"].dtype)
    net.load_state_dict(params)
    x, y = inputs["x"].requires_grad_(), inputs["y"].requires_grad_()
    out = net(x, y)
    out.square().sum().backward()
    grads = {f"grad.{name}": parameter.grad for name, parameter in net.named_parameters()}
    return {"out": out, "grad.in_x": x.grad, "grad.in_y": y.grad} | grads


def vocab(config: dict[str, Any], params: Tensors, inputs: dict[str, Any]) -> dict[str, Any]:
    refuse_unknown(config, {"min_freq", "na_value", "seq", "max_features"})
    missing = config["na_value"]
    plain = Vocabulary.fit(
        inputs["train"].tolist(),
        min_count=config["min_freq"],
        max_words=config.get("max_features"),
        missing=missing,
    )
    outputs = {"test_ids": plain.encode(inputs["test"].tolist())}
    fitted = {"": plain}
    if (told := config.get("seq")) is not None:
        refuse_unknown(told, {"min_freq", "splitter", "max_len", "padding", "max_features", "na_value"})
        fitted["seq_"] = Vocabulary.fit(
            inputs["seq_train"].tolist(),
            min_count=told.get("min_freq", 1),
            max_words=told.get("max_features"),
            missing=told.get("na_value", missing),
            separator=told["splitter"],
            max_length=told.get("max_len", 0),
            padding=told.get("padding", "pre"),
        )
        outputs["seq_test_ids"] = fitted["seq_"].encode(inputs["seq_test"].tolist())
    for prefix, vocabulary in fitted.items():
        ids = vocabulary.ids()
        outputs[f"{prefix}vocab_words"] = np.array(list(ids))
        outputs[f"{prefix}vocab_ids"] = np.array(list(ids.values()))
        outputs[f"{prefix}vocab_size"] = np.array(len(vocabulary))
    return outputs


ADAPTERS = {"model": model, "dualmlp": dualmlp, "fusion": fusion, "vocab": vocab}
