"""Zoology: every mixer against its definition, decoding and padding, the look-up gate's rules, checkpoints, text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock.data.base import Source
from penstock.data.recall import UNLABELLED, RecallConfig, RecallData, mqar, read_recall
from penstock.errors import UserError
from penstock.interop.create import create_model, list_models, load_authors
from penstock.lab.config import override
from penstock.lab.results import Results
from penstock.nn.conditional import evaluate_everything
from penstock.nn.experts import collect_losses
from penstock.systems.sequence.zoology.checkpoint import load_mixer
from penstock.systems.sequence.zoology.convolutions import H3, BaseConv, Hyena, convolve_so_far
from penstock.systems.sequence.zoology.experiment import (
    SYSTEM,
    LookupLanguageModelling,
    ZoologyConfig,
    lookup_use,
)
from penstock.systems.sequence.zoology.lookups import MHA, LookupGate, Lookups
from penstock.systems.sequence.zoology.mixers import Mixer, TokenSpan
from penstock.systems.sequence.zoology.model import VARIANTS, LanguageModel, make_mixer, register_mixer
from penstock.systems.sequence.zoology.rwkv import RWKVTimeMixer, wkv
from penstock.systems.sequence.zoology.sweep import Sweep, sweep_figure, train_cell
from penstock.systems.sequence.zoology.text_recall import Bigrams, recall_hits, recall_losses
from penstock.tasks.associative_recall import AssociativeRecall

GOLDEN = Path(__file__).parent / "golden" / "zoology"
LMAX = 12
MIXERS: dict[str, list[dict[str, Any]]] = {
    "short": [{"name": "BaseConv", "l_max": LMAX, "kernel_size": 3}],
    "explicit": [{"name": "BaseConv", "l_max": LMAX, "kernel_size": -1, "implicit_long_conv": False}],
    "implicit": [{"name": "BaseConv", "l_max": LMAX, "kernel_size": -1, "use_act": True}],
    "hyena": [{"name": "Hyena", "l_max": LMAX, "filter_order": 8}],
    "h3": [{"name": "H3", "d_state": 6, "head_dim": 2}],
    "h3_cut": [{"name": "H3", "d_state": 8, "l_max": 5}],
    "rwkv": [{"name": "RWKVTimeMixer", "n_layer": 2}],
    "mha": [{"name": "MHA", "num_heads": 2}],
    "lookups": [{"name": "SigmoidLookups", "scope": "prefix", "n_lookups": 3}],
    "lookups_root": [{"name": "SigmoidLookups", "scope": "prefix", "num_heads": 2}],
    "softmax": [{"name": "SigmoidLookups", "scope": "prefix", "selection": "softmax"}],
    "two_way": [{"name": "SigmoidLookups", "scope": "prefix", "selection": "two_way_softmax"}],
    "seen_before": [{"name": "SigmoidLookups", "selection": "seen_before"}],
    "hybrid": [{"name": "BaseConv", "l_max": LMAX, "kernel_size": 3}, {"name": "MHA"}],
}
TOKENS = torch.randint(9, (3, LMAX), generator=torch.Generator().manual_seed(1))


def lm(mixers: list[dict[str, Any]], *, positions: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(11, 8, 2, mixers=mixers, max_position_embeddings=positions, **options).double()
    for name, parameter in model.named_parameters():
        if "A_" not in name and "log_dt" not in name and "time_" not in name:
            nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(False)


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -- one door for all mixers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("cuts", [(12,), (5, 7), (4, 1, 1, 6), (1,) * 12])
def test_decoding_gives_what_the_full_pass_gives(name: str, cuts: tuple[int, ...]) -> None:
    model = lm(MIXERS[name], positions=LMAX if name == "mha" else 0)
    cache = model.new_cache()
    parts = [model(piece, cache=cache) for piece in TOKENS.split(cuts, 1)]
    close(torch.cat(parts, 1), model(TOKENS))
    assert cache.num_bytes() > 0


@pytest.mark.parametrize("name", MIXERS)
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model = lm(MIXERS[name], positions=LMAX if name == "mha" else 0)
    for left, right in ((3, 0), (0, 4), (2, 1)):
        real = TOKENS[:, : LMAX - left - right]
        padded = nn.functional.pad(real, (left, right), value=7)
        mask = nn.functional.pad(torch.ones_like(real, dtype=torch.bool), (left, right))
        close(model(padded, mask_BL=mask)[:, left : left + real.shape[1]], model(real))


@pytest.mark.parametrize("name", MIXERS)
def test_left_padded_batches_decode(name: str) -> None:
    model = lm(MIXERS[name])
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, :2] = False
    cache = model.new_cache()
    first = model(TOKENS[:, :6], cache=cache, mask_BL=mask[:, :6])
    rest = [model(TOKENS[:, t : t + 1], cache=cache) for t in range(6, LMAX)]
    together = torch.cat([first, *rest], 1)
    close(together[0], model(TOKENS[:1])[0])
    close(together[1, 2:], model(TOKENS[1:2, 2:])[0])


@pytest.mark.parametrize("name", MIXERS)
def test_future_tokens_do_not_reach_the_past(name: str) -> None:
    model = lm(MIXERS[name])
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 9
    close(model(TOKENS)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(TOKENS)[:, 8:], model(changed)[:, 8:])


@pytest.mark.parametrize("name", MIXERS)
def test_checkpointing_keeps_gradients_and_penalties(name: str) -> None:
    gradients, penalties = [], []
    for checkpointing in (False, True):
        model = lm(MIXERS[name], embed_dropout=0.0).train().requires_grad_(True)
        model.gradient_checkpointing = checkpointing
        with collect_losses() as losses:
            out = model(TOKENS).square().mean()
        penalties.append([float(value.detach()) for value in losses.values()])
        with collect_losses():  # what is computed again adds its losses again
            (out + sum(losses.values())).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert penalties[0] == penalties[1]
    for key, gradient in gradients[0].items():
        close(gradients[1][key], gradient)


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "mha"])
def test_gates_are_watched_and_forced(name: str) -> None:
    model = lm(MIXERS[name])
    plain = model(TOKENS)
    gates = list(penstock.gates.named_gates(model))
    with penstock.watch(model, keep="values") as log:
        assert torch.equal(model(TOKENS), plain)
    for gate in gates:
        (values,) = log.values()[gate]
        with penstock.force(model, values, gate):
            close(model(TOKENS), plain)
        if float(values.std()) > 0:
            with penstock.force(model, "shuffle", gate):
                assert not torch.allclose(model(TOKENS), plain)
    with penstock.force(model, "open"):
        close(penstock.twin(model)(TOKENS), model(TOKENS))
    twin = penstock.twin(model)
    cache = twin.new_cache()
    close(torch.cat([twin(piece, cache=cache) for piece in TOKENS.split(4, 1)], 1), twin(TOKENS))


def test_training_and_evaluation_differ_only_where_they_should() -> None:
    for name in ("short", "explicit", "hyena", "h3", "rwkv", "mha", "seen_before"):
        model = lm(MIXERS[name], embed_dropout=0.0)
        close(model(TOKENS), model.train()(TOKENS))


# -- each mixer against its definition -------------------------------------------------------------------------


X = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def convolved(x: Tensor, filters: Tensor) -> Tensor:
    """y_t = sum_s f_{t - s} x_s, one term after the other."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for s in range(t + 1):
            if t - s < filters.shape[1]:
                y[:, t] += filters[:, t - s] * x[:, s]
    return y


