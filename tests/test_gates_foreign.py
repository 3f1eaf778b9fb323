"""Gates of models that know nothing of Penstock: a Mixtral of transformers and a squeeze-and-excite, marked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.gates import ClosedError, GateNotFoundError, GateWarning, Routing, named_gates, spec_of
from tests.models import SqueezeExcite, hooks_left, marked_squeeze_excite

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

ROUTERS = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.fixture(params=["eager", "grouped_mm"])
def mixtral(request: pytest.FixtureRequest) -> nn.Module:
    """A Mixtral of two layers and four experts, its routers marked by nothing but their class."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(request.param)
    for module in model.modules():
        if isinstance(module, MixtralTopKRouter):
            penstock.mark(module, kind="simplex", passes="expert", output=("logits", "weights", "indices"))
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))


def expert(block: nn.Module, number: int, x: Tensor) -> Tensor:
    """What one expert makes of every token, from its weights."""
    gate, up = F.linear(x, block.experts.gate_up_proj[number]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, block.experts.down_proj[number])


def test_a_marked_routers_decisions_are_watched(mixtral: nn.Module, ids: Tensor) -> None:
    expected = mixtral(ids).logits
    with penstock.watch(mixtral, keep="values") as log:
        assert torch.equal(mixtral(ids).logits, expected)
        hooks = hooks_left(mixtral)
        routed = mixtral(ids, output_router_logits=True).router_logits
        theirs = hooks_left(mixtral) - hooks  # Transformers leaves hooks on a model to record these logits.
    assert list(log) == ROUTERS
    assert hooks_left(mixtral) == theirs
    for name, logits in zip(ROUTERS, routed, strict=True):
        top, chosen = logits.detach().softmax(-1).topk(2)
        top = top / top.sum(-1, keepdim=True)
        summary = log[name].summary()
        load = torch.bincount(chosen.flatten(), minlength=4) / len(chosen)
        assert torch.allclose(log.values()[name][0].gather(1, chosen).double(), top.double(), atol=1e-6)
        assert summary["inputs"] == 2 * ids.numel()
        assert summary["load"] == pytest.approx(load.tolist())
        assert summary["load_cv"] == pytest.approx(float(load.std(correction=0) / load.mean()), rel=1e-6)
        assert summary["entropy"] == pytest.approx(torch.special.entr(top).sum(-1).mean().item(), rel=1e-5)
        assert summary["unused"] == (load == 0).double().mean()


@pytest.mark.parametrize("number", range(4))
def test_a_forced_expert_takes_every_token(mixtral: nn.Module, number: int) -> None:
    block, x = mixtral.model.layers[0].mlp, torch.randn(2, 5, 32)
    with penstock.force(mixtral, number, ROUTERS[0]):
        assert torch.allclose(block(x), expert(block, number, x), rtol=1e-4, atol=1e-5)


def test_an_open_router_averages_the_experts(mixtral: nn.Module) -> None:
    block, x = mixtral.model.layers[1].mlp, torch.randn(2, 5, 32)
    average = torch.stack([expert(block, number, x) for number in range(4)]).mean(0)
    with penstock.force(mixtral, "open"):
        assert torch.allclose(block(x), average, rtol=1e-4, atol=1e-5)


def test_the_twin_is_the_model_with_open_routers_and_trains(mixtral: nn.Module, ids: Tensor) -> None:
    twin = penstock.twin(mixtral)
    with penstock.force(mixtral, "open"):
        opened = mixtral(ids).logits
    assert torch.equal(twin(ids).logits, opened)
    assert not torch.equal(mixtral(ids).logits, opened)
    routers = sum(p.numel() for gate in named_gates(mixtral).values() for p in gate.parameters())
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in mixtral.parameters()) - routers
    with penstock.watch(twin) as log:
        twin.train()(ids, labels=ids).loss.backward()
    assert list(log) == ROUTERS
    assert all(log[name].summary()["unit_means"] == [0.25] * 4 for name in log)
    assert twin.model.layers[0].mlp.experts.down_proj.grad.any()
    fresh = penstock.twin(mixtral)
    fresh.load_state_dict(twin.state_dict())


def test_shuffled_routings_are_those_of_other_tokens(mixtral: nn.Module, ids: Tensor) -> None:
    with penstock.watch(mixtral, ROUTERS[0], keep="values") as own:
        expected = mixtral(ids).logits
    with (
        penstock.force(mixtral, "shuffle", ROUTERS[0]) as forcing,
        penstock.watch(mixtral, ROUTERS[0], keep="values") as log,
    ):
        assert not torch.allclose(mixtral(ids).logits, expected, atol=1e-2)
    (before,), (after,) = own.values()[ROUTERS[0]], log.values()[ROUTERS[0]]
    assert forcing.unchanged == set()
    assert torch.equal(before.sort(0).values, after.sort(0).values)
    assert not torch.equal(before, after)
    with pytest.warns(GateWarning, match=ROUTERS[0]), penstock.force(mixtral, "shuffle", ROUTERS[0]):
        mixtral(ids[:1, :1])


