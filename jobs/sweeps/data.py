"""`seedsweep data`: make token shards from installed docstrings or own documents, or fetch the published ones."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from runner.errors import EXIT_INTERRUPTED, EXIT_OK

if TYPE_CHECKING:
    from model.corpus.writer import Corpus

LINE_EVERY_S = 10.0  # in a log
REDRAW_EVERY_S = 0.2  # on a terminal


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the ways to get data."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    builtin = kinds.add_parser("builtin", help="docstrings of installed packages, offline")
    builtin.add_argument("--reuse", action="store_true", help="keep an intact corpus that is already there")
    text = kinds.add_parser("text", help="own documents: .txt folders, .jsonl, .jsonl.gz, .parquet")
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders, read in this order")
    tokenizer = text.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model to use")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces (default 1024)")
    text.add_argument("--column", default="text", help="field or column that holds the text (default: text)")
    split = text.add_mutually_exclusive_group()
    split.add_argument("--val-documents", type=int, metavar="N", help="the first N documents are for validation")
    split.add_argument("--val-frac", type=float, metavar="F", help="this part of the documents is for validation")
    text.add_argument("--name", default="text", help="first part of the shards' names (default: text)")
    fineweb = kinds.add_parser("fineweb", help="the published FineWeb shards and tokenizer, from the Hugging Face hub")
    fineweb.add_argument("--shards", type=int, metavar="N", help="the first N training shards (default: all)")
    fineweb.add_argument("--repo", metavar="OWNER/NAME", help="dataset repository on the hub")
    fineweb.add_argument("--variant", metavar="spN", help="tokenizer variant, by vocabulary size (default sp8192)")
    fineweb.add_argument("--revision", metavar="REV", help="branch, tag or commit (default main)")
    for kind in (builtin, text, fineweb):
        kind.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the corpus")


def execute(args: argparse.Namespace) -> int:
    """Make or fetch a corpus and print what it holds."""
    progress = ProgressLine(sys.stderr)
    if args.kind == "builtin":
        from model.corpus.builtin import NAME, build_builtin
        from model.corpus.writer import is_intact

        if args.reuse and is_intact(args.out, name=NAME):
            print(f"{args.out}: intact corpus kept")
            return EXIT_OK
        corpus = build_builtin(args.out, progress)
    elif args.kind == "fineweb":
        from model.corpus.fineweb import FetchOptions, fetch_fineweb

        given = {name: getattr(args, name) for name in ("repo", "variant", "revision") if getattr(args, name)}
        try:
            corpus = fetch_fineweb(args.out, FetchOptions(num_shards=args.shards, **given), progress)
        except ConnectionError as error:
            progress.close()
            print(f"seedsweep: interrupted: {error}", file=sys.stderr)
            return EXIT_INTERRUPTED
        warn_of_text(corpus, progress)
    else:
        corpus = make_text_corpus(args, progress)
    progress.close()
    print_corpus(corpus)
    return EXIT_OK


def make_text_corpus(args: argparse.Namespace, progress: ProgressLine) -> Corpus:
    """Build a corpus from the documents that the options name."""
    from model.corpus.text import TextOptions, build_text, gather_inputs

    options = TextOptions(
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        column=args.column,
        val_documents=args.val_documents,
        val_frac=args.val_frac,
        name=args.name,
    )
    notes = gather_inputs(args.paths).notes()
    corpus = build_text(args.paths, args.out, options, progress)
    if args.tokenizer is None and not options.has_split:
        notes.append("no document is for training, so the tokenizer was trained on the validation documents")
    progress.close()
    for note in notes:
        print(f"note: {note}")
    return corpus


def warn_of_text(corpus: Corpus, progress: ProgressLine) -> None:
    """Say now if bits per byte cannot be told over what was fetched: a run would refuse it."""
    from model.data.shards import list_shards
    from model.data.text_check import text_fault
    from model.data.tokenizer import load_tokenizer
    from model.data.validation import load_validation

    progress("text", 0, None, {})
    shards = list_shards(f"{corpus.folder}/{corpus.name}_val_*.bin")
    fault = text_fault(load_tokenizer(corpus.tokenizer), load_validation(shards, vocab_size=corpus.vocab_size))
    if fault:
        progress.close()
        print(f"warning: a run over this corpus will be refused: {fault}")


def print_corpus(corpus: Corpus) -> None:
    """Print documents, tokens and bytes of each split, and first what a score over them would not say by itself."""
    for line in describe_faithfulness(corpus):
        print(line)
    print(f"{corpus.folder}: corpus {corpus.name}, tokenizer {corpus.tokenizer.name} of {corpus.vocab_size} pieces")
    print(f"{'split':<6}{'documents':>12}{'tokens':>16}{'bytes':>16}")
    for split, counts in corpus.splits.items():
        text_bytes = "-" if counts.tokens and not counts.text_bytes else str(counts.text_bytes)
        print(f"{split:<6}{counts.documents:>12}{counts.tokens:>16}{text_bytes:>16}")


def describe_faithfulness(corpus: Corpus) -> list[str]:
    """Return lines on what a score over the corpus would not say by itself."""
    train, val = corpus.splits["train"], corpus.splits["val"]
    lines = []
    if corpus.num_in_both:
        lines.append(
            f"warning: {corpus.num_in_both} of {val.documents} validation documents are training documents too; "
            "scores will be better than on unseen text"
        )
    if train.unknown_tokens:
        lines.append(f"note: {train.unknown_tokens} of {train.tokens} training tokens are unknown to the tokenizer")
    if val.counted_bytes != val.text_bytes:
        lines.append(
            f"note: bits per byte count the {val.counted_bytes} bytes that the tokenizer gives back of the "
            f"{val.text_bytes} bytes of validation text"
        )
    return lines


class ProgressLine:
    """The report callback of data commands: one changing line on a terminal, now and then a line elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        from runner.view.progress import can_redraw

        self.stream = stream
        self.is_terminal = can_redraw(stream)
        self._phase = ""
        self._next_s = 0.0

    def __call__(self, phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
        """Show where the work is, at once when a phase begins and then not too often."""
        now = time.monotonic()
        if phase == self._phase and now < self._next_s:
            return
        share = f"{step}" if total is None else f"{step}/{total} ({100 * step // max(total, 1)}%)"
        line = " ".join([f"{phase}: {share}", *(f"{name}={value}" for name, value in metrics.items())])
        if self.is_terminal:
            self.stream.write(f"\r\x1b[K{line[:110]}")
            self._next_s = now + REDRAW_EVERY_S
        else:
            self.stream.write(line + "\n")
            self._next_s = now + LINE_EVERY_S
        self._phase = phase
        self.stream.flush()

    def close(self) -> None:
        """Take the changing line off a terminal."""
        if self.is_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
