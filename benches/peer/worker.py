"""What somebody writes in an afternoon, written fairly: an image-classification worker that speaks angler's jobs
and results, on pika, boto3, Pillow, onnxruntime and numpy.

    worker.py batched      fetches and decodes a job's images in a pool of threads, embeds up to 32 at once
    worker.py one-by-one   an image after the other

Settings come from the environment: AMQP_URL, S3_ENDPOINT, MODEL (a folder), CLASSES (a class vectors file). It prints
"ready" once it consumes. No retries, no limits, no hot swap: only what a benchmark needs.
"""

import io
import json
import os
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import boto3
import botocore.config
import numpy as np
import onnxruntime
import pika
from PIL import Image, ImageOps
from safetensors import safe_open

BATCH = 32
THREADS = 8
PREFETCH = 16

batched = sys.argv[1] == "batched"
model_dir = os.environ["MODEL"]
with open(f"{model_dir}/model.toml", "rb") as file:
    spec = tomllib.load(file)["input"]
assert spec["resize"] == "shorter-side" and spec["filter"] == "bicubic" and spec["channels"] == "rgb"
mean = np.array(spec["mean"], dtype=np.float32)
std = np.array(spec["std"], dtype=np.float32)

s3 = boto3.client(
    "s3",
    endpoint_url=os.environ["S3_ENDPOINT"],
    region_name="us-east-1",
    config=botocore.config.Config(max_pool_connections=THREADS, s3={"addressing_style": "path"}),
)
options = onnxruntime.SessionOptions()
session = onnxruntime.InferenceSession(f"{model_dir}/model.onnx", options, providers=["CPUExecutionProvider"])
input_name = session.get_inputs()[0].name

with safe_open(os.environ["CLASSES"], framework="np") as file:
    vectors = file.get_tensor("vectors").astype(np.float32)
    labels = json.loads(file.metadata()["labels"])
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)


def pixels(uri):
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    image = Image.open(io.BytesIO(body))
    side = spec["resize_to"]
    # The decoder may scale by 2, 4 or 8: Pillow's own fast way for large JPEGs.
    image.draft("RGB", (2 * side, 2 * side))
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - spec["width"]) // 2, (image.height - spec["height"]) // 2
    image = image.crop((left, top, left + spec["width"], top + spec["height"]))
    values = (np.asarray(image, dtype=np.float32) - mean) / std
    return values.transpose(2, 0, 1) if spec["layout"] == "nchw" else values


def classify(images):
    """Labels and scores of a list of arrays, embedded at once."""
    embeddings = session.run(None, {input_name: np.stack(images)})[0]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = embeddings @ vectors.T
    best = scores.argmax(axis=1)
    return [(labels[b], float(scores[i, b])) for i, b in enumerate(best)]


connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.basic_qos(prefetch_count=PREFETCH)
channel.confirm_delivery()
pool = ThreadPoolExecutor(THREADS)


def results(uris):
    if not batched:
        for uri in uris:
            yield from classify([pixels(uri)])
        return
    batches = [uris[i : i + BATCH] for i in range(0, len(uris), BATCH)]
    loading = [[pool.submit(pixels, uri) for uri in batch] for batch in batches[:2]]
    for n in range(len(batches)):
        ready = [future.result() for future in loading.pop(0)]
        if n + 2 < len(batches):
            loading.append([pool.submit(pixels, uri) for uri in batches[n + 2]])
        yield from classify(ready)


def answer(method, properties, body):
    job = json.loads(body)
    images = [
        {"uri": uri, "label": label, "score": round(score, 4), "top": [{"label": label, "score": round(score, 4)}]}
        for uri, (label, score) in zip(job["images"], results(job["images"]))
    ]
    result = {"id": job["id"], "status": "done", "classes": job["classes"], "images": images}
    channel.basic_publish("", "angler.results", json.dumps(result).encode(), pika.BasicProperties(delivery_mode=2))
    channel.basic_ack(method.delivery_tag)


print("ready", flush=True)
for delivery in channel.consume("angler.jobs"):
    answer(*delivery)
