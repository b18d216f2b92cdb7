"""Interaction data as one plain structure, read from the folders that people have.

Recognised by the files present:

| files | what it is |
|---|---|
| `ratings.dat`, `movies.dat` | GroupLens `ml-1m` |
| `ratings.csv`, `movies.csv` | GroupLens `ml-latest-small` and its larger sisters |
| `u.data`, `u.item`, `u.genre` | GroupLens `ml-100k` |
| `sequences.txt`, `movies.dat` or `item_domains.tsv` | lines `user item item ...`, oldest first |
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ENOUGH = 4  # items of a user: two to train on, one to validate, one to test
BYTE_ORDER_MARK = "\ufeff".encode()
NOT_A_DOMAIN = {"", "unknown", "(no genres listed)"}


class DataError(ValueError):
    """Data that cannot be read; the message names the file, the line and what was expected."""

    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {problem}")


@dataclass(frozen=True)
class Interactions:
    """What users took, oldest first; users, items and domains are numbered from 0 without gaps."""

    name: str
    items: np.ndarray  # [n] int64, the users' sequences one after the other
    offsets: np.ndarray  # [U + 1] int64, user u owns items[offsets[u]:offsets[u + 1]]
    item_domains: np.ndarray  # [V, G] int64, padded with -1
    domain_names: list[str]
    titles: list[str]  # of the V items, "" where the source has none

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_domains)

    @property
    def lengths(self) -> np.ndarray:  # [U] int64
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:  # [n] int64, the owner of each interaction
        return np.repeat(np.arange(self.num_users), self.lengths)

    def sequence(self, user: int) -> np.ndarray:
        """The items of one user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def describe(self, item: int) -> str:
        """The title of an item, or its number, with its domains."""
        domains = [self.domain_names[d] for d in self.item_domains[item] if d >= 0]
        return f"{self.titles[item] or f'item {item}'} ({', '.join(domains) or 'no domain'})"

    def domain_sizes(self) -> np.ndarray:  # [num_domains] int64
        """Interactions per domain; an item counts for each of its domains."""
        domains = self.item_domains[self.items]
        return np.bincount(domains[domains >= 0], minlength=len(self.domain_names))


@dataclass(frozen=True)
class Item:
    title: str
    domains: list[str]


@dataclass(frozen=True)
class Log:
    """Interactions as read: raw ids, in the order of the file."""

    users: array[int] = field(default_factory=lambda: array("q"))
    items: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("q"))


