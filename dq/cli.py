"""The command line: `dq quantize | plan | inspect | generate | bench`.

Exit codes: 0 done, 2 wrong use (one line on stderr), 1 a fault of ours (a traceback).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.exceptions import TyperException

from dq import cookbook
from dq.disk import replaced
from dq.errors import DQError, nearest

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

app = typer.Typer(
    name="dq",
    help="Quantize diffusers pipelines: smaller, on integer kernels, nearly the same pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Dtype = Annotated[Optional[str], typer.Option(help="Compute dtype: bf16, fp16 or fp32.")]  # noqa: UP045
Policy = Annotated[Optional[str], typer.Option(help="Which: [stratified], uniform, all, normal, clustered.")]  # noqa: UP045
BudgetGib = Annotated[Optional[float], typer.Option(help="Most GiB of the denoiser; formats are mixed.")]  # noqa: UP045
BudgetBits = Annotated[Optional[float], typer.Option(help="Most bits per weight, on average.")]  # noqa: UP045
BudgetMs = Annotated[Optional[float], typer.Option(help="Most milliseconds per step, by measured layers.")]  # noqa: UP045
Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is one.")]  # noqa: UP045


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(prog_name="dq", standalone_mode=False)
    except DQError as error:
        _fail(str(error))
    except TyperException as error:
        _fail(f"{error.format_message()} (`{_usage(error)} --help` lists what it takes)")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "dq"


def _fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print("dq: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or tiny-pixart / tiny-sd in a clone.")],
    out: Annotated[Path, typer.Option(help="Folder to save to; must be new or empty.")],
    recipe: Annotated[Optional[str], typer.Option(help="A recipe name, or a recipe JSON.")] = None,  # noqa: UP045
    plan: Annotated[Optional[Path], typer.Option(help="A plan JSON, in place of a recipe.")] = None,  # noqa: UP045
    prompts: Annotated[Optional[Path], typer.Option(help="Calibration prompts, one a line.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Denoising steps of a calibration run [20].")] = None,  # noqa: UP045
    samples: Annotated[Optional[int], typer.Option(min=1, help="Denoiser inputs to record [64].")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed of the calibration runs [0].")] = None,  # noqa: UP045
    policy: Policy = None,
    extra: Annotated[list[str], typer.Option("--set", help="Calibration call argument: name=JSON, may repeat.")] = [],  # noqa: B006
    work: Annotated[Optional[Path], typer.Option(help="Folder to calibrate in; a killed run goes on there.")] = None,  # noqa: UP045
    budget_gib: BudgetGib = None,
    budget_bits: BudgetBits = None,
    budget_ms: BudgetMs = None,
    dtype: Dtype = "bf16",
    keep: Annotated[list[str], typer.Option(help="Layers left as they are: a pattern, may repeat.")] = [],  # noqa: B006
    component: Annotated[list[str], typer.Option(help="A further part: name=recipe, may repeat.")] = [],  # noqa: B006
    force: Annotated[bool, typer.Option(help="Replace a model that stands in --out.")] = False,
) -> None:
    """Quantize a pipeline or a denoiser and save it; diffusers' from_pretrained loads the result."""
    from dq.host import saved

    if (recipe is None) == (plan is None):
        raise DQError(f"got {'no recipe' if plan is None else 'two'}, expected either --recipe NAME or --plan FILE")
    wanted, budget = cookbook.get(recipe or plan), _budget(budget_gib, budget_bits, budget_ms)
    asked = {"prompts": prompts, "steps": steps, "samples": samples, "seed": seed, "policy": policy, "work": work}
    asked = {name: value for name, value in asked.items() if value is not None}
    fitted = wanted.needs_calibration or budget is not None
    if not fitted and (asked or extra):
        option = next(iter(asked), "set")
        raise DQError(f"recipe {recipe or str(plan)!r} is data-free and runs nothing; leave --{option} out")
    parts = dict(_pair(text, "--component", "text_encoder=int8-weight") for text in component)
    with replacing(out, force) as place:
        target = saved.load(model, _dtype(dtype))
        import dq

        given = None
        if fitted:
            call = _plain_size(target) | _arguments(extra)
            given = dq.Calibration(call_kwargs=call, folder=asked.pop("work", None), **asked)
        report = dq.quantize(target, wanted, calibration=given, budget=budget, components=parts, keep=keep)
        dq.save(target, place)
    print(report)
    print(f"saved to {out}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or tiny-pixart / tiny-sd in a clone.")],
    recipe: Annotated[
        str, typer.Option(help="Names the choices: int8-weight, int8, svdquant-int4, ...")
    ] = "int8-weight",
    budget_gib: BudgetGib = None,
    budget_bits: BudgetBits = None,
    budget_ms: BudgetMs = None,
    out: Annotated[Optional[Path], typer.Option(help="Plan JSON to write; needs a budget.")] = None,  # noqa: UP045
    curve: Annotated[Optional[Path], typer.Option(help="PNG of quality against size and time.")] = None,  # noqa: UP045
    page: Annotated[Optional[Path], typer.Option(help="HTML of what every layer got and why; needs a budget.")] = None,  # noqa: UP045
    metric: Annotated[str, typer.Option(help="trajectory, prediction, output or sampled.")] = "trajectory",
    timed: Annotated[bool, typer.Option("--timed", help="Measure milliseconds of the layers too.")] = False,
    prompts: Annotated[Optional[Path], typer.Option(help="Calibration prompts, one a line.")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a calibration run.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Denoiser inputs to record.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the calibration runs.")] = 0,
    extra: Annotated[list[str], typer.Option("--set", help="Calibration call argument: name=JSON, may repeat.")] = [],  # noqa: B006
    work: Annotated[Optional[Path], typer.Option(help="Folder to measure in; kept, so that it is done once.")] = None,  # noqa: UP045
    dtype: Dtype = "bf16",
) -> None:
    """Measure what every layer's format costs and harms once, then choose under budgets and draw the trade-off."""
    import dq
    from dq import api
    from dq.budget import charts, search, sensing
    from dq.host import saved

    budget = _budget(budget_gib, budget_bits, budget_ms, metric)
    if budget is None and (out or page):
        raise DQError("--out and --page show a chosen plan; give --budget-gib, --budget-bits or --budget-ms")
    target = saved.load(model, _dtype(dtype))
    call = _plain_size(target) | _arguments(extra)
    given = dq.Calibration(prompts, steps, samples, seed, call_kwargs=call, folder=work)
    found, plans = api.explore(target, recipe, given, wish=sensing.Wish(metric, timed or budget_ms is not None))
    chosen = None
    if budget is not None:
        chosen = found.choose(budget)
        notes = search.summary(found, chosen, budget)
        print("\n".join(notes))
        _write_plans(search.plans(found, plans, chosen, str(budget)), out)
        if page is not None:
            page.write_text(charts.page(found, chosen, notes), encoding="utf-8")
    for text, each in charts.uniform(found).items():
        print(f"all {text}: {found.bytes_of(each) / 2**20:.2f} MiB, {found.sqnr_db(each):.1f} dB predicted")
    if curve is not None:
        charts.curve(found, curve, chosen)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A saved quantized pipeline or model.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
    device: Device = None,
) -> None:
    """Show what each layer of a saved model is and which kernel serves it, without reading the weights."""
    from dq.host import saved

    report = saved.report(folder, _device(device))
    print(report.to_json() if as_json else report)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="A pipeline: a folder, a Hub id or an embedded name.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Picture to write, for example out.png.")],
    negative_prompt: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[Optional[float], typer.Option(help="Guidance scale.")] = None,  # noqa: UP045
    height: Annotated[Optional[int], typer.Option(min=8, help="Pixels.")] = None,  # noqa: UP045
    width: Annotated[Optional[int], typer.Option(min=8, help="Pixels.")] = None,  # noqa: UP045
    extra: Annotated[list[str], typer.Option("--set", help="Further call argument: name=JSON, may repeat.")] = [],  # noqa: B006
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Draw one picture with a saved pipeline, quantized or not."""
    from dq.host import saved

    _check_picture(out)
    pipe = saved.load(folder, _dtype(dtype)).to(_device(device))
    given = {"negative_prompt": negative_prompt, "guidance_scale": guidance, "height": height, "width": width}
    call = {"num_inference_steps": steps} | {key: value for key, value in given.items() if value is not None}
    call |= _arguments(extra)
    _draw(pipe, prompt, seed, call).save(out)
    print(f"wrote {out}")


@app.command()
def bench(
    folder: Annotated[Optional[str], typer.Argument(help="A saved quantized pipeline.")] = None,  # noqa: UP045
    recipe: Annotated[str, typer.Option(help="Whose formats the bare layers get.")] = "int8",
    dtype: Annotated[str, typer.Option(help="Full precision compared with: bf16, fp16, fp32.")] = "bf16",
    seconds: Annotated[float, typer.Option(help="Time spent on each row.")] = 1.0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="dq, torchao and SDNQ on models of random weights.")] = False,
    model: Annotated[list[str], typer.Option(help="With --peers: linears, pixart, flux, unet; may repeat.")] = [],  # noqa: B006
    contender: Annotated[list[str], typer.Option(help="With --peers: only this one; may repeat.")] = [],  # noqa: B006
    without: Annotated[list[str], typer.Option(help="With --peers: not this one; may repeat.")] = [],  # noqa: B006
    peers_folder: Annotated[str, typer.Option(help="Where pip --target put the peers.")] = "",
    threads: Annotated[Optional[int], typer.Option(min=1, help="With --peers: of each process.")] = None,  # noqa: UP045
) -> None:
    """Time quantized layers, or a saved pipeline's denoisers, next to full precision: in turn, medians."""
    import torch

    from dq.bench import layers as timing
    from dq.bench import roofline
    from dq.host import saved

    if peers:
        _bench_peers(model, contender, without, peers_folder, threads or torch.get_num_threads(), seconds, as_json)
        return
    if folder is None:
        rows = timing.linears(recipe, _device(device), getattr(torch, _dtype(dtype)), seconds)
    else:
        pipe = saved.load(folder).to(_device(device))
        found = saved.plans(saved.find(folder)) if isinstance(saved.find(folder), Path) else {}
        names = [name for name in found if name and not hasattr(getattr(pipe, name), "generate")]
        if not names:
            raise DQError(f"{folder!r} is no quantized pipeline; {saved.MAKE_ONE}")
        rows = [timing.denoiser(pipe, name, seconds=seconds, **_plain_size(pipe)) for name in names]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    _print_timings(rows)
    lines = [line for row in rows for line in row.lines]
    peaks = roofline.measure(_device(device), (line.work.unit for line in lines)).raised(lines)
    _print_lines([(f"{row.what}: {line.kernel}", line) for row in rows for line in row.lines], peaks)


