"""Codebooks: the layer against plain references, reading and writing codes, the language model around them."""

from __future__ import annotations

import doctest
import math
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.data.base import Source
from penstock.data.fsm import FSMConfig, FSMData, StateMachine
from penstock.errors import UserError
from penstock.gates import GateWarning, Routing
from penstock.interop.create import create_model, load_authors
from penstock.lab.results import Results
from penstock.nn import code_reading
from penstock.nn import codebook as module
from penstock.nn.code_reading import (
    bypass_codebooks,
    find_codebooks,
    force_codes,
    kmeans_codebooks,
    record_codes,
    without_codes,
)
from penstock.nn.codebook import CodebookKey, CodebookLayer, CodebookWrapper, GroupCodebookLayer, make_codebook
from penstock.systems.sequence.codebook.checkpoint import from_authors, load_codebook, to_authors
from penstock.systems.sequence.codebook.experiment import (
    CodebookConfig,
    CodebookModelling,
    CodebookSystem,
    reconstruction_error,
    straight_through_error,
)
from penstock.systems.sequence.codebook.model import CodebookLM, Place
from penstock.systems.sequence.codebook.probes import (
    codes_of_states,
    forcing,
    jensen_shannon,
    purity_of_states,
    sample,
    sampled_transitions,
    transition_mass,
    whole_states,
)
from penstock.systems.sequence.codebook.reading import code_as_classifier, code_purity, code_table, codebook_table
from penstock.tasks.base import Training

PLACES: tuple[Place, ...] = get_args(Place)
HERE = CodebookKey(0, "mlp")
TOKENS = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(1))


def layer(top_k: int = 2, num_codes: int = 12, dim: int = 6, **options: Any) -> CodebookLayer:
    torch.manual_seed(0)
    made = CodebookLayer(dim, num_codes, top_k=top_k, key=HERE, **options).double()
    nn.init.normal_(made.ln.weight)
    nn.init.normal_(made.ln.bias)
    return made


def activations(batch: int = 3, length: int = 5, dim: int = 6) -> Tensor:
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def lm(**options: Any) -> CodebookLM:
    torch.manual_seed(0)
    usual = {"intermediate_size": 24, "rotary_fraction": 0.5, "num_codes": 10, "top_k": 2}
    model = CodebookLM(13, 16, 2, 4, **usual | options).double().eval()
    for name, parameter in model.named_parameters():
        if "codebooks" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def reference_ids(u: Tensor, codes: Tensor, top_k: int, similarity: str) -> Tensor:
    """The definition, token by token and code by code; best first."""
    chosen = []
    for token in u.detach().flatten(0, 1):
        if similarity == "euclidean":
            score = [-float((token - code).norm()) for code in codes.detach()]
        else:
            score = [float(token @ code / code.norm()) for code in codes.detach()]
        chosen.append(sorted(range(len(codes)), key=lambda c: -score[c])[:top_k])
    return torch.tensor(chosen).unflatten(0, u.shape[:2])


