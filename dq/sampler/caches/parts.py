"""Where caches go: transformer blocks and what goes through them, attention and feed-forward modules inside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

PARTS = (*_ATTENTION_CLASSES, *_FEEDFORWARD_CLASSES)


def lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Transformer blocks by the name of their list, as diffusers' hooks find them."""
    found = {name: part for name, part in model.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS}
    return {name: list(part) for name, part in found.items() if isinstance(part, nn.ModuleList) and len(part)}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Transformer blocks of all lists by dotted name."""
    return {f"{name}.{index}": block for name, found in lists(model).items() for index, block in enumerate(found)}


def strange(model: nn.Module) -> str | None:
    """Why what goes through the blocks of a model cannot be told, in one line; None where it can."""
    found = blocks(model)
    if not found:
        return f"{type(model).__name__} has no list of transformer blocks"
    other = next((type(block).__name__ for block in found.values() if not known(block)), None)
    return f"diffusers' hooks do not know blocks of class {other}" if other else None


class Ends:
    """What goes through a block: hidden states, and the text's where the block gives them on, in this order."""

    def __init__(self, block: nn.Module):
        found = TransformerBlockRegistry.get(type(block))
        self.metadata = found
        self.places = [found.return_hidden_states_index, found.return_encoder_hidden_states_index]
        names = (found.hidden_states_argument_name, found.encoder_hidden_states_argument_name)
        self.names = [name for name, place in zip(names, self.places, strict=True) if place is not None]
        self.places = [place for place in self.places if place is not None]

    def before(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
        """The streams as they come in."""
        return tuple(self.metadata._get_parameter_from_args_kwargs(name, args, kwargs) for name in self.names)

    def after(self, output: Any) -> tuple[torch.Tensor, ...]:
        """The streams in what the block gave."""
        return tuple(output[place] for place in self.places) if isinstance(output, tuple) else (output,)

    def given(self, streams: tuple[torch.Tensor, ...] | None, like: Any) -> Any:
        """What the block gives with these streams, like what it gave; with none in their places, to hold no tensor."""
        if not isinstance(like, tuple):
            return None if streams is None else streams[0]
        made = list(like)
        for place, stream in zip(self.places, streams or (None,) * len(self.places), strict=True):
            made[place] = stream
        return tuple(made)


def read(values: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """Numbers of several tensors, of those there are, in one transfer."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return {}
    home = next(iter(known.values())).device
    return dict(zip(known, torch.stack([value.to(home) for value in known.values()]).tolist(), strict=True))


def known(block: nn.Module) -> bool:
    """Whether diffusers knows which output of a block is which."""
    try:
        TransformerBlockRegistry.get(type(block))
    except ValueError:
        return False
    return True


def inner(model: nn.Module) -> dict[str, nn.Module]:
    """Attention and feed-forward modules by name, none within another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, PARTS)
            and isinstance(module, nn.Module)
            and not any(name.startswith(f"{other}.") for other in found)
        ):
            found[name] = module
    return found
