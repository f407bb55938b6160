"""The running system: the demo, a Kafka, its topics, the workers, and a report on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.cli.shared import (
    BARS_HELP,
    OPERATIONS,
    START,
    WORKERS,
    console,
    progress_bar,
    read_bars,
    read_settings,
)

if TYPE_CHECKING:
    pass


app = typer.Typer()
topics_app = typer.Typer(no_args_is_help=True, help="Create and check the Kafka topics.")
app.add_typer(topics_app, name="topics", rich_help_panel=OPERATIONS)


@app.command(rich_help_panel=START)
def demo(
    out: Annotated[
        Path, typer.Option(help="Gets report.html, the pictures, summary.json and the logs.")
    ] = Path("demo"),
    simulated_symbols: Annotated[
        int, typer.Option(min=0, max=9_999, help="Simulated symbols beside SPY, as load.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of training and of the simulated symbols.")] = 0,
) -> None:
    """Run the whole loop on a real Kafka and real bars, and prove what it promises.

    It trains a champion on the calm year 2017, streams the crash of February
    2018 and then, if need be, simulated bars with a break, kills replicas,
    waits for alarm, retraining, verdict and swap, and counts in the end.
    Status 0 only if every promise held.
    """
    from workers.demo import Options, run

    options = Options(out=out, simulated_symbols=simulated_symbols, seed=seed)
    raise typer.Exit(0 if run(options, console) else 1)


@app.command(rich_help_panel=OPERATIONS)
def kafka(
    port: Annotated[int, typer.Option(help="Port of the (first) broker.")] = 9092,
    brokers: Annotated[int, typer.Option(min=1, max=5, help="How many brokers.")] = 1,
    directory: Annotated[
        Path | None, typer.Option(help="Keep the data here; without it they go at the end.")
    ] = None,
) -> None:
    """Run a real Apache Kafka on this machine until Ctrl-C; needs neither Java nor Docker."""
    import signal
    import threading

    from workers.local_kafka import LocalKafka

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with LocalKafka(brokers, directory, port=port) as running:
        console.print(
            f"Apache Kafka {running.version} is up; Ctrl-C stops it. For other terminals:"
        )
        typer.echo(f"export KAFKA_BOOTSTRAP_SERVERS={running.bootstrap_servers}")
        stop.wait()


@topics_app.command("create")
def topics_create() -> None:
    """Create the topics that are missing; existing ones are checked, never changed."""
    from workers.kafka import create_topics

    create_topics(read_settings())


@topics_app.command("check")
def topics_check() -> None:
    """Say what is wrong with the topics, if anything; status 1 then."""
    from workers.kafka import check_topics

    check_topics(read_settings())
    console.print("every topic is as it should be")


@app.command(rich_help_panel=WORKERS)
def feed(
    bars: Annotated[str, typer.Argument(help=BARS_HELP)] = "spy:2018-01..2018-03",
    speed: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Event time per time: 60 is an hour a minute, nights in a moment. "
            "Without it bars go as fast as the workers take them.",
        ),
    ] = None,
    max_lag: Annotated[
        int, typer.Option(min=1, help="Wait while inference or monitor is so many bars behind.")
    ] = 20_000,
    simulated_symbols: Annotated[
        int, typer.Option(min=0, max=9_999, help="Add so many simulated symbols, SIM0001 and on.")
    ] = 0,
    simulated_minutes: Annotated[
        int, typer.Option(min=1, help="They trade in the first so many minutes of a session.")
    ] = 390,
    seed: Annotated[int, typer.Option(help="Of the simulated symbols.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest bars that the topic holds.")
    ] = False,
) -> None:
    """Stream bars in event-time order into market.bars.

    gpt-trader-stream feed                      # the crash of February 2018
    gpt-trader-stream feed spy --speed 600      # ten minutes a second
    gpt-trader-stream feed bars.parquet --resume
    """
    from models.simulation import Scenario
    from workers.bars import by_time, first_minutes, simulated
    from workers.feed import Limits, not_yet_fed
    from workers.feed import feed as run
    from workers.service import Service

    settings = read_settings()
    frame = read_bars(bars)
    if simulated_symbols:
        times = first_minutes(frame["ts"], simulated_minutes)
        frame = by_time(frame, simulated(Scenario(symbols=simulated_symbols), times, seed))
    if resume:
        frame = not_yet_fed(frame, settings)
    with Service("feed", settings.http) as service, progress_bar() as progress:
        task = progress.add_task("bars", total=len(frame))

        def advance(n: int) -> None:
            service.progress()
            progress.advance(task, n)

        limits = Limits(speed, max_lag)
        fed = run(frame, settings, limits, running=lambda: service.running, advance=advance)
    console.print(f"{fed.bars:,} of {len(frame):,} bars in {fed.seconds:.1f} s")
    raise typer.Exit(0 if fed.bars == len(frame) else 130)


@app.command(rich_help_panel=WORKERS)
def inference(
    replica: Annotated[
        str | None,
        typer.Option(help="Name of this replica: the same at each start, unlike all others'."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Of /metrics and /healthz.")] = None,
) -> None:
    """Forecast from each bar: market.bars in, signals.predictions and signals.attention out.

    Start several with different --replica names; they share the partitions.
    """
    from workers.inference import run

    run(read_settings(replica, port))


@app.command(rich_help_panel=WORKERS)
def monitor(
    port: Annotated[int | None, typer.Option(help="Of /metrics and /healthz.")] = None,
) -> None:
    """Join predictions with what happened, watch for degradation, judge challengers."""
    from workers.monitor import run

    run(read_settings(port=port))


@app.command(rich_help_panel=WORKERS)
def trainer(
    port: Annotated[int | None, typer.Option(help="Of /metrics and /healthz.")] = None,
) -> None:
    """Answer degradation with a retrained challenger."""
    from workers.trainer import run

    run(read_settings(port=port))


@app.command(rich_help_panel=OPERATIONS)
def report(
    out: Annotated[Path, typer.Option(help="Directory that gets report.html and its pictures.")],
    outcomes: Annotated[
        int, typer.Option(min=1_000, help="Newest ones read of each partition.")
    ] = 200_000,
) -> None:
    """The quality of a running system as one HTML page: alarms, retrains, promotions, bundles, audit."""
    from workers.quality_report import write

    typer.echo(write(read_settings(), out, outcomes))
