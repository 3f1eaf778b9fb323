"""Language models in transformers: what goes through its doors comes out as from the bare model."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import penstock
import penstock.interop.hf as hf
from penstock._version import __version__
from penstock.cli import main
from penstock.data.base import Source
from penstock.data.text import ByteTokenizer
from penstock.errors import UserError
from penstock.gates import GateNotFoundError, named_gates
from penstock.lab.cards import all_cards
from penstock.lab.config import override, to_dict, untouched
from penstock.lab.store import FORMAT, RunFolder, write_atomically
from penstock.lab.system import System, system
from penstock.lab.train import seed_all
from penstock.nn.causal_lm import CausalLM
from penstock.nn.decoder import DecoderLM
from penstock.nn.experts import collect_losses
from penstock.systems.sequence.gated_attention.model import GatedAttentionLM

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*one tile:UserWarning")
#: Their gates read ahead where nothing is cached: only open ones can agree with decoding.
READS_AHEAD = {"psa", "seer_attention", "zoology"}
LENGTH, NEW = 7, 5


def attention(gate: Any = "headwise", **options: Any) -> GatedAttentionLM:
    return GatedAttentionLM(41, 16, 2, 4, intermediate_size=24, num_kv_heads=2, head_dim=8, gate=gate, **options)


def small(found: System[Any]) -> Any:
    """The configuration of the quick size, with less text where there is text."""
    config = override(found.Config(), untouched(found.Config(), found.quick))
    short = hasattr(getattr(config, "data", None), "max_bytes")
    return override(config, {"data.max_bytes": 200_000}) if short else config


def of_system(name: str) -> nn.Module:
    found = system(name)
    config = small(found)
    return found.arms(config, found.load_data(config, Source()).spec)["gated"]()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "headwise": attention,
    "elementwise": partial(attention, "elementwise", tie_embeddings=True),
    "ungated": partial(attention, None),
} | {
    name: partial(of_system, name) for name, card in all_cards().items() if card.wing == "sequence" and card.ready
}  # fmt: skip


@cache
def built(name: str) -> nn.Module:
    """In float64, and away from the starting point, where a gate may still be a constant."""
    seed_all(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bare(name: str) -> CausalLM:
    model = copy.deepcopy(built(name))
    if not isinstance(model, CausalLM):
        pytest.skip(f"{name}: the gated arm is no CausalLM")
    return model


def tokens_for(model: CausalLM, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def generated(model: hf.PenstockForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(tokens, max_new_tokens=NEW, pad_token_id=0, **options)[:, tokens.shape[1] :]


# -- saving and loading --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_folder_is_the_model(bare: CausalLM, tmp_path: Path) -> None:
    hf.save(bare, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float64
    assert not again.training
    tokens = tokens_for(bare)
    torch.testing.assert_close(again(tokens, use_cache=False).logits, bare(tokens), rtol=0, atol=1e-12)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in bare.parameters()]
    assert (again.config.vocab_size, again.config.num_hidden_layers) == (bare.vocab_size, bare.num_layers)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half(tokens, use_cache=False).logits, bare.bfloat16()(tokens))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = attention(tie_embeddings=True)
    hf.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).model
    assert again.lm_head.weight is again.embed_tokens.weight
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 10_000


class Own(DecoderLM):
    """A model of the user's, with a constant that is not saved."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__([nn.Identity()], vocab_size, 16, 24)
        self.register_buffer("constant", torch.linspace(0, 1, 16).exp().cumsum(0) / 7, persistent=False)


def test_constants_that_no_checkpoint_holds_survive(tmp_path: Path) -> None:
    hf.save(Own(41), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).model
        assert isinstance(again, Own)
        assert torch.equal(again.constant, Own(41).to(dtype).constant)


def test_a_new_model_is_initialised_by_its_own_constructor() -> None:
    config = hf.to_transformers(attention()).config
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.manual_seed(3)
        again = attention().to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), again.parameters(), strict=True))


