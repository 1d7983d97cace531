"""What `dq quantize` works on: a pipeline or model, or a single file and the pipeline that it belongs to."""

from __future__ import annotations

from collections.abc import Callable

from dq import cookbook
from dq.errors import DQError
from dq.host import saved


def checked(model: str, pipeline: str | None) -> Callable:
    """-> what knows the recipes for it. DQError when there is nothing of the name, before torch is imported."""
    if not saved.is_file(model):
        if pipeline is not None:
            raise DQError(f"--pipeline goes with a single file ({', '.join(saved.ENDS)}), got {model!r}; leave it out")
        saved.find(model)
        return cookbook.get
    if pipeline is not None:
        saved.find(pipeline)
    return cookbook.for_file


def fitting(wanted, aim: str | None):
    """The recipe with what a target of `dq export` holds alone. DQError for a target that holds no plain recipe."""
    if aim is None:
        return wanted
    from dq import export
    from dq.plan import Recipe

    target = export.get(aim, "--for")
    if not hasattr(target, "restrict"):
        raise DQError(f"--for {aim} has recipes of its own: {target.RECIPE}")
    if not isinstance(wanted, Recipe):
        raise DQError(f"--for {aim} goes with a recipe, got {wanted.name!r}, in which every layer is decided")
    return target.restrict(wanted)


def opened(model: str, pipeline: str | None, dtype: str | None, rounded: tuple | None):
    """-> (pipeline or model, Report of what came quantized out of a single file, None where nothing did).

    rounded  (recipe, patterns kept, recipes of other components) for weights that are rounded as they are read
    """
    if not saved.is_file(model):
        return saved.load(model, dtype), None
    from dq.bridges import loading

    wanted, keep, parts = rounded or (None, None, {})
    target, part, report = loading.into_pipeline(model, wanted, pipeline, dtype or "float32", keep)
    if wanted is None:
        return target, None
    if parts:
        import dq

        others = dq.quantize(target, "int8", components={part: None, **parts})
        report.layers += others.layers
        report.bytes_before, report.bytes_after = (
            report.bytes_before + others.bytes_before,
            report.bytes_after + others.bytes_after,
        )
    return target, report
