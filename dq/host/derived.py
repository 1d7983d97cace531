"""What diffusers makes out of a denoiser's weights: other models, and fused projections. It copies tensors by name.

The tensors of a packed layer are codes and scales, and mean nothing in a full-precision layer. Copies that only miss
names fail without saying why; `strict=False` and `torch.cat` would take the codes for weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dq.errors import DQError
from dq.host import base
from dq.layers import packed_layers


def make(original: Callable, cls: type, *args, **kwargs) -> Any:
    """Run a class method that makes a model out of others; one that reads only a config works for quantized ones.

    Raises DQError as soon as it asks for the weights of a packed layer.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
    with contextlib.ExitStack() as stack:
        for model in given:
            stack.enter_context(_weights_refused(model, f"{cls.__name__}.{original.__name__}"))
        made = original(cls, *args, **kwargs)
    forget_others(made)
    return made


@contextlib.contextmanager
def _weights_refused(model: nn.Module, what: str) -> Iterator[None]:
    def refuse(*_):
        raise DQError(
            f"{what} copies weights, and {type(model).__name__} is quantized; make the new model from the "
            "full-precision one and quantize it, or call dq.dequantize first"
        )

    hooks = [layer.register_state_dict_pre_hook(refuse) for layer in packed_layers(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_others(model: Any) -> None:
    """Drop an entry of dq, which came with the config of another model, from that of one that is not quantized."""
    config = getattr(model, "_internal_dict", {}).get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method == "dq" and getattr(model, "hf_quantizer", None) is None:
        base.forget(model)


def refuse_fusing(model: nn.Module) -> None:
    """DQError when projections of a model are quantized, which cannot be laid side by side any more."""
    if (name := next(iter(packed_layers(model)), None)) is not None:
        raise DQError(
            f"fuse_qkv_projections: {type(model).__name__} is quantized (layer {name!r}); fuse first, then quantize"
        )


def refuse_strays(model: nn.Module) -> None:
    """DQError when a model that dq did not quantize holds packed layers: it would be saved without its plan."""
    if (name := next(iter(packed_layers(model)), None)) is not None:
        raise DQError(
            f"{type(model).__name__} shares layer {name!r} with a quantized model, and has no plan to be saved with; "
            "make it from the full-precision model, or call dq.dequantize first"
        )
