"""What people on call see: alerts, the dashboard's queries, the workers' page; and what of it changes."""

import json
import re
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser

# With the scrape interval of deploy/prometheus, Grafana makes a minute of $__rate_interval.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".+"}
VOID = {"meta", "link", "br", "hr", "img", "input"}


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


class Page(HTMLParser):
    """The words of the worker's page that a reader sees, by the heading above them."""

    def __init__(self, html):
        super().__init__()
        self.open, self.parts, self.part, self.heading = [], {}, None, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        unseen = tag in ("script", "style", "noscript", "head") or "hidden" in dict(attributes)
        if tag not in VOID:
            self.open.append((tag, unseen))
        if tag in ("header", "main"):
            self.part = tag
        self.heading = tag == "h2" or (self.heading and tag != "section")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass
        self.heading = self.heading and tag != "h2"

    def handle_data(self, data):
        words = data.strip()
        if not words or any(unseen for _, unseen in self.open):
            return
        if self.heading:
            self.part = words
        elif self.part:
            self.parts.setdefault(self.part, []).append(words)

    def text(self, part):
        return " ".join(" ".join(self.parts.get(part, [])).split())


class Watch:
    def __init__(self, say, prometheus, workers, dashboard, browser, pictures):
        self.say, self.prometheus, self.workers = say, prometheus, workers
        self.browser, self.pictures = browser, pictures
        panels = json.loads(dashboard.read_text())["panels"]
        self.panels = {panel["title"]: panel["targets"] for panel in panels if "targets" in panel}
        self.before, self.watched = {}, []

    def named(self, text):
        """With the workers' names in place of their addresses."""
        for name, url in self.workers.items():
            text = text.replace(url.removeprefix("http://"), name)
        return text

    def alerts(self):
        """(name, worker and set or ""): the alert, of all that are pending or firing."""
        found = {}
        for alert in json.loads(get(f"{self.prometheus}/api/v1/alerts"))["data"]["alerts"]:
            labels = alert["labels"]
            of = " ".join(labels[key] for key in ("instance", "set") if key in labels)
            found[labels["alertname"], self.named(of)] = alert
        return found

    def firing(self):
        return {key for key, alert in self.alerts().items() if alert["state"] == "firing"}

    def ask(self, query):
        query = urllib.parse.urlencode({"query": query})
        return json.loads(get(f"{self.prometheus}/api/v1/query?{query}"))["data"]["result"]

    def up(self):
        """How many targets answer."""
        return sum(float(series["value"][1]) for series in self.ask("up"))

    def panel(self, title):
        """Name and value of each series that the panel shows now."""
        found = {}
        for target in self.panels[title]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            for series in self.ask(query):
                labels = series["metric"]
                name = re.sub(r"{{(\w+)}}", lambda hole: labels.get(hole[1], ""), target.get("legendFormat") or "")
                if not name and len(labels) > 1:
                    name = " ".join(value for key, value in labels.items() if key not in ("__name__", "job"))
                found[self.named(name)] = float(series["value"][1])
        return found

    def words(self, title, names=None):
        """What the panel shows; of many series those that are named."""
        found = sorted(self.panel(title).items())
        shown = [f"{name} {value:.3g}".strip() for name, value in found if names is None or name in names]
        return ", ".join(shown) or "no data"

    def sign(self, title):
        """What must change of a panel to be worth a line: of a rate whether there is one, of queues which are seen."""
        queries = " ".join(target["expr"] for target in self.panels[title])
        if "queue" in queries:
            return dict.fromkeys(self.panel(title), True)
        rate = re.search(r"rate\(|increase\(", queries)
        return {name: value > 0 if rate else value for name, value in self.panel(title).items()}

    def status(self, worker):
        return json.loads(get(f"{self.workers[worker]}/status"))

    def pages(self):
        """What /status says of what may go wrong, which is what the page shows."""
        seen = {}
        for worker in self.workers:
            try:
                status = self.status(worker)
            except (OSError, urllib.error.URLError):
                seen[worker, "state"] = "no answer"
                continue
            # Whatever the page comes to say of it, in its own words.
            seen[worker, "state"] = "ready" if status["ready"] else f"not ready: {status['missing']}"
            for classes in status["classes"]:
                refused = classes.get("refused")
                words = f"serves {classes['set']}@{classes['version']}"
                if refused:
                    words += f"; {refused.get('version') or 'active.json'} was refused: {refused['reason']}"
                seen[worker, "classes"] = words
            if status["errors"]:
                error = status["errors"][0]
                seen[worker, "errors"] = f"{error['code']}, job {error['job']}: {error['message']}"
        return seen

    def look(self):
        """Prints what is other than when it was last looked at."""
        now = {}
        for (name, of), alert in self.alerts().items():
            now["alert", name, of] = alert["state"]
            if alert["state"] == "firing":
                told = alert["annotations"]
                now["alert", name, of] = self.named(f"fires: {told['summary']}. {told['action']}")
        signs = {title: self.sign(title) for title in self.watched}
        for title, sign in signs.items():
            now["panel", title] = sign
        for (worker, key), words in self.pages().items():
            now["page", worker, key] = words
        for key in sorted(now.keys() | self.before.keys()):
            if now.get(key) == self.before.get(key):
                continue
            kind, *rest = key
            if kind == "panel":
                old, new = self.before.get(key), now.get(key)
                if old is not None and new is not None:
                    other = {name for name in new if new[name] != old.get(name)}
                    self.say("panel", f"{rest[0]}: {self.words(rest[0], other or None)}")
            elif kind == "alert":
                self.say("alert", f"{' '.join(rest).strip()} {now.get(key, 'is over')}")
            else:
                self.say("page", f"{rest[0]}: {now.get(key, 'nothing any more')}")
        self.before = now

    def watch(self, titles):
        unknown = [title for title in titles if title not in self.panels]
        if unknown:
            raise SystemExit(f"incident: the dashboard has no panel {unknown}")
        self.watched = titles

    def shoot(self, name):
        """Pictures of each worker's page, and its words: the top and each section by its heading."""
        seen = {}
        for worker, url in self.workers.items():
            picture = self.pictures / f"incident-{name}-{worker}.png"
            picture.unlink(missing_ok=True)
            self.browse(url, "--window-size=1280,1400", "--hide-scrollbars", f"--screenshot={picture}")
            if not picture.is_file():
                raise SystemExit(f"incident: the browser made no {picture}")
            seen[worker] = Page(self.browse(url, "--dump-dom"))
        return seen

    def browse(self, url, *arguments):
        with tempfile.TemporaryDirectory() as profile:
            command = [self.browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                       "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
                       "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *arguments, url]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=True)
        return done.stdout
