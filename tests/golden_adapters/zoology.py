"""Golden cases of zoology: the MQAR generator, every mixer, and the whole language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from penstock.data.recall import UNLABELLED, mqar
from penstock.gates import watch
from penstock.nn.experts import collect_losses
from penstock.systems.sequence.zoology.checkpoint import from_authors, load_mixer
from penstock.systems.sequence.zoology.convolutions import H3, BaseConv, Hyena, LongConv
from penstock.tasks.associative_recall import example_means
from tests.golden_adapters import refuse_unknown

Tensors = dict[str, Tensor]

_MIXERS = {
    "BaseConv": {"l_max", "kernel_size", "implicit_long_conv", "use_act"},
    "H3": {"l_max", "d_state", "head_dim"},
    "Hyena": {"l_max", "filter_order", "short_filter_order"},
    "MHA": {"num_heads", "bias", "dropout"},
    "RWKVTimeMixer": {"l_max", "n_layer", "layer_idx"},
    "SigmoidLookups": {"num_heads", "bias", "dropout", "n_lookups", "selection_penalty"},
}


def _mixer(name: str, config: dict[str, Any], params: Tensors) -> Any:
    refuse_unknown(config, _MIXERS[name] | {"d_model", "layer_idx"})
    return load_mixer(name, params, **config).eval()


def mqar_examples(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(
        config,
        {"seed", "torch_seed", "num_examples", "vocab_size", "input_seq_len", "num_kv_pairs", "power_a", "random_non_queries"},
    )  # fmt: skip
    settings = {key: value for key, value in config.items() if key != "torch_seed"}
    return mqar(**settings, filler_seed=config.get("torch_seed"))._asdict()


def baseconv(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    mixer: BaseConv = _mixer("BaseConv", config, params)
    x = inputs["x"]
    with watch(mixer, keep="values") as log:
        y = mixer(x)
    outputs = {"y": y, "gate": log.values()["gate"][0], "conv": mixer.conv(x)}
    if isinstance(mixer.conv, LongConv):
        outputs["filter"] = mixer.conv.filters(x.shape[1])[None]
    return outputs


def hyena(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    mixer: Hyena = _mixer("Hyena", config, params)
    x = inputs["x"]
    return {"y": mixer(x), "filter": mixer.filter(x.shape[1]).T[None]}


def h3(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    mixer: H3 = _mixer("H3", config, params)
    x = inputs["x"]
    taps = x.shape[1] if mixer.l_max is None else min(x.shape[1], mixer.l_max)
    return {"y": mixer(x), "ssm_kernel": mixer.diagonal(taps)[None], "shift_kernel": mixer.shift(taps)[None]}


def mha(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": _mixer("MHA", config, params)(inputs["x"])}


def rwkv_time_mixer(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    mixer = _mixer("RWKVTimeMixer", config, params)
    with watch(mixer, keep="values") as log:
        y = mixer(inputs["x"])
    return {"y": y, "receptance_gate": log.values()["receptance"][0]}


def sigmoid_lookups(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    mixer = _mixer("SigmoidLookups", config, params).requires_grad_(False)
    y_eval = mixer(inputs["x"])
    mixer.train()
    with collect_losses() as losses, watch(mixer, keep="values") as log:
        y_train = mixer(inputs["x"])
    return {
        "y_train": y_train,
        "y_eval": y_eval,
        "gate": log.values()["gate"][0],
        "auxiliary_loss": losses["lookups"].reshape(1),
    }


def lm(config: dict[str, Any], params: Tensors, inputs: Tensors) -> Tensors:
    refuse_unknown(
        config,
        {"d_model", "n_layers", "vocab_size", "max_position_embeddings", "mixers", "state_mixer", "state_mixer_kwargs"},
    )
    mixers = []
    for one in config["mixers"]:
        name = one["name"].rpartition(".")[2]
        refuse_unknown(one["kwargs"], _MIXERS[name])
        mixers.append({"name": name, **one["kwargs"]})
    model = from_authors(params, mixers=mixers).eval()
    tokens, labels = inputs["input_ids"], inputs["labels"]
    logits = model(tokens)
    size = model.state_size(tokens.shape[1])
    outputs = {
        "hidden": model.forward_features(tokens),
        "logits": logits,
        "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED).reshape(1),
        "accuracy_per_example": example_means(logits.argmax(-1) == labels, labels).double(),
    }
    return outputs if size is None else outputs | {"state_size_bytes": logits.new_tensor([size])}


ADAPTERS = {
    "baseconv": baseconv,
    "h3": h3,
    "hyena": hyena,
    "lm": lm,
    "mha": mha,
    "mqar": mqar_examples,
    "rwkv_time_mixer": rwkv_time_mixer,
    "sigmoid_lookups": sigmoid_lookups,
}
