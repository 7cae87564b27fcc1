"""pii: put placeholders where addresses, phone numbers and numbers of cards stand.

    e-mail addresses          <EMAIL>
    public IP addresses       <IP>            version 4 and 6; private and reserved ones stay, they name nobody
    phone numbers             <PHONE>         international with +, or North American, of 10 to 15 digits
    numbers of cards, IBANs   <CARD>, <IBAN>  whose check digits are right

FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.8) anonymises e-mail and public IP addresses; Dolma (Soldaini
et al. 2024, arXiv:2402.00159, section 5.2) phone numbers as well. Departs from them: check digits decide on cards and
IBANs (Luhn; ISO 7064), so that other long numbers stay; a document is never dropped. Names of people and postal
addresses are not masked: no rule knows them.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from modicum.core.errors import unknown
from modicum.data.document import Document, Drop
from modicum.data.steps import Step

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}"
_PATTERNS = {
    "email": re.compile(rf"(?<![\w.+-])[A-Za-z0-9][\w.+%'-]*@{_HOST}"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "card": re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d.-]?\d)"),
    "phone": re.compile(
        r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|\.\d)"
    ),
    "ip": re.compile(
        r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w:]|\.\d)"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    kinds: list[str] = field(default_factory=lambda: list(_PATTERNS))  # of what is masked

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in _PATTERNS:
                raise ValueError(str(unknown("kind of pii", kind, _PATTERNS)))


class Pii(Step):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.counts: Counter[str] = Counter()

    def each(self, document: Document) -> Iterable[Document | Drop]:
        text = document.text
        for kind, pattern in _PATTERNS.items():
            if kind in self.config.kinds:
                text = pattern.sub(lambda match, kind=kind: self._mask(kind, match[0]), text)  # type: ignore[misc]
        yield document if text == document.text else dataclasses.replace(document, text=text)

    def _mask(self, kind: str, text: str) -> str:
        if not VALID[kind](text):
            return text
        self.counts[kind] += 1
        return f"<{kind.upper()}>"

    def close(self) -> dict[str, float]:
        return {f"{kind}_masked": n for kind, n in sorted(self.counts.items())}


def luhn(text: str) -> bool:
    """Whether a card number's check digit is right (ISO/IEC 7812-1)."""
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return total % 10 == 0 and len(set(digits)) > 1


def iban(text: str) -> bool:
    """Whether an account number is 1 modulo 97 with its first four characters behind (ISO 13616)."""
    compact = text.replace(" ", "")
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def public(text: str) -> bool:
    """Whether an IP address is anybody's on the internet."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


VALID: dict[str, Callable[[str], bool]] = {"email": bool, "iban": iban, "card": luhn, "phone": bool, "ip": public}