def _bench_peers(models, entered, without, folder: str, threads: int, seconds: float, as_json: bool) -> None:
    from dq.bench import race

    chosen, names = race.contenders(entered, without), race.models(models or race.MODELS)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    setting = race.Setting(seconds, threads=threads, folder=folder, say=say)
    for found in race.race([(name, chosen) for name in names], setting):
        if as_json:
            print(json.dumps({"model": found.model, "results": [asdict(row) for row in found.results]}), flush=True)
        else:
            _print_race(found)


def _print_timings(rows: list) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "device", f"{rows[0].dtype} ms", "quantized ms", "times as fast", "kernel")
    for row in rows:
        ratio = f"{row.speedup:.2f}"
        table.add_row(row.what, row.device, f"{row.full_ms:.2f}", f"{row.quantized_ms:.2f}", ratio, row.kernel)
    Console().print(table)


def _print_lines(named: list, peaks) -> None:
    """A roofline line per kernel, and the peaks they are shares of."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "calls", "ms", "MB", "G operations", "on", "share of the peak", title="Roofline")
    for name, line in named:
        work, share = line.work, f"{100 * peaks.share(line):.0f} %"
        sizes = (f"{line.ms:.2f}", f"{work.moved_bytes / 1e6:.1f}", f"{work.operations / 1e9:.2f}")
        table.add_row(name, str(line.calls), *sizes, work.unit, share)
    Console().print(table)
    print(peaks)


def _print_race(found) -> None:
    """One model's contenders, those that were left out with the reason, and dq's kernels."""
    from rich.console import Console
    from rich.table import Table

    from dq.bench import widths

    table = Table("", "ms", "times bf16", "dB to bf16", "kernel", title=widths.shown(found.model))
    for row in found.results:
        decibels = "" if row.error_db is None else f"{row.error_db:.1f}"
        figures = ("", "", "", row.skipped) if row.skipped else None
        table.add_row(row.contender, *(figures or (f"{row.ms:.2f}", f"{row.times_base:.2f}", decibels, row.kernel)))
    Console().print(table)
    if found.peaks is not None:
        _print_lines([(line.kernel, line) for line in found.lines], found.peaks)


@contextlib.contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block succeeds; DQError before it when it may not."""
    if out.exists() and not out.is_dir():
        raise DQError(f"--out {str(out)!r} is a file, expected a folder that is new or empty")
    full = out.is_dir() and any(out.iterdir())
    if full and not force:
        raise DQError(f"--out {str(out)!r} is not empty; give a new folder, or --force to replace the model in it")
    if full and not any((out / name).is_file() for name in ("model_index.json", "config.json")):
        raise DQError(f"--out {str(out)!r} holds something other than a model; --force replaces saved models only")
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(replaced(out))
        except OSError as error:
            raise DQError(f"--out {str(out)!r} cannot be written: {error.strerror}; choose another place") from error
        yield place


