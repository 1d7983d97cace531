"""The commands. Each says what is wrong with its options before it imports torch, and that before it loads a model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from dq.cli import drawing, options, sources
from dq.cli.options import MODEL, OUTPUT, PEERS, PICTURE
from dq.errors import DQError
from dq.host import saved
from dq.plan import compute_dtype
from dq.trace.calibration import Calibration

app = typer.Typer(
    name="dq",
    help="Quantize diffusers pipelines: smaller, on integer kernels, nearly the same pictures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def quantize(
    model: options.Source,
    *,
    recipe: Annotated[str | None, Option(help="A recipe name, or a recipe JSON.", **MODEL)] = None,
    plan: Annotated[Path | None, Option(help="A plan JSON, in place of a recipe.", **MODEL)] = None,
    pipeline: options.Pipeline = None,
    aim: options.For = None,
    dtype: options.Dtype = "bf16",
    keep: options.Keep = [],  # noqa: B006
    component: options.Component = [],  # noqa: B006
    prompts: options.Prompts = None,
    steps: options.Steps = None,
    samples: options.Samples = None,
    seed: options.Seed = None,
    policy: options.Policy = None,
    extra: options.CallArguments = [],  # noqa: B006
    work: options.Work = None,
    budget_gib: options.BudgetGib = None,
    budget_bits: options.BudgetBits = None,
    budget_ms: options.BudgetMs = None,
    tune_minutes: options.TuneMinutes = None,
    out: Annotated[Path, Option(help="Folder to save to; must be new or empty.", **OUTPUT)],
    force: Annotated[bool, Option(help="Replace a model that stands in --out.", **OUTPUT)] = False,
) -> None:
    """Quantize a pipeline or a denoiser and save it; diffusers' from_pretrained loads the result."""
    if (recipe is None) == (plan is None):
        raise DQError(f"got {'no recipe' if plan is None else 'two'}, expected either --recipe NAME or --plan FILE")
    budget, tune = options.budget_of(budget_gib, budget_bits, budget_ms), options.tune_of(tune_minutes)
    asked = {"prompts": prompts, "steps": steps, "samples": samples, "seed": seed, "policy": policy, "folder": work}
    asked = {name: value for name, value in asked.items() if value is not None}
    parts, call, kind = options.components(component), options.arguments(extra), options.dtype_of(dtype)
    known = sources.checked(model, pipeline)
    options.check_place(out, force)
    wanted = sources.fitting(known(recipe or str(plan)), aim)
    fitted = wanted.needs_calibration or budget is not None or tune is not None
    if not fitted and (asked or extra):
        raise options.needless(recipe or str(plan), asked)
    given = Calibration(**asked) if fitted else None
    with options.replacing(out, force) as place:
        target, report = sources.opened(model, pipeline, kind, None if fitted else (wanted, keep, parts))
        import dq

        given = given and replace(given, call_kwargs=drawing.plain_size(target) | call)
        if report is None:
            asked = {"calibration": given, "budget": budget, "tune": tune}
            report = dq.quantize(target, wanted, components=parts, keep=keep, **asked)
        dq.save(target, place)
    print(report)
    print(f"saved to {out}")


@app.command()
def plan(
    model: options.Source,
    *,
    recipe: Annotated[str, Option(help="Names the choices, as --recipe of quantize.", **MODEL)] = "int8-weight",
    dtype: options.Dtype = "bf16",
    prompts: options.Prompts = None,
    steps: options.Steps = 20,
    samples: options.Samples = 40,
    seed: options.Seed = 0,
    extra: options.CallArguments = [],  # noqa: B006
    work: options.Work = None,
    budget_gib: options.BudgetGib = None,
    budget_bits: options.BudgetBits = None,
    budget_ms: options.BudgetMs = None,
    metric: options.Metric = "trajectory",
    timed: Annotated[
        bool, Option("--timed", help="Measure milliseconds of the layers too.", **options.BUDGET)
    ] = False,
    out: Annotated[Path | None, Option(help="Plan JSON to write; needs a budget.", **OUTPUT)] = None,
    curve: Annotated[Path | None, Option(help="PNG of quality against size and time.", **OUTPUT)] = None,
    page: Annotated[Path | None, Option(help="HTML of what each layer got and why; needs a budget.", **OUTPUT)] = None,
) -> None:
    """Measure what every layer's format costs and harms once, then choose under budgets and draw the trade-off."""
    budget = options.budget_of(budget_gib, budget_bits, budget_ms, metric)
    if budget is None and (out or page):
        raise DQError("--out and --page show a chosen plan; give --budget-gib, --budget-bits or --budget-ms")
    given = Calibration(prompts, steps, samples, seed, folder=work)
    kind, call = options.dtype_of(dtype), options.arguments(extra)
    target = saved.load(model, kind)
    from dq import api
    from dq.budget import charts, search, sensing

    given = replace(given, call_kwargs=drawing.plain_size(target) | call)
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


