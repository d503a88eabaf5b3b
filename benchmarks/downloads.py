"""Fetch one list of images with `retrieve.py` and with img2dataset in turn, and print the ratio of their rates.

    python -m venv peer && peer/bin/pip install img2dataset
    python benchmarks/downloads.py --peer peer/bin/img2dataset

A server of this machine answers as 100 hosts (127.0.1.1 to 127.0.1.100), 50 ms after each request. Both programs have 256 downloads at a
time, decode each image, write it anew as a JPEG of quality 95 in its own size, and are timed twice: from start to exit, and
from the first request to the last answer as the server sees it ("span"; what is still to be decoded then is not in it).
img2dataset is run with one process of 256 threads and with two of 128.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from retrieval_server import encode, picture  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="the command img2dataset of an environment of its own")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks/work/downloads")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/downloads.json")
    parser.add_argument("--num_images", type=int, default=2900)
    parser.add_argument("--num_hosts", type=int, default=100)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--num_workers", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


class Server(asyncio.Protocol):
    """Just enough of HTTP/1.1 to be much faster than either client."""

    bodies, latency = (), 0.0
    first = last = None
    num_served = 0

    def connection_made(self, transport):
        self.transport = transport
        self.received = b""

    def data_received(self, data):
        self.received += data
        while b"\r\n\r\n" in self.received:
            request, _, self.received = self.received.partition(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].decode()
            if path == "/span":
                self.answer(json.dumps([Server.num_served, Server.last - Server.first]).encode())
                Server.first, Server.num_served = None, 0
            else:
                Server.first = Server.first or time.monotonic()
                asyncio.get_running_loop().call_later(self.latency, self.serve, int(path.rsplit("/", 1)[1]))

    def serve(self, number):
        self.answer(self.bodies[number])
        Server.last = time.monotonic()
        Server.num_served += 1

    def answer(self, body):
        if not self.transport.is_closing():
            head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body)
            self.transport.write(head + body)


def serve(num_images, latency, port):
    """Serve for ever; the port is told once all is ready."""
    Server.bodies = [encode(picture.__wrapped__(n), quality=90) for n in range(num_images)]
    Server.latency = latency

    async def run():
        server = await asyncio.get_running_loop().create_server(Server, "0.0.0.0", 0, backlog=1024)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def timed(command, port, log):
    """(images, seconds from start to exit, seconds that the server was at work, CPU seconds)."""
    before = os.times()
    started = time.monotonic()
    with log.open("w") as file:
        subprocess.run([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, check=True)
    wall = time.monotonic() - started
    after = os.times()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/span") as answer:
        num_served, span = json.load(answer)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return num_served, wall, span, cpu


def run_ours(args, table, folder):
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, ROOT / "retrieve.py", "--class_prompt", "cat", "--class_data_dir", folder]
    command += ["--dataset", table, "--num_class_images", args.num_images, "--num_workers", args.num_workers]
    result = timed(command, args.port, args.work_dir / "ours.log")
    return len(list((folder / "images").glob("*.jpg"))), *result[1:]


def run_peer(args, table, folder, processes):
    shutil.rmtree(folder, ignore_errors=True)
    command = [args.peer, "--url_list", table, "--input_format", "parquet", "--url_col", "URL", "--caption_col", "TEXT"]
    command += ["--output_folder", folder, "--output_format", "files", "--resize_mode", "no", "--encode_quality", 95]
    command += ["--processes_count", processes, "--thread_count", args.num_workers // processes]
    command += ["--number_sample_per_shard", -(-args.num_images // processes)]
    result = timed(command, args.port, args.work_dir / "peer.log")
    return len(list(folder.glob("*/*.jpg"))), *result[1:]


def main():
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    told = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(args.num_images, args.latency, told), daemon=True)
    server.start()
    args.port = told.get()
    table = args.work_dir / "list.parquet"
    urls = [f"http://127.0.1.{1 + n % args.num_hosts}:{args.port}/{n}" for n in range(args.num_images)]
    captions = [f"a cat, number {n}" for n in range(args.num_images)]
    pyarrow.parquet.write_table(pyarrow.table({"URL": urls, "TEXT": captions}), table)
    runs = {
        "retrieve.py": lambda folder: run_ours(args, table, folder),
        "img2dataset, 1 process": lambda folder: run_peer(args, table, folder, 1),
        "img2dataset, 2 processes": lambda folder: run_peer(args, table, folder, 2),
    }
    results = {name: [] for name in runs}
    for number in range(args.rounds):
        for name, run in runs.items():
            kept, wall, span, cpu = run(args.work_dir / "out")
            results[name].append({"kept": kept, "wall": wall, "span": span, "cpu": cpu})
            print(
                f"round {number + 1}, {name}: {kept} images, {wall:.2f} s, {span:.2f} s of requests, {cpu:.1f} s CPU",
                flush=True,
            )
    server.terminate()
    report(args, results)


def report(args, results):
    """Print and write both sides' medians and their ratio."""
    rates = {
        name: {key: round(statistics.median(run["kept"] / run[key] for run in runs), 1) for key in ("wall", "span")}
        for name, runs in results.items()
    }
    ratios = {
        name: {key: round(rates["retrieve.py"][key] / rate[key], 2) for key in rate}
        for name, rate in rates.items()
        if name != "retrieve.py"
    }
    print(json.dumps({"images a second (medians)": rates, "rate of retrieve.py in proportion to": ratios}, indent=2))
    settings = {name: getattr(args, name) for name in ("num_images", "num_hosts", "latency", "num_workers", "rounds")}
    record = {
        "date": str(date.today()),
        "cpus": os.cpu_count(),
        "settings": settings,
        "images_a_second_median": rates,
        "rate_of_retrieve.py_in_proportion_to": ratios,
        "runs": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
