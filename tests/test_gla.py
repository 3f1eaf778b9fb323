"""Gated linear attention: every option against a plain reference, states, padding, packing, checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.data.text import TextData
from penstock.errors import UserError
from penstock.interop.create import create_model, list_models, load_authors
from penstock.lab.cards import card
from penstock.lab.results import Results
from penstock.lab.system import system
from penstock.nn.causal_lm import Span, State
from penstock.ops import gated_linear_attention, last_backend
from penstock.systems.sequence.gla.baseline import SoftmaxAttention
from penstock.systems.sequence.gla.checkpoint import from_authors, load_layer, state_from_authors, to_authors
from penstock.systems.sequence.gla.experiment import GLAConfig, _cut, _long_windows
from penstock.systems.sequence.gla.model import (
    GLALM,
    Decay,
    GatedLinearAttention,
    PackedSpan,
    mlp_width,
)
from penstock.systems.sequence.gla.trials import decode_cost, forms
from penstock.tasks.base import Training
from penstock.tasks.language_modelling import LanguageModelling

Tensors = dict[str, Tensor]
GOLDEN = Path(__file__).parent / "golden" / "gla"
ACTIVATIONS = {
    "swish": lambda x: x * x.sigmoid(),
    "silu": lambda x: x * x.sigmoid(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "sqrelu": lambda x: x.clamp(min=0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "logsigmoid": lambda x: -torch.log(1 + (-x).exp()),
}


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Parameters that leave nothing at its neutral value, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return module.eval()


def layer(seed: int = 0, **options: Any) -> GatedLinearAttention:
    return randomise(GatedLinearAttention(16, num_heads=4, **options), seed)


def lm(**options: Any) -> GLALM:
    return randomise(GLALM(31, 16, 2, 4, intermediate_size=24, **options))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS = torch.randint(31, (2, 21), generator=torch.Generator().manual_seed(1))
CONV = {"use_short_conv": True, "conv_size": 3, "conv_bias": True}


# -- against a plain reference ---------------------------------------------------------------------------------


def plain_layer(
    p: Tensors, x: Tensor, *, heads: int, kv_heads: int, feature_map: str | None = None, gate_fn: str = "swish",
    tau: float = 16.0, clamp_min: float | None = None, eps: float = 1e-5, paper: bool = False,
) -> Tensor:  # fmt: skip
    """The layer of one sample (L, D) under fla's names, token by token and head by head."""
    length, width = x.shape

    def projected(name: str) -> Tensor:
        y = x @ p[f"{name}_proj.weight"].T
        weight = p.get(f"{name}_conv1d.weight")
        if weight is None:
            return y
        out = torch.zeros_like(y)
        taps = weight.shape[-1]
        for t in range(length):
            for w in range(taps):
                if (at := t - (taps - 1) + w) >= 0:
                    out[t] += weight[:, 0, w] * y[at]
        if f"{name}_conv1d.bias" in p:
            out = out + p[f"{name}_conv1d.bias"]
        return ACTIVATIONS["silu"](out)

    q, k, v = projected("q"), projected("k"), projected("v")
    g = -torch.log1p((-(x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"])).exp()) / tau
    if clamp_min is not None:
        g = g.clamp(min=clamp_min)
    if feature_map is not None:
        q, k = ACTIVATIONS[feature_map](q), ACTIVATIONS[feature_map](k)
    if paper:
        k = k * (width / heads) ** -0.5
    key, value = q.shape[1] // heads, v.shape[1] // kv_heads
    outputs = []
    for h in range(heads):
        group = h // (heads // kv_heads)
        state = torch.zeros(key, value, dtype=x.dtype)
        rows = []
        for t in range(length):
            kv = slice(group * key, (group + 1) * key)
            state = g[t, kv].exp()[:, None] * state + torch.outer(k[t, kv], v[t, group * value : (group + 1) * value])
            o = key**-0.5 * q[t, h * key : (h + 1) * key] @ state
            if paper:
                o = o - o.mean()
            rows.append(o / (o.square().mean() + eps).sqrt() * p.get("g_norm.weight", torch.ones(value)))
        outputs.append(torch.stack(rows))
    y = torch.cat(outputs, 1)
    if "g_proj.weight" in p:
        y = y * ACTIVATIONS[gate_fn](x @ p["g_proj.weight"].T + p.get("g_proj.bias", torch.zeros(())))
    return y @ p["o_proj.weight"].T


def plain_names(ours: GatedLinearAttention) -> Tensors:
    renamed = {}
    for key, value in ours.state_dict().items():
        for a, b in (("decay_gate.proj", "gk_proj"), ("readout_gate.proj", "g_proj"), ("readout_norm", "g_norm")):
            key = key.replace(a, b)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, **CONV, "conv_size": 4},
        {**CONV, "conv_bias": False, "num_kv_heads": 2, "clamp_min": -0.05},
        {"clamp_min": -0.02, "gate_logit_normalizer": 1.0},
        {"gate_logit_normalizer": 4.0, "gate_low_rank_dim": 5, "norm_eps": 0.1},
        {"use_output_gate": False},
        {"elementwise_affine": False, "fuse_norm": False},
        {"expand_k": 1.0, "expand_v": 2.0},
        {"use_short_conv": True, "conv_size": 1},
        *({"feature_map": name} for name in ACTIVATIONS),
        *({"gate_fn": name} for name in ACTIVATIONS),
        {"variant": "paper"},
        {"mode": "recurrent"},
        {"mode": "chunk"},
        {"mode": "parallel"},
    ],
    ids=str,
)
def test_layer_is_the_plain_recurrence(options: dict[str, Any]) -> None:
    ours, x = layer(**options), draw(2, 19, 16)
    known = {"feature_map", "gate_fn", "clamp_min"}
    expected = [
        plain_layer(
            plain_names(ours),
            row,
            heads=4,
            kv_heads=options.get("num_kv_heads", 4),
            tau=options.get("gate_logit_normalizer", 16.0),
            eps=options.get("norm_eps", 1e-5),
            paper=options.get("variant") == "paper",
            **{key: value for key, value in options.items() if key in known},
        )
        for row in x
    ]
    torch.testing.assert_close(ours(x), torch.stack(expected), rtol=1e-10, atol=1e-10)
    if "mode" in options:
        assert last_backend["gated_linear_attention"] == options["mode"]


