"""The other peer: the model behind mosec, a model server from PyPI with dynamic batching (its core is in Rust), fed by
`worker.py served`. A request is an encoded image, the answer its label and score.

    server.py whole  --port PORT     as many processes as cores; each decodes, embeds and scores, on one thread
    server.py stages --port PORT     a stage of processes that decode, then one process that embeds, on all cores

Both shapes are in its documentation; settings as in worker.py. Each of its processes prints "ready".
"""

import os
import sys
import warnings

import mosec

from worker import Classifier, Decoder, tunable

# It warns at each batch of encoded camera photos that it is large.
warnings.filterwarnings("ignore", "IPC data")

CORES = os.cpu_count()
BATCH = tunable("SERVER_BATCH", 16)
WAIT_MS = tunable("SERVER_WAIT_MS", 10)  # mosec's default


class Stage(mosec.Worker):
    def deserialize(self, data):
        return data  # the image's own bytes, not JSON


class Decode(Stage):
    def __init__(self):
        self.decoder = Decoder()
        os.write(1, b"ready\n")  # in one piece: several processes share the pipe

    def forward(self, data):
        return self.decoder.pixels(data)  # a quarter of what the tensor would be to hand over


class Embed(Stage):
    def __init__(self):
        self.decoder, self.classifier = Decoder(), Classifier()
        os.write(1, b"ready\n")  # in one piece: several processes share the pipe

    def forward(self, data):
        return self.classifier.classify([self.decoder.tensor(pixels) for pixels in data])


class Whole(Stage):
    def __init__(self):
        self.decoder, self.classifier = Decoder(), Classifier(threads=1)
        os.write(1, b"ready\n")  # in one piece: several processes share the pipe

    def forward(self, data):
        return self.classifier.classify([self.decoder.tensor(self.decoder.pixels(body)) for body in data])


if __name__ == "__main__":
    # Further flags are mosec's own.
    server = mosec.Server()
    if sys.argv[1] == "whole":
        server.append_worker(Whole, num=CORES, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    else:
        server.append_worker(Decode, num=CORES)
        server.append_worker(Embed, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