@pytest.mark.parametrize("kernel_size", [1, 4, -1])
@pytest.mark.parametrize("use_act", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_base_conv_is_its_equation(kernel_size: int, use_act: bool, implicit: bool) -> None:
    torch.manual_seed(0)
    mixer = BaseConv(6, 9, kernel_size=kernel_size, use_act=use_act, implicit_long_conv=implicit).double()
    if kernel_size == -1:
        u = convolved(X, mixer.conv.filters(9)) + X
    else:
        u = convolved(X, mixer.conv.weight.squeeze(1).flip(-1)) + mixer.conv.bias
    gate = X @ mixer.gate.proj.weight.T + mixer.gate.proj.bias
    act = nn.functional.silu if use_act else nn.Identity()
    close(mixer(X), act(u) * act(gate) + X)
    with penstock.force(mixer, "open"):
        close(mixer(X), act(u) + X)
    ungated = BaseConv(
        6, 9, kernel_size=kernel_size, use_act=use_act, implicit_long_conv=implicit, gated=False
    ).double()
    ungated.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("gate.")})
    close(ungated(X), act(u) + X)


def test_implicit_filters_are_functions_of_the_place_among_l_max() -> None:
    torch.manual_seed(0)
    mixer = BaseConv(6, 20, kernel_size=-1).double()
    n = torch.arange(20)
    w = 2 * math.pi * n / 20
    z = torch.stack([n / 19, torch.exp(-1j * 1e-4 * w).real, torch.exp(-1j * 1e-4 * w).imag], -1)
    close(mixer.conv.features, z.double(), 1e-6)
    first, _, last = mixer.conv.mlp
    hidden = (mixer.conv.features @ first.weight.T + first.bias).clamp(min=0)
    close(mixer.conv.filters(9), (hidden @ last.weight.T + last.bias).T[:, :9])


@pytest.mark.parametrize("l_max", [9, 14])
def test_hyena_is_its_equation(l_max: int) -> None:
    torch.manual_seed(0)
    mixer = Hyena(6, l_max, filter_order=5, short_filter_order=4).double()

    def short(projection: Any) -> Tensor:
        u = X @ projection.proj.weight.T + projection.proj.bias
        return convolved(u, projection.conv.weight.squeeze(1).flip(-1)) + projection.conv.bias

    x1, x2, v = short(mixer.pre_gate.projection), short(mixer.post_gate.projection), short(mixer.value)
    h = mixer.filter.features
    for layer in mixer.filter.layers:
        h = torch.sin(mixer.filter.frequencies * (h @ layer.weight.T + layer.bias))
    t = torch.linspace(0, 1, l_max, dtype=torch.float64)[:, None]
    delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 6, dtype=torch.float64)
    taps = (h @ mixer.filter.output.weight.T * torch.exp(-t * delta.abs()))[:9].T
    y = (convolved(v * x1, taps) + mixer.filter.skip * v * x1) * x2
    close(mixer(X), y @ mixer.out_proj.weight.T + mixer.out_proj.bias, 1e-5)  # t and delta were made in float32
    with penstock.force(mixer, "open"):
        opened = convolved(v, taps) + mixer.filter.skip * v
        close(mixer(X), opened @ mixer.out_proj.weight.T + mixer.out_proj.bias, 1e-5)