def _write_plans(plans: dict, out: Path | None) -> None:
    """One file, or one per denoiser with its name."""
    for part, each in plans.items() if out is not None else ():
        path = out if len(plans) == 1 else out.with_stem(f"{out.stem}-{part}")
        each.save(path)
        print(f"wrote {path}")


@app.command()
def inspect(
    folder: Annotated[Path, Argument(help="A saved quantized pipeline or model.")],
    as_json: Annotated[bool, Option("--json", help="The whole report as JSON.")] = False,
    device: Annotated[str | None, Option(help="cpu or cuda: name the kernels that would serve each layer.")] = None,
) -> None:
    """Show what each layer of a saved model is, without reading the weights; with --device, which kernel serves it."""
    report = saved.report(folder, None if device is None else options.device_of(device))
    print(report.to_json() if as_json else report)
    if device is None and not as_json:
        print("kernels: add --device cpu or --device cuda")


@app.command()
def export(
    folder: Annotated[Path, Argument(help="A saved quantized pipeline or denoiser.")],
    *,
    to: Annotated[str, Option(help="Who reads it: gguf, comfyui, nunchaku-lite, diffusers-bf16.", **OUTPUT)],
    out: Annotated[Path, Option(help="Folder to write; must be new or empty.", **OUTPUT)],
    force: Annotated[bool, Option(help="Replace a model that stands in --out.", **OUTPUT)] = False,
) -> None:
    """Write a saved quantized model as another library reads it."""
    options.check_place(out, force)
    source = saved.find(str(folder))
    from dq import export as targets

    target = targets.get(to)
    if not isinstance(source, Path):
        raise DQError(f"{str(folder)!r} is a Hub id, expected a folder that dq saved")
    with options.replacing(out, force) as place:
        notes = target.write(source, place)
    print("\n".join([*(notes or ()), f"exported to {out}"]))


@app.command()
def generate(
    folder: Annotated[str, Argument(help="A pipeline: a folder, a Hub id or an embedded name.")],
    *,
    prompt: Annotated[str, Option(help="What to draw.", **PICTURE)],
    negative_prompt: Annotated[str | None, Option(help="What not to draw.", **PICTURE)] = None,
    seed: Annotated[int, Option(help="Same seed, same picture.", **PICTURE)] = 0,
    steps: Annotated[int, Option(min=1, help="Denoising steps.", **PICTURE)] = 20,
    guidance: Annotated[float | None, Option(help="Guidance scale.", **PICTURE)] = None,
    height: Annotated[int | None, Option(min=8, help="Pixels.", **PICTURE)] = None,
    width: Annotated[int | None, Option(min=8, help="Pixels.", **PICTURE)] = None,
    extra: Annotated[list[str], Option("--set", help="Further call argument: name=JSON, may repeat.", **PICTURE)] = [],  # noqa: B006
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: Annotated[Path, Option(help="Picture to write, for example out.png.", **OUTPUT)],
) -> None:
    """Draw one picture with a saved pipeline, quantized or not."""
    drawing.check_picture(out)
    given = {"negative_prompt": negative_prompt, "guidance_scale": guidance, "height": height, "width": width}
    call = {"num_inference_steps": steps} | {key: value for key, value in given.items() if value is not None}
    call |= options.arguments(extra)
    kind = options.dtype_of(dtype)
    saved.find(folder)
    place = options.device_of(device)
    pipe = saved.load(folder, kind).to(place)
    drawing.draw(pipe, prompt, seed, call).save(out)
    print(f"wrote {out}")


