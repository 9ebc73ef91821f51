"""The demo's tasks: short questions with one right answer, made from well-kept packages.

    words    "Write in words: 4271"  ->  "four thousand, two hundred and seventy-one"   (num2words)
    date     "Date: 2024-03-09"      ->  "March 9th, 2024"                              (stdlib)
    time     "Time: 16:05"           ->  "4:05 PM"                                      (stdlib)

No question says how to answer; the three must be told apart by what they ask about. Everything
is seeded: the same items, and the same split, on every machine. Held-out items never occur in
the training set.

    python examples/tasks.py                 # shows a few items of every task
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HELD_OUT = 120
SEED = 20240309
ADAPTERS = Path(__file__).parent / "adapters"  # one folder per task, and `routed`


@dataclass(frozen=True)
class Item:
    """A user message and the answer that counts as right."""

    question: str
    answer: str


def _words() -> list[Item]:
    from num2words import num2words

    return [Item(f"Write in words: {n}", num2words(n)) for n in range(100, 10_000)]


def _time() -> list[Item]:
    return [_time_item(hour, minute) for hour in range(24) for minute in range(60)]


def _time_item(hour: int, minute: int) -> Item:
    half = "AM" if hour < 12 else "PM"
    return Item(f"Time: {hour:02}:{minute:02}", f"{hour % 12 or 12}:{minute:02} {half}")


def _date() -> list[Item]:
    first = datetime.date(1950, 1, 1)
    days = (datetime.date(2049, 12, 31) - first).days + 1
    return [_date_item(first + datetime.timedelta(days=i)) for i in range(days)]


def _date_item(day: datetime.date) -> Item:
    teen = 10 <= day.day % 100 <= 20
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    month = _MONTHS[day.month - 1]  # strftime's %B would follow the locale
    return Item(f"Date: {day.isoformat()}", f"{month} {day.day}{suffix}, {day.year}")


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

TASKS: dict[str, Callable[[], list[Item]]] = {"words": _words, "date": _date, "time": _time}


@cache
def _shuffled(task: str) -> tuple[Item, ...]:
    items = TASKS[task]()
    random.Random(f"{SEED}/{task}").shuffle(items)
    return tuple(items)


def held_out(task: str, count: int = HELD_OUT) -> list[Item]:
    """The first `count` held-out items; the same ones every time."""
    if not 1 <= count <= HELD_OUT:
        raise ValueError(f"items is {count}; allowed: 1 to {HELD_OUT}, the held-out set")
    return list(_shuffled(task)[:count])


def training(task: str) -> list[Item]:
    """Everything that is not held out, in a fixed random order."""
    return list(_shuffled(task)[HELD_OUT:])


def is_right(item: Item, said: str) -> bool:
    """Exact match, but for case, outer blanks and a closing full stop."""
    return said.strip().rstrip(".").lower() == item.answer.lower()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for task in TASKS:
        print(f"{task}: {len(training(task))} to train on, {HELD_OUT} held out")
        for item in held_out(task, 5):
            print(f"    {item.question:24} {item.answer}")


if __name__ == "__main__":
    main()
