"""GAM: the block against a plain reference, what the gates do, decoding, padding, checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.data.recall import UNLABELLED, mqar
from penstock.errors import UserError
from penstock.interop.create import create_model, list_models, load_authors
from penstock.lab.cards import card
from penstock.lab.results import Judgement, Results
from penstock.ops import last_backend
from penstock.systems.sequence.gam import model as gam_module
from penstock.systems.sequence.gam.baseline import TransformerBlock, TransformerLM
from penstock.systems.sequence.gam.checkpoint import from_authors, to_authors
from penstock.systems.sequence.gam.experiment import SYSTEM, GAMConfig, positions_used
from penstock.systems.sequence.gam.model import AssociativeMemory, CausalConv, GAMBlock, GAMLanguageModel
from penstock.systems.sequence.gam.trials import LENGTHS, key_distance, recall_by_distance, time_by_length
from tests.golden_adapters.gam import ADAPTERS

VOCABULARY, LENGTH = 23, 11
TOKENS = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def randomised(module: nn.Module) -> Any:
    """In float64 and eval mode, every parameter N(0, 0.3)."""
    torch.manual_seed(0)
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def lm(**options: Any) -> GAMLanguageModel:
    return randomised(GAMLanguageModel(VOCABULARY, 16, 12, 2, num_slots=7, **options))


def transformer() -> TransformerLM:
    return randomised(TransformerLM(VOCABULARY, 16, 12, 2, 3))


def reference_block(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The author's block written out: loops over taps, a softmax over unscaled scores, two halves of one linear map."""
    width = x.shape[-1]
    h = F.layer_norm(x, (width,), p["ln1.weight"], p["ln1.bias"])
    taps = p["causal_conv.weight"].shape[-1]
    local = p["causal_conv.bias"].expand_as(h).clone()
    for back in range(min(taps, x.shape[1])):
        local[:, back:] += p["causal_conv.weight"][:, 0, taps - 1 - back] * h[:, : x.shape[1] - back]
    scores = torch.einsum("bld,md->blm", h, p["memory_bank"]).exp()
    weights = scores / scores.sum(-1, keepdim=True)
    memory = torch.einsum("blm,md->bld", weights, p["memory_bank"])
    gates = 1 / (1 + (-(h @ p["gate.weight"].T + p["gate.bias"])).exp())
    fused = gates[..., :width] * local + gates[..., width:] * memory
    x = x + fused
    inner = F.layer_norm(x, (width,), p["ln2.weight"], p["ln2.bias"]) @ p["ffn.0.weight"].T + p["ffn.0.bias"]
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    y = x + inner @ p["ffn.2.weight"].T + p["ffn.2.bias"]
    return {
        "y": y, "local": local, "global": memory, "fused": fused, "memory_weights": weights,
        "gate_local": gates[..., :width], "gate_global": gates[..., width:],
    }  # fmt: skip