# -- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["inner_product", "cosine", "euclidean"])
@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_output_is_the_mean_of_the_most_similar_codes(similarity: Any, top_k: int) -> None:
    codebook, x = layer(top_k, similarity=similarity), activations()
    u, codes = codebook.ln(x), codebook.codebook.weight
    expected = reference_ids(u, codes, top_k, similarity)
    with record_codes(codebook) as log:
        y = codebook(x)
    assert torch.equal(log[HERE][0], expected)
    torch.testing.assert_close(y, codes[expected].mean(-2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", ["base", "aeloss", "vqvae-0.5", "vqvae", "fullaeloss-0.1", "fullaeloss"])
@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
def test_gradients_are_those_of_the_auxiliary_losses(loss: str, similarity: Any) -> None:
    codebook, x = layer(3, loss=loss, similarity=similarity), activations().requires_grad_()
    upstream = torch.randn_like(x)
    own = (codebook.codebook.weight, codebook.ln.weight, codebook.ln.bias)
    got = torch.autograd.grad(codebook(x), (x, *own), upstream)

    kind, _, beta = loss.partition("-")
    u = codebook.ln(x)
    y = own[0][reference_ids(u, own[0], 3, similarity)].mean(-2)
    through = u + (y - u).detach()  # straight through to the input
    total = (through * upstream).sum()
    if kind != "vqvae":
        total = total + ((y - y.detach()) * upstream).sum()
    if kind != "base":
        total = total + (y - u.detach()).square().sum(-1).mean()
    if kind in ("vqvae", "fullaeloss"):
        total = total + float(beta or 0.25) * (u - y.detach()).square().sum()
    for ours, theirs in zip(got, torch.autograd.grad(total, (x, *own)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_layer_keeps_its_own_loss() -> None:
    """The authors keep the loss in a class attribute that all models share."""
    x, first = activations(), layer(loss="vqvae")
    (before,) = torch.autograd.grad(first(x).sum(), first.codebook.weight)
    y = first(x)
    layer(loss="base")(x).sum().backward()
    (after,) = torch.autograd.grad(y.sum(), first.codebook.weight)
    assert torch.equal(before, after)


def test_training_lowers_the_reconstruction_error_and_nothing_is_added_to_the_loss() -> None:
    codebook, x = layer(1), activations(64)
    optimizer = torch.optim.Adam(codebook.codebook.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        y = codebook(x)
        y.backward(torch.zeros_like(y))
        optimizer.step()
        errors.append(codebook.metrics.mse)
        codebook.metrics.reset()
    assert errors[-1] < 0.7 * errors[0]


def test_codes_of_length_zero_are_no_trouble() -> None:
    codebook, x = layer(1), activations()
    with torch.no_grad():
        codebook.codebook.weight[3] = 0
    with penstock.watch(codebook, keep="values"):
        assert codebook(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
def test_precisions(dtype: torch.dtype, similarity: Any) -> None:
    codebook = layer(2, similarity=similarity).to(dtype)
    x = activations().to(dtype).requires_grad_()
    y = codebook(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for _ in range(2000):
        codebook.metrics.update(codebook.selector(x, codebook.codebook.weight), x, y)
    assert codebook.metrics.tokens == 15 * 2001, "counts keep their precision"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 13}, "top_k=13, num_codes=12"),
        ({"top_k": 0}, "top_k must be from 1 to num_codes"),
        ({"similarity": "dot"}, "similarity='dot': it must be one of inner_product, cosine, euclidean"),
        ({"loss": "mse"}, "loss='mse': it must be base, aeloss, vqvae or fullaeloss"),
        ({"loss": "vqvae--1"}, "a beta of 0 or more"),
        ({"loss": "aeloss-0.25"}, "the last two also with a beta"),
        ({"replace_after": -1}, "replace_after=-1"),
    ],
)
def test_impossible_codebooks_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layer(**options)


def test_impossible_groups_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="num_codebooks=4 must divide the width 6"):
        GroupCodebookLayer(6, 12, 4)
    with pytest.raises(ValueError, match="codebook_type='vanilla' has one codebook, not num_codebooks=2"):
        make_codebook(6, 12, num_codebooks=2)
    with pytest.raises(ValueError, match="it must be vanilla or group"):
        make_codebook(6, 12, codebook_type="grouped")  # type: ignore[arg-type]
    for shape in ((5, 6), (2, 5, 7), (2, 5, 1, 6)):
        with pytest.raises(ValueError, match=r"must be \(B, L, 6\)"):
            layer()(torch.zeros(shape, dtype=torch.float64))
    for shape in ((5, 6), (2, 5, 3, 2), (2, 5, 8)):
        with pytest.raises(ValueError, match=r"\(B, L, 6\) or \(B, L, 2, 3\)"):
            GroupCodebookLayer(6, 12, 2)(torch.zeros(shape))


def test_a_group_is_one_codebook_a_chunk() -> None:
    torch.manual_seed(0)
    group, x = GroupCodebookLayer(6, 12, 2, top_k=2).double(), activations()
    y = group(x)
    apart = torch.cat([own(chunk) for own, chunk in zip(group.codebook, x.chunk(2, -1), strict=True)], -1)
    assert torch.equal(y, apart)
    assert torch.equal(group(x.unflatten(-1, (2, 3))), y.unflatten(-1, (2, 3)))
    assert not torch.allclose(group.codebook[1](x[..., 3:]), group.codebook[0](x[..., 3:]))


# -- the gate ----------------------------------------------------------------------------------------------------


def test_watching_or_cutting_the_tokens_into_parts_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, x = layer(3, num_codes=50, dim=16).float(), torch.randn(4, 33, 16)
    whole = codebook(x)
    with penstock.watch(codebook, keep="values") as log:
        assert torch.equal(codebook(x), whole)
    indicator = log.values()["selector"][0]
    assert indicator.shape == (4, 33, 50)
    assert indicator.unique().tolist() == [0, 1]
    assert (indicator.sum(-1) == 3).all()
    assert log["selector"].summary()["effective"] == pytest.approx(3)
    torch.testing.assert_close(indicator @ codebook.codebook.weight / 3, whole)
    monkeypatch.setattr(module, "_SCORES_CPU", 50 * 7)  # seven tokens at a time
    assert torch.equal(codebook(x), whole)
    with penstock.watch(codebook):
        assert torch.equal(codebook(x), whole)


def test_scores_are_kept_only_for_those_who_look() -> None:
    codebook, x = layer(), activations()
    unseen = codebook.selector(x, codebook.codebook.weight)
    assert unseen.logits.isnan().all()
    assert unseen.logits.untyped_storage().nbytes() < 100
    seen: list[Routing] = []
    with penstock.force(codebook, lambda routing: seen.append(routing) or routing):
        codebook.selector(x, codebook.codebook.weight)
    assert torch.equal(seen[0].indices, unseen.indices)
    assert torch.equal(seen[0].logits.topk(2).indices, unseen.indices)


def test_forcing_the_gate() -> None:
    codebook, x = layer(2), activations()
    codes = codebook.codebook.weight
    with penstock.force(codebook, "closed"):
        assert codebook(x).abs().max() == 0
    with penstock.force(codebook, "open"):
        torch.testing.assert_close(codebook(x), codes.mean(0).expand_as(x))
    with penstock.force(codebook, 7):  # one code alone: the divisor stays K
        torch.testing.assert_close(codebook(x), (codes[7] / 2).expand_as(x))
    with penstock.watch(codebook, keep="values") as log:
        y = codebook(x)
    with penstock.force(codebook, log.values()):
        torch.testing.assert_close(codebook(x.flip(0)), y)


def test_gradients_flow_through_a_forced_function() -> None:
    codebook, x = layer(2, loss="base"), activations()
    plain = codebook(x).detach()
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with penstock.force(codebook, lambda routing: routing._replace(weights=routing.weights * strength)):
        y = codebook(x)
    (got,) = torch.autograd.grad(y.sum(), strength)
    torch.testing.assert_close(got, plain.sum())  # below one, the divisor stays K


# -- reading and writing -----------------------------------------------------------------------------------------


def test_a_forced_code_takes_the_place_of_its_slot() -> None:
    codebook, x = layer(3), activations()
    codes = codebook.codebook.weight
    with record_codes(codebook) as log:
        plain = codebook(x)
    ids = log[HERE][0]
    with force_codes(codebook, [(0, "mlp", None, 7, 2, 1)]):
        forced = codebook(x)
    torch.testing.assert_close(forced[:, 2], (codes[ids[:, 2, 0]] + codes[7] + codes[ids[:, 2, 2]]) / 3)
    others = [0, 1, 3, 4]
    assert torch.equal(forced[:, others], plain[:, others])
    with force_codes(codebook, [(0, "mlp", None, -1, -1, 0)]):  # taken away: the divisor stays
        torch.testing.assert_close(codebook(x)[:, -1], (codes[ids[:, -1, 1]] + codes[ids[:, -1, 2]]) / 3)
    with force_codes(codebook, [(0, "mlp", None, 7, None, "append")]):  # one more: it grows
        torch.testing.assert_close(codebook(x), (codes[ids].sum(-2) + codes[7]) / 4)
    with force_codes(codebook, [(0, "mlp", None, slot, 0, slot) for slot in range(3)]), record_codes(codebook) as log:
        torch.testing.assert_close(codebook(x)[:, 0], codes[:3].mean(0).expand(3, -1))
    assert log[HERE][0][:, 0].tolist() == [[0, 1, 2]] * 3
    with force_codes(codebook, []):
        assert torch.equal(codebook(x), plain)
    assert not codebook.selector._forward_hooks


def test_an_appended_code_at_one_position_leaves_the_divisor_elsewhere() -> None:
    codebook, x = layer(2), activations()
    plain = codebook(x)
    with force_codes(codebook, [(0, "mlp", None, 7, 1, "append")]):
        forced = codebook(x)
    torch.testing.assert_close(forced[:, 1], (2 * plain[:, 1] + codebook.codebook.weight[7]) / 3)
    torch.testing.assert_close(forced[:, 2:], plain[:, 2:])


@pytest.mark.parametrize("training", [True, False])
def test_codes_are_forced_in_both_modes(training: bool) -> None:
    codebook, x = layer(1).train(training), activations()
    with force_codes(codebook, [(0, "mlp", None, 5)]):
        assert torch.equal(codebook(x), codebook.codebook.weight[5].expand_as(x))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ((1, "mlp", None, 0), r"no codebook at \(1, 'mlp', None\)"),
        ((0, "attn", None, 0), r"must be one of \(0, 'mlp', None\)"),
        ((0, "mlp", 0, 0), "there is no codebook"),
        ((0, "mlp", None, 12), "code 12 must be from 0 to 11"),
        ((0, "mlp", None, -2), "or -1 to empty a slot"),
        ((0, "mlp", None, -1, 0, "append"), "or -1 to empty a slot"),
        ((0, "mlp", None, 3, 0, 2), "slot 2 must be from 0 to 1, or 'append'"),
    ],
)
def test_impossible_interventions_are_refused(entry: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says), force_codes(layer(2), [entry]):
        pytest.fail("entered")


