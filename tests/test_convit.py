"""ConViT: its gated positional attention against mathematics, its refusals, its verbs, its experiment."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock.data import Source
from penstock.data.images import ImageConfig
from penstock.errors import UserError
from penstock.gates import GateWarning
from penstock.lab.cards import card
from penstock.lab.results import Results
from penstock.nn.vit import (
    Attention,
    Block,
    DropPath,
    PatchEmbed,
    pair,
    relative_offsets,
    resample_positions,
    take_indices,
)
from penstock.systems.vision.convit.checkpoint import from_authors, to_authors
from penstock.systems.vision.convit.experiment import SYSTEM, ConViTConfig, heads_figure, local_init_errors
from penstock.systems.vision.convit.model import GPSA, VARIANTS, ConViT, PositionalGate, head_table, nonlocality
from penstock.tasks.image_classification import accuracy


def small(**options: object) -> ConViT:
    torch.manual_seed(0)
    sizes = {"img_size": (8, 12), "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 36, "depth": 3}
    return ConViT(**sizes | {"num_heads": 9, "local_up_to_layer": 2} | options).eval()  # type: ignore[arg-type]


def layer(heads: int = 4, **options: object) -> GPSA:
    torch.manual_seed(0)
    return GPSA(4 * heads, heads, **options).double().eval()  # type: ignore[arg-type]


def tokens(rows: int, columns: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, rows * columns, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# -- the mathematics --------------------------------------------------------------------------------------------


def test_nine_heads_start_at_the_nine_offsets_of_a_3x3_kernel() -> None:
    rows = head_table(GPSA(36, 9), torch.randn(1, 25, 36))
    assert [(round(r["x"]), round(r["y"])) for r in rows] == [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    assert all(r["span"] == pytest.approx(1) and r["gate"] == pytest.approx(0.7311, abs=1e-4) for r in rows)


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_the_positional_map_is_a_softmax_of_the_distance_to_the_heads_offset(strength: float) -> None:
    attention = layer(4, locality_strength=strength)
    offsets = relative_offsets((3, 5), dtype=torch.float64)
    centres = torch.tensor([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)], dtype=torch.float64)
    squares = (offsets - centres[:, None, None]).square().sum(-1)
    torch.testing.assert_close(
        attention.positional_map((3, 5)), (-strength * squares).softmax(-1), rtol=1e-6, atol=1e-9
    )


def test_open_gate_and_strong_locality_move_the_image() -> None:
    assert local_init_errors(1.0, seed=0) == {"right_offsets": 1.0, "shift_error": 0.0}


def test_closed_gate_is_ordinary_attention_with_the_same_weights() -> None:
    gated, plain = layer(qkv_bias=True), Attention(16, 4, qkv_bias=True).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([gated.qk.weight, gated.v.weight]))
        plain.qkv.bias.copy_(torch.cat([gated.qk.bias, gated.v.bias]))
    plain.proj.load_state_dict(gated.proj.state_dict())
    x = tokens(3, 3, 16)
    with penstock.force(gated, "closed"):
        torch.testing.assert_close(gated(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["learned", "frozen", "closed", "open"])
def test_forward_is_the_mixed_map_applied_to_the_values(mode: str) -> None:
    attention = layer(use_local_init=False, gate=mode)
    nn.init.normal_(attention.qk.weight)
    nn.init.normal_(attention.pos_proj.weight)
    x = tokens(3, 4, 16).requires_grad_()
    maps = attention.maps(x, (3, 4))
    values = attention.v(x).unflatten(-1, (4, 4)).transpose(1, 2)
    expected = attention.proj((maps.mixed @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, (3, 4)), expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *(p for p in attention.parameters() if p.requires_grad)]
    ours, theirs = (torch.autograd.grad(y.square().sum(), wanted) for y in (attention(x, (3, 4)), expected))
    for got, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)


def test_attention_dropout_acts_on_the_mixed_map() -> None:
    attention = layer(attn_drop=0.5).train()
    nn.init.eye_(attention.proj.weight)
    ones = torch.ones(400, 4, 16, dtype=torch.float64)  # equal values: the output is each row's sum of the map
    out = attention(ones)
    assert out.std() > 0.1
    assert float(out.detach().mean()) == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(attention.eval()(ones), ones)


def test_the_bias_of_the_positions_has_no_effect() -> None:
    attention = layer()
    before = attention.positional_map((3, 3))
    nn.init.normal_(attention.pos_proj.bias)
    torch.testing.assert_close(attention.positional_map((3, 3)), before)


def test_nonlocality_is_the_mean_distance_attended_to() -> None:
    uniform = torch.full((2, 1, 4, 4), 0.25, dtype=torch.float64)
    assert nonlocality(uniform, (2, 2)).tolist() == pytest.approx([(2 + math.sqrt(2)) / 4])
    assert nonlocality(torch.eye(4).expand(2, 1, 4, 4), (2, 2)).tolist() == [0.0]


def test_nonlocality_is_measured_on_the_layers_real_input() -> None:
    model = small()
    seen = []
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.randn(3, 1, 8, 12)
    rows = head_table(model, x)
    handle.remove()
    expected = nonlocality(model.blocks[1].attn.maps(seen[0], (4, 6)).mixed, (4, 6))
    assert [r["nonlocality"] for r in rows if r["layer"] == "blocks.1.attn"] == pytest.approx(expected.tolist())


def test_a_grid_that_is_not_square_keeps_rows_and_columns_apart() -> None:
    attention = GPSA(36, 9, locality_strength=50.0)
    looked_at = attention.positional_map((3, 5)).argmax(-1)
    middle = 1 * 5 + 2
    assert looked_at[:, middle].tolist() == [middle + dx + 5 * dy for dx in (-1, 0, 1) for dy in (-1, 0, 1)]


def test_the_class_token_joins_behind_the_local_blocks() -> None:
    model = small()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    model(torch.randn(2, 1, 8, 12))
    assert seen == [24, 24, 25]


# -- the gate ---------------------------------------------------------------------------------------------------


def test_forcing_the_gates_acts_and_equals_the_fixed_arms() -> None:
    model = small()
    x = torch.randn(4, 1, 8, 12)
    before = model(x)
    for how in ("closed", "open"):
        fixed = small(gate=how)
        fixed.load_state_dict(model.state_dict())
        with penstock.force(model, how):
            assert torch.equal(model(x), fixed(x))
        assert not torch.allclose(model(x), fixed(x))
    torch.testing.assert_close(penstock.twin(model)(x), small_like(model, "open")(x))
    assert torch.equal(model(x), before)


def small_like(model: ConViT, gate: str) -> ConViT:
    other = small(gate=gate)
    other.load_state_dict(model.state_dict())
    return other


def test_one_head_can_be_closed() -> None:
    attention = layer()
    nn.init.eye_(attention.proj.weight)
    x = tokens(3, 3, 16)
    before = attention(x)
    with penstock.force(attention, "closed", where=2):
        changed = (attention(x) - before).abs().amax((0, 1)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_the_gate_is_static() -> None:
    model = small()
    with penstock.watch(model) as log:
        model(torch.randn(4, 1, 8, 12))
    assert list(log) == ["blocks.0.attn.gate", "blocks.1.attn.gate"]
    assert log["blocks.0.attn.gate"].static
    with pytest.warns(GateWarning, match="does not depend on the input"), penstock.force(model, "shuffle"):
        model(torch.randn(4, 1, 8, 12))


def test_only_a_learned_gate_is_trained() -> None:
    for mode in ("learned", "frozen", "closed", "open"):
        gates = [p for name, p in small(gate=mode).named_parameters() if "gate" in name]
        assert {p.requires_grad for p in gates} == {mode == "learned"}


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 35}, "dim=35 cannot be divided among num_heads=9"),
        ({"local_up_to_layer": 3}, "local_up_to_layer=3 must be from 0 to 2"),
        ({"local_up_to_layer": -1}, "local_up_to_layer=-1 must be from 0 to 2"),
        ({"patch_size": 5}, "8x12 cannot be cut into patches of 5x5"),
        ({"img_size": 0}, "0x0 must be positive"),
        ({"gate": "ajar"}, "gate='ajar' must be one of learned, frozen, closed, open"),
        ({"drop_path_rate": 1.0}, "drop-path rate of 1.0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        small(**options)


def test_tokens_must_fill_the_grid() -> None:
    with pytest.raises(ValueError, match="6 tokens are no square grid"):
        layer()(tokens(2, 3, 16))
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 2x2"):
        layer()(tokens(2, 3, 16), (2, 2))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 8, 8\), this model is built for \(B, 1, 8, 12\)"):
        small()(torch.zeros(1, 1, 8, 8))


def test_heads_without_a_place_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="num_heads=5 is not a square: 4 heads start as a 2x2"):
        GPSA(20, 5)


def test_nan_is_not_swallowed() -> None:
    x = torch.zeros(2, 1, 8, 12)
    x[0, 0, 3, 3] = math.nan
    assert small()(x).isnan().any(1).tolist() == [True, False]


# -- timm's verbs -----------------------------------------------------------------------------------------------


def test_forward_is_head_of_features() -> None:
    model, x = small(), torch.randn(2, 1, 8, 12)
    features = model.forward_features(x)
    assert features.shape == (2, 25, 36)
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 25), atol=1e-5, rtol=0)  # they are normalised
    assert torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])


def test_classifier_can_be_taken_off_and_put_on() -> None:
    model, x = small(), torch.randn(2, 1, 8, 12)
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), model.forward_features(x)[:, 1:].mean(1))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 25, 36)
    model.double().reset_classifier(7, "token")
    assert model(x.double()).shape == (2, 7)
    assert model.num_features == 36


def test_intermediates_are_maps_of_the_patches() -> None:
    model, x = small(), torch.randn(2, 1, 8, 12)
    last, maps = model.forward_intermediates(x, norm=True)
    assert [m.shape for m in maps] == [(2, 36, 4, 6)] * 3
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(maps[2].flatten(2).transpose(1, 2), last[:, 1:])
    early = model.forward_intermediates(x, [0, -2], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert len(early) == 2
    assert early[1].shape == (2, 24, 36)
    with pytest.raises(ValueError, match="blocks outside 0 to 2"):
        model.forward_intermediates(x, [3])


def test_pruned_model_gives_the_same_intermediates() -> None:
    model, x = small(), torch.randn(2, 1, 8, 12)
    expected = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert torch.equal(pruned.forward_intermediates(x, [-1], intermediates_only=True)[0], expected)
    assert not any(name.startswith(("cls_token", "head", "norm", "blocks.2")) for name in pruned.state_dict())


def test_another_input_size_keeps_the_weights() -> None:
    model = small()
    model.set_input_size((16, 8))
    assert model(torch.randn(2, 1, 16, 8)).shape == (2, 5)
    assert model.pos_embed.shape == (1, 32, 36)
    assert not any("rel" in name or "offset" in name for name in model.state_dict())


def test_gradient_checkpointing_changes_nothing() -> None:
    model, x = small().train(), torch.randn(2, 1, 8, 12)
    plain = torch.autograd.grad(model(x).square().sum(), model.patch_embed.proj.weight)[0]
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), model.patch_embed.proj.weight)[0], plain)


def test_every_parameter_learns() -> None:
    model = small().train()
    model(torch.randn(4, 1, 8, 12)).square().sum().backward()
    still = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert still <= {f"blocks.{i}.attn.pos_proj.bias" for i in range(2)}  # constant over keys: softmax ignores it


def test_published_sizes_have_the_published_counts() -> None:
    assert set(VARIANTS) == set(card("convit").variants)
    for name, count in card("convit").variants.items():
        with torch.device("meta"):
            model = VARIANTS[name]()
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert sum(isinstance(m, GPSA) for m in model.modules()) == 10


def test_save_pretrained_round_trip(tmp_path: object) -> None:
    model, x = small(), torch.randn(2, 1, 8, 12)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(ConViT.from_pretrained(str(tmp_path)).eval()(x), model(x))


# -- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"mlp_ratio": 2.7, "qkv_bias": True}, {"use_pos_embed": False}, {"num_classes": 0}]
)
def test_authors_checkpoint_rebuilds_the_model(options: dict[str, object]) -> None:
    model, x = small(**options), torch.randn(2, 1, 8, 12)
    state = to_authors(model)
    assert "blocks.0.attn.gating_param" in state
    again = from_authors(state, img_size=(8, 12)).eval()
    assert torch.equal(again(x), model(x))
    closed = from_authors(state, img_size=(8, 12), gate="closed").eval()
    with penstock.force(model, "closed"):
        assert torch.equal(closed(x), model(x))


def test_authors_checkpoint_for_other_sizes_and_classes() -> None:
    model = small(img_size=8)
    state = to_authors(model) | {"blocks.0.attn.rel_indices": torch.zeros(1, 16, 16, 3)}
    assert torch.equal(from_authors(state).eval()(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)))
    resized = from_authors(state, img_size=(8, 12), num_classes=2).eval()
    assert resized(torch.randn(3, 1, 8, 12)).shape == (3, 2)
    assert torch.equal(resized.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)


def test_bad_checkpoints_are_refused() -> None:
    with pytest.raises(UserError, match="give num_heads"):
        from_authors(to_authors(small(local_up_to_layer=0)), img_size=(8, 12))
    with pytest.raises(UserError, match="give the img_size"):
        from_authors(to_authors(small(img_size=(8, 10))))
    with pytest.raises(UserError, match="without pos_embed"):
        from_authors(to_authors(small(use_pos_embed=False)))
    with pytest.raises(UserError, match="not a ConViT"):
        from_authors({"weight": torch.zeros(2)})
    state = to_authors(small())
    del state["blocks.0.norm1.weight"]
    with pytest.raises(UserError, match=r"missing: blocks\.0\.norm1\.weight"):
        from_authors(state, img_size=(8, 12))


# -- what vision transformers share -----------------------------------------------------------------------------


def test_offsets_go_from_query_to_key_in_x_and_y() -> None:
    offsets = relative_offsets((2, 3))
    assert offsets[0, 5].tolist() == [2, 1]
    assert torch.equal(offsets, -offsets.transpose(0, 1))


def test_patches_are_in_row_major_order() -> None:
    embed = PatchEmbed((4, 6), 2, 1, 1)
    nn.init.ones_(embed.proj.weight)
    nn.init.zeros_(embed.proj.bias)
    image = torch.zeros(1, 1, 4, 6)
    image[0, 0, 2:4, 0:2] = 1
    assert embed(image).flatten().tolist() == [0, 0, 0, 4, 0, 0]
    assert embed.grid_size == (2, 3)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3)
    out = drop.train()(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out[:, 0], out[:, 2])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)
    assert drop.eval()(x) is x


def test_a_block_hands_its_context_to_the_attention() -> None:
    block = Block(16, GPSA(16, 4))
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(block(x, (2, 3)) - block(x, (3, 2)) == 0, torch.zeros(1, 6, 16, dtype=torch.bool))


def test_resampled_positions_keep_a_constant_and_the_corners_order() -> None:
    assert torch.allclose(resample_positions(torch.ones(1, 4, 3), (2, 2), (3, 5)), torch.ones(1, 15, 3))
    ramp = torch.arange(4.0).repeat(2).reshape(1, 8, 1)
    wide = resample_positions(ramp, (2, 4), (2, 8)).reshape(2, 8)
    assert (wide.diff(dim=1) > 0).all()
    assert torch.allclose(wide[0], wide[1])


def test_indices_follow_timm() -> None:
    assert take_indices(4, None) == [0, 1, 2, 3]
    assert take_indices(4, 2) == [2, 3]
    assert take_indices(4, [-1, 0]) == [3, 0]
    assert pair([3, 4]) == (3, 4)


# -- the experiment ---------------------------------------------------------------------------------------------


def test_arms_differ_only_in_their_gate() -> None:
    config = ConViTConfig()
    data = SYSTEM.load_data(config, Source())
    sizes = {s: len(getattr(data, s)(1)) for s in ("validation", "test")} | {"train": len(data.train(1, 0))}
    assert sizes == {"train": 150, "validation": 180, "test": 1467}
    models = {name: build() for name, build in SYSTEM.arms(config, data.spec).items()}
    assert list(models) == ["gated", "ungated", "closed", "open", "frozen"]
    gates = {n: [m() for m in model.modules() if isinstance(m, PositionalGate)] for n, model in models.items()}
    assert [len(g) for g in gates.values()] == [2, 0, 2, 2, 2]
    for name, value in {"gated": torch.tensor(1.0).sigmoid(), "closed": 0.0, "open": 1.0, "frozen": 0.5}.items():
        assert all(torch.allclose(g, torch.full((9,), float(value))) for g in gates[name])
    shapes = [{k: v.shape for k, v in models[n].state_dict().items()} for n in ("gated", "closed", "open", "frozen")]
    assert all(s == shapes[0] for s in shapes)


def test_measure_forces_the_gates() -> None:
    config = ConViTConfig()
    data = SYSTEM.load_data(config, Source())
    arms = SYSTEM.arms(config, data.spec)
    model = arms["gated"]()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        model.head.bias.zero_()
    task = SYSTEM.stages("gated", model, config, data)[0]().task
    measured = SYSTEM.measure("gated", task, config, data, 0)
    gates = [g for g in model.modules() if isinstance(g, PositionalGate)]
    assert measured.pop("positional_share") == pytest.approx(
        float(torch.cat([g.logit.detach() for g in gates]).sigmoid().mean())
    )
    for how in ("closed", "open"):
        fixed = arms[how]()
        fixed.load_state_dict(model.state_dict())
        assert measured.pop(f"accuracy_{how}") == accuracy(fixed, data.test(500)) != accuracy(model, data.test(500))
    assert not measured
    assert SYSTEM.measure("ungated", task, config, data, 0) == {}


def test_figures_show_the_heads() -> None:
    config = ConViTConfig()
    data = SYSTEM.load_data(config, Source())
    for arm, titles in {
        "gated": {"Confusion matrix (test)", "Where heads look"},
        "ungated": {"Confusion matrix (test)"},
    }.items():
        model = SYSTEM.arms(config, data.spec)[arm]()
        assert set(SYSTEM.stages(arm, model, config, data)[0]().task.figures()) == titles
    assert len(heads_figure(head_table(small(), torch.randn(2, 1, 8, 12))).axes) == 3  # two layers and the colours


def test_claims_are_judged_by_the_numbers() -> None:
    def results(gated: float, closed_by_force: float, open_by_force: float, share: float) -> Results:
        accuracies = {"gated": gated, "ungated": 0.3, "closed": 0.31, "open": 0.6, "frozen": 0.4}
        forced = {"accuracy_closed": closed_by_force, "accuracy_open": open_by_force, "positional_share": share}
        cells = [
            {"arm": arm, "seed": seed, "metrics": {"accuracy": value + 0.001 * seed} | forced}
            for arm, value in accuracies.items()
            for seed in range(3)
        ]
        return Results(cells, {"local_init": [{"shift_error": 0.0, "right_offsets": 1.0}]})

    config = ConViTConfig()
    judged = SYSTEM.claims(config, results(0.5, 0.2, 0.45, 0.74))
    assert set(judged) == {claim.id for claim in card("convit").claims}
    assert {e.verdict for e in judged["sample_efficiency"]} == {"holds"}
    assert judged["intervention"].values == pytest.approx([0.25] * 3)
    assert judged["learned_gate"].verdict == "holds"
    assert judged["leaving_locality"].verdict == "does not hold"
    assert [e.verdict for e in judged["local_init"]] == ["holds", "holds"]
    worse = SYSTEM.claims(config, results(0.32, 0.2, 0.45, 0.26))
    assert worse["sample_efficiency"][0].verdict == "does not hold"
    assert worse["intervention"].verdict == "does not hold"  # content was the larger share, and position mattered more


def test_patch_size_follows_the_images() -> None:
    spec = {"image_size": [224, 160], "channels": 3, "classes": ["a", "b"]}
    assert SYSTEM.arms(ConViTConfig(), spec)["gated"]().patch_embed.patch_size == (16, 16)
    with pytest.raises(ValueError, match="101x103 cannot be cut"):
        SYSTEM.arms(ConViTConfig(), spec | {"image_size": [101, 103]})
    with pytest.raises(ValueError, match="leaves nothing to gate"):
        SYSTEM.arms(ConViTConfig(local_up_to_layer=0), spec)


def test_all_digits_can_be_asked_for() -> None:
    data = SYSTEM.load_data(ConViTConfig(data=ImageConfig(train_size=0)), Source())
    assert len(data.train(1, 0)) == 1797 - 180 - 359
