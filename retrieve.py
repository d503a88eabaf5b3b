"""Fetch real images of a class, with their captions, for `--with_prior_preservation --real_prior`.

    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200
    python retrieve.py --concepts_list concept_list.json --dataset my_captioned_pictures/

Writes <class_data_dir>/images/N.jpg, caption.txt, urls.txt and images.txt: line i of each belongs to picture i.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path

from custom_diffusion.retrieval.backend import LAION_URL, KnnBackend, default_url
from custom_diffusion.retrieval.candidates import SourceError, words
from custom_diffusion.retrieval.dataset import CaptionedDataset

DEFAULT_DATASET = "kakaobrain/coyo-700m"  # 747 million captions and URLs, open to everybody


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
    add("--client_url", help="clip-retrieval backend (default: $CLIP_RETRIEVAL_URL, else LAION's, gone since 2024)")
    add("--indice_name", default="laion_400m", help="the backend's index (default: %(default)s)")
    add("--aesthetic_weight", type=float, default=0.1, metavar="W", help="0 to 1; the backend's (default: %(default)s)")
    add(
        "--min_similarity", type=float, metavar="S", help="least CLIP similarity of a backend's row to the class prompt"
    )
    add(
        "--dataset", metavar="NAME_OR_PATH", help="captioned dataset: of the Hugging Face Hub, a local file or a folder"
    )
    add("--split", help="of the dataset (default: train)")
    add("--caption_column", help="of the dataset (default: detected, as are the next two)")
    column = parser.add_mutually_exclusive_group()
    column.add_argument("--url_column", help="column with addresses of pictures")
    column.add_argument("--image_column", help="column with the pictures themselves")
    add(
        "--min_size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="least shorter side of a picture (default: %(default)s)",
    )
    add("--num_workers", type=int, default=32, metavar="N", help="downloads at a time (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=10,
        metavar="SECONDS",
        help="for one picture, all in all (default: %(default)s)",
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
    if not 0 <= args.aesthetic_weight <= 1:
        yield f"--aesthetic_weight: must be from 0 to 1, is {args.aesthetic_weight}"
    if args.min_similarity is not None and not -1 <= args.min_similarity <= 1:
        yield f"--min_similarity: must be from -1 to 1, is {args.min_similarity}"
    if args.client_url is not None and not args.client_url.startswith(("http://", "https://")):
        yield f"--client_url: must start with http:// or https://, is {args.client_url!r}"
    for name in ("split", "caption_column", "url_column", "image_column"):
        if getattr(args, name) is not None and args.dataset is None:
            yield f"--{name}: belongs to --dataset, which is missing"


def read_classes(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(class prompt, class folder) of the flags or of each concept in the list, without repetitions.

    Raises:
        ValueError: the list cannot be read or lacks something; one line.
    """
    if args.concepts_list is None:
        return [(args.class_prompt, args.class_data_dir)]
    try:
        concepts = json.loads(args.concepts_list.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--concepts_list: cannot read {args.concepts_list}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--concepts_list: {args.concepts_list} is not valid JSON: {error}") from None
    if not isinstance(concepts, list) or not concepts or not all(isinstance(concept, dict) for concept in concepts):
        raise ValueError(f"--concepts_list: {args.concepts_list} must hold a list of concepts, [{{...}}, ...]")
    classes = {}
    for number, concept in enumerate(concepts, start=1):
        for key in ("class_prompt", "class_data_dir"):
            if not isinstance(concept.get(key), str) or not concept[key].strip():
                raise ValueError(f"--concepts_list: {args.concepts_list}, concept {number}: {key!r} is missing; add it")
        prompt, folder = concept["class_prompt"], Path(concept["class_data_dir"])
        if not words(prompt):
            raise ValueError(f"--concepts_list: {args.concepts_list}, concept {number}: 'class_prompt' has no word")
        if classes.setdefault(folder.resolve(), (prompt, folder))[0] != prompt:
            raise ValueError(
                f"--concepts_list: {args.concepts_list}, concept {number}: {folder} is already the folder of another "
                f"class; give each class a 'class_data_dir' of its own"
            )
    return list(classes.values())


def choose_sources(args: argparse.Namespace) -> list:
    """The sources to try, in order: what the user named, else LAION's backend and then an open dataset of the Hub."""
    url = args.client_url or default_url()
    backend = KnnBackend(url, args.indice_name, args.aesthetic_weight, args.min_similarity)
    columns = (args.split, args.caption_column, args.url_column, args.image_column)
    if args.dataset is not None:
        dataset = CaptionedDataset(args.dataset, *columns)
        return [backend, dataset] if args.client_url else [dataset]
    return [backend, CaptionedDataset(DEFAULT_DATASET)] if url == LAION_URL else [backend]


def fill(class_prompt: str, class_data_dir: Path, sources: list, args: argparse.Namespace) -> bool:
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
    print(f"Sources for {class_prompt!r}, in order: {'; '.join(source.name for source in sources)}", flush=True)
    try:
        collector, failures = _collect(class_prompt, folder, sources, args)
    finally:
        folder.close()
    if collector is None:
        raise SourceError(_nothing_reached(failures, args))
    if not collector.num_missing:
        print(f"{class_data_dir} has {len(folder.rows)} images with captions; tried {collector.num_tried}")
        return True
    print("".join(f"retrieve.py: {failure}\n" for failure in failures), end="", file=sys.stderr)
    if collector.num_tried or not failures:
        print(_too_few(class_prompt, class_data_dir, collector, args), file=sys.stderr)
    return False


def _collect(class_prompt, folder, sources, args):
    """(the collector after its work, or None when no source could be used; what the failed sources said)."""
    from custom_diffusion.retrieval.collect import Collector

    collector, failures = None, []
    for source in sources:
        try:
            source.check()
            print(f"Using {source.name}" + "".join(f" ({failure})" for failure in failures), flush=True)
            if collector is None:
                folder.open()
                if folder.dropped:
                    print(f"no longer listed, as they are gone or damaged: {', '.join(folder.dropped)}")
                collector = Collector(folder, args.num_class_images, args.min_size, args.num_workers, args.timeout)
            collector.run(source.candidates(class_prompt, collector.num_missing), f"images of {class_prompt!r}")
        except SourceError as error:
            failures.append(str(error))
        if collector is not None and not collector.num_missing:
            break
    return collector, failures


def _nothing_reached(failures, args):
    """Why no source could be used, as one message."""
    if args.dataset is not None or len(failures) == 1:
        return "; ".join(failures)
    what = f"--class_prompt CLASS --class_data_dir FOLDER --num_class_images {args.num_class_images}"
    if args.class_prompt:
        what = what.replace("CLASS", shlex.quote(args.class_prompt)).replace(
            "FOLDER", shlex.quote(str(args.class_data_dir))
        )
    return (
        f"LAION's public retrieval service has been gone since early 2024, and {DEFAULT_DATASET} on the Hugging Face Hub "
        "cannot be reached from here either. Two commands that work:\n"
        f"  python retrieve.py {what} --dataset FILE_OR_FOLDER_OF_CAPTIONED_PICTURES\n"
        f"  python retrieve.py {what} --client_url http://localhost:1234/knn-service --indice_name NAME\n"
        "README.md shows under 'Class images' how to prepare either. In detail: " + "; ".join(failures)
    )


def _too_few(class_prompt, class_data_dir, collector, args):
    reasons = ", ".join(f"{count} {reason}" for reason, count in collector.reasons.most_common())
    tips = ["another --dataset or --client_url (what is there is kept and counted)"]
    if collector.reasons["too small"]:
        tips.append(f"a --min_size below {args.min_size}")
    if args.min_similarity is not None:
        tips.append(f"a --min_similarity below {args.min_similarity}")
    if collector.num_temporary:
        tips.append(f"the same command later or with a longer --timeout ({collector.num_temporary} may answer then)")
    return (
        f"retrieve.py: {class_data_dir} has {len(collector.folder.rows)} of {args.num_class_images} images of {class_prompt!r}: "
        f"no more were to be had ({collector.num_tried} tried{'; ' + reasons if reasons else ''}). Try {', or '.join(tips)}."
    )


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
            if not fill(class_prompt, class_data_dir, sources, args):
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
