"""Gated attention: the mathematics of the gate, its variants, and what checkpoints are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import penstock
from penstock.errors import UserError
from penstock.interop.create import create_model, list_models, load_authors
from penstock.lab.cards import card
from penstock.systems.sequence.gated_attention.checkpoint import from_authors, join_queries, split_queries, to_authors
from penstock.systems.sequence.gated_attention.model import (
    GatedAttention,
    GatedAttentionLM,
    Position,
    first_token_attention,
    max_activation,
)
from penstock.systems.sequence.gated_attention.selective_copy import copy_batch, merged_projection_error

CONFIG = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "use_qk_norm": True,
}  # fmt: skip


def lm(gate: Any = "headwise", **options: Any) -> GatedAttentionLM:
    torch.manual_seed(0)
    model = GatedAttentionLM(
        31, 16, 2, 4, intermediate_size=24, num_kv_heads=2, head_dim=8, gate=gate, **options
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


TOKENS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def test_open_gate_is_the_ungated_twin() -> None:
    gated, ungated = lm("headwise"), lm(None)
    ungated.load_state_dict({k: v for k, v in gated.state_dict().items() if ".gate." not in k})
    with penstock.force(gated, "open"):
        torch.testing.assert_close(gated(TOKENS), ungated(TOKENS), rtol=0, atol=1e-12)
    torch.testing.assert_close(penstock.twin(gated)(TOKENS), ungated(TOKENS), rtol=0, atol=1e-12)


def test_shut_gate_passes_nothing() -> None:
    layer = lm().layers[0].self_attn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with penstock.force(layer, "closed"):
        assert layer(x).abs().max() == 0


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_gate_acts_at_every_position(position: Position, gate: Any) -> None:
    model = lm(gate, position=position)
    plain = model(TOKENS)
    with penstock.force(model, "open"):
        opened = model(TOKENS)
    with penstock.watch(model) as log:
        torch.testing.assert_close(model(TOKENS), plain, rtol=0, atol=0)
    # A head-wise gate on queries or keys before their norm is undone by it: the paper's G3 and G4 scale, the norm rescales.
    undone = gate == "headwise" and position in ("query", "key")
    assert torch.allclose(plain, opened, atol=1e-4) == undone
    assert len(log.to_dict()) == 2


def test_future_tokens_do_not_reach_the_past() -> None:
    model = lm()
    changed = TOKENS.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 31
    torch.testing.assert_close(model(TOKENS)[:, :6], model(changed)[:, :6], rtol=0, atol=1e-12)


def test_variants_of_the_gate() -> None:
    shared = lm(head_specific=False)
    with penstock.watch(shared, keep="values") as log:
        shared(TOKENS)
    assert log.values()["layers.0.self_attn.gate"][0].shape == (2, 9, 1, 1)
    never_shut = lm(activation="ns_sigmoid")
    with penstock.watch(never_shut, keep="values") as log:
        never_shut(TOKENS)
    assert float(log.values()["layers.0.self_attn.gate"][0].min()) > 0.5
    constant = lm(input_dependent=False)
    with penstock.watch(constant) as log:
        constant(TOKENS)
    assert log["layers.0.self_attn.gate"].summary()["static"]
    additive = lm("elementwise", combine="add", activation="silu")
    with penstock.force(additive, "open"):
        torch.testing.assert_close(additive(TOKENS), penstock.twin(additive)(TOKENS))


def test_measures_of_sinks_and_activations() -> None:
    model = lm()
    share = first_token_attention(model, TOKENS)
    assert share.shape == (2,)
    assert bool(((share > 1 / 9) & (share < 1)).all())  # the first query sees nothing but the first token
    states = model.hidden_states(TOKENS)
    assert max_activation(model, TOKENS).tolist() == [float(s.detach().abs().max()) for s in states]


@pytest.mark.parametrize("gate", [None, "headwise", "elementwise"])
@pytest.mark.parametrize("layout", ["authors", "qwen3_next"])
def test_query_rows_split_and_join_back(gate: Any, layout: Any) -> None:
    width = {None: 0, "headwise": 1, "elementwise": 3}[gate]
    rows = torch.arange(4.0 * (3 + width))[:, None].expand(-1, 5)
    queries, gates = split_queries(rows, 4, 2, 3, gate, layout)
    assert queries.shape == (12, 5)
    assert torch.equal(join_queries(queries, gates, 4, 2, layout), rows)


@pytest.mark.parametrize("gate", [None, "headwise", "elementwise"])
def test_authors_checkpoint_round_trip(gate: Any, tmp_path: Path) -> None:
    model = lm(gate)
    config = CONFIG | {
        "headwise_attn_output_gate": gate == "headwise",
        "elementwise_attn_output_gate": gate == "elementwise",
    }
    path = tmp_path / "model.pt"
    torch.save({"state_dict": to_authors(model)}, path)
    again = load_authors("gated_attention", path, config=config).eval()
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_wrong_layout_names_the_rows_it_found() -> None:
    state = to_authors(lm("headwise"))
    with pytest.raises(UserError, match=r"q_proj has 36 rows; that is a headwise gate, and elementwise gate needs 64"):
        from_authors(state, config=CONFIG | {"elementwise_attn_output_gate": True})
    with pytest.raises(UserError, match="both set"):
        from_authors(state, config=CONFIG | {"elementwise_attn_output_gate": True, "headwise_attn_output_gate": True})


def test_checkpoint_problems_are_named(tmp_path: Path) -> None:
    config = CONFIG | {"headwise_attn_output_gate": True}
    state = to_authors(lm("headwise"))
    lacking = {k: v for k, v in state.items() if not k.endswith("norm.weight")} | {"model.extra": torch.zeros(1)}
    lacking["lm_head.weight"] = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(UserError) as caught:
        load_authors("gated_attention", lacking, config=config)
    for part in ("missing", "more", "not expected: extra", "misshapen: lm_head.weight is (3, 3), must be (31, 16)"):
        assert part in str(caught.value)
    evil = tmp_path / "evil.pt"
    torch.save({"a": Path("x")}, evil)  # a pickle that needs code
    with pytest.raises(UserError, match="wants code executed"):
        load_authors("gated_attention", evil, config=config)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        load_authors("gated_attention", broken, config=config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 7}, "even number of channels"),
        ({}, "must divide hidden_size=18"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GatedAttention(16 if options else 18, 4, **options)


@pytest.mark.parametrize("name", sorted(card("gated_attention").variants))
def test_published_sizes_have_their_parameters(name: str) -> None:
    assert name in list_models("gated_attention*")
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == card("gated_attention").variants[name]


def test_copy_targets_are_the_latest_value_of_the_same_id() -> None:
    batch = copy_batch(3, torch.Generator().manual_seed(0))
    ids, values = batch.tokens[..., :12].argmax(-1), batch.tokens[..., 12:20]
    for row in range(3):
        for t in range(24):
            if batch.active[row, t]:
                earlier = max(s for s in range(t) if ids[row, s] == ids[row, t])
                assert torch.equal(batch.targets[row, t], values[row, earlier])
            else:
                assert batch.targets[row, t].abs().max() == 0
    assert batch.active.float().mean() > 0.1


def test_value_and_output_projections_merge_only_without_a_gate() -> None:
    assert merged_projection_error(None, 0) < 1e-12
    assert merged_projection_error("elementwise", 0) > 1e-2