@pytest.mark.parametrize("case", ["op_recurrent", "op_mild_gate"])
@pytest.mark.parametrize("backend", ["recurrent", "chunk", "parallel"])
def test_every_form_gives_the_authors_numbers(case: str, backend: Any) -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{case}.npz").items()}
    leaves = [arrays[f"in.{n}"].requires_grad_() for n in ("q", "k", "v", "gk", "initial_state")]
    o, final = gated_linear_attention(*leaves, backend=backend, chunk_size=16)
    grads = torch.autograd.grad((o * arrays["in.grad_o"]).sum() + (final * arrays["in.grad_state"]).sum(), leaves)
    names = ("o", "final_state", "grad_q", "grad_k", "grad_v", "grad_gk", "grad_initial_state")
    for name, ours in zip(names, (o, final, *grads), strict=True):
        torch.testing.assert_close(ours.detach(), arrays[f"out.{name}"], rtol=1e-9, atol=1e-9, msg=name)


def test_forms_agree_to_rounding_with_decays_down_to_minus_150() -> None:
    measured = forms(0)
    assert set(measured) == {"chunk_16", "chunk_64", "parallel", "worst"}
    assert 0 < measured["worst"] < 1e-10


# -- the gates -------------------------------------------------------------------------------------------------


def test_open_decay_is_linear_attention_without_decay() -> None:
    gated, ungated = lm(), lm(decay="none")
    ungated.load_state_dict(gated.state_dict())
    plain = gated(TOKENS)
    with penstock.force(gated, "open", "*.decay_gate"):
        torch.testing.assert_close(gated(TOKENS), ungated(TOKENS), rtol=0, atol=1e-12)
    assert not torch.allclose(plain, ungated(TOKENS), atol=1e-4)


