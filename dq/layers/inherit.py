"""What a layer takes over from the one whose place it takes: hooks, attributes and children that are not its weight's.

Users and libraries leave things on single layers (hooks that scale or record, flags, a gate beside the weight). They
are moved as they are: the new layer shares the dicts of hooks, so that a handle removes a hook from whichever stands.
"""

from __future__ import annotations

from torch import nn

CALL_HOOKS = tuple(name for name in vars(nn.Module()) if "forward" in name or "backward" in name)
TABLES = ("_parameters", "_buffers", "_modules")
# of mechanisms that look after their own: forwards in place of a class's, accelerate, diffusers, dq, torch.compile
FOREIGN = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_dq", "_compiled_call_impl")


def hooks(new: nn.Module, old: nn.Module) -> None:
    """Share the hooks around the calls of `old`."""
    for name in CALL_HOOKS:
        vars(new)[name] = vars(old)[name]


def take_over(new: nn.Module, old: nn.Module, plain: nn.Module) -> None:
    """Give `new` what was put on `old` after that one was made. `plain` is a layer as `old` was when it was made."""
    hooks(new, old)
    for name, value in vars(old).items():
        if name not in vars(plain) and name not in FOREIGN and name not in new._parameters:
            vars(new)[name] = value
    for table in TABLES:
        for name, value in vars(old)[table].items():
            if name not in vars(plain)[table]:
                vars(new)[table][name] = value
