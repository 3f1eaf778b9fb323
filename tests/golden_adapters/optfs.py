"""Golden cases of optfs: the gate, the four networks, and the trainer step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from penstock.gates import watch
from penstock.nn.checkpoints import rename
from penstock.systems.recommendation.optfs.checkpoint import AUTHORS_KEYS, from_authors, to_authors
from penstock.systems.recommendation.optfs.model import Backbone, OptFSModel
from penstock.tasks.search import Search
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]
_NETWORK = {"cross", "feat_num", "field_num", "latent_dim", "mask_initial", "mlp_dims", "mlp_dropout", "use_bn"}


def _network(config: dict[str, Any], backbone: Backbone, params: Tensors, **options: Any) -> OptFSModel:
    """The model of a checkpoint, checked against what the case says of it."""
    model = from_authors(
        params,
        backbone=backbone,
        num_fields=config["field_num"],
        initial=config["mask_initial"],
        dropout=config["mlp_dropout"],
        **options,
    )
    assert model.embedding.table.weight.shape == (config["feat_num"], config["latent_dim"])
    if backbone == "dcn":
        assert len(model.backbone.cross.biases) == config["cross"]
    if backbone != "fm":
        widths = [layer.out_features for layer in model.backbone.mlp if isinstance(layer, torch.nn.Linear)]
        assert widths == list(config["mlp_dims"]) + ([] if backbone == "dcn" else [1])
        assert any(isinstance(layer, torch.nn.BatchNorm1d) for layer in model.backbone.mlp) == config["use_bn"]
    return model


def gate(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, {"feature_num", "latent_dim", "mask_initial_value"})
    model = from_authors(
        {f"mask_embedding.{name}": value for name, value in params.items()},
        backbone="fm",
        num_fields=max(inputs["x"].shape[1], 2),
        initial=config["mask_initial_value"],
    )
    embedding = model.embedding
    assert embedding.table.weight.shape == (config["feature_num"], config["latent_dim"])
    outputs: Tensors = {}

    def run(name: str) -> Tensor:
        with watch(embedding, "gate", keep="values") as log:
            outputs[f"emb_{name}"] = embedding(inputs["x"])
        outputs[f"gate_{name}"] = log.values()["gate"][0]
        return outputs[f"emb_{name}"]

    for number, temperature in enumerate(inputs["temps"].tolist()):
        model.set_temperature(temperature)
        e_BFD = run(f"t{number}")
        outputs[f"reg_t{number}"] = model.penalty()
        outputs[f"remain_soft_t{number}"] = torch.tensor(model.gate.nonzero_share(), dtype=torch.float64)
        if number == 1:
            loss = e_BFD.square().sum() + 0.01 * model.penalty()
            loss.backward()
            outputs["loss_t1"] = loss
            outputs["grad.embedding"] = embedding.table.weight.grad
            outputs["grad.mask_weight"] = model.gate.logit.grad
    model.harden()
    run("ticket")
    outputs["remain_ticket"] = torch.tensor(model.kept_share(), dtype=torch.float64)
    return outputs


def _adapter(backbone: Backbone) -> Callable[[dict[str, Any], Tensors, Tensors], Tensors]:
    def adapter(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
        refuse_unknown(config, _NETWORK | {"reg_lambda", "temp", "ticket"})
        model = _network(config, backbone, params, temperature=config["temp"], ticket=config["ticket"]).eval()
        logit = model(inputs["x"])[:, None]
        bce = F.binary_cross_entropy_with_logits(logit, inputs["y"])
        reg = model.penalty()
        total = bce + config["reg_lambda"] * reg
        total.backward()
        grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
        outputs = {"logit": logit, "bce": bce, "reg": reg, "total": total}
        return outputs | {f"grad.{name}": grad for name, grad in rename(grads, AUTHORS_KEYS).items()}

    return adapter


def trainer_trace(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    known = {"bsize", "cuda", "dataset", "final_temp", "l2", "lambda", "lr", "model", "model_opt", "optimizer"}
    refuse_unknown(config, known | {"rewind_epoch", "search_epoch"})
    refuse_unknown(config["model_opt"], _NETWORK)
    backbone = config["model"]
    assert backbone in get_args(Backbone), backbone
    model = _network(config["model_opt"], backbone, params)
    search = Search(config["search_epoch"], config["rewind_epoch"], config["final_temp"])
    search.check()
    gates = list(model.gate_parameters())
    weights = [p for p in model.parameters() if not any(p is g for g in gates)]
    batches = list(zip(inputs["x_train"].split(config["bsize"]), inputs["y_train"].split(config["bsize"]), strict=True))

    def epoch(optimizer: torch.optim.Optimizer, penalty: float) -> list[Tensor]:
        model.train()
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            bce = F.binary_cross_entropy_with_logits(model(x)[:, None], y)
            (bce + penalty * model.penalty() if penalty else bce).backward()
            optimizer.step()
            losses.append(bce.detach())
        return losses

    def auc() -> float:
        model.eval()
        with torch.no_grad():
            return float(roc_auc_score(inputs["y_val"].numpy(), model(inputs["x_val"]).sigmoid()[:, None].numpy()))

    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config["optimizer"].lower()]
    optimizer = make([{"params": weights, "weight_decay": config["l2"]}, {"params": gates}], lr=config["lr"])
    search_losses, temperatures, snapshot = [], [], {}
    for number in range(search.epochs):
        model.set_temperature(search.temperature(number))
        if number == search.rewind_epoch:
            snapshot = model.snapshot()
        search_losses += epoch(optimizer, config["lambda"])
        temperatures += [search.temperature(number)] * len(batches)
    outputs = {f"after_search.{k}": v.clone() for k, v in to_authors(model, snapshot).items()}

    model.harden()
    model.rewind(snapshot)
    outputs |= {f"after_rewind.{k}": v.clone() for k, v in to_authors(model, snapshot).items()}
    optimizer = torch.optim.Adam(weights, lr=config["lr"], weight_decay=config["l2"])
    retrain_losses, best, best_state = [], 0.0, {}
    for _ in range(2):
        retrain_losses += epoch(optimizer, 0.0)
        if (score := auc()) <= best:
            model.load_state_dict(best_state)
            break
        best, best_state = score, {k: v.clone() for k, v in model.state_dict().items()}
    outputs |= {f"after_retrain.{k}": v for k, v in to_authors(model, snapshot).items()}
    return outputs | {
        "search_loss_per_step": torch.stack(search_losses),
        "search_temp_per_step": torch.tensor(temperatures, dtype=torch.float64),
        "retrain_loss_per_step": torch.stack(retrain_losses),
    }


ADAPTERS = {
    "gate": gate,
    **{name: _adapter(name) for name in get_args(Backbone)},
    "trainer_trace": trainer_trace,
}