def block_parameters(width: int, slots: int, taps: int, prefix: str = "") -> dict[str, Tensor]:
    shapes = {
        "causal_conv.weight": (width, 1, taps), "causal_conv.bias": (width,), "memory_bank": (slots, width),
        "gate.weight": (2 * width, width), "gate.bias": (2 * width,), "ffn.0.weight": (4 * width, width),
        "ffn.0.bias": (4 * width,), "ffn.2.weight": (width, 4 * width), "ffn.2.bias": (width,), "ln1.weight": (width,),
        "ln1.bias": (width,), "ln2.weight": (width,), "ln2.bias": (width,),
    }  # fmt: skip
    return {prefix + name: torch.randn(shape, dtype=torch.float64) * 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize(("slots", "taps", "length"), [(10, 5, 9), (1, 1, 4), (6, 4, 2), (9, 3, 1)])
def test_block_is_the_authors(slots: int, taps: int, length: int) -> None:
    params = block_parameters(8, slots, taps)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    out = torch.randn_like(x)
    config = {"N_EMBED": 8, "NUM_MEMORY_SLOTS": slots, "CONV_KERNEL_SIZE": taps}
    got = ADAPTERS["block"](config, params, {"x": x.detach(), "grad_out": out})
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    expected = reference_block(leaves, x)
    (expected["y"] * out).sum().backward()
    expected |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items()} | {"grad_x": x.grad}
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("tied", [("head.weight",), ("token_embedding.weight",), ("head.weight", "token_embedding.weight")])  # fmt: skip
def test_language_model_is_the_authors(tied: tuple[str, ...]) -> None:
    params = {k: v for i in range(3) for k, v in block_parameters(8, 5, 2, f"blocks.{i}.").items()}
    params |= {"pos_embedding.weight": torch.randn(9, 8).double(), "ln_f.weight": torch.randn(8).double(), "ln_f.bias": torch.randn(8).double()}  # fmt: skip
    table = torch.randn(VOCABULARY, 8, dtype=torch.float64)
    params |= {name: table.clone() for name in tied}
    tokens, targets = TOKENS[:, :6], TOKENS[:, 3:9]
    config = {
        "VOCAB_SIZE": VOCABULARY, "BLOCK_SIZE": 9, "N_EMBED": 8, "N_LAYER": 3, "NUM_MEMORY_SLOTS": 5, "CONV_KERNEL_SIZE": 2,
    }  # fmt: skip
    got = ADAPTERS["lm"](config, params, {"idx": tokens, "targets": targets})
    leaf = table.requires_grad_()
    x = leaf[tokens] + params["pos_embedding.weight"][:6]
    for i in range(3):
        x = reference_block(
            {k.removeprefix(f"blocks.{i}."): v for k, v in params.items() if k.startswith(f"blocks.{i}.")}, x
        )["y"]
    logits = F.layer_norm(x, (8,), params["ln_f.weight"], params["ln_f.bias"]) @ leaf.T
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.testing.assert_close(got["logits"], logits, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got["loss"], loss[None], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got["grad.token_embedding.weight"], leaf.grad, rtol=1e-9, atol=1e-10)


def test_open_fusion_gate_is_the_ungated_arm() -> None:
    gated, ungated = lm(), lm(fusion="sum")
    ungated.load_state_dict({k: v for k, v in gated.state_dict().items() if ".fusion_gate." not in k})
    with penstock.force(gated, "open", "*.fusion_gate"):
        torch.testing.assert_close(gated(TOKENS), ungated(TOKENS), rtol=0, atol=1e-12)
    torch.testing.assert_close(penstock.twin(gated, "*.fusion_gate")(TOKENS), ungated(TOKENS), rtol=0, atol=1e-12)


def test_shut_fusion_gate_leaves_the_feed_forward_net() -> None:
    block = randomised(GAMBlock(12, 7))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with penstock.force(block, "closed", "fusion_gate"):
        assert torch.equal(block(x), x + block.ffn(block.norm2(x)))


@pytest.mark.parametrize("pathway", [0, 1])
def test_one_gate_axis_is_one_pathway(pathway: int) -> None:
    """With the other pathway shut and this one open, what is left is the arm that has only this one."""
    gated = lm()
    alone = lm(fusion=("local", "global")[pathway])
    alone.load_state_dict({k: v for k, v in gated.state_dict().items() if k in alone.state_dict()})
    values = torch.zeros(2, 1, dtype=torch.float64)
    values[pathway] = 1
    with penstock.force(gated, values, "*.fusion_gate"):
        torch.testing.assert_close(gated(TOKENS), alone(TOKENS), rtol=0, atol=1e-12)