def test_a_resized_vocabulary_is_saved(tmp_path: Path) -> None:
    for tied in (False, True):
        model = hf.to_transformers(attention(tie_embeddings=tied))
        before = model(tokens_for(model.model)).logits
        model.resize_token_embeddings(50)
        after = model(tokens_for(attention())).logits
        torch.testing.assert_close(after[..., :41], before)
        hf.save(model, tmp_path / str(tied))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert again.model.vocab_size == again.config.vocab_size == 50
        torch.testing.assert_close(again(torch.tensor([[49]])).logits, model(torch.tensor([[49]])).logits)


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not what its constructor's arguments build \(layers.0.self_attn.gate"):
        hf.save(penstock.twin(attention()), tmp_path / "twin")
    with pytest.raises(ValueError, match=r"DecoderLM was built with mixers, which a config\.json cannot hold"):
        hf.save(DecoderLM([nn.Identity()], 41, 16, 24), tmp_path / "modules")
    with pytest.raises(ValueError, match="tokenizer has 256 ids, the model's vocabulary 41"):
        hf.save(attention(), tmp_path / "small", tokenizer="bytes")
    with pytest.raises(UserError, match="cannot be loaded"):
        hf.save(attention(), tmp_path / "none", tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        hf.save(attention(), tmp_path / "file")
    for wrong in ("penstock.systems.sequence.gla.model.RMSNorm", "penstock.nowhere.LM", "os.system", "LM"):
        with pytest.raises(ValueError, match=f"model_class '{wrong}'"):
            hf.PenstockForCausalLM(hf.PenstockConfig(model_class=wrong))
    hf.save(attention(), tmp_path / "lacking")
    path = tmp_path / "lacking" / "model.safetensors"
    state = {k: v for k, v in hf.to_transformers(attention()).state_dict().items() if "norm" not in k}
    transformers.modeling_utils.safe_save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model.layers.0.input_layernorm.weight, .* and \d+ more"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "lacking")


# -- generating ----------------------------------------------------------------------------------------------


def test_a_cache_changes_no_token_and_padding_neither(name: str, bare: CausalLM) -> None:
    model, tokens = hf.to_transformers(bare), tokens_for(bare)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    tokens[0, :3] = 0
    opened = penstock.force(bare, "open") if name in READS_AHEAD else contextlib.nullcontext()
    with opened:
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 3, "do_sample": False}):
            kept = generated(model, tokens, attention_mask=mask, **how)
            assert torch.equal(generated(model, tokens, attention_mask=mask, use_cache=False, **how), kept)
            if not how["do_sample"]:
                alone = [
                    generated(model, row[seen.bool()][None], **how) for row, seen in zip(tokens, mask, strict=True)
                ]
                assert torch.equal(torch.cat(alone), kept)


@torch.no_grad()
def test_a_cache_goes_on_where_it_was_left(name: str, bare: CausalLM) -> None:
    model, tokens = hf.to_transformers(bare), tokens_for(bare)
    with penstock.force(bare, "open") if name in READS_AHEAD else contextlib.nullcontext():
        full = model(tokens).logits
        first = model(tokens[:, :4])
        kept = first.past_key_values
        assert kept.get_seq_length() == 4
        assert len(kept) == bare.num_layers
        second = model(tokens[:, 4:6], past_key_values=kept)
        assert second.past_key_values is kept
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full[:, :6])
        # Beams: rows of the batch in another order, some twice.
        rows = torch.tensor([1, 1, 0])
        kept.reorder_cache(rows)
        torch.testing.assert_close(model(tokens[rows, 6:], past_key_values=kept).logits, full[rows, 6:])
        # A prompt that begins with what is cached is read from where the cache ends.
        kept = model(tokens[:, :4]).past_key_values
        assert torch.equal(
            generated(model, tokens, past_key_values=kept, do_sample=False), generated(model, tokens, do_sample=False)
        )
        assert kept.get_seq_length() == LENGTH + NEW - 1


def test_cache_utilities() -> None:
    model = hf.to_transformers(attention()).eval()
    tokens = tokens_for(model.model)
    kept = model(tokens).past_key_values
    assert kept.batch_size == 2
    assert kept.get_mask_sizes(3, 0) == (LENGTH + 3, 0)
    kept.batch_repeat_interleave(2)
    kept.batch_select_indices(torch.tensor([0, 3]))
    torch.testing.assert_close(model(tokens[:, :1], past_key_values=kept).logits, model(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1:])  # fmt: skip
    kept.reset()
    assert (kept.get_seq_length(), kept.batch_size, kept.is_initialized) == (0, -1, False)
    torch.testing.assert_close(model(tokens, past_key_values=kept).logits, model(tokens).logits)
    assert not kept.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        kept.crop(-1)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generated(model, tokens[:1], prompt_lookup_num_tokens=2)


