"""Where caches go: lists of transformer blocks, and the attention and feed-forward modules inside of blocks."""

from __future__ import annotations

from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

PARTS = (*_ATTENTION_CLASSES, *_FEEDFORWARD_CLASSES)


def lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Transformer blocks by the name of their list, as diffusers' hooks find them."""
    found = {name: part for name, part in model.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS}
    return {name: list(part) for name, part in found.items() if isinstance(part, nn.ModuleList) and len(part)}


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
