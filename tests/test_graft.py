"""Gates grafted onto transformers' Llama, Qwen2, Qwen3 and GPT-NeoX: nothing changes at first, then they can be trained."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import penstock
from penstock.errors import UserError
from penstock.gates import named_gates
from penstock.interop import graft as grafting
from penstock.interop.graft import (
    Layout,
    TileRule,
    attention_sink,
    distil,
    enable_codebooks,
    graft,
    load_gates,
    massive_activation,
    save_gates,
    set_sparse,
    sparse_prefill,
    sparse_report,
    ungraft,
)
from penstock.interop.graft.seer import gated_places
from penstock.interop.graft.tap import Heads, tapped
from penstock.nn.code_reading import force_codes, record_codes
from penstock.systems.sequence.codebook.reading import code_table
from tests.models import hooks_left

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("model.layers.{}.self_attn", GROUPED),
    "Qwen2": ("model.layers.{}.self_attn", GROUPED),
    "Qwen3": ("model.layers.{}.self_attn", {**GROUPED, "head_dim": 32}),
    "GPTNeoX": ("gpt_neox.layers.{}.attention", {}),
}
BLOCK = 4


def make(name: str = "Llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A small random model whose attention is far from uniform."""
    torch.manual_seed(seed)
    known = CLASSES[name][1] if name in CLASSES else GROUPED
    config = getattr(transformers, f"{name}Config")(**SIZES | known | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(params=list(CLASSES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(batch: int = 2, length: int = 42, seed: int = 1) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, tokens_BL: Tensor, **given: Any) -> Tensor:
    return model(tokens_BL, **given).logits


def stir(model: nn.Module, pattern: str = "*output_gate") -> None:
    """Make what gates say depend on the input."""
    torch.manual_seed(5)
    for gate in named_gates(model, pattern).values():
        for parameter in gate.parameters():
            nn.init.normal_(parameter, std=0.3)


# -- all grafts ------------------------------------------------------------------------------------------------

GRAFTS: list[tuple[str, dict[str, Any]]] = [
    ("output_gate", {"granularity": "headwise"}),
    ("output_gate", {"granularity": "elementwise", "bias": True}),
    ("seer_attention", {"block_size": BLOCK}),
    ("codebook", {"at": ["attn_preproj", "attn", "mlp_mid", "mlp", "transformer_block"], "num_codes": 12}),
]


@pytest.mark.parametrize(("what", "options"), GRAFTS, ids=lambda x: x if isinstance(x, str) else "")
def test_at_the_start_nothing_changes_and_ungrafting_restores(name: str, what: Any, options: dict[str, Any]) -> None:
    model, x = make(name), tokens()
    before, own, hooks = logits(model, x), copy.deepcopy(model.state_dict()), hooks_left(model)
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    assert graft(model, what, **options) is model
    assert torch.equal(logits(model, x), before)
    now = model.state_dict()
    assert len(now) > len(own)
    assert all(torch.equal(now[key], value) for key, value in own.items())
    assert hooks_left(copy.deepcopy(model)) == hooks_left(model)
    ungraft(model, what)
    assert hooks_left(model) == hooks
    assert model.state_dict().keys() == own.keys()
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes
    assert torch.equal(logits(model, x), before)


def test_gates_are_found_by_dotted_names(name: str) -> None:
    model = make(name)
    graft(model, "output_gate", layers=[0])
    graft(model, "seer_attention", layers=[-1])
    graft(model, "codebook", layers=[1])
    first, second = (CLASSES[name][0].format(i) for i in (0, 1))
    layer = second.rpartition(".")[0]
    assert set(named_gates(model)) == {
        f"{first}.output_gate",
        f"{second}.attn_gate",
        f"{layer}.codebook_mlp.selector",
    }


def test_a_file_of_the_gates_alone_restores_them(name: str, tmp_path: Path) -> None:
    model, x = make(name), tokens()
    graft(model, "output_gate", layers=[1], granularity="elementwise")
    graft(
        model,
        "seer_attention",
        block_size=BLOCK,
        rule=TileRule("nz_ratio", nz_ratio=0.4, threshold=(0.1, 0.2, 0.1, 0.1)),
    )
    graft(model, "codebook", at=["mlp", "attn_preproj"], num_codes=7, top_k=2)
    stir(model, "*_gate")
    save_gates(model, tmp_path / "gates.safetensors")
    other = make(name)
    load_gates(other, tmp_path / "gates.safetensors")
    for one in (model, other):
        enable_codebooks(one)
        set_sparse(one)
    assert not torch.equal(logits(make(name), x), logits(model, x))
    assert torch.equal(logits(other, x), logits(model, x))
    ungraft(other)
    assert torch.equal(logits(other, x), logits(make(name), x))


def test_the_whole_model_can_be_saved_the_usual_way(tmp_path: Path) -> None:
    model, x = make(), tokens()
    graft(model, "output_gate")
    stir(model)
    set_sparse(graft(model, "seer_attention", block_size=BLOCK))
    model.save_pretrained(tmp_path)
    assert "penstock" not in (tmp_path / "config.json").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, x), logits(make(), x))
    graft(again, "output_gate")
    graft(again, "seer_attention", block_size=BLOCK)
    load_gates(again, tmp_path / "model.safetensors")
    set_sparse(again)
    assert torch.equal(logits(again, x), logits(model, x))


