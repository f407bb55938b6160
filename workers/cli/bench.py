"""The group `bench`: each command measures on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from workers.cli.shared import BARS_HELP, Delivery, JsonOption, console, show, told

app = typer.Typer(
    no_args_is_help=True,
    help="Measure on this machine. Every benchmark starts what it needs, Kafka too.",
)

Symbols = Annotated[int, typer.Option(min=1, help="All of them warm from the start.")]

Window = Annotated[int, typer.Option(min=1, help="Bars that attention sees.")]


@app.command("inference")
def bench_inference(
    symbols: Annotated[int, typer.Option(min=1)] = 500,
    bars_per_symbol: Annotated[
        int, typer.Option(min=10, help="Measured ones, after the warm-up.")
    ] = 400,
    delivery: Annotated[str, typer.Option(help="Some of them, with commas, or all.")] = (
        "exactly_once"
    ),
    runtime: Annotated[str, typer.Option(help="Some of them, with commas, or all.")] = "auto",
    window: Annotated[str, typer.Option(help="Bars that attention sees; several: 30,78.")] = "30",
    attention_every: Annotated[
        int, typer.Option(min=0, help="A summary for every n-th bar of a symbol; 0: none.")
    ] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the products in the numba runtime.")
    ] = "float32",
    json: JsonOption = False,
) -> None:
    """Predictions per second: one process, one replica, real Kafka, the default network."""
    from workers.bench.inference import DELIVERIES, every_runtime, run

    if unknown := set(delivery.split(",")) - {*DELIVERIES, "all"}:
        raise typer.BadParameter(f"no delivery mode is called {', '.join(sorted(unknown))}")
    deliveries = [each for each in DELIVERIES if delivery == "all" or each in delivery.split(",")]
    runtimes = every_runtime() if runtime == "all" else runtime.split(",")
    windows = [int(each) for each in window.split(",")]
    with told() as tell:
        rows = run(
            symbols,
            bars_per_symbol,
            deliveries,
            runtimes,
            windows,
            attention_every,
            precision,
            tell,
        )
    show(rows[0] if len(rows) == 1 else {"rows": rows}, json)


@app.command("latency")
def bench_latency(
    rate: Annotated[int, typer.Option(min=1, help="Bars a second.")] = 1_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="In each delivery mode.")] = 20.0,
    symbols: Symbols = 500,
    minute_close_symbols: Annotated[
        int, typer.Option(min=1, help="Their bars of one minute arrive at once.")
    ] = 10_000,
    closes: Annotated[int, typer.Option(min=1, help="Minute closes measured.")] = 5,
    window: Window = 30,
    json: JsonOption = False,
) -> None:
    """From a bar to its prediction, readable under read_committed, in both delivery modes."""
    from workers.bench.latency import run
    from workers.bench.stage import own_kafka

    with own_kafka() as settings, told() as tell:
        result = run(settings, rate, seconds, symbols, minute_close_symbols, closes, window, tell)
    show(result, json)


@app.command("step")
def bench_step(
    steps: Annotated[int, typer.Option(min=10, help="Bars measured in each runtime.")] = 5_000,
    window: Window = 30,
    json: JsonOption = False,
) -> None:
    """One bar alone through the engine, features included, in each runtime; no Kafka."""
    from workers.bench.step import run

    with told() as tell:
        result = run(steps, window, tell)
    show(result, json)


@app.command("scale")
def bench_scale(
    symbols: Annotated[list[int], typer.Option(min=1, help="May be given several times.")] = [  # noqa: B006
        100,
        1_000,
        10_000,
        100_000,
    ],
    bars: Annotated[int, typer.Option(min=100, help="Measured for each count.")] = 100_000,
    window: Window = 30,
    runtime: Annotated[str, typer.Option(help="auto takes what inference would.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Cost of a bar and memory of a symbol, with more and more symbols; engine only, no Kafka."""
    from workers.bench.scale import run

    with told() as tell:
        result = run(symbols, bars, window, runtime, tell)
    show(result, json)


@app.command("restore")
def bench_restore(
    symbols: Symbols = 10_000,
    replayed_bars: Annotated[
        int, typer.Option(min=1, help="How many bars old the newest snapshots are.")
    ] = 5_000,
    window: Window = 30,
    json: JsonOption = False,
) -> None:
    """Kill a replica: seconds until its successor's first live prediction can be read."""
    from workers.bench.restore import run
    from workers.bench.stage import own_kafka

    with own_kafka() as settings, told() as tell:
        result = run(settings, symbols, replayed_bars, window, tell)
    show(result, json)


@app.command("swap")
def bench_swap(
    symbols: Symbols = 500,
    minutes: Annotated[int, typer.Option(min=10, help="Bars of each symbol.")] = 1_000,
    shadow: Annotated[
        bool, typer.Option("--shadow/--at-once", help="Challenger first, or champion at once.")
    ] = True,
    window: Window = 30,
    json: JsonOption = False,
) -> None:
    """Cycle times around a hot swap under full load, and the predictions that are missing."""
    from workers.bench.stage import own_kafka
    from workers.bench.swap import run

    with own_kafka() as settings, told() as tell:
        result = run(settings, symbols, minutes, window, shadow, tell)
    show(result, json)