@pytest.mark.parametrize(("head_dim", "l_max"), [(1, None), (2, None), (3, 4)])
def test_h3_is_two_recurrences_and_two_products(head_dim: int, l_max: int | None) -> None:
    torch.manual_seed(0)
    mixer = H3(6, d_state=8, head_dim=head_dim, l_max=l_max).double()
    length = X.shape[1]
    q, k, v = (p(X) for p in (mixer.query_gate, mixer.k_proj, mixer.v_proj))
    k = convolved(k, mixer.shift.C[:, :l_max]) + mixer.shift.D * k
    d = mixer.diagonal
    b, c = torch.view_as_complex(d.B.detach()), torch.view_as_complex(d.C.detach())
    a, dt = torch.complex(-d.inv_A_real.exp(), d.A_imag), d.log_dt.exp()[:, None]
    y = torch.zeros_like(X)
    heads = 6 // head_dim
    for head in range(heads):
        state = torch.zeros(2, head_dim, head_dim, 4, dtype=torch.complex128)
        step, write = (1 + dt * a / 2) / (1 - dt * a / 2), b * dt / (1 - dt * a / 2)
        history: list[Tensor] = []
        for t in range(length):
            at = slice(head * head_dim, (head + 1) * head_dim)
            kv = v[:, t, at, None] * k[:, t, None, at]
            history.append(kv)
            state = step[head] * state + write[head] * kv[..., None]
            read = 2 * (state * c[head]).sum(-1).real
            if l_max is not None and t >= l_max:  # a cut kernel forgets what is l_max tokens old
                read = sum(
                    2 * (c[head] * write[head] * step[head] ** lag).sum().real * history[t - lag]
                    for lag in range(l_max)
                )
            out = ((read + d.D[head] * kv) * q[:, t, None, at]).sum(-1)
            y[:, t, head::heads] = out
    close(mixer(X), mixer.output_linear(y), 1e-9)


def test_rwkv_is_its_sum_and_survives_large_exponents() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 9, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    w, u = -torch.rand(6, dtype=torch.float64, generator=generator), torch.randn(6, dtype=torch.float64)
    expected = torch.empty_like(v)
    for t in range(9):
        weights = torch.stack([torch.exp((t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])], 1)
        expected[:, t] = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
    close(wkv(k, v, w, u), expected)
    close(wkv(k + 800, v, w, u), expected, 1e-9)  # exp(800) is beyond float64
    assert torch.isfinite(wkv((k * 200).float(), v.float(), w.float() * 1e4, u.float())).all()
    inputs = [part.requires_grad_() for part in (k, v, w, u)]
    assert torch.autograd.gradcheck(wkv, inputs)


def test_rwkv_starts_as_the_authors_do() -> None:
    first, last = (RWKVTimeMixer(8, n_layer=4, layer_idx=i) for i in (0, 3))
    h = torch.arange(8.0)
    close(first.time_decay, -5 + 8 * (h / 7) ** 0.7, 1e-6)
    close(last.time_decay, -5 + 8 * (h / 7) ** 2.0, 1e-6)
    close(first.time_first, math.log(0.3) + 0.5 * torch.tensor([0.0, 1, -1, 0, 1, -1, 0, 1]), 1e-6)
    close(last.time_mix_k, (h / 8) ** 0.25, 1e-6)
    close(last.time_mix_v, (h / 8) ** 0.25 + 0.3, 1e-6)
    close(last.time_mix_r, (h / 8) ** 0.125, 1e-6)


def test_one_output_of_a_long_convolution_needs_no_transform() -> None:
    filters = torch.randn(6, 5, dtype=torch.float64)
    close(convolve_so_far(X[:, -1:], X, filters, 0.5), (convolved(X, filters) + 0.5 * X)[:, -1:])


# -- the look-up gate ------------------------------------------------------------------------------------------


def lookups(**options: Any) -> Lookups:
    torch.manual_seed(0)
    return Lookups(6, **options).double().eval().requires_grad_(False)


@pytest.mark.parametrize(("n_lookups", "kept"), [(None, 3), (2, 2), (40, 9)])
def test_in_evaluation_the_highest_gates_keep_their_values(n_lookups: int | None, kept: int) -> None:
    mixer = lookups(n_lookups=n_lookups)
    dense = torch.sigmoid(X @ mixer.gate.proj.weight.T)
    values = mixer.gate(X)
    chosen = dense.topk(kept, 1).indices
    close(values, torch.zeros_like(dense).scatter(1, chosen, dense.gather(1, chosen)))
    close(mixer(X), X + values * mixer.attention(X))
    close(mixer.gate.train()(X), dense)


