"""PROMPTS.jsonl: what is read, and what its errors say."""

import json
from pathlib import Path

import pytest

from deployments.calibration.prompts import read_prompts, sample
from deployments.calibration.records import Message, Prompt


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_prompts_and_messages_are_read(tmp_path: Path) -> None:
    """Empty lines do not count; a prompt that occurs twice is read once."""
    path = write(
        tmp_path,
        '{"prompt": "2 + 2?", "reference": 4, "grade": "number", "max_tokens": 9}',
        "",
        '{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]}',
        '{"prompt": "2 + 2?", "reference": "4", "grade": "number", "max_tokens": 9}',
        '{"prompt": "As JSON?", "reference": {"a": [1, true]}, "grade": "json"}',
    )
    records = [line.record() for line in read_prompts(path)]
    assert records == [
        Prompt((Message("user", "2 + 2?"),), "4", "number", 9),
        Prompt((Message("system", "Be short."), Message("user", "Hi"))),
        Prompt((Message("user", "As JSON?"),), '{"a": [1, true]}', "json"),
    ]
    assert records[1].question == "Hi" and records[1].context == "Be short.Hi"
    assert records[0].body() == {
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "temperature": 0.0,
        "max_tokens": 9,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"promt": "a"}', ("unknown key 'promt'", "did you mean 'prompt'?")),
        ('{"prompt": "a"', ("no JSON object", "one object a line")),
        ('["a"]', ('write {"prompt": "…"}',)),
        ("{}", ('give either "prompt" or "messages"',)),
        (
            '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
            ('give either "prompt" or "messages"',),
        ),
        ('{"prompt": "a", "grade": "regex"}', ('needs a "reference"', "remove")),
        (
            '{"prompt": "a", "reference": "(", "grade": "regex"}',
            ("not a regular expression", "correct it"),
        ),
        (
            '{"prompt": "a", "reference": "four", "grade": "number"}',
            ("not a number", "correct it"),
        ),
        (
            '{"prompt": "a", "reference": "{", "grade": "json"}',
            ("not JSON", "correct it"),
        ),
        ('{"prompt": "a", "reference": " "}', ("the reference is empty",)),
        ('{"prompt": "a", "reference": "b", "grade": "fuzzy"}', ("grade", "'exact'")),
        ('{"prompt": ""}', ("prompt", "at least 1")),
        (
            '{"messages": [{"role": "robot", "content": "a"}]}',
            ("messages.0.role", "'user'"),
        ),
        ('{"prompt": "a", "max_tokens": 0}', ("max_tokens", "greater than or equal")),
    ],
)
def test_an_error_names_the_line_and_what_to_change(
    tmp_path: Path, line: str, words: tuple[str, ...]
) -> None:
    """The first line is right, the second is not."""
    path = write(tmp_path, '{"prompt": "right"}', line)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: ")
    assert all(word in message for word in words), message


def test_many_errors_are_named_together(tmp_path: Path) -> None:
    """Ten of twelve wrong lines are named, and the number of the others; an empty file is an error, too."""
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path, *["{}"] * 12))
    named = str(error.value).split("\n")
    assert len(named) == 11 and named[-1] == "and 2 more lines"
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(write(tmp_path, ""))
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "missing.jsonl")


def test_samples_of_a_file_are_the_same_each_time_and_nest(tmp_path: Path) -> None:
    """A larger sample begins with the smaller one, so it asks nothing twice."""
    path = write(tmp_path, *[json.dumps({"prompt": f"{i}?"}) for i in range(50)])
    prompts = read_prompts(path)
    small = sample(prompts, 10)
    assert small == sample(read_prompts(path), 10) == sample(prompts, 30)[:10]
    assert small != prompts[:10] and len(sample(prompts, 100)) == 50
