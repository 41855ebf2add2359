"""What was generated and judged before is not done again: one SQLite file, keyed by everything that determines it.

A reply is found by the hash of the engine's description and the request, a judgement by the judge's settings and the
exchange. Nothing is ever changed in place: what determines a reply differently has another key. Replies that failed
are not kept.
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import Exchange, Turn
from equipoise.eval.generation.requests import Engine, Finish, Progress, Reply, Request
from equipoise.eval.judges.base import Judge, Judgement, Verdict
from equipoise.eval.suites.base import ReferenceScorer

APPLICATION = 0x45515043
"""SQLite's application id of such a file, so that another program's database is not written into."""
FORMAT = 1
BUSY_SECONDS = 60.0
"""How long a process waits for another one that writes."""
MAX_VARIABLES = 500
"""Keys looked up in one statement; SQLite allows 999 in its oldest versions."""

Work = TypeVar("Work")
Result = TypeVar("Result")


class CacheError(EquipoiseError):
    """A cache file that cannot be used."""


class Cache:
    """Results by key, in one file that several processes of one machine may use at once.

    Write-ahead logging, so that readers and a writer do not wait for each other; it needs a local disk. Every `put` is
    one transaction: what it wrote survives whatever happens to the process.
    Raises `CacheError` where the file cannot be opened, is none of ours, is damaged, or stays locked.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        with self._named():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self._named():
                self._open()
        except CacheError:
            self._connection.close()
            raise

    def get(self, kind: str, keys: Sequence[str]) -> dict[str, str]:
        """The values that are there, by key."""
        found: dict[str, str] = {}
        with self._named():
            for start in range(0, len(keys), MAX_VARIABLES):
                part = keys[start : start + MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                found.update(
                    self._connection.execute(
                        f"SELECT key, value FROM entries WHERE kind = ? AND key IN ({marks})", (kind, *part)
                    )
                )
        return found

    def put(self, kind: str, entries: Mapping[str, str]) -> None:
        """Store values in one transaction; a key that another process has stored meanwhile keeps its value."""
        if not entries:
            return
        with self._named():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO entries (kind, key, value) VALUES (?, ?, ?)",
                    [(kind, key, value) for key, value in entries.items()],
                )
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file; nothing can be looked up after that."""
        self._connection.close()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        def pragma(name: str) -> Any:
            return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

        application, version = pragma("application_id"), pragma("user_version")
        empty = not pragma("schema_version")
        if not empty and application != APPLICATION:
            raise CacheError(
                f"{self.path} is the database of another program; give the cache a file of its own (cache=FILE)."
            )
        if not empty and version != FORMAT:
            raise CacheError(
                f"{self.path} has cache format {version}, expected {FORMAT}; remove it, or give another (cache=FILE)."
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        # Two processes may come here at once: the statements below change nothing the second time.
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {FORMAT}")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS entries (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, "
            "PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        self._connection.execute("COMMIT")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn what SQLite and the file system say into an error that names the file and what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise CacheError(
                    f"{self.path} stayed locked for {BUSY_SECONDS:.0f} seconds ({error}): another process is writing. "
                    "Wait for it, or give this one a cache of its own (cache=FILE)."
                ) from error
            raise CacheError(
                f"{self.path} cannot be used as a cache: {error}. Expected a file on a local disk that may be written; "
                "give another one (cache=FILE) or none (cache=null)."
            ) from error
        except sqlite3.DatabaseError as error:
            raise CacheError(
                f"{self.path} is damaged or no cache ({error}). Move it away with {self.path.name}-wal and "
                f"{self.path.name}-shm, if they are there: the evaluation then begins anew."
            ) from error
        except OSError as error:
            raise CacheError(
                f"{self.path} cannot be opened as a cache: {error.strerror}; give another file (cache=FILE)."
            ) from error


class CachedEngine:
    """An `Engine` that completes only what the cache does not hold.

    Requests are sent `batch_size` at a time, the longest first, and stored batch by batch. Equal requests have one
    reply: `Request.sample` tells several answers to one prompt apart.
    """

    def __init__(self, engine: Engine, cache: Cache, batch_size: int = 128) -> None:
        self.engine = engine
        self.cache = cache
        self.batch_size = batch_size

    @property
    def description(self) -> Mapping[str, Any]:
        """Of the engine itself: a reply does not depend on where it was kept."""
        return self.engine.description

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Complete every request; as the engine itself."""
        about = digest(self.engine.description)
        keys = [digest([about, request]) for request in requests]
        # What does not fit into memory fails at once, and the engine's batches stay even.
        order = sorted(range(len(requests)), key=lambda i: -_length(requests[i]))
        return _through(
            self.cache,
            "reply",
            keys,
            order,
            self.batch_size,
            progress,
            lambda indices, report: self.engine.complete([requests[i] for i in indices], report),
            write=_stored_reply,
            read=_reply,
        )


