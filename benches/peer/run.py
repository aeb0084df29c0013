#!/usr/bin/env python3
"""angler's worker beside the Python worker of worker.py, in turn, on the same broker, store, images and model.

    cargo build --release
    eval "$(tests/services.sh up)"
    python3 -m venv target/peer && target/peer/bin/pip install -r benches/peer/requirements.txt
    target/peer/bin/python benches/peer/run.py [--rounds 3] [--images 640] [--model models/efficientnet-lite0]

Two kinds of photos are made of samples/photos: small ones (about 22 kB) and 1600 × 1200 ones. In each round each worker
gets all images as jobs of 64, after a first job that is not counted; the time runs from the second job's publication,
with all jobs already in the queue, to the last result. Nothing else should run on the machine.
"""

import argparse
import concurrent.futures
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import boto3
import botocore.config
import numpy as np
import pika
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
PER_JOB = 64
WAYS = ["angler", "batched", "one-by-one"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--images", type=int, default=640, help="images a round and worker")
parser.add_argument("--model", default="models/efficientnet-lite0")
parser.add_argument("--ways", default=",".join(WAYS), help="which workers, by comma")
parser.add_argument("--setting", action="append", default=[], help="KEY=VALUE for angler")
args = parser.parse_args()
ways = args.ways.split(",")
model = str((ROOT / args.model).resolve())

amqp = os.environ["ANGLER_TEST_AMQP_URL"]
endpoint = os.environ["ANGLER_TEST_S3_ENDPOINT"]
os.environ |= {
    "AWS_ACCESS_KEY_ID": os.environ["ANGLER_TEST_S3_KEY"],
    "AWS_SECRET_ACCESS_KEY": os.environ["ANGLER_TEST_S3_SECRET"],
    "AWS_EC2_METADATA_DISABLED": "true",
}
work = ROOT / "target" / "peer-data"
work.mkdir(parents=True, exist_ok=True)
env = os.environ | {
    "AMQP_URL": amqp,
    "S3_ENDPOINT": endpoint,
    "MODEL": model,
    "CLASSES": str(work / "classes" / "peer" / "1.safetensors"),
    "ANGLER__AMQP__URL": amqp,
    "ANGLER__S3__ENDPOINT": endpoint,
    "ANGLER__S3__PATH_STYLE": "true",
    "ANGLER__CLASSES__ROOT": str(work / "classes"),
    "ANGLER__MODEL__PATH": model,
    "ANGLER__EMBEDDER__BACKEND": "onnxruntime",
    "ANGLER__EMBEDDER__ONNXRUNTIME_LIBRARY": os.environ["ANGLER_TEST_ONNXRUNTIME"],
    "ANGLER__HTTP__LISTEN": "",
    "ANGLER__LOG__LEVEL": "warn",
}
binary = ROOT / "target" / "release" / "angler"

# ---- classes, images

version = work / "classes" / "peer" / "1.safetensors"
version.unlink(missing_ok=True)
subprocess.run(
    [binary, "classes", "build", ROOT / "samples/fashion/reference", "--set", "peer", "--version", "1"],
    env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
s3 = boto3.client(
    "s3", endpoint_url=endpoint, region_name="us-east-1",
    config=botocore.config.Config(max_pool_connections=8, s3={"addressing_style": "path"}),
)
bucket = f"peer-{os.getpid()}"
s3.create_bucket(Bucket=bucket)
photos = [Image.open(path).convert("RGB") for path in sorted((ROOT / "samples/photos").iterdir())]
random = np.random.default_rng(0)


def make(kind, number):
    """A crop of a photo, with some noise, as a camera's picture has."""
    photo = photos[number % len(photos)]
    size, quality = ((320, 240), 90) if kind == "small" else ((1600, 1200), 87)
    width = int(photo.width * (0.6 + 0.4 * ((number * 37) % 100) / 100))
    height = min(photo.height, width * 3 // 4)
    box = ((number * 13) % (photo.width - width + 1), (number * 7) % (photo.height - height + 1))
    image = photo.crop((*box, box[0] + width, box[1] + height)).resize(size, Image.BICUBIC)
    noise = random.normal(0, 3, (size[1], size[0], 1))
    array = (np.asarray(image, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)
    body = io.BytesIO()
    Image.fromarray(array).save(body, "JPEG", quality=quality)
    key = f"{kind}/{number:05}.jpg"
    s3.put_object(Bucket=bucket, Key=key, Body=body.getvalue())
    return f"s3://{bucket}/{key}", len(body.getvalue())


images = {}
for kind in ["small", "camera"]:
    distinct = min(args.images, 160)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: make(kind, n), range(distinct)))
    images[kind] = [made[n % distinct][0] for n in range(args.images)]
    print(f"{kind}: {distinct} images of {sum(size for _, size in made) / distinct / 1e3:.0f} kB on average", flush=True)

# ---- one worker on one queue of jobs

connection = pika.BlockingConnection(pika.URLParameters(amqp))
channel = connection.channel()
channel.confirm_delivery()


def publish(job):
    properties = pika.BasicProperties(delivery_mode=2, type="classify.v1")
    channel.basic_publish("", "angler.jobs", json.dumps(job).encode(), properties=properties, mandatory=True)


def result():
    while True:
        method, _, body = channel.basic_get("angler.results", auto_ack=True)
        if method:
            return json.loads(body)
        time.sleep(0.002)


def start(way):
    if way == "angler":
        settings = [part for pair in args.setting for part in ("--setting", pair)]
        return subprocess.Popen([binary, "worker", *settings], env=env, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, ROOT / "benches/peer/worker.py", way]
    worker = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "ready\n"
    return worker


def measure(way, uris):
    """Images a second, and the label of each image."""
    worker = start(way)
    try:
        publish({"id": "warm", "images": uris[:PER_JOB], "classes": "peer@1"})
        assert result()["status"] == "done"
        began = time.monotonic()
        jobs = [uris[i : i + PER_JOB] for i in range(0, len(uris), PER_JOB)]
        for number, part in enumerate(jobs):
            publish({"id": f"job/{number}", "images": part, "classes": "peer@1"})
        labels = {}
        for _ in jobs:
            done = result()
            labels |= {entry["uri"]: entry["label"] for entry in done["images"]}
        return len(uris) / (time.monotonic() - began), labels
    finally:
        worker.terminate()
        worker.wait()


# The worker declares the queues.
declare = start("angler")
while declare.poll() is None:
    try:
        probe = connection.channel()
        probe.queue_declare("angler.results", passive=True)
        probe.queue_declare("angler.jobs", passive=True)
        break
    except pika.exceptions.ChannelClosedByBroker:
        time.sleep(0.1)
declare.terminate()
declare.wait()
channel.queue_purge("angler.jobs")
channel.queue_purge("angler.results")

for kind, uris in images.items():
    rates = {way: [] for way in ways}
    agreement = []
    for _ in range(args.rounds):
        labels = {}
        for way in ways:
            rate, labels[way] = measure(way, uris)
            rates[way].append(rate)
        if len(ways) > 1:
            same = [labels[ways[0]][uri] == labels[ways[1]][uri] for uri in labels[ways[0]]]
            agreement.append(statistics.mean(same))
    for way in ways:
        ratios = [a / b for a, b in zip(rates[ways[0]], rates[way])]
        print(
            f"{kind:7} {way:11} {statistics.median(rates[way]):7.1f} images/s   "
            f"{ways[0]} is {statistics.median(ratios):.2f} times as fast   {[round(r, 1) for r in rates[way]]}",
            flush=True,
        )
    if agreement:
        print(f"{kind:7} same labels: {100 * min(agreement):.1f}%", flush=True)
