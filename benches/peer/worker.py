"""What somebody writes in an afternoon, written fairly: an image-classification worker that speaks angler's jobs
and results, on pika, boto3, Pillow, onnxruntime and numpy.

    worker.py batched      a pool of threads fetches and decodes, ahead and across jobs; up to 32 images are embedded at once
    worker.py one-by-one   an image after the other
    worker.py … scaled     either of them with Pillow's fast way for large JPEGs, which few know
    worker.py served       a pool of threads fetches and posts each image to the model server of server.py

One thread talks to the broker, so that publishing a result and waiting for its confirm does not stop the embedding.
Settings come from the environment: AMQP_URL, S3_ENDPOINT, MODEL (a folder), CLASSES (a class vectors file), SERVER (a URL);
PEER_* below are there to try other values. It prints "ready" before it consumes. No retries, no limits, no hot swap: only
what a benchmark needs. Whatever goes wrong ends it.
"""

import functools
import io
import json
import os
import queue
import sys
import threading
import time
import tomllib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import boto3
import botocore.config
import numpy as np
import onnxruntime
import pika
import urllib3
from PIL import Image, ImageOps
from safetensors import safe_open


def tunable(name, default):
    return int(os.environ.get(f"PEER_{name}", default))


PREFETCH = 16


class Decoder:
    """Encoded images to pixels, as the model folder says."""

    def __init__(self):
        with open(f"{os.environ['MODEL']}/model.toml", "rb") as file:
            self.spec = tomllib.load(file)["input"]
        assert (self.spec["resize"], self.spec["filter"], self.spec["channels"]) == ("shorter-side", "bicubic", "rgb")
        self.mean = np.array(self.spec["mean"], dtype=np.float32)
        self.factor = 1 / np.array(self.spec["std"], dtype=np.float32)

    def pixels(self, body):
        """u8, [H, W, 3]."""
        image = Image.open(io.BytesIO(body))
        side, width, height = self.spec["resize_to"], self.spec["width"], self.spec["height"]
        # The decoder may scale by 2, 4 or 8: Pillow's own fast way for large JPEGs. Twice the size that is wanted stays,
        # as in Pillow's thumbnails: with less, embeddings of camera photos fall to a cosine of .992 with whole decoding.
        if spare := tunable("DRAFT", 2 if "scaled" in sys.argv else 0):
            image.draft("RGB", (spare * side, spare * side))
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def tensor(self, pixels):
        """f32, [3, H, W] or [H, W, 3]."""
        values = pixels.astype(np.float32)
        values -= self.mean
        values *= self.factor
        return values.transpose(2, 0, 1) if self.spec["layout"] == "nchw" else values


class Classifier:
    """Tensors to labels and scores: the model, and the cosine with the class vectors."""

    def __init__(self, threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = tunable("ORT_THREADS", threads)  # 0: ONNX Runtime's own default, the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", str(tunable("ORT_SPINNING", 1)))
        model = f"{os.environ['MODEL']}/model.onnx"
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        with safe_open(os.environ["CLASSES"], framework="np") as file:
            vectors = file.get_tensor("vectors").astype(np.float32)
            self.labels = json.loads(file.metadata()["labels"])
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def classify(self, tensors):
        embeddings = self.session.run(None, {self.input: np.stack(tensors)})[0]
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        scores = embeddings @ self.vectors.T
        return [(self.labels[best], float(scores[i, best])) for i, best in enumerate(scores.argmax(axis=1))]


def fetcher(connections):
    config = botocore.config.Config(max_pool_connections=connections, s3={"addressing_style": "path"})
    s3 = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT"], region_name="us-east-1", config=config)

    def fetch(uri):
        bucket, key = uri.removeprefix("s3://").split("/", 1)
        return s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    return fetch


def way(mode):
    """load(uri) starts what can be done ahead and returns a call for its outcome; answer(outcomes) makes labels and
    scores of up to `batch` outcomes; `ahead`: how many images are loaded ahead."""
    threads = tunable("THREADS", {"batched": 8, "one-by-one": 1, "served": 64}[mode])
    fetch = fetcher(threads)
    pool = ThreadPoolExecutor(threads)
    if mode == "served":
        http = urllib3.PoolManager(maxsize=threads, retries=False, timeout=60)
        url = os.environ["SERVER"]
        wait_for(http, url)

        def post(uri):
            response = http.request("POST", f"{url}/inference", body=fetch(uri))
            assert response.status == 200, response.data
            return tuple(json.loads(response.data))

        return lambda uri: pool.submit(post, uri).result, lambda outcomes: outcomes, 1, threads

    decoder, classifier = Decoder(), Classifier()
    load = lambda uri: decoder.tensor(decoder.pixels(fetch(uri)))
    if mode == "batched":
        batch = tunable("BATCH", 32)
        return lambda uri: pool.submit(load, uri).result, classifier.classify, batch, tunable("AHEAD", 3 * batch)
    return lambda uri: functools.partial(load, uri), classifier.classify, 1, 1


def wait_for(http, url):
    deadline = time.monotonic() + 60
    while True:
        try:
            if http.request("GET", url).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            assert time.monotonic() < deadline, f"no server at {url}"
        time.sleep(0.1)


class Job:
    def __init__(self, tag, body):
        self.tag, self.job = tag, json.loads(body)
        self.answers = []

    def done(self):
        return len(self.answers) == len(self.job["images"])

    def result(self):
        images = [
            {"uri": uri, "label": label, "score": round(score, 4), "top": [{"label": label, "score": round(score, 4)}]}
            for uri, (label, score) in zip(self.job["images"], self.answers)
        ]
        return json.dumps({"id": self.job["id"], "status": "done", "classes": self.job["classes"], "images": images})


class Broker:
    """A thread that consumes into `jobs`, and publishes and acks what is given to `finish`."""

    def __init__(self):
        self.jobs = queue.Queue(PREFETCH)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        try:
            self.connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
            self.channel = self.connection.channel()
            self.channel.basic_qos(prefetch_count=PREFETCH)
            self.channel.confirm_delivery()
            take = lambda channel, method, properties, body: self.jobs.put(Job(method.delivery_tag, body))
            self.channel.basic_consume("angler.jobs", take)
            self.channel.start_consuming()
        finally:
            os._exit(1)

    def finish(self, job):
        self.connection.add_callback_threadsafe(functools.partial(self.publish, job))

    def publish(self, job):
        properties = pika.BasicProperties(delivery_mode=2)
        self.channel.basic_publish("", "angler.results", job.result().encode(), properties, mandatory=True)
        self.channel.basic_ack(job.tag)


def main():
    load, answer, batch, ahead = way(sys.argv[1])
    os.write(1, b"ready\n")  # in one piece: several processes share the pipe
    broker = Broker()
    loading = deque()  # (job, call for the image's outcome), in order, across jobs
    while True:
        while len(loading) < ahead:
            try:
                job = broker.jobs.get(block=not loading)
            except queue.Empty:
                break
            loading.extend([(job, load(uri)) for uri in job.job["images"]])
        next_batch = [loading.popleft() for _ in range(min(batch, len(loading)))]
        for (job, _), label in zip(next_batch, answer([outcome() for _, outcome in next_batch])):
            job.answers.append(label)
            if job.done():
                broker.finish(job)


if __name__ == "__main__":
    main()
