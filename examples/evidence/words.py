"""Text as words: the King James Bible, and Python's own documentation where a moment counts.

Sources: Debian's bible-kjv-text (the text's copyright has expired), read by the program of
bible-kjv (GPL); the topics of `pydoc`, which ship inside Python.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pydoc_data.topics import topics
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from examples.evidence.packages import file_of

Source = Literal["bible", "topics"]
UNKNOWN = 0  # all words that are not among the most frequent ones


class Text(NamedTuple):
    """A text in three parts, each (n,) int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def load(source: Source, vocabulary: int) -> Text:
    """Return a text as the numbers of its words: 90 % to train on, 5 % each to tune and to test.

    Chapters come in an order drawn once, so that all parts have the same kinds of them.

    Args:
        source: Which text.
        vocabulary: Different numbers; the most frequent words have one of their own.
    """
    chapters = _bible() if source == "bible" else [topics[name] for name in sorted(topics)]
    order = torch.randperm(len(chapters), generator=torch.Generator().manual_seed(0)).tolist()
    text = "\n".join(chapters[each] for each in order).lower()
    words = re.findall(r"[a-z]+|[^\sa-z0-9]", text)
    frequent = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    number = {word: index for index, word in enumerate(frequent, start=1)}
    tokens = torch.tensor([number.get(word, UNKNOWN) for word in words])
    cuts = [len(tokens) * share // 100 for share in (90, 95)]
    return Text(*(part.clone() for part in tokens.tensor_split(cuts)))


def _bible() -> list[str]:
    data = file_of("bible-kjv-text", "usr/lib/bible.data", "The King James Bible")
    program = file_of("bible-kjv", "usr/bin/bible", "The program that reads the Bible")
    done = subprocess.run(
        [program, "-p", str(data.parent), "-l100000", "-f", "gen1:1-rev22:21"],
        capture_output=True,
        text=True,
        check=True,
    )
    verses: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        found = re.match(r"\s*(\w+ ?\d+):\d+ (.*)", line)
        if found:
            verses.setdefault(found[1], []).append(found[2])
    return ["\n".join(lines) for lines in verses.values()]
