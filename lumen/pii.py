"""Addresses of persons and machines, replaced by fixed ones that stand for examples.

E-mail and public IP addresses only. Not telephone numbers: what finds them finds constants,
versions and dates in code. The masks are what RFC 2606, 5737 and 3849 set aside, and are left alone
when they are found: masking twice changes nothing and counts nothing.
"""

from __future__ import annotations

import ipaddress
import re

EMAIL = "email@example.com"
IPV4 = "192.0.2.1"
IPV6 = "2001:db8::1"

# git@github.com:... is nobody's; a@b.dot(c) is arithmetic
FIND_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[\w%+-]+(?:\.[\w%+-]+)*"
    r"@(?!(?:[\w-]+\.)*example\.)(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}(?![\w(-])"
)
FIND_IPV4 = re.compile(r"(?<![\w.+=<>~^-])(?<![\w]/)\d{1,3}(?:\.\d{1,3}){3}(?![.-]?\w)")
FIND_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
VERSION_BEFORE = re.compile(r"(?:version|release|rev|section|chapter|v)[\s:.\"']*$", re.I)


def mask(text: str) -> tuple[str, int]:
    """(text with fixed addresses in place of found ones, how many)."""
    masked = 0
    if "@" in text:
        text, masked = FIND_EMAIL.subn(EMAIL, text)
    counted = [masked]

    def masked_ip(match: re.Match) -> str:
        replacement = mask_of(match)
        counted[0] += replacement != match[0]
        return replacement

    text = FIND_IPV4.sub(masked_ip, text)
    if ":" in text:
        text = FIND_IPV6.sub(masked_ip, text)
    return text, counted[0]


def mask_of(match: re.Match) -> str:
    """What stands in the place of something like an address; itself where it is none, or private.

    1.2.3.4 is a version or a section as a rule: four numbers of one digit stay, and so do numbers
    behind the word version."""
    found = match[0]
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return found
    if not address.is_global:
        return found
    if address.version == 6:
        return IPV6
    before = match.string[max(0, match.start() - 12) : match.start()]
    if len(found) == len("1.2.3.4") or VERSION_BEFORE.search(before):
        return found
    return IPV4
