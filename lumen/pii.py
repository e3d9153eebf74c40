"""Addresses of persons and machines, replaced by fixed ones that stand for examples.

E-mail, public IP addresses, telephone numbers written with their country (+49 30 ...): what can be
told from code. In 868 MB of code and headers nothing else was taken for a telephone number; other
ways to write one cannot be told from constants, and stay. The masks are set aside for examples
(RFC 2606, 5737, 3849; 555-01xx), and are left alone: masking twice changes and counts nothing.
"""

from __future__ import annotations

import ipaddress
import re

EMAIL = "email@example.com"
IPV4 = "192.0.2.1"
IPV6 = "2001:db8::1"
PHONE = "+1-202-555-0100"

# A pattern that begins with a set of characters is searched for at ten times the speed of one that
# begins with what must not stand before it: so that comes behind the first character.
HAS_EMAIL = re.compile(r"@(?<=[\w%+-]@)[\w-]+\.")
# git@github.com:... is nobody's; a@b.dot(c) is arithmetic
FIND_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[\w%+-]+(?:\.[\w%+-]+)*"
    r"@(?!(?:[\w-]+\.)*example\.)(?:[\w-]+\.)+[A-Za-z]{2,24}(?![\w(-])"
)
FIND_IPV4 = re.compile(r"\d(?<![\w.+=<>~^-]\d)(?<!\w/\d)\d{0,2}(?:\.\d{1,3}){3}(?![.-]?\w)")
FIND_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
FIND_PHONE = re.compile(
    r"\+(?<![\w+./:=*-]\+)(?!1-202-555-01)[1-9]\d{0,2}[ .-](?:\(\d{1,4}\)[ -]?)?"
    r"\d{2,4}(?:[ .-]\d{2,8}){1,4}(?![\w-])"
)


def mask(text: str) -> tuple[str, int]:
    """(text with fixed addresses in place of found ones, how many)."""
    masked = 0

    def masked_ip(match: re.Match) -> str:
        nonlocal masked
        replacement = mask_of_ip(match[0])
        masked += replacement != match[0]
        return replacement

    text = FIND_IPV4.sub(masked_ip, text)
    if ":" in text:
        text = FIND_IPV6.sub(masked_ip, text)
    if HAS_EMAIL.search(text):
        text, n = FIND_EMAIL.subn(EMAIL, text)
        masked += n
    if "+" in text:
        text, n = FIND_PHONE.subn(PHONE, text)
        masked += n
    return text, masked


def mask_of_ip(found: str) -> str:
    """What stands in the place of something like an address; itself where it is none, or private.

    1.2.3.4 and 23.2.2.11 are versions and sections as a rule: four numbers below 100 stay, and with
    them one public address in forty."""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return found
    if not address.is_global or address.is_multicast:
        return found
    if address.version == 6:
        return IPV6
    return IPV4 if max(address.packed) >= 100 else found
