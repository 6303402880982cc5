"""Files for the servers that score what has no public answers.

Source: the Robust Reading Competition's DocVQA and InfographicVQA tasks; DriveLM's challenge; MM-Vet's evaluator.
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


def for_mmvet(benchmark: dict[str, dict], predictions: dict[str, dict]) -> dict[str, str]:
    """Return what MM-Vet's evaluator takes: the answer to each question, under the names v1_0, v1_1 ..."""
    return {f"v1_{name.removeprefix('v1_')}": predictions[name]["answer"] for name in benchmark}


SUBMISSIONS = {"mmvet": for_mmvet, "docvqa": for_docvqa, "infovqa": for_docvqa, "drivelm": for_drivelm}