def test_a_foreign_cache_is_refused() -> None:
    model, other, tokens = hf.to_transformers(attention()), hf.to_transformers(attention()), torch.ones(1, 3).long()
    kept = other(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is another model's"):
        model(tokens, past_key_values=kept)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model.generate(tokens, past_key_values=transformers.DynamicCache(), max_new_tokens=2)


def test_a_table_of_positions_is_not_overrun() -> None:
    bare = built("gam")
    assert isinstance(bare, CausalLM)
    assert bare.max_length is not None
    model, room = hf.to_transformers(bare), bare.max_length
    tokens = tokens_for(bare, 1, room - 2)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] == room + 1
    with pytest.raises(ValueError, match=f"table of {room} positions; .* at most max_new_tokens=3"):
        model.generate(tokens, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"table of {room} positions"):
        model(tokens_for(bare, 1, room + 1))


# -- calling and training ------------------------------------------------------------------------------------


def test_loss_is_that_of_the_next_token(bare: CausalLM) -> None:
    model, tokens = hf.to_transformers(bare), tokens_for(bare)
    labels = tokens.clone()
    labels[0, :3] = -100
    output = model(tokens, labels=labels)
    logits = bare(tokens)
    expected = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.past_key_values is None
    for some, where in ((2, [-2, -1]), (torch.tensor([1, 3]), [1, 3])):
        kept = model(tokens, logits_to_keep=some, use_cache=False).logits
        torch.testing.assert_close(kept, logits[:, where])
    loss, again = model(tokens, labels=labels, return_dict=False, num_items_in_batch=4)
    torch.testing.assert_close(loss, expected * (labels[:, 1:] != -100).sum() / 4)
    assert torch.equal(again, output.logits)


def test_losses_that_modules_add_are_trained_on() -> None:
    bare = copy.deepcopy(built("zoology")).train()
    model, tokens, found = hf.to_transformers(bare), tokens_for(bare, 2, 40), []
    for call in (lambda: model(tokens, labels=tokens).loss, lambda: bare(tokens)):
        torch.manual_seed(0)
        with collect_losses() as added:
            found.append(call())
    loss, logits = found
    own = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
    assert added["lookups"] > 0
    torch.testing.assert_close(loss, own + added["lookups"])


def test_inputs_that_are_not_taken_are_refused() -> None:
    model, tokens = hf.to_transformers(attention()), torch.ones(2, 3).long()
    embeddings = torch.zeros(2, 3, 16)
    for wrong, says in (
        ({"inputs_embeds": embeddings}, "GatedAttentionLM does not take inputs_embeds; it takes input_ids, attention"),
        ({"input_ids": tokens, "position_ids": tokens}, "does not take position_ids"),
        ({"input_ids": tokens, "output_attentions": True}, "does not take output_attentions"),
        ({}, "give input_ids"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\); it must be \(2, 3\)"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 1, 3, 3)}, "one entry a token, cached ones included"),
    ):
        with pytest.raises(ValueError, match=says):
            model(**wrong)
    assert model(tokens, output_attentions=False, inputs_embeds=None).logits.shape == (2, 3, 41)


def test_gradient_checkpointing_changes_no_gradient(bare: CausalLM) -> None:
    tokens, found = tokens_for(bare), []
    for on in (False, True):
        model = hf.to_transformers(copy.deepcopy(bare)).train()
        again: list[Any] = []
        if on:
            model.gradient_checkpointing_enable()
            checkpoint = model.model._gradient_checkpointing_func
            model.model._gradient_checkpointing_func = lambda *a, c=checkpoint, n=again: (n.append(a), c(*a))[1]
        torch.manual_seed(0)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert len(again) == on * bare.num_layers
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0])


