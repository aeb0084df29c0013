"""The acts of tests/incident.sh, and what must be seen at each of them."""

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from jobs import Jobs
from watch import Watch

ROOT = Path(__file__).resolve().parents[2]
PACE = 2  # seconds between two looks: no time in the log is more exact
SET = "fashion"
OTHER_MODEL = ROOT / "models/efficientnet-lite0-int8"
# What the dashboard shows on one screen of who is on call.
NOW = ["Workers ready", "Images a second", "Jobs that wait or are held", "Dead letters", "Firing alerts"]


class Missed(Exception):
    """What should have been seen and was not."""


class Incident:
    def __init__(self, options):
        self.folder, self.filer = options.folder, options.filer
        self.log = (ROOT / "target/tmp/incident.log").open("w")
        self.zero = time.monotonic()
        workers = dict(worker.split("=", 1) for worker in options.workers)
        self.watch = Watch(self.say, options.prometheus, workers, ROOT / "deploy/grafana/dashboards/angler.json",
                           os.environ["BROWSER"], ROOT / "target/tmp")
        images = sorted((ROOT / "samples/fashion/query").glob("*/*.png"))
        self.images = {f"s3://photos/{path.parent.name}/{path.name}": path for path in images}
        self.jobs = Jobs(os.environ["ANGLER__AMQP__URL"], list(self.images), SET)
        self.meant = set()  # alerts that may fire now

    def say(self, kind, text):
        after = int(time.monotonic() - self.zero)
        line = f"{f'+{after // 60}:{after % 60:02}':>7}  {kind:5}  {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def until(self, what, seconds, condition):
        """Looks again and again until it holds; prints what changes meanwhile."""
        end = time.monotonic() + seconds
        while True:
            self.watch.look()
            astray = self.watch.firing() - self.meant
            if astray:
                raise Missed(f"alerts that nothing speaks for: {sorted(astray)}")
            if condition():
                return
            if time.monotonic() > end:
                raise Missed(f"not within {seconds} s: {what}")
            time.sleep(PACE)

    def put(self, path, body):
        """An object, past everything that would look at it: /BUCKET/KEY."""
        request = urllib.request.Request(f"{self.filer}/buckets{path}", data=body, method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def run(self, *command):
        """A command of an operator, and what it prints."""
        shown = " ".join(str(part).replace(f"{ROOT}/", "") for part in command)
        done = subprocess.run([os.environ["ANGLER"], *command], cwd=self.folder / "python", stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=180)
        self.say("did", f"angler {shown}")
        if done.returncode:
            raise Missed(f"angler {shown} ended with {done.returncode}: {done.stderr}")
        if command[1] != "build":  # which lists images that look mislabelled
            for line in done.stdout.splitlines():
                self.say("", f"    {line}".rstrip())

    def server(self, *step):
        subprocess.run([ROOT / "tests/services/rabbitmq.sh", *step, self.folder / "rabbitmq"], check=True, timeout=150)

    def workers_ready(self):
        return self.watch.panel("Workers ready") == {"": 2.0}

    def begin(self):
        for uri, path in self.images.items():
            self.put(uri.removeprefix("s3:/"), path.read_bytes())
        self.run("classes", "build", ROOT / "samples/fashion/reference", "--set", SET, "--version", "1")
        self.run("classes", "activate", f"{SET}@1", "--no-announce")
        self.until("both workers are ready", 120, lambda: all(self.watch.status(w)["ready"] for w in self.watch.workers))
        self.jobs.start()
        self.watch.watch(NOW)
        self.until("Prometheus sees workers, queues and their work", 180, lambda: (
            self.watch.up() == 3 and self.workers_ready() and self.watch.panel("Dead letters") == {"": 0.0}
            and self.watch.panel("Images a second").get("", 0) > 0 and not self.watch.alerts()))

    def act(self, name, told, fault, alerts, panels, shown, pages, mend, over=180):
        """One fault, from its cause until nothing of it is left.

        * `alerts`: what must fire, and nothing else may; (name, worker and set)
        * `panels`: what must show it, each with what it must then say
        * `pages`: what the page must say under which heading, and whether of all workers
        """
        self.watch.watch([*NOW, *panels])
        self.watch.look()
        self.zero = fault_at = time.monotonic()
        self.say("", f"== {name}: {told}")
        fault()
        self.meant = alerts
        self.until(f"{sorted(alerts)} fire", 420, lambda: alerts <= self.watch.firing())
        for title, wanted in shown.items():
            self.until(f"{title} says {wanted}", 60, lambda: self.watch.panel(title) == wanted)
        self.say("", "what can be seen now:")
        for title in [*NOW, *panels]:
            self.say("panel", f"{title}: {self.watch.words(title)}")
        heading, words, everybody = pages
        right = []
        for worker, page in self.watch.shoot(name).items():
            for part in ("header", "Class vectors served", "Last errors"):
                self.say("page", f"{worker}, {part.lower()}: {page.text(part)}")
            right.append(words in page.text(heading))
        if not (all(right) if everybody else any(right)):
            raise Missed(f"the page does not say {words!r} under {heading!r}")
        self.say("jobs", self.jobs.since(fault_at))
        self.say("", "mended:")
        self.zero = mended_at = time.monotonic()
        mend()
        self.until("all alerts are over", over, lambda: not self.watch.alerts() and self.workers_ready())
        self.meant = set()
        self.until("jobs flow", 60, lambda: self.watch.panel("Images a second").get("", 0) > 0)
        self.say("jobs", self.jobs.since(mended_at))

    def broker(self):
        workers = self.watch.workers
        self.act(
            "broker", "the broker is killed",
            lambda: self.server("kill"),
            alerts={("AnglerNoWorkerReady", ""), *(("AnglerBrokerNotConnected", worker) for worker in workers)},
            panels=["Ready, connected, blocked, stalled, store away", "Queues", "Jobs by outcome"],
            shown={"Workers ready": {"": 0.0}, "Jobs that wait or are held": {}},
            pages=("header", "not ready", True),
            mend=self.start_broker,
        )

    def start_broker(self):
        self.server("start")
        self.server("wait")
        self.say("did", "the broker is started again and serves")

    def refused(self, name, told, fault, pages, mend):
        self.act(
            name, told, fault,
            alerts={("AnglerSwapRefused", f"{worker} {SET}") for worker in self.watch.workers},
            panels=["Refused versions", "Swaps by set and outcome", "Versions of class vectors", "Jobs by outcome"],
            shown={"Refused versions": {SET: 2.0}},
            pages=pages, mend=mend,
        )

    def vectors(self):
        self.refused(
            "vectors", "active.json is written by hand and names version 9, which is not there",
            lambda: self.put(f"/models/classes/{SET}/active.json", b'{"version": "9"}'),
            pages=("Class vectors served", "version 9 was refused", True),
            mend=lambda: self.run("classes", "activate", f"{SET}@1"),
        )

    def model(self):
        self.run("classes", "build", ROOT / "samples/fashion/reference", "--set", SET, "--version", "2", "--model", OTHER_MODEL)
        self.refused(
            "model", "a version made with another model is activated with that model's settings",
            lambda: self.run("classes", "activate", f"{SET}@2", "--no-announce", "--model", OTHER_MODEL),
            pages=("Class vectors served", "version 2 was refused", True),
            mend=lambda: self.run("classes", "rollback", SET),
        )

    def job(self):
        self.act(
            "job", "a message { comes to the queue of jobs",
            lambda: self.jobs.poison(b"{"),
            alerts={("AnglerDeadLetters", "")},
            panels=["Failed jobs by code", "Retries and dead letters", "Jobs by outcome"],
            shown={"Dead letters": {"": 1.0}},
            pages=("Last errors", "malformed_job", False),
            mend=lambda: self.run("dead", "purge", "--reason", "malformed_job", "--yes"),
            over=1080,  # the alert looks a quarter of an hour back
        )

    def finish(self):
        """Every job that was confirmed has its result."""
        self.jobs.enough.set()
        self.until("every job has a result", 60, lambda: not self.jobs.missing())
        self.say("jobs", f"{len(self.jobs.sent)} sent and confirmed, each with a result; {self.jobs.again} results came twice")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--filer", required=True)
    parser.add_argument("--prometheus", required=True)
    parser.add_argument("--workers", nargs="+", required=True)
    parser.add_argument("--acts", nargs="+", required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    incident = Incident(options)
    try:
        incident.begin()
        for act in options.acts:
            getattr(incident, act)()
        incident.finish()
    except Missed as missed:
        incident.say("", f"MISSED: {missed}")
        return 1
    finally:
        incident.jobs.end()
    incident.say("", "all of it was seen, and all of it was over")
    return 0


if __name__ == "__main__":
    sys.exit(main())
