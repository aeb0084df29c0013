"""What the comparison runs on: a virtual host, a bucket of photos, class vectors, workers as processes. All of it is
made for the run and goes with it."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import boto3
import botocore.config
import numpy as np
import pika
from PIL import Image

import procfs

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEER = ROOT / "benches" / "peer"
PER_JOB = 64
SIZES = {"small": ((320, 240), 90), "camera": ((1600, 1200), 87)}  # pixels and JPEG quality
# Images of different content; under further keys the same content comes again.
CONTENTS = 160
REFERENCES = 4  # images a class
# A worker that answers nothing for so long has failed.
SILENCE_SECONDS = 120

# Each way's processes, in the order of their start: the command, and how often it prints "ready".
CORES = os.cpu_count()
WAYS = {
    "angler": [(["angler"], 0)],
    "batched": [(["worker.py", "batched"], 1)],
    "one-by-one": [(["worker.py", "one-by-one"], 1)],
    "tuned": [(["worker.py", "batched", "scaled"], 1)],
    "tuned-one-by-one": [(["worker.py", "one-by-one", "scaled"], 1)],
    "mosec": [(["server.py", "whole"], CORES), (["worker.py", "served"], 1)],
    "mosec-stages": [(["server.py", "stages"], CORES + 1), (["worker.py", "served"], 1)],
}


class Servers:
    """A virtual host and a bucket of this run's own, on the servers that ANGLER_TEST_* name."""

    def __init__(self):
        self.management = os.environ["ANGLER_TEST_AMQP_MANAGEMENT"]
        server = urllib.parse.urlsplit(os.environ["ANGLER_TEST_AMQP_URL"])
        self.user = server.username
        login = f"{server.username}:{server.password}".encode()
        self.headers = {"Authorization": "Basic " + base64.b64encode(login).decode(), "Content-Type": "application/json"}
        self.name = f"peer-{os.getpid()}"
        self.url = server._replace(path=f"/{self.name}").geturl()
        self.endpoint = os.environ["ANGLER_TEST_S3_ENDPOINT"]
        self.pids = {
            "broker": procfs.listener(server.port),
            "store": procfs.listener(urllib.parse.urlsplit(self.endpoint).port),
        }
        os.environ |= {
            "AWS_ACCESS_KEY_ID": os.environ["ANGLER_TEST_S3_KEY"],
            "AWS_SECRET_ACCESS_KEY": os.environ["ANGLER_TEST_S3_SECRET"],
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        config = botocore.config.Config(max_pool_connections=8, s3={"addressing_style": "path"})
        self.s3 = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=config)
        self.keys = []

    def __enter__(self):
        self.manage("PUT", f"vhosts/{self.name}")
        self.manage("PUT", f"permissions/{self.name}/{self.user}", {"configure": ".*", "write": ".*", "read": ".*"})
        self.s3.create_bucket(Bucket=self.name)
        return self

    def __exit__(self, *_):
        self.manage("DELETE", f"vhosts/{self.name}")
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: self.s3.delete_object(Bucket=self.name, Key=key), self.keys))
        self.s3.delete_bucket(Bucket=self.name)

    def manage(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.management}/api/{path}", data, self.headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            text = response.read()
        return json.loads(text) if text else None

    def versions(self):
        store = self.s3.head_bucket(Bucket=self.name)["ResponseMetadata"]["HTTPHeaders"].get("server", "")
        return {"broker": "RabbitMQ " + self.manage("GET", "overview")["rabbitmq_version"], "store": store}

    def upload(self, kind, count):
        """`count` images under different keys: the same one many times in flight might be fetched once. Their URIs."""

        def one(number):
            body = photo(kind, number)
            keys = [f"{kind}/{n:06}.jpg" for n in range(number, count, CONTENTS)]
            self.keys += keys
            for key in keys:
                self.s3.put_object(Bucket=self.name, Key=key, Body=body)
            return len(body)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            sizes = list(pool.map(one, range(min(count, CONTENTS))))
        print(f"{kind}: {count} images of {sum(sizes) / len(sizes) / 1e3:.0f} kB on average", file=sys.stderr)
        return [f"s3://{self.name}/{kind}/{n:06}.jpg" for n in range(count)]

    @contextlib.contextmanager
    def channel(self):
        """A connection a measurement: one that is left alone for minutes would miss its heartbeats."""
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel
        finally:
            connection.close()


PHOTOS = sorted((ROOT / "samples/photos").iterdir())