def test_an_intervention_that_met_no_position_is_warned_about() -> None:
    codebook, x = layer(2), activations()
    with pytest.warns(GateWarning, match="no call had that position"), force_codes(codebook, [(0, "mlp", None, 3, 5)]):
        codebook(x)
    with warnings.catch_warnings(), force_codes(codebook, [(0, "mlp", None, 3, 4)]):
        warnings.simplefilter("error")
        codebook(x)
        codebook(x[:, :1])


def test_a_model_without_keyed_codebooks_says_so() -> None:
    with pytest.raises(ValueError, match="Linear has no codebooks with a key"):
        find_codebooks(nn.Linear(2, 2))


@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
@pytest.mark.parametrize("positions", [None, [0, 3]])
def test_forbidden_codes_leave_their_places_to_the_next_best(similarity: Any, positions: list[int] | None) -> None:
    codebook, x = layer(2, similarity=similarity), activations()
    ranking = reference_ids(codebook.ln(x), codebook.codebook.weight, 12, similarity)
    with penstock.force(codebook, without_codes([1, 5], top=2, positions=positions)), record_codes(codebook) as log:
        y = codebook(x)
    for b in range(3):
        for t in range(5):
            left = [c for c in ranking[b, t].tolist() if c not in (1, 5)][2:4]
            if positions is not None and t not in positions:
                left = ranking[b, t, :2].tolist()
            assert log[HERE][0][b, t].tolist() == left
            torch.testing.assert_close(y[b, t], codebook.codebook.weight[left].mean(0))


def test_forbidden_codes_fill_places_emptied_before() -> None:
    codebook, x = layer(2), activations()
    with penstock.force(codebook, without_codes([1])):
        expected = codebook(x)
    with force_codes(codebook, [(0, "mlp", None, -1)]), penstock.force(codebook, without_codes([1])):
        assert torch.equal(codebook(x), expected)


