"""Prints the int8 model beside the default one: size, speed, accuracy, nearness.

    python measure.py [--model ../efficientnet-lite0-fp16] [--rounds 9] [--images 64]

Needs numpy, onnxruntime and pillow. Run it on a machine that does nothing else. Times
are of the network alone, one thread, ONNX Runtime's CPU provider: medians over rounds
in which the two models take turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

import samples

# Other views than those that quantise.py calibrates with.
SEED = 2
VIEWS_OF_A_PHOTO = 12


def milliseconds(models, batch, rounds, images):
    """For each model the median time of one image, in batches."""
    times = [[] for _ in models]
    for number in range(rounds + 1):
        for model, taken in zip(models, times):
            start = time.perf_counter()
            for _ in range(max(1, images // len(batch))):
                model.run(batch)
            done = max(1, images // len(batch)) * len(batch)
            # The first round warms up.
            if number > 0:
                taken.append((time.perf_counter() - start) * 1000 / done)
    return [statistics.median(taken) for taken in times]


def labels(vectors, embeddings):
    return (embeddings @ vectors.T).argmax(axis=1)


def class_vectors(references, count):
    """The mean of each class's references, which are equally many."""
    means = references.reshape(count, -1, references.shape[1]).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description="a variant of the default model beside it")
    parser.add_argument("--model", type=Path, default=samples.FOLDER, help="the variant's folder")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing")
    parser.add_argument("--images", type=int, default=64, help="images a round")
    arguments = parser.parse_args()

    folders = [samples.DEFAULT, arguments.model.resolve()]
    models = [samples.Model(folder) for folder in folders]
    rng = np.random.default_rng(SEED)
    photos = [samples.opened(file) for file in samples.files("photos")]
    views = [view for photo in photos for view in samples.views(photo, VIEWS_OF_A_PHOTO, rng)]
    query_files = samples.files("fashion/query")
    names = sorted({file.parent.name for file in query_files})
    queries = [samples.opened(file) for file in query_files]
    references = [samples.opened(file) for file in samples.files("fashion/reference")]
    truth = np.array([names.index(file.parent.name) for file in query_files])
    photo_of_view = np.repeat(np.arange(len(photos)), VIEWS_OF_A_PHOTO)

    rows = [("size, MB", [f"{(f / 'model.onnx').stat().st_size / 1e6:.1f}" for f in folders])]
    tensor = samples.tensor(photos, models[0].input)
    for size in (1, 8):
        times = milliseconds(models, tensor[:size], arguments.rounds, arguments.images)
        rows.append((f"ms an image, batches of {size}", [f"{value:.2f}" for value in times]))

    kinds = {"photos": photos, "views of photos": views, "fashion queries": queries}
    embedded = {kind: [m.embed(images) for m in models] for kind, images in kinds.items()}
    found = [
        labels(class_vectors(model.embed(references), len(names)), embeddings)
        for model, embeddings in zip(models, embedded["fashion queries"])
    ]
    right = [f"{(labels_found == truth).sum()} of {len(truth)}" for labels_found in found]
    rows.append(("fashion queries with the right class", right))
    rows.append(("… with the fp32 model's class", ["", f"{(found[0] == found[1]).sum()} of {len(truth)}"]))
    known = [
        labels(vectors, embeddings)
        for vectors, embeddings in zip(embedded["photos"], embedded["views of photos"])
    ]
    right = [f"{(k == photo_of_view).sum()} of {len(k)}" for k in known]
    rows.append(("views nearest to their photo", right))
    for kind, (old, new) in embedded.items():
        cosines = (old * new).sum(axis=1)
        nearness = f"{cosines.mean():.3f}, {cosines.min():.3f}"
        rows.append((f"cosine with fp32, {kind}: mean, worst", ["", nearness]))

    print(f"| | {' | '.join(folder.name for folder in folders)} |")
    print("|---|---|---|")
    for what, values in rows:
        print(f"| {what} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
