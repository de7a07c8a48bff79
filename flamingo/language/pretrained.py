"""Causal language models of transformers, with room in front of every layer."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flamingo.language.cache import growing_cache
from flamingo.language.decoder import check_attention_mask
from flamingo.language.loss import is_plain_linear, is_watched, sum_of_losses, sum_of_losses_in_pieces
from flamingo.language.new_tokens import NewTokens
from flamingo.language.positions import positions_of
from flamingo.pretrained import load_whole

# By the model_type of a model's configuration: where its decoder layers are.
FAMILIES = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "gemma": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}

BeforeLayer = Callable[[int, Tensor], Tensor]


class PretrainedLanguage(nn.Module):
    """A causal language model of transformers, called like `LanguageModel`, frozen.

    The model stays as it is: its modules, their names, its `state_dict` and its own `generate`. Hooks on its
    layers act in a call of this module alone. Where `before_layer` returns its input, and at tokens that
    are not new, the logits are bit for bit those of the model alone.

    Args:
        model: a `...ForCausalLM` of the families Llama, Mistral, OPT, GPT-NeoX, MPT, Gemma and Qwen.
        frozen: no parameter of the model takes a gradient, and it stays in eval mode, also after `train()`.
        new_tokens: ids whose embedding is learnt all the same, see `NewTokens`; those beyond the model's
            vocabulary continue it.
        layers: the path of the list of decoder layers in a model of another family, as "transformer.h"; the
            hidden states have to be the first positional argument of such a layer.

    Attributes:
        dim, vocab_size, num_layers: the sizes, with new tokens.
        model: the model.
        path_of_layers: where its decoder layers are.

    Raises:
        ValueError: if the family is unknown and no path is given, or new tokens are to join a model that
            accelerate has offloaded.

    Several threads may call at once; training with gradient checkpointing needs one alone.

    Limits: padding between tokens, as behind the shorter text of
    an earlier turn, puts MPT's tokens further apart, since it has no positions to shift, and counts in a
    sliding window. Gradient checkpointing includes the blocks in transformers 4 and not in 5.

    Example; `PretrainedLanguage.from_pretrained("facebook/opt-1.3b")` has OPT's weights:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> sizes = {"hidden_size": 48, "ffn_dim": 96, "word_embed_proj_dim": 48, "num_attention_heads": 2}
        >>> model = OPTForCausalLM(OPTConfig(vocab_size=300, num_hidden_layers=2, **sizes))
        >>> language = PretrainedLanguage(model, new_tokens=[300])
        >>> config = FlamingoConfig.preset(
        ...     "tiny", language_dim=language.dim, language_layers=2, vocab_size=301, media_token_id=300
        ... )
        >>> flamingo = Flamingo(config, language=language)
        >>> flamingo(torch.tensor([[65, 300, 66]]), torch.zeros(1, 1, 1, 3, 32, 32)).logits.shape
        torch.Size([1, 3, 301])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        frozen: bool = True,
        new_tokens: Sequence[int] = (),
        layers: str | None = None,
    ):
        super().__init__()
        kind = getattr(getattr(model, "config", None), "model_type", None)
        path = layers or FAMILIES.get(str(kind))
        if path is None:
            raise ValueError(
                f"PretrainedLanguage: expected a causal language model of {', '.join(FAMILIES)}, got "
                f"{type(model).__name__} of type {kind}. For another family pass the path of its decoder "
                'layers: layers="transformer.h".'
            )
        embedding, head = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
        if new_tokens and hasattr(embedding, "_hf_hook") and embedding.weight.is_meta:
            raise ValueError(
                "PretrainedLanguage: expected weights in memory, as new tokens begin as large as these, got "
                "a model that accelerate has offloaded. Offload the PretrainedLanguage, or the Flamingo."
            )
        self.model: Any = model
        self.dim: int = cast(Any, model).config.hidden_size
        self.frozen = frozen
        self.path_of_layers = path
        self._calls: dict[int, _Call] = {}  # by thread
        taken = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._cache_keyword = "cache" if "cache" in taken else "past_key_values"  # before transformers 5.24
        untied = None if head.weight is embedding.weight else head.weight
        self.new_tokens = NewTokens(new_tokens, embedding.weight, untied) if new_tokens else None
        self.vocab_size: int = (
            len(embedding.weight) if self.new_tokens is None else self.new_tokens.vocab_size
        )
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(functools.partial(self._enter_layer, index))
        head.register_forward_pre_hook(self._enter_head)
        head.register_forward_hook(self._leave_head)
        if frozen:
            self.freeze()
        self.train(self.training)

    @staticmethod
    def from_pretrained(
        name: str, *, frozen: bool = True, new_tokens: Sequence[int] = (), **options: Any
    ) -> "PretrainedLanguage":
        """The language model of a checkpoint, by its name on the hub or its folder.

        Args:
            name: a checkpoint of a causal language model.
            frozen, new_tokens: see the class.
            options: for transformers' `from_pretrained`, as `dtype=torch.bfloat16`.

        Raises:
            ImportError: if transformers is not installed.
            ValueError: if it is a checkpoint of an unknown family, or lacks weights.
        """
        from transformers import AutoModelForCausalLM

        model = load_whole(AutoModelForCausalLM, name, **options)
        return PretrainedLanguage(model, frozen=frozen, new_tokens=new_tokens)

    @property
    def layers(self) -> nn.ModuleList:
        """The model's decoder layers."""
        return cast(nn.ModuleList, self.model.get_submodule(self.path_of_layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def new_cache(self) -> Any:
        """An empty cache; given to every call on one text, it spares reading earlier tokens again."""
        return growing_cache()

    def freeze(self) -> "PretrainedLanguage":
        """Freezes all parameters but those of new tokens; returns the model."""
        self.frozen = True
        self.model.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "PretrainedLanguage":
        """`nn.Module.train`, but a frozen model stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
        before_layer: BeforeLayer | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """input_ids `[B, T]` to logits `[B, T or n, vocab_size]`.

        Arguments and errors are those of `LanguageModel.forward`; the cache is one of transformers.
        """
        with self._calling(before_layer, slice(-logits_to_keep, None)):
            return self._call_model(input_ids, attention_mask, cache)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        before_layer: BeforeLayer | None = None,
    ) -> Tensor:
        """The sum of the losses of the next token, float32 or wider.

        Arguments are those of `LanguageModel.loss`. The logits of all tokens never exist at once, unless
        something else than the head makes them (Gemma 2 caps them), somebody sees them, as a hook does, or
        the model is none of the families named above.
        """
        if self._head_is_last:
            # All of the model's own forward, but its head gets no token.
            with self._calling(before_layer, slice(0)) as at_head:
                logits = self._call_model(input_ids, attention_mask)
            x, of_head = at_head
            if logits is of_head:  # a release to come may go on after it
                return self._loss_in_pieces(x, labels)
        return sum_of_losses(self(input_ids, attention_mask, before_layer=before_layer), labels)

    @property
    def _head_is_last(self) -> bool:
        """Whether nothing follows the head, and nobody sees what it makes."""
        config, head = self.model.config, self.model.get_output_embeddings()
        return (
            type(self.model).__module__.startswith("transformers.models.")
            and config.model_type in FAMILIES
            and getattr(config, "final_logit_softcapping", None) is None
            and is_plain_linear(head, hooks=2)  # ours
            and not is_watched(self.model)
            and not is_watched(self)
        )

    def _loss_in_pieces(self, x: Tensor, labels: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        parameters = list(head.parameters())

        def to_logits(x: Tensor) -> Tensor:
            return head(x) if self.new_tokens is None else self.new_tokens(x, head(x))

        if self.new_tokens is not None:
            parameters.append(self.new_tokens.rows)
        return sum_of_losses_in_pieces(
            to_logits, x, labels, vocab_size=self.vocab_size, parameters=parameters
        )

    def _call_model(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any = None) -> Tensor:
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        self._expect_places(past + length, attention_mask)
        options: dict[str, Any] = {self._cache_keyword: cache, "use_cache": cache is not None}
        if attention_mask is not None:
            check_attention_mask(attention_mask, (batch, past + length))
            options["attention_mask"] = attention_mask.long()
            if self._takes_positions:
                options["position_ids"] = positions_of(attention_mask)[:, past:]
        return self.model(inputs_embeds=self._embed(input_ids), **options).logits

    def _expect_places(self, length: int, attention_mask: Tensor | None) -> None:
        """Raises ValueError if a text is longer than a table of positions, which others than OPT do not have,
        or than MPT's biases."""
        name = {"opt": "max_position_embeddings", "mpt": "max_seq_len"}.get(self.model.config.model_type)
        most = None if name is None else getattr(self.model.config, name, None)
        if most is None or length <= most:
            return
        if name != "max_seq_len" and attention_mask is not None:
            length = int((attention_mask != 0).sum(dim=1).max())  # padding takes no position
        if length > most:
            raise ValueError(
                f"{type(self.model).__name__}: expected a text of at most {name}={most} tokens, got one of "
                f"{length}. Show fewer shots, generate fewer tokens, or take a model with more positions."
            )

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedding = self.model.get_input_embeddings()
        if self.new_tokens is None:
            return embedding(input_ids)
        frozen = embedding(self.new_tokens.stand_in(input_ids))
        scale = getattr(embedding, "embed_scale", 1.0)  # of Gemma's, which multiplies its rows
        return self.new_tokens(input_ids, frozen, scale)

    @property
    def _now(self) -> "_Call | None":
        """The call that this thread is in."""
        return self._calls.get(_thread())

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self._now
        if call is None or call.before_layer is None:
            return None
        return call.before_layer(index, args[0]), *args[1:]

    def _enter_head(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        call = self._now
        if call is None:
            return None
        call.at_head.append(args[0])
        # Here and not by the model's own argument, which not every family has.
        return (args[0][:, call.rows],)

    def _leave_head(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        call = self._now
        if call is None:
            return logits
        logits = logits if self.new_tokens is None else self.new_tokens(args[0], logits)
        call.at_head.append(logits)
        return logits

    @contextlib.contextmanager
    def _calling(self, before_layer: BeforeLayer | None, rows: slice) -> Iterator[list[Tensor]]:
        """Turns the hooks on: of these rows there are logits. Gives what comes to the head and leaves it."""
        call = _Call(before_layer, rows)
        checkpointed = [layer for layer in self.layers if getattr(layer, "gradient_checkpointing", False)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._during(call))
            if checkpointed and self.training and torch.is_grad_enabled():
                for layer in checkpointed:
                    stack.enter_context(self._checkpointing(layer, call))
            yield call.at_head

    @contextlib.contextmanager
    def _during(self, call: "_Call") -> Iterator[None]:
        """What the hooks do in this thread is what a call asks for."""
        thread = _thread()
        before = self._calls.get(thread)
        self._calls[thread] = call
        try:
            yield
        finally:
            if before is None:
                del self._calls[thread]
            else:
                self._calls[thread] = before

    @contextlib.contextmanager
    def _checkpointing(self, layer: Any, call: "_Call") -> Iterator[None]:
        """Has transformers checkpoint a layer that is frozen, which it does not in eval mode.

        In the backward pass the layer runs again, in transformers 4 with its hooks: then too it must see the
        blocks of the call it belongs to, and be in eval mode where its dropout asks for it.
        """
        checkpoint, was_training = layer._gradient_checkpointing_func, layer.training

        def run_again(function: Callable[..., Any], *args: Any) -> Any:
            training, layer.training = layer.training, was_training
            try:
                with self._during(call):
                    return function(*args)
            finally:
                layer.training = training

        def checkpoint_it(function: Callable[..., Any], *args: Any) -> Any:
            # Not reentrant: that needs an input with a gradient, and a frozen embedding gives none.
            return checkpoint(functools.partial(run_again, function), *args, use_reentrant=False)

        layer._gradient_checkpointing_func, layer.training = checkpoint_it, True
        try:
            yield
        finally:
            layer._gradient_checkpointing_func, layer.training = checkpoint, was_training


class _Call:
    """What a call wants of the hooks, and what they have seen."""

    def __init__(self, before_layer: BeforeLayer | None, rows: slice):
        self.before_layer = before_layer
        self.rows = rows  # of which there are to be logits
        self.at_head: list[Tensor] = []  # what came to the head, and what left it


def _thread() -> int:
    """The number of this thread; the compiler has one only, and does not know the function."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
