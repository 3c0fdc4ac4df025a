"""Every format of prompts: a tiny file of each published shape, the project's own columns, and broken lines."""

from pathlib import Path

import pytest

from harness.config.dataset import FORMATS, DatasetConfig
from harness.datasets.dataset import Dataset, load_dataset
from harness.datasets.prompts import DatasetError, DatasetPrompt
from harness.datasets.readers import READERS

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "a blue kite\tArtifacts\tBasic\t\n"
    '"O K" on a wooden door\tIllustrations\tWriting & Symbols\t\n'
    'a sign that says "exit"\tArtifacts\tComplex\tmade up\n'
)
DRAWBENCH = 'Prompts,Category\nA green bus.,Colors\n"Two spoons, one fork.",Counting\n'
GENEVAL = (
    '{"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"}\n'
    '{"tag": "counting", "include": [], "exclude": [], "prompt": "a photo of two spoons"}\n'
)
COCO = (
    '{"info": {}, "images": [{"id": 9, "height": 480, "width": 640, "file_name": "9.jpg"}], "licenses": [], '
    '"annotations": [{"image_id": 9, "id": 77, "caption": "A kite above a beach."}, '
    '{"image_id": 9, "id": 78, "caption": "A beach with a kite. "}]}'
)
VBENCH = (
    '[{"prompt_en": "a kite in the wind", "dimension": ["subject_consistency", "motion_smoothness"]}, '
    '{"prompt_en": "a spoon", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}}]'
)
MLPERF = (
    "id\timage_id\tcaption\theight\twidth\tfile_name\tcoco_url\n"
    "70\t9\tA kite above a beach.\t640\t480\t9.jpg\thttp://localhost/9.jpg\n"
    '71\t9\t"A sign that reads ""exit"""\t640\t425\t9.jpg\thttp://localhost/9.jpg\n'
)


def read(folder: Path, text: str | bytes, form: str, name: str = "prompts.data") -> Dataset:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_dataset(DatasetConfig(file=str(file), format=form))


def brief(prompt: DatasetPrompt) -> tuple[str, str, tuple[str, ...]]:
    return prompt.prompt, prompt.id, prompt.categories


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (
            "parti_prompts",
            PARTI,
            [
                ("a blue kite", "0", ("Artifacts",)),
                ('"O K" on a wooden door', "1", ("Illustrations",)),
                ('a sign that says "exit"', "2", ("Artifacts",)),
            ],
        ),
        (
            "drawbench",
            DRAWBENCH,
            [("A green bus.", "0", ("Colors",)), ("Two spoons, one fork.", "1", ("Counting",))],
        ),
        (
            "geneval",
            GENEVAL,
            [("a photo of a kite", "00000", ("single_object",)), ("a photo of two spoons", "00001", ("counting",))],
        ),
        ("coco", COCO, [("A kite above a beach.", "77", ()), ("A beach with a kite.", "78", ())]),
        (
            "vbench",
            VBENCH,
            [("a kite in the wind", "0", ("subject_consistency", "motion_smoothness")), ("a spoon", "1", ("color",))],
        ),
        ("mlperf_sdxl", MLPERF, [("A kite above a beach.", "70", ()), ('A sign that reads "exit"', "71", ())]),
        ("text", "a kite\r\n\r\n  a spoon \n", [("a kite", "0", ()), ("a spoon", "1", ())]),
    ],
)
def test_a_published_shape_is_read(
    tmp_path: Path, form: str, text: str, expected: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    found = read(tmp_path, text, form).prompts
    assert [brief(prompt) for prompt in found] == expected
    assert [prompt.index for prompt in found] == list(range(len(found)))
    assert not any(prompt.has_own_request for prompt in found), "sizes of COCO's own images are no request"


def test_every_format_has_a_reader() -> None:
    assert set(READERS) == set(FORMATS) - {"auto"}


OWN = DatasetPrompt(0, "a kite", "k1", 1, ("toys",), 7, "blurry", 768, 512)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "a.jsonl",
            '{"prompt": "a kite", "id": "k1", "category": "toys", "seed": 7, "negative_prompt": "blurry", '
            '"size": "512x768", "images": []}\n',
            1,
        ),
        ("a.csv", "Prompt,ID,category,seed,negative,height,width\na kite,k1,toys,7,blurry,768,512\n", 2),
        ("a.tsv", "\ufeffprompt\tid\tcategory\tseed\tnegative\tsize\n\na kite\tk1\ttoys\t7\tblurry\t512X768\n", 3),
    ],
)
def test_own_columns_are_read_by_suffix(tmp_path: Path, name: str, text: str, line: int) -> None:
    (found,) = read(tmp_path, text, "auto", name).prompts
    assert {**{f: getattr(found, f) for f in found.__struct_fields__}} == {
        **{f: getattr(OWN, f) for f in OWN.__struct_fields__},
        "line": line,
    }


