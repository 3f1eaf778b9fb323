"""SeerAttention: masks, targets and gates against plain loops, the layer under any mask, padding, decoding, files."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.data.base import Source
from penstock.errors import UserError
from penstock.interop.create import create_model, list_models, load_authors
from penstock.lab.cards import card
from penstock.lab.config import override
from penstock.lab.results import Results
from penstock.nn.decoder import rotary_tables, rotate
from penstock.systems.sequence.seer_attention.checkpoint import from_authors, load_gates, save_gates, to_authors
from penstock.systems.sequence.seer_attention.experiment import (
    SYSTEM,
    GateDistillation,
    SeerAttentionConfig,
)
from penstock.systems.sequence.seer_attention.gates import POOLINGS, AttnGate, DecodeGate, parse_gate_type
from penstock.systems.sequence.seer_attention.model import SeerAttention, SeerLM
from penstock.systems.sequence.seer_attention.tiles import (
    TileRule,
    decode_distillation_loss,
    density,
    distillation_loss,
    ground_truth,
    open_tiles,
    pool_blocks,
    select_tiles,
    sink_local_scores,
    tile_recall,
)
from penstock.systems.sequence.seer_attention.topics import best_quarter, topic_gate
from penstock.tasks.language_modelling import LanguageModelling

VOCABULARY, BLOCK = 31, 4


def lm(gates: Any = "prefill", **options: Any) -> SeerLM:
    torch.manual_seed(0)
    usual: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 8, "qk_norm": True, "block_size": BLOCK, "nz_ratio": 0.3}
    usual |= {"last_block_dense": False}
    model = SeerLM(VOCABULARY, 16, 2, 4, intermediate_size=24, gates=gates, **usual | options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def random_heads(length: int, heads: int = 4, groups: int = 2, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, heads, width, generator=generator, dtype=torch.float64)
    return q, torch.randn(2, length, groups, width, generator=generator, dtype=torch.float64)


def causal_logits(num: int, seed: int = 0) -> Tensor:
    logits = torch.randn(2, 3, num, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(torch.ones(num, num, dtype=torch.bool).triu(1), torch.finfo(torch.float64).min)


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("num", [1, 2, 5, 9])
def test_rules_keep_what_their_definition_keeps(num: int, diagonal: bool, last: bool) -> None:
    logits = causal_logits(num)
    shares = logits.softmax(-1)
    by_threshold = TileRule("threshold", 0.2, last_block_dense=last, force_diagonal=diagonal)
    by_ratio = TileRule("nz_ratio", nz_ratio=0.6, last_block_dense=last, force_diagonal=diagonal)
    by_budget = TileRule("token_budget", token_budget=3 * 8 + 5, last_block_dense=last, force_diagonal=diagonal)
    for rule, quota in ((by_threshold, 0), (by_ratio, max(1, int((1 - 0.4**0.5) * num))), (by_budget, 3)):
        kept = select_tiles(logits, rule, block_size=8)
        for sample in range(2):
            for head in range(3):
                for row in range(num):
                    expected = set()
                    if rule is by_threshold:
                        expected = {j for j in range(row + 1) if shares[sample, head, row, j] > 0.2}
                    else:
                        order = sorted(range(row + 1), key=lambda j: -float(logits[sample, head, row, j]))
                        if diagonal:
                            order = [row, *[j for j in order if j != row]]
                        expected = set(order[:quota])
                    expected |= {row} if diagonal else set()
                    expected = set(range(row + 1)) if last and row >= num - 2 else expected
                    assert set(kept[sample, head, row].nonzero().flatten().tolist()) == expected


def test_each_head_may_have_its_threshold() -> None:
    logits = causal_logits(6)
    rule = TileRule("threshold", (0.0, 0.1, 0.9), last_block_dense=False)
    kept = select_tiles(logits, rule, block_size=8)
    for head, threshold in enumerate(rule.thresholds):
        one = select_tiles(logits, replace(rule, threshold=threshold), block_size=8)
        assert torch.equal(kept[:, head], one[:, head])
    assert density(kept)[:, 0].eq(1).all()
    assert (density(kept)[:, 1] > density(kept)[:, 2]).all()
    model = lm(method="threshold", threshold=[0.1, [0.0, 0.1, 0.2, 0.3]])
    assert [gate.rule.thresholds for gate in model.gates] == [(0.1,), (0.0, 0.1, 0.2, 0.3)]


def test_density_falls_as_the_threshold_rises() -> None:
    logits = causal_logits(16)
    densities = [
        float(density(select_tiles(logits, TileRule("threshold", t, last_block_dense=False), block_size=8)).mean())
        for t in (0.0, 1e-3, 1e-2, 0.05, 0.1, 0.3, 0.9)
    ]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1
    assert densities[-1] < 0.3


@pytest.mark.parametrize("method", ["threshold", "nz_ratio", "token_budget"])
def test_padding_blocks_change_no_decision(method: Any) -> None:
    rule = TileRule(method, 0.1, 0.75, token_budget=16)
    logits = causal_logits(5)
    alone = select_tiles(logits, rule, block_size=8)
    for left, right in ((2, 0), (0, 3)):
        real = F.pad(torch.ones(2, 5, dtype=torch.bool), (left, right))
        hidden = ~real[:, None, None, :] | torch.ones(5 + left + right, 5 + left + right, dtype=torch.bool).triu(1)
        padded = F.pad(logits, (left, right, left, right)).masked_fill(hidden, torch.finfo(logits.dtype).min)
        kept = select_tiles(padded, rule, block_size=8, real_BN=real)
        assert torch.equal(kept[:, :, left : left + 5, left : left + 5], alone)
        assert not kept[..., ~real[0]].any()


def test_a_row_without_tiles_keeps_its_diagonal() -> None:
    values = torch.zeros(1, 1, 3, 3)
    values[0, 0, 2, 0] = values[0, 0, 0, 2] = 1  # the second lies in the future
    assert open_tiles(values)[0, 0].tolist() == [[True, False, True], [False, True, False], [True, False, False]]


def test_recall_and_density_are_shares() -> None:
    kept = torch.tensor([[True, False], [False, True]])[None, None]
    mass = torch.tensor([[1.0, 0.0], [0.75, 0.25]])[None, None]
    assert float(tile_recall(kept, mass)) == 0.625
    assert float(density(kept)) == pytest.approx(2 / 3)


# -- targets and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_ground_truth_is_the_pooled_map(pool: Any) -> None:
    q, k = (x.transpose(1, 2) for x in random_heads(14))
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    weights = scores.masked_fill(torch.ones(14, 14, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    truth = ground_truth(q, k, block_size=BLOCK, pool=pool)
    expected = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            tile = weights[:, :, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].flatten(2)
            expected[:, :, i, j] = tile.amax(-1) if pool == "max" else tile.sum(-1)
    torch.testing.assert_close(truth, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_loss_is_zero_at_the_truth_and_drops_the_first_quarter() -> None:
    q, k = (x.transpose(1, 2) for x in random_heads(38))  # 10 blocks: the first 2 rows do not count
    truth = ground_truth(q, k, block_size=BLOCK)
    logits = truth.log().clamp(min=-1e4).requires_grad_()
    assert float(distillation_loss(logits, q, k, block_size=BLOCK).detach()) == pytest.approx(0, abs=1e-12)
    flat = torch.zeros_like(truth).masked_fill(truth == 0, -1e4).requires_grad_()
    loss = distillation_loss(flat, q, k, block_size=BLOCK)
    rows = truth[:, :, 2:]
    per_row = (torch.xlogy(rows, rows)).sum(-1) + torch.arange(3, 11).log()
    assert float(loss.detach()) == pytest.approx(float(per_row.sum() / rows.numel()))
    (gradient,) = torch.autograd.grad(loss, flat)
    assert not gradient[:, :, :2].any()
    assert gradient[:, :, 2:].abs().sum(-1).min() > 0


def test_decode_loss_is_of_the_group_and_of_complete_earlier_blocks() -> None:
    q, k = (x.transpose(1, 2) for x in random_heads(13))
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
        torch.ones(13, 13, dtype=torch.bool).triu(1), -math.inf
    )
    weights = scores.softmax(-1)
    logits = torch.randn(2, 2, 13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for sample in range(2):
        for group in range(2):
            for t in range(6, 13):
                seen = t // BLOCK
                target = torch.stack(
                    [
                        weights[sample, 2 * group : 2 * group + 2, t, j * BLOCK : (j + 1) * BLOCK].max()
                        for j in range(seen)
                    ]
                )
                target = target / (target.sum() + 1e-9)
                total += float((target * (target.log() - logits[sample, group, t, :seen].log_softmax(-1))).sum())
                count += 4
    hidden = torch.arange(4) >= torch.arange(13)[:, None] // BLOCK
    masked = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    assert float(decode_distillation_loss(masked, q, k, block_size=BLOCK)) == pytest.approx(total / count)


# -- the prefill gate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 11, 3])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_is_over_the_blocks_own_tokens(name: str, length: int) -> None:
    q, _ = random_heads(length)
    pooled = pool_blocks(q, BLOCK, POOLINGS[name])
    reduce = {"max": lambda x: x.amax(1), "min": lambda x: x.amin(1), "avg": lambda x: x.mean(1)}
    for block in range(math.ceil(length / BLOCK)):
        own = q[:, block * BLOCK : (block + 1) * BLOCK]
        expected = torch.cat([reduce[pool](own) for pool in ("max", "min", "avg") if pool in name], -1)
        torch.testing.assert_close(pooled[:, block], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("gate_type", "width", "force_double"),
    [("Qavg_Kmaxminavg", 8, False), ("Qmaxmin_Kavg", 8, False), ("Qmax_Kmin", 12, False), ("Qavg_Kmaxmin", 8, True)],
)
def test_scores_are_the_products_of_pooled_heads(gate_type: str, width: int, force_double: bool) -> None:
    q_pool, k_pool = parse_gate_type(gate_type)
    gate = AttnGate(
        8, 4, 2, block_size=BLOCK, gate_hidden_size=width, q_pool=q_pool, k_pool=k_pool, force_double=force_double
    ).double()
    for weight in gate.parameters():
        nn.init.normal_(weight)
    assert (gate.query_map is None) == (gate_type == "Qavg_Kmaxminavg")
    q, k = random_heads(14)
    cos, sin = rotary_tables(torch.arange(0, 14, BLOCK), width, 100.0, torch.float64)
    logits = gate.logits(q, k, (cos, sin))
    queries, keys = pool_blocks(q, BLOCK, q_pool), pool_blocks(k, BLOCK, k_pool)
    for head in range(4):
        left, right = queries[:, :, head], keys[:, :, head // 2]
        if gate.query_map is not None:
            left, right = left @ gate.query_map.weight[head], right @ gate.key_map.weight[head // 2]
        else:
            right = right @ gate.key_map.weight[head]
        left, right = (rotate(x[:, None], cos, sin)[:, 0] for x in (left, right))
        torch.testing.assert_close(logits[:, head].tril(), (left @ right.mT / width**0.5).tril())
    assert logits[..., 0, 1].max() == torch.finfo(torch.float64).min


def test_only_the_channels_of_the_tables_rotate() -> None:
    gate = AttnGate(8, 2, 2, block_size=BLOCK).double()
    nn.init.normal_(gate.key_map.weight)
    q, k = random_heads(12, 2, 2)
    cos, sin = rotary_tables(torch.arange(0, 12, BLOCK), 4, 10.0, torch.float64)
    padded = (F.pad(cos, (0, 4), value=1.0), F.pad(sin, (0, 4)))
    # A turn by nothing on the last channels is no turn, in whichever half they are.
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    queries, keys = pool_blocks(q, BLOCK, gate.q_pool), gate.key_map(pool_blocks(k, BLOCK, gate.k_pool))
    queries, keys = (
        rotate(x[..., order].transpose(1, 2), padded[0][:, order], padded[1][:, order]) for x in (queries, keys)
    )
    torch.testing.assert_close(gate.logits(q, k, (cos, sin)).tril(), (queries @ keys.mT / 8**0.5).tril())


@pytest.mark.parametrize("method", ["threshold", "nz_ratio"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_whole_blocks_gives_the_gate_the_same_tiles(side: str, method: Any) -> None:
    rule = TileRule(method, 0.2, nz_ratio=0.8, last_block_dense=False)
    gate = AttnGate(8, 4, 2, block_size=BLOCK, rotary=False, rule=rule).double()
    nn.init.normal_(gate.key_map.weight)
    q, k = random_heads(16)
    widths = (8, 0) if side == "left" else (0, 8)
    mask = F.pad(torch.ones(2, 16, dtype=torch.bool), widths)
    padded = (F.pad(x, (0, 0, 0, 0, *widths), value=7.0) for x in (q, k))
    values = gate(*padded, mask_BL=mask)
    first = widths[0] // BLOCK
    assert torch.equal(values[:, :, first : first + 4, first : first + 4], gate(q, k))
    assert set(values.unique().tolist()) == {0.0, 1.0}


# -- the layer and the model ---------------------------------------------------------------------------------------


def dense_with_tiles(layer: SeerAttention, x_BLD: Tensor, kept: Tensor) -> Tensor:
    """Attention over the keys of kept tiles that are not in the future, from the definition."""
    heads = layer.project(x_BLD, torch.arange(x_BLD.shape[1]))
    length = x_BLD.shape[1]
    seen = kept.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :length, :length].tril()
    scores = heads.queries @ heads.keys.repeat_interleave(2, 1).mT * layer.head_dim**-0.5
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return layer.output(weights @ heads.values.repeat_interleave(2, 1))


def test_layer_attends_to_the_gates_tiles_alone() -> None:
    layer = lm().attentions[0]
    x = torch.randn(2, 18, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with penstock.watch(layer, keep="values") as log:
        y = layer(x)
    kept = log.values()["gate"][0] > 0.5
    assert 0.2 < float(density(kept).mean()) < 0.9
    torch.testing.assert_close(y, dense_with_tiles(layer, x, kept), rtol=0, atol=1e-12)
    chosen = (torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.3) | torch.eye(5, dtype=torch.bool)
    with penstock.force(layer, chosen.double()):
        torch.testing.assert_close(layer(x), dense_with_tiles(layer, x, chosen), rtol=0, atol=1e-12)
    with penstock.force(layer, "closed"):  # each block sees itself
        expected = dense_with_tiles(layer, x, torch.eye(5, dtype=torch.bool).expand(2, 4, 5, 5))
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_open_gates_zero_threshold_and_the_dense_twin_agree() -> None:
    model, dense = lm(), lm(None)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".gate." not in k})
    expected = dense(tokens(27))
    assert not torch.allclose(model(tokens(27)), expected)
    with penstock.force(model, "open"):
        torch.testing.assert_close(model(tokens(27)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(penstock.twin(model)(tokens(27)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.dense_pass(tokens(27), lambda layer, heads: None), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.train()(tokens(27)), expected, rtol=0, atol=1e-12)
    model.eval().set_rule(method="threshold", threshold=0.0)
    torch.testing.assert_close(model(tokens(27)), expected, rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_base_with_and_without_gates() -> None:
    torch.manual_seed(3)
    gated = SeerLM(VOCABULARY, 16, 2, 4, intermediate_size=24)
    torch.manual_seed(3)
    dense = SeerLM(VOCABULARY, 16, 2, 4, intermediate_size=24, gates=None)
    for name, value in dense.state_dict().items():
        assert torch.equal(gated.state_dict()[name], value)


@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("options", [{}, {"last_block_dense": True}, {"method": "threshold", "threshold": 0.2}])
def test_padding_changes_nothing(options: dict[str, Any], left: int) -> None:
    model = lm(**options)
    first, second = tokens(19)[:1], tokens(13)[:1]
    both = torch.zeros(2, 19, dtype=torch.int64)
    both[0], mask = first[0], torch.zeros(2, 19, dtype=torch.bool)
    both[1, left : left + 13] = second[0]
    mask[0], mask[1, left : left + 13] = True, True
    logits = model(both, mask_BL=mask)
    torch.testing.assert_close(logits[0], model(first)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1, left : left + 13], model(second)[0], rtol=0, atol=1e-12)


def test_a_prompt_is_sparse_and_decoding_after_it_dense() -> None:
    model, sequence = lm(), tokens(21)
    cache = model.new_cache()
    torch.testing.assert_close(model(sequence[:, :17], cache=cache), model(sequence[:, :17]), rtol=0, atol=1e-12)
    with penstock.watch(model) as log:
        step = model(sequence[:, 17:18], cache=cache)
    assert not any(log[name].calls for name in log)
    assert step.isfinite().all()
    with penstock.force(model, "open"):
        cache = model.new_cache()
        parts = [model(sequence[:, a:b], cache=cache) for a, b in ((0, 17), (17, 18), (18, 21))]
        torch.testing.assert_close(torch.cat(parts, 1), model(sequence), rtol=0, atol=1e-12)


def test_less_than_a_block_is_dense_and_says_so() -> None:
    model, dense = lm(), lm(None)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".gate." not in k})
    with pytest.warns(UserWarning, match="3 tokens are less than a block of 4"):
        logits = model(tokens(3))
    torch.testing.assert_close(logits, dense(tokens(3)), rtol=0, atol=1e-12)


# -- decoding ------------------------------------------------------------------------------------------------------


def test_decode_gate_open_is_the_dense_model_whatever_the_calls() -> None:
    model, sequence = lm("decode", method="token_budget", token_budget=4), tokens(23)
    full = model(sequence)
    with penstock.force(model, "open"):
        cache = model.new_cache()
        ends = (0, 6, 7, 8, 12, 13, 14, 15, 16, 17, 22, 23)
        parts = [model(sequence[:, a:b], cache=cache) for a, b in pairwise(ends)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-12)


def test_decoded_keys_are_compressed_as_a_prompts_are() -> None:
    """Whatever the cuts: `append` token by token, in chunks, or `prefill` at once."""
    model, sequence = lm("decode"), tokens(19)
    states = []
    with penstock.force(model, "open"):
        for ends in ((0, 19), (0, 5, 6, 7, 8, 9, 10, 11, 12, 19), (0, 1, 2, 17, 18, 19)):
            cache = model.new_cache()
            for a, b in pairwise(ends):
                model(sequence[:, a:b], cache=cache)
            states.append(cache.layers)
    for state in states[1:]:
        for layer in range(2):
            compressed = state[layer]["compressed"]
            torch.testing.assert_close(compressed, states[0][layer]["compressed"], rtol=0, atol=1e-10)
            assert compressed.shape[1] == 5
            assert not compressed[:, -1].any()  # three tokens do not make a block
            assert compressed[:, :-1].abs().sum(-1).min() > 0


def test_authors_rotation_of_a_decoded_block_is_that_of_its_last_token() -> None:
    ours = DecodeGate(8, 4, 2, block_size=BLOCK)
    theirs = DecodeGate(8, 4, 2, block_size=BLOCK, compat=True)
    at = torch.tensor([7, 11])
    assert ours.entry_positions(at).tolist() == [4, 8]
    assert theirs.entry_positions(at).tolist() == [7, 11]


@pytest.mark.parametrize("method", ["token_budget", "threshold", "nz_ratio"])
def test_a_new_token_attends_to_the_chosen_blocks_the_first_and_its_own(method: Any) -> None:
    model = lm("decode", method=method, threshold=0.3, token_budget=2 * BLOCK)
    layer = model.attentions[0]
    x = torch.randn(2, 22, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    span = model.span(tokens(21), cache, None)
    layer(x[:, :21], span, 0)
    span = model.span(tokens(22)[:, 21:], cache, None)
    with penstock.watch(layer, keep="values") as log:
        y = layer(x[:, 21:], span, 0)
    (values,) = log.values()["gate"]
    assert values.shape == (2, 2, 6)
    assert values[..., -1].eq(1).all()
    assert values.min() == 0
    if method == "token_budget":
        assert set(values.sum(-1).flatten().tolist()) <= {2.0, 3.0}
    kept = values > 0.5
    kept[..., 0] = True
    heads = layer.project(x, torch.arange(22))
    allowed = kept.repeat_interleave(2, 1).repeat_interleave(BLOCK, 2)[:, :, :22]
    scores = (heads.queries[:, :, -1:] @ heads.keys.repeat_interleave(2, 1).mT)[:, :, 0] * 8**-0.5
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)[:, :, None]
    torch.testing.assert_close(y, layer.output(weights @ heads.values.repeat_interleave(2, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("left", [0, 5])
def test_decoding_with_padding_is_decoding_without(left: int) -> None:
    model = lm("decode", method="token_budget", token_budget=2 * BLOCK)
    first, second = tokens(30)[:1], tokens(24)[:1]
    alone = []
    for sequence, prompt in ((first, 19), (second, 13)):
        cache = model.new_cache()
        steps = [model(sequence[:, :prompt], cache=cache)[:, -1:]]
        alone.append([*steps, *[model(sequence[:, i : i + 1], cache=cache) for i in range(prompt, prompt + 11)]])
    both = torch.zeros(2, 19, dtype=torch.int64)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    both[0], mask[0] = first[0, :19], True
    both[1, left : left + 13], mask[1, left : left + 13] = second[0, :13], True
    cache = model.new_cache()
    logits = model(both, cache=cache, mask_BL=mask)
    torch.testing.assert_close(logits[1, left + 12], alone[1][0][0, 0], rtol=0, atol=1e-12)
    for step in range(11):
        logits = model(torch.stack([first[0, 19 + step], second[0, 13 + step]])[:, None], cache=cache)
        for row in range(2):
            torch.testing.assert_close(logits[row], alone[row][step + 1][0], rtol=0, atol=1e-12)


def test_padding_between_decoded_tokens_changes_nothing() -> None:
    model = lm("decode", method="token_budget", token_budget=BLOCK)
    sequence = tokens(21)
    plain, padded = model.new_cache(), model.new_cache()
    for cache in (plain, padded):
        model(sequence[:, :14], cache=cache)
    mask = torch.tensor([True, False, False, True, False, True, False, True, True]).expand(2, -1)
    rest = torch.zeros(2, 9, dtype=torch.int64)
    rest[:, mask[0]] = sequence[:, 14:19]
    model(sequence[:, 14:19], cache=plain)
    model(rest, cache=padded, mask_BL=mask)
    for at in (19, 20):
        one, other = (model(sequence[:, at : at + 1], cache=cache) for cache in (plain, padded))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for ours, theirs in zip(plain.layers, padded.layers, strict=True):
        torch.testing.assert_close(ours["recent"], theirs["recent"], rtol=0, atol=1e-12)
        num = ours["compressed"].shape[1]
        torch.testing.assert_close(ours["compressed"], theirs["compressed"][:, :num], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("pooling", "norm"), [("Qproj", True), ("Qavgproj", True), ("Qavgproj", False), ("Qavg", True)]
)
def test_decode_scores_are_those_of_the_tokens_one_by_one(pooling: Any, norm: bool) -> None:
    torch.manual_seed(0)
    gate = DecodeGate(8, 4, 2, block_size=BLOCK, query_pooling=pooling, use_qk_norm=norm).double()
    q, k = random_heads(17)
    tables = rotary_tables(torch.arange(17), 8, 100.0, torch.float64)
    blocks = rotary_tables(torch.arange(0, 17, BLOCK), 8, 100.0, torch.float64)
    logits = gate.logits(q, k, tables, blocks)
    weights = None if gate.query_map is None else gate.query_map.weight
    for t in (6, 16):
        for group in range(2):
            own = q[:, t, 2 * group : 2 * group + 2]
            if pooling == "Qproj":
                query = sum(own[:, g] @ weights[group, g] for g in range(2))  # type: ignore[index]
            else:
                query = own.mean(1) if weights is None else own.mean(1) @ weights[group]
            query = gate.query_norm(query)
            query = rotate(query[:, None, None], tables[0][t : t + 1], tables[1][t : t + 1])[:, 0, 0]
            for j in range(t // BLOCK):
                tile = k[:, j * BLOCK : (j + 1) * BLOCK, group]
                key = torch.cat([tile.amax(1), tile.amin(1), tile.mean(1)], -1) @ gate.key_map.weight[group]
                key = rotate(gate.key_norm(key)[:, None, None], blocks[0][j : j + 1], blocks[1][j : j + 1])[:, 0, 0]
                torch.testing.assert_close(logits[:, group, t, j], (query * key).sum(-1) / 8**0.5)
        assert logits[:, :, t, t // BLOCK :].max() == torch.finfo(torch.float64).min


# -- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["prefill", "decode"])
def test_distillation_reaches_the_gates_alone_and_teaches_them(gates: Any) -> None:
    model = lm(gates).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, loss = model.distil(tokens(32, 4))
    (10 * loss).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".gate." in name), name
    optimizer = torch.optim.Adam([p for gate in model.gates for p in gate.parameters()], lr=3e-2)
    losses = []
    for _ in range(25):
        logits, loss = model.distil(tokens(32, 4))
        optimizer.zero_grad()
        (10 * loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".gate." not in name), name
    with penstock.force(model.eval(), "open"):
        torch.testing.assert_close(logits, model(tokens(32, 4)), rtol=0, atol=1e-12)


def quick() -> tuple[SeerAttentionConfig, Any, Any]:
    config = override(SeerAttentionConfig(), dict(SYSTEM.quick) | {"data.max_bytes": 300_000, "data.window": 192})
    data = SYSTEM.load_data(config, Source())
    return config, data, next(iter(data.test(2)))


def test_second_stage_freezes_the_base_unless_told_otherwise() -> None:
    config, data, batch = quick()
    model = SYSTEM.arms(config, data.spec)["gated"]()
    assert isinstance(model, SeerLM)
    dense, distil = (make().task for make in SYSTEM.stages("gated", model, config, data))
    assert isinstance(distil, GateDistillation)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"layers.{i}.self_attn.gate.key_map.weight" for i in range(config.depth)
    }
    loss, outputs = distil.train().step(batch)
    torch.testing.assert_close(loss, 10 * distil.reported_loss(loss, outputs, batch))
    tested, logits = distil.eval().step(batch)
    torch.testing.assert_close(distil.reported_loss(tested, logits, batch), tested)
    assert not torch.equal(tested, dense.eval().step(batch)[0])
    torch.testing.assert_close(dense.step(batch)[0], dense.train().step(batch)[0])
    config.train_base = True
    both = SYSTEM.stages("gated", model, config, data)[1]().task.train()
    assert all(p.requires_grad for p in model.parameters())
    language = LanguageModelling(model, config.train, data).train().step(batch)[0]
    torch.testing.assert_close(both.step(batch)[0], loss + language)


def test_masks_are_compared_at_one_density_and_rules_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.systems.sequence.seer_attention.experiment._BATCHES", 1)
    config, data, batch = quick()
    torch.manual_seed(0)
    model = SYSTEM.arms(config, data.spec)["gated"]().eval()
    assert isinstance(model, SeerLM)
    config.distil.batch_size = 2
    task = LanguageModelling(model, config.train, data)
    rules = [gate.rule for gate in model.gates]
    measured = SYSTEM.measure("gated", task, config, data, 0)
    assert [gate.rule for gate in model.gates] == rules
    assert SYSTEM.measure("ungated", task, config, data, 0) == {}
    for percent in (15, 25, 40, 60):
        quota = TileRule("nz_ratio", nz_ratio=percent / 100).quota(12, 16)
        expected = sum(min(quota, row + 1) for row in range(12)) / 78
        assert measured[f"density_at_{percent}"] == pytest.approx(expected)
        recalls = {n: measured[f"{n}_recall_at_{percent}"] for n in ("oracle", "learned", "random", "sink_local")}
        assert max(recalls.values()) == recalls["oracle"]
    with torch.no_grad():
        dense = float(task.train().step(batch)[0])
    assert measured["dense_loss"] == pytest.approx(dense, abs=1e-5)
    assert measured["loss_at_threshold_0"] == pytest.approx(dense, abs=1e-5)
    assert measured["difference_at_threshold_zero"] < 1e-10
    assert measured["density_at_threshold_0"] == 1
    results = Results(
        [{"arm": "gated", "seed": 0, "metrics": measured}],
        {"topics": [dict.fromkeys(("learned", "oracle", "sink_local"), 0.5)]},
    )
    assert set(SYSTEM.claims(config, results)) == {claim.id for claim in card("seer_attention").claims}
    assert set(SYSTEM.figures(config, results)) == {"What skipped tiles cost"}


def test_a_few_steps_find_the_topics() -> None:
    measured = topic_gate(0, steps=60, test_size=16)
    assert measured["oracle"] >= measured["learned"] > measured["sink_local"] > measured["random"]
    assert measured["random"] == pytest.approx(0.25, abs=0.05)


def test_sink_and_local_take_the_own_block_the_first_and_the_nearest() -> None:
    order = sink_local_scores(6, torch.device("cpu")).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    assert order[5].argsort(descending=True)[:4].tolist() == [5, 0, 4, 3]
    kept = best_quarter(order[None, None].expand(1, 1, 6, 6))
    assert kept[0, 0].sum(-1).tolist() == [1, 1, 1, 1, 1, 2]


# -- files, sizes and refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"gates": "prefill"}, {"gates": "prefill", "force_double": True}, {"gates": "decode"}]
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_gates_alone_are_saved_and_loaded(options: dict[str, Any], ending: str, tmp_path: Path) -> None:
    model, other = lm(**options), lm(**options)
    for gate in other.gates:
        for parameter in gate.parameters():
            nn.init.normal_(parameter)
    path = tmp_path / f"attn_gate_weights.{ending}"
    save_gates(model, path)
    load_gates(other, path)
    torch.testing.assert_close(other(tokens(20)), model(tokens(20)), rtol=0, atol=0)
    key = "attngate_linear_k" if options["gates"] == "decode" else "mask_linear_k"
    assert f"model.layers.1.self_attn.attn_gate.{key}.weight" in to_authors(model)
    stack = load_authors("seer_attention", path, num_kv_heads=2, block_size=BLOCK)
    for ours, theirs in zip(model.gates, stack.gates, strict=True):  # type: ignore[operator, arg-type]
        assert type(ours) is type(theirs)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    bare = [type(gate)(8, 4, 2, block_size=BLOCK, **extra(options)).double() for gate in model.gates]
    load_gates(bare, path)
    assert torch.equal(bare[1].key_map.weight, model.gates[1].key_map.weight)


def extra(options: dict[str, Any]) -> dict[str, Any]:
    return {"force_double": True} if options.get("force_double") else {}


def test_checkpoint_problems_are_named(tmp_path: Path) -> None:
    state = to_authors(lm())
    with pytest.raises(UserError, match=r"must hold gates alone.*it holds model\.embed_tokens"):
        from_authors(state | {"model.embed_tokens.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"layers 0 to 0 \(1 layers\); the model has 2 layers"):
        load_gates(lm(), {k: v for k, v in state.items() if ".0." in k})
    with pytest.raises(UserError, match=r"layer 0 does not fit AttnGate: missing: query_map"):
        load_gates(lm(force_double=True), state)
    with pytest.raises(UserError, match=r"layer 0 does not fit AttnGate: misshapen: key_map\.weight is \(4, 24, 8\)"):
        load_gates(lm(gate_type="Qavg_Kavg"), state)
    with pytest.raises(UserError, match="gate type 'Qmean_Kavg'"):
        from_authors(state, gate_type="Qmean_Kavg")
    with pytest.raises(UserError, match="give num_heads"):
        from_authors(to_authors(lm("decode", query_pooling="Qavg")))
    with pytest.raises(UserError, match="weights are of 'Qproj'"):
        from_authors(to_authors(lm("decode")), query_pooling="Qavgproj")
    with pytest.raises(UserError, match=r"mask_linear_k\.weight is missing"):
        from_authors({"mask_linear_q.weight": torch.zeros(2, 3, 4)})


#: Published sizes of the files, in megabytes of bfloat16.
MEGABYTES = {
    "seer_attention_llama3_1_8b_gates": 101,
    "seer_attention_llama3_1_70b_gates": 503,
    "seer_attention_qwen2_5_7b_gates": 77,
    "seer_attention_qwen2_5_14b_gates": 189,
    "seer_attention_qwen2_5_32b_gates": 252,
    "seer_attention_r_qwen3_4b_gates": 66.1,
}


@pytest.mark.parametrize("name", sorted(card("seer_attention").variants))
def test_published_gates_have_their_size(name: str) -> None:
    assert name in list_models("seer_attention*")
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == card("seer_attention").variants[name]
    published = MEGABYTES[name]
    assert round(2 * count / 1e6, 1 if isinstance(published, float) else 0) == published


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"block_size": 0}, "block_size=0 must be positive"),
        ({"gate_type": "Qmean_Kavg"}, r"'Qmean_Kavg'.*max, min, avg, maxmin"),
        ({"gate_type": "Kavg"}, "'Kavg'"),
        ({"method": "topk"}, "'topk'.*threshold, nz_ratio, token_budget"),
        ({"method": "token_budget", "token_budget": 3}, "token_budget=3 is below one block of 4"),
        ({"nz_ratio": 0.0}, "nz_ratio=0.0 must be above 0"),
        ({"threshold": 1.0}, r"threshold=1.0: a share of the softmax"),
        ({"threshold": [0.1]}, "1 thresholds for 2 layers"),
        ({"threshold": [0.1, [0.1, 0.2]]}, "2 thresholds for 4 heads"),
        ({"gate_hidden_size": 5}, "gate_hidden_size=5 must be even"),
        ({"gates": "decode", "query_pooling": "Qorig"}, "'Qorig'.*Qproj, Qavgproj, Qavg"),
        ({"gates": "decode", "query_pooling": "Qavg", "gate_hidden_size": 4}, "Qavg maps nothing"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lm(**options)


def test_a_gate_refuses_heads_and_positions_that_are_not_its_own() -> None:
    gate = AttnGate(8, 4, 2, block_size=BLOCK).double()
    q, k = random_heads(12)
    with pytest.raises(ValueError, match=r"keys \(2, 12, 4, 8\): they must be \(B, L, 4, 8\) and \(B, L, 2, 8\)"):
        gate(q, q)
    with pytest.raises(ValueError, match="AttnGate needs rotary tables of the positions"):
        gate(q, k)
    with pytest.raises(ValueError, match="rotary tables of 16 channels for a gate of 8"):
        gate(q, k, rotary_tables(torch.arange(3), 16, 100.0, torch.float64))
    with pytest.raises(ValueError, match="num_k_heads=3 must divide num_q_heads=4"):
        AttnGate(8, 4, 3)


def test_a_window_of_one_block_is_refused() -> None:
    config = override(SeerAttentionConfig(), {"data.window": 31})
    with pytest.raises(ValueError, match="a window of 31 has no two blocks of block_size=16"):
        SYSTEM.arms(config, {"vocab_size": 256, "window": 31})
