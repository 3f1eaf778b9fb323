"""Golden cases of optinter: the searching network, its joint updates, and the four retrained networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.nn.checkpoints import rename
from penstock.systems.recommendation.optinter.checkpoint import MODES, authors_keys, from_authors, to_authors
from penstock.systems.recommendation.optinter.model import InteractionNet
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]
_STEPS = {"cate_field", "comb_embedding_dim", "cont_field", "hidden_dims", "orig_embedding_dim", "selected_pairs"}
_NETWORK = _STEPS | {"cate_cont_feature", "comb_feature", "comb_field"}


def _network(config: dict[str, Any], params: Tensors, **options: Any) -> InteractionNet:
    """The network of a checkpoint, checked against what the case says of it."""
    net = from_authors(
        params,
        num_fields=config["cate_field"],
        num_numeric=config["cont_field"],
        pairs=config["selected_pairs"],
        **options,
    )
    assert net.embedding.table.embedding_dim == config["orig_embedding_dim"]
    assert net.pair_dim == config["comb_embedding_dim"]
    assert [layer.out_features for layer in net.mlp.linears] == list(config["hidden_dims"])
    assert net.embedding.num_ids == config.get("cate_cont_feature", net.embedding.num_ids)
    assert len(net.pairs) == config.get("comb_field", len(net.pairs))
    if net.cross_table is not None:
        assert net.num_crosses == config.get("comb_feature", net.num_crosses)
    return net


def _probability(net: InteractionNet, inputs: Tensors) -> Tensor:
    return net(inputs["cates"], inputs["combs"], inputs["conts"])[:, None].sigmoid()


def _gradients(net: InteractionNet) -> Tensors:
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()}
    return {f"grad.{name}": grad for name, grad in rename(grads, authors_keys(net)).items()}


def search(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _NETWORK | {"step_k", "tau"})
    net = _network(config, params, tau=config["tau"])
    assert net.gate is not None
    outputs: Tensors = {}
    for name, step in (("step0", 0), ("stepk", config["step_k"])):
        net.gate.step.fill_(step)
        outputs[f"gate_{name}"] = net.gate()
        outputs[f"prob_{name}"] = _probability(net, inputs)
    outputs["bce_stepk"] = F.binary_cross_entropy(outputs["prob_stepk"], inputs["y"])
    outputs["bce_stepk"].backward()
    return outputs | _gradients(net)


def search_steps(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _STEPS | {"arch_lr", "lr", "start_step", "tau", "weight_decay_on_pair_tables"})
    net = _network(config, params, tau=config["tau"], step=config["start_step"])
    assert net.gate is not None
    decay = config["weight_decay_on_pair_tables"]
    groups = net.parameter_groups(weight_decay=decay, gate_lr=config["arch_lr"])
    optimizer = torch.optim.Adam(groups, lr=config["lr"])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy(_probability(net, inputs), inputs["y"])
        loss.backward()
        optimizer.step()
        net.gate.advance()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {f"after.{name}": value for name, value in to_authors(net).items()}


def retrain(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(config, _NETWORK | {"alpha_mode"})
    net = _network(config, params, arch=inputs["arch_onehot"])
    assert net.method == MODES[config["alpha_mode"]]
    probability = _probability(net, inputs)
    bce = F.binary_cross_entropy(probability, inputs["y"])
    bce.backward()
    return {"prob": probability, "bce": bce} | _gradients(net)


ADAPTERS = {"search": search, "search_steps": search_steps, "retrain": retrain}
