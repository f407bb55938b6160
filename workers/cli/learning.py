"""From bars to bundles and forecasts: train, fine-tune, tune, clean, predict, evaluate, explain."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.cli.shared import (
    BARS_HELP,
    MODELS,
    console,
    progress_bar,
    read_bars,
    read_settings,
    user,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from models.bundle import Bundle
    from models.pipeline import Recipe
    from models.targets import Target


app = typer.Typer()


class TargetKind(StrEnum):
    volatility = "volatility"
    direction = "direction"
    returns = "return"


class Library(StrEnum):
    torch = "torch"
    sklearn = "sklearn"


TargetOption = Annotated[
    list[TargetKind], typer.Option(help="What to forecast; may be given several times.")
]

SeedOption = Annotated[int | None, typer.Option(help="The same gives the same weights.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Written after every epoch; a run that finds it goes on.")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="TOML or JSON with every option there is: the fields of models.pipeline.Recipe.",
    ),
]


class WeightingName(StrEnum):
    equal = "equal"
    shrunk = "shrunk"
    stacked = "stacked"
    bayesian = "bayesian"


@app.command(rich_help_panel=MODELS)
def train(
    bars: Annotated[str, typer.Option(help=BARS_HELP)],
    out: Annotated[Path, typer.Option(help="Directory that gets the bundle, named by its hash.")],
    target: TargetOption = [TargetKind.volatility],  # noqa: B006 (typer copies it)
    horizon: Annotated[int, typer.Option(min=1, help="How many bars ahead.")] = 30,
    classes: Annotated[
        int, typer.Option(min=2, max=3, help="Of a direction: 3 have a dead band between.")
    ] = 2,
    recipe: RecipeOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Bars that attention sees.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the LSTM.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, max=4)] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Any other choice; may be given several times: mode=window (sees the last --window "
            "bars, no carried state), cell=gru, attention=none|dot|additive, and in window mode "
            "self|cross, heads=1, lag_bias=alibi, layer_norm=true, bidirectional=true (window mode), "
            "dropout=0.2, slower=12 (bars in one of the slower time frame of cross).",
        ),
    ] = None,
    library: Annotated[
        Library, typer.Option(help="sklearn: a line for each target, where torch is absent.")
    ] = Library.torch,
    calendar: Annotated[
        str | None,
        typer.Option(help="Exchange of exchange_calendars, such as XNYS: its closes are breaks."),
    ] = None,
    seed: SeedOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: CheckpointOption = None,
    ensemble: Annotated[
        WeightingName | None,
        typer.Option(
            help="Beside the network boosted trees and a line; how the three are weighed."
        ),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for TensorBoard.")] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Bars larger than memory: their features lie here meanwhile."),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Make it the champion on models.lifecycle at once.")
    ] = False,
) -> None:
    """Train a bundle: network, scaler, reference and a calibrated monitor.

    gpt-trader-stream train --bars spy:2017 --out store/bundles
    gpt-trader-stream train --bars FILE.parquet --out DIR --horizon 12 --recipe FILE.toml
    gpt-trader-stream train --bars FILE.parquet --out DIR --network mode=window --network attention=self
    """
    from models.bundle import save
    from workers.bundles import store_bundle
    from workers.lifecycle import promote

    if ensemble and (scratch or checkpoint):
        raise typer.BadParameter("--ensemble goes with neither --scratch nor --checkpoint")
    targets = _targets(target, horizon, classes)
    if library is Library.sklearn:
        from models.tabular_training import TabularRecipe, fit_tabular

        _need("sklearn", "pip install 'gpt-trader-stream[ensemble]'")
        bundle = fit_tabular(read_bars(bars), targets, recipe=TabularRecipe(seed=seed or 0))
    else:
        _need("torch", "pip install torch, or take --library sklearn")
        if ensemble:
            _need("xgboost", "pip install 'gpt-trader-stream[ensemble]', or take no --ensemble")
        from contextlib import ExitStack, closing

        from models.pipeline import FitOptions, fit_bundle, fit_file
        from models.training import Watcher
        from models.watchers import ProgressBar, TensorBoard

        chosen = _recipe(
            recipe,
            network={
                "window": window, "hidden": hidden, "layers": layers, **_fields(network or [])
            },
            training={"epochs": epochs, "seed": seed},
            features={"calendar": calendar},
        )  # fmt: skip
        with ExitStack() as stack:
            watchers: list[Watcher] = [stack.enter_context(ProgressBar())]
            if tensorboard:
                watchers.append(stack.enter_context(closing(TensorBoard(tensorboard))))
            told: FitOptions = {"watchers": watchers, "checkpoint": checkpoint, "device": device}
            if ensemble:
                from models.ensemble import fit_ensemble

                frame = read_bars(bars)
                bundle = fit_ensemble(
                    frame, targets, weighting=ensemble.value, recipe=chosen, **told
                )
            elif scratch:
                bundle = fit_file(Path(bars), targets, scratch, recipe=chosen, **told)
            else:
                bundle = fit_bundle(read_bars(bars), targets, recipe=chosen, **told)
    typer.echo(save(bundle, out))
    _show_metrics(bundle)
    if publish:
        settings = read_settings()
        store_bundle(settings, bundle)
        promote(settings, bundle.version, "trained by hand", user(), at_once=True)


@app.command("fine-tune", rich_help_panel=MODELS)
def fine_tune(
    bundle: Annotated[
        Path, typer.Option(help="Directory of the bundle to go on from.", exists=True)
    ],
    bars: Annotated[str, typer.Option(help=BARS_HELP + " All of them are learnt from.")],
    out: Annotated[Path, typer.Option(help="Directory that gets the child, named by its hash.")],
    recipe: RecipeOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="A low one.")] = None,
    only_heads: Annotated[
        bool, typer.Option("--only-heads", help="Leave all but the head and the skip as it is.")
    ] = False,
    seed: SeedOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: CheckpointOption = None,
) -> None:
    """Let a bundle learn from recent bars by a few careful epochs; its scaler stays.

    gpt-trader-stream fine-tune --bundle store/bundles/VERSION --bars spy:2018-02 --out store/bundles
    """
    _need("torch", "pip install torch, or train anew with --library sklearn")
    from models import pipeline
    from models.bundle import load, save
    from models.watchers import ProgressBar

    training = {
        "epochs": epochs, "learning_rate": learning_rate, "only_heads": only_heads or None, "seed": seed
    }  # fmt: skip
    chosen = _recipe(recipe, pipeline.FINE_TUNING, training=training)
    with ProgressBar() as bar:
        child = pipeline.fine_tune(
            load(bundle),
            read_bars(bars),
            recipe=chosen,
            watchers=[bar],
            checkpoint=checkpoint,
            device=device,
        )
    typer.echo(save(child, out))
    _show_metrics(child)


@app.command(rich_help_panel=MODELS)
def tune(
    bars: Annotated[str, typer.Option(help=BARS_HELP)],
    out: Annotated[Path, typer.Option(help="Gets recipe.json, the study and its pictures.")],
    target: TargetOption = [TargetKind.volatility],  # noqa: B006 (typer copies it)
    horizon: Annotated[int, typer.Option(min=1, help="How many bars ahead.")] = 30,
    classes: Annotated[int, typer.Option(min=2, max=3, help="Of a direction.")] = 2,
    recipe: RecipeOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of a trial, at most.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="In all, those of earlier runs too.")] = 30,
) -> None:
    """Search for network and training options; a search that was cut goes on.

    gpt-trader-stream tune --bars spy:2017 --out tuning
    gpt-trader-stream train --bars spy:2017 --out store/bundles --recipe tuning/recipe.json
    """
    _need("torch", "pip install torch")
    from models.pipeline import search

    start = _recipe(recipe, training={"epochs": epochs})
    frame = read_bars(bars)
    with progress_bar() as progress:
        task = progress.add_task("features", total=len(frame))
        found = search(
            frame,
            _targets(target, horizon, classes),
            out / "search.db",
            recipe=start,
            trials=trials,
            advance=lambda n: progress.advance(task, n),
        )
    (out / "recipe.json").write_text(found.model_dump_json(indent=1))
    typer.echo(out / "recipe.json")


class FillMethod(StrEnum):
    forward = "forward"
    backward = "backward"
    linear = "linear"
    none = "none"


@app.command(rich_help_panel=MODELS)
def clean(
    bars: Annotated[str, typer.Option(help=BARS_HELP)],
    out: Annotated[Path, typer.Option(help="Parquet file to write.", dir_okay=False)],
    fill: Annotated[
        FillMethod, typer.Option(help="backward and linear look ahead: only for tables.")
    ] = FillMethod.forward,
    limit: Annotated[int, typer.Option(min=0, help="Longer holes stay holes (bars).")] = 12,
    calendar: Annotated[str | None, typer.Option(help="Such as XNYS; nights are no holes.")] = None,
) -> None:
    """Make absent bars of a table visible, and fill them.

    The columns absent and since_last_ms are added. A stream needs none of
    this: there the features fill forward as the bars come.
    """
    from models.missing import Filling, with_absent

    frame = read_bars(bars)
    spec = _recipe(None, features={"calendar": calendar}).spec_for(frame)
    whole = with_absent(frame, spec, Filling(method=fill.value, limit=limit))
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.to_parquet(out, index=False)
    console.print(f"{int(whole['absent'].sum()):,} absent bars beside {len(frame):,} in {out}")


@app.command(rich_help_panel=MODELS)
def predict(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.", exists=True)],
    bars: Annotated[str, typer.Option(help=BARS_HELP)],
    out: Annotated[Path, typer.Option(help="Parquet file to write.", dir_okay=False)],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    runtime: Annotated[
        str, typer.Option(help="auto, numba, torch, onnx, tensorflow or sklearn.")
    ] = "auto",
) -> None:
    """Forecast from bars that lie in a file, through the same engine as the stream.

    The table has one row for each bar and target: id, symbol, ts, horizon_ts, target, horizon,
    value, bundle, role. Bars on which a symbol was still warming up have none.
    """
    from models.bundle import load
    from workers.offline import predict as run

    opened, frame = load(bundle), read_bars(bars)
    with progress_bar() as progress:
        task = progress.add_task("bars", total=len(frame))
        said = run(opened, frame, device, runtime, advance=lambda n: progress.advance(task, n))
    out.parent.mkdir(parents=True, exist_ok=True)
    said.to_parquet(out, index=False)
    console.print(f"{len(said):,} predictions from {len(frame):,} bars in {out}")


@app.command(rich_help_panel=MODELS)
def evaluate(
    bars: Annotated[str, typer.Option(help=BARS_HELP)],
    target: Annotated[TargetKind, typer.Option(help="What to forecast.")] = TargetKind.volatility,
    horizon: Annotated[int, typer.Option(min=1, help="How many bars ahead.")] = 12,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page here.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Networks of each kind.")] = None,
    refits: Annotated[
        int | None, typer.Option(min=1, help="How often all models are fitted on the way.")
    ] = None,
    rolling: Annotated[
        bool,
        typer.Option(
            "--rolling", help="Later fits see no more history than the first, only newer."
        ),
    ] = False,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also: where the network's skill comes from.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Small networks: to see that it runs.")
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder for what each model said: a run that was cut goes on from it."),
    ] = None,
    timezone: Annotated[str, typer.Option(help="Of the exchange; auto finds it.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="For trees and networks; 0: all.")] = 0,
) -> None:
    """Hold the network against every rival on bars it has never seen, by walk-forward.

    gpt-trader-stream evaluate --bars FILE.parquet --target volatility --horizon 12
    --json out.json --report out.html
    """
    _need("torch", "pip install torch")
    _need("xgboost", "pip install 'gpt-trader-stream[ensemble]'")
    from models.evaluation import FAST, Protocol
    from models.targets import Target
    from workers.evaluate import run

    history = "rolling" if rolling else None
    changes = {"seeds": seeds, "refits": refits, "threads": threads, "history": history}
    protocol = (FAST if fast else Protocol()).model_copy(
        update={name: value for name, value in changes.items() if value is not None}
    )
    run(
        read_bars(bars),
        Target(kind=target.value, horizon=horizon),
        protocol,
        json_path=json,
        report_path=report,
        timezone=timezone,
        ablations=ablations,
        keep=keep,
        console=console,
    )


@app.command(rich_help_panel=MODELS)
def explain(
    bundle: Annotated[
        list[Path],
        typer.Option(
            help="Directory of the bundle; others given after it are held beside it as other seeds.",
            exists=True,
        ),
    ],
    bars: Annotated[str, typer.Option(help=BARS_HELP + " Best are bars it was not trained on.")],
    out: Annotated[Path, typer.Option(help="Gets report.html, the PNGs and explanation.json.")],
) -> None:
    """Show where the network looks, what that is called, and whether it matters.

    gpt-trader-stream explain --bundle store/bundles/VERSION --bars spy:2018-01 --out explained
    """
    _need("torch", "pip install torch")
    from models.bundle import load
    from workers.explain_report import run

    frame = read_bars(bars)
    with console.status("") as status:
        path = run([load(b) for b in bundle], frame, out, advance=lambda what: status.update(what))
    typer.echo(path)


def _need(library: str, remedy: str) -> None:
    from importlib.util import find_spec

    if find_spec(library) is None:
        raise typer.BadParameter(f"it needs {library}, which is not installed: {remedy}")


def _fields(pairs: list[str]) -> dict[str, str]:
    """FIELD=VALUE texts as a dictionary; what they mean is for the config that takes them."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} is not FIELD=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _show_metrics(bundle: "Bundle") -> None:
    for name, value in sorted(bundle.metrics.items()):
        console.print(f"{name:32} {value:.5g}", highlight=False)


def _recipe(
    path: Path | None, default: "Recipe | None" = None, **sections: "Mapping[str, object]"
) -> "Recipe":
    """The recipe of a file or the default one, with the options that were given put over it."""
    from models.pipeline import Recipe, read_recipe

    fields = (read_recipe(path) if path else default or Recipe()).model_dump()
    for name, options in sections.items():
        fields[name] |= {key: value for key, value in options.items() if value is not None}
    return Recipe.model_validate(fields)


def _targets(kinds: "Sequence[TargetKind]", horizon: int, classes: int) -> "list[Target]":
    from models.targets import Target

    return [
        Target.model_validate(
            {"kind": kind.value, "horizon": horizon}
            | ({"classes": classes} if kind is TargetKind.direction else {})
        )
        for kind in kinds
    ]