def test_slot_weights_are_a_choice_that_can_be_watched_and_forced() -> None:
    memory = randomised(AssociativeMemory(12, 7, separate_values=True))
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    with penstock.watch(memory, keep="values") as log:
        memory(h)
    weights = log.values()["slot_gate"][0]
    assert weights.shape == (2, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    with penstock.force(memory, 3):
        torch.testing.assert_close(memory(h), memory.values[3].expand(2, 5, 12))
    with penstock.force(memory, "open"):
        torch.testing.assert_close(memory(h), memory.values.mean(0).expand(2, 5, 12))


def test_each_memory_head_reads_with_its_own_channels() -> None:
    memory = randomised(AssociativeMemory(12, 7, num_heads=3, separate_values=True))
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    with penstock.watch(memory, keep="values") as log:
        read = memory(h)
    assert log.values()["slot_gate"][0].shape == (2, 5, 3, 7)
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        expected = (h[..., own] @ memory.keys[:, own].T).softmax(-1) @ memory.values[:, own]
        torch.testing.assert_close(read[..., own], expected)


@pytest.mark.parametrize("options", [{}, {"num_heads": 3, "separate_values": True}])
def test_fused_read_equals_the_slot_weights(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = randomised(AssociativeMemory(12, 7, **options)).float()
    h, out = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 12)

    def run() -> list[Tensor]:
        read = memory(h)
        return [read, *torch.autograd.grad((read * out).sum(), [h, *memory.parameters()])]

    last_backend.pop("memory_read", None)
    formed = run()
    assert "memory_read" not in last_backend, "small reads form the weights"
    monkeypatch.setattr(gam_module, "_MANY_WEIGHTS", 0)
    fused = run()
    assert last_backend["memory_read"] == "fused"
    for ours, plain in zip(fused, formed, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_fused_read_gives_way_to_whoever_watches_or_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm().float()
    formed = model(TOKENS)
    with penstock.force(model, "open", "*.slot_gate"):
        opened = model(TOKENS)
    monkeypatch.setattr(gam_module, "_MANY_WEIGHTS", 0)
    with penstock.watch(model, "*.slot_gate") as log:
        assert torch.equal(model(TOKENS), formed)
    assert [log[name].calls for name in log] == [1, 1]
    with penstock.force(model, "open", "*.slot_gate"):
        assert torch.equal(model(TOKENS), opened)
    torch.testing.assert_close(penstock.twin(model, "*.slot_gate")(TOKENS), opened)
    monkeypatch.setitem(
        last_backend, "memory_read", "fused"
    )  # a change of this dictionary would have the model compiled anew
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), formed, rtol=1e-4, atol=1e-5)
    with penstock.force(model, "open", "*.slot_gate"):
        torch.testing.assert_close(compiled(TOKENS), opened, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [(3, {}, 7), (2, {"kernel_size": 5}, 9), (4, {"kernel_size": 1}, 1), (2, {"fusion": "global"}, 1),
     (1, {"fusion": "local"}, 3), (2, {"fusion": "sum", "kernel_size": 2}, 3)],
)  # fmt: skip
def test_receptive_field_is_exact(layers: int, options: dict[str, Any], expected: int) -> None:
    model = GAMLanguageModel(VOCABULARY, 24, 12, layers, num_slots=7, **options)
    assert model.receptive_field() == expected
    assert positions_used(model) == expected


def test_attention_uses_every_position() -> None:
    assert positions_used(transformer()) == 16