class CachedJudge:
    """A `Judge` that judges only what the cache does not hold.

    settings: all that determines its judgements besides the exchange and its card (weights, dtype, threshold ...). A
    judge that asks an engine needs none of this: give it a `CachedEngine`, and its answers are read anew each time.
    """

    def __init__(
        self, judge: Judge, cache: Cache, settings: Mapping[str, Any], batch_size: int = 128
    ) -> None:
        self.judge_itself = judge
        self.card = judge.card
        self.cache = cache
        self.batch_size = batch_size
        self._about = digest([asdict(judge.card), settings])

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        """Judge each response; as the judge itself."""
        exchanges = [(list(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        keys = [digest([self._about, *exchange]) for exchange in exchanges]
        return _through(
            self.cache,
            "judgement",
            keys,
            range(len(keys)),
            self.batch_size,
            progress,
            lambda indices, report: self.judge_itself.judge(
                [prompts[i] for i in indices], [responses[i] for i in indices], report
            ),
            write=_stored_judgement,
            read=_judgement,
        )


class CachedScorer:
    """A `ReferenceScorer` that scores only what the cache does not hold; scores that are None are made anew."""

    def __init__(self, scorer: ReferenceScorer, cache: Cache, batch_size: int = 128) -> None:
        self.scorer = scorer
        self.cache = cache
        self.batch_size = batch_size

    @property
    def description(self) -> Mapping[str, Any]:
        """Of the scorer itself."""
        return self.scorer.description

    def score(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> list[float | None]:
        """Score every exchange; as the scorer itself."""
        about = digest(self.scorer.description)
        keys = [digest([about, list(exchange.prompt), exchange.response]) for exchange in exchanges]
        return _through(
            self.cache,
            "score",
            keys,
            range(len(keys)),
            self.batch_size,
            progress,
            lambda indices, report: self.scorer.score([exchanges[i] for i in indices], report),
            write=lambda score: None if score is None else json.dumps(score),
            read=lambda value: float(json.loads(value)),
        )


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON: mappings in the order of their keys, dataclasses by their fields.

    Raises TypeError for anything that JSON does not know: its text may differ from one process to the next.
    """
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _through(
    cache: Cache,
    kind: str,
    keys: Sequence[str],
    order: Iterable[int],
    batch_size: int,
    progress: Progress | None,
    make: Callable[[Sequence[int], Progress | None], Sequence[Result]],
    write: Callable[[Result], str | None],
    read: Callable[[str], Result],
) -> list[Result]:
    """Results by index: out of the cache, or made in batches and stored as each is finished.

    Of indices with one key only the first is made. `write` returns None for a result that must not be kept.
    """
    results: dict[str, Result] = {}
    for key, value in cache.get(kind, list(dict.fromkeys(keys))).items():
        try:
            results[key] = read(value)
        except (ValueError, KeyError, TypeError):
            raise CacheError(
                f"{cache.path}: an entry of kind {kind!r} cannot be read ({key[:12]}...). The file is damaged or was "
                "written by another release; move it away, and the evaluation begins anew."
            ) from None
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    missing = [index for index in order if keys[index] not in results and first[keys[index]] == index]
    num_found = len(keys) - len(missing)
    if progress is not None and num_found and keys:
        progress(num_found, len(keys), "from the cache")
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        made = make(batch, _offset(progress, num_found + start, len(keys)))
        stored = {}
        for index, result in zip(batch, made, strict=True):
            results[keys[index]] = result
            text = write(result)
            if text is not None:
                stored[keys[index]] = text
        cache.put(kind, stored)
    return [results[key] for key in keys]


def _offset(progress: Progress | None, num_done: int, total: int) -> Progress | None:
    """The progress of a batch as progress of the whole."""
    if progress is None:
        return None

    def report(done: int, _: int, what: str) -> None:
        progress(min(num_done + done, total), total, what)

    return report


def _length(request: Request) -> int:
    if request.text is not None:
        return len(request.text)
    return sum(len(str(message["content"])) for message in request.messages or ())


def _stored_reply(reply: Reply) -> str | None:
    # An overlong request stays one; a failed one, or a server's null content, may succeed the next time.
    if reply.finish is Finish.FAILED or (reply.text is None and reply.finish is not Finish.OVERLONG):
        return None
    return json.dumps(_plain(reply))


def _reply(value: str) -> Reply:
    stored = json.loads(value)
    return Reply(**stored | {"finish": Finish(stored["finish"])})


def _stored_judgement(judgement: Judgement) -> str | None:
    if judgement.verdict is Verdict.FAILED:
        return None
    if judgement.p_unsafe is not None and not math.isfinite(judgement.p_unsafe):
        return None
    return json.dumps(_plain(judgement))


def _judgement(value: str) -> Judgement:
    stored = json.loads(value)
    return Judgement(
        **stored
        | {
            "verdict": Verdict(stored["verdict"]),
            "categories": tuple(stored["categories"]),
            "native_categories": tuple(stored["native_categories"]),
        }
    )
