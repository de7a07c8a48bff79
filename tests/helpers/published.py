"""Small datasets in the layout in which each is published, and what is read of them."""

import csv
import json
from pathlib import Path
from typing import Any

HEX = "003a8ae2ef43b901"


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_csv(path: Path, header: str, *rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def touch(folder: Path, *names: str) -> Path:
    """Empty files: who reads a dataset does not open its images and videos."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def answers(said: list[str]) -> list[dict]:
    return [{"answer_id": k, "answer": one, "answer_confidence": "yes"} for k, one in enumerate(said, 1)]


def vqav2(folder: Path) -> dict[str, Path]:
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 393225, "question": "What's in the bowl?", "question_id": 393225001},
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": said,
            "answers": answers([said] * 8 + ["up"] * 2),
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }
        for question, said in zip(questions, ["down", "soup"], strict=True)
    ]
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014"}
    return {
        "questions": write_json(
            folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions}
        ),
        "annotations": write_json(
            folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations}
        ),
        "images": touch(
            folder / "val2014", *(f"COCO_val2014_{one['image_id']:012d}.jpg" for one in questions)
        ),
    }


def okvqa(folder: Path) -> dict[str, Path]:
    question = {"image_id": 297147, "question": "What sport can you use this for?", "question_id": 2971475}
    said = [{"raw_answer": "surfing", "answer": "surf"}] * 6 + [{"raw_answer": "surf", "answer": "surf"}] * 4
    annotation = {
        "image_id": 297147,
        "answer_type": "other",
        "question_type": "four",
        "question_id": 2971475,
        "confidence": 3,
        "answers": [{"answer_id": k + 1, "answer_confidence": "yes", **one} for k, one in enumerate(said)],
    }
    return {
        "questions": write_json(folder / "OpenEnded_questions.json", {"questions": [question]}),
        "annotations": write_json(folder / "mscoco_val2014_annotations.json", {"annotations": [annotation]}),
        "images": touch(folder / "val2014", "COCO_val2014_000000297147.jpg"),
    }


def textvqa(folder: Path) -> dict[str, Path]:
    entry = {
        "question": "what is the brand of this camera?",
        "image_id": HEX,
        "image_classes": ["Cassette deck"],
        "flickr_original_url": "https://farm2.staticflickr.com/0.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", *["dakota"] * 9],
        "question_tokens": ["what", "is"],
        "question_id": 34602,
        "set_name": "val",
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return {
        "questions": write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": [entry]}),
        "images": touch(folder / "train_images", f"{HEX}.jpg"),
    }


def vizwiz(folder: Path) -> dict[str, Path]:
    said = [{"answer": "can", "answer_confidence": "yes"}] * 9 + [
        {"answer": "tin", "answer_confidence": "no"}
    ]
    entries = [
        {
            "image": f"VizWiz_val_0000000{n}.jpg",
            "question": "What is this?",
            "answers": said,
            "answer_type": "other",
            "answerable": 1,
        }
        for n in range(2)
    ]
    return {
        "questions": write_json(folder / "val.json", entries),
        "images": touch(folder / "val", *(entry["image"] for entry in entries)),
    }


def coco(folder: Path) -> dict[str, Path]:
    images = [
        {
            "filepath": below,
            "sentids": [2 * n, 2 * n + 1],
            "filename": f"COCO_{below}_{number:012d}.jpg",
            "imgid": n,
            "split": split,
            "sentences": [
                {"tokens": [], "raw": f" A man in {split}.", "imgid": n, "sentid": 2 * n},
                {"tokens": [], "raw": "A horse.", "imgid": n, "sentid": 2 * n + 1},
            ],
            "cocoid": number,
        }
        for n, (below, split, number) in enumerate(
            [
                ("val2014", "test", 391895),
                ("val2014", "restval", 60623),
                ("train2014", "train", 57870),
                ("val2014", "val", 184613),
            ]
        )
    ]
    return {
        "annotations": write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"}),
        "images": touch(folder / "coco", *(f"{one['filepath']}/{one['filename']}" for one in images)),
    }


def flickr30k(folder: Path) -> dict[str, Path]:
    images = [
        {
            "sentids": [n],
            "imgid": n,
            "sentences": [{"tokens": [], "raw": "Two men.", "imgid": n, "sentid": n}],
            "split": split,
            "filename": f"10000{n}.jpg",
        }
        for n, split in enumerate(["train", "test", "val"])
    ]
    return {
        "annotations": write_json(
            folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}
        ),
        "images": touch(folder / "flickr30k-images", *(one["filename"] for one in images)),
    }


def vatex(folder: Path) -> dict[str, Path]:
    entries = [
        {"videoID": name, "enCap": ["A man runs. ", "Someone runs."], "chCap": ["x"]}
        for name in ("G9zN5TTuGO4_000179_000189", "-8o6bzBhKfE_000010_000020")
    ]
    return {
        "annotations": write_json(folder / "vatex_public_test_english_v1.1.json", entries),
        "videos": touch(folder / "videos", "G9zN5TTuGO4_000179_000189.mp4"),
    }


def youcook2(folder: Path) -> dict[str, Path]:
    def video(subset: str, kind: str) -> dict:
        parts = [
            {"segment": [90, 102], "id": 0, "sentence": "spread margarine on bread"},
            {"segment": [114, 127], "id": 1, "sentence": "place cheese on the bread"},
        ]
        return {
            "duration": 241.62,
            "subset": subset,
            "recipe_type": kind,
            "annotations": parts,
            "video_url": "https://www.youtube.com/watch?v=x",
        }

    database = {"GLd3aX16zBg": video("validation", "113"), "xHr8X2Wpmno": video("training", "101")}
    return {
        "annotations": write_json(folder / "youcookii_annotations_trainval.json", {"database": database}),
        "videos": touch(
            folder / "raw_videos", "validation/113/GLd3aX16zBg.mp4", "training/101/xHr8X2Wpmno.mkv"
        ),
    }


def video_qa(folder: Path, numbers: list[int], name: str) -> dict[str, Path]:
    entries = [
        {
            "answer": "dog",
            "category_id": 14,
            "id": 158581 + n,
            "question": "what is running?",
            "video_id": number,
        }
        for n, number in enumerate(numbers)
    ]
    return {
        "annotations": write_json(folder / "test_qa.json", entries),
        "videos": touch(folder / "video", *(name.format(number) for number in numbers)),
    }


def msvdqa(folder: Path) -> dict[str, Path]:
    return video_qa(folder, [1301, 1302], "vid{}.avi")


def msrvttqa(folder: Path) -> dict[str, Path]:
    return video_qa(folder, [7010, 7011], "video{}.mp4")


def ivqa(folder: Path) -> dict[str, Path]:
    header = "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5"
    rows = [
        ["Z5pmS7hbQSQ", 124, 134, "What is she using, exactly?", "knife", "knife", "fork", "spoon", "bowl"],
        ["gone", 3, 9, "What is cut?", "wood", "wood", "wood", "wood", "log"],
    ]
    return {
        "annotations": write_csv(folder / "test.csv", header, *rows),
        "videos": touch(folder / "video", "Z5pmS7hbQSQ.webm"),
    }


def nextqa(folder: Path) -> dict[str, Path]:
    header = "video,frame_count,width,height,question,answer,qid,type"
    rows = [
        [4924794333, 1058, 640, 360, "is the baby old enough to converse", "no", 4, "DB"],
        [3747890905, 1152, 640, 360, "how does the adult get rid of it", "uses the spoon", 8, "CH"],
    ]
    return {
        "annotations": write_csv(folder / "test.csv", header, *rows),
        "more_answers": write_json(
            folder / "add_reference_answer_test.json", {"3747890905": {"8": "spoon", "9": "x"}}
        ),
        "videos": touch(folder / "NExTVideo", "1164/4924794333.mp4", "0016/3747890905.mp4"),
    }


def star(folder: Path) -> dict[str, Path]:
    choices = ["The closet/cabinet.", "The blanket.", "The clothes.", "The table."]
    entry = {
        "question_id": "Interaction_T1_13",
        "question": "Which object was tidied up by the person?",
        "video_id": "6H78U",
        "start": 11.1,
        "end": 19.6,
        "answer": "The clothes.",
        "question_program": [],
        "choices": [{"choice_id": n, "choice": one, "choice_program": []} for n, one in enumerate(choices)],
        "situations": {},
    }
    return {
        "annotations": write_json(folder / "STAR_val.json", [entry]),
        "videos": touch(folder / "Charades_v1_480", "6H78U.mp4"),
    }


def visdial(folder: Path) -> dict[str, Path]:
    turns = [
        {"question": 0, "answer": 1, "gt_index": 2, "answer_options": [0, 2, 1]},
        {"question": 1, "answer": 2, "gt_index": 0, "answer_options": [2, 0, 3]},
        {"question": 2, "answer": 0, "gt_index": 1, "answer_options": [1, 0, 3]},
    ]
    dialogs = [
        {"image_id": 185565, "caption": "an image of 2 people", "dialog": turns},
        {"image_id": 284024, "caption": "a dog", "dialog": turns},
    ]
    data = {
        "questions": ["is it day", "is anyone there", "how many"],
        "answers": ["2", "yes", "no", "maybe"],
        "dialogs": dialogs,
    }
    dense = [{"image_id": 185565, "round_id": 2, "gt_relevance": [0.4, 0.0, 1.0]}]
    images = (f"VisualDialog_val2018_{one['image_id']:012d}.jpg" for one in dialogs)
    return {
        "dialogues": write_json(
            folder / "visdial_1.0_val.json", {"version": "1.0", "split": "val2018", "data": data}
        ),
        "annotations": write_json(folder / "visdial_1.0_val_dense_annotations.json", dense),
        "images": touch(folder / "VisualDialog_val2018", *images),
    }


def hatefulmemes(folder: Path) -> dict[str, Path]:
    lines = [
        {"id": 8291, "img": "img/08291.png", "label": 1, "text": "white people is this a shooting range"},
        {"id": 46971, "img": "img/46971.png", "label": 0, "text": 'bravery at its "finest" {x}'},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test_seen.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"annotations": path, "images": touch(folder, *(line["img"] for line in lines))}


def rareact(folder: Path) -> dict[str, Path]:
    header = "id,video_id,start,end,class_id,verb,noun,annotation"
    rows = [
        [0, "7frRY7aGwMU", 50, 60, 19, "shake", "table", 0],
        [1, "7frRY7aGwMU", 20, 30, 89, "cut", "laptop", 1],
        [2, "ppNqpTCZgf4", 40, 50, 89, "cut", "laptop", 3],
    ]
    return {
        "annotations": write_csv(folder / "rareact.csv", header, *rows),
        "videos": touch(folder / "rareact", "7frRY7aGwMU.mp4"),
    }


def imagenet(folder: Path) -> dict[str, Path]:
    classes = folder / "LOC_synset_mapping.txt"
    folder.mkdir(parents=True, exist_ok=True)
    classes.write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    files = ("n01440764/ILSVRC2012_val_00000293.JPEG", "n03126707/ILSVRC2012_val_00000001.JPEG")
    return {"images": touch(folder / "val", *files), "classes": classes}


def kinetics(folder: Path) -> dict[str, Path]:
    files = ("riding a bike/0Yxc5wY8JqA_000005_000015.mp4", "abseiling/-3B32lodo2M_000059_000069.mp4")
    return {"videos": touch(folder / "val", *files)}
