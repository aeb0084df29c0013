"""Jobs that flow all the while: a producer, and who reads the results."""

import json
import threading
import time
from collections import Counter

import pika

PACE = 0.5  # seconds between two jobs
AGAIN = 1.0  # seconds until a lost broker is tried again
TYPE = "classify.v1"


class Jobs:
    def __init__(self, url, images, classes):
        self.parameters = pika.URLParameters(url)
        self.images, self.classes = images, classes
        self.lock = threading.Lock()
        self.sent = {}  # id: when the broker confirmed it
        self.results = {}  # id: (when, status, class set and version or error code)
        self.again = 0  # results beyond a job's first
        self.enough = threading.Event()  # no further jobs, results are still read
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.through, args=[work]) for work in (self.produce, self.read)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def end(self):
        self.enough.set()
        self.ended.set()
        for thread in self.threads:
            if thread.ident:
                thread.join(timeout=20)

    def through(self, work):
        """Does it over one connection after another."""
        while not self.ended.is_set():
            try:
                connection = pika.BlockingConnection(self.parameters)
                work(connection)
                connection.close()
            except (pika.exceptions.AMQPError, OSError):
                self.ended.wait(AGAIN)

    def produce(self, connection):
        channel = connection.channel()
        channel.confirm_delivery()
        while not self.enough.is_set():
            number = time.monotonic_ns()
            images = [self.images[(number + i) % len(self.images)] for i in range(4)]
            job = {"id": f"line/{number}", "classes": self.classes, "images": images}
            self.publish(channel, json.dumps(job).encode())
            with self.lock:
                self.sent[job["id"]] = time.monotonic()
            connection.sleep(PACE)
        self.ended.wait()

    def publish(self, channel, body):
        properties = pika.BasicProperties(type=TYPE, content_type="application/json", delivery_mode=2)
        channel.basic_publish("", "angler.jobs", body, properties, mandatory=True)

    def poison(self, body):
        connection = pika.BlockingConnection(self.parameters)
        channel = connection.channel()
        channel.confirm_delivery()
        self.publish(channel, body)
        connection.close()

    def read(self, connection):
        def result(channel, method, _properties, body):
            result = json.loads(body)
            outcome = result["error"]["code"] if result["status"] == "failed" else result["classes"]
            with self.lock:
                self.again += result["id"] in self.results
                self.results.setdefault(result["id"], (time.monotonic(), result["status"], outcome))
            channel.basic_ack(method.delivery_tag)

        channel = connection.channel()
        channel.basic_qos(prefetch_count=64)
        channel.basic_consume("angler.results", result)
        while not self.ended.is_set():
            connection.process_data_events(time_limit=0.5)

    def missing(self):
        """Confirmed jobs without a result."""
        with self.lock:
            return [job for job in self.sent if job not in self.results]

    def since(self, moment):
        """In words: what was sent and what came back since then."""
        with self.lock:
            sent = sum(when >= moment for when in self.sent.values())
            results = Counter((status, what) for when, status, what in self.results.values() if when >= moment)
        came = ", ".join(f"{count} {status} ({what})" for (status, what), count in sorted(results.items()))
        return f"{sent} sent, results: {came or 'none'}; {len(self.missing())} under way"