@pytest.mark.parametrize("mode", ["recurrent", "chunk", "parallel"])
def test_closed_decay_sees_only_the_current_token(mode: Any) -> None:
    ours, x = layer(mode=mode), draw(2, 40, 16)
    with penstock.force(ours, "closed", "decay_gate"):
        y = ours(x)
        alone = ours(x.flatten(0, 1)[:, None]).view_as(x)
        y.sum().backward()
    torch.testing.assert_close(y, alone, rtol=0, atol=1e-10)
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_fixed_decays_are_those_of_retnet() -> None:
    ours = layer(decay="fixed")
    values = ours.decay_gate(draw(2, 3, 16)).exp()
    torch.testing.assert_close(
        values, torch.tensor([[31 / 32], [63 / 64], [127 / 128], [255 / 256]], dtype=torch.float64)
    )
    x = draw(2, 12, 16)
    gated = layer()
    gated.load_state_dict(ours.state_dict())
    with penstock.force(gated, values.log().expand(2, 12, 4, 2), "decay_gate"):
        torch.testing.assert_close(gated(x), ours(x), rtol=0, atol=1e-12)


def test_one_decay_a_head_is_the_same_for_all_its_channels() -> None:
    ours, x = layer(decay="head"), draw(2, 12, 16)
    assert ours.decay_gate(x).shape == (2, 12, 4, 1)
    wide = layer()
    wide.load_state_dict(
        {k: v.repeat_interleave(2, 0) if "decay_gate.proj.1" in k else v for k, v in ours.state_dict().items()}
    )
    torch.testing.assert_close(wide(x), ours(x), rtol=0, atol=1e-12)


def test_arms_without_a_gate_keep_its_weights_frozen() -> None:
    sizes = {}
    decays: tuple[Decay, ...] = ("channel", "fixed", "none")
    for decay in decays:
        model = lm(decay=decay)
        sizes[decay] = sum(p.numel() for p in model.parameters())
        model(TOKENS).square().mean().backward()
        frozen = [n for n, p in model.named_parameters() if p.grad is None]
        assert all(".decay_gate.proj." in n for n in frozen)
        assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
        assert len(frozen) == (0 if decay == "channel" else 6)
    assert len(set(sizes.values())) == 1
    torch.manual_seed(3)
    gated = GLALM(31, 16, 1, 2, decay="channel")
    torch.manual_seed(3)
    ungated = GLALM(31, 16, 1, 2, decay="none")
    assert all(torch.equal(a, b) for a, b in zip(gated.parameters(), ungated.parameters(), strict=True))


@pytest.mark.parametrize("gate_fn", ["swish", "sqrelu", "logsigmoid"])
def test_shut_readout_gate_passes_nothing(gate_fn: Any) -> None:
    ours = layer(gate_fn=gate_fn)
    with penstock.force(ours, "closed", "readout_gate"):
        assert ours(draw(1, 5, 16)).abs().max() == 0
    with penstock.force(ours, "open", "readout_gate"):
        opened = ours(draw(1, 5, 16))
    without = layer(use_output_gate=False)
    without.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("readout_gate")})
    torch.testing.assert_close(opened, without(draw(1, 5, 16)), rtol=0, atol=1e-12)


def test_gates_are_seen_with_their_granularity() -> None:
    model = lm(num_kv_heads=2, clamp_min=-0.03)
    with penstock.watch(model, keep="values") as log:
        model(TOKENS)
    decay, readout = (log.values()[f"layers.1.self_attn.{n}_gate"][0] for n in ("decay", "readout"))
    assert decay.shape == (2, 21, 2, 2)  # before groups are repeated
    assert readout.shape == (2, 21, 4, 4)
    assert decay.min() == -0.03
    assert decay.max() < 0


