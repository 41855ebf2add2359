import json
import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.schema import Exchange, Turn
from equipoise.eval.cache import Cache, CachedEngine, CachedJudge, CachedScorer, CacheError, digest
from equipoise.eval.generation.requests import Finish, Progress, Reply, Request, numbered
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict


def question(text: str, **options: Any) -> Request:
    return Request(messages=({"role": "user", "content": text},), **options)


@dataclass
class Echo:
    """Answers with the number of the call; fails or is interrupted where it is told to."""

    description: Mapping[str, Any] = field(default_factory=lambda: {"engine": "echo", "temperature": 0.0})
    fail: tuple[str, ...] = ()
    interrupt_at: int | None = None
    asked: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        self.batches.append(len(requests))
        replies = []
        for number, request in enumerate(requests, start=1):
            assert request.messages is not None
            text = request.messages[-1]["content"]
            if self.interrupt_at is not None and len(self.asked) == self.interrupt_at:
                raise KeyboardInterrupt
            self.asked.append(text)
            if text in self.fail:
                replies.append(Reply(None, Finish.FAILED, error="503"))
            else:
                logprobs = dict.fromkeys(request.choices, -math.inf)
                text = f"{text}: {len(self.asked)}\ud83d"  # half a surrogate pair, as byte-level decoding can give
                replies.append(Reply(text, Finish.LENGTH, 3, logprobs, reasoning="hm"))
            if progress is not None:
                progress(number, len(requests), "answers")
        return replies


def test_a_second_call_asks_nothing_and_gives_the_same_replies(tmp_path: Path) -> None:
    requests = [question(f"q{i}", choices=("safe", "unsafe")) for i in range(5)]
    with Cache(tmp_path / "folder" / "cache.sqlite") as cache:
        first = CachedEngine(Echo(), cache).complete(requests)
    with Cache(tmp_path / "folder" / "cache.sqlite") as cache:
        engine = Echo()
        assert CachedEngine(engine, cache).complete(requests[::-1]) == first[::-1]
        assert engine.asked == []


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        CachedEngine(Echo(), cache).complete([question("a"), question("b")])
        engine = Echo()
        replies = CachedEngine(engine, cache).complete([question("b"), question("new"), question("a")])
    assert engine.asked == ["new"]
    assert [(reply.text or "").split(":")[0] for reply in replies] == ["b", "new", "a"]


@pytest.mark.parametrize(
    "changed",
    [
        question("a", max_new_tokens=65),
        question("a", template_options={"reasoning_effort": "high"}),
        question("a", choices=("safe",)),
        Request(messages=({"role": "system", "content": "a"},)),
        Request(text="a"),
    ],
)
def test_every_part_of_a_request_is_in_its_key(changed: Request) -> None:
    assert digest(changed) != digest(question("a"))
    assert digest(question("a")) == digest(question("a", template_options={}, max_new_tokens=64))