def test_routings_of_one_text_can_be_forced_on_another(mixtral: nn.Module, ids: Tensor) -> None:
    with penstock.watch(mixtral, keep="values") as log:
        expected = mixtral(ids).logits
    with penstock.force(mixtral, log.values()):
        assert torch.allclose(mixtral(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with penstock.force(mixtral, log.values()), penstock.watch(mixtral, keep="values") as seen:
        mixtral(49 - ids)
    assert all(torch.equal(log.values()[name][0], seen.values()[name][0]) for name in ROUTERS)


def test_functions_see_a_routing_and_dropping_an_expert_is_one(mixtral: nn.Module, ids: Tensor) -> None:
    def without_the_first(routing: Routing) -> Tensor:
        row = routing.dense() * torch.tensor([0.0, 1.0, 1.0, 1.0])
        return row / row.sum(-1, keepdim=True).clamp_min(1e-9)

    with penstock.force(mixtral, without_the_first), penstock.watch(mixtral) as log:
        mixtral(ids, labels=ids).loss.backward()
    assert all(log[name].summary()["load"][0] == 0 for name in ROUTERS)
    assert mixtral.get_submodule(ROUTERS[0]).weight.grad.any()
    mixtral.zero_grad()
    with penstock.force(mixtral, "open"):
        mixtral(ids, labels=ids).loss.backward()
    assert mixtral.get_submodule(ROUTERS[0]).weight.grad is None


def test_generation_is_watched_and_forced(mixtral: nn.Module, ids: Tensor) -> None:
    with penstock.force(mixtral, 2), penstock.watch(mixtral) as log:
        out = mixtral.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 10)
    assert log[ROUTERS[0]].summary()["load"] == [0, 0, 1, 0]
    assert log[ROUTERS[0]].summary()["inputs"] == 3 * (7 + 2)


def test_marks_survive_copies_and_errors_name_the_routers(mixtral: nn.Module, ids: Tensor) -> None:
    file = io.BytesIO()
    torch.save(mixtral, file)
    file.seek(0)
    for copied in (copy.deepcopy(mixtral), torch.load(file, weights_only=False)):
        assert [spec_of(gate) for gate in named_gates(copied).values()] == [
            spec_of(gate) for gate in named_gates(mixtral).values()
        ]
        with penstock.force(copied, "open"):
            assert not torch.equal(copied(ids).logits, mixtral(ids).logits)
    with pytest.raises(GateNotFoundError, match=r"model\.layers\.0\.mlp\.gate, model\.layers\.1\.mlp\.gate"):
        penstock.force(mixtral, "open", "*.router")
    with pytest.raises(ClosedError, match=r"model\.layers\.0\.mlp\.gate"):
        penstock.force(mixtral, "closed")


def test_ablating_the_routers_costs_the_loss(mixtral: nn.Module, ids: Tensor) -> None:
    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    table = penstock.ablate(mixtral, loss)
    assert len(table) == 1 + 3 * 3
    assert table[0]["metric"] == loss(mixtral)
    assert all(row["metric change"] != 0 for row in table[1:])


def test_a_part_of_what_a_module_returns_can_be_its_gate() -> None:
    class Attention(nn.Module):
        """Returns (output, weights), as attention modules do; what is gated comes first or last."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.sigmoid()

    module = penstock.mark(Attention(), kind="scale", passes="position", output=1)
    x = torch.randn(3, 4)
    with penstock.force(module, "closed"), penstock.watch(module) as log:
        out, gate = module(x)
    assert torch.equal(out, x)
    assert torch.equal(gate, torch.zeros(3, 4))
    assert log[""].summary()["inputs"] == 3


def test_a_marked_squeeze_and_excite_is_a_channel_gate_of_images() -> None:
    torch.manual_seed(0)
    model, images = marked_squeeze_excite(), torch.randn(4, 3, 6, 5)
    plain = SqueezeExcite()
    plain.load_state_dict(model.state_dict())
    with penstock.watch(model, keep="values") as log:
        assert torch.equal(model(images), plain(images))
        model(torch.randn(2, 3, 9, 9))
    summary = log["gate"].summary()
    values = torch.cat(log.values()["gate"]).flatten(1).double()
    assert (summary["inputs"], summary["units"], summary["passes"]) == (6, 6, "channel")
    assert summary["unit_means"] == pytest.approx(values.mean(0).tolist(), rel=1e-12)
    features = model.conv(images).mean((2, 3))
    with penstock.force(model, "open"):
        assert torch.allclose(model(images), model.head(features), atol=1e-6)
    with penstock.force(model, "closed"):
        assert torch.equal(model(images), model.head.bias.expand(4, 5))
    with penstock.force(model, "shuffle"):
        assert not torch.allclose(model(images), plain(images))
    with penstock.force(model, log.mean()):
        expected = model.head(features * values.mean(0).float())
        assert torch.allclose(model(images), expected, atol=1e-6)
    assert spec_of(pickle.loads(pickle.dumps(model)).gate) == spec_of(model.gate)
    assert list(named_gates(nn.Sequential(plain, model))) == ["1.gate"]


def test_gates_of_a_scale_of_their_own_say_so() -> None:
    model = penstock.mark(nn.Hardtanh(0.0, 2.0), kind="scale", passes="feature", range=(0.0, 2.0), neutral=(0.0, 2.0))
    with penstock.force(model, "open"):
        assert torch.equal(model(torch.randn(3, 2)), torch.full((3, 2), 2.0))