def test_a_field_of_another_program_is_named_as_unused(tmp_path: Path) -> None:
    found = read(tmp_path, '{"prompt": "a kite", "aesthetic": 5.1}\n', "jsonl")
    assert found.notes == ["fields of prompts.data that have no effect: aesthetic"]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("text", "", "has no prompts"),
        ("text", "\n \n", "has no prompts"),
        ("text", b"a kite\n\xff\xfea spoon\n", "line 2 is not UTF-8"),
        ("text", b"a kite\na\0b\n", "line 2 has a zero byte"),
        ("jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is no JSON"),
        ("jsonl", '{"prompt": "a"}\n\n["b"]\n', "line 3 is no JSON object"),
        ("jsonl", "[" * 100_000 + "\n", "line 1 is no JSON"),
        ("jsonl", '{"seed": 1}\n', "line 1: no prompt"),
        ("jsonl", '{"prompt": 4}\n', "line 1: the prompt 4 is no text"),
        ("jsonl", '{"prompt": "  "}\n', "line 1: the prompt is empty"),
        ("jsonl", '{"prompt": "a", "sed": 1}\n', "line 1: unknown field 'sed'; did you mean seed?"),
        ("jsonl", '{"prompt": "a", "seed": -1}\n', "line 1: seed=-1; give a whole number from 0 to"),
        ("jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed=True"),
        ("jsonl", '{"prompt": "a", "seed": 1.5}\n', "line 1: seed=1.5"),
        ("jsonl", '{"prompt": "a", "size": "big"}\n', "write WIDTHxHEIGHT"),
        ("jsonl", '{"prompt": "a", "size": "8x8", "width": 8}\n', "give size, or height and width"),
        ("jsonl", '{"prompt": "a", "negative": "b", "negative_prompt": "c"}\n', "not both"),
        ("jsonl", '{"prompt": "a", "images": ["b.png"]}\n', "line 1: input images are not supported"),
        ("jsonl", '{"prompt": "a", "category": 3}\n', "line 1: the category 3 is no text"),
        ("csv", "text,seed\na,1\n", "has no column 'prompt'"),
        ("csv", "prompt,seed\na,1\nb,2,3\n", "line 3 has 3 fields, and the header 2"),
        ("csv", 'prompt,seed\na,1\n"b,2\n', "line 3 is no row of a table"),
        ("csv", 'seed,prompt\n1,"two\nlines"\n2,\n', "line 4: no prompt"),
        ("csv", "prompt,seed\n", "has no prompts"),
        ("drawbench", "Prompts,Kind\na,b\n", "has no column 'category'"),
        ("geneval", '{"prompt": "a"}\n', "line 1: no tag"),
        ("coco", "{", "is no JSON"),
        ("coco", '{"images": []}', "no list `annotations`"),
        ("coco", '{"annotations": []}', "has no prompts"),
        ("coco", '{"annotations": [{"id": 1, "caption": "a"}, {"id": 2}]}', "entry 2: no caption"),
        ("vbench", '[{"prompt_en": "a", "dimension": "color"}]', "entry 1: `dimension` is no list"),
        ("mlperf_sdxl", "id\tcaption\n1\n", "line 2 has 1 fields"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, form: str, text: str | bytes, expected: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, text, form)
    line = str(caught.value)
    assert expected in line
    assert str(tmp_path / "prompts.data") in line
    assert "\n" not in line
