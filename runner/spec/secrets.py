"""Which values of a spec look like a secret, by their name or by their shape: a spec is copied into every record."""

from __future__ import annotations

import re

# the last words of a name that holds one; TOKENS, TOKENIZER and KEYS count things
NAMES = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|APIKEY|(?:API|ACCESS|PRIVATE|SECRET|ACCOUNT|AUTH|SSH|"
    r"ENCRYPTION|LICENSE)_?KEY|TOKEN|AUTH)(?:_ID|_VALUE|_B64|_BASE64)?$",
    re.IGNORECASE,
)
TOKEN_NAME = re.compile(r"(?:^|_)(?:TOKEN|AUTH)$", re.IGNORECASE)
MIN_TOKEN = 8  # characters: PAD_TOKEN=<pad> is no secret
SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|"
    r"xox[abprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|"
    r"eyJ[\w-]{10,}\.[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@|\bBearer\s+\S{16,}"
)
RANDOM_TEXT = re.compile(r"[A-Za-z0-9+/_=-]{32,}")
HEX = re.compile(r"[0-9a-fA-F]+")


def looks_like_secret(name: str, value: str) -> bool:
    """Return whether a variable is probably a password, a key or a token: by its name, or its value by itself."""
    if not value:
        return False
    if NAMES.search(name) and not is_number(value):
        return not TOKEN_NAME.search(name) or len(value) >= MIN_TOKEN
    return has_shape_of_secret(value)


def has_shape_of_secret(value: str) -> bool:
    """Return whether a value has the shape of a known kind of key, or is long, random text that is no path or hash."""
    if SHAPES.search(value):
        return True
    if not RANDOM_TEXT.fullmatch(value) or HEX.fullmatch(value) or value.startswith(("/", "./")):
        return False
    kinds = (str.islower, str.isupper, str.isdecimal)
    if not all(any(kind(letter) for letter in value) for kind in kinds):
        return False
    words = re.split(r"[/_=+-]", value)
    return max(map(len, words)) >= 20  # names are made of words; random text has few places to break


def is_number(value: str) -> bool:
    """Return whether a value is a plain number."""
    try:
        float(value)
    except ValueError:
        return False
    return True
