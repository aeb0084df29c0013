#!/usr/bin/env python3
"""angler's worker beside Python workers, in turn, on the same broker, store, images and model.

    cargo build --release
    eval "$(tests/services.sh up)"
    python3 -m venv target/peer && target/peer/bin/pip install -r benches/peer/requirements.txt
    target/peer/bin/python benches/peer/run.py --model models/efficientnet-lite0 FOLDER…
    target/peer/bin/python benches/peer/run.py --memory 100000

The ways: `batched` and `one-by-one` of worker.py; `tuned` and `tuned-one-by-one`, the same with Pillow's draft mode;
`mosec` and `mosec-stages`, the two shapes of server.py.

Two kinds of photos are made of samples/photos: small ones of 320 × 240 (about 26 kB), and 1600 × 1200 as a camera makes
them. In each round each way gets all images as jobs of 64, after a first job that is not counted; the time runs from
the first job's publication to the last result. The next round begins with the next way. With several models, each
round has the ways of all of them, so that a model in angler can be compared with another model in a peer. Nothing else
should run on the machine.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import harness
import procfs
from harness import PER_JOB, ROOT

PACKAGES = ["onnxruntime", "pillow", "numpy", "boto3", "pika", "mosec"]
COLUMNS = ["same labels", "scores within", "peak memory", "CPU ms an image: worker", "broker", "store"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=640, help="of each kind; each round and way gets them all")
    parser.add_argument("--kinds", default="small,camera", help="by comma")
    parser.add_argument("--model", nargs="+", default=["models/efficientnet-lite0"], metavar="FOLDER")
    parser.add_argument("--ways", default="angler,batched,one-by-one,tuned,tuned-one-by-one,mosec", help=f"by comma, of {', '.join(harness.WAYS)}")
    parser.add_argument("--binary", default="target/release/angler")
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE", help="for angler; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="the figures of each round, too")
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="instead: the worker's memory over so many images")
    args = parser.parse_args()
    args.kinds, args.ways = args.kinds.split(","), args.ways.split(",")
    args.binary = (pathlib.Path.cwd() / args.binary).resolve()
    args.model = [pathlib.Path(model).resolve() for model in args.model]
    if unknown := (set(args.kinds) - set(harness.SIZES)) | (set(args.ways) - set(harness.WAYS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.ways[0] != "angler":
        parser.error("the first way must be angler: the others are compared with it")
    for path in [args.binary, *(model / "model.toml" for model in args.model)]:
        if not path.is_file():
            parser.error(f"there is no {path}")
    return args


def measure(bench, way, uris):
    """One way, once: what it took, and the label and score of each image."""
    with bench.servers.channel() as channel:
        harness.clear(channel)
    with bench.worker(way) as worker, bench.servers.channel() as channel:
        harness.warm(channel, worker, uris)
        jobs = harness.jobs_of(uris)
        before = worker.cpu()
        began = time.monotonic()
        for number, part in enumerate(jobs):
            harness.publish(channel, f"job/{number}", part)
        bodies = list(harness.results(channel, worker, len(jobs)))
        seconds = time.monotonic() - began
        after = worker.cpu()
        used = {name: None if after[name] is None else (after[name] - before[name]) / len(uris) for name in after}
        peak = procfs.memory(worker.pids(), "VmHWM")
        run = {"images_per_second": len(uris) / seconds, "peak_bytes": peak, "cpu_seconds_per_image": used}
        return run, harness.answers(bodies)


def compare(benches, ways, uris, rounds):
    """The runs of each model and way, one a round. A ratio is taken within its round, since a machine's speed drifts."""
    entries = [(model, way) for model in benches for way in ways]
    runs = {entry: [] for entry in entries}
    for number in range(rounds):
        first = number % len(entries)
        found = {}
        for model, way in entries[first:] + entries[:first]:
            run, found[model, way] = measure(benches[model], way, uris)
            runs[model, way].append(run)
            print(f"round {number + 1}: {model}: {way}: {run['images_per_second']:.1f} images/s", file=sys.stderr)
        for model, way in entries:
            run = runs[model, way][-1]
            rates = {ours: runs[ours, "angler"][-1]["images_per_second"] for ours in benches}
            run["ratios"] = {ours: rate / run["images_per_second"] for ours, rate in rates.items()}
            pairs = [(found[model, "angler"][uri], found[model, way][uri]) for uri in uris]
            run["same_labels"] = statistics.mean(ours[0] == theirs[0] for ours, theirs in pairs)
            run["scores_within"] = max(abs(ours[1] - theirs[1]) for ours, theirs in pairs)
    return runs