@app.command()
def bench(
    folder: Annotated[str | None, Argument(help="A saved quantized pipeline.")] = None,
    recipe: Annotated[str, Option(help="Whose formats the bare layers get.", **MODEL)] = "int8",
    dtype: options.BenchDtype = None,
    device: options.Device = None,
    seconds: Annotated[float, Option(help="Time spent on each row.", **OUTPUT)] = 1.0,
    as_json: Annotated[bool, Option("--json", help="Rows as JSON.", **OUTPUT)] = False,
    peers: Annotated[
        bool, Option("--peers", help="dq, torchao, SDNQ and OpenVINO on models of random weights.", **PEERS)
    ] = False,
    model: Annotated[list[str], Option(help="Only these: linears, pixart, flux, unet; may repeat.", **PEERS)] = [],  # noqa: B006
    contender: Annotated[list[str], Option(help="Only this one; may repeat.", **PEERS)] = [],  # noqa: B006
    without: Annotated[list[str], Option(help="Not this one; may repeat.", **PEERS)] = [],  # noqa: B006
    peers_folder: Annotated[str, Option(help="Where pip --target put the peers.", **PEERS)] = "",
    threads: Annotated[int | None, Option(min=1, help="Of each process.", **PEERS)] = None,
    level: options.Level = "",
) -> None:
    """Time quantized layers, or a saved pipeline's denoisers, next to full precision: in turn, medians."""
    kind = options.dtype_of(dtype)
    import torch

    from dq.bench import layers as timing
    from dq.bench import levels, roofline
    from dq.cli import tables

    levels.environment(level)
    if peers:
        base = options.short_of(kind or levels.base(level))
        setting = {"seconds": seconds, "threads": threads or torch.get_num_threads(), "folder": peers_folder}
        _race(model, contender, without, setting | {"dtype": base, "level": level}, as_json)
        return
    if level:
        raise DQError(
            "--level goes with --peers: it is set before torch is imported, see DQ_CPU_LEVEL for this process"
        )
    place = options.device_of(device)
    kind = kind or options.DTYPES["bf16" if place == "cuda" else levels.base()]
    if folder is None:
        rows = timing.linears(recipe, place, compute_dtype(kind), seconds)
    else:
        rows = _denoisers(folder, place, seconds)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    tables.timings(rows)
    lines = [line for row in rows for line in row.lines]
    peaks = roofline.measure(place, (line.work.unit for line in lines)).raised(lines)
    tables.roofline([(f"{row.what}: {line.kernel}", line) for row in rows for line in row.lines], peaks)


def _denoisers(folder: str, device: str, seconds: float) -> list:
    """A timing of each quantized denoiser of a saved pipeline."""
    from dq.bench import layers as timing

    pipe = saved.load(folder).to(device)
    found = saved.plans(saved.find(folder)) if isinstance(saved.find(folder), Path) else {}
    names = [name for name in found if name and not hasattr(getattr(pipe, name), "generate")]
    if not names:
        raise DQError(f"{folder!r} is no quantized pipeline; {saved.MAKE_ONE}")
    return [timing.denoiser(pipe, name, seconds=seconds, **drawing.plain_size(pipe)) for name in names]


def _race(models, entered, without, given: dict, as_json: bool) -> None:
    """dq beside its peers, a table or a line of JSON a model."""
    from dq.bench import race, widths
    from dq.cli import tables

    chosen, names = race.contenders(entered, without), race.models(models or race.MODELS)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    setting = race.Setting(say=say, **given)
    for found in race.race([(name, chosen) for name in names], setting):
        if as_json:
            print(json.dumps({"model": found.model, "results": [asdict(row) for row in found.results]}), flush=True)
        else:
            tables.race(found, widths.shown(found.model))