def test_the_root_of_the_length_is_rounded_up_and_counts_real_tokens() -> None:
    mixer = lookups()
    for length, kept in ((1, 1), (4, 2), (5, 3), (9, 3)):
        assert int((mixer.gate(X[:, :length]) != 0).sum(1).max()) == kept
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    assert (mixer.gate(X, mask) != 0).sum((1, 2)).tolist() == [2, 3]
    assert (mixer.gate(X, mask)[0, 4:] == 0).all()


def test_prefix_scope_keeps_who_is_among_the_highest_up_to_itself() -> None:
    mixer = lookups(n_lookups=2, scope="prefix")
    dense = torch.sigmoid(X @ mixer.gate.proj.weight.T)
    values = mixer.gate(X)
    for row in range(2):
        for t in range(9):
            among = dense[row, t, 0] >= dense[row, : t + 1, 0].topk(min(2, t + 1)).values.min()
            assert float(values[row, t, 0]) == (float(dense[row, t, 0]) if among else 0.0)


def test_sequence_scope_is_not_causal_and_decoding_goes_by_the_prefix() -> None:
    whole, prefix = (lm([{"name": "SigmoidLookups", "n_lookups": 2, "scope": s}]) for s in ("sequence", "prefix"))
    changed = TOKENS.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 9
    assert not torch.allclose(whole(TOKENS)[:, :6], whole(changed)[:, :6])
    close(whole(TOKENS, cache=whole.new_cache()), prefix(TOKENS))


@pytest.mark.parametrize("scope", ["sequence", "prefix"])
@pytest.mark.parametrize("selection", ["softmax", "two_way_softmax"])
def test_other_selections(selection: Any, scope: Any) -> None:
    mixer = lookups(selection=selection, scope=scope)
    gate = mixer.gate
    scores = X @ gate.proj.weight.T + gate.proj.bias
    if selection == "two_way_softmax":
        close(gate.temperature, torch.tensor([0.3 * 6**0.5], dtype=torch.float64), 1e-6)
        expected = (scores / gate.temperature).softmax(-1)[..., 1]
    elif scope == "sequence":
        expected = scores.squeeze(-1).softmax(1)
    else:
        expected = torch.stack([scores[:, : t + 1, 0].softmax(1)[:, -1] for t in range(9)], 1)
    close(gate.before_selection(X), expected)
    close(gate.train()(X).squeeze(-1), expected)
    with collect_losses() as losses:
        mixer.train()(X)
    assert not losses  # only the sigmoid has a budget to keep


def test_seen_before_opens_where_a_token_returns() -> None:
    mixer = lookups(selection="seen_before")
    tokens = torch.tensor([[3, 5, 3, 3, 5, 7], [1, 2, 3, 4, 5, 6]])
    assert mixer.gate(tokens).squeeze(-1).tolist() == [[0, 0, 1, 1, 1, 0], [0] * 6]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 0] = False
    assert mixer.gate(tokens, mask)[0].squeeze(-1).tolist() == [0, 0, 0, 1, 1, 0]
    x = X[:, :6]
    span = TokenSpan(torch.arange(6), tokens=tokens)
    close(mixer(x, span)[1], x[1])
    with pytest.raises(ValueError, match="goes by tokens"):
        mixer(x)


@pytest.mark.parametrize("n_lookups", [None, 2, 9])
def test_the_penalty_is_what_is_open_beyond_the_budget(n_lookups: int | None) -> None:
    mixer = lookups(n_lookups=n_lookups, selection_penalty=0.5).train()
    with collect_losses() as losses:
        y = mixer(X)
    g = torch.sigmoid(X @ mixer.gate.proj.weight.T)
    close(y, X + g * mixer.attention(X))
    close(losses["lookups"], 0.5 * (g.mean() - (3 if n_lookups is None else n_lookups) / 9).clamp(min=0))


def test_shut_positions_are_left_out_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = lookups(n_lookups=2, num_heads=2)
    seen: list[int] = []
    at = MHA.at

    def counting(self: MHA, x: Tensor, places: Tensor, *rest: Any) -> Tensor:
        seen.append(places.shape[1])
        return at(self, x, places, *rest)

    monkeypatch.setattr(MHA, "at", counting)
    sparse = mixer(X)
    with evaluate_everything():
        close(sparse, mixer(X))
    assert seen == [2]
    with penstock.force(mixer, "open"):
        close(mixer(X), X + mixer.attention(X))
    with penstock.force(mixer, "closed"):
        close(mixer(X), X)
    assert seen == [2, 0]
    ragged = torch.zeros(2, 9, 1, dtype=torch.float64)
    ragged[0, 3], ragged[1, [1, 5, 8]] = 0.5, 2.0
    with penstock.force(mixer, ragged):
        close(mixer(X), X + ragged * mixer.attention(X))
    assert seen == [2, 0, 3]
    mixer.requires_grad_(True)(X)
    assert seen == [2, 0, 3], "a gate that is zero may still be due a gradient"


def test_ungated_lookups_are_attention_everywhere() -> None:
    mixer = lookups(selection=None)
    close(mixer(X), X + mixer.attention(X))
    assert not penstock.gates.spec_of(mixer.attention)


# -- the model -------------------------------------------------------------------------------------------------


