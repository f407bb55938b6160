"""Bad messages by the million: valid bars, mutated, and what the decoder makes of them."""

import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from schemas.codecs import MAX_BAR_BYTES, decode_bars, encode_bars
from schemas.messages import Bar
from workers.bench.fixtures import Tell, quietly, simulated_bars
from workers.offline import to_columns

BATCH = 256
GOOD_IN = 4
"""Every so many-th message of a batch is left as it was."""
SETTLED_AFTER = 0.1
"""Share of the run after which memory has to be flat."""

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = (
    *("0", "-0", "-1", "1", "1.0", "1e0", "1.5", "01", "+1", "1.", ".5", "1e", "0x1", "1_0", "-"),
    *("true", "false", "null", '"1"', "[]", "{}", "[1]", "NaN", "Infinity", "-Infinity", "nan"),
    *("1e308", "1e400", "-1e400", "4.9e-324", "1e-400", "9007199254740993", "4102444800001"),
    *("9223372036854775808", "18446744073709551616", "9" * 400, "0." + "0" * 400 + "1", ""),
)
_TEXTS = (
    *('""', '" "', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"a', "'a'", '"\\x"', '"\n"'),
    *('"' + "x" * 64 + '"', '"' + "x" * 65 + '"', '"' + "\U0001f600" * 65 + '"'),
)
_BYTES = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"\0", b"\\", b'"')
_FIELDS = ("symbol", "ts", "open", "high", "low", "close", "volume", "extra", "schema_version")


def _damage(value: bytes, rng: random.Random) -> bytes:
    """A few bytes are changed, lost, doubled or put in."""
    raw = bytearray(value)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        until = min(at + rng.randint(0, 8), len(raw))
        raw[at:until] = rng.choice(
            (rng.randbytes(until - at), rng.choice(_BYTES), raw[at:until] * 2)
        )
    return bytes(raw)


def _cut(value: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(value))
    return value[:at] if rng.random() < 0.5 else value[at:]


def _restructure(value: bytes, rng: random.Random) -> bytes:
    """Members vanish, come twice, come from nowhere; the whole is wrapped or nested."""
    members = value[1:-1].split(b",")
    more = (b'"unknown":[1,{"a":null}]', b'"extra":{"a":1,"b":-2.5}', b'"schema_version":2')
    match rng.randrange(6):
        case 0:
            members.pop(rng.randrange(len(members)))
        case 1:
            members.append(rng.choice(members))
        case 2:
            members.insert(rng.randrange(len(members)), rng.choice(more))
        case 3:
            rng.shuffle(members)
        case 4:
            depth = rng.choice((1, 2, 100, 199, 200, 201, 5_000))
            return b"[" * depth + value + b"]" * depth
        case _:
            depth = rng.choice((1, 10, 199, 200, 3_000))
            members.append(b'"unknown":' + b'{"a":' * depth + b"1" + b"}" * depth)
    return b"{" + b",".join(members) + b"}"


def _renumber(value: bytes, rng: random.Random) -> bytes:
    """One field gets another value: an odd number, an odd text, or one that is merely wrong."""
    field = rng.choice(_FIELDS)
    close_by = f"{rng.uniform(-1, 300):.6g}"
    new = rng.choice((rng.choice(_NUMBERS), rng.choice(_TEXTS), close_by)).encode(
        errors="surrogatepass"
    )
    name = f'"{field}":'.encode()
    before, found, after = value.partition(name)
    if not found:
        return value[:-1] + b"," + name + new + b"}"
    return (
        before
        + name
        + new
        + b"," * (b"," in after)
        + after.partition(b",")[2]
        + b"}" * (b"," not in after)
    )


def _recode(value: bytes, rng: random.Random) -> bytes:
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037", "utf-7"))
    return value.decode(errors="replace").encode(encoding, errors="replace")


