"""How long `retrieve.py` takes to find 200 rows of a class among a million, and how much memory: Parquet, CSV, JSON lines.

    python benchmarks/tables.py
    python benchmarks/tables.py --kinds parquet --rounds 5 --retrieve path/to/another/retrieve.py

The rows' addresses are those of a closed port, so no time goes into downloads; the whole command is timed, from its start to its
exit. Beside it, in the same turn, a plain Arrow filter of the caption column. Memory is the operating system's peak.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
NUM_MATCHES = 200
WORDS = [
    "a",
    "the",
    "of",
    "in",
    "with",
    "and",
    "for",
    "on",
    "black",
    "white",
    "old",
    "new",
    "house",
    "garden",
    "street",
    "vintage",
    "wooden",
    "photo",
    "stock",
    "vector",
    "category",
    "scatter",
    "education",
    "dog",
    "horse",
    "bird",
    "river",
    "mountain",
    "wedding",
    "dress",
    "shoes",
    "kitchen",
    "design",
    "illustration",
    "background",
    "isolated",
    "free",
    "summer",
]
FILTER = """
import sys, pyarrow.compute as pc, pyarrow.parquet as pq
found = sum(
    pc.sum(pc.match_substring_regex(batch["TEXT"], r"\\bcats?\\b", ignore_case=True)).as_py() or 0
    for batch in pq.ParquetFile(sys.argv[1]).iter_batches(65536, columns=["TEXT"])
)
print(found)
"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["parquet", "csv", "jsonl"], choices=["parquet", "csv", "jsonl"])
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--retrieve", type=Path, default=ROOT / "retrieve.py", help="the script to time")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks/work")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tables.json")
    return parser.parse_args()


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tables = table_paths(args)
    if not all(path.exists() for path in tables.values()):
        # In a process of its own: a child's peak begins with what its parent holds.
        writer = multiprocessing.get_context("spawn").Process(target=write_tables, args=(args,))
        writer.start()
        writer.join()
    results = {}
    for kind in args.kinds:
        rounds = [one_round(args, tables[kind], tables["parquet"]) for _ in range(args.rounds)]
        results[kind] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        print(kind, json.dumps(results[kind]), flush=True)
    machine = {"cpu_count": os.cpu_count(), "python": platform.python_version(), "pyarrow": version("pyarrow")}
    report = {"date": str(date.today()), "rows": args.num_rows, "matches": NUM_MATCHES, "rounds": args.rounds}
    args.output.write_text(json.dumps(report | {"machine": machine, "median": results}, indent=2) + "\n")


def table_paths(args):
    return {kind: args.work_dir / f"rows-{args.num_rows}.{kind}" for kind in ("parquet", "csv", "jsonl")}


def write_tables(args):
    """Files with the same rows: id, address, caption, width, height and two scores."""
    paths = table_paths(args)
    randomness = random.Random(0)
    cats = set(randomness.sample(range(args.num_rows), NUM_MATCHES))
    captions = [" ".join(randomness.choices(WORDS, k=randomness.randint(4, 16))) for _ in range(args.num_rows)]
    captions = [f"{text} cat" if n in cats else text + "…" * (n % 20 == 0) for n, text in enumerate(captions)]
    columns = {
        "SAMPLE_ID": list(range(args.num_rows)),
        "URL": [f"http://127.0.0.1:9/some/longer/path/{n}.jpg" for n in range(args.num_rows)],
        "TEXT": captions,
        "WIDTH": [512] * args.num_rows,
        "HEIGHT": [512] * args.num_rows,
        "punsafe": [randomness.random() / 4 for _ in range(args.num_rows)],
        "pwatermark": [randomness.random() / 4 for _ in range(args.num_rows)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), paths["parquet"])
    with paths["csv"].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])
    with paths["jsonl"].open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))


def one_round(args, table, parquet):
    """Seconds, CPU seconds and bytes of the first run, of one that goes on from it, and of the plain filter."""
    folder = args.work_dir / "class"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, args.retrieve, "--class_prompt", "cat", "--class_data_dir", folder, "--dataset", table]
    first = timed(command, 1)
    again = timed(command, 1)
    plain = timed([sys.executable, "-c", FILTER, parquet], 0)
    names = ("seconds", "cpu_seconds", "peak_rss_bytes")
    named = {"first": first, "again": again, "plain_parquet_filter": plain}
    return {f"{run}_{name}": value for run, values in named.items() for name, value in zip(names, values)}


def timed(command, expected_status):
    """(seconds, CPU seconds, peak bytes) of a whole process."""
    start = time.time()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected_status or (expected_status and f"({NUM_MATCHES} tried" not in said):
        sys.exit(f"{command} ended with {process.returncode}: {said[-1000:]}")
    return time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
