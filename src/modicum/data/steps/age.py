"""age: keep documents of a window of time, by the date in their metadata.

    drop   date < since ("too-old"),   date >= before ("too-new"),   no date ("undated", unless undated=keep)

Dates are compared as far as they are written: 2016, 2016-05 and 2016-05-17T08:00:00Z are dates; before=2016 keeps
2015-12-31. Pages of a crawl have the crawl's date, records that of their field `date`.

The age of pretraining data in Longpre et al. 2023, arXiv:2305.13169, section 4: corpora up to a cutoff. A crawl's date
is when a page was fetched, not when it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from modicum.data.document import Document, Drop
from modicum.data.steps import Step

NOT_MEASURABLE = "it keeps a window of time, and the bench has no question that depends on it"
DATE = re.compile(r"\d{4}(-\d{2}(-\d{2})?)?")


@dataclass(frozen=True, kw_only=True)
class Config:
    since: str = ""  # first date that is kept: 2013, 2013-05 or 2013-05-17; "": any
    before: str = ""  # first date that is not
    undated: str = "drop"  # documents without a date: drop or keep

    def __post_init__(self) -> None:
        for name in ("since", "before"):
            if (value := getattr(self, name)) and not DATE.fullmatch(value):
                raise ValueError(f"{name}={value!r} is not a date; write 2013, 2013-05 or 2013-05-17 in quotes")
        if self.since and self.before and self.since >= self.before:
            raise ValueError("since must come before `before`")
        if self.undated not in ("drop", "keep"):
            raise ValueError("undated is drop or keep")


TOY = Config(undated="keep")


class Age(Step):
    config: Config

    def each(self, document: Document) -> Iterable[Document | Drop]:
        match, config = DATE.match(str(document.meta.get("date", ""))), self.config
        if match is None:
            yield document if config.undated == "keep" else Drop(document.id, "undated")
        elif config.since and match[0] < config.since[: len(match[0])]:
            yield Drop(document.id, "too-old", f"{match[0]}, kept since {config.since}")
        elif config.before and match[0] >= config.before:
            yield Drop(document.id, "too-new", f"{match[0]}, kept before {config.before}")
        else:
            yield document
