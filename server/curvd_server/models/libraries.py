"""Models of popular libraries by name: ``timm:…``, ``torchvision:…``, ``transformers:…``.

The server's operator allows names by globs. A client chooses one of them and sends JSON
options, which are checked against a list of those that shape an architecture: nothing
is downloaded, no file is opened, and no code comes from anywhere but the installed
library. Sizes are capped while a model is put together, first on the ``meta`` device.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvd.errors import CurvdError, FailedPrecondition, InvalidSpec, install
from curvd_server.models.options import Config, checked
from curvd_server.models.size_limit import bounded
from curvd_server.models.transformers import transformers_model

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")

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


def find(
    name: str, allowed: Sequence[str], *, limit_bytes: int
) -> Callable[[Config], nn.Module] | None:
    """Find a model of a library.

    Args:
        name: The name that a caller gave, not checked yet.
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
    options = checked(name, config, _TIMM)
    module: nn.Module = timm.create_model(model, pretrained=False, **options)
    return module


def _torchvision(name: str, model: str, config: Config) -> nn.Module:
    models = _imported("torchvision").models
    if model not in models.list_models(module=models):
        raise _unknown(name)
    options = checked(name, config, _TORCHVISION)
    if model in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # torchvision warns of its default
    module: nn.Module = models.get_model(model, weights=None, **options)
    return module


def _transformers(name: str, model: str, config: Config) -> nn.Module:
    library = _imported("transformers")
    if model not in library.models.auto.configuration_auto.CONFIG_MAPPING:
        raise _unknown(name)
    return transformers_model(library, name, model, config)


_MAKERS = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


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
    _declare_operators()  # all three import torchvision
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        msg = (
            f"this server cannot import {library} ({error}); its operator can install "
            f"it: {install(library)}"
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
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
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