def test_parameters_of_the_miniature_are_the_papers() -> None:
    """The sizes of the specification's runs: width 32, 64 tokens, length 24."""
    arms = SYSTEM.arms(ZoologyConfig(), {"vocab_size": 64, "window": 24})
    counts = {name: sum(p.numel() for p in build().parameters()) for name, build in arms.items()}
    embedding, norms, attention, short = 64 * 32, 5 * 64, 4 * 32 * 33, 32 * 33 + 32 * 4
    assert counts["hybrid"] == counts["ungated"] == embedding + norms + attention + short == 7776
    assert counts["gated"] == 7776 + 32
    assert counts["attention"] == embedding + norms + 2 * attention + 24 * 32
    implicit = 3 * 16 + 16 + 17 * 32
    assert counts["baseconv"] == embedding + norms + short + 32 * 33 + implicit
    assert counts["baseconv_ungated"] == counts["baseconv"] - 2 * 32 * 33


def test_state_sizes_are_the_papers() -> None:
    def size(*mixers: dict[str, Any], length: int = 10) -> int | None:
        return lm(list(mixers)).state_size(length)

    assert size(MIXERS["mha"][0]) == 4 * 2 * (2 * 8 * 10)
    assert size(MIXERS["short"][0]) == 4 * 2 * (8 * 3)
    assert size(MIXERS["implicit"][0], length=7) == 4 * 2 * (8 * 7)
    assert size(MIXERS["hyena"][0]) == 4 * 2 * (8 * 10)
    assert size(MIXERS["h3"][0]) == 4 * 2 * (8 * 6)
    assert size(MIXERS["short"][0], MIXERS["mha"][0]) == 4 * (8 * 3 + 2 * 8 * 10)
    assert size(MIXERS["rwkv"][0]) is None
    assert size(MIXERS["short"][0], MIXERS["lookups"][0]) is None


def test_initial_weights_are_small_and_smaller_where_branches_end() -> None:
    torch.manual_seed(0)
    model = LanguageModel(500, 256, 4, mixers=[{"name": "MHA"}], mlp_hidden=512)
    assert float(model.layers[0].mixer.Wqkv.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for last in (model.layers[1].mixer.out_proj, model.layers[2].state_mixer.fc2):
        assert float(last.weight.detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)
        assert float(last.bias.detach().abs().max()) == 0.0
    assert model.lm_head.weight is model.word_embeddings.weight
    frozen = LanguageModel(9, 8, 1, mixers=[{"name": "MHA"}], learnable_word_embeddings=False)
    assert frozen.lm_head.weight is not frozen.word_embeddings.weight
    assert not frozen.word_embeddings.weight.requires_grad


def test_without_an_mlp_the_second_norm_is_added() -> None:
    model = lm(MIXERS["mha"])
    x = X[..., :1].expand(-1, -1, 8) + torch.randn(2, 9, 8, dtype=torch.float64)
    block = model.layers[0]
    span = TokenSpan(torch.arange(9))
    h = x + block.mixer(block.norm1(x))
    close(block(x, span, 0), h + block.norm2(h))


@pytest.mark.parametrize(
    ("mixer", "says"),
    [
        ({"name": "BaseConv", "l_max": 8, "kernel_size": [3]}, r"kernel_size=\[3\] has no entry for layer 1"),
        ({"name": "BaseConv", "l_max": 8, "kernel_size": 0}, "kernel_size=0 must be 1 or more, or -1"),
        ({"name": "MHA", "num_heads": 3}, "num_heads=3 must divide d_model=8"),
        ({"name": "H3", "head_dim": 3}, "head_dim=3 must divide d_model=8"),
        ({"name": "H3", "d_state": 5}, "d_state=5 must be even"),
        ({"name": "RWKVTimeMixer", "n_layer": 1}, "n_layer=1 must be 2 or more"),
        ({"name": "SigmoidLookups", "n_lookups": 0}, "n_lookups=0 must be 1 or more"),
        ({"name": "Hyena"}, "mixer 'Hyena': .*l_max"),
        ({"name": "Mamba"}, "mixer 'Mamba' is not known; there are BaseConv"),
    ],
)
def test_impossible_mixers_are_refused(mixer: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LanguageModel(9, 8, 2, mixers=[mixer])


def test_impossible_models_and_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="0 mixers: at least one of each"):
        LanguageModel(9, 8, 2, mixers=[])
    with pytest.raises(ValueError, match="must not be negative"):
        LanguageModel(9, 8, 2, mixers=MIXERS["mha"], mlp_hidden=-1)
    with pytest.raises(ValueError, match="13 tokens: this BaseConv was built for l_max=12"):
        BaseConv(6, LMAX, kernel_size=-1)(torch.zeros(1, 13, 6))
    with pytest.raises(ValueError, match="13 tokens"):
        lm(MIXERS["hyena"])(torch.zeros(1, 13, dtype=torch.int64))
    assert lm(MIXERS["short"])(torch.zeros(1, 40, dtype=torch.int64)).shape == (1, 40, 11)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 4] = False
    with pytest.raises(ValueError, match="row 1 has padding between tokens"):
        lm(MIXERS["short"])(TOKENS, mask_BL=mask)


class Shift(nn.Module):
    """A mixer of one's own: the previous token."""

    def __init__(self, d_model: int, layer_idx: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] * self.scale


