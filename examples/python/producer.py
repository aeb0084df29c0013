"""Sends one job to angler's workers and prints its id: producer.py --classes bottles@7 s3://photos/a.jpg s3://photos/b.jpg

Needs pika (pip install pika). AMQP_URL says where the broker is.
"""

import argparse
import json
import os
import sys
import time
import uuid

import pika
from pika.exceptions import AMQPError, UnroutableError

JOBS = "angler.jobs"
TRIES = 3


def publish(url: str, job: dict[str, object], job_id: str) -> None:
    """Returns once the broker has confirmed the job; anything else is an exception."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        # From here on basic_publish waits for the broker's confirm.
        channel.confirm_delivery()
        channel.basic_publish(
            exchange="",  # the default one: it routes to the queue of this name
            routing_key=JOBS,
            body=json.dumps(job).encode(),
            properties=pika.BasicProperties(
                type="classify.v1", content_type="application/json", delivery_mode=2, message_id=job_id
            ),
            # Without it RabbitMQ confirms a message that no queue takes, and drops it.
            mandatory=True,
        )
    finally:
        if connection.is_open:
            connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", required=True, help="a class set, or a version of it: bottles, or bottles@7")
    parser.add_argument("--id", help="the job's id; one that was sent before is sent again (default: a new one)")
    parser.add_argument("images", nargs="+", metavar="URI", help="s3://bucket/key")
    arguments = parser.parse_args()

    # The id is chosen before the first try, so that each try sends the same job.
    job_id: str = arguments.id or str(uuid.uuid4())
    job: dict[str, object] = {"id": job_id, "classes": arguments.classes, "images": arguments.images}
    url = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/%2f")
    for attempt in range(1, TRIES + 1):
        try:
            publish(url, job, job_id)
        except UnroutableError:
            print(f"there is no queue {JOBS}: workers declare it when they start", file=sys.stderr)
            return 1
        except (AMQPError, OSError) as error:
            # Perhaps the broker has it and only its confirm was lost. Sending it again is right all the same: then there are
            # two results with this id, and the consumer takes one of them.
            print(f"try {attempt} of {TRIES}: {error!r}", file=sys.stderr)
            time.sleep(attempt)
        else:
            print(job_id)
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
