"""The seed in the name of a log file, told from the other numbers that names hold (versions, lengths, hardware)."""

from __future__ import annotations

import re

NAMED_SEED = re.compile(r"(?<![a-z])seed[_\-=.]?(\d{1,18})", re.IGNORECASE)
SHORT_SEED = re.compile(r"(?:^|[_\-.])s(\d{1,18})(?=[_\-.]|$)", re.IGNORECASE)
BARE_SEED = re.compile(r"(?:^|[_\-.])(?:train|log|output|out|stdout|console)?[_\-.]?(\d{1,7})$", re.IGNORECASE)
STRIDES = (16, 32, 64, 128, 256, 512, 1024)  # eval_s64.log is a stride of the sliding window
WORDS_BEFORE_OTHER_NUMBERS = re.compile(
    r"(?:^|[^a-z])(?:step|steps|seq|len|rank|gpu|gpus|part|v|ver|version|run|exp|trial|pr|node|attempt|try|rerun|iter|epoch|ckpt|stride|n|"
    r"layers?|fold|phase|stage|job|pid|slot|dim|batch|x|of|int|h)[_\-.]?\d+$", re.IGNORECASE,
)  # fmt: skip
IDENTIFIER = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-", re.IGNORECASE)


def seed_in_name(path: str) -> int | None:
    """Return the seed in a log's name or its folders': train_seed42.log, train0.txt, 42.log, seed_7/train.log.

    None for train.log and for other numbers, as in run_seq16384.log, train_v2.txt or train_rtx4090.log.
    """
    *folders, name = path.replace("\\", "/").split("/")
    stem = re.sub(r"(?:\.(?:log|txt|out|jsonl|json|stdout|stderr|err))+$", "", name, flags=re.IGNORECASE)
    if match := NAMED_SEED.search(stem):
        return int(match.group(1))
    for match in SHORT_SEED.finditer(stem):
        if int(match.group(1)) not in STRIDES:
            return int(match.group(1))
    match = BARE_SEED.search(stem)
    if match and not WORDS_BEFORE_OTHER_NUMBERS.search(stem) and not IDENTIFIER.search(stem):
        return int(match.group(1))
    for folder in reversed(folders):
        if match := NAMED_SEED.search(folder) or re.fullmatch(r"s(\d{1,18})", folder):
            return int(match.group(1))
    return None
