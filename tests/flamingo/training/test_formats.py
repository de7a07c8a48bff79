"""Runs on small files in the layouts of MMC4, OBELICS, img2dataset and WebVid."""

import base64
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from flamingo.training import Clips, Documents, Pairs, read_log, train
from flamingo.training.data import Stream
from tests.helpers.tiny_run import config, images, model, processor

pytest.importorskip("PIL")

PICTURES = images(6, seed=0)


def jpeg(number):
    file = io.BytesIO()
    PICTURES[number].save(file, "JPEG", quality=95)
    return file.getvalue()


def tar(path, files):
    """A shard as other programs write it: with folders before the names, gzip aside."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"mtime": "1700000000.5", "comment": "x" * 200}
            shard.addfile(member, io.BytesIO(content))


def mmc4_page(number, **content):
    info = {
        "image_name": f"{number:012x}.jpg",
        "raw_url": f"https://a.example/{number}.jpg",
        "matched_text_index": 1,
        "matched_sim": 0.31,
        "face_detections": None,
        **content,
    }
    other = {**info, "image_name": "lost.jpg", "matched_sim": 0.1}
    page = {
        "url": "https://a.example",
        "text_list": ["Colours of a page.", f"Here is picture {number}.", "That was all."],
        "image_info": [info, {k: v for k, v in other.items() if k != "image_base64"}],
        "similarity_matrix": [[0.1, 0.31, 0.2], [0.1, 0.1, 0.05]],
        "could_have_url_duplicate": 0,
    }
    return json.dumps(page).encode()


def mmc4_in_base64(folder):
    """As open_flamingo's script writes it."""
    pages = {f"{n:09d}.json": mmc4_page(n, image_base64=base64.b64encode(jpeg(n)).decode()) for n in range(6)}
    tar(folder / "000000000.tar", pages)
    return Documents(name="mmc4", shards=(f"{folder}/{{000000000..000000000}}.tar",), batch_size=2)


def mmc4_as_published(folder):
    """Lines of JSON, and the images in a folder."""
    (folder / "images").mkdir()
    for number in range(6):
        (folder / "images" / f"{number:012x}.jpg").write_bytes(jpeg(number))
    (folder / "docs_shard_0_v2.jsonl").write_bytes(b"\n".join(mmc4_page(n) for n in range(6)))
    shards = (f"{folder}/docs_shard_*_v2.jsonl",)
    return Documents(name="mmc4", shards=shards, images=f"{folder}/images", batch_size=2)


def obelics_page(number, image):
    return json.dumps(
        {
            "images": [None, image, None],
            "texts": ["Colours of a page.", None, f"That was picture {number}."],
            "metadata": json.dumps([None, {"src": "https://a.example/a.jpg", "rendered_width": 12}, None]),
            "general_metadata": json.dumps({"url": "https://a.example", "warc_filename": "x"}),
        }
    ).encode()


def obelics(folder):
    """URLs where images are, which lie beside the page."""
    files = {}
    for number in range(6):
        files[f"./web/{number:05d}.json"] = obelics_page(number, "https://a.example/a.jpg?size=large")
        files[f"./web/{number:05d}.0.jpg"] = jpeg(number)
    tar(folder / "web.tar", files)
    return Documents(name="obelics", shards=(str(folder),), batch_size=2)


def obelics_in_base64(folder):
    encoded = [base64.b64encode(jpeg(number)).decode() for number in range(6)]
    pages = [obelics_page(number, {"bytes": image, "path": None}) for number, image in enumerate(encoded)]
    (folder / "train.jsonl").write_bytes(b"\n".join(pages) + b"\n")
    return Documents(name="obelics", shards=(str(folder),), batch_size=2)


def laion(folder):
    """As img2dataset writes it, with classes and embeddings that others add."""
    files = {}
    for number in range(6):
        key = f"{number:09d}"
        known = {
            "caption": f"picture {number}",
            "url": "https://a.example",
            "status": "success",
            "exif": "{}",
        }
        files |= {f"{key}.jpg": jpeg(number), f"{key}.txt": f"picture {number}".encode()}
        files |= {f"{key}.json": json.dumps(known).encode(), f"{key}.cls": b"3", f"{key}.npz": b"PK"}
    tar(folder / "00000.tar", files)
    return Pairs(name="laion", shards=(f"{folder}/{{00000..00000}}.tar",), batch_size=2)


def frames(folder):
    files = {}
    for number in range(3):
        files |= {f"{number}.{frame}.jpg": jpeg(frame) for frame in range(number + 1)}
        files[f"{number}.txt"] = f"picture {number}".encode()
    tar(folder / "clips.tar", files)
    return Clips(name="clips", shards=(str(folder),), batch_size=2)


def videos(folder):
    """As WebVid is downloaded."""
    av = pytest.importorskip("av")
    files = {}
    for number in range(3):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=2)
            stream.width = stream.height = 32
            for level in range(4):
                pixels = np.full((32, 32, 3), 60 * level, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
        files |= {f"{number}.mp4": file.getvalue(), f"{number}.txt": f"picture {number}".encode()}
        files[f"{number}.json"] = json.dumps({"videoid": number, "duration": "PT00H00M02S"}).encode()
    tar(folder / "webvid.tar", files)
    return Clips(name="webvid", shards=(str(folder),), batch_size=2)


LAYOUTS = [mmc4_in_base64, mmc4_as_published, obelics, obelics_in_base64, laion, frames, videos]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def dataset(request, tmp_path):
    (tmp_path / "data").mkdir()
    return request.param(tmp_path / "data")


def test_every_sample_has_its_text_and_its_image(dataset):
    """Each picture next to its own number."""
    own = processor()
    plain = Stream(replace(dataset, flip=0.0, colour=0.0), own, seed=0, at_once=1)
    expected = [own.clip(jpeg(number)) for number in range(6)]
    for _ in range(6):
        batch = next(plain)
        assert plain.bad == []
        assert batch.num_media.tolist() == [1, 1]
        for ids, media in zip(batch.input_ids, batch.pixels, strict=True):
            text = own.tokenizer.decode(ids.tolist())
            assert text.count("<image>") == 1
            number = int(text.partition("picture ")[2][0])
            if dataset.name == "webvid":
                continue
            assert torch.equal(media[0, number if dataset.name == "clips" else 0], expected[number][0])


def test_a_run_on_it_learns(dataset, tmp_path):
    run = config(tmp_path, tmp_path / "run", datasets=(dataset,), steps=8)
    train(model(), processor(), run)
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert log[-1][f"bad/{dataset.name}"] == 0
