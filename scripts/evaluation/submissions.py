"""Files for the servers that score what has no public answers.

Source: the Robust Reading Competition's DocVQA and InfographicVQA tasks; DriveLM's challenge.
"""

from minimonkey.scripts.preparing.drivelm import to_cameras


DRIVELM_FIELDS = ("method", "team", "authors", "e-mail", "institution / company", "country / region")


def for_docvqa(benchmark: dict[str, dict], predictions: dict[str, dict]) -> list[dict]:
    """Return what the DocVQA and InfographicVQA servers take: a list of questionId and answer.

    Raises:
        ValueError: An id that is no number.
    """
    found = []
    for name, line in benchmark.items():
        number = str(line.get("question_id", name))
        if not number.isdecimal():
            raise ValueError(f"The server takes numbers as questionId, got {number!r}.")
        found.append({"questionId": int(number), "answer": predictions[name]["answer"]})
    return found


def for_drivelm(benchmark: dict[str, dict], predictions: dict[str, dict]) -> dict:
    """Return what DriveLM's server takes, points in pixels of the cameras; who submits it is left to be filled in."""
    results = [
        {"id": name, "question": line["question"], "answer": to_cameras(predictions[name]["answer"])}
        for name, line in benchmark.items()
    ]
    return dict.fromkeys(DRIVELM_FIELDS, "") | {"results": results}


SUBMISSIONS = {"docvqa": for_docvqa, "infovqa": for_docvqa, "drivelm": for_drivelm}
