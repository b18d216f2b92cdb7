"""Loaders on tiny files of every format, and every way in which such files go wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dwl_kernels.examples.data import DataError, Interactions, load
from dwl_kernels.examples.synthetic import synthetic

# Two users and five items. The time stamps are out of order, items 30 and 40 of user 7 share one,
# item 60 has no domain and nobody takes item 99.
MOVIES_DAT = (
    "10::Café, The (1995)::Drama\n20::B (1996)::Comedy|Drama\n30::C::Noir\n"
    "40::D::Drama|Noir\n60::F::unknown\n99::Unseen::War\n"
).encode("latin-1")
RATINGS_DAT = (
    b"7::20::4::200\n7::10::5::100\n3::60::1::9\n7::30::3::300\n7::40::3::300\n3::10::2::8\n"
)
MOVIES_CSV = (
    'movieId,title,genres\n10,"Café, The (1995)",Drama\n20,"A ""B"" (1996)",Comedy|Drama\n'
    "30,C,Noir\n40,D,Drama|Noir\n60,F,(no genres listed)\n99,Unseen,War\n"
).encode()
RATINGS_CSV = b"userId,movieId,rating,timestamp\n" + RATINGS_DAT.replace(b"::", b",")
U_DATA = RATINGS_DAT.replace(b"::", b"\t")
U_GENRE = b"unknown|0\nComedy|1\nDrama|2\nNoir|3\nWar|4\n\n"
U_ITEM = (
    "10|Café, The (1995)|01-Jan-1995||http://a|0|0|1|0|0\n20|B (1996)|||http://b|0|1|1|0|0\n"
    "30|C||||0|0|0|1|0\n40|D||||0|0|1|1|0\n60|F||||1|0|0|0|0\n99|Unseen||||0|0|0|0|1\n"
).encode("latin-1")
SEQUENCES = b"3 10 60\n7 10 20 30 40\n"
ITEM_DOMAINS = b"10\tDrama\n20\tComedy|Drama\n30\tNoir|Noir\n40\tDrama|Noir\n60\t\n99\tWar\n"

FORMATS = {
    "ml-1m": {"movies.dat": MOVIES_DAT, "ratings.dat": RATINGS_DAT},
    "ml-latest-small": {"movies.csv": MOVIES_CSV, "ratings.csv": RATINGS_CSV},
    "ml-100k": {"u.item": U_ITEM, "u.genre": U_GENRE, "u.data": U_DATA},
    "sequences": {"movies.dat": MOVIES_DAT, "sequences.txt": SEQUENCES},
    "sequences with domains": {"item_domains.tsv": ITEM_DOMAINS, "sequences.txt": SEQUENCES},
}

Write = Callable[[dict[str, bytes]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_files(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write_files


@pytest.mark.parametrize("files", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_interactions(write: Write, files: dict[str, bytes]) -> None:
    data = load(write(files))
    # Items 10, 20, 30, 40, 60 become 0 to 4; domains are in alphabetical order.
    assert data.domain_names == ["Comedy", "Drama", "Noir"]
    assert [data.sequence(u).tolist() for u in range(data.num_users)] == [[0, 4], [0, 1, 2, 3]]
    assert data.item_domains.tolist() == [[1, -1], [0, 1], [2, -1], [1, 2], [-1, -1]]
    assert data.users.tolist() == [0, 0, 1, 1, 1, 1]
    assert data.domain_sizes().tolist() == [1, 4, 2]
    if "item_domains.tsv" not in files:
        assert data.titles[0] == "Café, The (1995)"


def test_quoted_titles_are_read_as_csv_has_them(write: Write) -> None:
    assert load(write(FORMATS["ml-latest-small"])).titles[1] == 'A "B" (1996)'


def test_windows_line_ends_make_no_difference(write: Write) -> None:
    files = {name: text.replace(b"\n", b"\r\n") for name, text in FORMATS["ml-1m"].items()}
    data = load(write(files))
    assert data.domain_names == ["Comedy", "Drama", "Noir"]
    assert data.sequence(1).tolist() == [0, 1, 2, 3]


BROKEN = [
    # format, file, what to replace, by what (None: the file is missing), what the message says
    (
        "ml-1m",
        "ratings.dat",
        b"7::10::5::100",
        b"7::10::5",
        "line 2: expected user::item::rating::",
    ),
    ("ml-1m", "ratings.dat", b"7::10::5::100", b"7::10::5::1::1", "line 2: expected user::item"),
    ("ml-1m", "ratings.dat", b"3::60", b"three::60", "line 3: expected user::item::rating::time"),
    ("ml-1m", "ratings.dat", b"::9\n", b"::soon\n", "line 3: .*'soon"),
    ("ml-1m", "ratings.dat", b"::3::300\n", b"::good::300\n", "line 4: .*'good'"),
    ("ml-1m", "ratings.dat", b"7::30", b"7::31", "line 4: .*item 31 is not among the 6 items"),
    ("ml-1m", "ratings.dat", b"7::20", b"9" * 30 + b"::20", "line 1: expected user::item"),
    (
        "ml-1m",
        "ratings.dat",
        RATINGS_DAT,
        b"",
        "line 1: the file ends here; expected lines of user",
    ),
    ("ml-1m", "ratings.dat", b"::", b",", "line 1: expected user::item::rating::time"),
    ("ml-1m", "ratings.dat", RATINGS_DAT, b"7::10::5::1\n", "no user has 4 items"),
    (
        "ml-1m",
        "movies.dat",
        MOVIES_DAT,
        b"",
        "line 1: the file ends here; expected lines of item::",
    ),
    ("ml-1m", "movies.dat", b"30::C::Noir", b"30::C", "line 3: expected item::title::genre"),
    ("ml-1m", "movies.dat", b"30::C::Noir", b"C::30::Noir", "line 3: expected item::title::genre"),
    (
        "ml-1m",
        "movies.dat",
        b"30::C",
        b"20::C",
        "line 3: .*item 20 stands here for the second time",
    ),
    ("ml-1m", "movies.dat", MOVIES_DAT, b"10::A::unknown\n", "no item has a domain"),
    ("ml-1m", "movies.dat", MOVIES_DAT, None, "ratings.dat is there, but no movies.dat"),
    ("ml-latest-small", "ratings.csv", b"userId,", b"user,", "line 1: expected userId,movieId"),
    ("ml-latest-small", "ratings.csv", b"7,10,5,100", b"7,10", "line 3: expected userId,movieId"),
    ("ml-latest-small", "ratings.csv", RATINGS_CSV[32:], b"", "line 2: the file ends here"),
    ("ml-latest-small", "movies.csv", b"movieId", b"id", "line 1: expected movieId,title,genres"),
    ("ml-latest-small", "movies.csv", b'"Caf', b"Caf", "line 2: expected movieId,title,genres"),
    ("ml-latest-small", "movies.csv", b"C,Noir", b"C\xff,Noir", "line [0-9]+: not utf-8 text"),
    ("ml-100k", "u.data", b"7\t10\t5\t100", b"7 10 5 100", "line 2: expected user<TAB>item"),
    ("ml-100k", "u.data", U_DATA, b"", "u.data, line 1: the file ends here"),
    ("ml-100k", "u.item", b"|0|0|0|1|0\n40", b"|0|0|1|0\n40", "line 3: .*4 flags, u.genre names 5"),
    ("ml-100k", "u.item", b"|0|0|0|1|0\n40", b"|0|0|0|7|0\n40", "line 3: .*flags"),
    ("ml-100k", "u.item", b"30|C||||", b"30|C|", "line 3: expected item|title"),
    ("ml-100k", "u.genre", b"Drama|2", b"Drama", r"u.genre, line 3: expected genre\|number"),
    ("ml-100k", "u.genre", b"Drama|2", b"Drama|5", "u.genre, line 3: .*the next number is 2"),
    ("ml-100k", "u.genre", U_GENRE, None, "u.genre: No such file"),
    ("sequences", "sequences.txt", b"7 10 20", b"7 10 x", "line 2: expected user item item"),
    ("sequences", "sequences.txt", b"7 10 20", b"7 10 77", "line 2: .*item 77 is not among the 6"),
    ("sequences", "sequences.txt", b"3 10 60", b"3", "line 1: .*user 3 has no items"),
    ("sequences", "sequences.txt", b"3 10 60", b"", "line 1: expected user item item"),
    ("sequences", "sequences.txt", b"3 10", b"7 10", "line 2: .*user 7 stands here for the second"),
    ("sequences", "sequences.txt", SEQUENCES, b"", "line 1: the file ends here"),
    ("sequences", "sequences.txt", b"3 10 60", b"3 10.5 60", "line 1: expected user item item"),
    ("sequences with domains", "item_domains.tsv", b"30\t", b"30 ", "line 3: expected item<TAB>"),
    ("sequences with domains", "item_domains.tsv", ITEM_DOMAINS, None, "no movies.dat or item_dom"),
]


@pytest.mark.parametrize(("kind", "file", "old", "new", "message"), BROKEN)
def test_broken_files_are_named_with_line_and_expectation(
    write: Write, kind: str, file: str, old: bytes, new: bytes | None, message: str
) -> None:
    files = dict(FORMATS[kind])
    assert old in files[file]
    if new is None:
        del files[file]
    else:
        files[file] = files[file].replace(old, new)
    folder = write(files)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ml-2m: there is no such folder"):
        load(tmp_path / "ml-2m")


def test_file_in_place_of_a_folder_is_named(write: Write) -> None:
    folder = write({"ratings.dat": RATINGS_DAT})
    with pytest.raises(DataError, match=r"ratings\.dat: is a file, give its folder"):
        load(folder / "ratings.dat")


def test_unknown_folder_says_what_is_expected_and_what_was_found(write: Write) -> None:
    with pytest.raises(DataError, match=r"expected ratings\.dat with .*; found nothing"):
        load(write({}))
    with pytest.raises(DataError, match=r"found notes\.txt"):
        load(write({"notes.txt": b"hello"}))


def test_data_error_is_a_value_error() -> None:
    assert issubclass(DataError, ValueError)


# ---------------------------------------------------------------- the synthetic catalogue


def test_same_seed_gives_the_same_catalogue() -> None:
    # Large enough that two seeds cannot agree by chance.
    first, again, other = (synthetic(seed, users=50, items=200, length=20) for seed in (3, 3, 4))
    for name in ("items", "offsets", "item_domains"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.offsets, other.offsets)


def test_synthetic_catalogue_keeps_the_promises_of_the_structure() -> None:
    data = synthetic(users=300, items=400, domains=8, length=30)
    assert np.array_equal(np.unique(data.items), np.arange(data.num_items))
    for user in range(data.num_users):
        assert len(set(data.sequence(user))) == len(data.sequence(user))
    assert data.lengths.min() >= 10
    assert data.lengths.max() == 30
    assert (data.item_domains[:, 0] >= 0).all()
    assert (data.item_domains[:, 0] != data.item_domains[:, 1]).all()
    assert (data.item_domains[:, 1] >= 0).mean() == pytest.approx(0.08, abs=0.05)


def test_synthetic_domains_have_zipf_sizes() -> None:
    # 600 users make 13,500 interactions, so the fit of the exponent has little noise.
    sizes = synthetic(users=600, items=400, domains=8, zipf=1.0, length=30).domain_sizes()
    slope = np.polyfit(np.log(np.arange(1, 9)), np.log(sizes), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.25)


def test_synthetic_order_can_be_learned() -> None:
    # The commonest follower of an item, counted on one half of the users, predicts the other half
    # far better than the commonest item does.
    data = synthetic()
    pairs = [
        (a, b, u % 2)
        for u in range(len(data.lengths))
        for a, b in zip(*_pairs(data, u), strict=True)
    ]
    follows = np.zeros((data.num_items, data.num_items))
    for a, b, half in pairs:
        follows[a, b] += half == 0
    held_out = [(a, b) for a, b, half in pairs if half == 1]
    by_order = np.mean([follows[a].argmax() == b for a, b in held_out])
    commonest = np.bincount(data.items).argmax()
    by_count = np.mean([commonest == b for _, b in held_out])
    assert by_order > 5 * by_count


def _pairs(data: Interactions, user: int) -> tuple[list[int], list[int]]:
    sequence = data.sequence(user).tolist()
    return sequence[:-1], sequence[1:]


def test_too_few_synthetic_items_are_refused() -> None:
    with pytest.raises(ValueError, match="30 items are too few for 12 domains"):
        synthetic(items=30)


# ---------------------------------------------------------------- real data, where there is some


def real_data(name: str) -> Path:
    root = Path(__file__).resolve().parents[1]
    base = Path(os.environ.get("DWL_KERNELS_DATA", root.parent / "shared" / "data"))
    if not (base / name).is_dir():
        pytest.skip(f"no {name} in {base}; DWL_KERNELS_DATA names the folder of the data sets")
    return base / name


def test_ml_1m_has_its_published_numbers() -> None:
    folder = real_data("ml-1m")
    started = time.process_time()
    data = load(folder)
    seconds = time.process_time() - started
    sizes = dict(zip(data.domain_names, data.domain_sizes().tolist(), strict=True))
    assert (data.num_users, data.num_items, len(data.items)) == (6040, 3706, 1_000_209)
    assert (len(sizes), sizes["Comedy"], sizes["Documentary"]) == (18, 356_580, 7_910)
    assert seconds < 5  # about 1 s when the machine is idle


def test_ml_latest_small_has_its_published_numbers() -> None:
    data = load(real_data("ml-latest-small"))
    assert (data.num_users, data.num_items, len(data.items)) == (610, 9724, 100_836)
    assert len(data.domain_names) == 19
    assert "American President, The (1995)" in data.titles


def test_amazon_beauty_has_its_published_numbers() -> None:
    data = load(real_data("amazon-beauty"))
    assert (data.num_users, data.num_items, len(data.items)) == (22_363, 12_101, 198_502)
    assert data.domain_names[0] == "Bath & Body"
    assert data.item_domains.shape == (12_101, 1)