def test_a_mixer_of_ones_own() -> None:
    register_mixer("Shift", Shift)
    register_mixer("Shift", Shift)
    with pytest.raises(ValueError, match="there is a mixer 'Shift' already"):
        register_mixer("Shift", BaseConv)
    model = lm([{"name": "Shift", "scale": 2.0}])
    close(make_mixer({"name": "Shift", "scale": 2.0}, 6, 0)(X)[:, 1:], 2 * X[:, :-1])
    assert model(TOKENS).shape == (3, LMAX, 11)
    assert model.state_size(5) is None
    with pytest.raises(ValueError, match="Shift takes tokens only"):
        model(TOKENS, cache=model.new_cache())
    config = override(ZoologyConfig(), {"mixer": f"{__name__}.Shift"})
    arms = SYSTEM.arms(config, {"vocab_size": 64, "window": 24})
    assert arms["own"]()(TOKENS).shape == (3, LMAX, 64)
    with pytest.raises(UserError, match=r'must be "module.Class"'):
        SYSTEM.arms(override(config, {"mixer": "no.such.Thing"}), {"vocab_size": 64, "window": 24})


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_models_of_figure_2_have_their_parameters(name: str) -> None:
    assert name in list_models("zoology_*")
    with torch.device("meta"):
        model = create_model(name, length=128)
    _, kind, width = name.split("_")
    d = int(width)
    linear, embedding, norms = d * d + d, 8192 * d, 5 * 2 * d
    mixers = {
        "attention": 2 * 4 * linear + 128 * d,
        "baseconv": 2 * linear + 4 * d + (3 * 16 + 16 + 17 * d),
        "hyena": 2 * (4 * linear + 3 * 4 * d + d + 128 * 3 + 64 + 4 * 64 + 2 * 65 * 64 + 64 * d),
        "h3": 2 * (4 * linear + d * 128 + d + d // 2 * (2 + 64 * 6)),
        "rwkv": 2 * (4 * d * d + 5 * d),
    }
    assert sum(p.numel() for p in model.parameters()) == embedding + norms + mixers[kind]


# -- checkpoints -----------------------------------------------------------------------------------------------


def stored(case: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """A golden case's configuration, parameters and input."""
    arrays = np.load(GOLDEN / f"{case}.npz")
    config = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    parameters = {k.removeprefix("param."): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("param.")}
    return config, parameters, torch.from_numpy(arrays["in.x"])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("baseconv_short", "BaseConv"), ("baseconv_long_implicit", "BaseConv"), ("hyena", "Hyena"), ("h3", "H3"),
        ("rwkv_time_mixer", "RWKVTimeMixer"), ("sigmoid_lookups", "SigmoidLookups"), ("mha", "MHA"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_models_layers_are_told_by_their_tensors(case: str, name: str, hybrid: bool) -> None:
    config, parameters, x = stored(case)
    width, dtype = config["d_model"], x.dtype
    state = {"backbone.embeddings.word_embeddings.weight": torch.randn(7, width, dtype=dtype)}
    for i in range(2):
        prefix = f"backbone.layers.{i}."
        inner = f"{prefix}sequence_mixer.{'mixer.' if hybrid else ''}"
        state |= {inner + key: value for key, value in parameters.items()}
        for norm in ("norm1", "norm2"):
            state |= {f"{prefix}{norm}.weight": torch.ones(width), f"{prefix}{norm}.bias": torch.zeros(width)}
    state |= {"backbone.ln_f.weight": torch.ones(width), "backbone.ln_f.bias": torch.zeros(width)}
    told = {"mha": [{"name": "MHA", "num_heads": config.get("num_heads")}]}.get(case)
    model = load_authors("zoology", state, mixers=told).eval()
    alone = load_mixer(name, parameters, **{k: v for k, v in config.items() if k != "layer_idx"}).eval()
    for layer in model.layers:
        close(layer.mixer(x), alone(x), 1e-6)


def test_checkpoint_problems_are_named() -> None:
    config, parameters, _ = stored("baseconv_short")
    with pytest.raises(UserError, match=r"missing: gate.proj.bias"):
        load_mixer("BaseConv", {k: v for k, v in parameters.items() if k != "projection.bias"}, **config)
    with pytest.raises(UserError, match="it is none of zoology's"):
        load_authors("zoology", parameters)
    state = {
        "backbone.embeddings.word_embeddings.weight": torch.randn(7, 8),
        "backbone.layers.0.sequence_mixer.A_log": torch.zeros(8),
    }
    with pytest.raises(UserError, match="layer 0: no known mixer has A_log"):
        load_authors("zoology", state)
    with pytest.raises(UserError, match="layer 0: mixer 'Mamba' is none of zoology's"):
        load_authors("zoology", state, mixers=[{"name": "Mamba"}])


def test_an_untied_head_stays_untied() -> None:
    model = lm(MIXERS["mha"], learnable_word_embeddings=False)
    authors = {}
    for key, value in model.state_dict().items():
        key = key.replace(".mixer.", ".sequence_mixer.")
        authors[key if key.startswith("lm_head") else "backbone." + key.replace("word_", "embeddings.word_")] = value
    again = load_authors("zoology", authors, mixers=MIXERS["mha"]).eval()
    close(again(TOKENS), model(TOKENS))
    assert again.lm_head.weight is not again.word_embeddings.weight


# -- the experiment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(SYSTEM.presets))
def test_presets_are_the_papers_and_build(preset: str) -> None:
    config = SYSTEM.presets[preset]
    (length,) = config.recall.lengths
    assert config.recall.pairs == ({64: 4, 128: 8, 256: 16, 512: 64}[length],)
    assert config.train.steps == 64 * math.ceil(100_000 / config.train.batch_size)
    for build in SYSTEM.arms(config, {"vocab_size": 8192, "window": length}).values():
        with torch.device("meta"):
            build()
    with pytest.raises(UserError, match=r"--sweep\.mixers mamba: there is no such arm"):
        SYSTEM.arms(override(config, {"sweep.mixers": ("mamba",)}), {"vocab_size": 64, "window": 24})


def test_data_is_told_by_the_file(tmp_path: Path) -> None:
    config = override(ZoologyConfig(), {"data.window": 16, "recall.train_examples": 8, "recall.test_examples": 8})
    assert isinstance(SYSTEM.load_data(config, Source()), RecallData)
    batch = mqar(64, 40, 24, 3, seed=0)
    np.savez(tmp_path / "own.npz", inputs=batch.inputs.numpy(), labels=batch.labels.numpy())
    own = SYSTEM.load_data(config, Source(tmp_path / "own.npz"))
    assert SYSTEM.task_for(own.spec) is AssociativeRecall
    (tmp_path / "text.txt").write_text("some text " * 200)
    text = SYSTEM.load_data(config, Source(tmp_path / "text.txt"))
    assert SYSTEM.task_for(text.spec) is LookupLanguageModelling


def text_data(tmp_path: Path) -> Any:
    (tmp_path / "text.txt").write_text("".join(f"line {i % 7} of {i % 11}\n" for i in range(900)))
    config = override(ZoologyConfig(), {"data.window": 24, "width": 16, "depth": 2, "mlp_hidden": 12})
    return config, SYSTEM.load_data(config, Source(tmp_path / "text.txt"))


def test_on_text_the_same_arms_are_language_models(tmp_path: Path) -> None:
    config, data = text_data(tmp_path)
    arms = SYSTEM.arms(config, data.spec)
    assert list(arms)[:2] == ["gated", "ungated"]
    batch = next(iter(data.test(4)))
    for name, build in arms.items():
        torch.manual_seed(0)
        model = build()
        assert model.layers[0].state_mixer.fc1.out_features == 12, name
        (make,) = SYSTEM.stages(name, model, config, data)
        stage = make()
        train = stage.task.train_config
        assert (train.steps, train.batch_size, train.lr) == (350, 16, 3e-3)
        stage.task.train()
        loss, logits = stage.task.step(batch)
        extra = loss.detach() - stage.task.reported_loss(loss, logits, batch).detach()
        assert (float(extra) > 1e-4) == (name == "gated"), name
        model.eval()
        changed = batch[:, :-1].clone()
        changed[:, 15:] = (changed[:, 15:] + 1) % 256
        torch.testing.assert_close(model(batch[:, :-1])[:, :15], model(changed)[:, :15], rtol=0, atol=1e-4)
        measured = SYSTEM.measure(name, stage.task.eval(), config, data, 0)
        assert {"recall_share", "loss_recall", "loss_other"} <= measured.keys()
    assert not SYSTEM.claims(config, Results([{"arm": "hybrid", "seed": 0, "metrics": {"accuracy": 0.4}}], {}))


def test_settings_made_by_hand_hold_on_text(tmp_path: Path) -> None:
    config, data = text_data(tmp_path)
    changed = override(config, {"train.steps": 7, "train.lr": 1e-2})
    (make,) = SYSTEM.stages("gated", SYSTEM.arms(changed, data.spec)["gated"](), changed, data)
    assert (make().task.train_config.steps, make().task.train_config.lr) == (7, 1e-2)


def test_lookup_arms_train_longer_on_recall() -> None:
    config = override(ZoologyConfig(), {"recall.train_examples": 64, "recall.test_examples": 16, "stop_above": 0.5})
    data = SYSTEM.load_data(config, Source())
    steps = {}
    for name, build in SYSTEM.arms(config, data.spec).items():
        (make,) = SYSTEM.stages(name, build(), config, data)
        task = make().task
        steps[name] = task.train_config.steps
        assert isinstance(task, AssociativeRecall)
        assert task.stop_above == 0.5
    assert steps.pop("gated") == steps.pop("ungated") == 25 * 47
    assert set(steps.values()) == {12 * 47}


def test_use_of_the_look_up_gate_is_measured_where_it_is() -> None:
    data = read_recall(RecallConfig(train_examples=4, test_examples=32), Source())
    torch.manual_seed(0)
    model = SYSTEM.arms(ZoologyConfig(), data.spec)["gated"]().eval()
    gate = model.layers[1].mixer.gate
    asked: list[Tensor] = [batch.labels != UNLABELLED for batch in data.test(16)]
    calls = iter(asked)
    # A gate that knows the queries: high there, low elsewhere.
    gate.logits = lambda x: torch.where(current(), 3.0, -3.0)
    state: dict[str, Tensor] = {}

    def current() -> Tensor:
        return state["asked"]

    model.register_forward_pre_hook(lambda module, args: state.update(asked=next(calls)))
    found = lookup_use(model, data, 16)
    assert found["query_coverage"] == 1.0
    assert found["gate_at_queries"] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-6)
    assert found["gate_separation"] == pytest.approx(2 / (1 + math.exp(-3)) - 1, abs=1e-6)
    assert found["gate_mean"] == pytest.approx(
        (3 * found["gate_at_queries"] + 21 * found["gate_elsewhere"]) / 24, abs=1e-6
    )
    assert not gate._forward_hooks


def test_claims_are_judged_on_generated_recall_only() -> None:
    def cell(arm: str, seed: int, **metrics: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "metrics": {"guess": 1 / 3, **metrics}}

    cells = []
    for seed, accuracy in enumerate((0.99, 0.22, 0.98)):
        cells += [
            cell("hybrid", seed, accuracy=0.98), cell("baseconv", seed, accuracy=0.34),
            cell("attention", seed, accuracy=0.36 + seed / 100),
            cell("gated", seed, accuracy=accuracy, gate_separation=0.4 + seed / 10, query_coverage=0.99),
        ]  # fmt: skip
    claims = {
        k: e if isinstance(e, list) else [e] for k, e in SYSTEM.claims(ZoologyConfig(), Results(cells, {})).items()
    }
    assert set(claims) == {"recall_gap", "short_convolution", "lookup_gate", "lookup_coverage", "lookup_accuracy"}
    assert all(effect.verdict == "holds" for effects in claims.values() for effect in effects)
    assert claims["lookup_accuracy"][0].values == [0.98]
    assert claims["short_convolution"][0].values == pytest.approx([0.62, 0.61, 0.60])
    cells[3]["metrics"]["gate_separation"] = 0.29  # one seed is enough to fail
    assert SYSTEM.claims(ZoologyConfig(), Results(cells, {}))["lookup_gate"].verdict != "holds"  # type: ignore[union-attr]
    one = SYSTEM.claims(ZoologyConfig(), Results(cells[:4], {}))
    assert one["lookup_accuracy"].verdict == "undecided"  # type: ignore[union-attr]


def test_the_sweep_keeps_the_better_learning_rate_and_draws_a_line_a_mixer() -> None:
    data = read_recall(
        RecallConfig(vocab_size=32, lengths=(8,), pairs=(1,), train_examples=256, test_examples=64), Source()
    )
    build = lambda: LanguageModel(32, 16, 2, mixers=MIXERS["hybrid"], max_position_embeddings=0)  # noqa: E731
    train = ZoologyConfig().train
    cell = train_cell(build, data, train, Sweep(lrs=(1e-6, 1e-2), steps=8), seed=0)
    assert cell.lr == 1e-2
    assert 0 <= cell.accuracy <= 1
    assert cell.state_bytes == build().state_size(8)
    measured = {
        f"hybrid_{width}_{what}": value
        for width in (16, 32)
        for what, value in (("accuracy", width / 32), ("state_bytes", 4096.0 * width), ("lr", 1e-2))
    }
    figure = sweep_figure(Results([], {"width_sweep": [measured]}), Sweep(mixers=("hybrid",), widths=(16, 32)))
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[16, 0.5], [32, 1.0]]
    assert right.lines[0].get_xydata().tolist() == [[64, 0.5], [128, 1.0]]
    assert SYSTEM.figures(ZoologyConfig(), Results([], {})) == {}


# -- recall in text --------------------------------------------------------------------------------------------


def test_recall_hits_are_rare_bigrams_seen_before() -> None:
    text = np.array([1, 2, 1, 2, 1, 2, 5, 6])
    bigrams = Bigrams(text, 10)
    windows = torch.tensor([[1, 2, 5, 6, 1, 2, 5, 6, 0]])
    assert bigrams.counts(windows).tolist() == [[3, 1, 1, 0, 3, 1, 1, 0]]
    assert recall_hits(windows, bigrams, most=5).tolist() == [[False] * 4 + [True] * 3 + [False]]
    assert recall_hits(windows, bigrams, most=2).tolist() == [[False] * 5 + [True] * 2 + [False]]


def test_losses_on_hits_and_on_others_add_up() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.linspace(-1, 1, 10))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.bias.expand(*tokens.shape, -1)

    windows = torch.tensor([[1, 2, 5, 6, 1, 2, 5, 6, 0]])
    found = recall_losses(Constant(), [windows], Bigrams(windows[0].numpy(), 10), most=9)
    losses = -torch.linspace(-1, 1, 10).log_softmax(0)[windows[0, 1:]]
    assert found["recall_share"] == pytest.approx(3 / 8)
    assert found["loss_recall"] == pytest.approx(float(losses[[4, 5, 6]].mean()))
    assert found["loss_other"] == pytest.approx(float(losses[[0, 1, 2, 3, 7]].mean()))


def test_every_mixer_is_a_mixer() -> None:
    for name, settings in MIXERS.items():
        assert isinstance(make_mixer(settings[0], 8, 0), Mixer), name
    assert isinstance(make_mixer({"name": "SigmoidLookups"}, 8, 0).gate, LookupGate)