def test_attention_gates_have_their_authors_names_in_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = graft(make(), "seer_attention", block_size=BLOCK, force_double=True)
    save_gates(model, tmp_path / "gates.safetensors")
    state = load_file(tmp_path / "gates.safetensors")
    assert set(state) == {
        f"model.layers.{i}.self_attn.attn_gate.mask_linear_{x}.weight" for i in range(2) for x in "qk"
    }
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "attn_gate_weights.pth")
    load_gates(model, tmp_path / "attn_gate_weights.pth")
    weight = model.model.layers[1].self_attn.attn_gate.key_map.weight
    assert torch.equal(weight, state["model.layers.1.self_attn.attn_gate.mask_linear_k.weight"] + 1)


def test_gates_follow_the_models_precision() -> None:
    model = make().to(torch.bfloat16)
    for what in ("output_gate", "seer_attention", "codebook"):
        graft(model, what)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with sparse_prefill(model):
        assert logits(model, tokens(length=70)).dtype == torch.bfloat16


def test_another_class_is_described_by_a_layout() -> None:
    model, x = make("Mistral", sliding_window=None), tokens()
    before = logits(model, x)
    with pytest.raises(UserError, match=r"MistralModel is not known here, only LlamaModel, .*GPTNeoXModel.*layout="):
        graft(model, "output_gate")
    graft(model, "output_gate", layout=Layout())
    graft(model, "seer_attention", block_size=BLOCK, layout=Layout())
    with sparse_prefill(model, nz_ratio=1.0):
        torch.testing.assert_close(logits(model, x), before)
    assert attention_sink(model, x, layout=Layout()).shape == (2,)


# -- output gates ----------------------------------------------------------------------------------------------