def photo(kind, number):
    """A crop of a photo, with some noise, as a camera's picture has."""
    source = Image.open(PHOTOS[number % len(PHOTOS)]).convert("RGB")
    size, quality = SIZES[kind]
    width = int(source.width * (0.6 + 0.4 * ((number * 37) % 100) / 100))
    height = min(source.height, width * 3 // 4)
    left, top = (number * 13) % (source.width - width + 1), (number * 7) % (source.height - height + 1)
    image = source.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(number).normal(0, 3, (size[1], size[0], 1))
    array = (np.asarray(image, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)
    body = io.BytesIO()
    Image.fromarray(array).save(body, "JPEG", quality=quality)
    return body.getvalue()


class Bench:
    """One model folder, its class vectors, and the workers that use both."""

    def __init__(self, servers, binary, model, settings):
        self.servers, self.binary = servers, binary
        self.flags = [part for pair in settings for part in ("--setting", pair)]
        self.folder = tempfile.mkdtemp(prefix="angler-peer-")
        self.env = os.environ | {
            "AMQP_URL": servers.url,
            "S3_ENDPOINT": servers.endpoint,
            "MODEL": str(model),
            "CLASSES": f"{self.folder}/peer/1.safetensors",
            "ANGLER__AMQP__URL": servers.url,
            "ANGLER__S3__ENDPOINT": servers.endpoint,
            "ANGLER__S3__PATH_STYLE": "true",
            "ANGLER__CLASSES__ROOT": self.folder,
            "ANGLER__MODEL__PATH": str(model),
            "ANGLER__EMBEDDER__BACKEND": "onnxruntime",
            "ANGLER__EMBEDDER__ONNXRUNTIME_LIBRARY": os.environ["ANGLER_TEST_ONNXRUNTIME"],
            "ANGLER__HTTP__LISTEN": "",
            "ANGLER__LOG__LEVEL": "warn",
        }

    def __enter__(self):
        # A class is one of the photos; other crops of it than those of the jobs make its vector.
        for number in range(CONTENTS, CONTENTS + REFERENCES * len(PHOTOS)):
            path = pathlib.Path(self.folder, "reference", PHOTOS[number % len(PHOTOS)].stem, f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo("camera", number))
        build = ["classes", "build", f"{self.folder}/reference", "--set", "peer", "--version", "1"]
        done = subprocess.run([self.binary, *build], env=self.env, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(self.folder)
            sys.exit(f"angler classes build failed:\n{done.stderr}")
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def worker(self, way):
        return Worker(self, WAYS[way])


class Worker:
    """The processes of one way, each in a session of its own, so that what they start is found, counted and ended."""

    def __init__(self, bench, commands):
        self.bench, self.commands = bench, commands
        self.processes = []

    def __enter__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = self.bench.env | {"SERVER": f"http://127.0.0.1:{port}"}
        for (name, *arguments), ready in self.commands:
            if name == "angler":
                command = [self.bench.binary, "worker", *self.bench.flags]
            else:
                command = [sys.executable, PEER / name, *arguments]
            if name == "server.py":
                command += ["--address", "127.0.0.1", "--port", str(port), "--timeout", "60000", "--log-level", "warning"]
            process = subprocess.Popen(
                command, env=env, cwd=self.bench.folder, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            self.processes.append(process)
            for _ in range(ready):
                if (line := process.stdout.readline()) != "ready\n":
                    self.__exit__()
                    sys.exit(f"{name} {' '.join(arguments)} did not start: {line}")
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def pids(self):
        return [pid for process in self.processes for pid in procfs.session(process.pid)]

    def check(self):
        for process in self.processes:
            if process.poll() is not None:
                sys.exit(f"{process.args} ended with {process.returncode}")

    def cpu(self):
        """CPU seconds so far: of the worker, the broker, the store (None where it is not to be seen), of this script."""
        seconds = {name: pid and procfs.cpu_seconds([pid]) for name, pid in self.bench.servers.pids.items()}
        return {"worker": procfs.cpu_seconds(self.pids())} | seconds | {"load": time.process_time()}


def jobs_of(uris):
    return [uris[i : i + PER_JOB] for i in range(0, len(uris), PER_JOB)]


def publish(channel, name, uris):
    job = {"id": name, "images": uris, "classes": "peer@1"}
    properties = pika.BasicProperties(delivery_mode=2, type="classify.v1", content_type="application/json")
    channel.basic_publish("", "angler.jobs", json.dumps(job).encode(), properties, mandatory=True)


def results(channel, worker, count):
    """The bodies of `count` results, as they come. They are pushed, and not parsed while the clock runs."""
    silent_since = time.monotonic()
    for _, _, body in channel.consume("angler.results", auto_ack=True, inactivity_timeout=1):
        if body is None:
            worker.check()
            if time.monotonic() - silent_since > SILENCE_SECONDS:
                sys.exit(f"no result for {SILENCE_SECONDS} s")
            continue
        silent_since = time.monotonic()
        yield body
        count -= 1
        if count == 0:
            channel.cancel()
            return


def answers(bodies):
    """The label and the score of each URI; a job or an image that failed ends the run."""
    found = {}
    for body in bodies:
        result = json.loads(body)
        if result["status"] != "done":
            sys.exit(f"job {result['id']} failed: {result.get('error')}")
        for image in result["images"]:
            if "error" in image:
                sys.exit(f"{image['uri']} in job {result['id']} was not classified: {image['error']}")
        found |= {image["uri"]: (image["label"], image["score"]) for image in result["images"]}
    return found


def clear(channel):
    """What the worker before left: it may have ended between its last result and the ack, and then the job comes back."""
    time.sleep(0.5)
    for queue in ["angler.jobs", "angler.suspects", "angler.results"]:
        channel.queue_purge(queue)


def warm(channel, worker, uris):
    """A first job, which is not counted: libraries load, class vectors are read, buffers are made."""
    publish(channel, "warm", uris[:PER_JOB])
    answers(results(channel, worker, 1))


def declare_queues(bench):
    """They are angler's, which declares them when it starts."""
    with bench.worker("angler") as worker:
        deadline = time.monotonic() + SILENCE_SECONDS
        while True:
            queues = bench.servers.manage("GET", f"queues/{bench.servers.name}")
            if any(queue["name"] == "angler.jobs" and queue.get("consumers") for queue in queues):
                return
            worker.check()
            if time.monotonic() > deadline:
                sys.exit("angler declared no queues")
            time.sleep(0.1)
