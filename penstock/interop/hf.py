"""Language models in transformers: `AutoModelForCausalLM`, `generate()`, `Trainer`, and a byte tokenizer.

Importing this module is all that is needed for transformers to know Penstock's folders:

    import penstock.interop.hf
    model = AutoModelForCausalLM.from_pretrained(folder)

Shape legend: B batch, L tokens of one call, T tokens so far with this call's, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import initialization as transformers_init
from transformers.modeling_outputs import CausalLMOutputWithPast

from penstock.errors import UserError
from penstock.nn.causal_lm import Cache, CausalLM
from penstock.nn.experts import collect_losses

if TYPE_CHECKING:
    from penstock.lab.store import Run

#: What an output calls the cache: transformers 5.24 shortened ``past_key_values``.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_TAKEN = "input_ids, attention_mask, past_key_values, labels, use_cache, logits_to_keep and return_dict"


class PenstockConfig(PreTrainedConfig):
    """Which of Penstock's language models, and how it is built.

    Args:
        model_class: the class by its full name, as "penstock.systems.sequence.gla.model.GLALM". A class outside of
            Penstock is found once the module that defines it has been imported.
        arguments: of its constructor.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings, tie_word_embeddings:
            as transformers calls them; the model sets them, nothing is built from them.
        use_cache: whether calls outside of training return a cache unless they say otherwise.
        bos_token_id, eos_token_id, pad_token_id: if the tokenizer has them.
    """

    model_type: ClassVar[str] = "penstock"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [_CACHE]

    model_class: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class PenstockCache(transformers.Cache):
    """What a model remembers, `penstock.nn.causal_lm.Cache`, as transformers handles it.

    Recurrent states cannot be taken back, so no cache can be cropped: assisted generation is refused by `generate`.

    Attributes:
        states: the model's own cache.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self, states: Cache) -> None:
        super().__init__(layers=[])
        self.states = states

    def __repr__(self) -> str:
        return f"PenstockCache({len(self)} layers, {self.states.length} tokens, {self.states.num_bytes():,} bytes)"

    def __len__(self) -> int:
        return len(self.states.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.states.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.states.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.states.length > 0

    @property
    def batch_size(self) -> int:
        return next((len(value) for state in self.states.layers for value in state.values()), -1)

    @property
    def is_initialized(self) -> bool:
        return self.states.length > 0

    @property
    def is_linear(self) -> list[bool]:
        # `generate` cuts a prompt that begins with what the cache has seen, unless all layers are "linear".
        return [False] * len(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size > 0:
            rows = torch.arange(self.batch_size).repeat_interleave(repeats)
            self.states.reorder(rows)

    def reset(self) -> None:
        self.states.layers = [type(state)() for state in self.states.layers]
        self.states.length, self.states.mask = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused but for nothing at all.

        Raises:
            ValueError: for any number of tokens.
        """
        if tokens_to_remove:
            raise ValueError("a PenstockCache cannot be cropped: recurrent states do not go back; begin a new one")


class PenstockForCausalLM(PreTrainedModel, GenerationMixin):
    """Any language model of Penstock as a transformers model: tokens (B, L) -> logits (B, L, V), and a loss.

    Args:
        config: what to build.
        model: wrap this one instead, which ``config`` describes.

    Attributes:
        model: the `CausalLM` itself; its gates are ``model.<their name>`` to `penstock.watch` and `penstock.force`.

    Raises:
        ValueError: if the class is not known.
    """

    config_class = PenstockConfig
    config: PenstockConfig
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: PenstockConfig, model: CausalLM | None = None) -> None:
        super().__init__(config)
        self.model = _build(config) if model is None else model
        self._embedding = _child(self.model, nn.Embedding, "num_embeddings")
        self._head = _child(self.model, nn.Linear, "out_features")
        names: dict[int, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
        self._tied_weights_keys = {
            name: names[id(parameter)]
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if names[id(parameter)] != name
        }
        self._no_split_modules = [type(self.model).__name__]  # its layers share one span and one cache
        #: What no checkpoint holds and transformers empties on loading.
        self._constants = {
            module: {name: module.get_buffer(name).clone() for name in _constant_buffers(module)}
            for module in self.model.modules()
        }
        config.vocab_size, config.num_hidden_layers = self.model.vocab_size, self.model.num_layers
        config.hidden_size = 0 if self._embedding is None else self.get_input_embeddings().weight.shape[1]
        config.num_attention_heads = config.arguments.get("num_heads")
        config.max_position_embeddings = self.model.max_length
        config.tie_word_embeddings = bool(self._tied_weights_keys)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: PenstockCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        past_key_values: PenstockCache | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, with ``labels`` a loss, and a cache.

        The loss is the cross-entropy of the next token; in training with what modules add by `add_loss`.

        Args:
            input_ids: (B, L) int64; with a cache, the tokens after those it has seen.
            attention_mask: (B, T) over the cached tokens too; zero where padding is.
            cache, past_key_values: two names of one thing, a cache from an earlier output of this model; it is updated
                in place.
            labels: (B, L), ``input_ids`` with -100 where there is nothing to learn; the shift is made here.
            use_cache: whether to begin a cache. Default: as the config says, but not in training nor with labels.
            logits_to_keep: only the last so many positions, or those with these indices; 0: all.
            return_dict: False gives a tuple.
            num_items_in_batch: divides the summed loss (`Trainer` gives it).
            others: refused unless ``None`` or False.

        Raises:
            ValueError: for an input that is not taken, a mask that does not fit, a cache of another model, or more
                tokens than there are positions.
        """
        if refused := sorted(name for name, value in others.items() if value is not None and value is not False):
            raise ValueError(f"{type(self.model).__name__} does not take {', '.join(refused)}; it takes {_TAKEN}")
        if input_ids is None:
            raise ValueError("give input_ids: the model has nothing else to read")
        past = self._checked(cache if past_key_values is None else past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if past is None and use_cache:
            past = PenstockCache(self.model.new_cache())
        states = None if past is None else past.states
        mask_BL = _mask_of(attention_mask, input_ids, states)
        collecting: AbstractContextManager[dict[str, Tensor]] = nullcontext({}) if labels is None else collect_losses()
        with collecting as auxiliary:
            logits = self.model(input_ids, cache=states, mask_BL=mask_BL)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
            loss = loss + sum(auxiliary.values())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        remembered: dict[str, Any] = {_CACHE: past}
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, kept], **remembered)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _checked(self, cache: object) -> PenstockCache | None:
        if cache is None or (isinstance(cache, PenstockCache) and cache.states.belongs_to(self.model)):
            return cache
        whose = "another model's" if isinstance(cache, PenstockCache) else f"a {type(cache).__name__}"
        raise ValueError(f"past_key_values is {whose}; begin with None and pass on what this model returned")

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a folder that lacks weights is refused.

        Raises:
            ValueError: naming the first few weights that are missing.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"{model.name_or_path} lacks weights: {', '.join(missing[:3])}{more}")
        return loaded if output_loading_info else model

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        # transformers would build on the meta device, where what a constructor computes is lost.
        contexts = super().get_init_context(*args, **kwargs)
        return [c for c in contexts if c != torch.device("meta")] + [transformers_init.no_init_weights()]

    def _init_weights(self, module: nn.Module) -> None:
        if module not in self._constants:
            super()._init_weights(module)  # a larger embedding: transformers' own
            return
        # Constructors have drawn the weights already.
        for name, value in self._constants[module].items():
            transformers_init.copy_(module.get_buffer(name), value)

    def get_input_embeddings(self) -> nn.Embedding:
        found = None if self._embedding is None else self.model.get_submodule(self._embedding)
        if not isinstance(found, nn.Embedding):
            raise NotImplementedError(f"{type(self.model).__name__} has no table of {self.model.vocab_size} tokens")
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert self._embedding is not None, "transformers asks for the old ones first"
        setattr(self.model, self._embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self._head is None else self.model.get_submodule(self._head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        assert self._head is not None, "transformers asks for the old ones first"
        setattr(self.model, self._head, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the model is rebuilt at the new size when it is loaded."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.vocab_size = embedding.num_embeddings
        self.config.arguments = {**self.config.arguments, "vocab_size": embedding.num_embeddings}
        return embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes the model's own

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)  # type: ignore[misc]
        limit, asked = self.model.max_length, generation_config.max_length
        # The last token is not read any more.
        if limit is not None and asked > limit + 1:
            raise ValueError(
                f"{input_ids_length} tokens of prompt and {asked - input_ids_length} new ones: "
                f"{type(self.model).__name__} has a table of {limit} positions; "
                f"shorten the prompt or ask for at most max_new_tokens={max(limit + 1 - input_ids_length, 0)}"
            )


def to_transformers(model: CausalLM, *, tokenizer: str | PreTrainedTokenizerBase | None = None) -> PenstockForCausalLM:
    """Wrap a language model, which stays what it is: weights are shared, hooks and gates act on both.

    Args:
        model: any `CausalLM`.
        tokenizer: see `make_tokenizer`; the ids of its special tokens go into the config.

    Raises:
        ValueError: if the tokenizer has more ids than the model's vocabulary.
    """
    kind, arguments = type(model), model._hub_mixin_config or {}
    assert isinstance(arguments, dict), "a CausalLM has arguments, not a configuration object"
    config = PenstockConfig(model_class=f"{kind.__module__}.{kind.__qualname__}", arguments=dict(arguments))
    wrapped = PenstockForCausalLM(config, model)
    wrapped.training = model.training
    if tokenizer is not None:
        _take_ids(wrapped, make_tokenizer(tokenizer))
    return wrapped


def save(
    model: CausalLM | PenstockForCausalLM | Run | str | Path,
    folder: str | Path,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    arm: str | None = None,
    seed: int = 0,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` read.

    Args:
        model: a language model, or a run (its folder, or opened) of which an arm is taken.
        folder: is made if it is not there; weights go into ``model.safetensors``.
        tokenizer: see `make_tokenizer`; default: of a run, its own; of a model, none.
        arm, seed: of a run; default the gated one, trained first.

    Raises:
        UserError: if the run cannot be used or is no language model's, or ``folder`` is a file.
        ValueError: if the model is not what its constructor's arguments build (a twin, a grafted model), or the
            tokenizer does not fit.
    """
    if not isinstance(model, nn.Module):
        model, tokenizer = _of_run(model, arm, seed, tokenizer)
    if Path(folder).is_file():
        raise UserError(f"{folder}: is a file; give a folder")
    wrapped = model if isinstance(model, PenstockForCausalLM) else to_transformers(model)
    _refuse_unlike(wrapped)
    if tokenizer is not None:
        tokenizer = make_tokenizer(tokenizer, max_length=wrapped.model.max_length)
        _take_ids(wrapped, tokenizer)
        tokenizer.save_pretrained(folder)
    wrapped.save_pretrained(folder)


def make_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, *, max_length: int | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers: "bytes" (see `byte_tokenizer`), a folder or name, or one as it is.

    Raises:
        UserError: if it cannot be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer == "bytes":
        return byte_tokenizer(max_length=max_length)
    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {tokenizer!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def byte_tokenizer(*, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """`penstock.data.text.ByteTokenizer` for transformers: a token is a UTF-8 byte, its id the byte's value.

    Id 0, which stands between documents, begins and ends a text and pads it, on the left. Decoding with
    ``skip_special_tokens=True`` is `ByteTokenizer.decode`; without, NUL characters of the text survive.

    Args:
        max_length: the longest sequence of the model, if it has one.
    """
    # GPT-2's alphabet: printable bytes stand for themselves, the rest for the characters from U+0100 on, in order.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    # NUL is a special token and so matched as itself, before the alphabet.
    vocabulary = {"\0" if byte == 0 else character: byte for character, byte in vocabulary.items()}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="\0",
        eos_token="\0",
        pad_token="\0",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def _class_of(config: PenstockConfig) -> type[CausalLM]:
    """The model's class; only Penstock's own modules are imported for it."""
    module, _, name = config.model_class.rpartition(".")
    if module.startswith("penstock."):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"model_class {config.model_class!r}: {error}") from None
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, CausalLM)):
        raise ValueError(
            f"model_class {config.model_class!r} is no language model that is known here; "
            "import the module that defines it first"
        )
    return found


def _build(config: PenstockConfig) -> CausalLM:
    """A new model in the default precision; constants are computed in float32 and rounded, as ``model.to`` does."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return _class_of(config)(**config.arguments).to(dtype)
    finally:
        torch.set_default_dtype(dtype)


def _child(model: CausalLM, kind: type[nn.Module], rows: str) -> str | None:
    """Name of the model's own child of this kind with as many rows as the vocabulary."""
    return next(
        (
            name
            for name, module in model.named_children()
            if isinstance(module, kind) and getattr(module, rows) == model.vocab_size
        ),
        None,
    )


def _constant_buffers(module: nn.Module) -> Sequence[str]:
    """Buffers of a module that its state dict leaves out."""
    return [name for name, _ in module.named_buffers(recurse=False) if name in module._non_persistent_buffers_set]


def _mask_of(attention_mask: Tensor | None, input_ids: Tensor, cache: Cache | None) -> Tensor | None:
    """The part of the mask (B, L) for this call's tokens; ``None`` where all are real."""
    if attention_mask is None:
        return None
    total = input_ids.shape[1] + (0 if cache is None else cache.length)
    if attention_mask.shape != (len(input_ids), total):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; it must be {(len(input_ids), total)}: "
            "one entry a token, cached ones included"
        )
    here = attention_mask[:, total - input_ids.shape[1] :].bool()
    return None if here.all() else here


def _take_ids(model: PenstockForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > model.model.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {model.model.vocab_size}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))


def _refuse_unlike(model: PenstockForCausalLM) -> None:
    """Refuse a model that its config would not build again."""
    kind, arguments = _class_of(model.config), model.config.arguments
    lost = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in arguments and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if lost:
        raise ValueError(f"{kind.__name__} was built with {', '.join(lost)}, which a config.json cannot hold")
    with torch.device("meta"):
        again = {name: value.shape for name, value in kind(**arguments).state_dict().items()}
    here = {name: value.shape for name, value in model.model.state_dict().items()}
    if unlike := [name for name in here | again if here.get(name) != again.get(name)]:
        raise ValueError(
            f"this {kind.__name__} is not what its constructor's arguments build ({unlike[0]} differs); "
            "a twin or a changed model cannot be saved this way"
        )


def _of_run(
    run: Run | str | Path, arm: str | None, seed: int, tokenizer: str | PreTrainedTokenizerBase | None
) -> tuple[CausalLM, str | PreTrainedTokenizerBase | None]:
    """A trained arm of a language model's run and the run's tokenizer, unless another is given."""
    # Here, so that loading a folder does not wait for Lightning.
    from penstock.lab.store import Run, open_run
    from penstock.tasks.language_modelling import LanguageModelling

    opened = run if isinstance(run, Run) else open_run(run)
    model = opened.model(arm, seed=seed)
    task = opened.system.task_for(opened.spec)
    if not (issubclass(task, LanguageModelling) and isinstance(model, CausalLM)):
        raise UserError(
            f"{opened.folder.path}: a run of {opened.system.name} ({task.__name__}) is no language model's; "
            "transformers takes those only"
        )
    return model, opened.spec.get("tokenizer") if tokenizer is None else tokenizer


AutoConfig.register("penstock", PenstockConfig, exist_ok=True)
AutoModelForCausalLM.register(PenstockConfig, PenstockForCausalLM, exist_ok=True)
