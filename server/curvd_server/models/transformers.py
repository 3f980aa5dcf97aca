"""A model of the library transformers, from a type and a configuration alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import InvalidSpec
from curvd_server.models.options import Config, checked

_HEADS = {
    "none": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}

_ATTENTION = "curvd"
_FOREIGN = re.compile("_.*|backbone|.*_path|.*_config")
"""Options that refer to files and other models."""


_OF_WHOLE = "transformers_version"
"""Stands in what ``config.to_dict()`` of the library returns, and is no option."""
_SAID = {"_name_or_path", "model_type", "output_attentions"}
"""What else ``to_dict()`` adds; the options that all types share are the library's."""


def transformers_model(library: Any, name: str, kind: str, config: Config) -> nn.Module:
    """Build a model.

    Args:
        library: transformers.
        name: The name of the builder, for messages.
        kind: A type of model that the library knows.
        config: ``head`` (which class), ``output`` (which field of its result) and the
            type's own options.

    Returns:
        A module that returns one tensor.

    Raises:
        InvalidSpec: If an option is unknown or out of range.
    """
    options = dict(config)
    head, output = options.pop("head", "none"), options.pop("output", "")
    if not isinstance(head, str) or head not in _HEADS:
        msg = f"{name}: head must be one of {sorted(_HEADS)}, got {head!r}"
        raise InvalidSpec(msg, builder=name, key="head", value=head)
    if not isinstance(output, str):
        msg = f"{name}: output must be the name of a field, got {output!r}"
        raise InvalidSpec(msg, builder=name, key="output", value=output)
    own = library.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    shared = {f.name for f in dataclasses.fields(library.PreTrainedConfig)}
    known = {f.name for f in dataclasses.fields(own)} - shared
    known = {n for n in known if _FOREIGN.fullmatch(n) is None} | {"num_labels"}
    if _OF_WHOLE in options:
        options = _architecture(name, kind, options, shared | _SAID, known, own)
    options = checked(name, options, known)
    if "use_cache" in known:
        options["use_cache"] = False  # a cache for generating costs, and gains nothing
    described = library.AutoConfig.for_model(kind, **options)
    auto = getattr(library, _HEADS[head])
    module: nn.Module = auto.from_config(described, trust_remote_code=False)
    # The grouped kernel has no float64, and the batched one copies weights per token.
    described._experts_implementation = "eager"
    _use_traceable_attention(module)
    module.register_forward_hook(functools.partial(_one_output, name, output))
    return module


def _architecture(
    name: str, kind: str, whole: Config, shared: Set[str], known: Set[str], own: Any
) -> dict[str, Any]:
    """Take from ``config.to_dict()`` what shapes the architecture.

    Args:
        name: The name of the builder, for messages.
        kind: The type of model that the builder makes.
        whole: What ``to_dict()`` returned.
        shared: Names of what every configuration has: labels, paths, types, outputs.
        known: The type's own options.
        own: The type's configuration class.

    Returns:
        The type's own options, the number of labels, and what no builder knows unless it
        is as the type has it anyway.

    Raises:
        InvalidSpec: If it is the configuration of another type.
    """
    told = whole.get("model_type", kind)
    if told != kind:
        msg = (
            f"{name}: this is the configuration of a {told!r}; register it as "
            f"'transformers:{told}'"
        )
        raise InvalidSpec(msg, builder=name, key="model_type", value=told)
    usual = own().to_dict()
    options = {
        key: value
        for key, value in whole.items()
        if key not in shared and (key in known or value != usual.get(key))
    }
    labels = whole.get("id2label")
    if isinstance(labels, Mapping):
        options.setdefault("num_labels", len(labels))
    return options


def _use_traceable_attention(module: Any) -> None:
    """Let masks be made without looking at values, so that products can be traced.

    The library leaves a mask out when nothing is masked, and looks for packed sequences
    when there is none: both are decisions on data, which one trace cannot contain.
    """
    if getattr(module.config, "_attn_implementation", None) != "sdpa":
        return
    _register_attention()
    module.config._attn_implementation = _ATTENTION
    takes = inspect.signature(module.forward).parameters
    if module.main_input_name == "input_ids" and "attention_mask" in takes:
        module.register_forward_pre_hook(_with_mask, with_kwargs=True)


@functools.cache
def _register_attention() -> None:
    attention = importlib.import_module("transformers.integrations.sdpa_attention")
    masks = importlib.import_module("transformers.masking_utils")
    modeling = importlib.import_module("transformers.modeling_utils")

    def whole_mask(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masks.sdpa_mask(*args, **kwargs)

    modeling.AttentionInterface.register(_ATTENTION, attention.sdpa_attention_forward)
    masks.AttentionMaskInterface.register(_ATTENTION, whole_mask)


def _with_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Say that every token counts, unless the data says which."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if kwargs.get("attention_mask") is None and tokens is not None and len(args) < 2:
        kwargs = {**kwargs, "attention_mask": torch.ones_like(tokens)}
    return args, kwargs


def _one_output(
    name: str, wanted: str, module: nn.Module, args: Any, result: Any
) -> Tensor:
    """Choose among the outputs of a transformer: by name, or the usual one."""
    fields = dict(result) if isinstance(result, Mapping) else {"output": result}
    tensors = {n: t for n, t in fields.items() if isinstance(t, Tensor)}
    for field in [wanted] if wanted else ["logits", "last_hidden_state", *tensors]:
        if field in tensors:
            return tensors[field]
    msg = f"{name} has no output {wanted!r}; it has {', '.join(tensors) or 'none'}"
    raise InvalidSpec(msg, builder=name, output=wanted)
