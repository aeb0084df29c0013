"""Takes results of angler's workers and prints a line an image: consumer.py [--queue angler.results] [--count N]

Needs pika (pip install pika). AMQP_URL says where the broker is. When the connection is lost it exits with an error: let
whatever runs it start it again. Nothing is lost, since what was not acked is delivered again.
"""

import argparse
import json
import os
import sys
from collections import OrderedDict

import pika
from pika.exceptions import AMQPError

RESULT_TYPE = "classify.result.v1"


class Seen:
    """The last ids: at-least-once delivery brings a job's result twice now and then, always under the same id.

    Here they are lost with the process. If a second handling would do harm, keep the id where the result goes, in the same
    transaction.
    """

    def __init__(self, most: int = 100_000) -> None:
        self.ids: OrderedDict[str, None] = OrderedDict()
        self.most = most

    def add(self, job_id: str) -> None:
        self.ids[job_id] = None
        if len(self.ids) > self.most:
            self.ids.popitem(last=False)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self.ids


def handle(result: dict) -> None:
    """What is done with a result. It may raise: then the message was not acked and comes again."""
    job_id = result["id"]
    if result["status"] == "failed":
        error = result["error"]
        print(f"{job_id}: failed: {error['code']}: {error['message']}", flush=True)
        return
    for image in result["images"]:
        if "error" in image:
            print(f"{job_id}: {image['uri']}: {image['error']['code']}: {image['error']['message']}", flush=True)
        else:
            label = "unknown" if image["label"] is None else image["label"]
            print(f"{job_id}: {image['uri']}: {label} {image['score']:.4f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", default="angler.results", help="where results come (default: %(default)s)")
    parser.add_argument("--count", type=int, help="end after so many jobs (default: go on)")
    arguments = parser.parse_args()

    url = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/%2f")
    seen, handled = Seen(), 0
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        # How many unacked messages the broker hands out at once: it bounds memory, and what comes again after a crash.
        channel.basic_qos(prefetch_count=16)
        for method, properties, body in channel.consume(arguments.queue):
            job_id = properties.message_id
            if properties.type != RESULT_TYPE:
                print(f"passed over: a message of type {properties.type!r}", file=sys.stderr)
            elif job_id in seen:
                print(f"passed over: {job_id} again", file=sys.stderr)
            else:
                handle(json.loads(body))
                seen.add(job_id)
                handled += 1
            # Only now: what was acked is gone from the broker.
            channel.basic_ack(method.delivery_tag)
            if handled == arguments.count:
                break
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AMQPError as error:
        print(f"the broker: {error!r}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