def test_another_model_seed_or_setting_has_another_key(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        CachedEngine(Echo({"model": "x", "seed": 0}), cache).complete([question("a")])
        for description in ({"model": "y", "seed": 0}, {"model": "x", "seed": 1}, {"model": "x"}):
            engine = Echo(description)
            CachedEngine(engine, cache).complete([question("a")])
            assert engine.asked == ["a"]
        engine = Echo({"seed": 0, "model": "x"})  # the order of keys says nothing
        CachedEngine(engine, cache).complete([question("a")])
        assert engine.asked == []


def test_a_description_that_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache, pytest.raises(TypeError):
        CachedEngine(Echo({"model": object()}), cache).complete([question("a")])


def test_samples_of_one_prompt_have_replies_of_their_own_and_equal_requests_one(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        first = CachedEngine(Echo(), cache).complete(numbered([question("a")] * 3))
        assert len({reply.text for reply in first}) == 3
        engine = Echo()
        again = CachedEngine(engine, cache).complete(numbered([question("a")] * 4))
        assert again[:3] == first
        assert engine.asked == ["a"]
        engine = Echo()
        assert (
            CachedEngine(engine, cache).complete([question("b")] * 3)
            == [Echo().complete([question("b")])[0]] * 3
        )
    assert engine.asked == ["b"]


def test_a_failed_reply_is_asked_again(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        failed = CachedEngine(Echo(fail=("b",)), cache).complete([question("a"), question("b")])
        assert [reply.finish for reply in failed] == [Finish.LENGTH, Finish.FAILED]
        engine = Echo()
        again = CachedEngine(engine, cache).complete([question("a"), question("b")])
    assert engine.asked == ["b"]
    assert [reply.finish for reply in again] == [Finish.LENGTH, Finish.LENGTH]


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    requests = [question(f"q{i}") for i in range(10)]
    with Cache(tmp_path / "cache.sqlite") as cache, pytest.raises(KeyboardInterrupt):
        CachedEngine(Echo(interrupt_at=7), cache, batch_size=3).complete(requests)
    with Cache(tmp_path / "cache.sqlite") as cache:
        engine = Echo()
        CachedEngine(engine, cache, batch_size=3).complete(requests)
    assert engine.asked == [f"q{i}" for i in range(6, 10)]  # two batches of three were stored
    assert engine.batches == [3, 1]


def test_the_longest_are_asked_first_and_progress_reaches_its_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    with Cache(tmp_path / "cache.sqlite") as cache:
        CachedEngine(Echo(), cache).complete([question("stored")])
        engine = Echo()
        CachedEngine(engine, cache, batch_size=2).complete(
            [question("x"), question("stored"), question("xxx"), question("xx")],
            lambda done, total, what: seen.append((done, total, what)),
        )
    assert engine.asked == ["xxx", "xx", "x"]
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert seen[0] == (1, 4, "from the cache")
    assert {total for _, total, _ in seen} == {4}


class Counting:
    """Judges by length, and counts."""

    card = JudgeCard("counting", True, "By length.", ())

    def __init__(self, verdict: Verdict = Verdict.UNSAFE) -> None:
        self.verdict = verdict
        self.num_judged = 0

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        self.num_judged += len(responses)
        return [
            Judgement(self.verdict, len(r) / 10, None, 0.1, ("S1",), ("O1",), 0.25, "raw") for r in responses
        ]


def test_judgements_are_kept_by_settings_and_exchange(tmp_path: Path) -> None:
    prompts = [({"role": "user", "content": "p"},)] * 2
    with Cache(tmp_path / "cache.sqlite") as cache:
        first = CachedJudge(Counting(), cache, {"weights": "1"}).judge(prompts, ["a", "bb"])
        judge = Counting()
        assert CachedJudge(judge, cache, {"weights": "1"}).judge(prompts, ["a", "bb"]) == first
        assert judge.num_judged == 0
        CachedJudge(judge, cache, {"weights": "2"}).judge(prompts, ["a", "bb"])
        assert judge.num_judged == 2
        CachedJudge(judge, cache, {"weights": "1"}).judge(prompts[:1], ["bbb"])
        assert judge.num_judged == 3
        changed = Counting()
        changed.card = replace(changed.card, description="Recalibrated.")
        CachedJudge(changed, cache, {"weights": "1"}).judge(prompts, ["a", "bb"])
        assert changed.num_judged == 2


def test_a_failed_verdict_is_asked_again_and_an_unparsed_one_is_kept(tmp_path: Path) -> None:
    prompts = [({"role": "user", "content": "p"},)]
    for verdict, num_judged in ((Verdict.FAILED, 1), (Verdict.UNPARSED, 0)):
        with Cache(tmp_path / f"{verdict}.sqlite") as cache:
            CachedJudge(Counting(verdict), cache, {}).judge(prompts, ["a"])
            judge = Counting()
            CachedJudge(judge, cache, {}).judge(prompts, ["a"])
            assert judge.num_judged == num_judged


class Scorer:
    description: Mapping[str, Any] = {"weights": "w"}

    def __init__(self) -> None:
        self.num_scored = 0

    def score(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> list[float | None]:
        self.num_scored += len(exchanges)
        return [None if exchange.response == "long" else -0.1 for exchange in exchanges]


def test_scores_are_kept_and_a_missing_one_is_made_anew(tmp_path: Path) -> None:
    exchanges = [
        Exchange(str(i), ({"role": "user", "content": "p"},), "helpful", text)
        for i, text in enumerate(("a", "long", "b"))
    ]
    with Cache(tmp_path / "cache.sqlite") as cache:
        assert CachedScorer(Scorer(), cache).score(exchanges) == [-0.1, None, -0.1]
        scorer = Scorer()
        assert CachedScorer(scorer, cache).score(exchanges) == [-0.1, None, -0.1]
        assert scorer.num_scored == 1


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(b"this is no database, " * 100)
    with pytest.raises(CacheError, match=r"cache\.sqlite is damaged or no cache .* Move it away"):
        Cache(path)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with Cache(path) as cache:
        cache.put("reply", {str(i): "x" * 1000 for i in range(1000)})
    assert path.stat().st_size > 100_000
    with path.open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(CacheError, match=r"cache\.sqlite"), Cache(path) as cache:
        cache.get("reply", [str(i) for i in range(1000)])


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(CacheError, match="database of another program"):
        Cache(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    Cache(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CacheError, match="has cache format 99, expected 1"):
        Cache(path)


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be used as a cache"):
        Cache(tmp_path)


def test_an_entry_that_cannot_be_read_is_no_reply(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache.sqlite") as cache:
        CachedEngine(Echo(), cache).complete([question("a")])
    connection = sqlite3.connect(tmp_path / "cache.sqlite")
    connection.execute("UPDATE entries SET value = '{}'")
    connection.commit()
    connection.close()
    with Cache(tmp_path / "cache.sqlite") as cache, pytest.raises(CacheError, match="cannot be read"):
        CachedEngine(Echo(), cache).complete([question("a")])


def test_two_processes_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    children = [
        subprocess.Popen([sys.executable, __file__, str(path), name], stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    with Cache(path) as cache:
        shared = cache.get("reply", [f"shared-{i}" for i in range(200)])
        assert set(shared) == {f"shared-{i}" for i in range(200)}
        assert set(shared.values()) <= {"one", "two"}
        for name in ("one", "two"):
            assert len(cache.get("reply", [f"{name}-{i}" for i in range(200)])) == 200
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


def write_from_a_process(path: Path, name: str) -> None:
    """What each process of the test above does: both begin once both are there, and write the same keys."""
    (path.parent / f"{name}.ready").touch()
    while not all((path.parent / f"{other}.ready").exists() for other in ("one", "two")):
        time.sleep(0.001)
    with Cache(path) as cache:
        for i in range(200):
            cache.put("reply", {f"shared-{i}": name, f"{name}-{i}": name})
        seen = cache.get("reply", [f"shared-{i}" for i in range(200)])
    (path.parent / f"{name}.json").write_text(json.dumps(seen, sort_keys=True))


if __name__ == "__main__":
    write_from_a_process(Path(sys.argv[1]), sys.argv[2])
