"""Models of popular libraries by name: ``timm:…``, ``torchvision:…``, ``transformers:…``.

The server's operator allows names by globs. A client chooses one of them and sends JSON
options, which are checked against a list of those that shape an architecture: nothing
is downloaded, no file is opened, and no code comes from anywhere but the installed
library. Sizes are capped while a model is put together, first on the ``meta`` device.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvd.errors import CurvdError, FailedPrecondition, InvalidSpec
from curvd_server.bounded import bounded

Config = Mapping[str, Any]

_LARGEST = 2**20
_MOST_ITEMS = 4_096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_.+\-]{0,64}")

_TIMM = frozenset(
    "act_layer base_width cardinality channels class_token conv_bias conv_mlp "
    "depth depths dims drop_path_rate drop_rate embed_dim embed_dims expansion "
    "fc_norm global_pool img_size in_chans init_values kernel_sizes layers mlp_ratio "
    "mlp_ratios no_embed_class norm_layer num_classes num_heads output_stride "
    "patch_size pos_drop_rate pos_embed pre_norm proj_bias qk_norm qkv_bias "
    "reg_tokens replace_stem_pool stem_type stem_width window_size".split()
)
_TORCHVISION = frozenset(
    "aux_logits dropout image_size init_weights num_classes stochastic_depth_prob "
    "transform_input width_mult zero_init_residual".split()
)
_HEADS = {
    "none": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}
_NESTED = ("rope_parameters", "rope_scaling")
"""Options of transformers that are mappings of numbers and words."""


def check_allowed(patterns: Sequence[str]) -> tuple[str, ...]:
    """Refuse what the server's operator cannot have meant.

    Args:
        patterns: Globs over ``library:name``, for example ``timm:vit_*``.

    Returns:
        The patterns.

    Raises:
        InvalidSpec: If a library is unknown or not installed.
    """
    for pattern in patterns:
        library, colon, name = pattern.partition(":")
        if library not in _MAKERS or not (colon and name):
            msg = (
                f"library {pattern!r} must be one of {', '.join(sorted(_MAKERS))}, a "
                "colon, and a glob over its model names"
            )
            raise InvalidSpec(msg, library=pattern)
        if importlib.util.find_spec(library) is None:
            msg = (
                f"library {pattern!r} is allowed, but {library} is not installed: "
                f"pip install 'curvd[{library}]'"
            )
            raise InvalidSpec(msg, library=pattern, extra=library)
    return tuple(patterns)


def find(
    name: str, allowed: Sequence[str], *, limit_bytes: int
) -> Callable[[Config], nn.Module] | None:
    """Find a model of a library.

    Args:
        name: From a stranger.
        allowed: Globs of the server's operator.
        limit_bytes: Largest parameters and buffers together.

    Returns:
        Its builder; None if the operator does not allow it.
    """
    library, colon, model = name.partition(":")
    make = _MAKERS.get(library)
    if make is None or not colon or _NAME.fullmatch(model) is None:
        return None
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed):
        return None
    return functools.partial(_build, name, make, model, limit_bytes)


def _build(
    name: str,
    make: Callable[[str, str, Config], nn.Module],
    model: str,
    limit_bytes: int,
    config: Config,
) -> nn.Module:
    with bounded(limit_bytes):
        try:
            return make(name, model, config)
        except (CurvdError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # libraries dislike options in every way there is
            first_line = str(error).strip().partition("\n")[0]
            msg = f"{name} refuses its config: {type(error).__name__}: {first_line}"
            raise InvalidSpec(msg, builder=name) from error


def _timm(name: str, model: str, config: Config) -> nn.Module:
    timm = _imported("timm")
    if not timm.is_model(model):
        raise _unknown(name)
    options = _checked(name, config, _TIMM)
    module: nn.Module = timm.create_model(model, pretrained=False, **options)
    return module


def _torchvision(name: str, model: str, config: Config) -> nn.Module:
    models = _imported("torchvision").models
    if model not in models.list_models(module=models):
        raise _unknown(name)
    options = _checked(name, config, _TORCHVISION)
    if model in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # torchvision warns of its default
    module: nn.Module = models.get_model(model, weights=None, **options)
    return module


def _transformers(name: str, model: str, config: Config) -> nn.Module:
    library = _imported("transformers")
    kinds = library.models.auto.configuration_auto.CONFIG_MAPPING
    if model not in kinds:
        raise _unknown(name)
    options = dict(config)
    head, output = options.pop("head", "none"), options.pop("output", "")
    if not isinstance(head, str) or head not in _HEADS:
        msg = f"{name}: head must be one of {sorted(_HEADS)}, got {head!r}"
        raise InvalidSpec(msg, builder=name, key="head", value=head)
    if not isinstance(output, str):
        msg = f"{name}: output must be the name of a field, got {output!r}"
        raise InvalidSpec(msg, builder=name, key="output", value=output)
    shared = {f.name for f in dataclasses.fields(library.PreTrainedConfig)}
    known = {f.name for f in dataclasses.fields(kinds[model])} - shared
    foreign = re.compile("_.*|backbone|.*_path|.*_config")  # files, other models
    known = {n for n in known if foreign.fullmatch(n) is None} | {"num_labels"}
    options = _checked(name, options, known)
    if "use_cache" in known:
        options["use_cache"] = False  # a cache for generating costs, and gains nothing
    described = library.AutoConfig.for_model(model, **options)
    auto = getattr(library, _HEADS[head])
    module: nn.Module = auto.from_config(described, trust_remote_code=False)
    module.register_forward_hook(functools.partial(_one_output, name, output))
    return module


_MAKERS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


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


def _checked(name: str, config: Config, known: Set[str]) -> dict[str, Any]:
    """Let options through that shape an architecture, and values that are plain."""
    for key, value in config.items():
        if key not in known:
            msg = f"{name}: unknown key {key!r}; known keys: {', '.join(sorted(known))}"
            raise InvalidSpec(msg, builder=name, key=key)
        nested = key in _NESTED and isinstance(value, dict)
        if not (_is_mapping(value) if nested else _is_plain(value, depth=2)):
            msg = (
                f"{name}: {key} must be a number, at most {_LARGEST} if whole, true, "
                f"false, a word, or a list of these, got {str(value)[:80]!r}"
            )
            raise InvalidSpec(msg, builder=name, key=key)
    return {k: _tuples(v) for k, v in config.items()}


def _is_plain(value: object, *, depth: int, largest: float = _LARGEST) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= largest
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return (
        isinstance(value, list)
        and depth > 0
        and len(value) <= _MOST_ITEMS
        and all(_is_plain(v, depth=depth - 1, largest=largest) for v in value)
    )


def _is_mapping(value: dict[str, Any]) -> bool:
    """Tell whether these are a few frequencies and factors, of any size."""
    return (
        len(value) <= _MOST_ITEMS
        and all(map(_WORD.fullmatch, value))
        and all(_is_plain(v, depth=1, largest=2**53) for v in value.values())
    )


def _tuples(value: Any) -> Any:
    """Make tuples of lists: libraries use them as constants."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _unknown(name: str) -> InvalidSpec:
    library, _, model = name.partition(":")
    msg = f"{library} {_imported(library).__version__} has no model {model!r}"
    return InvalidSpec(msg, builder=name)


@functools.cache
def _imported(library: str) -> Any:
    """Import a library that the operator allowed, cut off from the network."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"
    os.environ["USE_HUB_KERNELS"] = "0"
    if library in ("timm", "torchvision"):
        _declare_operators()
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        msg = (
            f"this server cannot import {library} ({error}); its operator can install "
            f"curvd[{library}]"
        )
        raise FailedPrecondition(msg, library=library) from error
    if library == "transformers":
        module.logging.set_verbosity_error()
    return module


@functools.cache
def _declare_operators() -> Any:
    """Let torchvision be imported where its compiled operators cannot be loaded.

    The wheels of PyPI are compiled for CUDA and do not load beside a CPU build of torch.
    No model that classifies images calls these operators, but importing describes two
    of them, which therefore must exist by name.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    compiled = Path(spec.origin).with_name("_C.so")
    if not compiled.exists():
        return None
    try:
        torch.ops.load_library(compiled)  # type: ignore[no-untyped-call]
    except OSError:
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou) -> Tensor")
        return library
    return None
