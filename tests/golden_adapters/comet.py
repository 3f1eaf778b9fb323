"""COMET's golden cases: the tree gate, DSelect-k, the permutation's schedule, top-k and hash gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penstock.nn.experts import collect_losses, weighted_sum
from penstock.systems.experts.comet.checkpoint import from_authors, to_authors
from penstock.systems.experts.comet.model import CometGate, DSelectKGate, HashGate


def options(config: Mapping[str, Any], known: Mapping[str, str | None]) -> dict[str, Any]:
    """A case's configuration under our argument names; what the parameters or inputs already say maps to None."""
    if unknown := set(config) - set(known):
        raise ValueError(f"unknown configuration keys {sorted(unknown)}; this kind has {sorted(known)}")
    return {ours: config[key] for key, ours in known.items() if ours is not None and key in config}


def with_gradients(
    gate: CometGate | DSelectKGate, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gate values, mixture, loss and gradients of the loss, and the regularisers by name."""
    gate.train()
    with collect_losses() as terms:
        routing = gate(inputs["x"], inputs["permutation"])
    y = weighted_sum(inputs["experts"], routing)
    loss = (y * inputs["loss_weight"]).sum() + sum(terms.values())
    loss.backward()
    gradients = {name: p.grad for name, p in gate.named_parameters() if p.grad is not None}
    outputs = {"y": y, "gate": routing.dense(), "loss": loss}
    return outputs | {f"grad.{k}": v for k, v in to_authors(gate, gradients).items()}, terms


def comet_gate(config: Mapping[str, Any], params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    known = {"gamma": "gamma", "entropy_reg": "entropy_reg"}
    implied = dict.fromkeys(("nb_experts", "k", "input_dim", "expert_dim", "permutation"))
    gate = from_authors(params, **options(config, known | implied))
    assert isinstance(gate, CometGate)
    outputs, terms = with_gradients(gate, inputs)
    return outputs | {"entropy_reg_loss": terms.get("entropy", outputs["loss"].new_zeros(()))}


def dselect_k(config: Mapping[str, Any], params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    known = {"nb_experts": "num_experts", "gamma": "gamma", "entropy_reg": "entropy_reg", "zeta": "zeta"}
    gate = from_authors(params, **options(config, known | dict.fromkeys(("k", "input_dim", "permutation"))))
    assert isinstance(gate, DSelectKGate)
    outputs, terms = with_gradients(gate, inputs)
    zero = outputs["loss"].new_zeros(())
    power_of_two = gate.num_experts & (gate.num_experts - 1) == 0
    names = ("entropy",) if power_of_two else ("entropy", "reachability")
    reg_terms = torch.stack([terms.get(name, zero) for name in names])
    return outputs | {"selector_outputs": gate.selectors(inputs["x"]), "reg_terms": reg_terms}


def learn_permutation(
    config: Mapping[str, Any], params: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    known = {
        "iterations_for_learning_permutation": "steps",
        "k": "top_k",
        "noise_factor": "noise",
        "perm_entropy_reg": "perm_entropy_reg",
    }
    implied = dict.fromkeys(("calls", "learn_k_permutations", "nb_experts"))
    permutation = from_authors(params, **options(config, known | implied)).train()
    matrices, terms = [], []
    for _ in range(config["calls"]):
        with collect_losses() as losses:
            matrices.append(permutation().detach())
        terms.append(losses.get("permutation", torch.zeros(())).detach().double())
    evaluated = permutation.eval()()
    return {
        "train_permutations": torch.stack(matrices),
        "train_reg": torch.stack(terms),
        "eval_permutation": evaluated,
    }


def topk_hash(config: Mapping[str, Any], params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    known: dict[str, str | None] = {"k": "top_k", **dict.fromkeys(("nb_experts", "jitter", "permutation"))}
    gate: nn.Module = from_authors(params, **options(config, known)).eval()
    hashed = HashGate(config["nb_experts"])(inputs["hash_index"], inputs["permutation"])
    chosen = gate(inputs["x"], inputs["permutation"])
    return {
        "topk_gate": chosen.dense(),
        "topk_y": weighted_sum(inputs["experts"], chosen),
        "hash_gate": hashed.dense(),
        "hash_y": weighted_sum(inputs["experts"], hashed),
    }


ADAPTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "comet_gate": comet_gate,
    "dselect_k": dselect_k,
    "learn_permutation": learn_permutation,
    "topk_hash": topk_hash,
}