def _resize(value: bytes, rng: random.Random) -> bytes:
    """Up to and beyond what a bar may weigh, by blanks or by a long text."""
    size = rng.choice((1_000, MAX_BAR_BYTES - len(value), MAX_BAR_BYTES, 2 * MAX_BAR_BYTES))
    if rng.random() < 0.5:
        return value + b" " * size
    return value[:-1] + b',"unknown":"' + b"x" * size + b'"}'


def _replace(value: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (b"", b"null", b"[]", b"{}", b'"bar"', b"0", rng.randbytes(rng.randint(1, 300)))
    )


_MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (_damage, 40),
    (_renumber, 30),
    (_restructure, 15),
    (_cut, 6),
    (_recode, 4),
    (_replace, 4),
    (_resize, 1),
)
_KINDS = [mutation for mutation, _ in _MUTATIONS]
_WEIGHTS = [weight for _, weight in _MUTATIONS]


def mutated(value: bytes, rng: random.Random) -> bytes:
    """A valid bar's bytes after one mutation, sometimes two; now and then it is still valid."""
    for kind in rng.choices(_KINDS, _WEIGHTS, k=1 if rng.random() < 0.8 else 2):
        value = kind(value or b"{}", rng)
    return value


def judged(value: bytes) -> Bar | None:
    """The slow reference: what `Bar` says about it."""
    if len(value) > MAX_BAR_BYTES:
        return None
    try:
        return Bar.model_validate_json(value)
    except ValidationError:
        return None


def disagreements(values: Sequence[bytes]) -> tuple[int, int]:
    """Decode a batch; how many were accepted, and on how many the reference differs.

    A value must be either among the columns as the reference reads it, or rejected with a reason in
    one line.
    """
    columns, places, rejected = decode_bars(values)
    got: dict[int, Any] = {
        int(place): (columns.symbols[i], int(columns.ts[i]), tuple(columns.ohlcv[i].tolist()))
        for i, place in enumerate(places)
    }
    reasons = {r.index: r.reason for r in rejected}
    wrong = abs(len(places) + len(rejected) - len(values))
    for index, value in enumerate(values):
        bar = judged(value)
        if bar is None:
            reason = reasons.get(index)
            wrong += not reason or "\n" in reason
        else:
            wrong += got.get(index) != (
                *(bar.symbol, bar.ts),
                (bar.open, bar.high, bar.low, bar.close, bar.volume),
            )
    return len(places), wrong


def batches(mutations: int, seed: int) -> Iterator[list[bytes]]:
    """Mutated bars, so many in all, among good ones."""
    rng = random.Random(seed)
    good = encode_bars(to_columns(simulated_bars(symbols=16, minutes=64, seed=seed).frame()))
    left = mutations
    while left:
        values = rng.choices(good, k=BATCH)
        for index in range(BATCH):
            if left and index % GOOD_IN:
                values[index] = mutated(values[index], rng)
                left -= 1
        yield values


def run(mutations: int = 1_000_000, seed: int = 1, tell: Tell = quietly) -> dict[str, Any]:
    """Decode so many mutated bars among good ones, each held against the reference."""
    started, decoded, accepted, wrong = time.perf_counter(), 0, 0, 0
    settled_mb = 0.0
    for values in batches(mutations, seed):
        taken, differing = disagreements(values)
        decoded, accepted, wrong = decoded + len(values), accepted + taken, wrong + differing
        if decoded <= SETTLED_AFTER * mutations * GOOD_IN / (GOOD_IN - 1):
            settled_mb = _peak_mb()
        tell(f"{wrong} disagreements", (decoded - decoded // GOOD_IN) / mutations)
    good = decoded - mutations
    return {
        "mutations": mutations,
        "good_between": good,
        "accepted_mutations": accepted - good,
        "dead_letters": decoded - accepted,
        "disagreements": wrong,
        "seed": seed,
        "rss_peak_mb_settled": round(settled_mb, 1),
        "rss_peak_mb_end": round(_peak_mb(), 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