def test_fresh_layer_forgets_over_some_sixteen_tokens() -> None:
    torch.manual_seed(0)
    for variant in ("fla", "paper"):
        ours = GatedLinearAttention(256, num_heads=4, variant=variant)
        alpha = ours.decay_gate(torch.randn(8, 256)[None]).exp()
        torch.testing.assert_close(alpha.mean(), torch.tensor(0.5 ** (1 / 16)), rtol=1e-2, atol=0)
        bound = (6 / (256 + 128)) ** 0.5 * 2**-2.5
        std = bound / 3**0.5 if variant == "paper" else 0.02
        torch.testing.assert_close(ours.q_proj.weight.std(), torch.tensor(std), rtol=0.03, atol=0)
        torch.testing.assert_close(ours.v_proj.weight.std(), torch.tensor(0.02), rtol=0.03, atol=0)
    model = GLALM(31, 256, 1, 4, variant="paper")
    assert float(model.layers[0].self_attn.k_proj.weight.detach().abs().max()) <= bound


# -- state, padding, packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, **CONV}, {"variant": "paper"}], ids=str)
def test_prefill_in_pieces_and_steps_equal_one_pass(options: dict[str, Any]) -> None:
    model = lm(**options)
    whole = model.new_cache()
    expected = model(TOKENS, cache=whole)
    torch.testing.assert_close(expected, model(TOKENS), rtol=0, atol=1e-12)
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in TOKENS.split([1, 9, 2, 7, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-10)


def test_state_has_one_size_and_float32_in_half_precision() -> None:
    model = GLALM(31, 16, 2, 4, intermediate_size=24, **CONV).to(torch.bfloat16)
    cache = model.new_cache()
    model(TOKENS, cache=cache)
    size = cache.num_bytes()
    logits = model(TOKENS, cache=cache)
    assert cache.num_bytes() == size
    assert logits.isfinite().all()
    state = cache.layers[0]
    assert state["recurrent_state"].dtype == torch.float32
    assert state["recurrent_state"].shape == (2, 4, 2, 4)
    assert state["conv_state_k"].shape == (2, 8, 3)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, **CONV}, {"feature_map": "sigmoid"}], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing_for_real_tokens(options: dict[str, Any], side: str) -> None:
    """Samples of 21 and 14 tokens, also when decoding goes on after the padding."""
    model = lm(**options)
    mask = torch.ones(2, 21, dtype=torch.bool)
    place = {"left": slice(0, 7), "right": slice(14, 21), "between": slice(5, 12)}[side]
    mask[1, place] = False
    following = torch.tensor([[3], [4]])
    cache = model.new_cache()
    logits = model(TOKENS, cache=cache, mask_BL=mask)
    after = torch.cat([model(following, cache=cache), model(following + 1, cache=cache)], 1)
    for row in range(2):
        alone = torch.cat([TOKENS[row][mask[row]], following[row], following[row] + 1])[None]
        got = torch.cat([logits[row][mask[row]], after[row]])
        torch.testing.assert_close(got, model(alone)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, **CONV}, {"mode": "recurrent"}], ids=str)