@pytest.mark.parametrize("build", [lm, lambda: lm(kernel_size=5, memory_heads=2), lambda: lm(kernel_size=1), lambda: lm(fusion="global"), transformer])  # fmt: skip
def test_decoding_with_a_cache_is_the_full_pass(build: Callable[[], Any]) -> None:
    model = build()
    full = model(TOKENS)
    cache = model.new_cache()
    parts = [model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 1), (1, 6), (6, 7), (7, LENGTH))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)
    cache = model.new_cache()
    model(TOKENS[:, :5], cache=cache)
    rows = torch.tensor([2, 0])
    cache.reorder(rows)
    torch.testing.assert_close(model(TOKENS[rows, 5:], cache=cache), full[rows, 5:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", [lm, lambda: lm(kernel_size=5), transformer])
def test_padding_changes_nothing_wherever_it_stands(build: Callable[[], Any]) -> None:
    model = build()
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1, 1]]).bool()
    padded = torch.full(real.shape, 5)
    padded[real] = torch.cat([TOKENS[row, : int(n)] for row, n in enumerate(real.sum(1))])
    alone = [model(TOKENS[row : row + 1, : int(n)])[0] for row, n in enumerate(real.sum(1))]
    torch.testing.assert_close(model(padded, mask_BL=real)[real], torch.cat(alone), rtol=0, atol=1e-10)
    cache = model.new_cache()
    parts = [model(padded[:, a:b], cache=cache, mask_BL=real[:, a:b]) for a, b in ((0, 2), (2, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1)[real], torch.cat(alone), rtol=0, atol=1e-10)


def test_a_convolution_remembers_as_many_inputs_as_it_has_taps() -> None:
    model = lm(kernel_size=4)
    cache = model.new_cache()
    model(TOKENS, cache=cache)
    assert cache.num_bytes() == 2 * 3 * 12 * 4 * 8  # layers, batch, channels, taps, bytes


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = lm(dropout=0.0).train()
    plain = torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters()))
    model.gradient_checkpointing = True
    again = torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_initial_values() -> None:
    torch.manual_seed(0)
    balanced = GAMLanguageModel(500, 200, 64, 1, num_slots=32)
    assert balanced.head.weight is balanced.token_embedding.weight
    assert float(balanced.token_embedding.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert float(balanced.pos_embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    reference = GAMLanguageModel(500, 200, 64, 1, num_slots=32, init="reference")
    assert float(reference.token_embedding.weight.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.01)
    assert float(reference.pos_embedding.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    (block,) = reference.blocks
    assert isinstance(block, GAMBlock)
    assert block.memory is not None
    assert float(block.memory.keys.detach().abs().max()) == pytest.approx((6 / (32 + 64)) ** 0.5, rel=0.02)


def test_authors_checkpoint_round_trip(tmp_path: Path) -> None:
    model = lm(kernel_size=4, ffn_hidden=20)
    path = tmp_path / "gam.pt"
    torch.save({"model_state_dict": to_authors(model)}, path)
    again = load_authors("gam", path).eval()
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.head.weight is again.token_embedding.weight


def test_two_different_tied_matrices_are_refused() -> None:
    state = to_authors(lm())
    state["head.weight"] = state["head.weight"] + 1e-3
    with pytest.raises(UserError, match=r"head\.weight and token_embedding\.weight differ"):
        from_authors(state)


def test_checkpoint_problems_are_named() -> None:
    state = to_authors(lm())
    for key in ("pos_embedding.weight", "blocks.0.memory_bank"):
        with pytest.raises(UserError, match=f"{key} is missing"):
            from_authors({k: v for k, v in state.items() if k != key})
    with pytest.raises(UserError, match=r"missing: blocks\.1\.fusion_gate\.proj\.bias"):
        from_authors({k: v for k, v in state.items() if k != "blocks.1.gate.bias"})
    with pytest.raises(UserError, match=r"not expected: blocks\.1\.extra"):
        from_authors(state | {"blocks.1.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"causal_conv\.weight is \(12, 3\); it must have 3 axes"):
        from_authors(state | {"blocks.0.causal_conv.weight": torch.zeros(12, 3)})
    with pytest.raises(UserError, match=r"head\.weight is missing"):
        from_authors({k: v for k, v in state.items() if k not in ("head.weight", "token_embedding.weight")})


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: GAMBlock(12, 0), "num_slots=0: must be 1 or more"),
        (lambda: GAMBlock(12, 7, 0), "kernel_size=0: must be 1 or more"),
        (lambda: GAMBlock(12, 7, ffn_hidden=-1), "ffn_hidden=-1: must be 1 or more"),
        (lambda: GAMBlock(12, 7, memory_heads=5), "memory_heads=5 must divide dim=12"),
        (lambda: GAMLanguageModel(0, 16, 12, 2), "vocab_size=0 and block_size=16 must be 1 or more"),
        (lambda: GAMLanguageModel(9, 0, 12, 2), "vocab_size=9 and block_size=0 must be 1 or more"),
        (lambda: TransformerBlock(12, 5), "num_heads=5 must divide dim=12"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()


def test_tokens_that_cannot_be_read_are_refused() -> None:
    model = lm()
    with pytest.raises(ValueError, match="17 tokens: GAMLanguageModel has a table of 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))
    for wrong in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=f"run from .*{wrong}.*a vocabulary of 23 has 0 to 22"):
            model(torch.tensor([[0, wrong]]))


def test_published_sizes_have_their_parameters() -> None:
    assert list_models("gam*") == ["gam_22_6m"]
    with torch.device("meta"):
        model = create_model("gam_22_6m")
        ablated = {f: GAMLanguageModel(fusion=f) for f in ("sum", "local", "global")}
        peer = TransformerLM()
        arms = SYSTEM.arms(SYSTEM.presets["paper"], {"vocab_size": 10000, "window": 256})
        preset = sum(p.numel() for p in arms["gated"]().parameters())
    millions = {name: round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for name, m in ablated.items()}
    assert sum(p.numel() for p in model.parameters()) == preset == card("gam").variants["gam_22_6m"]
    assert millions == {"sum": 19.4, "local": 17.9, "global": 19.4}
    assert round(sum(p.numel() for p in peer.parameters()) / 1e6, 1) == 24.2


def test_arms_take_the_window_from_the_data_and_the_matched_twin_has_the_gates_parameters() -> None:
    arms = SYSTEM.arms(GAMConfig(), {"vocab_size": 31, "window": 17})
    with torch.device("meta"):
        models = {name: build() for name, build in arms.items()}
    assert all(getattr(m, "max_length", None) == 17 for m in models.values())
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    unit = 2 * 48 + 1
    assert abs(count["gated"] - count["ungated_matched"]) <= 3 * unit / 2
    assert count["gated"] - count["ungated"] == 3 * (2 * 48 * 48 + 2 * 48)


def test_key_distance_leads_to_the_key_and_its_value() -> None:
    batch = mqar(64, 50, 24, 3, seed=0, random_non_queries=False)
    distance = key_distance(batch.inputs, batch.labels)
    asked = batch.labels != UNLABELLED
    assert torch.equal(distance > 0, asked)
    rows, places = asked.nonzero(as_tuple=True)
    first = places - distance[asked]
    assert torch.equal(batch.inputs[rows, first], batch.inputs[asked])
    assert torch.equal(batch.inputs[rows, first + 1], batch.labels[asked])
    assert bool((first < 6).all()), "the pairs come first"


def test_recall_is_measured_by_distance() -> None:
    measured = recall_by_distance(0, dropout=0.0, epochs=1, examples=300)
    by_distance = {int(k.removeprefix("distance_")): v for k, v in measured.items() if k.startswith("distance_")}
    assert set(by_distance) <= set(range(2, 24, 2))
    assert min(by_distance.values()) <= measured["overall"] <= max(by_distance.values())
    assert {"near", "far"} < set(measured)
    assert recall_by_distance(0, dropout=0.0, epochs=1, examples=300) == measured


def test_time_is_measured_by_length() -> None:
    measured = time_by_length(0, repeats=1)
    ratios = [measured[f"ms_{2 * length}"] / measured[f"ms_{length}"] for length in LENGTHS[:-1]]
    assert (measured["smallest_ratio"], measured["largest_ratio"]) == (min(ratios), max(ratios))


def test_claims_are_the_cards_and_judged_by_the_numbers() -> None:
    losses = {"gated": 2.2, "ungated": 2.3, "ungated_matched": 2.31, "local_only": 2.3, "global_only": 2.5}
    cells = [
        {"arm": arm, "seed": seed, "metrics": {"loss": loss + 0.01 * seed * (arm == "gated"), "receptive_field": 7.0}}
        for arm, loss in losses.items()
        for seed in range(3)
    ]
    trials = {
        "time": [{"smallest_ratio": 1.8, "largest_ratio": 2.2 + 0.01 * s} for s in range(3)],
        "recall": [{"near": 0.8, "far": 0.02 + 0.001 * s} for s in range(3)],
    }
    judged = SYSTEM.claims(GAMConfig(), Results(cells, trials))
    assert set(judged) == {claim.id for claim in card("gam").claims}

    def verdict(claims: dict[str, Any], name: str) -> str:
        effects = claims[name]
        return Judgement(name, "", effects if isinstance(effects, list) else [effects]).verdict

    assert {name: verdict(judged, name) for name in judged} == {
        "gate_gain": "holds", "ablation_order": "does not hold", "receptive_field": "holds", "linear_time": "holds",
        "recall_limit": "holds",
    }  # fmt: skip
    wider = [cell | {"metrics": cell["metrics"] | {"receptive_field": 8.0}} for cell in cells]
    beyond = {"time": trials["time"], "recall": [one | {"far": 0.2 + one["far"]} for one in trials["recall"]]}
    worse = SYSTEM.claims(GAMConfig(), Results(wider, beyond))
    assert verdict(worse, "receptive_field") == verdict(worse, "recall_limit") == "does not hold"
    some = Results([cell for cell in cells if cell["arm"] != "ungated_matched"], {})
    assert "gate_gain" not in SYSTEM.claims(GAMConfig(), some), "a claim whose arms are not there is left out"


def test_convolution_starts_like_pytorchs() -> None:
    torch.manual_seed(0)
    conv = CausalConv(6, 3)
    torch.manual_seed(0)
    like = nn.Conv1d(6, 6, 3, groups=6)
    assert torch.equal(conv.weight, like.weight)
    assert torch.equal(conv.bias, like.bias)