def test_training_as_transformers_does_it(tmp_path: Path) -> None:
    model, tokens = hf.to_transformers(attention()), tokens_for(attention(), 4)
    before = model(tokens, labels=tokens).loss.item()
    if transformers.utils.is_accelerate_available():
        settings = transformers.TrainingArguments(
            tmp_path, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[], gradient_checkpointing=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows).train()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model(tokens, labels=tokens).loss.item() < before - 0.05


@torch.no_grad()
def test_gates_are_those_of_the_bare_model(name: str, bare: CausalLM) -> None:
    model, tokens = hf.to_transformers(bare), tokens_for(bare)
    call = partial(model, tokens, use_cache=False)
    if name == "ungated":
        with pytest.raises(GateNotFoundError):
            named_gates(model)
        return
    gates = list(named_gates(bare))
    assert [f"model.{gate}" for gate in gates] == list(named_gates(model))
    with penstock.watch(model) as log:
        plain = call().logits
    with penstock.watch(bare) as bare_log:
        bare(tokens)
    assert log.to_dict() == {f"model.{gate}": entry for gate, entry in bare_log.to_dict().items()}
    for gate in gates:
        with penstock.force(model, "open", f"model.{gate}"):
            forced = call().logits
        with penstock.force(bare, "open", gate):
            assert torch.equal(bare(tokens), forced)
        assert name in READS_AHEAD or not torch.equal(forced, plain)
    rows = penstock.ablate(model, lambda m: float(m(tokens, labels=tokens).loss), how=["open"])
    with penstock.force(bare, "open", gates[0]):
        assert rows[1]["metric"] == pytest.approx(float(model(tokens, labels=tokens).loss))


# -- tokenizer, runs and the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bytes")
    hf.byte_tokenizer(max_length=9).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_byte_tokenizer_is_ours(tokenizer: Any, text: str) -> None:
    ours = ByteTokenizer()
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids == ours.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_byte_tokenizer_for_batches(tokenizer: Any) -> None:
    assert len(tokenizer) == ByteTokenizer.vocab_size
    assert tokenizer.model_max_length == 9
    batch = tokenizer(["é", "abc", "\0\u0100 it's <pad>  "], padding=True, verbose=False)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1][-4:] == [0, 97, 98, 99]
    assert sum(batch["attention_mask"][1]) == 3
    assert tokenizer.decode([0xFF, 0x41, 0xE6, 0xBC]) == ByteTokenizer().decode([0xFF, 0x41, 0xE6, 0xBC])


def run_of(name: str, folder: Path) -> Path:
    """A run whose arms have not been trained."""
    found = system(name)
    config = small(found)
    data = found.load_data(config, Source())
    run = RunFolder.create(name, folder)
    about = {"format": FORMAT, "system": name, "version": __version__, "config": to_dict(config)}
    write_atomically(folder / "config.yaml", yaml.safe_dump(about | {"data": Source().to_dict()}))
    run.write_json("data.json", data.spec)
    run.save_model("gated", 0, found.arms(config, data.spec)["gated"]())
    run.release()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of("gated_attention", tmp_path_factory.mktemp("run") / "run")


def test_export_writes_model_and_tokenizer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # an earlier export is replaced
        assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "there"), "--json"]) == 0
        exported = json.loads(capsys.readouterr().out)
        assert exported["difference"] == 0
    model, words = (auto.from_pretrained(exported["file"]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = words(["def f(x):\n", "x"], return_tensors="pt", padding=True)
    assert words.batch_decode(model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None))
    assert model.generation_config.eos_token_id == words.eos_token_id == 0
    assert exported["bytes"] == sum(file.stat().st_size for file in (tmp_path / "there").iterdir())
    assert main(["export", str(run), "--format", "hf"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert (run / "gated.hf" / "tokenizer.json").is_file()


def test_export_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("[]")
    for out in (tmp_path / "full", run / "models" / "gated", run / "config.yaml"):
        assert main(["export", str(run), "--format", "hf", "--out", str(out)]) == 2
        assert "holds something else" in capsys.readouterr().err
    other = run_of("optfs", tmp_path / "other")
    assert main(["export", str(other), "--format", "hf"]) == 2
    assert "a run of optfs (ClickPrediction) is no language model's" in capsys.readouterr().err
    assert not (other / "gated.hf").exists()