def test_forbidden_codes_can_leave_their_places_empty() -> None:
    codebook, x = layer(4), activations()
    ranking = reference_ids(codebook.ln(x), codebook.codebook.weight, 4, "inner_product")
    change = without_codes([1, 5], top=1, ranks=[3], keep_k=False, positions=[0, 1])
    with penstock.force(codebook, change), record_codes(codebook) as log:
        y = codebook(x)
    for b in range(3):
        for t in range(5):
            gone = {3} | ({r for r in range(4) if r < 1 or ranking[b, t, r] in (1, 5)} if t < 2 else set())
            expected = [-1 if r in gone else int(ranking[b, t, r]) for r in range(4)]
            assert log[HERE][0][b, t].tolist() == expected
            kept = [c for c in expected if c >= 0]
            torch.testing.assert_close(y[b, t], codebook.codebook.weight[kept].sum(0) / 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_codes([12]), r"codes=\[12\]: they must be from 0 to 11"),
        (without_codes(range(8), top=3), "12 codes without 8 of them and the best 3: fewer than 2 are left"),
        (without_codes(ranks=[2], keep_k=False), r"ranks=\[2\]: they must be from 0 to 1"),
    ],
)
def test_impossible_prohibitions_are_refused(change: Any, says: str) -> None:
    codebook = layer(2)
    with pytest.raises(ValueError, match=says), penstock.force(codebook, change):
        codebook(activations())


def test_metrics_are_those_of_the_definition() -> None:
    codebook = layer(2)
    seen, errors, norms = [], [], []
    for seed in range(3):
        x = torch.randn(2, 4 + seed, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with record_codes(codebook) as log:
            y = codebook(x)
        u = codebook.ln(x)
        seen.append(set(log[HERE][0].flatten().tolist()))
        errors.append((y - u).square().sum(-1).flatten())
        norms.append(torch.stack([u.norm(dim=-1), y.norm(dim=-1)]).flatten(1))
    metrics = codebook.metrics
    assert metrics.counts.tolist() == [sum(c in ids for ids in seen) for c in range(12)], (
        "once a batch, not once a token"
    )
    assert metrics.tokens == 2 * (4 + 5 + 6)
    assert metrics.mse == pytest.approx(torch.cat(errors).mean().item())
    means = torch.cat(norms, 1).mean(1).tolist()
    assert [metrics.input_norm, metrics.output_norm] == pytest.approx(means)
    assert metrics.active_codes == len(set().union(*seen))
    assert metrics.dead_share == 1 - metrics.active_codes / 12
    (row,) = codebook_table(codebook)
    assert (row["active"], row["mse"]) == (metrics.active_codes, metrics.mse)
    metrics.reset()
    assert (metrics.tokens, metrics.active_codes) == (0, 0)
    assert math.isnan(metrics.mse)


def test_codes_that_stay_unused_become_inputs() -> None:
    codebook, x = layer(1, num_codes=40, replace_after=3), activations(4)
    before = codebook.codebook.weight.detach().clone()
    with record_codes(codebook) as log:
        for _ in range(3):
            codebook.train()(x)
            codebook.eval()(activations() * -1)  # evaluation neither counts nor replaces
    assert torch.equal(codebook.codebook.weight, before)
    used = torch.cat([log[HERE][i].flatten() for i in (0, 2, 4)]).unique()
    codebook.train()(x)
    after = codebook.codebook.weight.detach()
    assert torch.equal(after[used], before[used])
    unused = [c for c in range(40) if c not in used]
    inputs = codebook.ln(x).flatten(0, 1)
    assert (torch.cdist(after[unused], inputs).amin(1) < 1e-6).all()
    assert len(after[unused].unique(dim=0)) == min(len(unused), len(inputs)), (
        "each input is used before one is repeated"
    )
    noisy = layer(1, num_codes=40, replace_after=1, replace_noise=0.1)
    noisy(x), noisy(x)
    distance = torch.cdist(noisy.codebook.weight, noisy.ln(x).flatten(0, 1)).amin(1)
    assert ((distance > 1e-6) & (distance < 2)).sum() > 20


def test_bypassed_codebooks_pass_their_input() -> None:
    codebook, x = layer(), activations()
    with bypass_codebooks(codebook):
        assert codebook(x) is x
    assert not torch.allclose(codebook(x), x)
    codebook.enabled = False
    with bypass_codebooks(codebook):
        pass
    assert not codebook.enabled, "what was off before stays off"


def test_a_codebook_around_any_module() -> None:
    class Foreign(nn.Module):
        kind = "sliding"

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
            return x * scale, "cache"

    wrapped, x = CodebookWrapper(Foreign(), layer()), activations()
    y, rest = wrapped(x, scale=2.0)
    assert torch.equal(y, wrapped.codebook_layer(2 * x))
    assert rest == "cache"
    assert wrapped.kind == "sliding"
    with pytest.raises(AttributeError, match="absent"):
        wrapped.absent  # noqa: B018
    assert torch.equal(CodebookWrapper(nn.Identity(), layer())(x), layer()(x))


def test_kmeans_starts_codes_at_the_centres() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 8, dtype=torch.float64) * 4
    group = GroupCodebookLayer(16, 3, 2, key=CodebookKey(0, "attn")).double()
    x = torch.cat([centres, centres.flip(0)], 1)[torch.arange(60) % 3].view(4, 15, 16)
    kmeans_codebooks(group, [x + 0.01 * torch.randn_like(x) for _ in range(4)], examples=9, seed=1)
    assert group.training
    for codebook in group.codebook:
        expected = F.layer_norm(centres, (8,))
        assert torch.cdist(expected, codebook.codebook.weight).amin(1).max() < 0.02
    with pytest.raises(ValueError, match="a batch of 2 tokens cannot start 3 codes"):
        kmeans_codebooks(group, [x[:1, :2]])
    with pytest.raises(ValueError, match="at least one batch"):
        kmeans_codebooks(group, [])