def test_packed_sequences_do_not_see_each_other(options: dict[str, Any]) -> None:
    model = lm(**options)
    bounds = [0, 5, 6, 21]
    packed = model(TOKENS[:1], cu_seqlens=torch.tensor(bounds))
    alone = [model(TOKENS[:1, a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)


def test_segments_with_a_cache_are_truncated_backpropagation() -> None:
    model = lm(**CONV).train()
    first, second = TOKENS.split([12, 9], 1)
    cache = model.new_cache()
    model(first, cache=cache).square().mean().backward()
    carried = [{k: v.clone() for k, v in state.items()} for state in cache.layers]
    model.zero_grad()
    model(second, cache=cache).square().mean().backward()  # the first segment's graph is gone, and not needed
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    again = model.new_cache()
    again.layers, again.length = carried, 12
    model(second, cache=again).square().mean().backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = lm(**CONV).train()
        model.gradient_checkpointing = checkpointing
        model(TOKENS).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_future_tokens_do_not_reach_the_past() -> None:
    model = lm(**CONV)
    changed = TOKENS.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 31
    torch.testing.assert_close(model(TOKENS)[:, :11], model(changed)[:, :11], rtol=0, atol=1e-12)


# -- checkpoints -----------------------------------------------------------------------------------------------

FUSED, PLAIN = "model.layers.1.attn.g_norm_swish_gate.weight", "model.layers.1.attn.g_norm.weight"


@pytest.mark.parametrize(
    ("options", "config", "key"),
    [
        ({}, {}, FUSED),
        ({"num_kv_heads": 2, **CONV}, {}, "model.layers.0.attn.q_conv1d.bias"),
        ({"fuse_norm": False, "clamp_min": -0.1}, {"fuse_norm": False, "clamp_min": -0.1}, PLAIN),
        ({"use_output_gate": False, "feature_map": "relu"}, {"feature_map": "relu"}, PLAIN),
        ({"gate_fn": "silu"}, {"hidden_act": "silu"}, PLAIN),
        ({"elementwise_affine": False}, {"num_heads": 4}, "model.layers.0.attn.gk_proj.1.bias"),
        ({"norm_eps": 1e-3, "gate_logit_normalizer": 4.0}, {"norm_eps": 1e-3, "gate_logit_normalizer": 4.0}, FUSED),
        ({"variant": "paper", "norm_eps": 1e-5}, {"n_head": 4}, "transformer.h.1.attn.k_gate.0.weight"),
        ({"tie_embeddings": True}, {}, "model.embeddings.weight"),
    ],
    ids=str,
)
def test_authors_checkpoint_round_trip(options: dict[str, Any], config: dict[str, Any], key: str) -> None:
    model = lm(**options)
    state = to_authors(model)
    assert key in state
    assert not any("self_attn" in k or "decay_gate" in k or "readout" in k for k in state)
    if options.get("tie_embeddings"):
        del state["lm_head.weight"]  # safetensors keeps one of two shared tensors
    again = load_authors("gla", state, config=config).eval()
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_checkpoint_problems_are_named() -> None:
    state = to_authors(lm())
    with pytest.raises(UserError, match=r"hidden_act='gelu' is not supported"):
        from_authors(state, config={"hidden_act": "gelu"})
    with pytest.raises(UserError, match="hybrids"):
        from_authors(state, config={"attn": {"layers": [1]}})
    with pytest.raises(UserError, match="use_gv=False"):
        from_authors(state, config={"use_gv": True})
    with pytest.raises(UserError, match="num_heads=3 does not fit a layer of 8 query and 8 key channels"):
        from_authors(state, config={"num_heads": 3})
    with pytest.raises(UserError, match="do not tell the number of heads"):
        from_authors(to_authors(lm(variant="paper")))
    with pytest.raises(UserError, match=r"no embed_tokens\.weight under any name known here"):
        from_authors({"encoder.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"missing: layers\.1\.mlp\.up_proj\.weight"):
        from_authors({k: v for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(UserError, match=r"no q_proj\.weight in its first layer; is it a paper checkpoint"):
        load_layer({"k_gate.0.weight": torch.zeros(2, 2)}, "paper", num_heads=1)


@pytest.mark.parametrize("v_first", [False, True])
def test_states_of_other_libraries_are_read_in_both_layouts(v_first: bool) -> None:
    ours, x = layer(**CONV), draw(2, 9, 16)
    states: list[State] = [{}]
    ours(x[:, :6], Span(torch.arange(6), states=states))
    kept = states[0]["recurrent_state"]
    convs = [states[0][f"conv_state_{n}"] for n in "qkv"]
    read = state_from_authors(kept.mT if v_first else kept, convs, state_v_first=v_first)
    y = ours(x[:, 6:], Span(torch.arange(6, 9), states=[read]))
    torch.testing.assert_close(y, ours(x)[:, 6:], rtol=0, atol=1e-10)
    wrong = state_from_authors(kept.mT if v_first else kept, convs, state_v_first=not v_first)
    with pytest.raises(ValueError, match=r"must be \(B, H, K, V\) = \(2, 4, 2, 4\) \(it looks transposed\)"):
        ours(x[:, 6:], Span(torch.arange(6, 9), states=[wrong]))


def test_a_state_that_is_none_is_refused() -> None:
    for odd in (torch.zeros(2, 4, 2), torch.zeros(2, 4, 2, 4, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"\[B, H, K, V\], or transposed \[B, H, V, K\]"):
            state_from_authors(odd, state_v_first=False)


@pytest.mark.parametrize("name", sorted(card("gla").variants))
def test_published_sizes_have_their_parameters(name: str) -> None:
    assert name in list_models("gla*")
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == card("gla").variants[name]


def test_mlp_width_rounds_up_to_256() -> None:
    assert [mlp_width(width) for width in (1024, 2048, 96)] == [2816, 5632, 256]


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"expand_k": 0.4}, "the key width 6 .* must be a multiple of num_heads=4"),
        ({"expand_v": 0.7}, "the value width 11 .* must be a multiple of num_heads=4"),
        ({"expand_k": 0.1}, "the key width 1 "),
        ({"mode": "fused_chunk"}, "mode='fused_chunk' must be one of recurrent, chunk, parallel"),
        ({"variant": "mamba"}, "variant='mamba' must be one of fla, paper"),
        ({"decay": "slow"}, "decay='slow' must be one of channel, head, static, fixed, none"),
        ({"feature_map": "elu"}, "feature_map='elu' must be one of swish, "),
        ({"gate_fn": "tanh"}, "gate_fn='tanh' must be one of swish, "),
        ({"clamp_min": 0.5}, "clamp_min=0.5 must be at most 0"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer=0 must be above zero"),
        ({"use_short_conv": True, "conv_size": 0}, "conv_size=0"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GatedLinearAttention(16, num_heads=4, **options)


def test_gates_and_masks_that_make_no_sense_are_refused() -> None:
    ours, model, x = layer(), lm(), draw(2, 5, 16)
    for bad in (0.1, float("nan")):
        with penstock.force(ours, bad, "decay_gate"), pytest.raises(ValueError, match="log_gate holds"):
            ours(x)
    with pytest.raises(ValueError, match=r"mask is \(2, 21, 21\)"):
        model(TOKENS, mask_BL=torch.ones(2, 21, 21))
    with pytest.raises(ValueError, match=r"only a padding mask \(B, L\) = \(2, 5\)"):
        ours(x, Span(torch.arange(5), mask=torch.ones(2, 5, 5, dtype=torch.bool)))
    bounds = torch.tensor([0, 21])
    for call in (
        lambda: model(TOKENS, cu_seqlens=bounds),
        lambda: model(TOKENS[:1], cu_seqlens=bounds, cache=model.new_cache()),
        lambda: model(TOKENS[:1], cu_seqlens=bounds, mask_BL=torch.ones(1, 21)),
    ):
        with pytest.raises(ValueError, match=r"cu_seqlens packs sequences in a batch of one \(here \d\)"):
            call()
    with pytest.raises(ValueError, match="batch of one, not 2"):
        ours(x, PackedSpan(torch.arange(5), cu_seqlens=torch.tensor([0, 5])))


# -- the experiment --------------------------------------------------------------------------------------------


def test_attention_step_by_step_equals_the_full_pass() -> None:
    outsider, x = randomise(SoftmaxAttention(16, 2)), draw(2, 7, 16)
    keys, values = (torch.zeros(2, 2, 9, 8, dtype=torch.float64) for _ in range(2))
    steps = [outsider.step(x[:, t], keys, values, t) for t in range(7)]
    torch.testing.assert_close(torch.stack(steps, 1), outsider(x).detach(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="multiple of 2 num_heads=6"):
        SoftmaxAttention(16, 3)


def test_decoding_remembers_as_much_after_any_context() -> None:
    measured = decode_cost(0)
    assert measured["gated_4096_bytes"] == measured["gated_256_bytes"] == 4 * 128 * 128 / (2 * 4)
    assert measured["attention_4096_bytes"] == 16 * measured["attention_256_bytes"] == 4 * 2 * 4096 * 128


def text(length: int, window: int = 6) -> TextData:
    tokens = (np.arange(length) * 7 % 31).astype(np.uint8)
    spec = {"tokenizer": "bytes", "vocab_size": 31, "window": window, "column": "text", "bytes_per_token": 1.0}
    return TextData({"train": tokens, "validation": tokens, "test": tokens}, spec, "numbers")


def test_long_windows_are_the_same_text_as_the_short_ones() -> None:
    data = text(60)
    (long,) = list(_long_windows(data))
    assert long.shape == (2, 25)
    torch.testing.assert_close(_cut(long, 6)[:, 1:].flatten(), long[:, 1:].flatten())
    torch.testing.assert_close(_cut(long, 6)[:, :-1].flatten(), long[:, :-1].flatten())


def test_measures_of_length_gates_and_interventions() -> None:
    config = GLAConfig(width=16, depth=1, mlp_hidden=24, train=Training(batch_size=2))
    data = text(60)
    found = system("gla")
    arms = found.arms(config, data.spec)
    assert list(arms) == ["gated", "ungated", "static_decay", "fixed_decay", "attention"]
    torch.manual_seed(0)
    model = arms["gated"]().eval()
    task = LanguageModelling(model, config.train, data)
    measured = found.measure("gated", task, config, data, 0)
    buckets = [value for name, value in measured.items() if name.startswith("loss_bucket_")]
    assert len(buckets) == 8
    assert measured["loss_growth"] == pytest.approx(measured["loss_at_4x"] - measured["loss_at_1x"], abs=1e-6)
    assert np.mean(buckets) == pytest.approx(measured["loss_at_4x"], rel=1e-5)
    assert measured["mean_alpha"] == pytest.approx(0.5 ** (1 / 16), abs=0.02)
    assert measured["alpha_below_half"] == 0
    assert measured["memory_shortest"] <= measured["memory_median"] <= measured["memory_longest"]
    assert measured["memory_median"] == pytest.approx(1 / (1 - measured["mean_alpha"]), rel=0.3)
    with torch.no_grad(), penstock.force(model, "open", "*.decay_gate"):
        opened = float(torch.cat([
            F.cross_entropy(model(b[:, :-1]).mT, b[:, 1:], reduction="none") for b in [_cut(b, 6) for b in _long_windows(data)]
        ]).mean())  # fmt: skip
    assert measured["loss_open_minus_trained"] == pytest.approx(opened - measured["loss_at_1x"], abs=1e-6)
    assert found.measure("gated", task, config, text(20), 0) == {}  # no window of four lengths fits


def test_claims_that_need_absent_arms_are_left_out() -> None:
    cells = [
        {"arm": arm, "seed": 0, "metrics": {"loss": loss, "loss_growth": loss}}
        for arm, loss in (("gated", 1.0), ("ungated", 1.5))
    ]
    found = system("gla").claims(GLAConfig(), Results(cells, {}))
    assert set(found) == {"length"}
    assert found["length"].values == [-0.5]