def summary(runs):
    def median(pick):
        values = [pick(run) for run in runs]
        return None if None in values else statistics.median(values)

    used = runs[0]["cpu_seconds_per_image"]
    return {
        "images_per_second": median(lambda run: run["images_per_second"]),
        "ratios": {model: median(lambda run: run["ratios"][model]) for model in runs[0]["ratios"]},
        "same_labels": min(run["same_labels"] for run in runs),
        "scores_within": max(run["scores_within"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "cpu_seconds_per_image": {name: median(lambda run: run["cpu_seconds_per_image"][name]) for name in used},
    }


def row(model, kind, way, figures):
    used = figures["cpu_seconds_per_image"]
    cpu = ["–" if used[name] is None else f"{used[name] * 1e3:.1f}" for name in ["worker", "broker", "store"]]
    beside = [*(f"{ratio:.2f} ×" for ratio in figures["ratios"].values()), f"{100 * figures['same_labels']:.1f} %", f"{figures['scores_within']:.4f}"]
    if way == "angler":
        beside = [""] * len(beside)
    return [model, kind, way, f"{figures['images_per_second']:.1f}", *beside, f"{figures['peak_bytes'] / 1e6:.0f} MB", *cpu]


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def watch_memory(bench, images, total):
    """angler's resident memory while it has more to do than it can: jobs of all kinds in turn, all in the queue."""
    samples = []

    def sample(done):
        samples.append({"images": done, "rss_bytes": procfs.memory(worker.pids(), "VmRSS")})
        samples[-1]["peak_bytes"] = procfs.memory(worker.pids(), "VmHWM")
        print(f"{done:8} images   {samples[-1]['rss_bytes'] / 1e6:6.1f} MB   peak {samples[-1]['peak_bytes'] / 1e6:6.1f} MB", flush=True)

    with bench.worker("angler") as worker, bench.servers.channel() as channel:
        jobs = [job for kinds in zip(*(harness.jobs_of(uris) for uris in images.values())) for job in kinds]
        harness.warm(channel, worker, jobs[0])
        sample(0)
        count = -(-total // PER_JOB)
        for number in range(count):
            harness.publish(channel, f"job/{number}", jobs[number % len(jobs)])
        done, step = 0, min(10_000, max(PER_JOB, total // 10))
        for body in harness.results(channel, worker, count):
            before, done = done, done + len(harness.answers([body]))
            if done // step > before // step or done >= total > before:
                sample(done)
    return samples


def about(args, servers):
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    angler = subprocess.run([args.binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    library = os.environ["ANGLER_TEST_ONNXRUNTIME"].rpartition(".so.")[2]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": procfs.machine(),
        "versions": {
            "angler": f"{angler.split()[-1]} ({commit.stdout.strip()}, ONNX Runtime {library})",
            "python": sys.version.split()[0],
            **{package: importlib.metadata.version(package) for package in PACKAGES},
            **servers.versions(),
        },
        "tried": {name: value for name, value in os.environ.items() if name.startswith("PEER_")} | {"angler": args.setting},
    }


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is cleaned up
    with harness.Servers() as servers:
        report = about(args, servers) | {"images": args.images, "rounds": args.rounds, "rows": [], "memory": []}
        machine = report["machine"]
        print(f"{report['date']}, {machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}")
        print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
        plan = f"memory over {args.memory} images" if args.memory else f"{args.rounds} rounds"
        print(f"{args.images} images of each kind in jobs of {PER_JOB}, {plan}", flush=True)
        images = {kind: servers.upload(kind, args.images) for kind in args.kinds}
        ours = ["angler is"] if len(args.model) == 1 else [f"angler with {model.name} is" for model in args.model]
        rows = [["model", "images", "way", "images/s", *ours, *COLUMNS]]
        with contextlib.ExitStack() as stack:
            benches = {
                model.name: stack.enter_context(harness.Bench(servers, args.binary, model, args.setting))
                for model in args.model
            }
            harness.declare_queues(next(iter(benches.values())))
            if args.memory:
                for model, bench in benches.items():
                    print(model)
                    report["memory"].append({"model": model, "samples": watch_memory(bench, images, args.memory)})
                images = {}
            for kind, uris in images.items():
                for (model, way), runs in compare(benches, args.ways, uris, args.rounds).items():
                    figures = summary(runs)
                    rows.append(row(model, kind, way, figures))
                    report["rows"].append({"model": model, "kind": kind, "way": way} | figures | {"runs": runs})
        if not args.memory:
            print("\n" + table(rows))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