def test_the_table_says_at_which_tokens_a_code_fires() -> None:
    class Reader(nn.Module):
        """Two codes: the parity of the token."""

        def __init__(self) -> None:
            super().__init__()
            self.codebook = CodebookLayer(2, 3, key=CodebookKey(4, "mlp"))
            with torch.no_grad():
                self.codebook.codebook.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]))

        def forward(self, tokens: Tensor) -> Tensor:
            odd = (tokens % 2).float()
            return self.codebook(torch.stack([1 - odd, odd], -1))

    tokens = torch.tensor([[2, 3, 2, 4], [1, 1, 2, 5]])
    table = code_table(Reader(), tokens, decode=lambda ids: "".join(map(str, ids)), contexts=2, context=3, top=1)
    assert [(row["layer"], row["place"], row["head"], row["code"], row["count"], row["share"]) for row in table] == [
        (4, "mlp", None, 0, 4, 0.5),
        (4, "mlp", None, 1, 4, 0.5),
    ]
    assert [row["tokens"] for row in table] == ["'2' 75%", "'1' 50%"]
    assert [row["contexts"] for row in table] == ["2 | 232", "23 | 1"]
    doubled = code_table(Reader(), [tokens, tokens])
    assert [row["count"] for row in doubled] == [8, 8]


def test_purity_precision_and_recall() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [3, 3], [-1, 4]])
    assert code_purity(ids) == 4 / 5
    assert code_as_classifier(ids, 0, torch.tensor([True, False, True, False])) == (0.5, 0.5)
    assert math.isnan(code_as_classifier(ids, 9, torch.tensor([True] * 4))[0])


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(code_reading) == (0, 3)


