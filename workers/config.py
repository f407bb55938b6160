"""Configuration: frozen, read once, from environment variables over a TOML file over defaults.

Variables are `GPT_TRADER_<SECTION>__<FIELD>` (for example `GPT_TRADER_KAFKA__TRANSACTION_TIMEOUT_MS`);
`KAFKA_BOOTSTRAP_SERVERS` and `DATABASE_URL` are read under these names too. The file is
`gpt-trader-stream.toml` in the working directory, or the one named by `GPT_TRADER_CONFIG`.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(Section):
    partitions: Positive = 4
    """Of the co-partitioned topics, when `topics create` makes them."""
    replication_factor: Positive = 1
    delivery: Literal["exactly_once", "at_least_once"] = "exactly_once"
    transaction_timeout_ms: Positive = 10_000
    session_timeout_ms: Positive = 10_000
    broker_timeout_ms: Positive = 120_000
    """A worker exits when no broker has answered for so long."""
    retry_backoff_ms: Positive = 2
    """Drives exactly-once latency: the client backs off while the last transaction's markers are written."""
    linger_ms: Annotated[int, Field(ge=0)] = 1


class DeadLetterSettings(Section):
    max_ratio: Fraction = 0.5
    """Share of dead letters among the last `window` messages that stops the worker."""
    window: Positive = 10_000
    max_consecutive: Positive = 1_000


class InferenceSettings(Section):
    group: str = "inference"
    max_batch: Positive = 4_096
    poll_ms: Annotated[int, Field(gt=0, le=100)] = 50
    """Longest blocking call: signal handlers run between calls."""
    attention_top: Positive = 5
    attention_every: Annotated[int, Field(ge=0)] = 1
    """A summary for every n-th bar of a symbol; 0 publishes none."""
    torch_threads: Positive = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in the numba runtime; state, cells and attention stay in float32. bfloat16 needs a
    CPU that has it (avx512_bf16), and torch. It takes a quarter less of the CPU in batches of hundreds of symbols, more
    in small ones, and moves a log variance by 2e-4 (mean; 1e-2 at most seen). On one kind of CPU a replay
    says the same to the last bit; replicas of one group need the same one, and the same precision."""
    snapshot_every_s: Annotated[float, Field(gt=0)] = 30.0
    snapshots_kept: Positive = 3


class MonitorSettings(Section):
    group: str = "monitor"
    target: str = "volatility"
    """Kind or name of the target whose losses decide; the first of the champion's that fits."""
    watch: tuple[str, ...] = ()
    """Symbols whose losses decide; none named means all."""
    detector: Literal["cusum", "page_hinkley", "shiryaev_roberts", "adwin"] = "cusum"
    """The CUSUM where the champion was not calibrated for it."""
    cool_down_bars: Positive = 390
    """Bar times without the statistic above its threshold after which an alarm is over."""
    repeat_bars: Positive = 98
    """Bar times since the champion became worse at which an alarm that is not over is raised again;
    after that at twice as many each time."""
    alpha: Fraction = 0.05
    """Chance at most that, of the challengers that run at once, one no better than the champion is
    promoted: each slot has the same part of it."""
    max_challengers: Annotated[int, Field(gt=0, le=4)] = 3
    """In shadow at once, without the one in the slot `weights`."""
    max_shadow_bars: Positive = 5_000
    """Bar times after which a challenger without evidence for it is refused."""
    probation_bars: Positive = 390
    """Bar times after a promotion in which a stricter alarm brings the parent back."""
    idle_s: Annotated[float, Field(gt=0)] = 10.0
    """Verdicts wait for every partition but those that have stood at their end for so long."""
    max_batch: Positive = 8_192
    poll_ms: Annotated[int, Field(gt=0, le=100)] = 50
    snapshot_every_s: Annotated[float, Field(gt=0)] = 30.0


class TrainerSettings(Section):
    group: str = "trainer"
    cool_down_bars: Positive = 390
    """Event-time bars between two retrains; an alarm that is raised again is not held to it."""
    least_new_bars: Positive = 90
    """Bar times since the champion became worse below which an alarm is not answered yet."""
    max_retrains_per_day: Positive = 24
    max_seconds_per_day: Annotated[float, Field(gt=0)] = 14_400.0
    """Of training, all runs together; a person's word is not held to it."""
    retrain_every_days: Annotated[float, Field(ge=0)] = 0.0
    """Event-time days after the newest bar that the champion or a run has seen; 0 is never."""
    policy: Literal["auto", "bias", "weights", "fine_tune", "full"] = "auto"
    """What a retrain does; auto chooses by what the excess loss is made of (`models.remedy`). A
    champion that is no ensemble has no weights: it is fine-tuned."""
    fine_tune_epochs: Positive = 3
    full_epochs: Positive = 12
    history_bars: Positive = 20_000
    """Bars per symbol fetched back from the event; fewer are used where there are fewer."""
    history: str = ""
    """Parquet file or folder whose bars go before those of the log; empty: the log is all."""
    runs: str = "runs"
    """Local directory where a run keeps bars and training checkpoint until it is over."""
    lead_bars: Positive = 5
    """How many bars ahead of the newest one a lifecycle change takes effect."""
    torch_threads: Positive = 1
    time_limit_s: Annotated[float, Field(gt=0)] = 1_800.0
    """A retrain that takes longer is stopped and counts as failed."""


class HttpSettings(Section):
    host: str = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Of /metrics and /healthz; 0 takes a free one and logs it."""
    stalled_after_s: Annotated[float, Field(gt=0)] = 30.0
    """/healthz turns 503 when the loop has made no progress for so long."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="GPT_TRADER_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    bootstrap_servers: str = Field(
        "localhost:9092",
        validation_alias=AliasChoices(
            "KAFKA_BOOTSTRAP_SERVERS", "GPT_TRADER_BOOTSTRAP_SERVERS", "bootstrap_servers"
        ),
    )
    database_url: str = Field(
        "sqlite:///gpt-trader-stream.db",
        validation_alias=AliasChoices("DATABASE_URL", "GPT_TRADER_DATABASE_URL", "database_url"),
    )
    store: str = "store"
    """Where bundles and snapshots live: a directory, or any fsspec URL."""
    replica: str = "0"
    """Name of this replica's slot: stable across restarts, unique among live replicas."""
    device: str = "auto"
    """cpu, cuda, or cuda:N; auto: a GPU where there is one that torch can use, else the CPU."""
    runtime: str = "auto"
    """One of `models.runtimes.RUNTIMES`; a bundle that it cannot run is rejected. auto: the fastest."""
    kafka: KafkaSettings = KafkaSettings()
    dead_letter: DeadLetterSettings = DeadLetterSettings()
    inference: InferenceSettings = InferenceSettings()
    monitor: MonitorSettings = MonitorSettings()
    trainer: TrainerSettings = TrainerSettings()
    http: HttpSettings = HttpSettings()

    @model_validator(mode="after")
    def _precision_has_a_runtime(self) -> Self:
        if self.inference.precision == "bfloat16" and self.runtime not in ("auto", "numba"):
            raise ValueError("inference.precision bfloat16 needs the runtime numba, or auto")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = Path(os.environ.get("GPT_TRADER_CONFIG", "gpt-trader-stream.toml"))
        file = TomlConfigSettingsSource(settings_cls, toml_file=path)
        return init_settings, env_settings, file