def catch(model: nn.Module, modules: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """The first argument of each of these modules in a pass."""
    seen: dict[str, Tensor] = {}

    def hook(key: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.update({key: args[0] if args else kwargs["hidden_states"]})

    handles = [m.register_forward_pre_hook(hook(key), with_kwargs=True) for key, m in modules.items()]
    logits(model, x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_output_gates_scale_the_heads_before_their_projection(name: str, granularity: Any) -> None:
    model, x = graft(make(name), "output_gate", granularity=granularity), tokens()
    stir(model)
    attention = model.get_submodule(CLASSES[name][0].format(0))
    modules = {"x": attention, "y": attention.get_submodule("dense" if name == "GPTNeoX" else "o_proj")}
    weight = attention.output_gate.proj.weight.detach()
    gated = catch(model, modules, x)
    ungraft(model)
    plain = catch(model, modules, x)
    assert torch.equal(gated["x"], plain["x"])
    values = 2 * (plain["x"] @ weight.T).sigmoid()
    expected = plain["y"].unflatten(-1, (values.shape[-1], -1)) * values[..., None]
    torch.testing.assert_close(gated["y"], expected.flatten(-2))
    assert not torch.allclose(gated["y"], plain["y"])


def test_output_gates_are_forced_watched_ablated_and_twinned(name: str) -> None:
    model, x = graft(make(name), "output_gate"), tokens()
    stir(model)
    plain, gated = logits(make(name), x), logits(model, x)
    with penstock.force(model, "open"):
        assert torch.equal(logits(model, x), plain)
    with penstock.force(model, "closed"):
        assert not torch.allclose(logits(model, x), plain)
    with penstock.watch(model) as log:
        assert torch.equal(logits(model, x), gated)
    assert all(0 < row["mean"] < 2 for row in log.table())
    assert torch.equal(logits(penstock.twin(model), x), plain)
    assert torch.equal(logits(model, x), gated)
    rows = penstock.ablate(model, lambda m: float(logits(m, x).std()), how=["open"])
    assert all(row["metric change"] for row in rows[1:])


def test_output_gates_train_under_gradient_checkpointing(name: str) -> None:
    model, x = graft(make(name), "output_gate").train(), tokens()
    stir(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        F.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        return [gate.proj.weight.grad for gate in named_gates(model).values()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(), plain, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_output_gates_generate_with_a_cache(name: str) -> None:
    model, x = graft(make(name), "output_gate", granularity="elementwise"), tokens(length=9)
    stir(model)
    given = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(x, **given)
    whole = logits(model, made.sequences)
    torch.testing.assert_close(torch.stack(made.logits, 1), whole[:, 8:-1], atol=1e-4, rtol=1e-4)


def test_output_gates_compile_into_one_graph() -> None:
    model, x = graft(make(), "output_gate"), tokens()
    stir(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).logits, model(x).logits)
    with pytest.raises(UserError, match="compiled"):
        graft(compiled, "seer_attention")


# -- attention gates -------------------------------------------------------------------------------------------


def seer(name: str = "Llama", **rule: Any) -> nn.Module:
    model = graft(make(name), "seer_attention", block_size=BLOCK)
    stir(model, "*attn_gate")
    if rule:
        set_sparse(model, **{"last_block_dense": False} | rule)
    return model


def test_sparse_attention_is_softmax_over_the_kept_tiles(name: str) -> None:
    model, x = seer(name, nz_ratio=0.5), tokens()
    generator = torch.Generator().manual_seed(0)
    tiles = (torch.rand(11, 11, generator=generator) < 0.4) | torch.eye(11, dtype=torch.bool)
    with penstock.force(model, tiles.float()):
        sparse = logits(model, x)
    seen = tiles.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:42, :42].tril()
    reference = logits(make(name), x, attention_mask=seen.expand(2, 1, 42, 42))
    torch.testing.assert_close(sparse, reference, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sparse, logits(make(name), x), atol=1e-2)


def test_open_gates_and_threshold_zero_are_dense_attention(name: str) -> None:
    model, x = seer(name, nz_ratio=0.5), tokens()
    dense, sparse = logits(make(name), x), logits(model, x)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    with penstock.force(model, "open"):
        torch.testing.assert_close(logits(model, x), dense, atol=1e-4, rtol=1e-4)
    with sparse_prefill(model, threshold=0.0):
        torch.testing.assert_close(logits(model, x), dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, x), sparse)  # the rule of before is back
    set_sparse(model, False)
    assert torch.equal(logits(model, x), dense)
    assert torch.equal(logits(seer(name, nz_ratio=0.5).train(), x), dense)  # a hard mask has no gradient


def test_gates_read_queries_and_keys_before_rotary_positions(name: str) -> None:
    model, x = seer(name), tokens()
    attention = model.get_submodule(CLASSES[name][0].format(0))
    rotary = model.base_model.rotary_emb
    found: list[Heads] = []
    with tapped(model, gated_places(model)[:1], lambda module, heads: found.append(heads)):
        logits(model, x)
    h = catch(model, {"x": attention}, x)["x"]
    if name == "GPTNeoX":
        q, k, _ = attention.query_key_value(h).view(2, 42, 4, 48).chunk(3, -1)
    else:
        q, k = (p(h).view(2, 42, -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj))
        if name == "Qwen3":
            q, k = attention.q_norm(q), attention.k_norm(k)
    (heads,) = found
    assert torch.equal(heads.raw_queries, q)
    assert torch.equal(heads.raw_keys, k)
    cos, sin = rotary(h, torch.arange(42)[None])
    assert torch.equal(heads.tables[0], cos)
    assert torch.equal(heads.tables[1], sin)
    half = cos.shape[-1] // 2
    turned, rest = k[..., : 2 * half], k[..., 2 * half :]
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    rotated = torch.cat([turned * cos[:, :, None] + other * sin[:, :, None], rest], -1)
    torch.testing.assert_close(heads.keys, rotated.transpose(1, 2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(name: str, side: str) -> None:
    model, x = seer(name, nz_ratio=0.5), tokens()
    real = slice(13, None) if side == "left" else slice(None, -13)
    mask = torch.zeros_like(x)
    mask[0, real] = mask[1] = 1
    padded = logits(model, x, attention_mask=mask)
    torch.testing.assert_close(padded[0, real], logits(model, x[:1, real])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[1], logits(model, x[1:])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_are_sparse_and_decoding_is_dense(name: str, cache: str) -> None:
    model, x = seer(name, nz_ratio=0.5), tokens()
    given = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        given |= {"cache_implementation": "static", "disable_compile": True}
    made = model.generate(x, **given)
    torch.testing.assert_close(made.logits[0], logits(model, x)[:, -1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        past = model(x, use_cache=True)
        set_sparse(model, False)
        after = model(made.sequences[:, 42:43], past_key_values=past.past_key_values).logits[:, -1]
    torch.testing.assert_close(made.logits[1], after, atol=1e-4, rtol=1e-4)


def test_what_has_no_tiles_stays_dense_with_a_warning() -> None:
    model = seer(nz_ratio=0.5)
    short = tokens(length=BLOCK - 1)
    with pytest.warns(UserWarning, match="3 tokens are less than a block of 4"):
        assert torch.equal(logits(model, short), logits(make(), short))
    packed = torch.arange(21).repeat(2)[None]
    with pytest.warns(UserWarning, match="more than causal"):
        out = logits(model, tokens(1), position_ids=packed, use_cache=False)
    torch.testing.assert_close(out, logits(make(), tokens(1), position_ids=packed, use_cache=False))


def test_sparse_attention_survives_copies_and_twins() -> None:
    model, x = seer(nz_ratio=0.5), tokens()
    sparse = logits(model, x)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, x), sparse)
    with torch.no_grad():
        for gate in named_gates(copied).values():
            gate.key_map.weight.neg_()
    assert not torch.allclose(logits(copied, x), sparse)
    assert torch.equal(logits(model, x), sparse)
    set_sparse(copied, False)
    assert torch.equal(logits(copied, x), logits(make(), x))
    torch.testing.assert_close(logits(penstock.twin(model), x), logits(make(), x), atol=1e-4, rtol=1e-4)


def test_only_some_layers_may_have_gates() -> None:
    model, x = make(), tokens()
    graft(model, "seer_attention", block_size=BLOCK, layers=[1])
    with sparse_prefill(model, nz_ratio=0.5), penstock.watch(model) as log:
        logits(model, x)
    assert list(log) == ["model.layers.1.self_attn.attn_gate"]
    assert {row["mask"] for row in sparse_report(model, x, [0.3])} == {"learned", "oracle", "sink_local", "random"}


# -- distillation ----------------------------------------------------------------------------------------------


def words(seed: int) -> Tensor:
    """Sequences of a few words, each a block long, so that what a block attends to is much the same every time."""
    return (tokens(4, 32, seed) % 8 + 1).repeat_interleave(BLOCK, 1)


def test_distillation_trains_the_gates_alone_towards_the_true_map(name: str) -> None:
    model, x = make(name), words(0)
    dense = logits(model, x)
    graft(model, "seer_attention", block_size=BLOCK)
    before = copy.deepcopy(model.state_dict())
    untrained = sparse_report(model, x, [0.3])
    losses = distil(model, [words(seed) for seed in range(10, 40)], lr=3e-2, warmup_steps=3)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "attn_gate" in key}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model, x), dense)
    learned, oracle, _, random = sparse_report(model, x, [0.3])
    assert learned["kept"] == oracle["kept"] == random["kept"]
    assert max(untrained[0]["recall"], random["recall"]) + 0.1 < learned["recall"] < oracle["recall"]
    assert learned["error"] < min(untrained[0]["error"], random["error"])


def test_the_loss_is_the_divergence_from_the_pooled_eager_map(name: str) -> None:
    model, x = make(name), tokens()
    graft(model, "seer_attention", block_size=BLOCK)
    stir(model, "*attn_gate")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(x, output_attentions=True).attentions
    scores: list[Tensor] = []
    originals = list(named_gates(model).values())
    for gate in originals:
        gate.register_forward_hook(lambda gate, args, out: scores.append(gate.logits(*args[:3])))
    expected = 0.0
    with sparse_prefill(model), penstock.force(model, "open"):
        logits(model, x)
    for weights, score in zip(maps, scores, strict=True):
        padded = F.pad(weights, (0, 2, 0, 2)).unflatten(-1, (11, BLOCK)).unflatten(-3, (11, BLOCK)).amax((-3, -1))
        target = (padded / padded.sum(-1, keepdim=True))[:, :, 2:]
        expected += float(F.kl_div(score.log_softmax(-1)[:, :, 2:], target, reduction="none").mean())
    (loss,) = distil(model, [x], lr=0.0)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert model.config._attn_implementation == "eager"


def test_the_report_is_exact_where_everything_is_kept() -> None:
    model, x = seer(), tokens(3, 60)
    rows = sparse_report(model, x, (0.5, 1.0))
    assert [row["ratio"] for row in rows] == [0.5] * 4 + [1.0] * 4
    for row in rows[4:]:
        assert row["kept"] == row["recall"] == pytest.approx(1)
        assert row["error"] < 1e-4
        assert abs(row["loss increase"]) < 1e-4
    assert all(row["error"] > 0.01 for row in rows[:4])
    with sparse_prefill(model, nz_ratio=0.5, last_block_dense=False):
        sparse = logits(model, x)
    dense = logits(make(), x)
    assert rows[0]["error"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-4)
    rise = [F.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten()) for y in (sparse, dense)]
    assert rows[0]["loss increase"] == pytest.approx(float(rise[0] - rise[1]), abs=1e-4)
    assert "sink_local" in str(rows)
    set_sparse(model, nz_ratio=0.3)
    assert sparse_report(model, x, (0.5, 1.0)) == rows
    assert named_gates(model, "*.1.*attn_gate")["model.layers.1.self_attn.attn_gate"].rule.nz_ratio == 0.3


# -- codebooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["attn_preproj", "attn", "mlp_mid", "mlp", "transformer_block"])
def test_enabled_codebooks_replace_what_passes_there(name: str, at: Any) -> None:
    model, x = make(name), tokens()
    before = logits(model, x)
    graft(model, "codebook", at=at, layers=[0], num_codes=9, top_k=2)
    enable_codebooks(model)
    with record_codes(model) as log:
        changed = logits(model, x)
    assert not torch.allclose(changed, before, atol=1e-2)
    assert {(key.layer, key.place) for key in log} == {(0, at)}
    assert len(log) == (4 if at == "attn_preproj" else 1)
    ids = next(iter(log.values()))[0]
    assert ids.shape == (2, 42, 2)
    layer = model.base_model.layers[0]
    neox = name == "GPTNeoX"
    attention = layer.attention if neox else layer.self_attn
    after = {
        "attn_preproj": lambda: attention.get_submodule("dense" if neox else "o_proj"),
        "mlp_mid": lambda: layer.mlp.get_submodule("dense_4h_to_h" if neox else "down_proj"),
        "transformer_block": lambda: model.base_model.layers[1],
    }
    if at in after:
        first = next(m for m in layer.get_submodule(f"codebook_{at}").modules() if hasattr(m, "selector"))
        passed = catch(model, {"x": after[at]()}, x)["x"][..., : first.dim]
        torch.testing.assert_close(passed, first.codebook.weight[ids].mean(2))
    enable_codebooks(model, False)
    assert torch.equal(logits(model, x), before)


def test_codes_are_inspected_and_forced_on_a_grafted_model(name: str) -> None:
    model, x = graft(make(name), "codebook", num_codes=9), tokens()
    enable_codebooks(model)
    plain = logits(model, x)
    with force_codes(model, [(1, "mlp", None, 3, -1)]), record_codes(model) as log:
        forced = logits(model, x)
    ids = {key.layer: calls[0] for key, calls in log.items()}
    assert (ids[1][:, -1] == 3).all()
    assert torch.equal(forced[:, :-1], plain[:, :-1])
    assert not torch.allclose(forced[:, -1], plain[:, -1])
    rows = code_table(model, x)
    assert sum(row["count"] for row in rows if row["layer"] == 0) == x.numel()
    made = model.generate(x[:, :5], max_new_tokens=3, do_sample=False)
    assert torch.equal(made[:, -1], logits(model, made[:, :-1])[:, -1].argmax(-1))


def test_codebooks_learn_within_the_grafted_model() -> None:
    model, x = graft(make(), "codebook", num_codes=16, top_k=2).train(), tokens(4, 32)
    model.gradient_checkpointing_enable()
    enable_codebooks(model)
    chosen = [p for key, p in model.named_parameters() if "codebook_mlp" in key]
    optimizer = torch.optim.Adam(chosen, 0.05)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


# -- measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grafted", [False, True])
def test_attention_sinks_are_those_of_the_eager_maps(name: str, grafted: bool) -> None:
    model, x = make(name), tokens()
    model.set_attn_implementation("eager")
    if grafted:
        for what in ("output_gate", "seer_attention", "codebook"):
            graft(model, what)
        stir(model)
    with torch.no_grad():
        maps = model(x, output_attentions=True).attentions
    expected = torch.stack([weights[..., 0].mean() for weights in maps])
    torch.testing.assert_close(attention_sink(model, x), expected)
    assert model.config._attn_implementation == "eager"


def test_massive_activations_are_those_of_the_hidden_states(name: str) -> None:
    model, x = make(name), tokens()
    found = massive_activation(model, x)
    assert not hooks_left(model)
    with torch.no_grad():
        states = model(x, output_hidden_states=True).hidden_states
        (last,) = catch(
            model, {"x": model.base_model.get_submodule("final_layer_norm" if name == "GPTNeoX" else "norm")}, x
        ).values()
    torch.testing.assert_close(found, torch.stack([s.abs().max() for s in (*states[:-1], last)]))


def test_closing_an_output_gate_removes_what_it_gates_from_the_stream() -> None:
    model, x = graft(make(), "output_gate"), tokens()
    opened = massive_activation(model, x)
    with penstock.force(model, "closed"):
        assert not torch.allclose(massive_activation(model, x), opened)


# -- refusals --------------------------------------------------------------------------------------------------


def raises(message: str) -> AbstractContextManager[Any]:
    return pytest.raises(UserError, match=message)


def test_bad_grafts_are_refused_and_leave_nothing() -> None:
    model = make()
    for what, options, message in [
        ("dropout", {}, "what='dropout' must be one of output_gate, seer_attention, codebook"),
        ("output_gate", {"granularity": "head"}, "granularity='head': it must be headwise or elementwise"),
        ("output_gate", {"block_size": 8}, "takes layers, layout, granularity, bias; not block_size"),
        ("output_gate", {"layers": [2]}, "layers=.2.: it must be 'all' or numbers from -2 to 1"),
        ("output_gate", {"layers": []}, "from -2 to 1"),
        ("output_gate", {"layout": Layout(output="out")}, "LlamaAttention has no 'out'; it has q_proj"),
        ("output_gate", {"layout": Layout(head_dim="layer_type")}, "no whole number 'layer_type'"),
        ("seer_attention", {"block_size": 0}, "block_size=0 must be positive"),
        ("seer_attention", {"gate_type": "Qsum_Kavg"}, "gate type 'Qsum_Kavg'"),
        ("codebook", {"at": "qkv"}, "at='qkv': it must be one or more of attn_preproj"),
        ("codebook", {"num_codes": 4, "top_k": 5}, "top_k=5, num_codes=4"),
        ("codebook", {"at": ["mlp", "attn_preproj"], "num_codebooks": 3, "codebook_type": "group"}, "must divide"),
    ]:
        with raises(message):
            graft(model, what, **options)
        assert not hooks_left(model)
        assert model.state_dict().keys() == make().state_dict().keys()
    for what in ("output_gate", "seer_attention", "codebook"):
        graft(model, what, layers=[0])
        with raises(f"layer 0 has .* already: .*ungraft.model, '{what}'"):
            graft(model, what)
        graft(model, what, layers=[1])
    with raises("Linear is not known here"):
        graft(nn.Linear(2, 2), "output_gate")


def test_head_counts_that_do_not_divide_are_refused() -> None:
    model = make()
    model.model.layers[1].self_attn.head_dim = 24
    with raises("layers.1: in_features=64 is no multiple of head_dim=24"):
        graft(model, "output_gate")
    model = make()
    model.model.layers[0].self_attn.v_proj = nn.Linear(64, 48)
    with raises("num_k_heads=3 must divide num_q_heads=4"):
        graft(model, "seer_attention")


def test_sliding_windows_are_refused_where_they_are() -> None:
    model = make("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with raises("layer 1 attends within a sliding window of 8"):
        graft(model, "seer_attention")
    with raises("layer 1 attends within a sliding window of 8"):
        attention_sink(model, tokens())
    graft(model, "seer_attention", layers=[0], block_size=BLOCK)
    with sparse_prefill(model, nz_ratio=1.0):
        torch.testing.assert_close(
            logits(model, tokens()),
            logits(make("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), tokens()),
        )


def test_wrong_uses_are_refused_in_one_line(tmp_path: Path) -> None:
    model, x = make(), tokens()
    for call in (lambda: set_sparse(model), lambda: distil(model, [x]), lambda: sparse_report(model, x)):
        with raises("no attention gates: penstock.graft.model, 'seer_attention'. first"):
            call()
    with raises("no grafted codebooks"):
        enable_codebooks(model)
    with raises("no gate was grafted"):
        ungraft(model)
    with raises("nothing was grafted"):
        save_gates(model, tmp_path / "no.safetensors")
    with raises("does not say what was grafted"):
        load_gates(model, {"a": torch.ones(1)})
    graft(model, "seer_attention", block_size=BLOCK)
    for ratio in (0, 1.5, -0.1):
        with raises("must be above 0 and at most 1"):
            set_sparse(model, nz_ratio=ratio)
        with raises("must be above 0 and at most 1"):
            sparse_report(model, x, [ratio])
    with raises("token_budget=3 is below one block of 4"):
        set_sparse(model, token_budget=3)
    with raises("nz_ratio and token_budget: give one of them"):
        set_sparse(model, nz_ratio=0.5, token_budget=64)
    with raises("at least two blocks of 4"):
        distil(model, [x[:, :7]])
    with raises("padded"):
        distil(model, [{"input_ids": x, "attention_mask": torch.zeros_like(x)}])
    with raises("give steps="):
        distil(model, iter([x]))
    with raises("ended after 1 of 2 steps"):
        distil(model, iter([x]), steps=2)
    with raises("no output_gate was grafted"):
        ungraft(model, "output_gate")
    with raises("attn_gate does not fit AttnGate: missing"):
        load_gates(model, {"a": torch.ones(1)})
    assert not hooks_left(model)
    assert model.config._attn_implementation == "sdpa"


def test_examples_run() -> None:
    assert doctest.testmod(grafting.main).failed == 0