# -- the language model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
def test_without_codebooks_it_is_gpt_neox(parallel: bool) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        rotary_pct=0.5, max_position_embeddings=32, use_parallel_residual=parallel,
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(config).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = load_authors("codebook", theirs.state_dict(), num_heads=4, rotary_fraction=0.5, parallel_residual=parallel)
    torch.testing.assert_close(ours.eval()(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_codebook_stands_where_it_says(place: Place, parallel: bool) -> None:
    """A plain block in a few lines, with the codebook's function put at its place."""
    model = lm(codebook_at=(place,), codebook_layers=(1,), parallel_residual=parallel)
    block, x = model.blocks[1], torch.randn(2, 6, 16, dtype=torch.float64)
    span = model.span(TOKENS[:2, :6], None, None)
    (codebook,) = block.home(place)[0].values()

    def at(here: str, value: Tensor) -> Tensor:
        return codebook(value) if here == place else value

    attention, mlp = block.attention, block.mlp
    q, k, v = (
        at("qkv", attention.query_key_value(block.input_layernorm(x))).view(2, 6, 4, 12).transpose(1, 2).chunk(3, -1)
    )
    angle = torch.arange(6.0)[:, None]

    def turn(t: Tensor) -> Tensor:  # two of four channels rotate, with frequency one
        first, second = t[..., :1], t[..., 1:2]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), t[..., 2:]], -1
        )

    scores = (turn(q) @ turn(k).transpose(-1, -2) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    attended = at("attn", attention.dense(at("attn_preproj", heads)))
    read = block.post_attention_layernorm(x if parallel else x + attended)
    added = at("mlp", mlp.dense_4h_to_h(at("mlp_mid", F.gelu(mlp.dense_h_to_4h(read)))))
    expected = at("transformer_block", x + at("attn_plus_mlp", attended + added))
    torch.testing.assert_close(block(x, span, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_decoding_and_padding_change_nothing(place: Place) -> None:
    model = lm(codebook_at=(place,), codebook_type="group", num_codebooks=2)
    whole = model(TOKENS)
    cache = model.new_cache()
    steps = [model(TOKENS[:, :4], cache=cache), *(model(TOKENS[:, t : t + 1], cache=cache) for t in range(4, 9))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    padded = torch.cat([torch.zeros_like(TOKENS[:, :3]), TOKENS, torch.zeros_like(TOKENS[:, :2])], 1)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, 3:12] = True
    torch.testing.assert_close(model(padded, mask_BL=mask)[:, 3:12], whole, rtol=0, atol=1e-12)


def test_checkpointing_gives_the_same_gradients_and_counts_once() -> None:
    plain, again = lm(codebook_at=("mlp", "attn_preproj")).train(), lm(codebook_at=("mlp", "attn_preproj")).train()
    again.gradient_checkpointing = True
    for model in (plain, again):
        model(TOKENS).square().mean().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    for key, codebook in find_codebooks(again).items():
        assert codebook.metrics.tokens == TOKENS.numel(), key


def test_places_layers_and_settings() -> None:
    model = lm(
        codebook_at=("attn_preproj", "qkv", "mlp_mid"),
        codebook_type=("group", "vanilla", "vanilla"),
        num_codebooks=(-1, 1, 1),
        num_codes=(5, 6, 7),
        top_k=(1, 2, 3),
        codebook_layers=(-1,),
    )
    found = find_codebooks(model)
    heads = [CodebookKey(1, "attn_preproj", h) for h in range(4)]
    assert set(found) == {*heads, *(CodebookKey(1, "qkv", h) for h in range(3)), CodebookKey(1, "mlp_mid")}
    assert {(c.dim, c.num_codes, c.top_k) for c in found.values()} == {(4, 5, 1), (16, 6, 2), (24, 7, 3)}
    assert find_codebooks(lm(codebook_layers=(0, -2))).keys() == {CodebookKey(0, "mlp")}
    weight = found[heads[0]].codebook.weight
    assert 0.6 < weight.detach().std().item() < 1.4, "codes start as standard normal"
    assert {"embed_in.weight"} < model.no_weight_decay()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codebook_at": ("mlp", "heads")}, "there is no place 'heads'; it must be one of attn_preproj, mlp"),
        ({"codebook_layers": (2,)}, r"it must be 'all' or numbers from -2 to 1"),
        ({"codebook_at": ("mlp", "attn"), "num_codes": (5,)}, r"num_codes=\[5\]: codebook_at has 2 places"),
        ({"num_codebooks": 2}, "'vanilla' has one codebook"),
        ({"top_k": 11}, "top_k=11, num_codes=10"),
        ({"codebook_type": "group", "num_codebooks": 3}, "num_codebooks=3 must divide the width 16"),
        ({"rotary_fraction": 0.25}, "even number of channels: 0.25 x 4 is 1"),
    ],
)
def test_impossible_models_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lm(**options)
    with pytest.raises(ValueError, match="num_heads=3 must divide hidden_size=16"):
        CodebookLM(13, 16, 2, 3, intermediate_size=24)


def test_forcing_a_code_acts_on_the_tokens_after_it() -> None:
    model = lm(codebook_at=("attn_preproj",), codebook_type="group", num_codebooks=-1)
    plain = model(TOKENS)
    with force_codes(model, [(0, "attn_preproj", 2, 3, 4, "append"), (1, "attn_preproj", 0, 1, 6)]):
        forced = model(TOKENS)
    assert torch.equal(forced[:, :4], plain[:, :4])
    assert not torch.isclose(forced[:, [4, 6]], plain[:, [4, 6]]).all(-1).any()


def test_published_sizes() -> None:
    """Codebooks add C D + 2 D parameters each to the network they are put into."""
    with torch.device("meta"):
        sizes = {
            n: sum(p.numel() for p in create_model(f"codebook_{n}").parameters())
            for n in ("tokfsm", "pythia_70m", "pythia_70m_baseline")
        }
    assert sizes["pythia_70m"] - sizes["pythia_70m_baseline"] == 6 * 8 * (10_000 * 64 + 2 * 64)
    block = 4 * 128 + 3 * 128 * 129 + 128 * 129 + 512 * 129 + 128 * 513
    codebooks = 4 * (1000 * 32 + 2 * 32) + 1000 * 128 + 2 * 128
    assert sizes["tokfsm"] == 2 * 11 * 128 + 2 * 128 + 4 * (block + codebooks)


@pytest.mark.parametrize("places", [(), ("mlp",), ("attn_preproj", "mlp"), ("attn", "attn_preproj", "qkv"), PLACES])
def test_authors_checkpoint_round_trip(places: tuple[Place, ...], tmp_path: Path) -> None:
    model = lm(codebook_at=places, codebook_layers=(1,), top_k=2)
    state = to_authors(model)
    torch.save(state | {"model.gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.zeros(1)}, tmp_path / "m.pt")
    again = load_authors("codebook", tmp_path / "m.pt", num_heads=4, top_k=2, rotary_fraction=0.5)
    assert torch.equal(again.eval()(TOKENS), model(TOKENS))
    if places == ("attn_preproj", "mlp"):
        assert "model.gpt_neox.layers.1.mlp.codebook_layer.codebook.weight" in state
        assert "model.gpt_neox.layers.1.mlp.module_layer.dense_h_to_4h.weight" in state
        assert "model.gpt_neox.layers.1.attention.codebook_layer.ln.bias" in state
        assert "model.embed_out.weight" in state


def test_groups_are_read_from_the_key_names() -> None:
    options: dict[str, Any] = {
        "codebook_at": ("attn_preproj", "mlp"),
        "codebook_type": ("group", "vanilla"),
        "num_codebooks": (-1, 1),
    }
    model = lm(**options, num_codes=(6, 9), top_k=(1, 3))
    state = to_authors(model)
    assert "model.gpt_neox.layers.0.attention.codebook_layer.codebook.3.codebook.weight" in state
    again = from_authors(state, num_heads=4, top_k={"attn_preproj": 1, "mlp": 3}, rotary_fraction=0.5)
    assert torch.equal(again.eval()(TOKENS), model(TOKENS))


def test_checkpoint_problems_are_named() -> None:
    state = to_authors(lm())
    with pytest.raises(UserError, match=r"misshapen: final_layer_norm\.bias"):
        from_authors(state | {"model.gpt_neox.final_layer_norm.bias": torch.zeros(3)}, num_heads=4, rotary_fraction=0.5)
    with pytest.raises(UserError, match="no GPT-NeoX model"):
        from_authors({"model.gpt_neox.embed_in.weight": torch.zeros(3, 3)}, num_heads=4)
    with pytest.raises(UserError, match="no codebook is known at this place"):
        from_authors(state | {"model.gpt_neox.layers.0.mlp.dense.codebook_layer.ln.bias": torch.zeros(3)}, num_heads=4)
    other = {k.replace("layers.0.mlp.codebook_layer", "layers.0.attention.codebook_layer"): v for k, v in state.items()}
    with pytest.raises(UserError, match=r"different layers: attn_preproj \[0\], mlp \[1\]"):
        from_authors(other, num_heads=4, rotary_fraction=0.5)
    with pytest.raises(UserError, match=r"no codebook\.weight among a"):
        load_codebook({"a": torch.zeros(1)})


# -- the experiment ----------------------------------------------------------------------------------------------

SMALL = CodebookConfig(
    width=16, mlp_hidden=32, num_codes=30, fsm=FSMConfig(sequences=256, test_sequences=64), train=Training(steps=2)
)


class Oracle(CodebookLM):
    """Knows the machine: its logits are the true next digit's, found from the digits so far."""

    def __init__(self, machine: StateMachine) -> None:
        super().__init__(machine.vocab_size, 8, 1, 1, intermediate_size=8, rotary_fraction=1.0, num_codes=20)
        self.machine = machine

    def forward(self, tokens_BL: Tensor, *, cache: Any = None, mask_BL: Any = None) -> Tensor:
        machine = self.machine
        if cache is not None:  # whole again, for sampling
            cache.seen = torch.cat([getattr(cache, "seen", tokens_BL[:, :0]), tokens_BL], 1)
            return self(cache.seen)[:, -tokens_BL.shape[1] :]
        logits = torch.full((*tokens_BL.shape, machine.vocab_size), -1e9)
        for row, tokens in enumerate(tokens_BL.tolist()):
            for place in range(len(tokens)):
                whole, part = divmod(place, machine.num_digits)
                follow = range(machine.num_states)
                if whole:
                    before = machine.read(tokens_BL[row : row + 1, : 1 + whole * machine.num_digits])[0, -1]
                    follow = machine.next_NE[before].tolist() if before >= 0 else []
                begun = tokens[1 + whole * machine.num_digits : place + 1]
                for state in follow:
                    digits = machine.digits_ND[state].tolist()
                    if digits[:part] == begun:
                        old = logits[row, place, digits[part]]
                        logits[row, place, digits[part]] = torch.logaddexp(old, torch.tensor(0.0))
        return logits


def test_who_knows_the_machine_makes_valid_transitions_only() -> None:
    machine = StateMachine(FSMConfig(states=6, edges=2, base=3))
    oracle = Oracle(machine)
    assert transition_mass(oracle, machine) == pytest.approx(1.0, abs=1e-5)
    drawn = sampled_transitions(oracle, machine, 8, seed=0)
    assert drawn == {"transition_accuracy": 1.0, "first_transition_accuracy": 1.0}
    uniform = lm(codebook_at=())
    nn.init.zeros_(uniform.embed_out.weight)
    assert transition_mass(uniform, StateMachine(FSMConfig(base=12))) == pytest.approx(4 / 13**2)


def test_sampling_with_a_cache_follows_the_models_own_distribution() -> None:
    model = lm()
    start = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = sample(model, start, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 3)
    expected = model(start[:1])[0, 0].softmax(-1)
    share = drawn[:, 1].bincount(minlength=13) / 4000
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=0.03)
    token = int(drawn[:, 1].mode().values)
    after = drawn[drawn[:, 1] == token, 2]
    expected = model(torch.tensor([[0, token]]))[0, 1].softmax(-1)
    torch.testing.assert_close((after.bincount(minlength=13) / len(after)).double(), expected, rtol=0, atol=0.08)


def test_codes_of_states_are_counted_where_states_end() -> None:
    data = FSMData(SMALL.fsm)
    model = CodebookSystem._build(SMALL, 6, ("mlp",), (-1,))
    walks = whole_states(data.splits["test"].long(), data.machine)
    assert walks.shape == (64, 15)
    found = codes_of_states(model, data.machine, walks)
    assert found.key == CodebookKey(1, "mlp")
    with record_codes(model) as log:
        model(walks)
    last = log[found.key][0][:, -1, 0]
    state = data.machine.read(walks)[:, -1]
    assert torch.equal(found.states.view(64, 7)[:, -1], state)
    assert torch.equal(found.ids.view(64, 7)[:, -1], last)
    assert int(found.counts.sum()) == 64 * 7
    one = found.states == 3
    assert torch.equal(found.counts[3].long(), found.ids[one, 0].bincount(minlength=30))
    summary = found.summary()
    assert summary["code_recall"] == pytest.approx(summary["modal_agreement"])
    assert 0 <= purity_of_states(model, data.machine) <= 1


def test_forcing_measures_what_it_says() -> None:
    """A model whose last codebook decides the next digit alone: forcing a state's code makes the digits of its own."""
    data = FSMData(SMALL.fsm)
    machine = data.machine
    model = CodebookSystem._build(SMALL, 6, ("transformer_block",), (-1,)).eval()
    walks = whole_states(data.splits["test"].long(), machine)
    found = codes_of_states(model, machine, walks)
    # Each state has a code of its own, whose vector reads out as the state's valid first digits.
    found = type(found)(found.key, found.states, found.states[:, None], torch.eye(20, 30))
    model.final_layer_norm = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        codes = find_codebooks(model)[found.key].codebook.weight.zero_()
        for state in range(20):
            codes[state, :6] = -50.0
            codes[state, machine.digits_ND[machine.next_NE[state], 0]] = 0.0
        model.embed_out.weight.zero_()[:, :6] = torch.eye(6)
    measured = forcing(model, machine, walks, found, seed=0)
    assert measured["forced_mass"] == pytest.approx(1.0)
    assert measured["random_mass"] < 0.95
    assert measured["forced_minus_random"] == pytest.approx(measured["forced_mass"] - measured["random_mass"])
    alone = type(found)(found.key, found.states, torch.zeros_like(found.ids), torch.eye(20, 30)[[0] * 20])
    assert forcing(model, machine, walks, alone, seed=0) == {}, "one code in use: there is no other to compare with"


def test_jensen_shannon() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(jensen_shannon(p, q)) == pytest.approx(math.log(2))
    assert float(jensen_shannon(p, p)) == 0
    r = torch.tensor([0.5, 0.5])
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert float(jensen_shannon(p, r)) == pytest.approx(expected)


def test_the_loss_is_the_texts_alone_and_rates_differ() -> None:
    data = FSMData(SMALL.fsm)
    model = CodebookSystem._build(SMALL, 6, ("mlp",), (-1,))
    task = CodebookModelling(model, SMALL.train, data)
    batch = next(iter(data.test(8)))
    loss, logits = task.step(batch)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    task.model_lr_factor = 0.5
    codebook = {id(p) for p in find_codebooks(model)[CodebookKey(1, "mlp")].parameters()}
    rates = {id(p): group.get("lr", SMALL.train.lr) for group in task.parameter_groups() for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in task.parameter_groups() for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[i] for i in codebook} == {SMALL.train.lr}
    assert {rates[i] for i in rates if i not in codebook} == {0.5 * SMALL.train.lr}
    assert {decays[i] for i in codebook} == {0.0}
    assert list(task.figures()) == ["Which code is in which state"]


def test_measures_and_claims_of_an_arm() -> None:
    system, data = CodebookSystem(), FSMData(SMALL.fsm)
    cells = []
    for arm, build in system.arms(SMALL, data.spec).items():
        (stage,) = system.stages(arm, build(), SMALL, data)
        measured = system.measure(arm, stage().task, SMALL, data, 0)
        assert ("codebook_mse" in measured) == (arm != "ungated")
        assert all(math.isfinite(value) for value in measured.values())
        cells.append({"arm": arm, "seed": 0, "metrics": measured})
    trials = {"gradient": [{"base": 0.0, "aeloss": 0.0}], "more_codes": [{"k1": 2.0, "k4": 1.0}]}
    claims = system.claims(SMALL, Results(cells, trials))
    assert list(claims) == ["modest_cost", "forcing", "gradient", "more_codes"]
    assert claims["more_codes"].values == [-1.0]  # type: ignore[union-attr]
    text = [{"arm": c["arm"], "seed": 0, "metrics": {"loss": 1.0}} for c in cells]
    assert list(system.claims(SMALL, Results(text, trials))) == ["gradient", "more_codes"]


def test_codes_can_start_by_kmeans() -> None:
    system, data = CodebookSystem(), FSMData(SMALL.fsm)
    config = CodebookConfig(**{**vars(SMALL), "kmeans_init": True})
    model = system.arms(config, data.spec)["gated"]()
    before = find_codebooks(model)[CodebookKey(1, "mlp")].codebook.weight.detach().clone()
    system.stages("gated", model, config, data)[0]()
    after = find_codebooks(model)[CodebookKey(1, "mlp")].codebook.weight
    assert not torch.isclose(before, after).any(1).all()
    system.stages("ungated", system.arms(config, data.spec)["ungated"](), config, data)[0]()


def test_ones_own_text_is_modelled_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("the gate lets little through, and what it lets through has a name. " * 200)
    system = CodebookSystem()
    data = system.load_data(SMALL, Source(path))
    assert data.spec["vocab_size"] == 256
    model = system.arms(SMALL, data.spec)["gated"]()
    task = CodebookModelling(model, SMALL.train, data)
    assert task.figures() == {}
    measured = system.measure("gated", task, SMALL, data, 0)
    assert {"codebook_mse", "dead_codes"} <= set(measured)
    assert "transition_mass" not in measured
    frame = CodebookModelling.predict_file(model, data.spec, path)
    assert frame["bits_per_byte"][0] > 0
    with pytest.raises(UserError, match="--test needs --data"):
        system.load_data(SMALL, Source(test=path))


def test_walks_in_a_file_are_judged_line_by_line(tmp_path: Path) -> None:
    machine = StateMachine(SMALL.fsm)
    walk = machine.walks(1, 4, seed=3)
    wrong = walk.clone()
    wrong[0, 3] = (~machine.edges_NN[walk[0, 2]]).nonzero()[0, 0]
    lines = ["".join(map(str, machine.write(w)[0, 1:].tolist())) for w in (walk, wrong)]
    path = tmp_path / "walks.txt"
    path.write_text("\n".join(lines))
    model = CodebookSystem._build(SMALL, 6, ("mlp",), (-1,)).eval()
    frame = CodebookModelling.predict_file(model, FSMData(SMALL.fsm).spec, path)
    assert frame["valid_transitions"].to_list() == pytest.approx([1.0, 2 / 3])
    tokens = machine.write(walk)
    expected = float(F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]))
    assert frame["loss"][0] == pytest.approx(expected)
    path.write_text(f"{lines[0]}\n0125\n")
    with pytest.raises(UserError, match="line 2: column 4: '5' is no digit of base 5"):
        CodebookModelling.predict_file(model, FSMData(SMALL.fsm).spec, path)
    path.write_text("012")
    with pytest.raises(UserError, match="line 1: is too short for a transition"):
        CodebookModelling.predict_file(model, FSMData(SMALL.fsm).spec, path)


def test_side_experiments() -> None:
    assert straight_through_error("base", 0) < 1e-14
    assert straight_through_error("aeloss", 1) < 1e-14
    assert straight_through_error("fullaeloss", 0) > 1e-3, "a commitment is no mere passing through"
    start = reconstruction_error(1, 0, number=128, steps=0)
    assert reconstruction_error(1, 0, number=128, steps=40) < start
