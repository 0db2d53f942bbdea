"""What differs between two records of a run, in words: settings by name, data by file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

MAX_SHOWN = 4
DATA_LIMITS = ("val_documents", "val_tokens")  # settings of `data` that its hash is taken over
NOT_SCORED = ("seed", "data", "runtime")  # sections of a configuration that its hash leaves out


def settings_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return "train.max_steps 3, now 4; ..." for the settings that decide a score and differ, or nothing."""
    old, new = (
        {k: v for k, v in flatten(plain).items() if k.split(".")[0] not in NOT_SCORED} for plain in (before, now)
    )
    names = [name for name in (*old, *(name for name in new if name not in old)) if old.get(name) != new.get(name)]
    return shorten([f"{name} {show_setting(old, name)}, now {show_setting(new, name)}" for name in names])


def data_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two data sets, or nothing.

    Both: {"train": {path: sha256}, "val": {path: sha256}, "tokenizer": sha256, and further limits by name}. Files are
    compared by their names, as their places do not count.
    """
    words = []
    for split in (name for name in ("train", "val") if name in before and name in now):
        old, new = (key_by_name(data.get(split)) for data in (before, now))
        words += [f"{split} {name} is new" for name in new if name not in old]
        words += [f"{split} {name} is gone" for name in old if name not in new]
        words += [f"{split} {name} differs" for name in new if name in old and old[name] != new[name]]
    if "tokenizer" in before and "tokenizer" in now and before["tokenizer"] != now["tokenizer"]:
        words.append("the tokenizer differs")
    for name in now:
        if name not in ("train", "val", "tokenizer") and name in before and before[name] != now[name]:
            words.append(f"data.{name} {before[name]}, now {now[name]}")
    return shorten(words)


def code_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return both code hashes, short, with the commit of each where one was recorded."""
    return f"{code_name(before)}, now {code_name(now)}"


def code_name(record: Mapping[str, Any]) -> str:
    """Return "code 1a2b3c4d5e6f (commit 1a2b3c4d5e, with changes)"."""
    name, commit = f"code {str(record.get('code_hash'))[:12]}", str(record.get("git_commit") or "unknown")
    if commit == "unknown":
        return name
    return f"{name} (commit {commit[:10]}{', with uncommitted changes' if record.get('git_dirty') else ''})"


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name; tuples as the lists that JSON makes of them."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = as_json(value)
    return found


def as_json(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def key_by_name(files: object) -> dict[str, Any]:
    """Return sha256 by file name."""
    return {PurePath(path).name: sha for path, sha in files.items()} if isinstance(files, Mapping) else {}


def show_setting(settings: Mapping[str, Any], name: str) -> str:
    """Return a setting's value, short."""
    return str(settings[name])[:60] if name in settings else "not set"


def shorten(words: list[str]) -> str:
    """Return at most MAX_SHOWN entries in one line."""
    more = f"; and {len(words) - MAX_SHOWN} more" if len(words) > MAX_SHOWN else ""
    return "; ".join(words[:MAX_SHOWN]) + more
