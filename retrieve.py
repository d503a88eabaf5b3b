"""Fetch real images of a class, with their captions, for `--with_prior_preservation --real_prior`.

    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200
    python retrieve.py --concepts_list concept_list.json --dataset my_captioned_images/

Writes <class_data_dir>/images/N.jpg, caption.txt, urls.txt and images.txt: line i of each belongs to image i.
"""

import argparse
import importlib
import os
import pkgutil
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path

from custom_diffusion.cli.concepts import read_concepts_list
from custom_diffusion.retrieval import sources as source_modules
from custom_diffusion.retrieval.candidates import Source, SourceError
from custom_diffusion.retrieval.captions import ClassWords, words
from custom_diffusion.retrieval.columns import NSFW, TOO_SMALL, WATERMARK
from custom_diffusion.retrieval.scan import NOT_WANTED, Scan
from custom_diffusion.retrieval.sources.dataset import DEFAULT_DATASET

# Modules; they are asked in the order of their names.
SOURCES = [
    importlib.import_module(f"{source_modules.__name__}.{name}")
    for name in sorted(module.name for module in pkgutil.iter_modules(source_modules.__path__))
]
SAVE_SECONDS = 2  # between two notes of how far a dataset has been read
SHARE_WITHOUT_WORDS = 0.3  # of a backend's images; more may show something else


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; a wrong one ends the program with status 2 and a line that names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class_prompt", help="the class, as a word or two: cat, wooden pot")
    add("--class_data_dir", type=Path, help="folder to fill")
    add("--num_class_images", type=int, default=200, metavar="N", help="images wanted in all (default: %(default)s)")
    add(
        "--concepts_list",
        type=Path,
        metavar="JSON",
        help="instead of the two above: every concept's class of this list",
    )
    for source in SOURCES:
        source.add_flags(parser)
    add(
        "--min_size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="least shorter side of an image (default: %(default)s)",
    )
    add(
        "--also", action="append", default=[], metavar="WORD", help="another name of the class: kitten; may be repeated"
    )
    add("--without", action="append", default=[], metavar="WORD", help="leave out captions with it; may be repeated")
    add(
        "--allow_private",
        action="store_true",
        help="also fetch from private networks and this machine, as for images served by yourself",
    )
    add("--num_workers", type=int, default=32, metavar="N", help="downloads at a time (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=10,
        metavar="SECONDS",
        help="for one image, all in all (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for problem in _problems(args):
        parser.error(problem)
    return args


def _problems(args):
    if args.concepts_list is not None and (args.class_prompt is not None or args.class_data_dir is not None):
        yield "--concepts_list: describes the classes; leave --class_prompt and --class_data_dir out"
    if args.concepts_list is None:
        for name in ("class_prompt", "class_data_dir"):
            if getattr(args, name) is None:
                yield f"--{name}: is missing; give it, or --concepts_list with the classes of several concepts"
        if not words(args.class_prompt):
            yield f"--class_prompt: {args.class_prompt!r} has no word; give the class's name, such as cat"
    for name in ("num_class_images", "min_size", "num_workers", "timeout"):
        if not 0 < getattr(args, name) < float("inf"):
            yield f"--{name}: must be more than 0, is {getattr(args, name)}"
    used = _used_sources(args)
    for source in SOURCES:
        yield from source.flag_problems(args, source in used)
    if args.also and args.concepts_list is not None:
        yield "--also: names one class; run each class with --class_prompt and --class_data_dir"
    for name in ("also", "without"):
        for text in getattr(args, name):
            if not words(text):
                yield f"--{name}: {text!r} has no word"


def _used_sources(args):
    """The sources that the user named; without any, the default ones."""
    return [source for source in SOURCES if source.is_named(args)] or [s for s in SOURCES if s.is_default()]


def read_classes(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(class prompt, class folder) of the flags or of each concept in the list, without repetitions.

    Raises:
        ValueError: the list cannot be read or lacks something; one line.
    """
    if args.concepts_list is None:
        return [(args.class_prompt, args.class_data_dir)]
    try:
        entries = read_concepts_list(args.concepts_list)
    except ValueError as error:
        raise ValueError(f"--concepts_list: {error}") from None
    classes = {}
    for place, concept in entries:
        for key in ("class_prompt", "class_data_dir"):
            if not isinstance(concept.get(key), str) or not concept[key].strip():
                raise ValueError(f"--concepts_list: {place}: {key!r} is missing; add it")
        prompt, folder = concept["class_prompt"], Path(concept["class_data_dir"])
        if not words(prompt):
            raise ValueError(f"--concepts_list: {place}: 'class_prompt' has no word")
        if classes.setdefault(folder.resolve(), (prompt, folder))[0] != prompt:
            raise ValueError(
                f"--concepts_list: {place}: {folder} is already the folder of another class; give each class a "
                "'class_data_dir' of its own"
            )
    return list(classes.values())


def choose_sources(args: argparse.Namespace) -> list[Source]:
    """The sources to try, in order."""
    return [source.from_flags(args) for source in _used_sources(args)]


def fill(wanted: ClassWords, class_data_dir: Path, sources: list[Source], args: argparse.Namespace) -> bool:
    """Fill one class folder from the sources, in order; say what happened.

    Returns:
        Whether the folder now has enough images.
    Raises:
        ValueError, OSError: the folder cannot be used.
        SourceError: not one of the sources could be used.
    """
    from custom_diffusion.retrieval.writer import ClassFolder

    folder = ClassFolder(class_data_dir, args.min_size)
    if len(folder.rows) >= args.num_class_images and not folder.dropped:
        print(
            f"{class_data_dir} has {len(folder.rows)} images already, {args.num_class_images} are wanted: nothing to do"
        )
        return True
    print(f"Sources for {wanted.prompt!r}, in order: {'; '.join(source.name for source in sources)}", flush=True)
    try:
        collector, scans, failures = _collect(wanted, folder, sources, args)
    finally:
        folder.close()
    if collector is None:
        raise SourceError(_nothing_reached(failures, args))
    print("".join(f"{line}\n" for source, scan in scans if (line := _was_read(source, scan))), end="")
    if not collector.num_missing:
        print(f"{class_data_dir} has {len(folder.rows)} images with captions; tried {collector.num_tried}")
        return True
    print("".join(f"retrieve.py: {failure}\n" for failure in failures), end="", file=sys.stderr)
    if collector.num_tried or not failures:
        print(_too_few(wanted, class_data_dir, collector, [scan for _, scan in scans], args), file=sys.stderr)
    return False


def _collect(wanted, folder, sources, args):
    """(the collector after its work, or None when no source could be used; (source, scan) of those used; what the failed
    ones said)."""
    from custom_diffusion.retrieval.collect import Collector

    collector, scans, failures = None, [], []
    for source in sources:
        try:
            source.check()
            print(f"Using {source.name}" + "".join(f" ({failure})" for failure in failures), flush=True)
            if collector is None:
                folder.open()
                if folder.dropped:
                    print(f"no longer listed, as they are gone or damaged: {', '.join(folder.dropped)}")
                collector = Collector(
                    folder, args.num_class_images, args.min_size, args.num_workers, args.timeout, args.allow_private
                )
            scans.append((source, Scan(folder.state, source.name)))
            _collect_from(source, wanted, collector, scans[-1][1])
        except SourceError as error:
            failures.append(str(error))
        if collector is not None and not collector.num_missing:
            break
    return collector, scans, failures


def _collect_from(source, wanted, collector, scan):
    """Take one source's candidates, remembering how far it was read; say how many captions lack the class's words."""
    folder = collector.folder
    num_before = len(folder.rows)

    def progress():
        scan.save(folder.tried, every=SAVE_SECONDS)
        return {"read": scan.num_read, "matched": scan.num_matched}

    try:
        candidates = source.candidates(wanted, collector.num_missing, scan)
        collector.run(candidates, f"images of {wanted.prompt!r}", progress, source.is_own)
    finally:
        scan.save(folder.tried)
        kept = folder.rows[num_before:]
        others = [(path, caption) for path, caption, _ in kept if not wanted.matches(caption)]
        if others:
            print(_without_words(wanted, others, len(kept)), file=sys.stderr)


def _without_words(wanted, others, num_kept):
    """What to say of kept images whose captions lack the class's words, as a backend goes by what images show."""
    path, caption = others[0]
    said = (
        f"retrieve.py: {len(others)} of the {num_kept} images found have a caption without the words of {wanted.prompt!r}, "
        f"first {path}: {caption[:80]!r}"
    )
    if len(others) > SHARE_WITHOUT_WORDS * num_kept:
        said += (
            ". So many may show something else: look at them, delete what is wrong and run again with --min_similarity, which "
            "leaves out what is less like the class prompt"
        )
    return said


def _was_read(source, scan):
    """How many rows a source had, and what was left out before anything was fetched."""
    if not scan.num_read:
        return ""
    left_out = ", ".join(f"{reason} ({count:,})" for reason, count in scan.left_out.most_common() if count)
    matched = f", {scan.num_matched:,} of them named the class" if scan.num_matched else ""
    return f"{source.name}: {scan.num_read:,} rows read{matched}" + (f"; left out: {left_out}" if left_out else "")


def _nothing_reached(failures, args):
    """Why no source could be used, as one message."""
    if any(source.is_named(args) for source in SOURCES) or len(failures) == 1:
        return "; ".join(failures)
    what = f"--class_prompt CLASS --class_data_dir FOLDER --num_class_images {args.num_class_images}"
    if args.class_prompt:
        what = what.replace("CLASS", shlex.quote(args.class_prompt)).replace(
            "FOLDER", shlex.quote(str(args.class_data_dir))
        )
    return (
        f"LAION's public retrieval service has been gone since early 2024, and {DEFAULT_DATASET} on the Hugging Face Hub "
        "cannot be reached from here either. Two commands that work:\n"
        f"  python retrieve.py {what} --dataset FILE_OR_FOLDER_OF_CAPTIONED_IMAGES\n"
        f"  python retrieve.py {what} --client_url http://localhost:1234/knn-service --indice_name NAME\n"
        "docs/class_images.md shows how to prepare either. In detail: " + "; ".join(failures)
    )


def _too_few(wanted, class_data_dir, collector, scans, args):
    reasons = ", ".join(f"{count} {reason}" for reason, count in collector.reasons.most_common())
    left_out = sum((scan.left_out for scan in scans), Counter())
    tips = ["another source, --dataset or --client_url for example (what is there is kept and counted)"]
    if collector.reasons["too small"] or left_out[TOO_SMALL]:
        tips.append(f"a --min_size below {args.min_size}")
    tips += [
        f"a higher {flag}"
        for flag, reason in (("--max_nsfw", NSFW), ("--max_watermark", WATERMARK))
        if left_out[reason]
    ]
    if args.min_similarity is not None:
        tips.append(f"a --min_similarity below {args.min_similarity}")
    if collector.num_temporary:
        tips.append(f"the same command later or with a longer --timeout ({collector.num_temporary} may answer then)")
    said = (
        f"retrieve.py: {class_data_dir} has {len(collector.folder.rows)} of {args.num_class_images} images of {wanted.prompt!r}: "
        f"no others could be found ({collector.num_tried} tried{'; ' + reasons if reasons else ''}). "
    )
    unmatched = next((s for s in scans if s.samples and not s.num_matched and not s.left_out[NOT_WANTED]), None)
    if unmatched is not None:
        tips.insert(0, "--also with a word that its captions use")
        samples = "; ".join(repr(caption[:80]) for caption in unmatched.samples)
        said += f"None of {unmatched.num_read:,} rows has a caption that names the class; captions are like {samples}. "
    return f"{said}Try {', or '.join(tips)}."


def main(argv: list[str] | None = None) -> int:
    """Fill every class folder; the exit status."""
    args = parse_args(argv)
    stopped_by = []

    def stop(signum, frame):
        stopped_by.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    status = 0
    try:
        classes = read_classes(args)
    except ValueError as error:
        print(f"retrieve.py: error: {error}", file=sys.stderr)
        return 2
    try:
        sources = choose_sources(args)
        for class_prompt, class_data_dir in classes:
            wanted = ClassWords(class_prompt, tuple(args.also), tuple(args.without))
            if not fill(wanted, class_data_dir, sources, args):
                status = 1
    except KeyboardInterrupt:
        print(
            "\nretrieve.py: stopped; what was found is kept, and the same command goes on from there", file=sys.stderr
        )
        return 128 + stopped_by[0]
    except (ValueError, OSError, SourceError) as error:
        if str(error):
            print(f"retrieve.py: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A source's thread may hang in a name look-up or a read; the usual exit would wait for it, or crash under it.
    os._exit(exit_status)