def _draw(pipe, prompt: str, seed: int, call: dict):
    """The picture of one prompt. DQError for a lone denoiser, unknown arguments and pipelines that draw no picture."""
    import inspect

    import torch

    if not hasattr(pipe, "components"):
        raise DQError(f"{type(pipe).__name__} is a denoiser alone, expected a pipeline; load it into one in Python")
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name not in known:
            raise DQError(f"{type(pipe).__name__} takes no argument {name!r}, {nearest(name, known)}")
    call = _plain_size(pipe) | call | {"generator": torch.Generator().manual_seed(seed)}
    try:
        output = pipe(prompt=prompt, **call)
    except (TypeError, ValueError) as error:
        raise DQError(f"{type(pipe).__name__}: {error}") from error
    if not getattr(output, "images", None):
        raise DQError(f"{type(pipe).__name__} returned no picture; use it from Python")
    return output.images[0]


def _plain_size(pipe) -> dict:
    """PixArt's pipelines round sizes to a table of large ones unless told not to."""
    import inspect

    binning = "use_resolution_binning"
    return {binning: False} if binning in inspect.signature(type(pipe).__call__).parameters else {}


def _check_picture(out: Path) -> None:
    from PIL import Image

    known = Image.registered_extensions()
    if out.suffix.lower() not in known:
        raise DQError(f"--out {str(out)!r} has no picture's ending, expected for example .png or .jpg")
    out.parent.mkdir(parents=True, exist_ok=True)