def from_command_line(description: str | None, **length: int) -> tuple[Interactions, int]:
    """The data set that ``--data`` names, or a synthetic one, and how long to train.

    Args:
        description: what ``--help`` says.
        length: the option that says how long, and its default: ``epochs=5`` makes ``--epochs``.

    A data set that cannot be read ends the script.
    """
    from dwl_kernels.examples.synthetic import synthetic

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="folder of a data set, ml-1m say (default: a synthetic one)")
    parser.add_argument(
        "--users", type=_positive, default=5000, help="users of the synthetic one (default: 5000)"
    )
    ((unit, default),) = length.items()
    parser.add_argument(
        f"--{unit}",
        type=_positive,
        default=default,
        help=f"{unit} of training (default: {default})",
    )
    options = parser.parse_args()
    try:
        data = synthetic(users=options.users) if options.data is None else load(options.data)
    except DataError as error:
        sys.exit(f"error: {error}")
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process prints
        print(f"{data.name}: {data.num_users:,} users, {data.num_items:,} items", flush=True)
    return data, getattr(options, unit)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def load(folder: str | Path) -> Interactions:
    """Read a folder of interactions in any of the formats above.

    Args:
        folder: a GroupLens folder as shipped, or one with `sequences.txt`.

    Returns:
        The interactions; every user has an item, every item a user.

    Raises:
        DataError: the folder or a file is missing, empty, truncated or in another format; or no
            item has a domain, or no user enough items.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = "is a file, give its folder" if folder.exists() else "there is no such folder"
        raise DataError(folder, None, problem)
    for log_name, (read_log, item_readers) in FORMATS.items():
        if not (folder / log_name).exists():
            continue
        for item_name, read_items in item_readers.items():
            if (folder / item_name).exists():
                items = read_items(folder / item_name)
                if not any(item.domains for item in items.values()):
                    raise DataError(folder / item_name, None, "no item has a domain")
                log = read_log(folder / log_name, items)
                data = _number(folder.resolve().name, log, items)
                if data.lengths.max() < ENOUGH:
                    raise DataError(folder / log_name, None, f"no user has {ENOUGH} items")
                return data
        raise DataError(folder, None, f"{log_name} is there, but no {' or '.join(item_readers)}")
    expected = "; ".join(f"{log} with {' or '.join(items)}" for log, (_, items) in FORMATS.items())
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise DataError(folder, None, f"expected {expected}; found {found}")


def _number(name: str, log: Log, items: dict[int, Item]) -> Interactions:
    """Sort by user and time, ties as in the file, and number everything without gaps."""
    users, raw_items, times = (np.array(c, np.int64) for c in (log.users, log.items, log.times))
    order = np.lexsort((times, users))
    _, lengths = np.unique(users, return_counts=True)
    known, numbered = np.unique(raw_items[order], return_inverse=True)
    described = [items[item] for item in known.tolist()]
    names = sorted({domain for item in described for domain in item.domains})
    index = {domain: number for number, domain in enumerate(names)}
    item_domains = np.full((len(known), max(1, *(len(item.domains) for item in described))), -1)
    for row, item in zip(item_domains, described, strict=True):
        row[: len(item.domains)] = [index[domain] for domain in item.domains]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Interactions(name, numbered, offsets, item_domains, names, [i.title for i in described])


def _read(
    path: Path,
    encoding: str,
    expected: str,
    parse: Callable[[str], None],
    header: bool = False,
) -> None:
    """Hand every line to `parse`; what it raises becomes a `DataError` with file and line."""
    number, line = 0, ""
    try:
        with path.open("rb") as file:  # decoded line by line, so that an error has its line
            for raw in file:
                number += 1
                line = raw.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").decode(encoding)
                if not header or number > 1:
                    parse(line)
                elif line.strip() != expected:
                    raise ValueError("the first line must name the columns")
    except OSError as error:
        raise DataError(path, None, f"{error.strerror}; expected lines of {expected}") from None
    except UnicodeDecodeError:
        raise DataError(path, number, f"not {encoding} text; expected {expected}") from None
    except (ValueError, OverflowError) as error:
        got = repr(line.rstrip() if len(line) <= 80 else line[:77] + "...")
        raise DataError(path, number, f"expected {expected}, got {got} ({error})") from None
    if line and not line.endswith("\n"):
        problem = f"the last line, {line[:80]!r}, has no end: the file is cut off"
        raise DataError(path, number, f"{problem}; expected lines of {expected}")
    if number <= header:
        raise DataError(path, number + 1, f"the file ends here; expected lines of {expected}")


# ---------------------------------------------------------------- items and their domains


def _movies_dat(path: Path) -> dict[int, Item]:
    return _items(path, "latin-1", "item::title::genre|genre", lambda line: line.split("::"))


def _movies_csv(path: Path) -> dict[int, Item]:
    return _items(path, "utf-8", "movieId,title,genres", _csv_fields, header=True)


def _item_domains_tsv(path: Path) -> dict[int, Item]:
    def fields(line: str) -> list[str]:
        item, domains = line.split("\t")
        return [item, "", domains]

    return _items(path, "utf-8", "item<TAB>domain|domain", fields)


def _u_item(path: Path) -> dict[int, Item]:
    genres = _u_genre(path.with_name("u.genre"))

    def fields(line: str) -> list[str]:
        item, title, _date, _video_date, _url, *flags = line.rstrip("\n").split("|")
        if len(flags) != len(genres) or not set(flags) <= {"0", "1"}:
            raise ValueError(f"{len(flags)} flags, u.genre names {len(genres)}")
        chosen = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
        return [item, title, "|".join(chosen)]

    return _items(path, "latin-1", "item|title|date|date|url|19 flags of 0 or 1", fields)


def _u_genre(path: Path) -> list[str]:
    genres: list[str] = []

    def parse(line: str) -> None:
        if not line.strip():  # the file as shipped ends in an empty line
            return
        genre, number = line.split("|")
        if int(number) != len(genres):
            raise ValueError(f"the next number is {len(genres)}")
        genres.append(genre)

    _read(path, "latin-1", "genre|number", parse)
    return genres


def _csv_fields(line: str) -> list[str]:
    return next(csv.reader([line]))


def _items(
    path: Path,
    encoding: str,
    expected: str,
    fields: Callable[[str], list[str]],
    header: bool = False,
) -> dict[int, Item]:
    items: dict[int, Item] = {}

    def parse(line: str) -> None:
        number, title, domains = fields(line)
        if int(number) in items:
            raise ValueError(f"item {number} stands here for the second time")
        unique = dict.fromkeys(domain.strip() for domain in domains.split("|"))
        items[int(number)] = Item(title, [d for d in unique if d not in NOT_A_DOMAIN])

    _read(path, encoding, expected, parse, header)
    return items


# ---------------------------------------------------------------- interactions


def _ratings(
    path: Path, items: dict[int, Item], separator: str, expected: str, header: bool = False
) -> Log:
    log = Log()
    add_user, add_item, add_time = log.users.append, log.items.append, log.times.append

    def parse(line: str) -> None:
        user, item, rating, time = line.split(separator)
        number = int(item)
        if number not in items:
            raise ValueError(f"item {item} is not among the {len(items)} items")
        float(rating)
        add_user(int(user))
        add_item(number)
        add_time(int(time))

    _read(path, "utf-8", expected, parse, header)
    return log


def _ratings_dat(path: Path, items: dict[int, Item]) -> Log:
    return _ratings(path, items, "::", "user::item::rating::time")


def _ratings_csv(path: Path, items: dict[int, Item]) -> Log:
    return _ratings(path, items, ",", "userId,movieId,rating,timestamp", header=True)


def _u_data(path: Path, items: dict[int, Item]) -> Log:
    return _ratings(path, items, "\t", "user<TAB>item<TAB>rating<TAB>time")


def _sequences_txt(path: Path, items: dict[int, Item]) -> Log:
    log, seen = Log(), set[int]()

    def parse(line: str) -> None:
        user, *sequence = map(int, line.split())
        if user in seen:
            raise ValueError(f"user {user} stands here for the second time")
        if not sequence:
            raise ValueError(f"user {user} has no items")
        unknown = set(sequence).difference(items)
        if unknown:
            raise ValueError(f"item {min(unknown)} is not among the {len(items)} items")
        seen.add(user)
        log.users.extend([user] * len(sequence))
        log.items.extend(sequence)
        log.times.extend(range(len(sequence)))

    _read(path, "utf-8", "user item item ...", parse)
    return log


ItemReader = Callable[[Path], dict[int, Item]]
LogReader = Callable[[Path, dict[int, Item]], Log]
FORMATS: dict[str, tuple[LogReader, dict[str, ItemReader]]] = {
    "ratings.dat": (_ratings_dat, {"movies.dat": _movies_dat}),
    "ratings.csv": (_ratings_csv, {"movies.csv": _movies_csv}),
    "u.data": (_u_data, {"u.item": _u_item}),
    "sequences.txt": (
        _sequences_txt,
        {"movies.dat": _movies_dat, "item_domains.tsv": _item_domains_tsv},
    ),
}