@app.command("soak")
def bench_soak(
    minutes: Annotated[float, typer.Option(min=0.05)] = 30.0,
    symbols: Symbols = 500,
    probe_minutes: Annotated[
        int, typer.Option(min=10, help="Bars of each symbol, to find the highest rate.")
    ] = 600,
    window: Window = 30,
    json: JsonOption = False,
) -> None:
    """Resident memory at half the highest rate, after the warm-up and at the end."""
    from workers.bench.soak import BROKER, run
    from workers.bench.stage import own_kafka

    with own_kafka(BROKER) as settings, told() as tell:
        result = run(settings, minutes, symbols, probe_minutes, window, tell)
    show(result, json)


@app.command("faults")
def bench_faults(
    bars: Annotated[int, typer.Option(min=1_000, help="Of all symbols together.")] = 1_000_000,
    symbols: Annotated[int, typer.Option(min=4)] = 200,
    delivery: Annotated[Delivery, typer.Option()] = Delivery.exactly_once,
    kill_every_s: Annotated[float, typer.Option(min=1, help="SIGKILL to a replica.")] = 5.0,
    rebalance_every_s: Annotated[
        float, typer.Option(min=5, help="A third replica comes, or goes.")
    ] = 60.0,
    broker_gone_s: Annotated[float, typer.Option(min=0, help="Once, half-way.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of bars and kills.")] = 1,
    json: JsonOption = False,
) -> None:
    """Kill, rebalance, swap and cut off replicas without end; then count. Status 1: a promise broke."""
    from workers.bench.faults import promises_kept, run

    with told() as tell:
        result = run(
            bars,
            symbols,
            delivery.value,
            kill_every_s,
            rebalance_every_s,
            broker_gone_s,
            seed,
            tell,
        )
    show(result, json)
    raise typer.Exit(0 if promises_kept(result) else 1)


@app.command("fuzz")
def bench_fuzz(
    mutations: Annotated[int, typer.Option(min=1, help="Of valid bars.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same mutations.")] = 1,
    json: JsonOption = False,
) -> None:
    """Hold the decoder against the slow reference on mutated bars. Status 1: they disagree."""
    from workers.bench.fuzz import run

    with told() as tell:
        result = run(mutations, seed, tell)
    show(result, json)
    raise typer.Exit(1 if result["disagreements"] else 0)


@app.command("monitor")
def bench_monitor(
    symbols: Annotated[int, typer.Option(min=1)] = 500,
    bars_per_symbol: Annotated[int, typer.Option(min=100)] = 1_200,
    json: JsonOption = False,
) -> None:
    """Outcomes per second: one monitor, real Kafka in and out, default settings."""
    from workers.bench.monitor import run

    show(run(symbols, bars_per_symbol, say=lambda text: console.print(text)), json)


@app.command("monitor-arl")
def bench_monitor_arl(
    seeds: Annotated[int, typer.Option(min=0, help="Champions trained, each on its own.")] = 2,
    json: JsonOption = False,
) -> None:
    """False alarms against the declared rate, and the delay of true ones, on simulated markets."""
    from workers.bench.monitor_arl import run

    show(run(seeds, say=lambda text: console.print(text)), json)


@app.command("retrain")
def bench_retrain(
    sessions: Annotated[int, typer.Option(min=2, help="After the break.")] = 6,
    symbols: Annotated[int, typer.Option(min=1)] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Markets for each break.")] = 4,
    json: JsonOption = False,
) -> None:
    """Excess loss won back after simulated breaks, and CPU seconds: loop, daily, bias only, never."""
    from workers.bench.retrain import run

    say = console.print
    show(run(sessions, symbols, range(1, seeds + 1), say=lambda text: say(text)), json)


@app.command("quality-loop")
def bench_quality_loop(
    train: Annotated[str, typer.Option(help=BARS_HELP)] = "spy:2017",
    bars: Annotated[str, typer.Option(help=BARS_HELP)] = "spy:2018..2019",
    out: Annotated[Path | None, typer.Option(help="Gets losses and steps as files.")] = None,
    json: JsonOption = False,
) -> None:
    """Walk the quality loop over real bars: alarms, retrains, promotions, loss saved against never."""
    from workers.bench.quality_loop import run

    say = console.print
    show(run(train, bars, out=out, say=lambda text: say(text)), json)


@app.command("promotion")
def bench_promotion(
    runs: Annotated[int, typer.Option(min=10, help="Simulated comparisons of each kind.")] = 1_000,
    json: JsonOption = False,
) -> None:
    """How often a challenger no better is promoted, and how soon a better one is, by simulation."""
    from workers.bench.promotion import run

    show(run(runs), json)


@app.command("training")
def bench_training(
    bars: Annotated[str, typer.Option(help=BARS_HELP)] = "spy:2017..2018",
    long: Annotated[
        bool, typer.Option("--long", help="Many epochs: what the short run is compared with.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    json: JsonOption = False,
) -> None:
    """Seconds, memory and validation loss of training on two years of minutes."""
    from workers.bench.training import run

    say = console.print
    show(run(bars, long, threads, seed, say=lambda text: say(text)), json)