def _budget(gib: float | None, bits: float | None, ms: float | None, metric: str = "trajectory"):
    """The Budget of the options, None without any. DQError for figures that are none."""
    if gib is None and bits is None and ms is None:
        return None
    import dq

    most = None if gib is None else int(gib * 2**30)
    return dq.Budget(bytes=most, ms_per_step=ms, bits=bits, metric=metric)


def _write_plans(plans: dict, out: Path | None) -> None:
    """One file, or one per denoiser with its name."""
    for part, each in plans.items() if out is not None else ():
        path = out if len(plans) == 1 else out.with_stem(f"{out.stem}-{part}")
        each.save(path)
        print(f"wrote {path}")


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise DQError(f"{option}: got {text!r}, expected name=value, for example {option} {example}")
    return name, value


def _arguments(texts: list[str]) -> dict:
    """Call arguments given as name=JSON."""
    return {key: _value(value) for key, value in (_pair(text, "--set", "eta=0.5") for text in texts)}


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dtype(text: str | None) -> str | None:
    if text is None:
        return None
    if text not in DTYPES and text not in DTYPES.values():
        raise DQError(f"--dtype {text!r} is unknown, {nearest(text, DTYPES)}")
    return DTYPES.get(text, text)


def _device(text: str | None) -> str:
    import torch

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise DQError(f"--device {text!r} is not available here, expected cpu or cuda") from None
    return text


if __name__ == "__main__":
    main()
